"""Rows of a request, its behaviours or its ads: each by itself to indexes, and many of them side by side.

What a row is by itself does not change from request to request, so it may be kept (`ctrkit.known_rows`).
"""

import array
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit.raw_values import Indexer
from ctrkit.recipe import Feature
from ctrkit.serving_pictures import MISSING as NO_PICTURE
from ctrkit.serving_pictures import NONE, Pictures
from ctrkit.vocabulary import FIRST, MISSING, UNKNOWN

Ints = npt.NDArray[np.int64]
Rows = Sequence[Mapping[str, Any]]
Counts = dict[str, dict[str, int]]
"""Feature → how many of its values were `missing`, and how many `unknown`."""
IndexedRow = tuple[bytes, tuple[Sequence[int] | None, ...], list[float] | None]
"""What a model reads of a row: the indexes of its features, int64, the last the picture's row of features.h5 where it
looks at one; those of each multi-hot feature; the picture, where it is given as a vector. `ABSENT` or None: the row
does not have that feature of the scene."""
ABSENT = -1
NOTHING: Mapping[str, Any] = MappingProxyType({})
WIDTH = np.dtype(np.int64).itemsize


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
class SideBySide:
    """Indexed rows of a request [N]."""

    ids_NF: Ints
    lists: dict[str, list[Sequence[int]]]
    """Multi-hot feature → the indexes of each row."""
    picture_N: Ints
    """Rows of features.h5; −1: none."""
    vectors: dict[int, list[float]]
    """Row → its picture's vector, of those that are given so."""
    unknown: Counts = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids_NF)


class RowIndexer:
    """Indexes rows of one part of the requests to a model. Threads may share it.

    Parameters
    ----------
    features: all of the recipe's, by name.
    ids, lists: the one-hot and multi-hot features that the model reads of a row, F and V of them.
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
        self._ids, self._lists, self._image = ids, lists, image
        self._indexers, self._pictures = indexers, pictures
        self._of_scene = {name for name in (*ids, *lists) if features[name].of == "scene"}
        self._columns = len(ids) + bool(image)
        absent = [ABSENT if name in self._of_scene else MISSING for name in ids] + [NO_PICTURE] * bool(image)
        self._absent_F1 = np.array(absent, np.int64)[:, None]
        self.reads = bool(ids or lists or image)
        """Whether the model reads anything of a row."""

    def index(self, rows: Rows) -> list[IndexedRow]:
        """Return each row by itself."""
        if not rows or not self.reads:
            return [(b"", (), None)] * len(rows)
        of = Columns.of(rows)
        places, flat = [], list[int]()
        for place, name in enumerate(self._ids):
            if name in of.own:
                places.append(place)
                flat += self._index(name, of, rows)
        vectors: Sequence[list[float] | None] = [None] * len(rows)
        if self._pictures is not None:
            pictures = of.column(self._image)
            if list in set(map(type, pictures)):
                vectors = [value if type(value) is list else None for value in pictures]
                pictures = [None if type(value) is list else value for value in pictures]
            places.append(len(self._ids))
            flat += self._pictures.rows_of(pictures)
        index_FN = np.repeat(self._absent_F1, len(rows), 1)
        index_FN[places] = np.asarray(array.array("q", flat)).reshape(-1, len(rows))
        data, width = index_FN.T.tobytes(), WIDTH * self._columns
        indexes = [data[i * width : (i + 1) * width] for i in range(len(rows))]
        lists: Any = itertools.repeat((), len(rows))
        if self._lists:
            lists = zip(*[self._index_lists(name, of, rows) for name in self._lists], strict=True)
        return list(zip(indexes, lists, vectors, strict=True))

    def side_by_side(self, rows: Sequence[IndexedRow], scene: Mapping[str, Any] = NOTHING) -> SideBySide:
        """Return indexed rows as arrays. scene: values of those features of it that a row does not have itself."""
        f, unknown = len(self._ids), Counts()
        index_NC = np.frombuffer(bytearray().join([row[0] for row in rows]), np.int64).reshape(len(rows), self._columns)
        ids_NF = index_NC[:, :f]
        if not self._of_scene.isdisjoint(self._ids):
            of_scene = [self._indexers[n].index(scene.get(n)) if n in self._of_scene else MISSING for n in self._ids]
            ids_NF = np.where(ids_NF == ABSENT, np.array(of_scene, np.int64), ids_NF)
        if ids_NF.size and ids_NF.min() < FIRST:
            missing_F, unknown_F = (ids_NF == MISSING).sum(0).tolist(), (ids_NF == UNKNOWN).sum(0).tolist()
            for name, missing, other in zip(self._ids, missing_F, unknown_F, strict=True):
                count(unknown, name, missing, other)
        lists = {}
        for place, name in enumerate(self._lists):
            found = [row[1][place] for row in rows]
            default = self._indexers[name].many(scene.get(name)) if name in self._of_scene else []
            lists[name] = some = [default if one is None else one for one in found]
            count(unknown, name, sum(not one for one in some), sum(one.count(UNKNOWN) for one in some))
        vectors: dict[int, list[float]] = {}
        picture_N = np.zeros(0, np.int64)
        if self._image:
            vectors = {i: row[2] for i, row in enumerate(rows) if row[2] is not None}
            picture_N = index_NC[:, f]
            if picture_N.size and picture_N.min() < 0:
                missing = int((picture_N == NO_PICTURE).sum()) - len(vectors)
                count(unknown, self._image, missing, int((picture_N == NONE).sum()))
            picture_N = np.maximum(picture_N, NONE)
        return SideBySide(np.ascontiguousarray(ids_NF), lists, picture_N, vectors, unknown)

    def _index(self, name: str, of: Columns, rows: Rows) -> list[int]:
        values = of.own[name]
        index = self._indexers[name].one(values)
        if name in self._of_scene and None in values:
            return [i if name in row else ABSENT for i, row in zip(index, rows, strict=True)]
        return index

    def _index_lists(self, name: str, of: Columns, rows: Rows) -> list[Sequence[int] | None]:
        many = self._indexers[name].many
        if name in self._of_scene:
            return [tuple(many(row[name])) if name in row else None for row in rows]
        return [tuple(many(value)) for value in of.column(name)]


def count(counts: Counts, name: str, missing: int, unknown: int) -> None:
    """Add what was missing and unknown of a feature, if anything was."""
    if missing or unknown:
        counts[name] = {kind: int(n) for kind, n in (("missing", missing), ("unknown", unknown)) if n}
