"""Training: the step against loops, what is kept, when it stops; what can be learned is, and noise is not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctrkit import training
from ctrkit.batches import GroupedData, Schema
from ctrkit.embedding import REGULARISATIONS
from ctrkit.errors import UserError
from ctrkit.gauc import gauc
from ctrkit.modelfile import build, open_pictures, read_counts
from ctrkit.models.batch import Batch, Lookup
from ctrkit.recipe import Feature, Recipe, Train
from ctrkit.scoring import scores
from tests.models.reference import log_loss, sigmoid
from tests.small_groups import (
    FEATURES,
    Group,
    random_groups,
    write_features,
    write_groups,
    write_image_vocabulary,
)

Rng = np.random.Generator


def trainer(groups: Path, pictures: Path | None = None, **train: Any) -> training.Trainer:
    """Return a trainer as the stage makes it."""
    torch.set_num_threads(1)
    config = Train(**{"model": "base", "tower": (16,), "batch": 64, "epochs": 3, **train})
    schema = Schema.read(groups)
    vectors = open_pictures(config, pictures and pictures / "features.h5", pictures and pictures / "convert")
    if vectors is not None:
        vectors.fit()
    counts = read_counts(groups, schema)
    model = build(config, schema, counts, vectors)
    valid = GroupedData(groups, "valid", model.plan.features) if any((groups / "valid").glob("part-*")) else None
    users = training.sample_users(valid) if valid else None
    return training.Trainer(model, counts, GroupedData(groups, "train", model.plan.features), valid, users)


# Worlds with a known answer: users with a history of goods, ads that are goods, a rule for the click.

WORLD = Recipe.model_validate(
    {
        "name": "world",
        "features": {
            "gender": {"of": "user"},
            "ad_id": {"of": "ad", "switch": "ad_id"},
            "ad_goods": {"of": "ad", "vocab": "goods"},
            "ad_image": {"of": "ad", "kind": "image"},
            "goods": {"of": "behaviour"},
            "image": {"of": "behaviour", "kind": "image"},
        },
    }
).features
SIZES = {"gender": 4, "ad_id": 42, "goods": 22, "image": 202}
Rule = Callable[[Rng, dict[str, Any], list[int]], float]


def world(folder: Path, rule: Rule, features: dict[str, Feature] = WORLD, n: int = 500) -> Path:
    """Write groups in which an ad is clicked with the chance that `rule` gives; validation shows new pictures."""
    rng = np.random.default_rng(8)

    def group(number: int, images: tuple[int, int]) -> Group:
        goods = rng.integers(2, 22, 3).tolist()
        samples = []
        for s in range(6):
            ad = {"ad_id": int(rng.integers(2, 42)), "ad_image": int(rng.integers(*images))}
            ad["ad_goods"] = int(rng.choice(goods)) if rng.random() < 0.5 else int(rng.integers(2, 22))
            ad |= {"sample_id": 10 * number + s, "click": int(rng.random() < rule(rng, ad, goods))}
            samples.append(ad)
        return Group({"gender": 2 + number % 2}, [{"goods": g, "image": 0} for g in goods], samples, number)

    train = [group(i, (2, 102)) for i in range(n)]
    valid = [group(i, (102, 202)) for i in range(n, n + 200)]
    sizes = {f.vocab: SIZES[f.vocab] for f in features.values()}
    return write_groups(folder, {"train": train, "valid": valid}, features, sizes, block_groups=100, part_groups=250)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("noise") / "groups", lambda rng, ad, goods: 0.4)


# The step.


@pytest.mark.parametrize("regularisation", REGULARISATIONS)
def test_steps_of_logistic_regression_against_loops(regularisation: str, tmp_path: Path) -> None:
    """Two epochs of Adam on the bias and row-wise Adam on the weights, with a learning rate that decays in stairs."""
    groups = random_groups(3, [3, 2, 4, 1, 5], [1, 0, 2, 1, 0])
    folder = write_groups(tmp_path / "groups", {"train": groups}, block_groups=2)
    config: dict[str, Any] = {"learning_rate": 0.05, "decay": 0.5, "decay_steps": 3, "regularisation_strength": 0.2}
    config |= {"model": "lr", "batch": 4, "epochs": 2, "unknown_rate": 0.0, "regularisation": regularisation}
    made = trainer(folder, **config)
    made.run()

    names = [n for n, f in FEATURES.items() if f.of in ("user", "ad", "scene") and f.kind == "id"]
    counts = read_counts(folder, Schema.read(folder))
    owner = {s["sample_id"]: (g, s) for g in groups for s in g.samples}
    weight: dict[tuple[str, int], list[float]] = {}  # w, m, v
    bias = [0.0, 0.0, 0.0]
    step = 0

    def adam(number: list[float], gradient: float, rate: float) -> None:
        number[1] = 0.9 * number[1] + 0.1 * gradient
        number[2] = 0.999 * number[2] + 0.001 * gradient**2
        number[0] -= rate * number[1] * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) / (math.sqrt(number[2]) + 1e-8)

    for epoch in range(2):
        for block in made.train.epoch(4, (made.config.seed, epoch)):
            rate = 0.05 * 0.5 ** (step // 3)
            step += 1
            slope: dict[tuple[str, int], float] = {}
            bias_slope = 0.0
            ids = np.asarray(block.sample["sample_id"]).tolist()
            for i in ids:
                group, sample = owner[i]
                row = {**group.user, **sample}
                found = [
                    (FEATURES[n].vocab, v)
                    for n in names
                    for v in (row[n] if FEATURES[n].multi_hot else [row[n]])
                    if v > 0
                ]
                z = bias[0] + sum(weight.setdefault(key, [0.0, 0.0, 0.0])[0] for key in found)
                for key in found:
                    slope[key] = slope.get(key, 0.0) + (sigmoid(z) - sample["click"]) / len(ids)
                bias_slope += (sigmoid(z) - sample["click"]) / len(ids)
            for key, g in slope.items():
                n = max(int(counts[key[0]][key[1]]), 1)
                factor = {"adaptive": 1 / n, "difacto": n, "l2": 1.0}.get(regularisation, 0.0)
                adam(weight[key], g + 0.2 * factor * weight[key][0], rate)
            adam(bias, bias_slope, rate)
    assert made.steps == step == 8
    assert made.model.network.bias.item() == pytest.approx(bias[0], rel=1e-4)
    table = made.model.tables[1]
    for (vocab, index), (w, _, _) in weight.items():
        assert table.weight_VD[table.offsets[vocab] + index].item() == pytest.approx(w, rel=1e-3, abs=1e-6)
    assert int((table.weight_VD != 0).sum()) == sum(w != 0 for w, _, _ in weight.values())


def test_weight_decay_is_for_matrices(noise: Path) -> None:
    groups = trainer(noise, weight_decay=0.3).adam.param_groups
    for group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim > 1 else 0)
    assert sum(len(g["params"]) for g in groups) == len(list(trainer(noise).model.network.parameters()))


# The records.


def test_what_is_recorded(noise: Path) -> None:
    made = trainer(noise, model="lr", evaluate_every=20, epochs=1, decay=0.5, decay_steps=8, learning_rate=0.01)
    made.run()
    n = 500 * 6
    steps = math.ceil(n / 64)
    assert [r["step"] for r in made.history] == [20, 40, steps]
    assert [r["samples"] for r in made.history] == [20 * 64, 40 * 64, n]
    assert [r["epoch"] for r in made.history] == [1, 1, 1]
    assert [r["learning_rate"] for r in made.history] == [0.01 * 0.5 ** ((r["step"] - 1) // 8) for r in made.history]
    lines = training.metrics_lines(made.records).splitlines()
    assert [json.loads(line) for line in lines] == made.records == made.history


def test_lines_between_the_validations(noise: Path) -> None:
    """The mean loss since the line before, whatever was validated in between."""
    every = trainer(noise, model="lr", epochs=2, log_every=1)
    every.run()
    losses = [r["loss"] for r in every.records if "valid_gauc" not in r]
    made = trainer(noise, model="lr", epochs=2, log_every=15, evaluate_every=20, patience=0)
    made.run()
    steps = math.ceil(500 * 6 / 64)
    lines = [r for r in made.records if "valid_gauc" not in r]
    assert [r["step"] for r in lines] == list(range(15, 2 * steps, 15))
    assert list(lines[0]) == ["step", "epoch", "samples", "loss", "learning_rate"]
    last = 500 * 6 - 64 * (steps - 1)
    weights = np.array(([64] * (steps - 1) + [last]) * 2)
    for r in lines:
        window = slice(r["step"] - 15, r["step"])
        assert r["loss"] == pytest.approx(np.average(losses[window], weights=weights[window]), rel=1e-6)
        assert (r["epoch"], r["samples"]) == (1 + (r["step"] - 1) // steps, weights[: r["step"]].sum())


def test_the_loss_before_the_first_step(noise: Path) -> None:
    """Logistic regression starts at zero, so its first batch costs ln 2."""
    made = trainer(noise, model="lr", log_every=1, epochs=1)
    made.run()
    assert made.records[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_validation_is_loss_and_gauc_of_the_scores(noise: Path) -> None:
    made = trainer(noise, epochs=1)
    made.run()
    assert made.valid is not None
    score = np.concatenate([s for _, s in scores(made.model, made.valid, 4096)]).astype(np.float64)
    rows = list(made.valid.blocks())
    click = np.concatenate([np.asarray(b.sample["click"]) for b in rows])
    user = np.repeat(np.arange(200), 6)
    total = wins = 0.0
    for u in range(200):
        pairs = [
            (a > b) + 0.5 * (a == b)
            for a in score[(user == u) & (click == 1)]
            for b in score[(user == u) & (click == 0)]
        ]
        if pairs:
            total, wins = total + 6, wins + 6 * float(np.mean(pairs))
    groups = [Group({}, [], [{"click": int(c)} for c in click])]
    assert made.history[-1]["valid_gauc"] == pytest.approx(wins / total, rel=1e-9)
    assert made.history[-1]["valid_loss"] == pytest.approx(log_loss(np.log(score / (1 - score)), groups), rel=1e-6)


def test_users_are_told_apart_by_their_raw_id(tmp_path: Path) -> None:
    """Groups of one user on two days are one user, whatever index the vocabulary gives."""
    groups = random_groups(1, [2, 1, 3], [0, 0, 0])
    for group, user in zip(groups, ("b", "a", "b"), strict=True):
        group.user["user"] = user
    folder = write_groups(tmp_path / "groups", {"valid": groups})
    users = training.sample_users(GroupedData(folder, "valid", ["gender"]))
    assert users.tolist() == [2, 2, 1, 2, 2, 2]


# What is kept, and when training stops.


def final_gauc(made: training.Trainer) -> float | None:
    assert made.valid is not None
    parts = list(scores(made.model, made.valid, 512))
    click = np.concatenate([np.asarray(b.sample["click"]) for b, _ in parts])
    return gauc(made.valid_users, click, np.concatenate([s for _, s in parts])).value


def test_the_best_of_the_validations_is_kept(noise: Path) -> None:
    made = trainer(noise, evaluate_every=10, epochs=2, regularisation="none", learning_rate=0.01, patience=0)
    made.run()
    found = [r["valid_gauc"] for r in made.history]
    assert np.argmax(found) < len(found) - 1  # on noise, the last is not the best
    assert final_gauc(made) == max(found)


def test_patience(noise: Path) -> None:
    every = {"evaluate_every": 10, "epochs": 4, "learning_rate": 0.01}
    whole = trainer(noise, **every, patience=0)
    whole.run()
    curve = [r["valid_gauc"] for r in whole.history]
    for patience in (1, 3):
        made = trainer(noise, **every, patience=patience)
        made.run()
        best, waited, expected = -math.inf, 0, 0
        for value in curve:
            expected += 1
            best, waited = (value, 0) if value > best else (best, waited + 1)
            if waited == patience:
                break
        assert [r["valid_gauc"] for r in made.history] == curve[:expected]
        assert len(made.history) < len(curve)
        assert final_gauc(made) == best


def test_without_validation_the_last_model_is_kept(tmp_path: Path) -> None:
    """Also where no validation user has both clicks and non-clicks."""
    train = random_groups(1, [5] * 8, [2] * 8)
    valid = random_groups(2, [3] * 4, [2] * 4)
    for group in valid:
        for sample in group.samples:
            sample["click"] = group.group_id % 2
    for name, splits in {"none": {"train": train}, "one class": {"train": train, "valid": valid}}.items():
        folder = write_groups(tmp_path / name, splits)
        made, last = trainer(folder, batch=10, patience=1), []
        made_step = made.step

        def step(batch: Any, made_step: Any = made_step, made: Any = made, last: list[Any] = last) -> Any:
            loss = made_step(batch)
            last[:] = [made.model.state()]
            return loss

        made.step = step  # type: ignore[method-assign]
        made.run()
        assert made.steps == 12
        assert [r["valid_gauc"] for r in made.history] == [None] * 3
        kept = made.model.state()
        assert all(torch.equal(t, kept[n]) for n, t in last[0].items() if not n.endswith("seen"))


# Gradients: clipped, and not finite.


def step_gradients(made: training.Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the data gradient of a batch by parameter, of table rows too, changing nothing."""
    rows = {w: made.model.tables[w].gather(r) for w, r in batch.rows.items()}
    logit_S = made.model.network(batch, Lookup(batch, rows, made.widths))
    torch.nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S).backward()
    found = {n: p.grad.clone() for n, p in made.model.network.named_parameters() if p.grad is not None}
    made.model.network.zero_grad()
    return found | {f"table.{w}": row.grad.clone() for w, row in rows.items() if row.grad is not None}


