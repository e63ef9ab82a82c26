"""Rows of many chunks sorted into partitions through one temporary file.

Chunks may come from several threads in any order. A partition's rows come back in the order of the chunks' numbers and,
within a chunk, as they were.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, ...]


class Scratch:
    """A temporary file that threads append arrays to and read slices from."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._end = 0
        self._lock = threading.Lock()

    def append(self, values: NDArray[Any]) -> int:
        """Write an array; return the offset of its first byte."""
        data = _bytes(np.ascontiguousarray(values))
        with self._lock:
            begin = self._end
            self._end += len(data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], begin + done)
        return begin

    def read_into(self, out: NDArray[Any], offset: int) -> None:
        """Fill an array from the bytes at an offset."""
        data = _bytes(out)
        done = 0
        while done < len(data):
            got = os.preadv(self._file, [data[done:]], offset + done)
            if got == 0:
                raise OSError("a temporary file ends too early")
            done += got

    def close(self) -> None:
        os.close(self._file)


def _bytes(values: NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array."""
    return memoryview(values.reshape(-1).view(np.uint8).data)


class Exchange:
    """Columns of numbers, by partition.

    Parameters
    ----------
    path: of the temporary file.
    partitions: how many, at most 65,536.
    dtypes: of the columns.
    """

    def __init__(self, path: Path, partitions: int, dtypes: Sequence[Any]) -> None:
        self.partitions, self.dtypes = partitions, [np.dtype(d) for d in dtypes]
        self._scratch = Scratch(path)
        self._chunks: dict[Place, tuple[list[int], NDArray[np.int64]]] = {}

    def add(self, place: Place, partition: NDArray[np.uint16], columns: Sequence[NDArray[Any]]) -> None:
        """Add a chunk: its place in the order, each row's partition [n], and the columns [n]."""
        order = np.argsort(partition, kind="stable")  # of 16 bits, so numpy takes a radix sort
        starts = np.zeros(self.partitions + 1, np.int64)
        np.cumsum(np.bincount(partition, minlength=self.partitions), out=starts[1:])
        offsets = [
            self._scratch.append(c.astype(d, copy=False)[order]) for c, d in zip(columns, self.dtypes, strict=True)
        ]
        self._chunks[place] = offsets, starts

    def rows(self, partition: int) -> int:
        """Return how many rows a partition has."""
        return sum(self._size(place, partition) for place in self._chunks)

    def read(self, partition: int) -> list[NDArray[Any]]:
        """Return the columns of a partition."""
        return self._read(partition, sorted(self._chunks))

    def pieces(self, partition: int, rows: int) -> Iterator[list[NDArray[Any]]]:
        """Yield the columns of a partition in pieces of about so many rows, or of one chunk."""
        places: list[Place] = []
        for place in sorted(self._chunks):
            if places and sum(self._size(p, partition) for p in [*places, place]) > rows:
                yield self._read(partition, places)
                places = []
            places.append(place)
        yield self._read(partition, places)

    def _size(self, place: Place, partition: int) -> int:
        starts = self._chunks[place][1]
        return int(starts[partition + 1] - starts[partition])

    def _read(self, partition: int, places: Sequence[Place]) -> list[NDArray[Any]]:
        ends = np.cumsum([0, *(self._size(place, partition) for place in places)])
        out = [np.empty(ends[-1], d) for d in self.dtypes]
        for place, begin, end in zip(places, ends[:-1], ends[1:], strict=True):
            offsets, starts = self._chunks[place]
            for values, offset in zip(out, offsets, strict=True):
                at = offset + int(starts[partition]) * values.itemsize
                self._scratch.read_into(values[begin:end], at)
        return out

    def close(self) -> None:
        self._scratch.close()
