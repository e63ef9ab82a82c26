"""Fixtures that several test files share."""

import shutil
from pathlib import Path

import pytest

from tests import tiny_world
from tests.tiny_run import TinyRun
from tests.tiny_world import Run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny shop from raw logs to groups and features, by the stages in this process. Not to be changed."""
    return TinyRun(tmp_path_factory.mktemp("tiny")).build()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole run of tiny.toml by `ctrkit run` of the wheel, with two jobs. Not to be changed: see `run`."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "tiny.toml").write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS)
    run = Run(folder, tiny_world.install(tmp_path_factory.mktemp("wheel")))
    printed = run.ctrkit("run", "tiny.toml", "-j", "2")
    assert printed.endswith("tiny: done, the report is runs/tiny/report.html\n")
    return run


@pytest.fixture
def run(built: Run, tmp_path: Path) -> Run:
    """A copy of the built run, times included, to do with as one likes."""
    return Run(Path(shutil.copytree(built.folder, tmp_path / "run")), built.site)