def test_clipping_sees_the_data_gradient_of_dense_parameters_and_rows_together(noise: Path) -> None:
    """From the first moments after one step: m = 0.1·(c·g + regulariser), c the same for all."""
    how: dict[str, Any] = {"batch_norm": False, "weight_decay": 0.3, "regularisation": "l2"}
    for clip in (0.0, 1e-3, 1e9):
        made = trainer(noise, **how, clip_norm=clip)
        block = next(made.train.epoch(64, (1, 0)))
        batch = made.collate(block, (1, 0))
        gradients = step_gradients(made, batch)
        before = {n: p.detach().clone() for n, p in made.model.network.named_parameters()}
        weight_UD = made.model.tables[12].weight_VD[batch.rows[12]].clone()
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        factor = min(1.0, clip / norm) if clip else 1.0
        assert (factor < 1) == (clip == 1e-3)
        made.step(batch)
        assert float(made.gradient_norm) == pytest.approx(norm, rel=1e-5)
        for name, p in made.model.network.named_parameters():
            expected = factor * gradients[name] + (0.3 * before[name] if p.ndim > 1 else 0)
            torch.testing.assert_close(made.adam.state[p]["exp_avg"], 0.1 * expected, rtol=2e-3, atol=1e-8)
        expected = factor * gradients["table.12"] + 0.01 * weight_UD
        found = made.model.tables[12].m_VD[batch.rows[12]]
        torch.testing.assert_close(found[1:], 0.1 * expected[1:], rtol=2e-3, atol=1e-8)


