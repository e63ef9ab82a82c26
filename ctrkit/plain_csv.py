"""Plain CSV text, as nearly all logs are, straight to codes: cells in which no quote stands, cut and coded by compiled
code (`ctrkit.compiled`) instead of becoming columns of text first.

What is not so plain goes the way of all other formats: `coded` says so by returning None. Both ways end in the same
bytes. Rows that seem bad are read again that way too, which tells what is wrong with them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pyarrow

from ctrkit import numba_loops
from ctrkit.parsing import KNOWN_DWELL_MS, parse
from ctrkit.pieces import BAD, ROW, UNIT, File, Text, csv_frame
from ctrkit.spool import Ints, smallest
from ctrkit.tables import LATEST_MS, RawTable

PADDING = 16
"""Bytes behind the text, which may be looked at."""
BLOCK_ROWS = 1 << 12
"""Cut in one go, then coded column by column."""
SLOTS = 1 << 10
"""Of a hash table at first."""
LONGEST_PREFIX = 8
"""Bytes before a number."""
NUMBERS = 1 << 20
"""Whole numbers below this are coded by a table of them."""
MEASURES = ("time", "dwell")


def compiled() -> ModuleType | None:
    """Return the compiled code; None where there is none."""
    return numba_loops.load("ctrkit.compiled") if sys.byteorder == "little" else None


@dataclass
class Cells:
    """A column of cells that was coded."""

    codes: Ints
    """UInt32, 0 for an empty one."""
    words: Ints
    """The first cell of each code from 1."""


class PlainRows:
    """The good rows of a text, coded, and what is wrong with the others."""

    def __init__(self, cutter: "_Cutter", rows: int, bad: pl.DataFrame, click: Ints | None) -> None:
        n = cutter.height
        self.rows = rows
        """In the text, bad ones included."""
        self.bad = bad
        """As `parsing.parse` gives them."""
        self.height = n
        self.row = cutter.first + cutter.rows[:n].astype(np.int64)
        """The number of each row in the piece, from 1."""
        self.time = cutter.times[:n]
        """Int64 milliseconds."""
        self.dwell = cutter.dwells[:n] if "dwell" in cutter.table.wanted else None
        """Int64 milliseconds from 1; 0 is unknown."""
        self.click = click
        """Int8, 0 or 1."""
        self.other_day = None
        self._text, self._ids = cutter.text, cutter.ids[:n]
        names = cutter.table.names
        self._columns = {ours: cutter.cells_of(name) for ours, name in names.items() if name in cutter.coded}

    def is_between(self, begin: int, end: int) -> bool:
        """Say whether all times are; `end` is not included."""
        return not self.height or (begin <= int(self.time.min()) and int(self.time.max()) < end)

    def code(self, column: str) -> tuple[Ints, pl.Series]:
        """Return codes and dictionary of a column of texts."""
        found = self._columns[column]
        return found.codes.astype(smallest(len(found.words) + 1)), texts(found.words, self._text)

    def code_users(self, partitions: int) -> tuple[Ints, pl.Series, Ints]:
        """Return codes and dictionary of the users, and the partition of each of its words."""
        return *self.code("user"), self._parts(self._columns["user"].words, partitions)

    def ids(self, partitions: int) -> tuple[pl.Series, Ints]:
        """Return the id of each row, and its partition."""
        return texts(self._ids, self._text), self._parts(self._ids, partitions)

    def _parts(self, cells: Ints, partitions: int) -> Ints:
        found = np.zeros(len(cells), np.uint16)
        if partitions > 1:
            _code().parts_of_words(cells, self._text, np.uint64(partitions), found)
        return found


def _code() -> ModuleType:
    found = compiled()
    assert found is not None
    return found


def texts(cells: Ints, text: Ints) -> pl.Series:
    """Return the texts of cells: Int64 if all are whole numbers, written as usual, else String."""
    numbers = np.empty(len(cells), np.int64)
    if len(cells) and _code().whole_numbers(cells, text, numbers):
        return pl.Series("value", numbers)
    ends = np.zeros(len(cells) + 1, np.int64)
    size = _code().word_ends(cells, ends[1:])
    out = np.empty(size, np.uint8)
    _code().write_words(cells, text, out)
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(out)]
    series = pl.from_arrow(pyarrow.Array.from_buffers(pyarrow.large_string(), len(cells), buffers))
    assert isinstance(series, pl.Series)
    return series.rename("value")


def is_plain(table: RawTable, number: int, texts_of: Sequence[str], needed: Sequence[str]) -> bool:
    """Say whether the text of a table's file may be read so, if nothing in it forbids.

    texts_of: columns (our names) that are to be coded; needed: columns that no row may lack.
    """
    file, header = table.files[number], table.headers[number]
    own = header[: len(header) - len(file.parts)]
    measures = [c for c in MEASURES if c in table.wanted]
    asked = [c for c in table.wanted if c not in measures] + [*texts_of, *table.label_columns()]
    measured = [table.names[c] for c in measures]
    return bool(
        table.in_files
        and file.format in ("csv", "tsv")
        and _separator(file).isascii()
        and not (table.source.null_values or table.source.where)
        and ("time" not in measures or ("time" in needed and table.time_unit != "iso"))
        and all(own.count(table.names[c]) == 1 for c in (*table.wanted, *asked))
        and len(set(measured)) == len(measured)
        and not {table.names[c] for c in asked} & set(measured)
        and len(table.label_columns()) <= 1
        and compiled() is not None
    )


def _separator(file: File) -> str:
    return file.separator if len(file.separator) == 1 else UNIT


def read(
    table: RawTable, number: int, text: Text, begin: int, texts_of: Sequence[str], needed: Sequence[str]
) -> PlainRows | None:
    """Return the rows of a text of a table's file; None where it is not plain.

    begin: the number of the first row; for the others see `is_plain`.
    """
    data, first = text
    file = table.files[number]
    if (file.quoted and b'"' in data) or b"\r" in data or not _is_utf8(data):
        return None
    cutter = _Cutter(table, number, data, begin, texts_of, needed)
    at = data.find(b"\n") + 1 or cutter.size if first and file.header else 0
    rows = cutter.cut(at)
    click = None
    if table.label:
        click = _clicks(cutter)
        if click is None:
            return None
    bad = _look_again(cutter, needed)
    return PlainRows(cutter, rows, bad, click) if bad is not None else None


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _breaks(text: Ints) -> int:
    """Return the number of line breaks; twice as fast as `bytes.count`."""
    step = 1 << 16
    return sum(int(np.count_nonzero(text[i : i + step] == ord("\n"))) for i in range(0, len(text), step))


class _Cutter:
    """Cuts a text into cells, and codes them."""

    def __init__(
        self, table: RawTable, number: int, data: bytes, first: int, texts_of: Sequence[str], needed: Sequence[str]
    ) -> None:
        code, file, header = _code(), table.files[number], table.headers[number]
        self.table, self.file, self.first = table, file, first
        self.header = header[: len(header) - len(file.parts)]
        self.size = len(data)
        self.text = np.empty(self.size + PADDING, np.uint8)
        self.text[: self.size] = np.frombuffer(data, np.uint8)
        self.text[self.size :] = 0
        if data and not data.endswith(b"\n"):
            self.text[self.size] = ord("\n")
            self.size += 1
        self.label = table.label_columns()
        asked = dict.fromkeys(table.names[c] for c in (*texts_of, *self.label))
        self.coded = {name: i for i, name in enumerate(asked)}
        """Columns (the file's names) that are coded → their place."""
        self.id_place = -1
        places = dict(self.coded)
        if "id" in needed:
            self.id_place = places.setdefault(table.names["id"], len(places))
        self.kinds, self.targets = np.zeros(len(self.header), np.uint8), np.zeros(len(self.header), np.int64)
        self.needed = np.zeros(len(self.header), bool)
        for name, place in places.items():
            self.kinds[self.header.index(name)], self.targets[self.header.index(name)] = code.CELL, place
        for column, kind in zip(MEASURES, (code.TIME, code.DWELL), strict=True):
            if column in table.wanted:
                self.kinds[self.header.index(table.names[column])] = kind
        for column in needed:
            self.needed[self.header.index(table.names[column])] = True
        most = _breaks(self.text[: self.size]) + 1
        self.times, self.dwells = np.empty(most, np.int64), np.empty(most, np.int64)
        self.rows, self.ids = np.empty(most, np.uint32), np.empty(most if self.id_place >= 0 else 0, np.uint64)
        self.codes = np.empty((len(self.coded), most), np.uint32)
        self.cells = np.empty((len(places), min(BLOCK_ROWS, most)), np.uint64)
        self.coders = [_Coder(self.text) for _ in self.coded]
        self.odd = np.empty((3, 0), np.uint32)
        self.height = 0

    def cut(self, at: int) -> int:
        """Cut and code the rows from `at` on; return how many there are."""
        code, row, n = _code(), 0, 0
        unit = 1000 if self.table.time_unit == "s" else 1
        odd = np.empty((3, self.cells.shape[1]), np.uint32)
        lost = [self.odd]
        while at < self.size:
            own = slice(n, n + self.cells.shape[1])
            at, cut, left_out, row = code.cut_cells(
                self.text,
                self.size,
                at,
                ord(_separator(self.file)),
                self.kinds,
                self.targets,
                self.needed,
                unit,
                LATEST_MS,
                int(KNOWN_DWELL_MS),
                self.cells,
                self.times[own],
                self.dwells[own],
                self.rows[own],
                odd,
                row,
            )
            for i, coder in enumerate(self.coders):
                coder.code(self.cells[i, :cut], self.codes[i, n : n + cut])
            if self.id_place >= 0:
                self.ids[n : n + cut] = self.cells[self.id_place, :cut]
            if left_out:
                lost.append(odd[:, :left_out].copy())
            n += cut
        self.odd, self.height = np.concatenate(lost, axis=1), n
        return row

    def cells_of(self, column: str) -> Cells:
        """Return a coded column by the file's name of it."""
        place = self.coded[column]
        coder = self.coders[place]
        return Cells(self.codes[place, : self.height], coder.words[: coder.count])


class _Coder:
    """Codes a column: by a table of numbers as long as each cell is a small whole one, perhaps behind a prefix that all
    share ("u123"), then by a hash table."""

    def __init__(self, text: Ints) -> None:
        self.text = text
        self.count = 0
        self.words: Ints = np.empty(SLOTS, np.uint64)
        self._numbers: Ints | None = np.zeros(SLOTS, np.uint32)
        self._prefix: bytes | None = None
        self._table: Any = None

    def code(self, cells: Ints, codes: Ints) -> None:
        """Write the code of each cell."""
        at = 0
        if self._prefix is None:
            there = np.flatnonzero(cells)
            self._prefix = (
                self._bytes(int(cells[there[0]])).rstrip(b"0123456789")[:LONGEST_PREFIX] if len(there) else None
            )
        prefix = self._prefix or b""
        begins = np.uint64(int.from_bytes(prefix, "little")), np.uint64(len(prefix))
        while self._numbers is not None:
            at, self.count, number = _code().code_numbers(
                cells, at, self.text, *begins, self._numbers, self.words, self.count, codes
            )
            if at == len(cells):
                return
            if 0 <= number < NUMBERS:
                size = 2 << number.bit_length()
                self._numbers = np.concatenate([self._numbers, np.zeros(size - len(self._numbers), np.uint32)])
                self.words = self._longer(size)
            else:
                slots = SLOTS
                while slots <= 2 * self.count:
                    slots *= 4
                self._numbers, self._table = None, _code().table_of(self.words[: self.count], self.text, slots)
                self.words = self._longer(slots // 2 + 1)
        self._table, self.words, self.count = _code().code_cells(
            cells, at, self.text, self._table, self.words, self.count, codes
        )

    def _bytes(self, cell: int) -> bytes:
        if cell >> 63:
            at, length = cell & 0xFFFFFFFF, (cell >> 32) & 0x7FFFFFFF
            return self.text[at : at + length].tobytes()
        return cell.to_bytes(8, "little")[: cell >> 56]

    def _longer(self, size: int) -> Ints:
        words = np.empty(size, np.uint64)
        words[: self.count] = self.words[: self.count]
        return words


def _clicks(cutter: _Cutter) -> Ints | None:
    """Return the labels, told by the distinct texts of their only column; None if one is neither 0 nor 1."""
    if not cutter.height:
        return np.empty(0, np.int8)
    table = cutter.table
    names = [table.names[c] for c in cutter.label]
    found = {name: cutter.cells_of(name) for name in names}
    none = pl.Series([None], dtype=pl.String)
    words = {name: none.append(texts(one.words, cutter.text).cast(pl.String)) for name, one in found.items()}
    value = table.label_of(pl.DataFrame(words or {"": none}))
    if not (value.dtype == pl.Boolean or value.dtype.is_numeric()):
        return None
    numbers = value.cast(pl.Float64).fill_null(-1).to_numpy()
    codes = found[names[0]].codes if names else np.zeros(cutter.height, np.uint32)
    seen = np.bincount(codes, minlength=len(numbers)) > 0
    if not np.isin(numbers[seen], (0, 1)).all():
        return None
    labels: Ints = np.where(seen, numbers, 0).astype(np.int8)[codes]
    return labels


def _look_again(cutter: _Cutter, needed: Sequence[str]) -> pl.DataFrame | None:
    """Return what is wrong with the rows that were left out, read as all other formats; None if nothing is with one."""
    number, begin, end = cutter.odd.tolist()
    if not number:
        return pl.DataFrame(schema={ROW: pl.Int64, "reason": pl.String, "cell": pl.String})
    table, text = cutter.table, b"".join(cutter.text[a:b].tobytes() for a, b in zip(begin, end, strict=True))
    theirs = list(dict.fromkeys(table.names[c] for c in (*table.wanted, *cutter.label)))
    frame = csv_frame(cutter.file, text, False, cutter.header, theirs)
    if frame.height != len(number):
        return None
    nothing = [pl.lit(None, dtype=pl.String).alias(BAD)] if BAD not in frame.columns else []
    frame = frame.with_columns(*nothing, pl.Series(ROW, number, dtype=pl.Int64) + cutter.first)
    good, bad = parse(table, table.by_our_names(frame), needed, table.wanted)
    return None if good.height else bad
