"""ctrkit export, through the command line: the exported programs score as `ctrkit predict` does."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ctrkit.stages.export import command

from ctrkit.cli import COMMANDS
from ctrkit.scorer import Scorer
from tests import requests_of, shop
from tests.shop import ctrkit
from tests.tiny_run import TinyRun
from tests.tiny_world import CHECKOUT

MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lr": ({"model": "lr"}, ["onnx", "pt2"]),
    "din": ({"model": "din", "din": "din-v1", "activation": "dice"}, ["onnx"]),
    "dicm": ({}, ["pt2"]),
    "all of DICM": (
        {"user_ids": "din", "user_images": "simtier+pooled", "pooling": "din", "has_picture": True, "tiers": 7},
        ["onnx", "pt2"],
    ),
}
"""Settings of [train], and the formats that the model is exported in."""


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["export"][1]


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_predict(name: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """From raw values, to 1e-5 for all samples of the test split."""
    sets = requests_of.sets(MODELS[name][0])
    model = tiny_run.train(tmp_path / "model", *sets)
    tiny_run.must("predict", *tiny_run.reads(), "--model", model, *sets, "--out", tmp_path / "p.parquet")
    table = pl.read_parquet(tmp_path / "p.parquet")
    expected = dict(table.select("sample_id", "score").iter_rows())
    asked = requests_of.samples(tiny_run.groups, tiny_run.convert)
    assert [i for i, _ in asked] == list(expected)
    for format in MODELS[name][1]:
        out = requests_of.export(tiny_run, model, tmp_path / format, "--format", format)
        scorer = Scorer(out, tiny_run.features)
        for sample_id, request in asked:
            [score] = scorer.score(scorer.request.model_validate(request)).scores_A
            assert abs(score - expected[sample_id]) < 1e-5, (format, request)
        sidecar = json.loads((tmp_path / f"{format}.json").read_text())
        assert sidecar["counts"]["largest difference"] < 1e-5
    assert table.height > 200
    assert table["score"].n_unique() > 50


FEATURES = """
[features]
gender = { of = "user" }
ad_id = { of = "ad", column = "ad", min_count = 3 }
ad_goods = { of = "ad", column = "goods", vocab = "goods" }
hashed = { of = "ad", column = "goods", hash_buckets = 7, width = 5 }
ad_tags = { of = "ad", column = "tags", vocab = "tag", multi_hot = true }
place = { of = "scene", column = "position", kind = "number", edges = [0.5, 1.5] }
goods = { of = "behaviour" }
category = { of = "behaviour" }

