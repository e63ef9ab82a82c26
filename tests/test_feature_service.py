"""Training by 2 and 4 real processes against the plain Trainer of one: the same losses, predictions and tables."""

import functools
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctrkit import preparing, training
from ctrkit.batches import GroupedData, Schema
from ctrkit.data_parallel import DataParallel
from ctrkit.embedding import Table
from ctrkit.errors import UserError
from ctrkit.feature_cache import GIB
from ctrkit.feature_service import FeatureService
from ctrkit.modelfile import build, open_pictures, read_counts
from ctrkit.placement import spreads_pictures
from ctrkit.ranks import Ranks
from ctrkit.recipe import Train
from ctrkit.scoring import all_scores
from tests.ranks import load_loops, on_ranks
from tests.small_groups import SIZES, random_groups, write_features, write_groups, write_image_vocabulary

STEPS, SOME, FEW = 50, 10, 6
BATCH = 11
SMALL: dict[str, Any] = {"extractor": (6, 5, 3), "tower": (7, 5), "attention": (6, 4), "batch": BATCH, "epochs": 100}
SMALL |= {"learning_rate": 0.01, "regularisation_strength": 0.1, "patience": 0, "seed": 2}
DICM = {"user_ids": True, "ad_image": True, "clip_norm": 0.5, "has_picture": True}
DIN = {"model": "din", "activation": "dice", "din": "din-code", "din_activation": "dice"}
CASES: dict[str, dict[str, Any]] = {
    "dicm": {**DICM, "precision": "float64", "placement": "shard"},
    "din": {**DIN, "precision": "float64", "placement": "shard"},
}
"""Trained for 50 steps by one process, by 2 and by 4 ranks."""
ROUNDED = {f"{name} in float32": {**case, "precision": "float32"} for name, case in CASES.items()}
"""For 10 steps, likewise."""
SHORT: dict[str, dict[str, Any]] = {
    "shared extractors of dice, dropout": {
        **DICM,
        "precision": "float64",
        "placement": "replicate",
        "extractor_activation": "dice",
        "activation": "dice",
        "share_extractors": True,
        "regularisation": "dropout",
        "user_ids": "din",
    },
    "pictures everywhere": {**DICM, "user_images": "simtier+pooled", "precision": "float64"},
    "pooling by max": {**DICM, "pooling": "max", "user_ids": False, "precision": "float64", "placement": "shard"},
    "lr": {"model": "lr", "precision": "float64", "placement": "shard", "regularisation": "difacto"},
    "replicated": {**DIN, "precision": "float64", "placement": "replicate"},
}
"""For 6 steps, by one process and by 3 ranks."""
WAYS_TO_READ = [(0, 0), (0, 2), (1, 1), (3, 2), (100, 0), (100, 2)]
"""By 2 ranks: rows of features that are held, and batches that are prepared ahead."""
ROW_BYTES = 10
LENGTH = {**dict.fromkeys(CASES, STEPS), **dict.fromkeys(ROUNDED, SOME), **dict.fromkeys(SHORT, FEW)}
ROUNDING = 2.0**-20
"""How far from the exact loss that of a step in float32 may be, as a share of it: sixteen times what one number is
rounded by, for sums of some thousand terms. One process is as far off."""


def write(folder: Path) -> None:
    """Groups most of which have no behaviours, so that ranks have none in some batches; a last batch that is short."""
    rng = np.random.default_rng(4)
    n_samples = rng.integers(1, 6, 63)
    n_behaviours = rng.integers(1, 5, 63) * (rng.random(63) < 0.4)
    groups = random_groups(3, n_samples.tolist(), n_behaviours.tolist())
    assert sum(n_samples) % BATCH
    write_groups(folder / "groups", {"train": groups, "valid": groups[:9]}, block_groups=20, part_groups=40)
    n = SIZES["image"] - 2
    row = [*range(n)]
    row[3] = -1
    write_features(folder / "features.h5", [f"p{i}" for i in range(n)], row, rng.normal(1.0, 0.5, (n, 5)))
    write_image_vocabulary(folder / "convert", [f"p{i}" for i in range(n)], [1] * n)


def before_forks() -> None:
    """Import once for all ranks what takes long and starts no thread."""
    importlib.import_module("torch._dynamo")  # which DistributedDataParallel asks about its settings
    load_loops()


@functools.cache
def connected(ranks: Ranks) -> DataParallel:
    """Return the ranks' groups, which all trainings share."""
    return DataParallel(ranks, "cpu")