def test_a_loss_that_is_not_finite(noise: Path, tmp_path: Path) -> None:
    """The batch is kept with the scores that its samples had before the step."""
    made = trainer(noise, learning_rate=1e30, batch_norm=False)
    made.bad_batch = tmp_path / "bad.parquet"
    with pytest.raises(UserError, match=r"at step 2, in epoch 1: the loss is .*bad.parquet has the batch") as error:
        made.run()
    assert "Lower [train] learning_rate (now 1e+30), set clip_norm, or" in str(error.value)
    table = pl.read_parquet(tmp_path / "bad.parquet")
    blocks = made.train.epoch(64, (made.config.seed, 0))
    next(blocks)
    block = next(blocks)
    ids = np.asarray(block.sample["sample_id"])
    assert table["sample_id"].to_list() == ids.tolist()
    assert table["click"].to_list() == np.asarray(block.sample["click"]).tolist()
    assert not table["loss"].is_finite().all()
    assert table.columns[:5] == ["sample_id", "click", "score", "loss", "group_id"]
    assert set(table.columns[5:]) == {"gender", "ad_id", "ad_goods", "goods"}
    truth = pl.concat(list(made.train.frames(["sample_id", "gender", "ad_goods", "goods"])))
    one = truth.filter(pl.col("sample_id").list.contains(int(ids[9])))
    place = one["sample_id"][0].to_list().index(ids[9])
    found = table.row(9, named=True)
    assert (found["gender"], found["ad_goods"]) == (one["gender"][0], one["ad_goods"][0][place])
    assert found["goods"] == one["goods"][0].to_list()


