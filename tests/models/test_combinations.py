"""Every combination of DICM's switches: a step, scores, saved and read back; what is impossible is refused by name."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrkit.batches import GroupedData, Schema
from ctrkit.errors import UsageError
from ctrkit.modelfile import build, load, open_pictures, read_counts, save
from ctrkit.preparing import prepared
from ctrkit.recipe import Recipe, Train
from ctrkit.scoring import scores
from ctrkit.training import Trainer
from tests.models.reference import SMALL, pictures
from tests.small_groups import FEATURES, SIZES, random_groups, write_groups

HISTORIES: list[Any] = [
    (False, "attentive"),
    ("simtier", "attentive"),
    *itertools.product([True], ["attentive", "sum", "max", "din"]),
    ("simtier+pooled", "attentive"),
    *(pytest.param("simtier+pooled", pooling, marks=pytest.mark.long) for pooling in ("sum", "max", "din")),
]
"""user_images and pooling, which counts where pictures are pooled."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    splits = {name: random_groups(n, [3, 1, 2] * 2, [2, 0, 3] * 2) for n, name in enumerate(("train", "test"))}
    write_groups(path / "groups", splits)
    pictures(path)
    return path


@pytest.mark.parametrize(("user_images", "pooling"), HISTORIES)
def test_every_combination(user_images: bool | str, pooling: str, folder: Path, tmp_path: Path) -> None:
    """The model that is read back scores as the one that was trained, to the last bit."""
    groups, features, convert = folder / "groups", folder / "features.h5", folder / "convert"
    schema = Schema.read(groups)
    counts = read_counts(groups, schema)
    others = itertools.product([False, True], [False, True], [False, True, "din"], ["prelu", "dice"], [False, True])
    built = 0
    for ad_id, ad_image, user_ids, activation, share in others:
        train = Train(
            **SMALL,
            ad_id=ad_id,
            ad_image=ad_image,
            user_ids=user_ids,
            user_images=user_images,
            pooling=pooling,
            activation=activation,
            extractor_activation=activation,
            share_extractors=share,
            batch=6,
        )
        vectors = open_pictures(train, features, convert)
        if pooling == "din" and not ad_image:
            with pytest.raises(UsageError, match=r'pooling = "din" .* but ad_image is off. Set ad_image = true, or'):
                build(train, schema, counts, vectors)
            continue
        if vectors is not None:
            vectors.fit()
        model = build(train, schema, counts, vectors)
        data = {split: GroupedData(groups, split, model.plan.features) for split in ("train", "test")}
        before = model.state()
        trainer = Trainer(model, counts, data["train"], None, None)
        made = (trainer.collate(block, (1, 0)) for block in data["train"].epoch(6, (1, 0)))
        for batch in prepared(model, made, training=True):
            assert torch.isfinite(trainer.step(batch))
        assert not all(torch.equal(t, before[name]) for name, t in model.state().items())
        [(_, score)] = scores(model, data["test"], 100)
        assert np.isfinite(score).all()
        assert np.ptp(score) > 0
        name = tmp_path / str(built)
        name.mkdir()
        save(model, name, {"pictures": vectors.store.attributes if vectors else {}})
        [(_, again)] = scores(load(name, groups, features, convert), data["test"], 100)
        np.testing.assert_array_equal(again, score)
        built += 1
    assert built == 2 * 2 * 3 * 2 * 2 // (1 + (pooling == "din"))


def schema_without(*names: str, **features: dict[str, Any]) -> Schema:
    plain = {n: f.model_dump() for n, f in FEATURES.items() if n not in names} | features
    return Schema(Recipe.model_validate({"name": "x", "features": plain}).features, SIZES, "0" * 32, 4)


