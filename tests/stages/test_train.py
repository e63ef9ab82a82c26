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


def test_what_is_missing(tiny_run: TinyRun, tmp_path: Path) -> None:
    groups = ["--groups", tiny_run.groups]
    refusals = {
        "give --features": groups,
        "is not a groups folder": ["--groups", tmp_path],
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
        (groups / "schema.json").write_text(json.dumps({**schema, "features": kept}))
        reads = ["--groups", groups, *tiny_run.reads()[2:]]
        result = tiny_run.call("train", *words, *reads, "--out", tmp_path / "model")
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
