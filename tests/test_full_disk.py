"""Data stages whose disk is full: one clear error, and the same command then goes on.

The disk is a limit on the size of a file, which any user may set; NumPy, polars, Arrow and Python each meet it.
"""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shop import OUTPUTS, RECIPE, random_rows, run, write

FIRST_ROWS = 7000
"""Bytes; some of convert's first files are larger."""


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block, no file can become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop and its outputs."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, RECIPE, **random_rows(6))
    for stage in OUTPUTS:
        assert run(folder, stage).exit_code == 0
    return folder


def content(folder: Path, stage: str) -> str:
    found: str = json.loads((folder / f"{OUTPUTS[stage]}.json").read_text())["content"]
    return found


@pytest.mark.parametrize(
    ("stage", "sizes", "workers"),
    [
        ("convert", (300, 2000, 4000, 6000), 1),
        ("convert", (2000,), 2),
        ("select-clicks", (50, 1000), 1),
        ("group", (50, 1500, 3000), 1),
    ],
)
def test_a_full_disk(whole: Path, tmp_path: Path, stage: str, sizes: tuple[int, ...], workers: int) -> None:
    """Each time with some more room, until there is enough."""
    for name in ("raw", "recipe.toml", *(OUTPUTS[s] + end for s in OUTPUTS if s != stage for end in ("", ".json"))):
        (tmp_path / name).symlink_to(whole / name)
    out = tmp_path / OUTPUTS[stage]
    for size in sizes:
        with largest_file(size):
            result = run(tmp_path, stage, {"workers": workers})
        assert result.exit_code == 1, (size, result.output)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.output.count("Error: ") == 1
        assert f"cannot write {out}: a file would become larger than is allowed" in result.output
        assert "run the same command again: it goes on from what was done" in result.output
        assert not out.exists()
        assert len(list(tmp_path.glob(f".{out.name}.parts-*"))) == 1
        assert not [p for p in tmp_path.rglob(".*.parts-*/**/.*") if p.is_file() and p.suffix != ".json"]
    result = run(tmp_path, stage, {"workers": workers})
    assert result.exit_code == 0, result.output
    assert content(tmp_path, stage) == content(whole, stage)
    assert not list(tmp_path.glob(f".{out.name}.*"))
