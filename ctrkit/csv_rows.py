"""Where the rows of CSV text end, so that a quote without its partner spoils its own row and no other.

A cell is quoted where it begins with a double quote; in it two quotes stand for one, and its last quote has a
separator, a line break or the end of the text behind it. A row ends at the first line break outside quoted cells. Where
a quoted cell does not end (the text does, or another cell seems to begin within it, or it has line breaks and is too
long), its quote has no partner, and the first line is the row. So rows depend on nothing before them, wherever the text
is cut.
"""

import csv
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

SCAN_BYTES = 1 << 16
"""Looked at in one go: what fits the processor's cache."""
QUOTE, BREAK, RETURN = b'"\n\r'
OUTSIDE, INSIDE, DOUBTFUL, LOST = range(4)
"""Of a quoted cell. Doubtful is what follows a quote inside that neither ends the cell nor is one of two; lost is who
meets the beginning of another cell there."""
Bytes = npt.NDArray[np.uint8]
Kind = Literal["regular", "odd", "bad"]
"""Of a row: all readers agree what its cells are; it has quotes in odd places; or one of them has no partner."""
_MARKS, _QUOTES, _BREAK = (re.compile(mark) for mark in (rb'"+|\n', rb'"+', rb"\n"))
LINES = 1000
"""With quotes, that are looked at to find the end of a row."""


class Row(NamedTuple):
    """Where a row, or several regular ones, begin and end."""

    begin: int
    end: int
    kind: Kind


