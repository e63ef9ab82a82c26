"""Tables on disk: what was appended is read, sorts agree with those in memory, runs and groups that go on included."""

import os
from pathlib import Path

import numpy as np
import pytest

from ctrkit import disk_tables
from ctrkit.disk_tables import Sorter, Table, edges

RECORD = np.dtype([("key", "S3"), ("number", ">i8")])


def records(n: int, keys: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.zeros(n, RECORD)
    # Keys with zero bytes at their ends and bytes above 127, which a comparison of texts could get wrong.
    alphabet = np.array([b"\0\0\0", b"\0\0\1", b"a\0\0", b"a\0\xff", b"\xff\0\0", b"\x7f\xff\xff", b"\x80\0\0"], "S3")
    out["key"] = alphabet[rng.integers(0, keys, n)]
    out["number"] = rng.integers(0, 1 << 40, n)
    return out


def test_slices_and_single_records(tmp_path: Path) -> None:
    table = Table("<i8", tmp_path)
    table.append(np.arange(5))
    table.append(np.arange(5, 9))
    assert len(table) == 9
    assert table.read(3, 7).tolist() == [3, 4, 5, 6]
    assert table.read(7, 99).tolist() == [7, 8]
    assert table.read(9, 9).tolist() == []
    assert table.take(np.array([8, 0, 3])).tolist() == [8, 0, 3]
    assert table.take(np.array([2, 3, 4])).tolist() == [2, 3, 4]
    assert table.take(np.array([], np.int64)).tolist() == []
    assert os.listdir(tmp_path) == []  # nothing to clear away, however the process ends
    table.copy_to(tmp_path / "copy")
    assert Table.open("<i8", tmp_path / "copy").read(0, 9).tolist() == list(range(9))
    with pytest.raises(OSError, match="ends too early"):
        table.take(np.array([9, 1]))


@pytest.mark.parametrize("run", [7, 64, 1000])
@pytest.mark.parametrize("n", [0, 1, 64, 777])
def test_sort_is_that_of_memory(monkeypatch: pytest.MonkeyPatch, n: int, run: int) -> None:
    monkeypatch.setattr(disk_tables, "RUN", run)
    monkeypatch.setattr(disk_tables, "LEAST_BLOCK", 3)
    given = records(n, 7)
    sorter = Sorter(RECORD)
    for part in np.array_split(given, 5):
        sorter.add(part)
    assert len(sorter) == n
    found = list(sorter.sorted())
    wanted = sorted(given.tolist(), key=lambda r: (r[0].ljust(3, b"\0"), r[1]))
    assert [r for chunk in found for r in chunk.tolist()] == wanted
    assert all(len(chunk) <= 2 * run + 3 * n // run for chunk in found)


@pytest.mark.parametrize("run", [5, 1000])
def test_groups_go_on_from_chunk_to_chunk(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(disk_tables, "RUN", run)
    sorter = Sorter(RECORD)
    sorter.add(records(300, 4))
    before, seen = None, 0
    for chunk, first in edges(sorter.sorted(), "key"):
        for key, is_first in zip(chunk["key"].tolist(), first.tolist(), strict=True):
            assert is_first == (key != before)
            before, seen = key, seen + 1
    assert seen == 300


def test_a_table_of_zeros_is_written_in_any_order(tmp_path: Path) -> None:
    table = Table.zeros(9, "<i8", tmp_path)
    table.put(7, np.array([1, 2]))
    table.put(0, np.array([3]))
    assert table.read(0, 99).tolist() == [3, 0, 0, 0, 0, 0, 0, 1, 2]
    assert len(table) == 9
