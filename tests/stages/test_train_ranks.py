"""`ctrkit train --nproc` with real processes: killed, gone on from a checkpoint of another number of ranks, it ends in
the model of one process. And `ctrkit predict --nproc`."""

import contextlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrkit.training  # before ranks are forked
from ctrkit import provenance
from ctrkit.cli import main
from ctrkit.ranks import Ranks
from tests.ranks import ROUND, load_loops, rounds
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


def start(*words: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "ctrkit", *map(str, words)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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


def kill_after(launcher: subprocess.Popen[str], rank: int, out: Path, step: int, *, writing: bool = False) -> None:
    """Kill a rank without warning once there is a checkpoint of a step or a later one; `writing`: while one is
    written."""
    while not any(int(p.stem[5:]) >= step for p in out.parent.glob(f".{out.name}.checkpoints-*/step-*.json")):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    while writing and not list(out.parent.glob(f".{out.name}.checkpoints-*/.step-*.tables.tmp-*")):
        assert launcher.poll() is None, launcher.communicate()[1]
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
def killed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave, one of which was killed, and another one after they had been started again."""
    out = tmp_path_factory.mktemp("killed") / "model"
    launcher = start(*words(tiny_run, out), "--nproc", 2, "--max-restarts", 1)
    kill_after(launcher, 0, out, 3)
    kill_after(launcher, 1, out, 8, writing=True)
    moment = time.monotonic()
    code, told = end(launcher)
    assert time.monotonic() - moment < BOUND
    assert code == 1
    assert told.count("train: going on after step") == 1, told
    errors = [line for line in told.splitlines() if "Error" in line]
    assert len(errors) == 1, told
    assert errors[0].startswith("Error: rank 1 of 2 was killed (SIGKILL, as the system does where memory is short), 2 ")
    assert errors[0].endswith("What was done is kept: run the same command again and it goes on from there")
    assert "Traceback" not in told
    assert not out.exists()
    return out.parent


def before_forks() -> None:
    """Import once for all ranks what takes long and starts no thread."""
    importlib.import_module("torch._dynamo")  # which DistributedDataParallel asks about its settings
    load_loops()
    importlib.import_module("ctrkit.stages.train")
    importlib.import_module("ctrkit.stages.predict")
    provenance.code_digest("train")


def command(ranks: Ranks, folder: Path) -> tuple[object, str, float]:
    """Run the round's command as a rank. Return exit code, what was told, and the seconds after rank 1 lost its files.

    RANK in a word is this rank's number. `lost` is a folder that rank 1 loses once there is a checkpoint, or a file,
    which is cut; or SIGTERM, and rank 1 is told to stop.
    """
    given, lost, beside = json.loads((folder / "rounds.json").read_text())[int(os.environ[ROUND])]
    gone = math.nan

    def lose(path: Path) -> None:
        nonlocal gone
        while not list(Path(beside).glob(".model.checkpoints-*/step-*.json")):
            time.sleep(0.01)
        gone = time.monotonic()
        if ranks.rank == 1 and path.name == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif ranks.rank == 1 and path.is_dir():
            shutil.rmtree(path)
        elif ranks.rank == 1:
            os.truncate(path, 4096)

    if lost:
        threading.Thread(target=lose, args=(Path(lost),), daemon=True).start()
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main([word.replace("RANK", str(ranks.rank)) for word in given])
    return ended.value.code, told.getvalue(), time.monotonic() - gone


@pytest.fixture(scope="module")
def told(tiny_run: TinyRun, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of some commands as two ranks each, one after the other: exit code and so on of each rank."""
    folder = tmp_path_factory.mktemp("told")
    shutil.copytree(killed, folder / "killed")
    for rank in range(2):
        shutil.copytree(tiny_run.groups, folder / f"groups-{rank}")
        shutil.copy(tiny_run.features, folder / f"features-{rank}.h5")
        recipe = tiny_run.recipe.read_text().replace("extractor = [16, 6]", f"extractor = [16, {6 - rank}]")
        (folder / f"recipe-{rank}.toml").write_text(recipe)
    shutil.copytree(tiny_run.groups, folder / "only-0")
    train = [*words(tiny_run, folder / "MODEL"), "--set", "train.epochs=500"]
    predict = ["predict", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--model", folder / "killed" / "model", *SETS]
    rounds_of: dict[str, tuple[list[object], object]] = {
        "train": (words(tiny_run, folder / "killed" / "model"), ""),
        "predict": ([*predict, "--set", "predict.batch=100", "--out", folder / "two.parquet"], ""),
        "mistake": ([*train, "--set", "train.compile=true"], ""),
        "no groups": ([*train, "--groups", folder / "groups-RANK", "--variant", "base"], folder / "groups-1"),
        "no features": (
            [*train, "--features", folder / "features-RANK.h5", "--set", "train.host_cache_gib=0"],
            folder / "features-1.h5",
        ),
        "other recipe": ([*train, "--recipe", folder / "recipe-RANK.toml"], ""),
        "never had groups": ([*train, "--groups", folder / "only-RANK"], ""),
        "told": ([*train, "--variant", "base"], "SIGTERM"),
    }
    given = []
    for name, (line, lost) in rounds_of.items():
        out = folder / name / "model"
        line = [str(out if word == folder / "MODEL" else word) for word in line]
        given.append((line, str(lost), str(out.parent)))
    (folder / "rounds.json").write_text(json.dumps(given))
    found = rounds(command, [2] * len(given), folder, joined=False)
    return {"folder": folder, **dict(zip(rounds_of, found, strict=True))}


@pytest.fixture(scope="module")
def several(told: dict[str, Any]) -> Path:
    """The model of two ranks that went on from where those were killed."""
    (code, first, _), other = told["train"]
    assert (code, other[:2]) == (0, (0, "")), first
    for line in ("train: going on after step", "validation GAUC", "train: 2 processes sent each other"):
        assert first.count(line) == 1
    assert "Error" not in first
    model: Path = told["folder"] / "killed" / "model"
    return model


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


def test_each_rank_keeps_its_rows(killed: Path) -> None:
    (kept,) = killed.glob(".model.checkpoints-*")
    assert len(list(kept.glob("step-*.json"))) == len(list(kept.glob("step-*.tables"))) >= 3
    for path in kept.glob("step-*.tables"):
        assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    for path in kept.glob("step-*.pt"):
        names = torch.load(path).keys()
        assert "table.12.step" in names
        assert not {"table.12", "table.12.m", "table.12.v"} & names


def test_one_process_goes_on_from_what_ranks_left(tiny_run: TinyRun, killed: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "model"
    shutil.copytree(killed, out.parent)
    told = tiny_run.must("train", *words(tiny_run, out)[3:]).output
    assert "train: going on after step" in told
    same(out, one)


def test_how_many_processes_there_were_makes_nothing_stale(
    several: Path, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    told = tiny_run.must("train", *tiny_run.reads(), "--out", several, *SETS, *ALWAYS, "--set", "train.placement=auto")
    assert "is what it would be made again" in told.output


def test_predictions_do_not_depend_on_the_number_of_processes(
    several: Path, told: dict[str, Any], tiny_run: TinyRun, tmp_path: Path
) -> None:
    first, other = told["predict"]
    assert (first[0], other[:2]) == (0, (0, "")), first
    assert first[1].count("impressions -> ") == 1
    tiny_run.must("predict", *tiny_run.reads(), "--model", several, *SETS, "--out", tmp_path / "one.parquet")
    found, wanted = (pl.read_parquet(path) for path in (told["folder"] / "two.parquet", tmp_path / "one.parquet"))
    assert found.drop("score").equals(wanted.drop("score"))
    np.testing.assert_allclose(found["score"], wanted["score"], rtol=1e-6)
    files = [tmp_path / "one.parquet", told["folder"] / "two.parquet"]
    judging = ctrkit("eval", "--gauc", *files, "--bootstrap", 0, "--json", tmp_path / "metrics.json")
    assert judging.exit_code == 0, judging.output
    judged = json.loads((tmp_path / "metrics.json").read_text())["variants"]
    one, two = ({k: v for k, v in judged[name]["all"].items() if v is not None} for name in ("one", "two"))
    assert one["gauc"] > 0
    assert two == pytest.approx(one, rel=1e-6)


def test_a_mistake_is_told_once(told: dict[str, Any]) -> None:
    first, other = told["mistake"]
    assert (first[0], other[:2]) == (2, (0, ""))
    assert "Error: train.compile = true is for one process" in first[1]
    assert len(first[1].splitlines()) == 1


def test_a_rank_that_loses_its_disk_says_so_and_no_rank_hangs(told: dict[str, Any]) -> None:
    first, other = told["no groups"]
    has_lost_another(first)
    assert other[0] == 1
    assert "Error: rank 1 of 2 cannot go on: No such file or directory" in other[1]
    assert "Traceback" not in other[1]
    assert other[2] < BOUND


def test_a_rank_whose_features_end_is_killed_and_no_rank_hangs(told: dict[str, Any]) -> None:
    """They are mapped into memory: the system kills who reads what is no longer there."""
    first, other = told["no features"]
    has_lost_another(first)
    assert other == signal.SIGBUS


def test_ranks_with_different_recipes_end_before_they_begin(told: dict[str, Any]) -> None:
    """Whose shapes differ would wait for each other somewhere in torch."""
    first, other = told["other recipe"]
    assert first[0] == other[0] == 2
    assert first[1] == other[1]
    assert (
        "Error: the ranks were not started alike: train.extractor is [16, 6] for rank 0 and [16, 5] for ra" in first[1]
    )


def test_a_rank_that_never_had_the_data_says_so(told: dict[str, Any]) -> None:
    first, other = told["never had groups"]
    assert first[0] == other[0] == 1
    assert "only-1" in other[1]
    assert "Error: rank 0 of 2 has lost another one" in first[1]
    assert "Traceback" not in first[1] + other[1]


def test_one_of_the_ranks_is_told_to_stop(told: dict[str, Any]) -> None:
    first, other = told["told"]
    has_lost_another(first)
    assert other[0] == 1
    assert "Error: rank 1 of 2 was told to stop, as when another one has failed. What was done is kept" in other[1]
    assert other[2] < BOUND


@pytest.mark.long
def test_the_launcher_that_is_told_to_stop_ends_all(tiny_run: TinyRun, tmp_path: Path) -> None:
    launcher = start(*words(tiny_run, tmp_path / "model"), "--set", "train.epochs=500", "--nproc", 2)
    while not list(tmp_path.glob(".model.checkpoints-*/step-*.json")):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    ranks = ranks_of(launcher)
    launcher.terminate()
    code, said = end(launcher, BOUND)
    assert code == 128 + signal.SIGTERM
    assert sorted(ranks) == [0, 1]
    assert not [rank for rank, process in ranks.items() if Path(f"/proc/{process}").exists()]
    assert "Traceback" not in said


def has_lost_another(first: tuple[object, str, float]) -> None:
    code, what, seconds = first
    assert code == 1
    assert "Error: rank 0 of 2 has lost another one, whose own message says why" in what
    assert "Traceback" not in what
    assert seconds < BOUND