def trainer(config: Train, ranks: Ranks, folder: Path) -> training.Trainer:
    """Return the trainer of a rank, as the stage makes it."""
    groups = folder / "groups"
    schema = Schema.read(groups)
    counts = read_counts(groups, schema)
    pictures = open_pictures(config, folder / "features.h5", folder / "convert")
    model = build(config, schema, counts, pictures, ranks=ranks)
    if ranks.count > 1:
        spread = spreads_pictures(model.plan, ranks.count)
        model.service = FeatureService(connected(ranks), model.tables, pictures, spread_pictures=spread)
        if pictures is not None:
            model.service.fit_pictures(counts["image"])
    elif pictures is not None:
        pictures.fit(counts["image"])
    valid = GroupedData(groups, "valid", model.plan.features)
    users = training.sample_users(valid)
    return training.Trainer(model, counts, GroupedData(groups, "train", model.plan.features), valid, users)


def trained(
    config: Train, steps: int, ranks: Ranks, folder: Path, ready: int = preparing.READY_ON_CPUS
) -> dict[str, Any]:
    """Train for so many steps, with so many batches prepared ahead; return what came of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "READY_ON_CPUS", ready)
        return _trained(config, steps, ranks, folder)


def _trained(config: Train, steps: int, ranks: Ranks, folder: Path) -> dict[str, Any]:
    made = trainer(config, ranks, folder)
    model = made.model
    losses: list[float] = []
    empty = 0
    step = made.step

    def counted(batch: Any) -> torch.Tensor:
        nonlocal empty
        empty += len(batch.group_B) == 0
        losses.append(float(loss := step(batch)))
        if len(losses) == steps:
            made.epoch = config.epochs - 1
            made.batch = -(-len(made.train) // BATCH) - 1
        return loss

    made.step = counted  # type: ignore[method-assign]
    made.run()
    assert made.valid is not None
    score, _ = all_scores(model, made.valid, 7)
    tensors = {**model.tensors(), **made.optimiser_state()}
    plain = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    out = {"losses": losses, "empty": empty, "records": made.records, "scores": score}
    if model.pictures is not None:
        out["held"] = model.pictures.cache.uses().levels["host"].rows_held
    if model.service is not None:
        out["traffic"] = model.service.traffic()
    return out if ranks.rank else {**out, "tensors": plain}


def every_case(ranks: Ranks, folder: Path) -> dict[str, Any]:
    long, short = ranks.count != 3, ranks.count in (1, 3)
    cases = {**(CASES | ROUNDED if long else {}), **(SHORT if short else {})}
    found: dict[str, Any] = {}
    for name, case in cases.items():
        found[name] = trained(Train(**{**SMALL, **case}), LENGTH[name], ranks, folder)
    if ranks.count == 2:
        found["ways to read"] = [
            trained(Train(**{**SMALL, **DICM, "host_cache_gib": rows * ROW_BYTES / GIB}), FEW, ranks, folder, ready)
            for rows, ready in WAYS_TO_READ
        ]
    return found | {"spoilt": spoilt(ranks, folder)}


def spoilt(ranks: Ranks, folder: Path) -> tuple[str, str]:
    """Train until the fourth step, in which a weight is not a number; return which error comes, and its text."""
    made = trainer(Train(**{**SMALL, "model": "lr"}), ranks, folder)
    made.bad_batch = folder / f"bad-{ranks.count}-{ranks.rank}.parquet"
    step = made.step

    def spoiling(batch: Any) -> torch.Tensor:
        if made.steps == 3:
            made.model.network.bias.data.fill_(math.nan)  # type: ignore[operator, union-attr]
        return step(batch)

    made.step = spoiling  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        made.run()
    return type(error.value).__name__, error.value.message


def test_a_step_that_is_not_finite_is_told_by_the_first_rank(folder: Path, found: dict[int, list[Any]]) -> None:
    one = found[1][0]["spoilt"]
    whole = pl.read_parquet(folder / "bad-1-0.parquet")
    assert whole.height == BATCH
    for count, ranks in list(found.items())[1:]:
        first, *others = (rank["spoilt"] for rank in ranks)
        assert first[0] == "UserError"
        assert first[1] == one[1].replace("bad-1-0", f"bad-{count}-0")
        assert [kind for kind, _ in others] == ["ToldByFirst"] * (count - 1)
        assert pl.read_parquet(folder / f"bad-{count}-0.parquet").equals(whole)
        assert not (folder / f"bad-{count}-1.parquet").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write(path)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[Any]]:
    return on_ranks(every_case, [1, 2, 3, 4], folder)


def several(found: dict[int, list[Any]], name: str) -> list[list[dict[str, Any]]]:
    """Return what the ranks of each number that made a training found of it."""
    return [[rank[name] for rank in ranks] for count, ranks in found.items() if count > 1 and name in ranks[0]]


@pytest.mark.parametrize("name", [*CASES, *SHORT])
def test_ranks_train_the_model_of_one_process(name: str, found: dict[int, list[Any]]) -> None:
    one = found[1][0][name]
    assert len(one["losses"]) == LENGTH[name]
    assert len(several(found, name)) == (1 if name in SHORT else 2)
    for ranks in several(found, name):
        first = ranks[0]
        np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-9)
        np.testing.assert_allclose(first["scores"], one["scores"], rtol=1e-6)  # float32
        for key, tensor in one["tensors"].items():
            ours = first["tensors"][key]
            if key.endswith((".m", ".v")):  # nobody reads the moments of padding
                ours, tensor = ours[1:], tensor[1:]
            np.testing.assert_allclose(ours, tensor, rtol=1e-7, atol=1e-9)
        assert [r["step"] for r in first["records"]] == [r["step"] for r in one["records"]]
        for mine, its in zip(first["records"], one["records"], strict=True):
            assert mine == pytest.approx(its, rel=1e-7)
        agreed(ranks)


def agreed(ranks: list[dict[str, Any]]) -> None:
    """Check that ranks have the same losses and records, and that one had a batch without any behaviour."""
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["records"] == ranks[0]["records"]
    assert any(rank["empty"] for rank in ranks)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_float32_ranks_have_the_losses_of_float64_to_rounding(name: str, found: dict[int, list[Any]]) -> None:
    exact = found[1][0][name.removesuffix(" in float32")]["losses"][:SOME]
    assert len(several(found, name)) == 2
    for ranks in [[found[1][0][name]], *several(found, name)]:
        np.testing.assert_allclose(ranks[0]["losses"], exact, rtol=ROUNDING)
        if len(ranks) > 1:
            agreed(ranks)


def test_what_is_held_and_prepared_ahead_changes_no_bit(found: dict[int, list[Any]]) -> None:
    for rank in found[2]:
        plain, *others = rank["ways to read"]
        for other in others:
            assert other["losses"] == plain["losses"]
            assert other["records"] == plain["records"]
            assert other["scores"].tobytes() == plain["scores"].tobytes()
            for name, tensor in plain.get("tensors", {}).items():
                assert other["tensors"][name].tobytes() == tensor.tobytes(), name
    # Of eight rows, of which one has no picture, each rank has four.
    assert [[way["held"] for way in rank["ways to read"]] for rank in found[2]] == [[0, 0, 1, 3, 4, 4]] * 2


def test_a_picture_that_several_ranks_show_is_extracted_once(found: dict[int, list[Any]]) -> None:
    for count in (2, 4):
        traffic = found[count][0]["dicm"]["traffic"]
        assert 0 < traffic["pictures extracted"] < traffic["pictures named"]
        assert traffic["bytes of picture vectors"] > traffic["bytes of picture gradients"] > 0
        assert all(rank["dicm"]["traffic"] == traffic for rank in found[count])
    assert found[3][0]["pictures everywhere"]["traffic"]["bytes of picture vectors"] == 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_spread_table_starts_as_the_whole_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrkit.embedding.DRAW", 32)
    sizes, counts = {"a": 30, "b": 41}, {"a": np.arange(30), "b": np.arange(41)}

    def table(rank: int, ranks: int) -> Table:
        return Table(sizes, 3, counts, torch.Generator().manual_seed(5), share=(rank, ranks))

    whole = table(0, 1)
    assert torch.equal(whole.weight_VD[1:], 0.05 * torch.randn(72, 3, generator=torch.Generator().manual_seed(5))[1:])
    for rank in range(count):
        here = table(rank, count)
        rows = torch.arange(rank, 72, count)
        assert torch.equal(here.weight_VD[here.local(rows)], whole.weight_VD[rows])
        assert torch.equal(here.count_V[here.local(rows)], whole.count_V[rows])
        assert not here.weight_VD[0].any()
        here.put("m_VD", torch.arange(1, 72), torch.arange(1.0, 72).unsqueeze(1).expand(-1, 3))
        assert here.m_VD[here.local(rows), 0].tolist() == rows.tolist()
        here.take_over("v_VD", torch.arange(72.0).unsqueeze(1).expand(-1, 3))
        assert here.v_VD[here.local(rows), 0].tolist() == rows.tolist()
