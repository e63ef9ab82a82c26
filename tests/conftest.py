"""Fixtures that several test files share, and how the tests' processes work."""

import contextlib
import fcntl
import functools
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Here and in the processes that tests start; before torch is imported. Tests of threads say how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the cores are for other processes
gc.set_threshold(20_000, 10, 10)  # as ctrkit's own process does

from tests import tiny_world  # noqa: E402
from tests.tiny_run import TinyRun  # noqa: E402
from tests.tiny_world import Run  # noqa: E402

LONGEST = [
    "test_benchmarks.py",
    "test_known_answers.py",
    "test_pipeline.py",
    "test_extract_images.py",
    "test_tune.py",
    "test_feature_service.py",
    "test_train_ranks.py",
    "test_ray.py",
    "test_serve.py",
    "test_pairs.py",
    "test_properties.py",
    "test_kill_data.py",
    "test_combinations.py",
    "test_compiling.py",
    "test_extract_ranks.py",
    "test_spread_tables.py",
    "test_report.py",
    "test_backbones.py",
    "test_mlflow.py",
    "test_daily.py",
    "test_check.py",
    "test_predict_ranks.py",
    "test_training.py",
    "test_checkpoints.py",
    "test_fuzz.py",
    "test_paper_tables.py",
    "test_two_hosts.py",
    "test_remote.py",
]
"""Files to begin with, so that no process is still at a long one when the others have finished."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; `--dist loadfile --no-loadscope-reorder` hands them out in this order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """What was imported is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny shop from raw logs to groups and features, by the stages in this process. Not to be changed."""
    return TinyRun(tmp_path_factory.mktemp("tiny")).build()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole run of tiny.toml by `ctrkit run` of the wheel, with two jobs. Not to be changed: see `run`.

    Of pytest-xdist's processes the first that needs it makes it, for all.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-by-make"
    shared.mkdir(exist_ok=True)
    run = Run(shared / "built", shared / "wheel" / "site")
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            for folder in (shared / "built", shared / "wheel"):  # of one that failed
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            (run.folder / "tiny.toml").write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS)
            tiny_world.install(shared / "wheel")
            printed = run.ctrkit("run", "tiny.toml", "-j", "2")
            assert printed.endswith("tiny: done, the report is runs/tiny/report.html\n")
            (shared / "done").touch()
    return run


@pytest.fixture(scope="session")
def warm(built: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A server that runs commands of the wheel without the time that imports take, started by the first call for its
    socket: see tests/warm.py."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def socket() -> Path:
            path = tmp_path_factory.mktemp("warm") / "socket"
            command = [sys.executable, "-P", tiny_world.CHECKOUT / "tests" / "warm.py", "serve", path]
            server = subprocess.Popen(
                command, env=built.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(server)  # whose end is that of its standard input
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            return path

        yield socket


@pytest.fixture
def run(built: Run, warm: Callable[[], Path], tmp_path: Path) -> Run:
    """A copy of the built run, times included, to do with as one likes."""
    return Run(Path(shutil.copytree(built.folder, tmp_path / "run")), built.site, warm)