[train]
model = "base"
batch = 32
epochs = 1
tower = [8]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop with features of every kind, a third of whose negatives are kept, and a model."""
    folder = tmp_path_factory.mktemp("shop")
    before, _, rest = shop.RECIPE.replace("[convert]", "[convert]\nnegative_rate = 0.33").partition("[features]")
    rows = shop.random_rows(6)
    rows["behaviours"] = [row for row in rows["behaviours"] if row.partition(",")[0] not in ("u1", "u2", "u3")]
    shop.write(folder, before + FEATURES + rest[rest.index("[select-clicks]") :], **rows)
    shop.run_all(folder)
    words = ["--recipe", folder / "recipe.toml", "--groups", folder / "groups", "--out", folder / "model"]
    trained = ctrkit("train", *words)
    assert trained.exit_code == 0, trained.output
    return folder


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_from_the_raw_logs(format: str, small: Path, tmp_path: Path) -> None:
    """What the shop would send, texts and lists of tags, gets the score of its sample; users without a history too."""
    recipe, out = small / "recipe.toml", tmp_path / "out"
    words = ["--recipe", recipe, "--convert", small / "convert", "--format", format, "--out", out]
    exported = ctrkit("export", small / "model", *words)
    assert exported.exit_code == 0, exported.output
    predict = ["--recipe", recipe, "--groups", small / "groups", "--model", small / "model"]
    assert ctrkit("predict", *predict, "--out", tmp_path / "p.parquet").exit_code == 0
    table = pl.read_parquet(tmp_path / "p.parquet")
    assert 0 in table["history_length"]
    expected = dict(table.select("sample_id", "score").iter_rows())
    samples = pl.read_parquet(small / "convert" / "samples" / "**" / "*.parquet", hive_partitioning=False)
    where = {row["sample_id"]: row for row in samples.iter_rows(named=True)}

    def raw(table: str) -> pl.DataFrame:
        return pl.read_csv(small / "raw" / f"{table}.csv", infer_schema=False)

    users = {row["user"]: row["gender"] for row in raw("users").iter_rows(named=True)}
    ads = {row["ad"]: row for row in raw("ads").iter_rows(named=True)}
    shown = {(r["user"], r["ad"], int(r["time"])): r["position"] for r in raw("impressions").iter_rows(named=True)}
    scorer = Scorer(out)
    found = 0
    for sample_id, request in requests_of.samples(small / "groups", small / "convert"):
        sample = where[sample_id]
        ad = ads.get(sample["ad"], {})
        tags = ad.get("tags") or ""
        position = shown[sample["user"], sample["ad"], sample["time"] // 1000]
        values = {"ad_id": sample["ad"], "ad_goods": ad.get("goods"), "hashed": ad.get("goods"), "place": int(position)}
        request |= {"user": {"gender": users.get(sample["user"])}, "scene": {}}
        for given in (tags, tags.split("|")):
            request["ads"] = [{**values, "ad_tags": given}]
            [score] = scorer.score(scorer.request.model_validate(request)).scores_A
            assert abs(score - expected[sample_id]) < 1e-5, request
        found += 1
    assert found == len(expected) > 30


def test_the_same_bytes_and_nothing_of_this_machine(small: Path, tmp_path: Path) -> None:
    """Neither folder names a place of this machine; a second ONNX export is the first one's, byte by byte."""
    recipe = ["--recipe", small / "recipe.toml", "--convert", small / "convert"]
    for name in ("onnx", "again", "pt2"):
        words = [*recipe, "--format", "pt2" if name == "pt2" else "onnx", "--out", tmp_path / name]
        assert ctrkit("export", small / "model", *words).exit_code == 0
        for path in sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()):
            contents = [path.read_bytes()]
            if path.suffix == ".pt2":
                with zipfile.ZipFile(path) as archive:
                    contents = [archive.read(member) for member in archive.namelist()]
            for content in contents:
                for place in (CHECKOUT, tmp_path, Path(np.__file__).parents[1]):
                    assert str(place).encode() not in content, path
            if name == "again":
                assert path.read_bytes() == (tmp_path / "onnx" / path.relative_to(tmp_path / name)).read_bytes()


def test_a_model_of_a_run_needs_no_recipe(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Vocabularies, and how many behaviours count, are those of the run that the model lies in."""
    home = tmp_path / "run"
    home.mkdir()
    for path in tiny_run.folder.iterdir():
        (home / path.name).symlink_to(path)
    tiny_run.train(home / "lr" / "model", "--variant", "lr")
    result = ctrkit("export", home / "lr" / "model", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["max_behaviours"], settings["format"], settings["model"]) == (10, "onnx", "LR")
    shown = ctrkit("inspect", tmp_path / "out")
    assert shown.exit_code == 0
    for text in ("LR", "ads.onnx", "max_behaviours"):
        assert text in shown.output
    bench = [
        sys.executable,
        "benchmarks/export.py",
        "--run",
        home,
        "--variant",
        "lr",
        "--samples",
        "99",
        "--turns",
        "1",
    ]
    printed = subprocess.run(bench, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])
    assert found["models"]["lr"]["samples"] == 99
    assert found["largest_difference"] < 1e-5
    alone = tiny_run.train(tmp_path / "alone" / "model", "--variant", "lr")
    result = ctrkit("export", alone, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "does not lie in the folder of a run" in result.output


def test_what_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*words: object) -> str:
        result = ctrkit("export", *words, "--out", tmp_path / "out")
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        assert not (tmp_path / "out").exists()
        return result.output

    recipe = ["--recipe", small / "recipe.toml", "--convert", small / "convert"]
    assert "it has no model.pt. Make one with `ctrkit train`" in error(small / "convert", *recipe)
    other = tmp_path / "convert" / "vocab"
    other.mkdir(parents=True)
    words = ["--recipe", small / "recipe.toml", "--convert", other.parent]
    assert "has another vocabulary than" in error(small / "model", *words)
    words = ["--recipe", "movielens", "--convert", small / "convert"]
    assert "--recipe is not that of this model" in error(small / "model", *words)
    assert "'--format'" in error(small / "model", *recipe, "--format", "tflite")
    assert "name it with --recipe" in error(small / "model", "--variant", "din")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    text = error(small / "model", *recipe)
    assert "onnxscript is not installed" in text
    assert "pip install 'ctrkit[export]'" in text
