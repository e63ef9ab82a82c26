"""Every model against the papers' formulas, written as loops in float64: log-odds, gradients, grouping."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrkit.picture_vectors import PictureVectors
from ctrkit.recipe import Train
from tests.models.reference import SMALL, Array, Reference, log_loss, make, pictures, random_direction, run, weights
from tests.small_groups import Group, alone, random_groups, some_groups

SWITCHES = ("ad_id", "ad_image", "user_ids", "user_images")
CONFIGS: dict[str, dict[str, Any]] = {
    "lr": {"model": "lr"},
    "lr, no ad id": {"model": "lr", "ad_id": False},
    "base": {"model": "base"},
    "base, Dice": {"model": "base", "activation": "dice"},
    "base, no BatchNorm": {"model": "base", "batch_norm": False},
    "din-code": {"model": "din", "din": "din-code"},
    "din-code, Dice": {"model": "din", "din": "din-code", "activation": "dice", "ad_id": False},
    "din-v1": {"model": "din", "din": "din-v1"},
    "din-v1, Dice": {"model": "din", "din": "din-v1", "activation": "dice"},
    **{
        f"dicm, {pooling}{', ids' * ids}": {"model": "dicm", "pooling": pooling, "user_ids": ids}
        for pooling in ("attentive", "sum", "max")
        for ids in (False, True)
    },
    **{
        "dicm " + "".join(f" {'+' if on else '-'}{name}" for name, on in zip(SWITCHES, switches, strict=True)): {
            "model": "dicm",
            **dict(zip(SWITCHES, switches, strict=True)),
        }
        for switches in itertools.product([False, True], repeat=4)
    },
    **{
        f"dicm, shared extractors, {pooling}": {"model": "dicm", "share_extractors": True, "pooling": pooling}
        for pooling in ("attentive", "max")
    },
    "dicm, shared extractors without ad image": {"model": "dicm", "share_extractors": True, "ad_image": False},
    "dicm, Dice": {"model": "dicm", "activation": "dice", "user_ids": True},
    "dicm, no BatchNorm": {"model": "dicm", "batch_norm": False},
    **{
        f"dicm, pooling din, {form}, {activation}": {
            "model": "dicm",
            "pooling": "din",
            "din": form,
            "activation": activation,
        }
        for form in ("din-v1", "din-code")
        for activation in ("prelu", "dice")
    },
    **{
        f"dicm, ids by {form}, {activation}": {
            "model": "dicm",
            "user_ids": "din",
            "din": form,
            "activation": activation,
        }
        for form in ("din-v1", "din-code")
        for activation in ("prelu", "dice")
    },
    "dicm, ids and pictures by din": {"model": "dicm", "user_ids": "din", "pooling": "din", "share_extractors": True},
    "dicm, ids by din, no pictures": {"model": "dicm", "user_ids": "din", "user_images": False, "ad_image": False},
    "dicm, simtier": {"model": "dicm", "user_images": "simtier", "tiers": 6},
    "dicm, simtier, no ad image": {"model": "dicm", "user_images": "simtier", "ad_image": False, "tiers": 7},
    "dicm, one tier": {"model": "dicm", "user_images": "simtier", "tiers": 1},
    **{
        f"dicm, simtier and {pooling}": {"model": "dicm", "user_images": "simtier+pooled", "pooling": pooling}
        for pooling in ("attentive", "sum", "max", "din")
    },
    # DICM Table III: one to four layers.
    **{f"dicm, extractor {shape}": {"model": "dicm", "extractor": shape} for shape in ((4,), (5, 3), (6, 5, 4, 3))},
    **{
        f"dicm, Dice in extractors{', shared' * shared}, {pooling}": {
            "model": "dicm",
            "extractor_activation": "dice",
            "share_extractors": shared,
            "pooling": pooling,
        }
        for shared in (False, True)
        for pooling in ("attentive", "sum", "din")
    },
    "dicm, Dice in the extractor, ad image": {"model": "dicm", "extractor_activation": "dice", "user_images": False},
    "dicm, Dice in the extractor, user images": {"model": "dicm", "extractor_activation": "dice", "ad_image": False},
    "dicm, one-layer everything": {"model": "dicm", "extractor": (4,), "attention": (5,), "tower": ()},
}
DROPOUT = {"regularisation": "dropout", "dropout_rate": 0.4}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
FORMS = {name: config for name, config in CONFIGS.items() if not name.startswith("dicm  ")}
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureVectors, Array]:
    return pictures(tmp_path_factory.mktemp("pictures"))


@each_config
def test_log_odds_and_gradients_are_the_papers(config: dict[str, Any], vectors: tuple[PictureVectors, Array]) -> None:
    """Gradients by central differences of the loops, along a direction in which every number moves."""
    model = make(config, vectors[0])
    train = Train(**{**SMALL, **config})
    groups = some_groups()
    before = weights(model)
    for training in (False, True):
        found = run(model, groups, training)
        expected = Reference(train, before, vectors[1], training).log_odds(groups)
        np.testing.assert_allclose(found.logit_S, expected, rtol=1e-10, atol=1e-12)
        assert np.std(found.logit_S) > 1e-3
        direction = random_direction(before, list(found.gradients))
        h, ends = 1e-6, []
        for step in (h, -h):
            moved = before | {name: before[name] + step * d for name, d in direction.items()}
            ends.append(log_loss(Reference(train, moved, vectors[1], training).log_odds(groups), groups))
        slope = sum(float((found.gradients[name] * d).sum()) for name, d in direction.items())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("activation", ["prelu", "dice"])
@pytest.mark.parametrize(
    "config",
    [
        {"model": "base"},
        {"model": "din", "din": "din-v1"},
        {"model": "din", "din": "din-code"},
        {"model": "dicm", "user_ids": True},
        {"model": "dicm", "user_ids": "din", "din": "din-v1"},
        {"model": "dicm", "user_ids": "din", "pooling": "din"},
    ],
    ids=str,
)
def test_dropout_discards_behaviours_of_samples(
    config: dict[str, Any], activation: str, vectors: tuple[PictureVectors, Array]
) -> None:
    """Sums are over the kept ones and scaled, a softmax runs over the kept ones; pictures are not ids."""
    config = {**config, **DROPOUT, "activation": activation}
    model, train = make(config, vectors[0]), Train(**{**SMALL, **config})
    groups = some_groups(11)
    before = weights(model)
    found = run(model, groups, True, (1, 0))
    assert {True, False} == {keep for sample in found.kept for keep in sample}
    expected = Reference(train, before, vectors[1], True, found.kept).log_odds(groups)
    np.testing.assert_allclose(found.logit_S, expected, rtol=1e-10, atol=1e-12)
    direction = random_direction(before, list(found.gradients))
    h, ends = 1e-6, []
    for step in (h, -h):
        moved = before | {name: before[name] + step * d for name, d in direction.items()}
        ends.append(log_loss(Reference(train, moved, vectors[1], True, found.kept).log_odds(groups), groups))
    slope = sum(float((found.gradients[name] * d).sum()) for name, d in direction.items())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)
    apart = run(model, alone(groups), True, (1, 0))
    assert apart.kept == found.kept
    again = run(model, groups, True, (1, 0))
    np.testing.assert_allclose(apart.logit_S, again.logit_S, rtol=1e-10)
    for name, gradient in again.gradients.items():
        np.testing.assert_allclose(gradient, apart.gradients[name], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("train", [{}, {"pooling": "sum"}, {"pooling": "max"}, {"share_extractors": True}], ids=str)
@pytest.mark.parametrize("switches", [(True, True), (True, False), (False, True)], ids=str)
def test_has_picture_is_an_input_of_the_extractors(
    train: dict[str, Any], switches: tuple[bool, bool], tmp_path: Path
) -> None:
    """Of both: [vector; 1] for a picture, [0; 0] for a missing one, and its weights are trained."""
    vectors, by_index = pictures(tmp_path, has_picture=True)
    config = {"model": "dicm", **train, "ad_image": switches[0], "user_images": switches[1], "has_picture": True}
    model = make(config, vectors)
    groups = some_groups()
    images = [s["ad_image"] for g in groups for s in g.samples] + [b["image"] for g in groups for b in g.behaviours]
    assert {True, False} == {bool(by_index[i, -1]) for i in images}
    before = weights(model)
    for training in (False, True):
        found = run(model, groups, training)
        expected = Reference(Train(**{**SMALL, **config}), before, by_index, training).log_odds(groups)
        np.testing.assert_allclose(found.logit_S, expected, rtol=1e-10, atol=1e-12)
    firsts = [n for n in found.gradients if n in ("adnet.0.weight", "usernet.0.weight")]
    assert firsts
    for name in firsts:
        assert found.gradients[name].shape[1] == by_index.shape[1]
        assert np.abs(found.gradients[name][:, -1]).max() > 1e-12


@each_form
def test_every_parameter_is_trained(config: dict[str, Any], vectors: tuple[PictureVectors, Array]) -> None:
    """A parameter that no sample reaches would be dead weight, or a part of the model that is left out."""
    resting: set[str] | None = None
    for seed in (1, 2, 3):  # with all hidden units of a net on one side of zero, a softmax may not see its query
        model = make(config, vectors[0], seed)
        found = run(model, random_groups(2, [5] * 8, [4] * 8), True)
        assert set(found.gradients) >= {name for name, _ in model.network.named_parameters()}
        still = {name for name, gradient in found.gradients.items() if not np.abs(gradient).max() > 1e-12}
        resting = still if resting is None else resting & still
    # BatchNorm takes any constant off its input, and softmax off its own: only the last layers' biases may rest.
    assert resting is not None
    assert resting <= {name for name in found.gradients if name.endswith("bias")}, resting


@each_form
def test_grouped_is_ungrouped(config: dict[str, Any], vectors: tuple[PictureVectors, Array]) -> None:
    """BatchNorm and Dice see the expanded rows, so a shared history must change nothing."""
    model = make(config, vectors[0])
    groups = some_groups(3)
    for training in (True, False):
        together, apart = run(model, groups, training), run(model, alone(groups), training)
        np.testing.assert_allclose(together.logit_S, apart.logit_S, rtol=1e-11, atol=1e-13)
        for name, gradient in together.gradients.items():
            np.testing.assert_allclose(gradient, apart.gradients[name], rtol=1e-8, atol=1e-13)


@each_form
def test_no_history_and_single_rows(config: dict[str, Any], vectors: tuple[PictureVectors, Array]) -> None:
    """Batches without any behaviour, with one sample, with one pair: finite, and as the loops say."""
    train = Train(**{**SMALL, **config})
    cases: list[list[Group]] = [
        random_groups(4, [3, 1], [0, 0]),
        random_groups(5, [1], [0]),
        random_groups(6, [1], [1]),
        random_groups(7, [1, 2], [1, 0]),
    ]
    for groups in cases:
        for training in (True, False):
            model = make(config, vectors[0])
            reference = Reference(train, weights(model), vectors[1], training)
            found = run(model, groups, training)
            np.testing.assert_allclose(found.logit_S, reference.log_odds(groups), rtol=1e-9, atol=1e-12)
            assert all(np.isfinite(g).all() for g in found.gradients.values())
            assert all(np.isfinite(w).all() for w in weights(model).values())


@each_form
def test_a_sample_does_not_see_its_neighbours_in_evaluation(
    config: dict[str, Any], vectors: tuple[PictureVectors, Array]
) -> None:
    model = make(config, vectors[0])
    groups = some_groups(8)
    together = run(model, groups, False).logit_S
    one_by_one = [run(model, [group], False).logit_S[0] for group in alone(groups)]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-11)


@pytest.mark.parametrize("config", [{"model": "din"}, {"model": "din", "din": "din-v1"}, {"model": "dicm"}])
def test_attention_weights(config: dict[str, Any], vectors: tuple[PictureVectors, Array]) -> None:
    """DIN eq. 2's w_i and DICM's attentive weights, pair by pair; those behind a softmax sum to 1 a sample."""
    from ctrkit.scoring import look_up
    from tests.models.reference import collate

    model = make(config, vectors[0])
    model.network.eval()
    groups = some_groups(9)
    batch = collate(model, groups)
    w_P = model.network.weights_P(batch, look_up(model, batch)).detach().numpy()  # type: ignore[operator]
    expected = Reference(Train(**{**SMALL, **config}), weights(model), vectors[1], False).attention(groups)
    np.testing.assert_allclose(w_P, np.concatenate(expected), rtol=1e-10)
    sums = [w.sum() for w in expected if len(w)]
    assert np.allclose(sums, 1.0) == (config.get("din") != "din-v1")


def test_switches_hide_what_they_name(vectors: tuple[PictureVectors, Array]) -> None:
    """With a switch off, what it names may be anything; with it on, it counts."""
    groups = some_groups(10)
    for switch, name, owner in (
        ("ad_id", "ad_id", "samples"),
        ("ad_image", "ad_image", "samples"),
        ("user_ids", "colour", "behaviours"),
        ("user_images", "image", "behaviours"),
    ):
        changed = some_groups(10)
        for group in changed:
            for row in getattr(group, owner):
                row[name] = 1 + row[name] % 3
        for on in (False, True):
            model = make({"model": "dicm", "user_ids": True, switch: on}, vectors[0])
            same = np.array_equal(run(model, groups, False).logit_S, run(model, changed, False).logit_S)
            assert same != on, switch