@dataclass(frozen=True)
class CsvRows:
    """Finds the rows of text."""

    separator: str
    """One character."""
    longest: int
    """Bytes after which a quoted cell that has line breaks is too long."""

    def tidy(self, data: Bytes) -> bool:
        """Say whether each quote of whole rows begins or ends a quoted cell or is one of two inside; then all rows are
        regular."""
        size = max(1, min(4 * SCAN_BYTES, self.longest // 4))
        inside = covered = 0  # whether quotes so far leave a cell open, and how many bytes it has at least
        for at in range(0, len(data), size):
            quotes = np.flatnonzero(data[at : at + size] == QUOTE)
            covered = covered + size if inside or _is_between(data, at) else 0
            if len(quotes):
                quotes += at
                ends = self._end_cells(data, quotes[1 - inside :: 2])
                if ends is None or not self._begin_cells(data, quotes[inside::2]):
                    return False
                covered = 0 if ends else covered
                inside = (inside + len(quotes)) % 2
            if covered >= self.longest - 2 * size:
                return False
        return not inside

    def _begin_cells(self, data: Bytes, quotes: npt.NDArray[np.intp]) -> bool:
        """Say whether each of these quotes is where a cell may begin, or behind a quote."""
        before = data[quotes - 1]
        if len(quotes) and not quotes[0]:
            before[0] = BREAK
        return bool(((before == ord(self.separator)) | (before == BREAK) | (before == QUOTE)).all())

    def _end_cells(self, data: Bytes, quotes: npt.NDArray[np.intp]) -> bool | None:
        """Say whether any of these quotes ends a cell; None where one neither does nor has a quote behind it."""
        last = len(data) - 1
        behind = data[np.minimum(quotes + 1, last)]
        ends = (behind == ord(self.separator)) | (behind == BREAK)
        returns = behind == RETURN
        if returns.any():
            ends |= returns & (data[np.minimum(quotes + 2, last)] == BREAK)
        return bool(ends.any()) if (ends | (behind == QUOTE)).all() else None

    def end_after(self, data: Bytes, begin: int, stop: int) -> int:
        """Return the first end of a row at or after `stop`. A row begins at `begin`."""
        rows = self.rows(data, self._sure_begin(data, begin, stop), stop)
        return max((row.end for row in rows), default=stop)

    def last_end(self, data: Bytes) -> int:
        """Return the last end of a row in data, which begins with a row and may go on; 0 if there is none."""
        begin = self._sure_begin(data, 0, len(data))
        return max((row.end for row in self.rows(data, begin, len(data), final=False)), default=begin)

    def _sure_begin(self, data: Bytes, begin: int, stop: int) -> int:
        """Return the begin of a row before `stop`, near it where that needs no look at all from `begin` on.

        What ends a row for sure is a line break behind which no quoted cell goes on, whether one came to its line or
        not; or one with no quote that may begin a cell in so many bytes before it that the cell would be too long.
        """
        low = max(begin, stop - 2 * self.longest)
        text = data[low:stop].tobytes()
        cell = max(text.rfind(mark + b'"') for mark in (b"\n", self.separator.encode())) + 1
        end = text.rfind(b"\n", 0, len(text) - 1) + 1
        if low > begin and end - 1 - cell > self.longest:
            return low + end
        quote = text.rfind(b'"')
        for _ in range(LINES):
            line = text.rfind(b"\n", 0, max(quote, 0)) + 1
            end = text.find(b"\n", line, len(text) - 1) + 1
            if not line or quote < 0:
                break
            if end and all(self._along(text[line:end], where) != INSIDE for where in (OUTSIDE, INSIDE)):
                return low + end
            quote = text.rfind(b'"', 0, line)
        return begin

    def _along(self, line: bytes, where: int) -> int:
        """Return where a line leads."""
        view = memoryview(line)
        for mark in _QUOTES.finditer(line):
            at, end = mark.span()
            if (end - at) % 2 and where != LOST:
                where = _after_quote(where, at == 0 or self._begins(view[at - 1]), self._ends(view, end))
        return where

    def first(self, data: Bytes) -> Row:
        """Return the first row of a text."""
        row = self._row(data.data, 0, final=True)
        assert row is not None
        return row

    def rows(self, data: Bytes, begin: int, stop: int, *, final: bool = True) -> Iterator[Row]:
        """Yield the rows that begin at `begin` and later, before `stop`; regular ones may come together.

        final: whether the text ends with the data; else rows that what follows decides are not yielded.
        """
        view, at = data.data, begin
        while at < stop:
            regular = _regular_lines(self.separator.encode()).match(view, at, stop)
            assert regular is not None
            if regular.end() > at:
                yield Row(at, regular.end(), "regular")
                at = regular.end()
            elif row := self._row(view, at, final):
                yield row
                at = row.end
            else:
                return

    def _row(self, view: memoryview, begin: int, final: bool) -> Row | None:
        """Return the row that begins at `begin`; None if that is not decided."""
        where, opened = OUTSIDE, begin
        quotes = 0
        odd = False
        end = begin
        for mark in _MARKS.finditer(view, begin):
            at, end = mark.span()
            if view[at] == BREAK:
                if where != INSIDE:
                    return Row(begin, end, _kind(quotes, odd))
                if end - opened > self.longest:
                    return _first_line(view, begin, final)
                continue
            quotes += end - at
            begins, ends = at == begin or self._begins(view[at - 1]), self._ends(view, end)
            if (end - at) % 2 == 0:
                odd |= where == OUTSIDE and begins and not ends
                continue
            was, where = where, _after_quote(where, begins, ends)
            if where == LOST:
                return _first_line(view, begin, final)
            opened = at if (was, where) == (OUTSIDE, INSIDE) else opened
            odd |= where == DOUBTFUL or was == where
        if not final:
            return None
        if where == INSIDE:
            return _first_line(view, begin, final)
        return Row(begin, len(view), _kind(quotes, odd))

    def _begins(self, before: int) -> bool:
        return before == BREAK or before == ord(self.separator)

    def _ends(self, view: memoryview, at: int) -> bool:
        behind = bytes(view[at : at + 2])
        return behind[:1] in (b"", b"\n", self.separator.encode()) or behind in (b"\r", b"\r\n")

    def cells(self, row: bytes) -> list[str] | None:
        """Return the cells of a row that is not regular, by Python's csv; None if it cannot be read."""
        text = row.decode(errors="replace")
        try:
            found = list(csv.reader(io.StringIO(text, newline=""), delimiter=self.separator))
        except csv.Error:
            return None
        return found[0] if len(found) == 1 else None


def _is_between(data: Bytes, at: int) -> bool:
    """Say whether there is a quote on either side of a place."""
    return at > 0 and data[at - 1] == QUOTE == data[at]


def _after_quote(where: int, begins: bool, ends: bool) -> int:
    """Return where a quote leads (or an odd number of them) that has what may begin and end a cell around it."""
    if where == OUTSIDE:
        return INSIDE if begins else OUTSIDE
    if where == INSIDE and not ends:
        return LOST if begins else DOUBTFUL
    return OUTSIDE if where == INSIDE else INSIDE


def _kind(quotes: int, odd: bool) -> Kind:
    return "bad" if quotes % 2 else "odd" if odd else "regular"


def _first_line(view: memoryview, begin: int, final: bool) -> Row | None:
    found = _BREAK.search(view, begin)
    return Row(begin, found.end() if found else len(view), "bad") if found or final else None


@functools.cache
def _regular_lines(separator: bytes) -> re.Pattern[bytes]:
    """Return the pattern of any number of regular rows of a line each."""
    mark = re.escape(separator)
    other = rb'[^"\n%b]*+' % mark
    quoted = rb'"(?>[^"\n]++|"")*+"(?=\r?\n|%b)' % mark
    cell = rb'(?>%b|(?!")%b(?>"%b"%b)*+)' % (quoted, other, other, other)
    return re.compile(rb'(?>[^"\n]*+\n|%b(?>%b%b)*+\r?\n)*+' % (cell, mark, cell))
