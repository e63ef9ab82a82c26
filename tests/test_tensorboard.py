"""Points of TensorBoard: there while the work goes on, and none twice after a kill."""

import errno
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctrkit.tensorboard import Board
from tests.tiny_run import TinyRun


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


def test_points_are_on_disk_before_the_end(tmp_path: Path) -> None:
    with Board(tmp_path, 0) as board:
        board.add(1, {"loss": 0.5})
        assert points(tmp_path, "loss") == [(1, 0.5)]


def test_only_files_of_the_same_output_go(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1700000000.host.1.0"
    other.write_bytes(b"of somebody else")
    for output in ("a", "b", "a"):
        with Board(tmp_path, 0, tmp_path / output) as board:
            board.add(1, {output: 0.5})
    assert other.read_bytes() == b"of somebody else"
    assert len(list(tmp_path.iterdir())) == 3
    other.unlink()
    assert points(tmp_path, "a") == points(tmp_path, "b") == [(1, 0.5)]


@pytest.mark.parametrize("fault", ["a file in its place", "full from the start", "full midway"])
def test_a_training_goes_on_without_its_curves(
    fault: str, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once; the model is the same as without TensorBoard."""
    board, written, write = tmp_path / "board", [], os.write
    if fault == "a file in its place":
        board.write_text("a file")

    def full(file: int, data: bytes) -> int:
        if "tfevents" not in os.readlink(f"/proc/self/fd/{file}"):
            return write(file, data)
        written.append(len(data))
        if fault == "full from the start" or len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    words = ["--variant", "base", "--set", "train.log_every=1", "--groups", tiny_run.groups]
    tiny_run.must("train", *words, "--out", tmp_path / "without")
    monkeypatch.setattr(os, "write", full)
    result = tiny_run.must("train", *words, "--out", tmp_path / "with", "--tensorboard", board)
    assert result.output.count("no more curves for TensorBoard") == 1
    assert len(written) == {"a file in its place": 0, "full from the start": 1, "full midway": 4}[fault]
    assert (tmp_path / "with" / "model.pt").read_bytes() == (tmp_path / "without" / "model.pt").read_bytes()


def test_a_folder_of_which_something_would_go_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = ["--variant", "base", "--groups", tiny_run.groups, "--out", out]
    for board in (out, out / "board", tiny_run.groups / "board"):
        result = tiny_run.call("train", *words, "--tensorboard", board)
        assert result.exit_code == 2, result.output
        assert f"--tensorboard {board} lies in" in result.output
        assert not out.exists()