@pytest.mark.parametrize("look_every", [1, 7, 1000])
def test_a_gradient_that_is_not_finite_is_found_whenever_one_looks(
    look_every: int, noise: Path, tmp_path: Path
) -> None:
    """Also some steps later, as on a GPU: by then nothing has moved, and the step and its batch are told exactly."""
    bad = 30
    plain = trainer(noise)
    plain.check_steps = 1
    made = trainer(noise)
    made.check_steps = look_every
    made.bad_batch = tmp_path / "bad.parquet"
    ids: list[int] = []
    for one in (plain, made):
        spoil(one, bad)
    states: list[dict[str, torch.Tensor]] = []
    for one in (plain, made):
        with pytest.raises(UserError) as error:
            one.run()
        assert f"at step {bad}, in epoch 1: the gradient of discriminator.layers.0.bias is not finite" in str(
            error.value
        )
        states.append({n: t for n, t in one.model.state().items() if "running" not in n and "tracked" not in n})
    assert made.steps == {1: 30, 7: 35, 1000: math.ceil(500 * 6 / 64)}[look_every]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    for number, block in enumerate(plain.train.epoch(64, (1, 0)), 1):
        if number == bad:
            ids = np.asarray(block.sample["sample_id"]).tolist()
    table = pl.read_parquet(tmp_path / "bad.parquet")
    assert table["sample_id"].to_list() == ids
    assert table["score"].is_between(0, 1).all()
    batch = made.collate(next(made.train.epoch(64, (1, 0), skip=bad - 1)), (1, 0))
    rows = {w: made.model.tables[w].gather(r) for w, r in batch.rows.items()}
    made.model.network.train()
    score = torch.sigmoid(made.model.network(batch, Lookup(batch, rows, made.widths)))
    np.testing.assert_array_equal(table["score"].to_numpy(), score.detach().numpy())


