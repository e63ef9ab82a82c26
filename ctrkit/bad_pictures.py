"""Pictures that cannot be used and why: counted, a few named, all of them in a table on disk."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrkit.disk_tables import Sorter, Table
from ctrkit.errors import UserError
from ctrkit.pictures import Int, Source, Unnamed

BAD = np.dtype([("number", ">i8"), ("reason", ">i8")])
"""A picture, or a place in the order of use, and which reason."""
SHOWN = 3
"""Reasons, and examples of each, in an error."""
REASONS = 1 << 14
"""Different reasons that are told apart. Of more only what they begin with is, up to the first colon."""
ROWS = 1 << 16
"""Rejects that are written at a time."""


@dataclass
class Reasons:
    """What was wrong, how often, and with which pictures first."""

    texts: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    first: list[list[int]] = field(default_factory=list)
    """Of each reason the pictures with the lowest numbers."""
    _number: dict[str, int] = field(default_factory=dict)

    def number(self, reason: str) -> int:
        """Return the number of a reason."""
        if reason not in self._number:
            if len(self.texts) >= REASONS:
                reason = reason.partition(":")[0]
            if reason not in self._number:
                self._number[reason] = len(self.texts)
                self.texts.append(reason)
                self.counts.append(0)
                self.first.append([])
        return self._number[reason]

    def count(self, number: int, times: int, pictures: Iterable[int]) -> None:
        """Count a reason; pictures: with the lowest numbers, as many as are shown."""
        self.counts[number] += times
        self.first[number] = heapq.nsmallest(SHOWN, [*self.first[number], *pictures])


class BadPictures:
    """Unusable pictures of one process and why.

    Parameters
    ----------
    folder: in whose file system the table lies.
    """

    def __init__(self, folder: Path | None) -> None:
        self.unreadable = Table(BAD, folder)
        """Pictures, in no order."""
        self.places = Table(BAD, folder)
        """Places in the order of use, of contents that could be read but not be decoded; in no order."""
        self.reasons = Reasons()
        self.total = 0
        """Pictures."""

    def add_unreadable(self, pictures: Int, reasons: Sequence[str]) -> None:
        """Add pictures [n] that cannot be read, and why."""
        numbers = [self.reasons.number(reason) for reason in reasons]
        self.unreadable.append(_records(pictures, numbers))
        for picture, number in zip(pictures.tolist(), numbers, strict=True):
            self.reasons.count(number, 1, [picture])
        self.total += len(pictures)

    def add_place(self, place: int, reason: str, pictures: Int, times: int) -> None:
        """Add a place whose content cannot be used: that of so many pictures, the first of which are given."""
        number = self.reasons.number(reason)
        self.places.append(_records(np.array([place]), [number]))
        self.reasons.count(number, times, pictures.tolist())
        self.total += times


def _records(numbers: Int, reasons: Sequence[int] | Int) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    out = np.empty(len(numbers), BAD)
    out["number"], out["reason"] = numbers, reasons
    return out


def check(found: Sequence[Reasons], images: Sequence[str], max_rate: float, unnamed: Unnamed | None) -> None:
    """Raise UserError if there are more bad pictures, of all processes, than `max_rate` allows.

    unnamed: those without an id, where they count.
    """
    nameless = 0 if unnamed is None else len(unnamed)
    bad = sum(sum(reasons.counts) for reasons in found) + nameless
    total = len(images) + nameless
    if bad <= max_rate * total:
        return
    merged = Reasons()
    for reasons in found:
        for text, count, first in zip(reasons.texts, reasons.counts, reasons.first, strict=True):
            merged.count(merged.number(text), count, first)
    examples = [[images[number] for number in first] for first in merged.first]
    for where, reason in unnamed or ():
        number = merged.number(reason)
        examples += [[]] * (len(merged.texts) - len(examples))
        merged.counts[number] += 1
        if len(examples[number]) < SHOWN:
            examples[number] = [*examples[number], where]
    common = sorted(zip(merged.texts, merged.counts, examples, strict=True), key=lambda kind: (-kind[1], kind[0]))
    told = "; ".join(f"{count:,} {text} (such as {', '.join(some)})" for text, count, some in common[:SHOWN])
    raise UserError(
        f"{bad:,} of {total:,} pictures ({bad / total:.1%}) cannot be used, more than "
        f"extract-images.max_bad_rate = {max_rate:g} allows: {told}. Check --pictures and "
        "extract-images.template, or raise max_bad_rate."
    )


def write_rejects(path: Path, pictures: Iterator[tuple[int, str]], images: Sequence[str], source: Source) -> None:
    """Write rejects.parquet: bad pictures (number, reason), then those that no id names."""

    def rows() -> Iterator[tuple[str | None, str, str]]:
        for number, reason in pictures:
            image = images[number]
            yield image, source.where(image), reason
        for where, reason in source.unnamed:
            yield None, where, reason

    schema = pa.schema([(name, pa.string()) for name in ("image", "path", "reason")])
    with pq.ParquetWriter(path, schema) as writer:
        some: list[tuple[str | None, str, str]] = []
        for row in rows():
            some.append(row)
            if len(some) == ROWS:
                writer.write_table(_table(some, schema))
                some = []
        writer.write_table(_table(some, schema))


def _table(rows: Sequence[tuple[str | None, str, str]], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=schema)


class AllBad:
    """The unusable pictures of all processes, in order.

    Parameters
    ----------
    unreadable, places: of each process, as in `BadPictures`.
    reasons: of each process.
    """

    def __init__(
        self, unreadable: Sequence[Table], places: Sequence[Table], reasons: Sequence[Reasons], folder: Path | None
    ) -> None:
        self._merged, self._folder = Reasons(), folder
        self._unreadable, self._reasons = unreadable, reasons
        self._places = Table(BAD, folder)
        sorter = Sorter(BAD, folder)
        self._add(sorter, places)
        for some in sorter.sorted():
            self._places.append(some)

    def _add(self, sorter: Sorter, tables: Sequence[Table]) -> None:
        for table, reasons in zip(tables, self._reasons, strict=True):
            number = np.array([self._merged.number(text) for text in reasons.texts], np.int64)
            for chunk in table.chunks():
                sorter.add(_records(chunk["number"], number[chunk["reason"].astype(np.int64)]))

    def __len__(self) -> int:
        """Return how many places are bad."""
        return len(self._places)

    def places(self) -> Iterator[Int]:
        """Yield the bad places in the order of use, ascending, some at a time."""
        return (some["number"].astype(np.int64) for some in self._places.chunks())

    def pictures(self, of: Callable[[int], tuple[int, Iterator[Int]]]) -> Iterator[tuple[int, str]]:
        """Yield all bad pictures, ascending, and why. of: gives the pictures of a place."""
        sorter = Sorter(BAD, self._folder)
        self._add(sorter, self._unreadable)
        for chunk in self._places.chunks():
            for place, reason in chunk.tolist():
                for some in of(place)[1]:
                    sorter.add(_records(some, np.full(len(some), reason)))
        for chunk in sorter.sorted():
            for number, reason in chunk.tolist():
                yield number, self._merged.texts[reason]
