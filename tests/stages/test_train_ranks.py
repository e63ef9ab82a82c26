"""`ctrkit train --nproc` with real processes: killed, gone on from a checkpoint of another number of ranks, it ends in
the model of one process. And `ctrkit predict --nproc`."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctrkit.cli import main
from ctrkit.ranks import Ranks
from tests.ranks import on_ranks
from tests.shop import ctrkit
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


def start(*words: object, through: Sequence[object] = ("-m", "ctrkit")) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = [sys.executable, *map(str, through), *map(str, words)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def words(tiny_run: TinyRun, out: Path) -> list[object]:
    return ["train", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", out, *SETS, *ALWAYS]


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
def several(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of two ranks, one of which was killed and which then went on by themselves."""
    out = tmp_path_factory.mktemp("several") / "model"
    launcher = start(*words(tiny_run, out), "--nproc", 2, "--max-restarts", 1)
    kill_after(launcher, 0, out, 3)
    code, told = end(launcher)
    assert code == 0, told
    assert told.count("train: going on after step") == 1
    assert told.count("validation GAUC") == 1
    assert told.count("train: 2 processes sent each other") == 1
    assert "Error" not in told
    return out


def same(ours: Path, plain: Path) -> None:
    tensors_of_ours, tensors_of_plain = tensors(ours), tensors(plain)
    assert tensors_of_ours.keys() == tensors_of_plain.keys()
    for name, tensor in tensors_of_plain.items():
        np.testing.assert_allclose(tensors_of_ours[name], tensor, rtol=1e-6, atol=1e-9, err_msg=name)
    assert len(metrics(ours)) == len(metrics(plain))
    for mine, its in zip(metrics(ours), metrics(plain), strict=True):
        assert mine == pytest.approx(its, rel=1e-7)
    assert (ours / "settings.json").read_bytes() == (plain / "settings.json").read_bytes()
    assert [p.name for p in ours.parent.iterdir() if p.name.startswith(".model.")] == []


def test_ranks_that_were_started_again_end_in_the_model_of_one_process(several: Path, one: Path) -> None:
    same(several, one)
    sidecar = json.loads(several.with_name("model.json").read_text())
    assert sidecar["counts"]["ranks"]["ranks"] == 2
    assert sidecar["counts"]["ranks"]["bytes of picture vectors"] > 0
    assert "processes" not in sidecar["config"]["train"]


def test_a_killed_rank_ends_all_and_one_process_goes_on(tiny_run: TinyRun, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    launcher = start(*words(tiny_run, out), "--nproc", 2)
    kill_after(launcher, 1, out, 5)
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

    told = tiny_run.must("train", *words(tiny_run, out)[3:]).output
    assert "train: going on after step" in told
    same(out, one)


def test_how_many_processes_there_were_makes_nothing_stale(
    several: Path, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    told = tiny_run.must("train", *tiny_run.reads(), "--out", several, *SETS, *ALWAYS, "--set", "train.placement=auto")
    assert "is what it would be made again" in told.output


def test_predictions_do_not_depend_on_the_number_of_processes(several: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """By torchrun, as on two machines with a process each."""
    words = [*tiny_run.reads(), "--model", several, *SETS, "--set", "predict.batch=100", "--out"]
    tiny_run.must("predict", *words, tmp_path / "one.parquet")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"localhost:{port}", "-m", "ctrkit"]
    two = [
        start("predict", "--recipe", tiny_run.recipe, *words, tmp_path / "two.parquet", through=torchrun)
        for _ in range(2)
    ]
    ends = [end(launcher) for launcher in two]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum(told.count("impressions -> ") for _, told in ends) == 1
    found, wanted = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("two", "one"))
    assert found.drop("score").equals(wanted.drop("score"))
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-6)
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    told = ctrkit("eval", "--gauc", *files, "--bootstrap", 0, "--json", tmp_path / "metrics.json")
    assert told.exit_code == 0, told.output
    judged = json.loads((tmp_path / "metrics.json").read_text())["variants"]
    one, two = ({k: v for k, v in judged[name]["all"].items() if v is not None} for name in ("one", "two"))
    assert one["gauc"] > 0
    assert two == pytest.approx(one, rel=1e-6)


def test_a_mistake_is_told_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    words = ["train", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", tmp_path / "model", "--nproc", 2]
    code, told = end(start(*words, "--set", "train.compile=true"))
    assert code == 2
    assert told.count("Error: train.compile = true is for one process") == 1
    assert len(told.splitlines()) == 1, told


def on_two_disks(ranks: Ranks, folder: Path) -> tuple[object, str, float]:
    """Train from a folder of groups of its own; rank 1's goes once there is a checkpoint. Return exit code, what was
    told, and the seconds from then to the end."""
    gone = math.nan

    def lose() -> None:
        nonlocal gone
        while not list(folder.glob(".model.checkpoints-*/step-*.json")):
            time.sleep(0.01)
        gone = time.monotonic()
        if ranks.rank == 1:
            shutil.rmtree(folder / "groups-1")

    threading.Thread(target=lose, daemon=True).start()
    words = json.loads((folder / "words.json").read_text())
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main([*words, "--groups", str(folder / f"groups-{ranks.rank}")])
    return ended.value.code, told.getvalue(), time.monotonic() - gone


def test_a_rank_that_loses_its_disk_says_so_and_no_rank_hangs(tiny_run: TinyRun, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copytree(tiny_run.groups, tmp_path / f"groups-{rank}")
    given = ["train", "--recipe", tiny_run.recipe, "--variant", "base", "--out", tmp_path / "model", *SETS, *ALWAYS]
    given += ["--set", "train.epochs=500"]
    (tmp_path / "words.json").write_text(json.dumps(list(map(str, given))))
    first, other = on_ranks(on_two_disks, [2], tmp_path, joined=False)[2]
    assert other[0] == 1
    assert "Error: rank 1 of 2 cannot go on: No such file or directory" in other[1]
    assert first[0] == 1
    assert "Error: rank 0 of 2 has lost another one, whose own message says why" in first[1]
    assert max(first[2], other[2]) < BOUND
    assert "Traceback" not in first[1] + other[1]
