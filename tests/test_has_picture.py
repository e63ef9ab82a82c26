"""`[train] has_picture` through the command line, in a world in which the lack of a picture alone decides the click.

All pictures have the same vector, so that, centred, a picture is as zero as none: only the flag can tell.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.shop import ctrkit
from tests.small_groups import write_features

RECIPE = """
[convert]
label = "by_ad"
[convert.impressions]
files = "shown.csv"
[convert.ads]
files = "goods.csv"
columns = { ad = "goods" }
[convert.goods]
files = "goods.csv"
[convert.behaviours]
files = "seen.csv"

[features]
place = { of = "scene" }
ad_photo = { of = "ad", kind = "image", column = "photo" }
photo = { of = "behaviour", kind = "image" }

[train]
batch = 32
epochs = 4
learning_rate = 0.01
extractor = [8, 4]
tower = [8]
attention = [4]

[variants.ad.train]
user_images = false
[variants.history]
convert = { label = "by_history" }
train = { ad_image = false }
"""
DAY = 86_400
USERS, GOODS = 60, 40
PHOTOGRAPHED = GOODS // 2


def photo(goods: int) -> str:
    """The first half of the goods have a picture; of the others some have none, some one that could not be read."""
    return "" if goods >= PHOTOGRAPHED and goods % 2 else f"g{goods}.jpg"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of six days, their groups for each of the two rules, and vectors."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "raw").mkdir()
    rng = np.random.default_rng(3)
    seen = ["user,goods,time"]
    shown = ["user,ad,time,place,by_ad,by_history"]
    for user in range(USERS):
        bare = user % 2  # a history without pictures
        seen += [f"u{user},g{g + PHOTOGRAPHED * bare},1000" for g in rng.choice(PHOTOGRAPHED, 3, replace=False)]
        for n in range(24):
            goods = int(rng.integers(GOODS))
            shown.append(f"u{user},g{goods},{DAY * (1 + n % 6) + n},top,{int(goods >= PHOTOGRAPHED)},{bare}")
    (folder / "raw" / "seen.csv").write_text("\n".join(seen) + "\n")
    (folder / "raw" / "shown.csv").write_text("\n".join(shown) + "\n")
    goods_rows = [f"g{n},{photo(n)}" for n in range(GOODS)]
    (folder / "raw" / "goods.csv").write_text("\n".join(["goods,photo", *goods_rows]) + "\n")
    (folder / "recipe.toml").write_text(RECIPE)
    images = [photo(n) for n in range(GOODS) if photo(n)]
    row = [0 if n < PHOTOGRAPHED else -1 for n in range(len(images))]
    write_features(folder / "features.h5", images, row, np.full((1, 6), 2.0))
    for variant in ("ad", "history"):
        home = folder / variant
        must(folder, "convert", variant, "--raw", folder / "raw", "--out", home / "convert")
        must(folder, "select-clicks", variant, "--convert", home / "convert", "--out", home / "behaviours")
        data = ["--convert", home / "convert", "--behaviours", home / "behaviours"]
        must(folder, "group", variant, *data, "--out", home / "groups")
    return folder


def must(folder: Path, stage: str, variant: str, *words: object) -> None:
    result = ctrkit(stage, "--recipe", folder / "recipe.toml", "--variant", variant, "--set", "workers=1", *words)
    assert result.exit_code == 0, (stage, result.output, result.exception)


def reads(world: Path, variant: str) -> list[object]:
    home = world / variant
    return ["--groups", home / "groups", "--convert", home / "convert", "--features", world / "features.h5"]


def scored(world: Path, out: Path, variant: str, *sets: str) -> pl.DataFrame:
    """Train and predict with some settings; return the predictions."""
    words = [*reads(world, variant), *(word for text in sets for word in ("--set", text))]
    must(world, "train", variant, *words, "--out", out / "model")
    must(world, "predict", variant, *words, "--model", out / "model", "--out", out / "scores.parquet")
    return pl.read_parquet(out / "scores.parquet")


def metric(out: Path, name: str) -> float:
    result = ctrkit("eval", "--gauc", out / "scores.parquet", "--json", out / "metrics.json")
    assert result.exit_code == 0, result.output
    [variant] = json.loads((out / "metrics.json").read_text())["variants"].values()
    return float(variant["all"][name])


@pytest.mark.parametrize(("variant", "name"), [("ad", "gauc"), ("history", "auc")])
def test_the_lack_of_a_picture_is_learned_with_the_flag_alone(
    variant: str, name: str, world: Path, tmp_path: Path
) -> None:
    flagged = scored(world, tmp_path / "flag", variant, "train.has_picture=true")
    assert metric(tmp_path / "flag", name) == 1.0
    clicked = flagged["click"] == 1
    assert flagged.filter(clicked)["score"].min() > 0.9  # type: ignore[operator]
    assert flagged.filter(~clicked)["score"].max() < 0.1  # type: ignore[operator]
    plain = scored(world, tmp_path / "plain", variant)
    assert plain["score"].n_unique() == 1
    assert metric(tmp_path / "plain", name) == 0.5


@pytest.mark.parametrize("pooling", ["sum", "max"])
def test_every_pooling_gets_it(pooling: str, world: Path, tmp_path: Path) -> None:
    scored(world, tmp_path, "history", "train.has_picture=true", f"train.pooling={pooling}")
    assert metric(tmp_path, "auc") == 1.0


def test_the_switch_is_the_models(world: Path, tmp_path: Path) -> None:
    """It is saved with the model, widens the extractor by one, and off it leaves no trace."""

    def saved(name: str, *sets: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        scored(world, tmp_path / name, "ad", *sets)
        settings = json.loads((tmp_path / name / "model" / "settings.json").read_text())
        return settings, torch.load(tmp_path / name / "model" / "model.pt", weights_only=True)

    settings, state = saved("flag", "train.has_picture=true")
    assert settings["train"]["has_picture"] is True
    assert settings["picture_width"] == 7
    assert state["network.adnet.0.weight"].shape == (8, 7)
    assert state["pictures.mean"].shape == (6,)
    settings, state = saved("plain")
    assert "has_picture" not in settings["train"]
    assert settings["picture_width"] == 6
    assert state["network.adnet.0.weight"].shape == (8, 6)
    saved("off", "train.has_picture=false")
    for file in ("model.pt", "settings.json", "metrics.jsonl"):
        assert (tmp_path / "plain/model" / file).read_bytes() == (tmp_path / "off/model" / file).read_bytes()


def test_a_flag_that_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    """Features of the width that vector and flag have together are none of this model's; nor is a forged switch."""
    scored(world, tmp_path, "ad", "train.has_picture=true")
    words: list[object] = [
        "predict",
        "--recipe",
        world / "recipe.toml",
        "--variant",
        "ad",
        "--model",
        tmp_path / "model",
    ]
    words += ["--groups", world / "ad/groups", "--convert", world / "ad/convert", "--out", tmp_path / "x.parquet"]
    write_features(tmp_path / "wide.h5", ["g0.jpg"], [0], np.ones((1, 7)))
    result = ctrkit(*words, "--set", "train.has_picture=true", "--features", tmp_path / "wide.h5")
    assert result.exit_code == 1
    assert "was trained on picture vectors of width 6, but" in result.output
    assert "has width 7: use the features it was trained with" in result.output
    path = tmp_path / "model" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["train"]["has_picture"]
    path.write_text(json.dumps(settings | {"picture_width": 6}))
    result = ctrkit(*words, "--features", world / "features.h5")
    assert result.exit_code == 1
    assert "'network.adnet.0.weight' is of shape [8, 7], not of shape [8, 6]. Train the model again" in result.output
    assert not (tmp_path / "x.parquet").exists()


def test_a_switch_is_on_or_off(world: Path, tmp_path: Path) -> None:
    words = ["--recipe", world / "recipe.toml", "--variant", "ad", "--set", "train.has_picture=3"]
    result = ctrkit("train", *words, *reads(world, "ad"), "--out", tmp_path / "model")
    assert result.exit_code == 2
    assert "train.has_picture: has to be true or false" in result.output