def spoil(made: training.Trainer, step: int) -> None:
    """Make a gradient infinite, in one step (and where it is looked at again) and not in the loss."""
    bias = made.model.network.get_parameter("discriminator.layers.0.bias")
    wanted = np.asarray(next(made.train.epoch(64, (1, 0), skip=step - 1)).sample["sample_id"])
    collate, forward, spoilt, seen = made.collate, made._forward_S, set(), {"now": False}

    def collate_and_see(block: Any, seed: Any) -> Batch:
        batch = collate(block, seed)
        if np.array_equal(np.asarray(block.sample["sample_id"]), wanted):
            spoilt.add(id(batch.click_S))
        return batch

    def forward_and_see(batch: Batch, rows: Any) -> torch.Tensor:
        seen["now"] = id(batch.click_S) in spoilt  # batches are made ahead of their step
        return forward(batch, rows)

    made.collate = collate_and_see  # type: ignore[assignment]
    made._forward_S = forward_and_see  # type: ignore[method-assign]
    bias.register_hook(lambda gradient: gradient / 0 if seen["now"] else gradient)


def test_validation_scores_that_are_not_finite(noise: Path) -> None:
    made = trainer(noise)
    assert made.valid is not None
    made.model.tables[12].weight_VD.fill_(math.nan)
    with pytest.raises(UserError, match=r"some validation scores of step 0 are not finite. Lower \[train\] learning"):
        made._validate(made.valid)


