"""Rows of requests by their JSON, so that what was asked for lately is neither read nor looked up again.

The ads that a service scores come from a catalogue: each is a candidate of many requests, in the same words.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ctrkit.row_indexer import IndexedRow, Rows

Known = tuple[int, IndexedRow]
"""Colons in a row's JSON, and what the model reads of it."""
BESIDE = 300
"""Bytes that a row takes beside its JSON and its indexes, about: two tuples, headers, a place in a dictionary."""


class UnsureError(Exception):
    """A row has a key that the model does not know, or one twice."""


class NewRows:
    """Rows of one part of the requests to a model, of which none is kept: `KnownRows` without memory.

    Parameters: as of `KnownRows`.
    """

    def __init__(self, kind: Any, index: Callable[[Rows], Sequence[IndexedRow]]) -> None:
        self.kind, self._index = kind, index

    def read(self, rows: Rows) -> tuple[int, Sequence[IndexedRow], int]:
        """Return how many keys rows have, what the model reads of them, and 0, of which none was known."""
        return self.colons(rows), self._index(rows), 0

    def colons(self, rows: Rows) -> int:
        """Return how many keys rows have: their colons, but for those in texts."""
        return sum(map(len, rows))


class KnownRows:
    """Rows of one part of the requests to a model. Threads may share it.

    Kept are those that were asked for since half of the memory was last full, and those of the time before; of the
    latter who is asked for again stays.

    Parameters
    ----------
    kind: msgspec's type of a row.
    index: rows to what the model reads of them.
    most_bytes: memory for them.
    """

    kind = msgspec.Raw
    """msgspec's type of what `read` takes."""

    def __init__(self, kind: Any, index: Callable[[Rows], Sequence[IndexedRow]], most_bytes: int) -> None:
        rows: Any = list
        self._decode = msgspec.json.Decoder(rows[kind]).decode
        self._index, self._most_bytes = index, most_bytes
        self._lately: dict[bytes, Known] = {}
        self._before: dict[bytes, Known] = {}
        self._bytes = 0
        """Of `_lately`."""

    def read(self, texts: Iterable[msgspec.Raw]) -> tuple[int, list[IndexedRow], int]:
        """Return how many colons rows have, what the model reads of them, and how many were known.

        Raises msgspec.MsgspecError or UnicodeDecodeError where one is no row of the model, UnsureError where msgspec
        may have understood it otherwise than pydantic.
        """
        keys = list(map(bytes, texts))
        found = list(map(self._lately.get, keys))
        known = len(found)
        if None in found:
            before = self._before
            missed = dict.fromkeys([key for key, one in zip(keys, found, strict=True) if one is None])
            unknown = [key for key in missed if key not in before]
            known -= len(unknown)
            new = dict(zip(unknown, self._read(unknown), strict=True))
            new |= {key: before[key] for key in missed if key in before}
            self._keep(new)
            found = [one or new[key] for key, one in zip(keys, found, strict=True)]
        return sum([one[0] for one in found if one]), [one[1] for one in found if one], known

    def colons(self, texts: Iterable[msgspec.Raw]) -> int:
        """Return how many colons rows have, which are looked at no further. Raises as `read` does."""
        return sum(self._checked(list(map(bytes, texts)))[0])

    def _read(self, texts: list[bytes]) -> list[Known]:
        colons, rows = self._checked(texts)
        return list(zip(colons, self._index(rows), strict=True))

    def _checked(self, texts: list[bytes]) -> tuple[list[int], Rows]:
        joined = b",".join(texts)
        rows = self._decode(b"[%s]" % joined)
        colons = list(map(len, rows))
        # A colon for each key, and perhaps others in texts.
        if joined.count(b":") != sum(colons):
            for text, row in zip(texts, rows, strict=True):
                if json.loads(text, object_pairs_hook=len) != len(row):
                    raise UnsureError
            colons = [text.count(b":") for text in texts]
        return colons, rows

    def _keep(self, new: dict[bytes, Known]) -> None:
        self._lately.update(new)
        self._bytes += sum(map(len, new)) + sum([_bytes(row) for _, row in new.values()])
        if self._bytes > self._most_bytes // 2:
            self._before, self._lately, self._bytes = self._lately, {}, 0


def _bytes(row: IndexedRow) -> int:
    index, lists, _ = row
    return BESIDE + len(index) + (sum(64 + 8 * len(one or ()) for one in lists) if lists else 0)
