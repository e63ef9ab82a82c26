"""Texts in temporary files, as many as there are: a list of them, and their sort."""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ctrkit.disk_tables import OpenFile, Table

AT_ONCE = 1 << 14
"""Texts that are in memory at a time."""
RUN = 1 << 16
"""Texts that are sorted in memory."""
LEAST_BLOCK = 16
"""Texts of a run that are read at a time while runs are merged."""


class Texts(Sequence[str]):
    """A list of texts that grows. What is no UTF-8 in a file's name survives.

    Parameters
    ----------
    texts: to begin with.
    folder: in whose file system the nameless files lie; None: that of temporary files.
    """

    def __init__(self, texts: Iterable[str] = (), folder: Path | None = None) -> None:
        self._file = OpenFile.nameless(folder)
        self._bytes = Table("<i8", folder)
        """Bytes before each text, and of all of them."""
        self._bytes.append(np.zeros(1, np.int64))
        self._end = 0
        self.extend(texts)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._bytes) - 1

    def extend(self, texts: Iterable[str]) -> None:
        """Add texts at the end."""
        for some in batched(texts, AT_ONCE):
            encoded = [text.encode("utf-8", "surrogatepass") for text in some]
            data = b"".join(encoded)
            self._file.write(data, self._end)
            self._bytes.append(self._end + np.cumsum([len(text) for text in encoded]))
            self._end += len(data)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        """Return one text, or those of a slice of neighbours."""
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            if step != 1:
                raise ValueError("only neighbours can be read")
            return self._read(begin, max(begin, end))
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self._read(at % len(self), at % len(self) + 1)[0]

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        return self.between(0, len(self), AT_ONCE)

    def between(self, begin: int, end: int, at_once: int) -> Iterator[str]:
        """Yield texts `begin` to `end` − 1."""
        for at in range(begin, end, at_once):
            yield from self._read(at, min(at + at_once, end))

    def _read(self, begin: int, end: int) -> list[str]:
        if begin == end:
            return []
        bounds = self._bytes.read(begin, end + 1).tolist()
        data = bytearray(bounds[-1] - bounds[0])
        self._file.read_into(memoryview(data), bounds[0])
        first = bounds[0]
        return [data[a - first : b - first].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(bounds)]


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the texts in lists of `size`, the last one shorter."""
    left = iter(texts)
    while some := list(itertools.islice(left, size)):
        yield some


def sorted_texts(texts: Iterable[str], folder: Path | None = None) -> Iterator[str]:
    """Yield texts in order of their characters' numbers, as `sorted` does; more than `RUN` through a temporary file."""
    batches = batched(texts, RUN)
    first = sorted(next(batches, []))
    second = next(batches, None)
    if second is None:
        yield from first
        return
    held = Texts(first, folder)
    del first
    ends = [len(held)]
    for some in itertools.chain([second], batches):
        held.extend(sorted(some))
        ends.append(len(held))
    second, some = [], []
    block = max(LEAST_BLOCK, RUN // len(ends))
    yield from heapq.merge(*(held.between(a, b, block) for a, b in itertools.pairwise([0, *ends])))