@pytest.mark.parametrize(
    ("train", "schema", "message"),
    [
        (
            {"user_images": "simtier", "ad_image": False},
            schema_without("ad_image"),
            r'\[train\] user_images = "simtier" compares pictures with the ad\'s, but \[features\] has no feature of = '
            r"'ad' with kind = 'image'",
        ),
        (
            {"user_images": "simtier+pooled", "ad_image": False},
            schema_without("image"),
            r"\[train\] user_images is on, but \[features\] has no feature of = 'behaviour' with kind = 'image'",
        ),
        (
            {"user_ids": "din"},
            schema_without("ad_goods", "ad_brand"),
            r'\[train\] user_ids = "din" compares .* no behaviour feature shares its vocabulary with an ad feature',
        ),
        (
            {"user_ids": "din", "ad_id": False},
            schema_without("ad_brand", ad_goods={"of": "ad", "vocab": "goods", "width": 4, "switch": "ad_id"}),
            r'\[train\] user_ids = "din" .* that the model reads. .* leave ad_id on',
        ),
        (
            {"user_ids": True},
            schema_without("goods", "brand", "colour"),
            r"\[train\] user_ids is on, but \[features\] has no ID feature of = 'behaviour'",
        ),
    ],
    ids=["simtier, no ad picture", "simtier, no picture", "din, no partner", "din, hidden partner", "no ids"],
)
def test_what_is_impossible(train: dict[str, Any], schema: Schema, message: str, folder: Path) -> None:
    config = Train(**SMALL, **train)
    with pytest.raises(UsageError, match=message):
        build(config, schema, read_counts(folder / "groups", schema), None)


def test_other_models_do_not_care() -> None:
    """The switches are DICM's."""
    schema = schema_without("ad_image", "image")
    nothing = {vocab: np.zeros(size, np.int64) for vocab, size in SIZES.items()}
    for model in ("lr", "base", "din"):
        config = Train(**SMALL, model=model, user_images="simtier", user_ids="din", pooling="din", ad_image=False)
        assert not config.looks_at_pictures
        build(config, schema, nothing, None)


@pytest.mark.parametrize(
    "train",
    [
        {"model": "base", "regularisation": "dropout", "activation": "dice"},
        {"model": "din", "regularisation": "filter", "filter_top": 3},
        {"user_images": "simtier+pooled", "pooling": "din", "user_ids": "din", "extractor_activation": "dice"},
    ],
    ids=["base", "din", "dicm"],
)
def test_the_same_seed_gives_the_same_loss_curve(train: dict[str, Any], folder: Path) -> None:
    """To the last bit; another seed draws other numbers, another order and other masks."""
    groups = folder / "groups"
    schema = Schema.read(groups)
    counts = read_counts(groups, schema)

    def curve(seed: int) -> list[float]:
        config = Train(**{**SMALL, **train, "unknown_rate": 0.1, "seed": seed})
        vectors = open_pictures(config, folder / "features.h5", folder / "convert")
        model = build(config, schema, counts, vectors)
        trainer = Trainer(model, counts, GroupedData(groups, "train", model.plan.features), None, None)
        blocks = [block for epoch in range(3) for block in trainer.train.epoch(5, (seed, epoch))]
        made = (trainer.collate(block, (seed, n)) for n, block in enumerate(blocks))
        return [float(trainer.step(batch)) for batch in prepared(trainer.model, made, training=True)]

    one = curve(1)
    assert len(set(one)) == len(one) == 9
    assert curve(1) == one
    assert not set(curve(2)) & set(one)


@pytest.mark.parametrize(
    "train",
    [
        {"model": "din", "din": "din-v1", "activation": "dice"},
        {"user_ids": True, "pooling": "max", "extractor_activation": "dice", "share_extractors": True},
        {"user_images": "simtier+pooled", "pooling": "din", "user_ids": "din", "activation": "dice"},
        {"user_images": "simtier", "regularisation": "dropout", "user_ids": True},
    ],
    ids=str,
)
def test_precisions_agree(train: dict[str, Any], folder: Path) -> None:
    """A step's loss, and the scores after it: float64 and float32 to rounding, bfloat16 to 2^-8."""
    groups = folder / "groups"
    schema = Schema.read(groups)
    counts = read_counts(groups, schema)
    found = {}
    for precision in ("float64", "float32", "bfloat16"):
        config = Train(**{**SMALL, **train, "precision": precision})
        vectors = open_pictures(config, folder / "features.h5", folder / "convert")
        if vectors is not None:
            vectors.fit()
        model = build(config, schema, counts, vectors)
        data = GroupedData(groups, "train", model.plan.features)
        trainer = Trainer(model, counts, data, None, None)
        [block] = data.epoch(100)
        made = (trainer.collate(block, (1, 0)) for _ in range(3))
        losses = [float(trainer.step(batch)) for batch in prepared(model, made, training=True)]
        [(_, score)] = scores(model, data, 100)
        found[precision] = np.array([*losses, *score])
    np.testing.assert_allclose(found["float32"], found["float64"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["bfloat16"], found["float64"], atol=0.05)
    assert not np.array_equal(found["bfloat16"], found["float32"])