# Precision.


@pytest.mark.parametrize("model", ["lr", "base", "din"])
def test_float64_from_end_to_end(model: str, noise: Path) -> None:
    """The same start, and the same course to float32's rounding."""
    made = {p: trainer(noise, model=model, precision=p, epochs=1, log_every=1) for p in ("float32", "float64")}
    first = {p: t.model.state() for p, t in made.items()}
    assert all(torch.equal(t.double(), first["float64"][n].double()) for n, t in first["float32"].items())
    for one in made.values():
        one.run()
    last = made["float64"].model.state() | made["float64"].optimiser_state()
    assert {t.dtype for n, t in last.items() if t.is_floating_point() and not n.endswith(".step")} == {torch.float64}
    narrow, wide = ([r["loss"] for r in made[p].records] for p in ("float32", "float64"))
    assert narrow != wide
    assert narrow[:10] == pytest.approx(wide[:10], rel=1e-5)
    assert narrow == pytest.approx(wide, rel=1e-3)


@pytest.mark.parametrize("model", ["base", "din", "dicm"])
@pytest.mark.parametrize("activation", ["prelu", "dice"])
def test_bfloat16_learns_as_float32_does(model: str, activation: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 8))
    images = [f"p{i}" for i in range(200)]
    write_features(tmp_path / "features.h5", images, range(200), vectors)
    write_image_vocabulary(tmp_path / "convert", images, [1] * 100 + [0] * 100)
    folder = world(tmp_path / "groups", lambda rng, ad, goods: 0.95 if ad["ad_id"] % 2 else 0.05, n=300)
    how: dict[str, Any] = {"model": model, "activation": activation, "learning_rate": 0.01, "extractor": (16, 6)}
    pictures = tmp_path if model == "dicm" else None
    made = {p: trainer(folder, pictures, precision=p, epochs=2, **how) for p in ("float32", "bfloat16")}
    for one in made.values():
        one.run()
    best = {p: max(r["valid_gauc"] for r in one.history) for p, one in made.items()}
    assert best["bfloat16"] == pytest.approx(best["float32"], abs=0.05)
    assert made["bfloat16"].history[0]["loss"] == pytest.approx(made["float32"].history[0]["loss"], abs=0.02)
    assert made["bfloat16"].history[0]["loss"] != made["float32"].history[0]["loss"]
    state = made["bfloat16"].model.state()
    assert {t.dtype for t in state.values() if t.is_floating_point()} <= {torch.float32, torch.float64}


# Known answers.


def best_gauc(made: training.Trainer) -> float:
    made.run()
    return max(r["valid_gauc"] for r in made.history)


@pytest.mark.parametrize("model", ["lr", "base", "din"])
def test_noise_is_not_learned(model: str, noise: Path) -> None:
    """200 users with some 5.5 pairs of draws: the GAUC of any fixed order has a standard error of about 0.025."""
    made = trainer(noise, model=model, epochs=2)
    made.run()
    assert abs(made.history[-1]["valid_gauc"] - 0.5) < 0.1
    assert made.history[-1]["valid_loss"] == pytest.approx(0.673, abs=0.02)  # the entropy of a chance of 0.4


