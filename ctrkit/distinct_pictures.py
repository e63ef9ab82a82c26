"""Which of very many pictures are the same, and the order in which distinct contents are used: by sorts on disk of
their contents' digests, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ctrkit import disk_tables, pictures
from ctrkit.bad_pictures import BadPictures
from ctrkit.disk_tables import Records, Sorter, Table, edges, merge
from ctrkit.pictures import DIGEST, Int, Place, Source
from ctrkit.ranks import ALONE, Ranks

FOUND = np.dtype([("digest", f"S{DIGEST}"), ("picture", ">i8"), ("position", ">i8"), ("count", ">i8")])
"""A picture that was read."""
CONTENT = np.dtype(
    [
        ("unused", ">i8"),  # less often used is larger
        ("first", ">i8"),  # of its pictures
        ("position", ">i8"),  # of that picture in the source
        ("begin", ">i8"),  # of its pictures among those sorted by digest
        ("pictures", ">i8"),
        ("digest", f"S{DIGEST}"),
    ]
)
MOST = (1 << 62) - 1
"""Less the times that a content is used: `unused`."""
WRITTEN = 1 << 12
"""Pictures that were read and are noted at a time."""
Share = Callable[[Table, str], list[Table]]
"""Gives a table to the other processes, under a name, and returns that of each."""


class Counts(Protocol):
    """Of each picture, how often training uses it: an array, or a table on disk."""

    def take(self, rows: Int, /) -> Records:
        """Return the counts of some pictures."""


class DistinctPictures:
    """The distinct contents in the order of use, most first; of as many the one whose first picture comes first.

    Parameters
    ----------
    source, images: of the pictures.
    folder: in whose file system the tables lie.
    """

    def __init__(self, source: Source, images: Sequence[str], folder: Path | None) -> None:
        self._source, self._images, self._folder = source, images, folder
        self._pictures = Table(">i8", folder)
        """By digest."""
        self._contents = Table(CONTENT, folder)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._contents)

    def places(self, begin: int, end: int) -> list[Place]:
        """Return where to read some contents, `begin` to `end` − 1 in the order of use."""
        some = self._contents.read(begin, end)
        return [
            self._source.at(position, self._images[first])
            for position, first in zip(some["position"].tolist(), some["first"].tolist(), strict=True)
        ]

    def digests(self) -> Iterator[bytes]:
        """Yield the digests in the order of use, joined, some at a time."""
        for some in self._contents.chunks():
            yield some["digest"].tobytes()

    def of(self, place: int) -> tuple[int, Iterator[Int]]:
        """Return how many pictures have a content, and yield them in order, some at a time."""
        content = self._contents.read(place, place + 1)[0]
        begin, number = int(content["begin"]), int(content["pictures"])
        return number, (some.astype(np.int64) for some in self._pictures.chunks(begin, begin + number))

    def pictures_by_row(self, bad_places: Iterator[Int]) -> Iterator[tuple[Int, Int]]:
        """Yield pictures, ascending, and the row of each: its content's place, less the bad ones before it.

        bad_places: ascending, [n] at a time.
        """
        rows = Sorter([("begin", ">i8"), ("row", ">i8")], self._folder)
        before = place = 0
        bad = np.zeros(0, np.int64)
        for some in self._contents.chunks():
            end = place + len(some)
            while len(bad) == 0 or bad[-1] < end:
                if (more := next(bad_places, None)) is None:
                    break
                bad = np.concatenate([bad, more])
            good = np.ones(len(some), np.bool_)
            good[bad[bad < end] - place] = False
            bad = bad[bad >= end]
            spans = np.empty(len(some), rows.dtype)
            spans["begin"], spans["row"] = some["begin"], np.where(good, before + np.cumsum(good) - 1, MOST)
            rows.add(spans)
            place, before = end, before + int(good.sum())
        by_picture = Sorter([("picture", ">i8"), ("row", ">i8")], self._folder)
        for begin, row, end in self._spans(rows):
            for at in range(int(begin[0]), end, disk_tables.RUN):
                some = self._pictures.read(at, min(at + disk_tables.RUN, end))
                found = np.empty(len(some), by_picture.dtype)
                found["picture"] = some
                found["row"] = row[np.searchsorted(begin, np.arange(at, at + len(some)), side="right") - 1]
                by_picture.add(found[found["row"] != MOST])
        for some in by_picture.sorted():
            yield some["picture"].astype(np.int64), some["row"].astype(np.int64)

    def _spans(self, rows: Sorter) -> Iterator[tuple[Int, Int, int]]:
        """Yield where some contents' pictures begin, their rows, and where the last one's end."""
        held: tuple[Int, Int] | None = None
        for chunk in rows.sorted():
            begin, row = chunk["begin"].astype(np.int64), chunk["row"].astype(np.int64)
            if held is not None:
                yield *held, int(begin[0])
            held = begin, row
        if held is not None:
            yield *held, len(self._pictures)

    def fill(self, found: Iterator[Records]) -> None:
        """Take FOUND of all pictures, sorted."""
        by_use = Sorter(CONTENT, self._folder)
        open_: Records = np.zeros(0, CONTENT)
        for chunk, first in edges(found, "digest"):
            starts = np.flatnonzero(first)
            counts = chunk["count"].astype(np.int64)
            ends = np.append(starts[1:], len(chunk))
            if starts[:1].tolist() != [0]:  # the content before goes on
                upto = int(starts[0]) if len(starts) else len(chunk)
                open_["unused"] -= counts[:upto].sum()
                open_["pictures"] += upto
            if len(starts):
                by_use.add(open_)
                contents = np.empty(len(starts), CONTENT)
                contents["unused"] = MOST - np.add.reduceat(counts, starts)
                contents["first"], contents["position"] = chunk["picture"][starts], chunk["position"][starts]
                contents["begin"], contents["pictures"] = len(self._pictures) + starts, ends - starts
                contents["digest"] = chunk["digest"][starts]
                by_use.add(contents[:-1])
                open_ = contents[-1:].copy()
            self._pictures.append(chunk["picture"])
        by_use.add(open_)
        for some in by_use.sorted():
            self._contents.append(some)


def tell_distinct(
    source: Source,
    images: Sequence[str],
    counts: Counts | None,
    bad: BadPictures,
    ranks: Ranks,
    share: Share,
    folder: Path | None,
) -> DistinctPictures:
    """Read every picture once, each rank its share, and tell which have the same bytes.

    counts: of each picture, how often training uses it; None: never. bad: gets those of this rank's share that cannot
    be read.
    """
    own = ranks.share(len(images))
    sorter = Sorter(FOUND, folder)
    waiting: list[pictures.Digests] = []

    def note() -> None:
        some = np.concatenate([one.pictures["picture"].astype(np.int64) for one in waiting])
        found = np.empty(len(some), FOUND)
        found["digest"] = np.concatenate([one.digests.view(FOUND["digest"]).reshape(-1) for one in waiting])
        found["picture"] = some
        found["position"] = np.concatenate([one.pictures["position"].astype(np.int64) for one in waiting])
        found["count"] = 0 if counts is None else counts.take(some)
        good = np.ones(len(some), np.bool_)
        before = 0
        for one in waiting:
            good[[before + at for at in one.reasons]] = False
            before += len(one.pictures)
        reasons = [one.reasons[at] for one in waiting for at in sorted(one.reasons)]
        bad.add_unreadable(some[~good], reasons)
        sorter.add(found[good])
        waiting.clear()

    label = "compare pictures" + ranks.name if ranks.rank == 0 else ""
    for one in pictures.digests(source, images, own.start, own.stop, label):
        waiting.append(one)
        if len(waiting) * pictures.AT_ONCE >= WRITTEN:
            note()
    if waiting:
        note()
    distinct = DistinctPictures(source, images, folder)
    if ranks.count == 1:
        distinct.fill(sorter.sorted())
    else:
        table = Table(FOUND, folder)
        for some in sorter.sorted():
            table.append(some)
        distinct.fill(merge([(one, 0, len(one)) for one in share(table, "digests")]))
    return distinct


@dataclass(frozen=True)
class Contents:
    """Which pictures are there, and which are the same: of as many as memory holds."""

    places: list[Place]
    """Of each distinct content, where to read it; in the order of first appearance."""
    digests: npt.NDArray[np.uint8]
    """[contents, 16]: of each distinct content."""
    content: Int
    """[pictures]: the picture's place in `places`, or −1 if it cannot be read."""
    reasons: dict[int, str]
    """Picture → why it cannot be read."""


def tell_distinct_in_memory(source: Source, images: Sequence[str]) -> Contents:
    """Read every picture once and tell which have the same bytes."""
    bad = BadPictures(None)
    distinct = tell_distinct(source, images, None, bad, ALONE, lambda table, _: [table], None)
    content = np.full(len(images), -1, np.int64)
    for some, row in distinct.pictures_by_row(iter(())):
        content[some] = row
    digests = np.frombuffer(b"".join(distinct.digests()), np.uint8).reshape(-1, DIGEST)
    unreadable = (record for some in bad.unreadable.chunks() for record in some.tolist())
    reasons = {picture: bad.reasons.texts[reason] for picture, reason in sorted(unreadable)}
    return Contents(distinct.places(0, len(distinct)), digests, content, reasons)
