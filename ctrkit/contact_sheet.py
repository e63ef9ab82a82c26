"""The contact sheet: some pictures, and beside each those whose vectors are most like its own.

Shape letters: N searched rows of features.h5, Q queries, W width of a vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.features import FeatureStore
from ctrkit.gallery import Thumbnails

SEARCHED = 20_000
"""Pictures that are searched at most: those that training shows most."""
SAME = 0.9999
"""Cosine above which two pictures count as one: the same content, saved anew."""
PART_BYTES = 16 << 20
"""Of the vectors that are in memory at a time."""
PART_IDS = 1 << 18
"""Picture ids of features.h5 that are in memory at a time."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A picture, and the cosine of its vector with the query's."""

    image: str
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Query:
    """A picture, and those most like it, nearest first."""

    image: str
    count: int
    """Times that training shows it."""
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class ContactSheet:
    """The contact sheet, ready to show."""

    queries: Sequence[Query]
    searched: int
    """Distinct pictures that were compared."""
    rows: int
    """Distinct pictures in features.h5."""
    thumbnails: Thumbnails


@np.errstate(invalid="ignore")  # of vectors that are not finite, which are never shown
def make_sheet(
    features: Path, convert: Path, thumbnails: Thumbnails, *, queries: int, neighbours: int, seed: int
) -> ContactSheet:
    """Draw queries, more likely the more often training shows them, and find the pictures most like each.

    Vectors are compared as models see them, less the mean over training pictures. Where features.h5 holds more
    than `SEARCHED` pictures, those that training shows most are all that is searched, and the mean is theirs. Of
    pictures more alike than `SAME` one is shown; those that cannot be read are left out.
    """
    searched = most_used(features, convert, SEARCHED)
    image, count = searched["image"].to_list(), searched["count"].to_numpy()
    vectors = Centred(FeatureStore(features), searched["row"].to_numpy(), count > 0)
    chosen: list[int] = []
    for n in _draw(count, seed):
        if len(chosen) == queries:
            break
        if vectors.of([n]).any() and not vectors.same(n, chosen) and thumbnails.uri(image[n]):
            chosen.append(n)
    found = []
    for n, cosine_N in zip(chosen, vectors.cosines(chosen), strict=True):
        near: list[int] = []
        for other in np.argsort(-cosine_N, kind="stable").tolist():
            if len(near) == neighbours:
                break
            if not vectors.same(other, [n, *near]) and thumbnails.uri(image[other]):
                near.append(other)
        alike = tuple(Neighbour(image=image[k], similarity=float(cosine_N[k])) for k in near)
        found.append(Query(image=image[n], count=int(count[n]), neighbours=alike))
    return ContactSheet(queries=found, searched=len(image), rows=vectors.store.rows, thumbnails=thumbnails)


def most_used(features: Path, convert: Path, limit: int) -> pl.DataFrame:
    """Return the rows of the pictures that training shows most, at most `limit`, in the order of features.h5.

    `row` Int64; `image` String, the most used of the row's pictures; `count` UInt64, that of all of them.
    """
    vocabulary = pl.scan_parquet(convert / "vocab" / "image.parquet", glob=False)
    first = vocabulary.top_k(limit, by=["count", "index"], reverse=[False, True]).rename({"value": "image"})
    top = first.collect(engine="streaming")
    with h5py.File(features) as h5:
        found = [top.join(part, on="image") for part in _places(h5)]
    return (
        pl.concat([top.clear().with_columns(row=pl.lit(0, pl.Int64)), *found])
        .sort(["count", "index"], descending=[True, False])
        .group_by("row", maintain_order=True)
        .agg(pl.col("image").first(), pl.col("count").sum())
        .sort("row")
    )


def _places(h5: h5py.File) -> Iterator[pl.DataFrame]:
    """Yield the `image` and `row` of all pictures that have a vector, some at a time."""
    for start in range(0, len(h5["row"]), PART_IDS):
        part = slice(start, start + PART_IDS)
        frame = {"image": h5["image"].asstr()[part], "row": h5["row"][part]}
        yield pl.DataFrame(frame, schema={"image": pl.String, "row": pl.Int64}).filter(pl.col("row") >= 0)


def _draw(count: npt.NDArray[np.uint64], seed: int) -> list[int]:
    """Return the places of all pictures that training shows, in a random order: the larger the count, the earlier."""
    used = np.flatnonzero(count)
    # The first of exponential waiting times with these rates: a draw by count, without replacement.
    waiting = np.random.default_rng(seed).exponential(size=len(used)) / count[used]
    places: list[int] = used[np.argsort(waiting, kind="stable")].tolist()
    return places


class Centred:
    """Vectors of some rows of a features.h5 less their mean, of length 1; read when they are asked for.

    Parameters
    ----------
    store: the file.
    row_N: the rows; a place is an index into them.
    training_N: which of them the mean is of.
    """

    def __init__(self, store: FeatureStore, row_N: Ints, training_N: npt.NDArray[np.bool_]) -> None:
        self.store, self.row_N = store, row_N
        self.part = max(1, PART_BYTES // (8 * max(1, store.width)))
        training = np.flatnonzero(training_N)
        self.mean_W = np.zeros(store.width)
        for places in self._parts(training):
            self.mean_W += store.read(row_N[places]).astype(np.float64).sum(0) / len(training)

    def _parts(self, places: Ints) -> Iterator[Ints]:
        for start in range(0, len(places), self.part):
            yield places[start : start + self.part]

    def of(self, places: Sequence[int] | Ints) -> Floats:
        """Return [places, W]; zero where a vector is the mean, or not finite."""
        x = self.store.read(self.row_N[np.asarray(places, np.int64)]).astype(np.float64) - self.mean_W
        norm = np.sqrt((x * x).sum(1, keepdims=True))
        unit: Floats = np.divide(x, norm, out=np.zeros_like(x), where=(norm > 0) & np.isfinite(norm))
        return unit

    def same(self, place: int, others: Sequence[int]) -> bool:
        """Say whether a picture is among others, or so like one of them that they count as one."""
        return place in others or bool((self.of(others) @ self.of([place])[0] > SAME).any())

    def cosines(self, queries: Sequence[int]) -> Floats:
        """Return [Q, N]: the cosines of some of the vectors with all."""
        query_QW = self.of(queries)
        parts = [query_QW @ self.of(places).T for places in self._parts(np.arange(len(self.row_N)))]
        return np.concatenate([np.zeros((len(queries), 0)), *parts], axis=1)
