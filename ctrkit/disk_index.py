"""Texts → numbers, for more texts than memory holds: a table on disk, sorted by a digest of the text."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ctrkit.disk_tables import Records, Sorter, Table, edges

KEY = np.dtype("S16")
ENTRY = np.dtype([("key", KEY), ("number", ">i8")])
NOWHERE = (1 << 62) - 1
"""The number of a text that is not there; larger than all others."""
BLOCK = 64
"""Entries that are looked at together."""


def keys(texts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return digests of texts, [n] of 16 bytes."""
    digest = xxhash.xxh3_128_digest
    return np.array([digest(text.encode("utf-8", "surrogatepass")) for text in texts], KEY)


class DiskIndex:
    """Add all texts, then `finish`, then look them up.

    Parameters
    ----------
    folder: in whose file system the nameless files lie.
    last: of a text that is added with several numbers the largest counts; otherwise the smallest.
    """

    def __init__(self, folder: Path | None, *, last: bool) -> None:
        self._sorter: Sorter | None = Sorter(ENTRY, folder)
        self._last = last
        self._table = Table(ENTRY, folder)

    def add(self, texts: Iterable[str], numbers: npt.NDArray[np.int64]) -> None:
        """Add texts with their numbers, 0 ≤ number < NOWHERE."""
        assert self._sorter is not None
        found = keys(texts)
        entries = np.empty(len(found), ENTRY)
        entries["key"], entries["number"] = found, NOWHERE - numbers if self._last else numbers
        self._sorter.add(entries)

    def finish(self, repeated: Callable[[npt.NDArray[np.int64]], None] = lambda numbers: None) -> None:
        """Sort. repeated: told the numbers of texts that are there with a smaller number too."""
        assert self._sorter is not None
        before = NOWHERE
        for entries, first in edges(self._sorter.sorted(), "key"):
            number = entries["number"].astype(np.int64)
            if self._last:
                # Sorted from the largest: what another of its key follows has a smaller one beside it.
                entries["number"] = number = NOWHERE - number
                repeated(np.append(before, number[:-1])[~first])
                before = int(number[-1])
            else:
                repeated(number[~first])
            self._table.append(entries[first])
        self._sorter = None

    def __len__(self) -> int:
        """Return the number of different texts."""
        return len(self._table)

    def find(self, text: str) -> int:
        """Return the number of a text, or NOWHERE. Digests are spread evenly, so a few reads find one."""
        key = keys([text])
        wanted = _first_bytes(key)[0]
        low, high = 0, len(self._table)
        least, most = 0, 1 << 64
        while low < high:
            guess = low + (wanted - least) * (high - low) // max(1, most - least)
            begin = min(max(low, guess - BLOCK // 2), max(low, high - BLOCK))
            block = self._table.read(begin, min(begin + BLOCK, high))
            at = int(np.searchsorted(block["key"], key)[0])
            if at < len(block) and (block["key"][at : at + 1] == key).all():
                return int(block["number"][at])
            if 0 < at < len(block):
                return NOWHERE
            ends = _first_bytes(block["key"][[0, -1]])
            if at == 0:
                high, most = begin, ends[0]
            else:
                low, least = begin + len(block), ends[1]
        return NOWHERE

    def join(self, chunks: Iterable[Records]) -> Iterator[tuple[Records, npt.NDArray[np.int64]]]:
        """Yield chunks of records sorted by `key`, and for each record the number of its text, or NOWHERE."""
        entries = self._table.chunks()
        block = next(entries, None)
        for chunk in chunks:
            wanted = chunk["key"]
            number = np.full(len(chunk), NOWHERE, np.int64)
            done = 0
            while done < len(chunk) and block is not None:
                upto = int(np.searchsorted(wanted, block["key"][-1:], side="right")[0])
                if upto > done:
                    at = np.minimum(np.searchsorted(block["key"], wanted[done:upto]), len(block) - 1)
                    there = block["key"][at] == wanted[done:upto]
                    number[done:upto][there] = block["number"][at[there]]
                    done = upto
                if done < len(chunk):
                    block = next(entries, None)
            yield chunk, number


def _first_bytes(key: npt.NDArray[np.bytes_]) -> list[int]:
    """Return the first 8 bytes of digests as numbers."""
    numbers: list[int] = np.ascontiguousarray(key).view(">u8").reshape(-1, 2)[:, 0].tolist()
    return numbers
