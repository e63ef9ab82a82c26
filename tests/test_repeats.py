"""Pairs that are alike counted once: which they are, and a model that sees them so against one that sees all."""

import collections
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrkit import numba_loops, repeats
from ctrkit.batches import GroupedData, Schema
from ctrkit.collate import Collator
from ctrkit.modelfile import build
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.pairs import PairMLP, attend
from ctrkit.recipe import Train
from ctrkit.training import Trainer
from tests.models.reference import make
from tests.small_groups import FEATURES, SCHEMA, SIZES, Group, random_groups, to_block, write_groups

COUNTS = {vocab: np.full(size, 3, np.int64) for vocab, size in SIZES.items()}
DIN: dict[str, Any] = {"model": "din", "din": "din-code", "din_activation": "prelu"}
DICM: dict[str, Any] = {**DIN, "model": "dicm", "user_ids": "din", "user_images": False, "ad_image": False}


def repeating(seed: int = 4) -> list[Group]:
    """Return groups in which ads and behaviours come again; also without behaviours, and with one sample."""
    groups = random_groups(seed, [3, 1, 6, 2, 5], [7, 0, 9, 1, 12])
    rng = np.random.default_rng(seed)
    for group in groups:
        for rows, names in (
            (group.behaviours, ("goods", "brand", "colour")),
            (group.samples, ("ad_goods", "ad_brand")),
        ):
            for row in rows:
                row.update((name, int(rng.integers(2))) for name in names)
    return groups


def test_which_pairs_are_alike() -> None:
    pytest.importorskip("numba", exc_type=ImportError)
    model, groups = build(Train(**DIN), SCHEMA, COUNTS, None), repeating()
    batch = Collator(model.plan, model.tables, None, COUNTS, distinct=True)(to_block(groups))
    found = batch.distinct
    assert found is not None

    def ids(index: dict[str, torch.Tensor], names: list[str], i: Any) -> tuple[int, ...]:
        return tuple(int(batch.rows[model.plan.width(n)][index[n][i]]) for n in names)

    asked, had = ["ad_goods", "ad_brand"], ["goods", "brand", "colour"]
    seen = collections.Counter(
        (int(s), ids(batch.index, asked, s), ids(batch.index, had, b))
        for s, b in zip(batch.sample_P, batch.behaviour_P, strict=True)
    )
    pairs = list(zip(found.query_P.tolist(), found.key_P.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    once = {
        (s, ids(found.index, asked, q), ids(found.index, had, k)): int(found.times_K[k])
        for s, query in enumerate(found.query_S.tolist())
        for q, k in pairs
        if q == query
    }
    assert once == seen
    of_groups = [{tuple(s[n] for n in asked) for s in g.samples} for g in groups]
    assert len(found.index["ad_goods"]) == sum(map(len, of_groups))


def test_few_repeats_are_not_worth_it() -> None:
    pytest.importorskip("numba", exc_type=ImportError)
    model, groups = build(Train(**DIN), SCHEMA, COUNTS, None), random_groups(1, [1] * 4, [2] * 4)
    for i, group in enumerate(groups):
        for j, behaviour in enumerate(group.behaviours):
            behaviour["goods"] = 2 * i + j
    assert Collator(model.plan, model.tables, None, COUNTS, distinct=True)(to_block(groups)).distinct is None


def test_all_pairs_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    group_N, offsets_G = np.array([0, 0, 1, 3, 3]), np.array([0, 2, 2, 5, 6])
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (3, 5), (4, 5)]
    for _ in range(2):
        one_P, other_P = repeats.all_pairs(group_N, offsets_G)
        assert list(zip(one_P.tolist(), other_P.tolist(), strict=True)) == expected
        monkeypatch.setattr(numba_loops, "load", lambda module: None)


@pytest.mark.parametrize("config", [DIN, {**DIN, "din": "din-v1"}, DICM])
def test_a_model_sees_the_same(config: dict[str, Any]) -> None:
    """Loss, log-odds and gradients with pairs counted against all of them, in float64."""
    pytest.importorskip("numba", exc_type=ImportError)
    model = make(config, None)  # type: ignore[arg-type]
    batch = Collator(model.plan, model.tables, None, COUNTS, distinct=True)(to_block(repeating()))
    assert batch.distinct is not None
    assert len(batch.distinct.query_P) < len(batch.sample_P) / 2
    once, each = (seen(model, b) for b in (batch, dataclasses.replace(batch, distinct=None)))
    for one, other in zip(once, each, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def seen(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Return log-odds and the gradients of rows and parameters."""
    rows = {w: model.tables[w].gather(r) for w, r in batch.rows.items()}
    network = model.network.train()
    network.zero_grad()
    logit_S = network(batch, Lookup(batch, rows, {n: model.plan.width(n) for n in model.plan.ids}))
    torch.nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S.double()).backward()
    leaves = [*rows.values(), *network.parameters()]
    return [logit_S.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("how", [{}, {"din_activation": "sigmoid"}, {"din": "din-v1"}])
def test_training_counts_repeats(how: dict[str, Any], alike: Path) -> None:
    """The same curve as without; there are widths that vectors divide, so that PReLU goes through one loop."""
    curves = []
    for counted in (True, False):
        made = trainer(alike, **how)
        if not counted:
            made.collate._distinct_pairs = False
        batches = list(made._made((1, 0), 0))
        assert all((b.distinct is not None) == counted for b in batches)
        made.model.network.train()
        with made._threads():
            curves.append([float(made.step(b)) for b in batches * 2])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("how", [{"din_activation": "dice"}, {"regularisation": "dropout"}, {"compile": True}])
def test_training_that_has_to_see_every_pair(how: dict[str, Any], alike: Path) -> None:
    """Dice's statistics are of all pairs, dropout draws for each, and the compiler takes the plain way."""
    assert all(b.distinct is None for b in trainer(alike, **how)._made((1, 0), 0))


def test_dice_refuses_counts() -> None:
    unit = PairMLP(4, 4, (3,), "dice")
    x, ids = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="every pair"):
        attend(unit, x, x, x, ids, ids, softmax=True, times_B=torch.ones(1))


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Return a folder of groups full of repeats."""
    pytest.importorskip("numba", exc_type=ImportError)
    features = {n: f.model_copy(update={"width": 8}) for n, f in FEATURES.items() if f.kind == "id" and not f.multi_hot}
    return write_groups(tmp_path / "groups", {"train": repeating(5) + repeating(6)}, features)


def trainer(groups: Path, **train: Any) -> Trainer:
    config = Train(**{**DIN, "batch": 9, "threads": 2, "learning_rate": 0.01, "seed": 1, **train})
    model = build(config, Schema.read(groups), COUNTS, None)
    return Trainer(model, COUNTS, GroupedData(groups, "train", model.plan.features), None, None)


def test_numba_that_is_told_not_to_compile_is_as_none() -> None:
    code = "from ctrkit import numba_loops; print(numba_loops.load('ctrkit.compiled_repeats'))"
    words = [sys.executable, "-c", code]
    told = subprocess.run(words, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, check=True)
    assert told.stdout == b"None\n"
