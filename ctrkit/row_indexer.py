"""Rows of a request, its behaviours or its ads: raw values to indexes, and what the scene adds to them.

What a row is by itself does not change from request to request, so it may be kept (`ctrkit.known_rows`).
"""

import array
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit.programs import LEAST, lists_side_by_side
from ctrkit.raw_values import Indexer
from ctrkit.recipe import Feature
from ctrkit.serving_pictures import MISSING as NO_PICTURE
from ctrkit.serving_pictures import NONE, Pictures
from ctrkit.vocabulary import FIRST, MISSING, UNKNOWN

Ints = npt.NDArray[np.int64]
Rows = Sequence[Mapping[str, Any]]
Counts = dict[str, dict[str, int]]
"""Feature → how many of its values were `missing`, and how many `unknown`."""
ABSENT = -1
"""In the place of an index: the row does not have that feature of the scene, so that the scene's own counts."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Columns:
    """Rows of a request, feature by feature."""

    rows: int
    own: Mapping[str, Sequence[Any]]
    """Feature → the value of each row, or None; of features that some row has."""

    @classmethod
    def of(cls, rows: Rows) -> "Columns":
        """Return rows as columns: in one pass where all have the same keys."""
        first = rows[0] if rows else NOTHING
        if len(first) > 1 and {*map(len, rows)} == {len(first)}:
            try:
                values = zip(*map(operator.itemgetter(*first), rows), strict=True)
                return cls(len(rows), dict(zip(first, values, strict=True)))
            except KeyError:
                pass
        names = set().union(*rows)
        return cls(len(rows), {name: [row.get(name) for row in rows] for name in names})

    def column(self, name: str) -> Sequence[Any]:
        """Return each row's value, or None."""
        return self.own[name] if name in self.own else [None] * self.rows


@dataclass(frozen=True)
class IndexedRows:
    """Rows by themselves [N]."""

    index_NC: Ints
    """Of each one-hot feature, in the model's order; the last, where it looks at a picture, its row of features.h5."""
    lists: Sequence[Ints] = ()
    """Of each multi-hot feature [N, V], 2 values at least, filled up with 0; `ABSENT` in the first place."""
    vectors: Mapping[int, list[float]] = field(default_factory=dict)
    """Row → its picture, of those that are given as vectors."""

    def __len__(self) -> int:
        return len(self.index_NC)


@dataclass(frozen=True)
class Inputs:
    """Rows of a request as the programs take them [N]."""

    ids_NF: Ints
    lists: dict[str, Ints]
    """Multi-hot feature → [N, V], filled up with 0."""
    picture_N: Ints
    """Rows of features.h5; −1: none."""
    vectors: Mapping[int, list[float]]
    unknown: Counts


