"""Training killed at random moments, again and again: the same command then ends in the same bytes.

SEED=1 kills at other moments.
"""

import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.tiny_run import TinyRun

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ctrkit.training", "ctrkit.stages.train", "pytest"])  # a start takes no seconds then
SETTINGS = {
    "epochs": 9,
    "batch": 32,
    "evaluate_every": 11,
    "patience": 7,
    "log_every": 4,
    "activation": "dice",
    "learning_rate": 0.01,
    "clip_norm": 0.5,
    "save_optimiser": True,
}
ALWAYS = {"checkpoint_minutes": 1e-9}
"""After every step."""
KILLS = 4
"""Of each kind."""


def words(tiny_run: TinyRun, out: Path, **settings: object) -> list[str]:
    sets = [word for key, value in (SETTINGS | settings).items() for word in ("--set", f"train.{key}={value}")]
    sets = [word.replace("=True", "=true") for word in sets]
    return list(map(str, ["train", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", out, *sets]))


def train(told: Path, arguments: list[str]) -> None:
    """What a process does: the command line, whose output goes into a file."""
    from ctrkit.cli import main

    sys.stdout = sys.stderr = open(told, "a", encoding="utf-8")  # noqa: SIM115
    main(arguments)


def start(tiny_run: TinyRun, out: Path, **settings: object) -> ForkServerProcess:
    process = FORKS.Process(target=train, args=(out.with_name("told"), words(tiny_run, out, **settings)))
    process.start()
    return process


def finish(tiny_run: TinyRun, out: Path, **settings: object) -> str:
    """Train to the end; return what was printed."""
    told = out.with_name("told")
    told.unlink(missing_ok=True)
    process = start(tiny_run, out, **settings)
    process.join()
    assert process.exitcode == 0, told.read_text()
    return told.read_text()


def checkpoints(out: Path) -> Path | None:
    return next(iter(out.parent.glob(f".{out.name}.checkpoints-*")), None)


def steps(out: Path) -> list[int]:
    """The steps that have checkpoints."""
    folder = checkpoints(out)
    return sorted(int(p.stem[5:]) for p in folder.glob("step-*.json")) if folder else []


def writing(out: Path) -> bool:
    """Whether a checkpoint was being written when the process was killed."""
    folder = checkpoints(out)
    if folder is None:
        return False
    unfinished = {p.stem for p in folder.glob("step-*.pt")} - {p.stem for p in folder.glob("step-*.json")}
    return bool(unfinished or list(folder.glob(".step-*")))


def contents(model: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in model.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "model"
    finish(tiny_run, out)
    assert checkpoints(out) is None
    assert contents(out).keys() == {"model.pt", "settings.json", "metrics.jsonl", "optimiser.pt"}
    return out


def test_training_killed_at_random_moments(tiny_run: TinyRun, undisturbed: Path, tmp_path: Path) -> None:
    """Between checkpoints and while one is written; how often they are written does not count."""
    moments = random.Random(os.environ.get("SEED", "3"))
    out = tmp_path / "model"
    met = {"writing": 0, "between": 0, "came through": 0}
    while min(met["writing"], met["between"]) < KILLS:
        assert sum(met.values()) < 20 * KILLS, met
        aim = moments.choice([kind for kind in ("writing", "between") if met[kind] < KILLS])
        process = start(tiny_run, out, **(ALWAYS if aim == "writing" else {}))
        enough = max(steps(out), default=0) + moments.randint(0, 25)
        while process.is_alive() and max(steps(out), default=0) < enough:
            time.sleep(0.001)
        if aim == "between":
            time.sleep(moments.uniform(0, 0.1))
        while aim == "writing" and process.is_alive() and not writing(out):
            pass
        process.kill()
        process.join()
        if out.exists():
            met["came through"] += 1
            assert contents(out) == contents(undisturbed)
            shutil.rmtree(out)
        else:
            met["writing" if writing(out) else "between"] += 1
    finish(tiny_run, out)
    assert contents(out) == contents(undisturbed)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
