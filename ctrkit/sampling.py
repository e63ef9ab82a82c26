"""A bounded sample of a raw table, and from it how many rows and how many distinct values the whole table has.

Small tables are read whole. Of large ones some windows are read, spread evenly over the files and in each file from its
beginning to its end, so that the sample is fair whether rows lie in order of time, of user or in none.
"""

import gzip
import itertools
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import zstandard

from ctrkit import parquet_footer
from ctrkit.errors import UserError
from ctrkit.pieces import LONGEST_CELL, ROW, File, Piece, Text, head, last_row_end, remote
from ctrkit.tables import RawTable, as_text

ROWS, BYTES = 100_000, 32 << 20
"""Of a log that is read; less where a row is long."""
TABLE_ROWS, TABLE_BYTES = 2_000_000, 128 << 20
"""Of a table with a key, which says little unless it is read whole."""
WINDOWS = 30
STRETCHES = 5
"""Longer windows, of as many rows in all: they tell how soon values come again."""
PARQUET_WINDOWS = 8
"""In a file: each costs the decoding of a row group."""
HEAD = 1 << 16
MEASURED_BYTES = 8 << 20
"""Of a compressed file, to learn how many rows a byte holds."""
WINDOW = "__window"


@dataclass
class Sample:
    """Some rows of a table."""

    table: RawTable
    frame: pl.DataFrame
    """As `RawTable.read` gives it, and WINDOW, the window that a row is of. ROW counts from 1 in the sample."""
    stretches: pl.DataFrame
    """Other rows, of longer windows; none of a table that is read whole."""
    rows: int
    """Rows of the sample before `where`."""
    rows_in_all: int
    """Of the table before `where`: counted, or estimated from the bytes of the sample."""
    counted: bool
    """Whether `rows_in_all` is exact."""
    unknown: tuple[str, ...]
    """Files of which only the beginning is known, not how much follows."""
    seconds: float
    """Time of reading, and (below) processor time."""
    cpu: float

    @property
    def whole(self) -> bool:
        """Whether the sample is all of the table."""
        return self.counted and self.rows == self.rows_in_all

    @property
    def share(self) -> float:
        """The part of the rows that is in the sample."""
        return 1.0 if self.whole else min(1.0, self.rows / max(self.rows_in_all, 1))

    @property
    def read(self) -> int:
        """Rows of the whole table for which `where` holds."""
        return self.frame.height if self.whole else round(self.frame.height / max(self.share, 1e-12))

    def held(self, every: int = 1) -> "Held":
        """Return the sample as a table; or the rows of one in so many of its windows."""
        names = ("name", "source", "files", "headers", "names", "numeric", "label", "time_unit")
        frame = self.frame.filter(pl.col(WINDOW).rank("dense") % every == 0)
        return Held(**{name: getattr(self.table, name) for name in names}, frame=frame.drop(WINDOW))


@dataclass
class Held(RawTable):
    """A table whose rows are in memory, as one piece of its first file."""

    frame: pl.DataFrame | None = None
    in_files: ClassVar[bool] = False

    def prepare(self, columns: Iterable[str]) -> None:
        """Do nothing: the sample was read with what is needed."""

    def pieces(self) -> list[tuple[int, Piece]]:
        """Return the one piece."""
        return [(0, Piece())]

    def read(
        self, number: int, piece: Piece, text: Text | None = None, begin: int = 1
    ) -> Iterator[tuple[pl.DataFrame, int]]:
        """Yield all rows."""
        assert self.frame is not None
        yield self.frame, self.frame.height


def sample(
    table: RawTable, columns: Sequence[str], max_rows: int = ROWS, max_bytes: int = BYTES, *, stretched: bool = True
) -> Sample:
    """Read some rows of a table: `columns` (our names), and the label if it has one. stretched: and longer windows."""
    table.prepare(columns)
    taken = _sample(table, WINDOWS, max_rows, max_bytes, ends=True)
    if stretched and not taken.whole:
        taken.stretches = _sample(table, STRETCHES, max_rows, max_bytes, ends=False).frame
    return taken