class RowIndexer:
    """Indexes rows of one part of the requests to a model. Threads may share it.

    Parameters
    ----------
    features: all of the recipe's, by name.
    ids, lists: the one-hot and multi-hot features that the model reads of a row.
    image: the picture that it looks at, or "".
    indexers: by feature.
    pictures: of `image`.
    """

    def __init__(
        self,
        features: Mapping[str, Feature],
        ids: Sequence[str],
        lists: Sequence[str],
        image: str,
        indexers: Mapping[str, Indexer],
        pictures: Pictures | None,
    ) -> None:
        self._ids, self._multi_hot, self._image = ids, lists, image
        self._indexers, self._pictures = indexers, pictures
        self._of_scene = {name for name in (*ids, *lists) if features[name].of == "scene"}
        self.columns, self.lists = len(ids) + bool(image), len(lists)
        """C, V."""
        absent = [ABSENT if name in self._of_scene else MISSING for name in ids] + [NO_PICTURE] * bool(image)
        self._absent_1C = np.array(absent, np.int64)[None]
        self.reads = bool(ids or lists or image)
        """Whether the model reads anything of a row."""

    def index(self, rows: Rows) -> IndexedRows:
        """Return rows by themselves."""
        n = len(rows)
        if not rows or not self.reads:
            return IndexedRows(np.zeros((n, self.columns), np.int64), [np.zeros((n, LEAST), np.int64)] * self.lists)
        of = Columns.of(rows)
        places, flat = [], list[int]()
        for place, name in enumerate(self._ids):
            if name in of.own:
                places.append(place)
                flat += self._index(name, of, rows)
        vectors: dict[int, list[float]] = {}
        if self._pictures is not None:
            pictures = of.column(self._image)
            if list in set(map(type, pictures)):
                vectors = {i: value for i, value in enumerate(pictures) if type(value) is list}
                pictures = [None if i in vectors else value for i, value in enumerate(pictures)]
            places.append(len(self._ids))
            flat += self._pictures.rows_of(pictures)
        index_NC = np.repeat(self._absent_1C, n, 0)
        index_NC[:, places] = np.asarray(array.array("q", flat)).reshape(-1, n).T
        return IndexedRows(index_NC, [self._index_lists(name, rows) for name in self._multi_hot], vectors)

    def inputs(self, rows: IndexedRows, scene: Mapping[str, Any] = NOTHING) -> Inputs:
        """Return what the programs take of rows. scene: values of those features of it that a row does not have
        itself."""
        f, unknown = len(self._ids), Counts()
        ids_NF = rows.index_NC[:, :f]
        if not self._of_scene.isdisjoint(self._ids):
            of_scene = [self._indexers[n].index(scene.get(n)) if n in self._of_scene else MISSING for n in self._ids]
            ids_NF = np.where(ids_NF == ABSENT, np.array(of_scene, np.int64), ids_NF)
        if ids_NF.size and ids_NF.min() < FIRST:
            missing_F, unknown_F = (ids_NF == MISSING).sum(0).tolist(), (ids_NF == UNKNOWN).sum(0).tolist()
            for name, missing, other in zip(self._ids, missing_F, unknown_F, strict=True):
                count(unknown, name, missing, other)
        lists = {}
        for name, index_NV in zip(self._multi_hot, rows.lists, strict=True):
            if name in self._of_scene:
                index_NV = self._with_scene(index_NV, self._indexers[name].many(scene.get(name)))
            count(unknown, name, int((index_NV[:, 0] == MISSING).sum()), int((index_NV == UNKNOWN).sum()))
            lists[name] = index_NV
        picture_N = np.zeros(0, np.int64)
        if self._image:
            picture_N = rows.index_NC[:, f]
            if picture_N.size and picture_N.min() < 0:
                missing = int((picture_N == NO_PICTURE).sum()) - len(rows.vectors)
                count(unknown, self._image, missing, int((picture_N == NONE).sum()))
            picture_N = np.maximum(picture_N, NONE)
        return Inputs(np.ascontiguousarray(ids_NF), lists, picture_N, rows.vectors, unknown)

    def _index(self, name: str, of: Columns, rows: Rows) -> list[int]:
        values = of.own[name]
        index = self._indexers[name].one(values)
        if name in self._of_scene and None in values:
            return [i if name in row else ABSENT for i, row in zip(index, rows, strict=True)]
        return index

    def _index_lists(self, name: str, rows: Rows) -> Ints:
        many, default = self._indexers[name].many, [ABSENT] if name in self._of_scene else []
        return lists_side_by_side([many(row[name]) if name in row else default for row in rows])

    def _with_scene(self, index_NV: Ints, of_scene: list[int]) -> Ints:
        """Return lists of rows, where they have their own, or else that of the scene."""
        absent_N = index_NV[:, 0] == ABSENT
        out = np.zeros((len(index_NV), max(index_NV.shape[1], len(of_scene))), np.int64)
        out[:, : index_NV.shape[1]] = index_NV
        out[absent_N] = 0
        out[absent_N, : len(of_scene)] = of_scene
        return out


def count(counts: Counts, name: str, missing: int, unknown: int) -> None:
    """Add what was missing and unknown of a feature, if anything was."""
    if missing or unknown:
        counts[name] = {kind: int(n) for kind, n in (("missing", missing), ("unknown", unknown)) if n}
