"""Scores at any batch size and in the order of the groups; attention weights by name of the picture."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit.errors import UserError
from ctrkit.modelfile import load, save
from ctrkit.recipe import Train
from ctrkit.scoring import attention_weights, has_attention, predict
from tests.models.reference import SMALL, Array, Reference, make, pictures, sigmoid, weights
from tests.small_groups import FEATURES, Group, random_groups, write_features, write_groups

DICM = {"model": "dicm", "user_ids": True}


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    rng = np.random.default_rng(4)
    return random_groups(6, rng.integers(1, 6, 23).tolist(), rng.integers(0, 4, 23).tolist())


@pytest.fixture(scope="module")
def shop(groups: list[Group], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    folder = tmp_path_factory.mktemp("shop")
    write_groups(folder / "groups", {"test": groups}, part_groups=9)
    return folder, pictures(folder)[1]


def saved(shop: tuple[Path, Array], name: str, **train: object) -> tuple[Path, Reference]:
    """Write a random model; return its folder and the same model as loops."""
    folder, by_index = shop
    vectors, _ = pictures_of(folder)
    made = make(train, vectors)
    (folder / name).mkdir(exist_ok=True)
    save(made, folder / name, {"pictures": vectors.store.attributes})
    return folder / name, Reference(Train(**{**SMALL, **train}), weights(made), by_index, False)


def pictures_of(folder: Path) -> tuple:  # type: ignore[type-arg]
    from ctrkit.picture_vectors import PictureVectors

    return PictureVectors(folder / "features.h5", folder / "convert"), None


@pytest.mark.parametrize("train", [DICM, {"model": "din"}, {"model": "base", "activation": "dice"}, {"model": "lr"}])
def test_the_same_scores_at_any_batch(train: dict[str, object], shop: tuple[Path, Array], groups: list[Group]) -> None:
    folder = shop[0]
    model, reference = saved(shop, f"model {train['model']}", **train)
    trained = load(model, folder / "groups", folder / "features.h5", folder / "convert")
    expected = sigmoid(reference.log_odds(groups))
    tables = [predict(trained, folder / "groups", "test", batch) for batch in (1, 7, 4096)]
    for table in tables:
        np.testing.assert_allclose(table["score"], expected, atol=2e-6)
        np.testing.assert_allclose(table["score"], tables[0]["score"], atol=1e-6)
        assert table.drop("score").equals(tables[0].drop("score"))
    assert dict(tables[0].schema) == {
        "sample_id": pl.Int64,
        "user": pl.String,
        "ad": pl.String,
        "day": pl.Date,
        "click": pl.Int8,
        "score": pl.Float32,
        "history_length": pl.UInt32,
        "unseen_ad": pl.Boolean,
    }
    rows = [(s["sample_id"], f"u{g.group_id}", s["click"], len(g.behaviours)) for g in groups for s in g.samples]
    assert tables[0].select("sample_id", "user", "click", "history_length").rows() == rows


def test_a_recipe_without_behaviours_has_no_history(tmp_path: Path) -> None:
    features = {"gender": FEATURES["gender"], "ad_id": FEATURES["ad_id"]}
    groups = random_groups(1, [2, 3], [0, 0])
    write_groups(tmp_path / "groups", {"test": groups}, features, {"gender": 4, "ad_id": 8})
    from ctrkit.batches import Schema
    from ctrkit.modelfile import build, read_counts

    schema = Schema.read(tmp_path / "groups")
    made = build(Train(model="base"), schema, read_counts(tmp_path / "groups", schema), None)
    assert predict(made, tmp_path / "groups", "test", 2)["history_length"].to_list() == [0] * 5


def test_attention_weights_of_some_impressions(shop: tuple[Path, Array], groups: list[Group]) -> None:
    folder = shop[0]
    model, reference = saved(shop, "model attention", **DICM)
    every = [(g, s) for g in groups for s in g.samples]
    wanted = [s["sample_id"] for _, s in every][::3]
    assert any(not g.behaviours for g, s in every if s["sample_id"] in wanted)
    paths = (folder / "groups", folder / "features.h5", folder / "convert")
    table = attention_weights(model, *paths, "test", [*wanted, -5])
    weight, score = reference.attention(groups), sigmoid(reference.log_odds(groups))
    expected = []
    for n, (group, sample) in enumerate(every):
        for b, behaviour in enumerate(group.behaviours):
            if sample["sample_id"] in wanted:
                names = [f"p{i - 2}" if i >= 2 else "" for i in (behaviour["image"], sample["ad_image"])]
                expected.append((sample["sample_id"], names[0], weight[n][b], names[1], sample["click"], score[n]))
    assert table.select("sample_id", "image", "ad_image", "click").rows() == [
        (e[0], e[1], e[3], e[4]) for e in expected
    ]
    np.testing.assert_allclose(table["weight"], [e[2] for e in expected], atol=1e-6)
    np.testing.assert_allclose(table["score"], [e[5] for e in expected], atol=2e-6)
    sums = table.group_by("sample_id").agg(pl.col("weight").sum())["weight"]
    np.testing.assert_allclose(sums, 1, atol=1e-6)


def test_attention_is_not_for_every_model(shop: tuple[Path, Array]) -> None:
    folder = shop[0]
    paths = (folder / "groups", folder / "features.h5", folder / "convert")
    for name, train in {"sum": {"pooling": "sum"}, "no user images": {"user_images": False}}.items():
        model, _ = saved(shop, name, **train)
        assert not has_attention(load(model, *paths).plan)
        with pytest.raises(UserError, match="does not attend to behaviours: it needs model = 'din', or user_im"):
            attention_weights(model, *paths, "test", [100])
    model, _ = saved(shop, "model attention", **DICM)
    assert has_attention(load(model, *paths).plan)
    with pytest.raises(UserError, match="none of the wanted impressions is in the test split"):
        attention_weights(model, *paths, "test", [-1])


def test_names_of_the_ads_picture_without_adnet(shop: tuple[Path, Array], groups: list[Group]) -> None:
    """The gallery shows the ad's picture also for a model that does not look at it."""
    folder = shop[0]
    model, _ = saved(shop, "no ad image", ad_image=False)
    with_history = next(g for g in groups if g.behaviours)
    sample = with_history.samples[0]
    paths = (folder / "groups", folder / "features.h5", folder / "convert")
    table = attention_weights(model, *paths, "test", [sample["sample_id"]])
    image = sample["ad_image"]
    assert table["ad_image"].to_list() == [f"p{image - 2}" if image >= 2 else ""] * len(with_history.behaviours)


def test_pictures_of_another_run(shop: tuple[Path, Array], tmp_path: Path) -> None:
    folder = shop[0]
    model, _ = saved(shop, "model attention", **DICM)
    write_features(tmp_path / "features.h5", ["stranger"], [0], np.ones((1, 5)))
    with pytest.raises(UserError, match="has no vector for any picture"):
        load(model, folder / "groups", tmp_path / "features.h5", folder / "convert")