def _sample(table: RawTable, count: int, max_rows: int, max_bytes: int, *, ends: bool) -> Sample:
    """Read some rows in about so many windows. ends: whether the first and the last row are among them."""
    begun, cpu = time.perf_counter(), time.process_time()
    chosen = _spread(len(table.files), count)
    budget = max(1, max_rows // len(chosen)), max(HEAD, max_bytes // len(chosen))
    block = max(1, max_rows // count)
    frames: list[pl.DataFrame] = []
    rows = 0
    in_files: dict[int, float] = {}
    counted = len(chosen) == len(table.files)
    unknown = []
    for number in chosen:
        file = table.files[number]
        places = _places(max(1, count // len(chosen)), number, len(table.files), ends=ends)
        windows, whole = _windows(file, *budget, places)
        seen = 0
        for piece in windows:
            for frame, n in _read(table, number, piece, budget[0]):
                # What is read from its beginning only is cut into windows afterwards.
                inner = (pl.col(ROW) - 1) // block if piece.end is None else pl.lit(0, dtype=pl.Int64)
                frames.append(frame.with_columns((inner + (len(frames) << 32)).alias(WINDOW)))
                seen += n
        in_all, exact = _rows_in_file(file, windows, seen) if not whole else (seen, True)
        if in_all is None:
            unknown.append(file.name)
        in_files[number] = seen if in_all is None else in_all
        counted = counted and exact
        rows += seen
    total = sum(in_files.values())
    if len(chosen) < len(table.files):
        sizes = [_size(f) for f in table.files]
        total *= sum(sizes) / max(sum(sizes[i] for i in chosen), 1)
    frame = _joined(frames).with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(ROW))
    return Sample(
        table,
        frame,
        frame.clear(),
        rows,
        max(rows, round(total)),
        counted,
        tuple(unknown),
        time.perf_counter() - begun,
        time.process_time() - cpu,
    )


def _spread(n: int, wanted: int) -> list[int]:
    """Return up to `wanted` numbers below n, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, n - 1, min(n, wanted))})


def _size(file: File) -> int:
    return 0 if file.url else Path(file.path).stat().st_size


def _read(table: RawTable, number: int, piece: Piece, limit: int) -> Iterator[tuple[pl.DataFrame, int]]:
    """Yield the rows of a piece; of one without an end about the first `limit`."""
    seen = 0
    for frame, rows in table.read(number, piece):
        if piece.end is None and seen + rows > limit:
            yield frame.filter(pl.col(ROW) <= limit), limit - seen
            return
        seen += rows
        yield frame, rows


def _places(count: int, number: int, files: int, *, ends: bool) -> list[float]:
    """Return where in a file, from 0 to 1, its windows lie. A single one moves on from file to file."""
    if count == 1:
        return [number / max(files - 1, 1) if ends else (number + 0.5) / files]
    return [k / (count - 1) if ends else (k + 0.5) / count for k in range(count)]


def _windows(file: File, rows: int, size: int, places: Sequence[float]) -> tuple[list[Piece], bool]:
    """Return windows of a file of about so many rows and bytes in all; and whether they are all of it."""
    if file.url or file.compression:
        return [Piece()], False
    try:
        if file.format == "parquet":
            in_all = sum(parquet_footer.row_groups(Path(file.path)))
            return _parquet_windows(in_all, rows, places)
        data, _ = head(file, HEAD)
        length = min(size, int(rows * len(data) / max(data.count(b"\n"), 1)))
        in_all = _size(file)
        if in_all <= length:
            return [Piece(0, in_all)], True
        with open(file.path, "rb") as f:
            if file.quoted and len(_row_ends(data)) < data.count(b"\n"):  # a line break may be inside a cell
                data = f.read(length)
                return [Piece(0, last_row_end(file, data) or data.rfind(b"\n") + 1)], False
            each = max(1, length // len(places))
            begins = [_row_begin(f, int((in_all - each) * place)) for place in places]
            ends_of = [_row_begin(f, min(begin + each, in_all)) for begin in begins]
    except OSError as e:
        raise UserError(f"{file.path} cannot be read: {e.strerror}") from None
    pieces: list[Piece] = []
    for begin, end in zip(begins, ends_of, strict=True):
        begin = max(begin, pieces[-1].end or 0) if pieces else begin
        if end > begin:
            pieces.append(Piece(begin, end))
    return pieces, False


def _parquet_windows(in_all: int, rows: int, places: Sequence[float]) -> tuple[list[Piece], bool]:
    if in_all <= rows:
        return [Piece(0, in_all)], True
    if len(places) > PARQUET_WINDOWS:
        places = [places[k] for k in _spread(len(places), PARQUET_WINDOWS)]
    each = max(1, rows // len(places))
    begins = [int((in_all - each) * place) for place in places]
    return [Piece(begin, begin + each) for begin in begins], False


def _row_ends(data: bytes) -> Any:
    """Return where rows end: after each line break outside quotes."""
    values = np.frombuffer(data, np.uint8)
    breaks = np.flatnonzero(values == ord("\n"))
    return breaks[np.searchsorted(np.flatnonzero(values == ord('"')), breaks) % 2 == 0] + 1


def _row_begin(f: Any, at: int) -> int:
    """Return where the first row at or after byte `at` begins."""
    if at == 0:
        return 0
    f.seek(at - 1)
    f.readline(LONGEST_CELL)
    return int(f.tell())


def _rows_in_file(file: File, windows: Sequence[Piece], seen: int) -> tuple[float | None, bool]:
    """Return how many rows a file has (None: unknown), and whether they are counted."""
    if file.format == "parquet":
        if file.url:
            try:
                return int(remote(file).select(pl.len()).collect().item()), True
            except (pl.exceptions.PolarsError, OSError) as e:
                raise UserError(f"{file.path} cannot be read: {e}") from None
        if not file.compression:
            return sum(parquet_footer.row_groups(Path(file.path))), True
    if file.url or file.format == "parquet":
        return None, False
    if not file.compression:
        held = sum((w.end or 0) - w.begin for w in windows)
        return _size(file) * seen / max(held, 1), False
    lines, used, end = _lines_in_head(file)
    if end and lines - file.header <= seen:
        return seen, True
    return _size(file) * lines / max(used, 1), False


def _lines_in_head(file: File) -> tuple[int, int, bool]:
    """Return how many lines the first bytes of a compressed file hold, how many bytes those are, and whether they are
    all."""
    with open(file.path, "rb") as packed:
        plain: Any = (
            gzip.GzipFile(fileobj=packed)
            if file.compression == ".gz"
            else zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        )
        try:
            data = plain.read(MEASURED_BYTES)
            end = not plain.read(1)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as e:
            raise UserError(f"{file.path} cannot be decompressed: {e}. Is it whole?") from None
        return data.count(b"\n") + (end and not data.endswith(b"\n")), packed.tell(), end


def _joined(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Join frames; a column that has several types becomes text."""
    mixed = {c for a, b in itertools.pairwise(frames) for c in a.columns if a.schema[c] != b.schema.get(c)}
    if mixed:
        frames = [f.with_columns(as_text(f.schema[c], c) for c in f.columns if c in mixed) for f in frames]
    return pl.concat(frames)


def share_of_visits(
    values: pl.Series, windows: pl.Series, long: pl.Series, long_windows: pl.Series, rows: int
) -> float:
    """Return the part of a table's visits that a sample's windows see; a visit is a value's rows in one neighbourhood.

    A window cuts visits at its ends, so that it sees more of them than its share of the rows. How many there are in all
    is told by longer windows: towards the end of one, nearly every value that is new there begins a visit.

    values, windows: of the sample's rows. long, long_windows: of the rows of longer windows. rows: of the whole table.
    """
    seen = pl.DataFrame({"value": values, "window": windows}).drop_nulls().n_unique()
    frame = pl.DataFrame({"value": long, "window": long_windows}).drop_nulls()
    place = pl.int_range(pl.len()).over("window") / pl.len().over("window")
    ends = frame.with_columns(new=pl.struct("value", "window").is_first_distinct()).filter(place >= 0.75)
    begun = (int(ends["new"].sum()) + 1) / max(ends.height, 1)
    return min(1.0, seen / max(rows * begun, 1.0))


def distinct_in_all(values: pl.Series, windows: pl.Series, share: float) -> float:
    """Estimate how many distinct values a table has, from those in windows that are this share of its rows or visits.

    Chao's estimator by incidence, extrapolated (Chao et al., Ecological Monographs 84, 2014, equation 18): what is seen
    in one window only tells how much is seen in none. Values that keep to a window grow with the share; those that come
    everywhere are all known. Nulls do not count.
    """
    frame = pl.DataFrame({"value": values, "window": windows}).drop_nulls().unique()
    windows_of = frame.group_by("value").len()["len"]
    seen = windows_of.len()
    once, twice = int((windows_of == 1).sum()), int((windows_of == 2).sum())
    number = windows.n_unique()
    if share >= 1 or not once or number < 2:
        return float(seen)
    unseen = (number - 1) / number * (once * once / (2 * twice) if twice else once * (once - 1) / 2)
    if not unseen:
        return float(seen)
    further = number * (1 / share - 1)
    found = unseen * (1 - (1 - once / (number * unseen + once)) ** further)
    return float(min(seen + found, seen / share))
