"""Data stages killed at random moments: no worker lives on, and the same command then ends in the same bytes.

SEED=1 kills at other moments.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import shop

IMPRESSIONS, BEHAVIOURS, USERS, GOODS, DAYS = 40_000, 60_000, 3_000, 1_000, 5
SETTINGS = ["--set", "workers=2", "--set", "convert.partitions=16", "--set", "group.block_groups=50"]
STAGES = {
    "convert": ["--raw", "raw", "--out", "convert"],
    "select-clicks": ["--convert", "convert", "--out", "behaviours"],
    "group": ["--convert", "convert", "--behaviours", "behaviours", "--out", "groups"],
}
KILLS = {"convert": [0.2, 0.8, 0.95], "select-clicks": [0.5], "group": [0.5]}
"""Shares of a stage's tasks after which it is killed, give or take; each time the same work goes on."""


def write_logs(folder: Path) -> None:
    """Write a shop in four files a log, so that a stage lasts a few seconds."""
    rng = np.random.default_rng(5)
    shop.write(folder, **shop.random_rows(1, users=50, goods=GOODS, days=2))
    raw = folder / "raw"
    times = shop.at(0, 0) + rng.integers(0, DAYS * 86_400, IMPRESSIONS + BEHAVIOURS)
    user, goods, kind = (rng.integers(0, n, len(times)) for n in (USERS, GOODS, 3))
    for name in ("impressions", "clicks", "behaviours"):
        (raw / f"{name}.csv").unlink()
    for n in range(4):
        shown = range(n, IMPRESSIONS, 4)
        lines = [f"i{i},{times[i]},u{user[i]},a{goods[i]},{kind[i]}" for i in shown]
        write(raw / f"impressions-{n}.csv", shop.HEADERS["impressions"], lines)
        write(raw / f"clicks-{n}.csv", shop.HEADERS["clicks"], [f"i{i},0" for i in shown if i % 7 == 0])
        seen = range(IMPRESSIONS + n, len(times), 4)
        lines = [f"u{user[i]},g{goods[i]},{times[i]},click,{10 * kind[i]}" for i in seen]
        write(raw / f"behaviours-{n}.csv", shop.HEADERS["behaviours"], lines)
    recipe = shop.RECIPE
    for name in ("impressions", "clicks", "behaviours"):
        recipe = recipe.replace(f'"{name}.csv"', f'"{name}-*.csv"')
    (folder / "recipe.toml").write_text(recipe)


def write(path: Path, header: str, lines: list[str]) -> None:
    path.write_text("\n".join([header, *lines]) + "\n")


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage in a process group of its own."""
    recipe = str(folder / "recipe.toml")
    words = [sys.executable, "-m", "ctrkit", stage, "--recipe", recipe, *STAGES[stage], *SETTINGS]
    return subprocess.Popen(
        words, cwd=folder, start_new_session=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(folder: Path, stage: str) -> int:
    """Run a stage to its end; return how many tasks it was seen to finish."""
    process = start(folder, stage)
    most = 0
    while process.poll() is None:
        most = max(most, finished_tasks(folder, stage))
        time.sleep(0.01)
    _, printed = process.communicate()
    assert process.returncode == 0, printed
    return most


def finished_tasks(folder: Path, stage: str) -> int:
    """Return how many tasks are recorded as done beside a stage's output."""
    parts = folder.glob(f".{STAGES[stage][-1]}.parts-*")
    return sum(name.endswith(".json") for part in parts for _, _, names in os.walk(part) for name in names)


def members(group: int) -> list[int]:
    """Return the live processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def kill(process: subprocess.Popen[str], *, workers_too: bool) -> bool:
    """Kill a stage; say whether it was still at work. None of its processes may live on."""
    if process.poll() is not None:
        process.communicate()
        return False
    group = process.pid
    had_workers = len(members(group)) > 1
    if workers_too:
        os.killpg(group, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while left := members(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            pytest.fail(f"{len(left)} workers outlived their stage by ten seconds")
        time.sleep(0.02)
    return had_workers


def contents(folder: Path) -> dict[str, bytes]:
    """Return the digest of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The stages' outputs, and how many tasks each finished."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_logs(folder)
    return folder, {stage: finish(folder, stage) for stage in STAGES}


def test_killed_stages_end_in_the_same_bytes(undisturbed: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    whole, tasks = undisturbed
    for name in ("raw", "recipe.toml"):
        (tmp_path / name).symlink_to(whole / name)
    moments = random.Random(os.environ.get("SEED", "11"))
    for stage, options in STAGES.items():
        out = options[-1]
        met = 0
        for n, share in enumerate(KILLS[stage]):
            enough = tasks[stage] * (share + moments.uniform(-0.04, 0.04))
            process = start(tmp_path, stage)
            while process.poll() is None and finished_tasks(tmp_path, stage) < enough:
                time.sleep(0.005)
            met += kill(process, workers_too=n % 2 == 0)
        assert met, f"{stage} was never caught at work"
        done = finished_tasks(tmp_path, stage)
        assert (done > 0) != (tmp_path / out).exists(), "what was done is kept"
        finish(tmp_path, stage)
        made, expected = contents(tmp_path / out), contents(whole / out)
        assert sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name)) == []
        left = [p.name for p in tmp_path.glob(f".{out}.*")]
        assert left == [], left
