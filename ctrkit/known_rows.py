"""Rows of requests by their JSON, so that what was asked for lately is neither read nor looked up again.

The ads that a service scores come from a catalogue: each is a candidate of many requests, in the same words. They are
kept in arrays, as a processor keeps lines of memory: a row has four places, given by Python's 64-bit hash of its JSON,
which is keyed anew in each process. So another row is taken for one of the four with a probability of 2 · 10^-19, and
those of a request wait for memory together.
"""

import array
import json
import threading
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ctrkit.programs import LEAST
from ctrkit.row_indexer import IndexedRows, RowIndexer, Rows

WAYS = 4
VALUES = 16
"""Of a multi-hot feature; a row with more is not kept."""
LARGEST = 2**31
"""Nor is one with a larger index."""
EMPTY = np.uint64(2**64 - 1)
"""Marks a place where no row is: the one number that Python's `hash` never gives (−1)."""
Ints = npt.NDArray[np.int64]


class UnsureError(Exception):
    """A row has a key that the model does not know, or one twice."""


class NewRows:
    """Rows of one part of the requests to a model, of which none is kept: `KnownRows` without memory.

    Parameters: as of `KnownRows`.
    """

    def __init__(self, kind: Any, indexer: RowIndexer) -> None:
        self.kind, self._indexer = kind, indexer

    def read(self, rows: Rows) -> tuple[int, IndexedRows, int]:
        """Return how many keys rows have, what the model reads of them, and 0, of which none was known."""
        return sum(map(len, rows)), self._indexer.index(rows), 0


class KnownRows:
    """Rows of one part of the requests to a model. Threads may share it.

    Parameters
    ----------
    kind: msgspec's type of a row.
    indexer: of rows.
    most_bytes: memory for them; room for four rows at least.
    """

    kind = msgspec.Raw
    """msgspec's type of what `read` takes."""

    def __init__(self, kind: Any, indexer: RowIndexer, most_bytes: int) -> None:
        rows: Any = list
        self._decode = msgspec.json.Decoder(rows[kind]).decode
        self._indexer = indexer
        c, width = indexer.columns, 1 + indexer.columns + VALUES * indexer.lists
        self._of_index = slice(1, 1 + c)
        self._of_lists = [slice(begin, begin + VALUES) for begin in range(1 + c, width, VALUES)]
        bits = max(most_bytes // (WAYS * (8 + 4 * width)), 1).bit_length() - 1
        self._shift = np.uint64(63 - bits)
        self._hash_PW = np.full((1 << bits, WAYS), EMPTY)
        self._row_PWK = np.zeros((1 << bits, WAYS, width), np.int32)
        """Colons of the JSON; indexes; those of each multi-hot feature."""
        self._lock = threading.Lock()

    def read(self, texts: Iterable[msgspec.Raw]) -> tuple[int, IndexedRows, int]:
        """Return how many colons rows have, what the model reads of them, and how many were known.

        Raises msgspec.MsgspecError or UnicodeDecodeError where one is no row of the model, UnsureError where msgspec
        may have understood it otherwise than pydantic.
        """
        keys = list(map(bytes, texts))
        hash_N = np.asarray(array.array("q", map(hash, keys))).view(np.uint64)
        place_N = (hash_N >> np.uint64(1) >> self._shift).astype(np.int64)
        with self._lock:
            there_NW = self._hash_PW[place_N] == hash_N[:, None]
            row_NK = self._row_PWK[place_N, there_NW.argmax(1)].astype(np.int64)
        known_N = there_NW.any(1)
        if known_N.all():
            return int(row_NK[:, 0].sum()), self._rows(row_NK), len(keys)
        new_M = np.flatnonzero(~known_N)
        colons_M, rows = self._decoded([keys[i] for i in new_M])
        new = self._indexer.index(rows)
        fits_M = (new.index_NC < LARGEST).all(1)
        row_NK[new_M] = 0
        row_NK[new_M, 0] = colons_M
        row_NK[new_M, self._of_index] = new.index_NC
        for place, index_MV in zip(self._of_lists, new.lists, strict=True):
            some = index_MV[:, :VALUES]
            row_NK[new_M, place.start : place.start + some.shape[1]] = some
            fits_M &= ~index_MV[:, VALUES:].any(1) & (some < LARGEST).all(1)
        fits = new_M[fits_M]
        self._keep(place_N[fits], hash_N[fits], row_NK[fits])
        out = self._rows(row_NK)
        lists = [_in_place(*pair, new_M) for pair in zip(out.lists, new.lists, strict=True)]
        return int(row_NK[:, 0].sum()), IndexedRows(out.index_NC, lists), len(keys) - len(new_M)

    def _decoded(self, texts: list[bytes]) -> tuple[list[int], Rows]:
        """Return how many colons each row has, and its values."""
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

    def _keep(self, place_M: Ints, hash_M: npt.NDArray[np.uint64], row_MK: Ints) -> None:
        by_hash_M = (hash_M % np.uint64(WAYS)).astype(np.int64)
        with self._lock:
            for _ in range(WAYS):
                empty_MW = self._hash_PW[place_M] == EMPTY
                way_M = np.where(empty_MW.any(1), empty_MW.argmax(1), by_hash_M)
                self._hash_PW[place_M, way_M] = hash_M
                self._row_PWK[place_M, way_M] = row_MK
                lost_M = self._hash_PW[place_M, way_M] != hash_M  # to others that went to the same place
                if not lost_M.any():
                    break
                place_M, by_hash_M, hash_M, row_MK = (x[lost_M] for x in (place_M, by_hash_M, hash_M, row_MK))

    def _rows(self, row_NK: Ints) -> IndexedRows:
        return IndexedRows(row_NK[:, self._of_index], [_trimmed(row_NK[:, place]) for place in self._of_lists])


def _trimmed(index_NV: Ints) -> Ints:
    """Return lists without the last places, where all are filled up."""
    used = np.flatnonzero(index_NV.any(0))
    return index_NV[:, : max(LEAST, int(used[-1]) + 1 if len(used) else 0)]


def _in_place(index_NV: Ints, of_some_MV: Ints, some_M: npt.NDArray[np.intp]) -> Ints:
    """Return lists with others, which may be longer, in the place of some."""
    out = np.zeros((len(index_NV), max(index_NV.shape[1], of_some_MV.shape[1])), np.int64)
    out[:, : index_NV.shape[1]] = index_NV
    out[some_M, : of_some_MV.shape[1]] = of_some_MV
    return out
