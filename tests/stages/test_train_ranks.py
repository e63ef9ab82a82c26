"""`ctrkit train --nproc` with real processes: killed, gone on from a checkpoint of another number of ranks, it ends in
the model of one process. And `ctrkit predict --nproc`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.tiny_run import TinyRun

SETTINGS = {
    "epochs": 3,
    "batch": 60,
    "evaluate_every": 7,
    "patience": 0,
    "activation": "dice",
    "user_ids": "true",
    "clip_norm": 0.5,
    "save_optimiser": "true",
    "precision": "float64",
    "placement": "shard",
    "log_every": 4,
}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"train.{key}={value}")]
ALWAYS = ["--set", "train.checkpoint_minutes=1e-9"]
"""A checkpoint after every step."""
BOUND = 30.0
"""Seconds within which ranks have to end after one of them was killed."""


def start(*words: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = [sys.executable, "-m", "ctrkit", *map(str, words)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Return rank → process of what a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/environ").read_text().split("\0")
        except OSError:
            continue
        found.update({int(word[5:]): int(child) for word in words if word.startswith("RANK=")})
    return found


def kill_after(launcher: subprocess.Popen[str], rank: int, out: Path, step: int) -> None:
    """Kill a rank without warning once there is a checkpoint of a step or a later one."""
    while not any(int(p.stem[5:]) >= step for p in out.parent.glob(f".{out.name}.checkpoints-*/step-*.json")):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    os.kill(ranks_of(launcher)[rank], signal.SIGKILL)


def end(launcher: subprocess.Popen[str], seconds: float = 120.0) -> tuple[int, str]:
    """Return exit code and what was told."""
    try:
        told = launcher.communicate(timeout=seconds)[1]
    finally:
        launcher.kill()
    return launcher.returncode, told


def tensors(model: Path) -> dict[str, Any]:
    found = {**torch.load(model / "model.pt"), **torch.load(model / "optimiser.pt")}
    return {name: t.numpy()[1:] if name.endswith((".m", ".v")) else t.numpy() for name, t in found.items()}


def metrics(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("one") / "model", *SETS)


@pytest.fixture(scope="module")
def several(tiny_run: TinyRun, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of two ranks, then three, of which one was killed in each case."""
    out = tmp_path_factory.mktemp("several") / "model"
    words = ["train", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", out, *SETS, *ALWAYS]

    launcher = start(*words, "--nproc", 2)
    kill_after(launcher, 1, out, 3)
    killed = time.monotonic()
    code, told = end(launcher)
    assert time.monotonic() - killed < BOUND
    assert code == 1
    errors = [line for line in told.splitlines() if "Error" in line]
    assert len(errors) == 1, told
    assert errors[0].startswith("Error: rank 1 of 2 was killed (SIGKILL")
    assert errors[0].endswith("What was done is kept: run the same command again and it goes on from there")
    assert "Traceback" not in told
    assert not out.exists()

    launcher = start(*words, "--nproc", 3, "--max-restarts", 1)
    kill_after(launcher, 0, out, 9)
    code, told = end(launcher)
    assert code == 0, told
    assert told.count("train: going on after step") == 2
    assert told.count("validation GAUC") == 1
    assert "Error" not in told
    return out


def test_ranks_that_were_killed_end_in_the_model_of_one_process(several: Path, one: Path) -> None:
    ours, plain = tensors(several), tensors(one)
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-6, atol=1e-9, err_msg=name)
    assert len(metrics(several)) == len(metrics(one))
    for mine, its in zip(metrics(several), metrics(one), strict=True):
        assert mine == pytest.approx(its, rel=1e-7)
    assert (several / "settings.json").read_bytes() == (one / "settings.json").read_bytes()
    sidecar = json.loads(several.with_name("model.json").read_text())
    assert sidecar["counts"]["ranks"]["ranks"] == 3
    assert sidecar["counts"]["ranks"]["bytes of picture vectors"] > 0
    assert "processes" not in sidecar["config"]["train"]
    assert [p.name for p in several.parent.iterdir() if p.name.startswith(".model.")] == []


def test_how_many_processes_there_were_makes_nothing_stale(
    several: Path, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    told = tiny_run.must("train", *tiny_run.reads(), "--out", several, *SETS, *ALWAYS, "--set", "train.placement=auto")
    assert "is what it would be made again" in told.output


def test_predictions_do_not_depend_on_the_number_of_processes(several: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    words = [*tiny_run.reads(), "--model", several, *SETS, "--set", "predict.batch=100", "--out"]
    tiny_run.must("predict", *words, tmp_path / "one.parquet")
    code, told = end(start("predict", "--recipe", tiny_run.recipe, *words, tmp_path / "two.parquet", "--nproc", 2))
    assert code == 0, told
    assert told.count("predict: ") == 2  # progress, and the end, of one process
    found, wanted = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("two", "one"))
    assert found.drop("score").equals(wanted.drop("score"))
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-6)


def test_a_mistake_is_told_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    words = ["train", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", tmp_path / "model", "--nproc", 2]
    code, told = end(start(*words, "--set", "train.compile=true"))
    assert code == 2
    assert told.count("Error: train.compile = true is for one process") == 1
    assert len(told.splitlines()) == 1, told
