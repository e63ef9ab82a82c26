"""Pictures of requests, by name or as vectors: what an exported model makes of each of them alone.

A picture of features.h5 goes through the extractor when it is first asked for, and never again: what comes out is a
dozen numbers, and stays in memory.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.features import FeatureStore
from ctrkit.known_texts import Known, finder
from ctrkit.programs import Arrays, Programs
from ctrkit.raw_values import TEXTS, as_text_of

Ints = npt.NDArray[np.int64]
NONE = -1
"""The row of a picture that has no vector."""
MISSING = -2
"""The row where no picture is named."""


class Names:
    """Names of pictures to rows of features.h5."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    @cached_property
    def known(self) -> Known:
        """Names → rows; `NONE` for a picture that has none."""
        known = self.store.pictures.filter(pl.col("row") >= 0)
        return finder(known["image"].to_list(), known["row"].to_list(), NONE)


class Pictures:
    """What `ad_pictures` or `user_pictures` makes of pictures.

    Parameters
    ----------
    programs: of the exported model.
    name: which of the two.
    names: where names are looked up; None: there are none.
    width: numbers of a picture vector, W.
    """

    def __init__(self, programs: Programs, name: str, names: Names | None, width: int) -> None:
        self._programs, self._name, self._names, self._width = programs, name, names, width
        self._keeps = programs.outputs(name) == ["extracted"]
        self._lock = threading.Lock()
        if self._keeps:
            rows = names.store.rows if names is not None else 0
            missing = self._run(np.zeros((1, width), np.float32), np.zeros(1, np.bool_))["extracted"]
            self._kept = np.zeros((rows + 1, missing.shape[1]), np.float32)
            """[rows + 1, D], the last for those without a vector."""
            self._kept[NONE] = missing
            self._known = np.zeros(rows + 1, np.bool_)
            self._known[NONE] = True

    def rows_of(self, values: Sequence[Any]) -> list[int]:
        """Return the row of features.h5 of each picture, a name or None: `NONE` where it has no vector, or is not
        there, `MISSING` where there is no name."""
        texts = values if TEXTS.issuperset(map(type, values)) else [as_text_of(value) for value in values]
        rows = self._names.known.numbers(texts) if self._names is not None else [NONE] * len(texts)
        if NONE in rows:
            return [row if text else MISSING for row, text in zip(rows, texts, strict=True)]
        return rows

    def of(self, rows: Ints, vectors: Mapping[int, Sequence[float]]) -> Arrays:
        """Return what the program makes of rows of features.h5 [N]; −1: no vector; and of vectors in the place of
        some."""
        if not vectors:
            return self.of_rows(rows)
        vectors_NW, there = self._read(rows), rows >= 0
        for i, vector in vectors.items():
            vectors_NW[i], there[i] = vector, True
        return self._run(vectors_NW, there)

    def of_rows(self, rows: Ints) -> Arrays:
        """Return what the program makes of rows of features.h5 [N]; −1: no vector. Threads may share it."""
        if not self._keeps:
            return self._run(self._read(rows), rows >= 0)
        if not self._known[rows].all():
            with self._lock:
                new = np.unique(rows[~self._known[rows]])
                if len(new):
                    self._kept[new] = self._run(self._read(new), np.ones(len(new), np.bool_))["extracted"]
                    self._known[new] = True
        return {"extracted": self._kept[rows]}

    def _read(self, rows: Ints) -> npt.NDArray[np.float32]:
        if self._names is None or not len(rows):
            return np.zeros((len(rows), self._width), np.float32)
        return self._names.store.read(rows)

    def _run(self, vectors_NW: npt.NDArray[np.float32], there_N: npt.NDArray[np.bool_]) -> Arrays:
        return self._programs.pictures(self._name, vectors_NW, there_N)
