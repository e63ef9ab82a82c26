"""Points of TensorBoard: there while the work goes on, and none twice after a kill."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctrkit import tensorboard
from ctrkit.tensorboard import Board


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_points(tmp_path: Path) -> None:
    with Board(tmp_path / "board", 0) as board:
        board.add(3, {"loss": 0.5, "gauc": None})
        board.add(6, {"loss": 0.25, "gauc": 0.75})
    assert points(tmp_path / "board", "loss") == [(3, 0.5), (6, 0.25)]
    assert points(tmp_path / "board", "gauc") == [(6, 0.75)]
    with Board(tmp_path / "board", 0) as board:
        board.add(1, {"loss": 2.0})
    assert points(tmp_path / "board", "loss") == [(1, 2.0)]
    with Board(None, 0) as board:
        board.add(1, {"loss": 2.0})


def test_points_that_are_made_again_are_there_once(tmp_path: Path) -> None:
    with Board(tmp_path, 0) as board:
        for step in range(1, 6):
            board.add(step, {"loss": float(step)})
    with Board(tmp_path, 3) as board:
        for step in range(4, 8):
            board.add(step, {"loss": 10.0 + step})
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0), (7, 17.0)]


def test_points_are_on_disk_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0)
    with Board(tmp_path, 0) as board:
        board.add(1, {"loss": 0.5})
        board.add(2, {"loss": 0.25})
        assert (1, 0.5) in eventually(tmp_path)


def eventually(folder: Path) -> list[tuple[int, float]]:
    """Return the points once there are any; a thread writes them."""
    for _ in range(1000):
        accumulator = EventAccumulator(str(folder)).Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            return [(e.step, e.value) for e in accumulator.Scalars("loss")]
    raise AssertionError("nothing is written before the end")
