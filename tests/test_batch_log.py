"""Logs of batches: whole records are found again, whoever wrote them, and all others are not."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ctrkit.batch_log import HEADER_BYTES, BatchLog, Half
from ctrkit.errors import Resumable


def vectors(number: int, rows: int = 3) -> Half:
    return np.random.default_rng(number).normal(size=(rows, 5)).astype(np.float16)


def write(folder: Path, *numbers: int) -> Path:
    """Write batches by a process of their own, so to speak; return its file."""
    with BatchLog(folder, 5, 0, 100) as log:
        for number in numbers:
            log.append(number, vectors(number), {"bad": {"1": "is broken"}} if number == 2 else {})
    return max(folder.glob("log-*"))


def missing(folder: Path, end: int = 6) -> list[int]:
    with BatchLog(folder, 5, 0, end) as log:
        return list(log.missing())


def test_batches_are_found_again_in_any_order_and_by_any_share(tmp_path: Path) -> None:
    write(tmp_path, 4, 0)
    write(tmp_path, 2)
    assert missing(tmp_path) == [1, 3, 5]
    with BatchLog(tmp_path, 5, 2, 5) as log:
        assert list(log.missing()) == [3]
        log.append(3, np.empty((0, 5), np.float16), {})
        for number in (4, 2):
            np.testing.assert_array_equal(log.read(number)[0], vectors(number))
        assert log.read(3)[0].shape == (0, 5)
        assert list(log.notes()) == [(2, {"bad": {"1": "is broken"}})]
        assert (log.rows, list(log.missing())) == (6, [])
    assert missing(tmp_path) == [1, 5]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_log_that_nothing_is_added_to_makes_no_file(tmp_path: Path) -> None:
    assert missing(tmp_path / "log") == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("left", [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 29])
def test_a_record_that_is_cut_off_is_not_there(tmp_path: Path, left: int) -> None:
    file = write(tmp_path, 0, 1, 2)
    whole = HEADER_BYTES + 3 * 5 * 2
    os.truncate(file, 2 * whole + left)
    assert missing(tmp_path) == [2, 3, 4, 5]
    os.truncate(file, whole + left)
    write(tmp_path, 1)
    assert missing(tmp_path) == [2, 3, 4, 5]


def test_a_record_that_never_reached_the_disk_hides_no_other(tmp_path: Path) -> None:
    file = write(tmp_path, 0, 1, 3)
    data = bytearray(file.read_bytes())
    data[HEADER_BYTES + 4 : HEADER_BYTES + 8] = bytes(4)  # of the first body, as after a failure of power
    file.write_bytes(data)
    assert missing(tmp_path) == [0, 2, 4, 5]
    second = len(data) // 3
    data[second + 20] ^= 1  # of the second header, so that nobody knows where the third is
    file.write_bytes(data)
    assert missing(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_what_is_damaged_later_is_told(tmp_path: Path) -> None:
    file = write(tmp_path, 0)
    with BatchLog(tmp_path, 5, 0, 1) as log:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(Resumable, match="damaged; run the same command again"):
            log.read(0)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BatchLog(tmp_path, 5, 0, 3) as log:
        log.append(0, vectors(0), {})
        real = os.write

        def write_some(fd: int, data: bytes) -> int:
            if len(data) < HEADER_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data[: HEADER_BYTES - 1])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_some)
            with pytest.raises(OSError, match="No space left"):
                log.append(1, vectors(1), {})
        assert list(log.missing()) == [1, 2]
        log.append(2, vectors(2), {})
        np.testing.assert_array_equal(log.read(2)[0], vectors(2))
    assert missing(tmp_path) == [1, 3, 4, 5]
