"""ctrkit train, through the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from ctrkit.stages.train import command

from ctrkit.cli import COMMANDS
from tests.shop import ctrkit
from tests.small_groups import write_features
from tests.tiny_run import TinyRun


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["train"][1]


def test_what_is_written(tiny_run: TinyRun, tmp_path: Path) -> None:
    model = tmp_path / "model"
    result = tiny_run.must("train", *tiny_run.reads(), "--out", model, "--tensorboard", tmp_path / "board")
    assert sorted(p.name for p in model.iterdir()) == ["metrics.jsonl", "model.pt", "settings.json"]
    state = torch.load(model / "model.pt", weights_only=True)
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    settings = json.loads((model / "settings.json").read_text())
    assert settings["train"]["extractor"] == [16, 6]
    assert (
        settings["schema"]["vocab_digest"] == json.loads((tiny_run.groups / "schema.json").read_text())["vocab_digest"]
    )
    history = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "epoch", "samples", "loss", "valid_loss", "valid_gauc", "learning_rate"]
    assert [list(r) for r in history] == [keys]
    sidecar = json.loads((tmp_path / "model.json").read_text())
    assert sidecar["counts"]["best"] == history[0]
    assert sidecar["counts"]["samples"] == history[0]["samples"]
    assert sidecar["counts"]["pictures without a vector"] == 0
    assert sidecar["inputs"].keys() == {"groups", "features", "image vocabulary"}
    assert sidecar["counts"]["samples a second"] > 0
    assert any((tmp_path / "board").iterdir())
    assert f"validation GAUC {history[0]['valid_gauc']:.4f} at step {history[0]['step']}" in result.output


def test_the_optimiser_of_the_model_that_is_kept(tiny_run: TinyRun, tmp_path: Path) -> None:
    words = ["--set", "train.evaluate_every=4", "--set", "train.epochs=8", "--set", "train.save_optimiser=true"]
    model = tiny_run.train(tmp_path / "model", *words, "--set", "train.learning_rate=0.05")
    state = torch.load(model / "model.pt", weights_only=True)
    optimiser = torch.load(model / "optimiser.pt", weights_only=True)
    sidecar = json.loads((tmp_path / "model.json").read_text())
    step = sidecar["counts"]["best"]["step"]
    assert step < sidecar["counts"]["steps"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [n.removeprefix("network.") for n in state if n.startswith("network.") and not n.endswith(buffers)]
    expected = {f"adam.{name}.{kind}" for name in parameters for kind in ("exp_avg", "exp_avg_sq", "step")}
    assert optimiser.keys() == expected | {f"table.12.{kind}" for kind in ("m", "v", "step")}
    for name in parameters:
        assert optimiser[f"adam.{name}.exp_avg"].shape == state[f"network.{name}"].shape
        assert optimiser[f"adam.{name}.step"] == step
    assert optimiser["table.12.step"] == step
    assert optimiser["table.12.m"].shape == optimiser["table.12.v"].shape == state["table.12"].shape
    seen = optimiser["table.12.v"].any(1)
    assert seen[1:].any()
    assert not seen.all()


def test_a_batch_that_cannot_be_learned_from(tiny_run: TinyRun, tmp_path: Path) -> None:
    """It is kept beside the model, shown by inspect, and goes when training comes through."""
    words = ["--variant", "base", "--groups", tiny_run.groups, "--out", tmp_path / "model"]
    hopeless = ["--set", "train.learning_rate=1e30", "--set", "train.batch_norm=false"]
    result = tiny_run.call("train", *words, *hopeless)
    assert result.exit_code == 1, result.output
    assert result.output.count("Error: ") == 1
    assert "Traceback" not in result.output
    kept = tmp_path / "model.bad-batch.parquet"
    assert f"{kept} has the batch" in result.output
    assert not (tmp_path / "model").exists()
    assert pl.read_parquet(kept).height == 64
    assert "sample_id │ Int64" in " ".join(ctrkit("inspect", kept).output.split())
    tiny_run.must("train", *words)
    assert not kept.exists()


def test_two_processes_write_the_same_bytes(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Whatever the hash seed and polars' threads; another training seed gives another model."""
    words = ["--set", "train.evaluate_every=5", "--set", "train.activation=dice"]
    tiny_run.train(tmp_path / "here", *words)
    there = ["--recipe", tiny_run.recipe, *map(str, tiny_run.reads()), *words, "--out", tmp_path / "there"]
    subprocess.run(
        [sys.executable, "-m", "ctrkit", "train", *there],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "POLARS_MAX_THREADS": "3"},
    )
    for file in ("model.pt", "metrics.jsonl", "settings.json"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    content = [json.loads((tmp_path / f"{name}.json").read_text())["content"] for name in ("here", "there")]
    assert content[0] == content[1]
    tiny_run.train(tmp_path / "other", *words, "--set", "train.seed=2")
    assert (tmp_path / "here" / "model.pt").read_bytes() != (tmp_path / "other" / "model.pt").read_bytes()


def test_models_that_look_at_no_pictures_need_none(tiny_run: TinyRun, tmp_path: Path) -> None:
    for variant in ("lr", "base", "din"):
        tiny_run.must("train", "--variant", variant, "--groups", tiny_run.groups, "--out", tmp_path / variant)
        sidecar = json.loads((tmp_path / f"{variant}.json").read_text())
        assert sidecar["inputs"].keys() == {"groups"}
        assert json.loads((tmp_path / variant / "settings.json").read_text())["picture_width"] == 0


def test_features_of_another_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Without any picture of this vocabulary: an error. With some: said, and they count as missing."""
    images = pl.read_parquet(tiny_run.convert / "vocab" / "image.parquet")["value"].to_list()
    some, none = images[:-3], ["x", "y"]
    reads = ["--groups", tiny_run.groups, "--convert", tiny_run.convert, "--out", tmp_path / "model"]
    for name, names in (("none", none), ("some", some)):
        write_features(tmp_path / f"{name}.h5", names, range(len(names)), np.eye(len(names), 4))
    result = tiny_run.call("train", *reads, "--features", tmp_path / "none.h5")
    assert result.exit_code == 1
    assert "has no vector for any picture" in result.output
    result = tiny_run.must("train", *reads, "--features", tmp_path / "some.h5")
    assert "train: 3 pictures have no vector" in result.output


def other_conversion(tiny_run: TinyRun, folder: Path) -> Path:
    """The run's conversion, with a vocabulary of pictures that counts backwards."""
    shutil.copytree(tiny_run.convert, folder)
    path = folder / "vocab" / "image.parquet"
    pl.read_parquet(path).with_columns(pl.col("value").reverse()).write_parquet(path)
    return folder


def test_a_conversion_of_other_groups(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Pictures would be others: refused by train and predict."""
    other = other_conversion(tiny_run, tmp_path / "convert")
    reads = ["--groups", tiny_run.groups, "--features", tiny_run.features, "--out", tmp_path / "out"]
    model = tiny_run.train(tmp_path / "model")
    for words in (["train"], ["predict", "--model", model]):
        result = tiny_run.call(*words, *reads, "--convert", other)
        assert result.exit_code == 1, result.output
        assert f"{other} (--convert) has another vocabulary than {tiny_run.groups} (--groups)" in result.output
        for folder, said in ((tmp_path / "nowhere", "is not there"), (tiny_run.folder / "raw", "has no vocab/")):
            result = tiny_run.call(*words, *reads, "--convert", folder)
            assert result.exit_code == 1, result.output
            assert f"{folder} (--convert) {said}" in result.output
        assert not (tmp_path / "out").exists()


def test_features_of_the_recipe(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Widths and switches are the recipe's, the rest is the groups' or refused."""
    model = tiny_run.train(tmp_path / "model", "--set", "features.gender.width=8", "--set", "features.goods.switch=")
    state = torch.load(model / "model.pt", weights_only=True)
    sizes = json.loads((tiny_run.groups / "schema.json").read_text())["vocab_sizes"]
    assert state["table.8"].shape == (sizes["gender"] + 1, 8)
    others = ("age", "ad_id", "category", "shop", "position", "goods")
    assert state["table.12"].shape == (sum(sizes[v] for v in others) + 1, 12)
    tiny_run.must("predict", *tiny_run.reads(), "--model", model, "--out", tmp_path / "p.parquet")
    for text, said in (
        ("age.min_count=3", "was made with features.age.min_count = 1, and the recipe says 3: run ctrkit group again"),
        ("age.of=scene", "features.age.of = 'user'"),
        ("more.of=user", "has no feature 'more': run ctrkit group again"),
    ):
        result = tiny_run.call("train", *tiny_run.reads(), "--out", tmp_path / "m", "--set", f"features.{text}")
        assert result.exit_code == 1, result.output
        assert said in result.output


def test_outputs_that_cannot_be(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Told before anything is done."""
    (tmp_path / "file").write_text("mine")
    groups = Path(shutil.copytree(tiny_run.groups, tmp_path / "groups"))
    words = ["--variant", "base", "--groups", groups, "--out"]
    for out, code, said in (
        (tmp_path / "file", 2, "is a file, and a folder is to be written"),
        (Path("/dev/null"), 2, "is neither a file nor a folder"),
        (groups / "model", 1, "lies in an input (groups:"),
    ):
        result = tiny_run.call("train", *words, out)
        assert result.exit_code == code, result.output
        assert said in result.output
        assert "samples" not in result.output
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "groups"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train.seed=-1"], 2, "train.seed: input should be greater than or equal to 0"),
        (["train.seed=18446744073709551616"], 2, "train.seed: input should be less than"),
        (["train.threads=100000"], 2, "train.threads: input should be less than or equal to 1024"),
        (["train.device=mps"], 2, "train.device = 'mps' is not supported; use 'auto', 'cpu' or 'cuda'"),
        (["train.device=meta"], 2, "train.device = 'meta' is not supported"),
        (["train.learning_rate=1e308"], 2, "train.learning_rate: input should be less than"),
        (["train.tower=[1000000000000]"], 2, "train.tower.0: input should be less than or equal to 1000000"),
        (["train.learning_rate=true"], 2, "train.learning_rate: has to be a number (given: true)"),
        (['train.epochs="3"'], 2, 'train.epochs: has to be a number (given: "3")'),
        (["train.batch_norm=1"], 2, "train.batch_norm: has to be true or false (given: 1)"),
    ],
)
def test_settings_that_cannot_be(tiny_run: TinyRun, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    sets = [w for text in words for w in ("--set", text)]
    result = tiny_run.call("train", "--variant", "base", *sets, "--groups", tiny_run.groups, "--out", tmp_path / "m")
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_picture_vectors_that_say_nothing(tiny_run: TinyRun, tmp_path: Path) -> None:
    """All the same: told. Infinite: refused."""
    images = pl.read_parquet(tiny_run.convert / "vocab" / "image.parquet")["value"].to_list()
    reads = ["--groups", tiny_run.groups, "--convert", tiny_run.convert, "--features"]
    for value, code, said in ((0.1, 0, "are the same in"), (np.inf, 1, "infinite or missing numbers")):
        path = tmp_path / f"{value}.h5"
        write_features(path, images, range(len(images)), np.full((len(images), 4), value))
        result = tiny_run.call("train", *reads, path, "--out", tmp_path / f"{value}")
        assert result.exit_code == code, result.output
        assert said in result.output


def test_inspect_shows_the_files_of_tensors(tiny_run: TinyRun, tmp_path: Path) -> None:
    words = ["--variant", "lr", "--set", "train.save_optimiser=true", "--groups", tiny_run.groups]
    tiny_run.must("train", *words, "--out", tmp_path / "model")
    for name, tensor in (("model.pt", "table.1"), ("optimiser.pt", "table.1.m")):
        result = ctrkit("inspect", tmp_path / "model" / name)
        assert result.exit_code == 0, result.output
        assert f"{name}: " in result.output
        assert f" {tensor} " in result.output


def test_what_is_missing(tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    groups = ["--groups", tiny_run.groups]
    refusals = {
        "give --features": groups,
        "is not a groups folder": ["--groups", tmp_path / "empty"],
        "nowhere.h5 is not there": [*groups, "--features", tmp_path / "nowhere.h5", "--convert", tiny_run.convert],
    }
    for message, words in refusals.items():
        result = tiny_run.call("train", *words, "--out", tmp_path / "model")
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert "Traceback" not in result.output
        assert not list(tmp_path.glob("*model*"))


def test_recipes_that_no_model_can_be_made_of(tiny_run: TinyRun, tmp_path: Path) -> None:
    """No partner for DIN, no picture for DICM, no id at all."""
    schema = json.loads((tiny_run.groups / "schema.json").read_text())
    cases = {
        "no behaviour feature shares its vocabulary": ({"ad_category", "ad_shop"}, ["--variant", "din"]),
        "[train] ad_image is on, but [features] has no feature of = 'ad' with kind = 'image'": ({"ad_image"}, []),
        "the model has no ID feature of user, ad or scene": (
            {"gender", "age", "ad_id", "ad_category", "ad_shop", "position"},
            [],
        ),
    }
    for n, (message, (dropped, words)) in enumerate(cases.items()):
        groups = tmp_path / f"groups {n}"
        shutil.copytree(tiny_run.groups, groups)
        kept = {name: f for name, f in schema["features"].items() if name not in dropped}
        (groups / "schema.json").write_text(json.dumps({**schema, "features": kept, "order": list(kept)}))
        lines = tiny_run.recipe.read_text().splitlines()
        recipe = tmp_path / f"recipe-{n}.toml"
        recipe.write_text("\n".join(line for line in lines if line.partition(" = ")[0] not in dropped))
        reads = ["--recipe", recipe, "--groups", groups, *tiny_run.reads()[2:]]
        result = ctrkit("train", *words, *reads, "--out", tmp_path / "model")
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_splits_that_are_empty(missing: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    shutil.copytree(tiny_run.groups, groups)
    for part in (groups / missing).iterdir():
        part.unlink()
    result = tiny_run.call("train", "--variant", "base", "--groups", groups, "--out", tmp_path / "model")
    if missing == "train":
        assert result.exit_code == 1
        assert "has no train split; [split] in the recipe decides which days it has" in result.output
        assert not (tmp_path / "model").exists()
    else:
        assert result.exit_code == 0
        assert "there is no validation split, so the model of the last step" in result.output
        history = json.loads((tmp_path / "model" / "metrics.jsonl").read_text())
        assert history["valid_gauc"] is None
