"""Tables of fixed-width records in nameless temporary files: what is too long for memory, appended, sliced and sorted.

Such a file is gone when its process is, however that ends. Slices are read, not mapped, so that a process holds what it
asked for and no more.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]
"""[n], structured or plain."""

RUN = 1 << 17
"""Records that are sorted in memory, and read at a time."""
LEAST_BLOCK = 64
"""Records of a run that are read at a time while runs are merged."""


class OpenFile:
    """An open file, closed when nothing uses it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def nameless(cls, folder: Path | None) -> "OpenFile":
        """Return a new file without a name."""
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return cls(os.dup(file.fileno()))

    def __del__(self) -> None:
        os.close(self.fd)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of it, or raise OSError."""
        left = memoryview(data)
        while left:
            done = os.pwrite(self.fd, left, offset)
            left, offset = left[done:], offset + done

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill `data` from an offset."""
        while data:
            got = os.preadv(self.fd, [data], offset)
            if not got:
                raise OSError("a temporary file ends too early")
            data, offset = data[got:], offset + got


class Table:
    """Records in a file; any thread may read slices of it.

    Parameters
    ----------
    dtype: of a record.
    folder: in whose file system the nameless file lies; None: that of temporary files.
    """

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._file = OpenFile.nameless(folder)
        self._length = 0

    @classmethod
    def open(cls, dtype: Any, path: Path) -> "Table":
        """Return the table that lies in a file."""
        table = cls.__new__(cls)
        table.dtype, table._file = np.dtype(dtype), OpenFile(os.open(path, os.O_RDONLY))
        table._length = os.fstat(table._file.fd).st_size // table.dtype.itemsize
        return table

    @classmethod
    def zeros(cls, length: int, dtype: Any, folder: Path | None = None) -> "Table":
        """Return a table of zeros, which take no room on the disk."""
        table = cls(dtype, folder)
        os.ftruncate(table._file.fd, length * table.dtype.itemsize)
        table._length = length
        return table

    def __len__(self) -> int:
        """Return the number of records."""
        return self._length

    def put(self, at: int, records: Records) -> None:
        """Write over records `at` and following, which are there."""
        assert 0 <= at <= at + len(records) <= self._length
        records = np.ascontiguousarray(records, self.dtype)
        self._file.write(records.view(np.uint8).data, at * self.dtype.itemsize)

    def append(self, records: Records) -> None:
        """Add records at the end."""
        records = np.ascontiguousarray(records, self.dtype)
        self._file.write(records.view(np.uint8).data, self._length * self.dtype.itemsize)
        self._length += len(records)

    def read(self, begin: int, end: int) -> Records:
        """Return records `begin` to `end` − 1, as far as they are there."""
        out = np.empty(max(0, min(end, self._length) - begin), self.dtype)
        self._file.read_into(out.view(np.uint8).data, begin * self.dtype.itemsize)
        return out

    def take(self, rows: npt.NDArray[np.int64]) -> Records:
        """Return the records of some rows, in their order."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self.read(int(rows[0]), int(rows[-1]) + 1)
        out = np.empty(len(rows), self.dtype)
        size, data = self.dtype.itemsize, out.view(np.uint8).data
        for at, row in enumerate(rows.tolist()):
            self._file.read_into(data[at * size : (at + 1) * size], row * size)
        return out

    def chunks(self, begin: int = 0, end: int | None = None) -> Iterator[Records]:
        """Yield the records in order, some at a time."""
        end = self._length if end is None else end
        for at in range(begin, end, RUN):
            yield self.read(at, min(at + RUN, end))

    def copy_to(self, path: Path) -> None:
        """Write the records to a file of that name, for `open`."""
        with open(path, "wb") as f:
            for chunk in self.chunks():
                f.write(chunk.tobytes())


class Sorter:
    """An external merge sort, by all bytes of the records: their fields are texts of one length or big-endian numbers
    that are not negative, the first one counting most.

    Parameters
    ----------
    dtype: of a record.
    folder: where the runs lie, once there are more records than are sorted in memory.
    """

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype, self._folder = np.dtype(dtype), folder
        self._waiting: list[Records] = []
        self._held = 0
        self._table: Table | None = None

    def __len__(self) -> int:
        """Return the number of records."""
        return self._held + (len(self._table) if self._table else 0)

    def add(self, records: Records) -> None:
        """Add records, in any order."""
        for begin in range(0, len(records), RUN):
            part = records[begin : begin + RUN]
            if self._held + len(part) > RUN:
                self._flush()
            self._waiting.append(_keys(np.array(part, self.dtype)))
            self._held += len(part)

    def sorted(self) -> Iterator[Records]:
        """Yield all records in order, some at a time. Nothing may be added any more."""
        if self._table is None:
            if self._held:
                yield self._run()
            return
        self._flush()
        ends = [*self._ends, len(self._table)]
        spans = [(self._table, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        yield from merge(spans)

    def _run(self) -> Records:
        run = np.concatenate(self._waiting)  # of texts: of records it would turn the numbers' bytes round
        run.sort(kind="stable")
        self._waiting, self._held = [], 0
        return run.view(self.dtype)

    def _flush(self) -> None:
        if not self._held:
            return
        if self._table is None:
            self._table = Table(self.dtype, self._folder)
            self._ends: list[int] = []
        else:
            self._ends.append(len(self._table))
        self._table.append(self._run())


def merge(runs: Sequence[tuple[Table, int, int]]) -> Iterator[Records]:
    """Yield the records of sorted runs, (table, begin, end) each, in order, some at a time."""
    if len(runs) == 1:
        yield from runs[0][0].chunks(*runs[0][1:])
        return
    block = max(LEAST_BLOCK, RUN // max(1, len(runs)))
    at = [begin for _, begin, _ in runs]
    heads = [_keys(table.read(0, 0)) for table, _, _ in runs]
    while True:
        for i, (table, _, end) in enumerate(runs):
            if len(heads[i]) < block and at[i] < end:
                upto = min(at[i] + block, end)
                heads[i] = np.concatenate([heads[i], _keys(table.read(at[i], upto))])
                at[i] = upto
        if not any(len(head) for head in heads):
            return
        # What is not above the end of any unfinished head comes before all that has not been read.
        lasts = [head[-1:] for head, upto, (_, _, end) in zip(heads, at, runs, strict=True) if upto < end]
        bound = np.sort(np.concatenate(lasts))[:1] if lasts else None
        cuts = [len(h) if bound is None else int(np.searchsorted(h, bound, side="right")[0]) for h in heads]
        merged = np.concatenate([head[:cut] for head, cut in zip(heads, cuts, strict=True)])
        heads = [head[cut:] for head, cut in zip(heads, cuts, strict=True)]
        merged.sort(kind="stable")
        yield merged.view(runs[0][0].dtype)


def _keys(records: Records) -> Records:
    """Return records as texts of their bytes."""
    return records.view(f"S{records.dtype.itemsize}")


def edges(chunks: Iterable[Records], field: str) -> Iterator[tuple[Records, npt.NDArray[np.bool_]]]:
    """Yield sorted chunks, and which records are the first with their value of a field."""
    before: Records | None = None
    for chunk in chunks:
        value = chunk[field]
        first = np.ones(len(chunk), np.bool_)
        first[1:] = value[1:] != value[:-1]
        if before is not None:
            first[0] = bool((value[:1] != before).all())
        before = value[-1:].copy()
        yield chunk, first