@pytest.mark.parametrize("model", ["lr", "base", "din", "dicm"])
def test_an_id_that_decides_is_learned(model: str, tmp_path: Path) -> None:
    folder = world(tmp_path / "groups", lambda rng, ad, goods: 0.95 if ad["ad_id"] % 2 else 0.05)
    switches = {"ad_image": False, "user_images": False}
    assert best_gauc(trainer(folder, model=model, learning_rate=0.01, **switches)) > 0.9
    if model == "lr":
        without = trainer(folder, model=model, learning_rate=0.01, ad_id=False)
        without.run()
        assert abs(without.history[-1]["valid_gauc"] - 0.5) < 0.1


@pytest.mark.parametrize("din", ["din-v1", "din-code"])
def test_local_activation_is_learned(din: str, tmp_path: Path) -> None:
    """Clicked is what the user has seen before: only a comparison of ad and behaviours can tell."""
    folder = world(tmp_path / "groups", lambda rng, ad, goods: 0.95 if ad["ad_goods"] in goods else 0.05, n=700)
    how = {"learning_rate": 0.01, "epochs": 6}
    assert best_gauc(trainer(folder, model="din", din=din, **how)) > 0.9
    if din == "din-code":
        assert best_gauc(trainer(folder, model="lr", **how)) < 0.6


def test_what_a_picture_shows_is_learned_and_holds_for_new_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8)) + 5.0
    images = [f"p{i}" for i in range(200)]
    write_features(tmp_path / "features.h5", images, range(200), vectors)
    write_image_vocabulary(tmp_path / "convert", images, [1] * 100 + [0] * 100)
    folder = world(tmp_path / "groups", lambda rng, ad, goods: 0.95 if vectors[ad["ad_image"] - 2, 3] > 5.0 else 0.05)
    how = {"model": "dicm", "user_images": False, "extractor": (16, 6), "learning_rate": 0.01}
    assert best_gauc(trainer(folder, tmp_path, **how)) > 0.85
    shuffled = trainer(folder, tmp_path, **how, shuffle_pictures=True)
    shuffled.run()
    assert abs(shuffled.history[-1]["valid_gauc"] - 0.5) < 0.1


def test_seeds(noise: Path) -> None:
    """In one process; tests/stages/test_train.py compares the files of two."""

    def states(seed: int) -> dict[str, torch.Tensor]:
        made = trainer(noise, epochs=1, seed=seed, activation="dice")
        made.run()
        return made.model.state()

    one, again, other = states(1), states(1), states(2)
    assert all(torch.equal(t, again[n]) for n, t in one.items())
    assert not all(torch.equal(t, other[n]) for n, t in one.items())


def test_an_unknown_id_is_a_trained_row(tmp_path: Path) -> None:
    """With a chance to become unknown, the unknown row learns; without one it keeps its first value."""
    folder = world(tmp_path / "groups", lambda rng, ad, goods: 0.9, {"ad_id": WORLD["ad_id"]}, n=100)
    for rate in (0.0, 0.1):
        made = trainer(folder, epochs=1, unknown_rate=rate)
        table = made.model.tables[12]
        row = table.offsets["ad_id"] + 1
        before = table.weight_VD[row].clone()
        made.valid = None
        made.run()
        assert torch.equal(table.weight_VD[row], before) == (rate == 0.0)


def test_the_frame_of_groups_is_as_the_stage_writes(noise: Path) -> None:
    """The hand-made folders of these tests have the columns of docs/formats.md."""
    columns = pl.read_parquet_schema(noise / "train" / "part-0000.parquet")
    assert columns["sample_id"] == pl.List(pl.Int64)
    assert columns["click"] == pl.List(pl.Int8)
    assert columns["goods"] == columns["ad_id"] == pl.List(pl.UInt32)
    assert columns["gender"] == pl.UInt32
