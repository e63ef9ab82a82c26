"""Raw files in pieces: cut at row boundaries, so that any file fits in memory, and read as text.

A piece is some megabytes of a CSV, TSV or JSONL file or some rows of a Parquet file; a compressed file or a URL is one
piece and comes as several frames. Whatever the size of the pieces, the rows are the same and in the same order.
"""

import contextlib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import zstandard

from ctrkit import parquet_footer
from ctrkit.csv_rows import SCAN_BYTES, Bytes, CsvRows
from ctrkit.errors import UserError
from ctrkit.sources import is_data, is_glob

PIECE_BYTES = 31 << 20
"""Below 32 MiB, above which the C library takes fresh memory for every piece (`engine.KEEP_MEMORY`)."""
PIECE_ROWS = 500_000
"""Of Parquet files."""
REMOTE_LINES = 200_000
"""Of a text file behind a URL that are read at a time."""
LONGEST_CELL = 1 << 20
"""Bytes after which a quoted cell with line breaks that has not ended is taken for a quote without its partner."""
ROW, EXTRA, BAD = "__row", "__extra", "__bad"
"""Columns of our own: row in the file (from 1), a cell beyond the header's columns, why a line cannot be read."""
UNIT = "\x1f"
"""Stands for a separator of several characters; joins texts that may hold anything else."""
BOM = b"\xef\xbb\xbf"
Text = tuple[bytes, bool]
"""Whole rows as UTF-8, and whether they are the file's first."""
_HALVES = re.compile(
    rb"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
"""In group 1 what is not half a character: a backslash, a whole one."""


@dataclass(frozen=True)
class File:
    """One raw file, and how to read it."""

    name: str
    """Below the raw folder, or a URL."""
    path: str
    format: str
    """csv, tsv, jsonl or parquet."""
    compression: str
    """"", .gz or .zst."""
    url: bool
    header: bool
    separator: str
    encoding: str
    parts: tuple[tuple[str, str], ...]
    """Columns that its path gives, such as ("day", "2024-03-01")."""

    @property
    def quoted(self) -> bool:
        """Whether a cell in double quotes may hold separators and line breaks."""
        return self.format in ("csv", "tsv") and len(self.separator) == 1

    @property
    def rows(self) -> CsvRows:
        """What finds the ends of rows, where there are quotes."""
        return CsvRows(self.separator, LONGEST_CELL)


@dataclass(frozen=True)
class Numbers:
    """Columns of text files that may be read as numbers."""

    any: frozenset[str] = frozenset()
    """As Float64: what is written how does not matter."""
    whole: frozenset[str] = frozenset()
    """As Int64: only where each is written as its text would be, so that 7 and 007 stay apart."""

    def __bool__(self) -> bool:
        return bool(self.any or self.whole)

    def dtype(self, column: str) -> type[pl.DataType]:
        """Return the type to read a column as."""
        return pl.Float64 if column in self.any else pl.Int64 if column in self.whole else pl.String


NONE = Numbers()


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes `begin` to `end` of plain text, those rows of Parquet, or all of it (`end` is None)."""

    begin: int = 0
    end: int | None = None


def cut(file: File) -> list[Piece]:
    """Cut a file into pieces that begin and end with whole rows."""
    if file.url or (file.compression and file.format != "parquet"):
        return [Piece()]
    try:
        if file.format == "parquet":
            return [Piece()] if file.compression else _cut_parquet(file)
        if not Path(file.path).stat().st_size:  # which cannot be mapped
            return [Piece(0, 0)]
        return _cut_text(np.asarray(np.memmap(file.path, np.uint8, "r")), file)
    except OSError as e:
        raise UserError(f"{file.path} cannot be read: {e.strerror}") from None


def _cut_parquet(file: File) -> list[Piece]:
    pieces, begin, end = [], 0, 0
    for rows in parquet_footer.row_groups(Path(file.path)):
        if end > begin and end - begin + rows > PIECE_ROWS:
            pieces.append(Piece(begin, end))
            begin = end
        end += rows
    return [*pieces, Piece(begin, end)]


def _cut_text(data: Bytes, file: File) -> list[Piece]:
    pieces, begin = [], 0
    while len(data) - begin > PIECE_BYTES:
        stop = begin + PIECE_BYTES
        if file.quoted:
            bom = len(BOM) if not begin and data[: len(BOM)].tobytes() == BOM else 0
            end = file.rows.end_after(data, begin + bom, min(max(stop, begin + bom + 1), len(data)))
        else:
            end = _line_end(data, stop)
        pieces.append(Piece(begin, end))
        begin = end
    return [*pieces, Piece(begin, len(data))] if len(data) > begin or not pieces else pieces


def _line_end(data: Bytes, at: int) -> int:
    """Return where the line with byte `at` ends."""
    for begin in range(at, len(data), SCAN_BYTES):
        length = data[begin : begin + SCAN_BYTES].tobytes().find(b"\n") + 1
        if length:
            return begin + length
    return len(data)


def frames(
    file: File,
    piece: Piece,
    header: Sequence[str],
    columns: Sequence[str],
    numbers: Numbers = NONE,
    text: Text | None = None,
    begin: int = 1,
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a piece: ROW Int64 (from 1 in the piece), EXTRA and BAD String, and `columns`.

    Parameters
    ----------
    header: all columns of the file, for CSV and TSV.
    columns: those to read; String for CSV and TSV, else as the file has them. A column that a JSON object or a path
        does not give is null.
    numbers: columns that CSV and TSV may give as numbers, where every cell is one or empty.
    text: one of `texts`, whose rows alone are wanted; `begin` is the number of the first.
    """
    with _unreadable(file):
        for frame in _raw_frames(file, piece, header, columns, numbers, text):
            lacking = [pl.lit(None, dtype=pl.String).alias(c) for c in (BAD, EXTRA, *columns) if c not in frame.columns]
            frame = frame.with_columns(*lacking).with_row_index(ROW, offset=begin)
            begin += frame.height
            yield frame.with_columns(pl.col(ROW).cast(pl.Int64)).select(ROW, EXTRA, BAD, *columns)


def head(file: File, size: int) -> tuple[bytes, bool]:
    """Return about the first `size` bytes of a text file, whole rows, as UTF-8; and whether that is all of it."""
    with _unreadable(file), _open(file) as f:
        data = f.read(size)
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0\0" in data[:1000]:
            raise UserError(
                f"{file.path} is not text in UTF-8 or another extension of ASCII (UTF-16, perhaps, or a binary file); "
                f"convert it first"
            )
        whole = len(data) < size
        if not whole:
            stop = data.rfind(b"\n") + 1
            data = data[: stop or len(data)]
        return _as_utf8(file, data, first=True), whole


def _open(file: File) -> IO[bytes]:
    if file.url:
        return io.BufferedReader(_RemoteText(file.path), 1 << 20)
    if file.compression == ".gz":
        return gzip.open(file.path, "rb")  # type: ignore[return-value]
    if file.compression == ".zst":
        return io.BufferedReader(_Zstandard(file.path), 1 << 20)
    return open(file.path, "rb")


class _Zstandard(io.RawIOBase):
    """The content of a .zst file of any number of frames. EOFError where the last ends early."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._waiting:
            data = self._frame.unused_data if self._frame.eof else self._file.read(1 << 20)
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
                data = data or self._file.read(1 << 20)
            if not data:
                if self._begun:
                    raise EOFError("it ends early")
                return 0
            self._begun = True
            self._waiting = self._frame.decompress(data)
        n = min(len(buffer), len(self._waiting))
        buffer[:n], self._waiting = self._waiting[:n], self._waiting[n:]
        return n


_BROKEN = (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeError)


@contextlib.contextmanager
def _unreadable(file: File) -> Iterator[None]:
    """Turn a library's error into one about the file."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, *_BROKEN) as e:
        if file.url:
            raise _remote_error(file.path, e) from None
        first = (str(e).strip() or type(e).__name__).split("\n")[0]
        hint = "Is it whole, and is its compression what its name says?" if file.compression else "Is it whole?"
        raise UserError(f"{file.path} cannot be read as {file.format.upper()}: {first}. {hint}") from None


def _raw_frames(
    file: File, piece: Piece, header: Sequence[str], columns: Sequence[str], numbers: Numbers, text: Text | None
) -> Iterator[pl.DataFrame]:
    parts = [pl.lit(value).alias(name) for name, value in file.parts if name in columns]
    inner = [c for c in columns if c not in dict(file.parts)]
    if file.url and file.format == "parquet":
        yield from (f.with_columns(parts) for f in _remote_frames(file, inner))
    elif file.format == "parquet":
        yield from (f.with_columns(parts) for f in _parquet_frames(file, piece, inner))
    else:
        for data, first in _text(file, piece) if text is None else (text,):
            if file.format == "jsonl":
                yield _json_frame(data, inner).with_columns(parts)
            else:
                yield csv_frame(file, data, first, header, inner, numbers).with_columns(parts)


def texts(file: File, piece: Piece) -> Iterator[Text]:
    """Yield the text of a piece of a file that is not Parquet."""
    with _unreadable(file):
        yield from _text(file, piece)


def _text(file: File, piece: Piece) -> Iterator[Text]:
    """Yield whole rows of text as UTF-8, and whether they are the file's first."""
    if not file.compression and not file.url:
        with open(file.path, "rb") as f:
            f.seek(piece.begin)
            assert piece.end is not None
            yield _as_utf8(file, f.read(piece.end - piece.begin), piece.begin == 0), piece.begin == 0
        return
    with _open(file) as f:
        rest, first = b"", True
        while True:
            data = f.read(PIECE_BYTES)
            buffer = rest + data
            end = len(buffer) if not data else last_row_end(file, buffer, first)
            if end:
                yield _as_utf8(file, buffer[:end], first), first
                first = False
            rest = buffer[end:]
            if not data:
                return


def last_row_end(file: File, data: bytes, first: bool = True) -> int:
    """Return where the last row of a text that may go on ends; 0 if none does.

    first: whether the file begins with it.
    """
    if not file.quoted or b'"' not in data:
        return data.rfind(b"\n") + 1
    bom = len(BOM) if first and data.startswith(BOM) else 0
    return file.rows.last_end(np.frombuffer(data, np.uint8)[bom:]) + bom


def _as_utf8(file: File, data: bytes, first: bool) -> bytes:
    if first:
        data = data.removeprefix(BOM).lstrip(b"\r\n")
    if file.encoding.lower().replace("-", "").replace("_", "") not in ("utf8", "ascii"):
        data = data.decode(file.encoding, errors="replace").encode()
    if len(file.separator) > 1:
        data = data.replace(file.separator.encode(), UNIT.encode())
    return data


def csv_frame(
    file: File,
    data: bytes,
    first: bool,
    header: Sequence[str],
    columns: Sequence[str],
    numbers: Numbers = NONE,
) -> pl.DataFrame:
    """Return the rows of CSV text: `columns` and EXTRA, and BAD where some cannot be read.

    first: whether the text begins with the file's header, if it has one.
    """
    skip = 1 if first and file.header else 0
    wanted = [*dict.fromkeys(columns), EXTRA]
    header_end = data.find(b"\n") + 1 or len(data)
    if len(data) <= (header_end if skip else 0):
        return pl.DataFrame(schema=dict.fromkeys(wanted, pl.String))
    quoted = file.quoted and b'"' in data
    if quoted and not file.rows.tidy(np.frombuffer(data, np.uint8)):
        return _odd_rows(file, data, skip, header, wanted)
    try:
        return _regular_rows(file, data, skip, header, wanted, numbers)
    except pl.exceptions.ComputeError:
        if not quoted:
            raise
        return _odd_rows(file, data, skip, header, wanted)


def _regular_rows(
    file: File, data: bytes, skip: int, header: Sequence[str], wanted: Sequence[str], numbers: Numbers = NONE
) -> pl.DataFrame:
    if numbers and not (numbers.whole and _odd_numbers(data, file)):
        with contextlib.suppress(pl.exceptions.ComputeError):
            return _scan_csv(data, file, header, skip, numbers=numbers).select(wanted).collect()
    try:
        return _scan_csv(data, file, header, skip).select(wanted).collect()
    except pl.exceptions.ComputeError as e:
        if "utf-8" not in str(e):
            raise
        frame = _scan_csv(data, file, header, skip, lossy=True).select(wanted).collect()
        broken = pl.any_horizontal(pl.col(wanted).str.contains("\ufffd", literal=True))
        return frame.with_columns(pl.when(broken).then(pl.lit("not text in UTF-8")).alias(BAD))


def _odd_rows(file: File, data: bytes, skip: int, header: Sequence[str], wanted: Sequence[str]) -> pl.DataFrame:
    """Read text some of whose rows have quotes in odd places: each of those is read by itself.

    In the text for polars, which reads all others at once, a row with one cell too many stands for such a row.
    """
    word = next(w for n in itertools.count() if (w := f"\x1e{n}").encode() not in data)
    stand_in = (file.separator * len(header) + word + "\n").encode()
    regular: list[bytes] = []
    odd: list[tuple[list[str], str | None]] = []
    text = np.frombuffer(data, np.uint8)
    for row in file.rows.rows(text, file.rows.first(text).end if skip else 0, len(data)):
        some = data[row.begin : row.end]
        regular.append(some if row.kind == "regular" else stand_in)
        if row.kind != "regular":
            odd.append(_odd_cells(file, some, row.kind))
    at = {name: i for i, name in enumerate([*header, EXTRA])}
    own = {c: [cells[at[c]] or None if at[c] < len(cells) else None for cells, _ in odd] for c in wanted}
    own[BAD] = [why for _, why in odd]
    frame = _regular_rows(file, b"".join(regular), 0, header, wanted)
    if BAD not in frame.columns:
        frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias(BAD))
    places = (frame[EXTRA] == word).arg_true()
    return frame.with_columns(frame[c].scatter(places, pl.Series(own[c], dtype=pl.String)) for c in own)


def _odd_cells(file: File, row: bytes, kind: str) -> tuple[list[str], str | None]:
    """Return the cells of a row with quotes in odd places, as other readers of CSV read it, and why it is bad."""
    cells = file.rows.cells(row) if kind == "odd" else None
    try:
        row.decode()
    except UnicodeError:
        return cells or [], "not text in UTF-8"
    if cells is None:
        return [], "a quote without its partner" if kind == "bad" else "not a line of CSV"
    return cells, None


def _odd_numbers(data: bytes, file: File) -> bool:
    """Say whether some cell may be a whole number that is not written as usual (007, +7, -0, with blanks or quotes)."""
    if b'"' in data or len(file.separator) > 1:
        return True
    if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
        return True
    separator = np.uint8(ord(file.separator))
    ends = b"\n" + data[:SCAN_BYTES], data[-SCAN_BYTES:] + b"\nx"
    return any(_begins_oddly(np.frombuffer(some, np.uint8), separator) for some in (*ends, data))


def _begins_oddly(values: Any, separator: np.uint8) -> bool:
    for begin in range(0, len(values) - 2, SCAN_BYTES):
        some = values[begin : begin + SCAN_BYTES + 2]
        before, first, second = some[:-2], some[1:-1], some[2:]
        odd = (second - np.uint8(ord("0"))) < 10
        odd &= first == ord("0")
        odd |= (first == ord("-")) & (second == ord("0"))
        odd |= first == ord("+")
        odd |= first == ord(" ")
        odd &= (before == separator) | (before == ord("\n"))
        if odd.any():
            return True
    return False


def _scan_csv(
    data: bytes,
    file: File,
    header: Sequence[str],
    skip: int,
    *,
    lossy: bool = False,
    numbers: Numbers = NONE,
) -> pl.LazyFrame:
    return pl.scan_csv(
        data,
        has_header=False,
        skip_rows=skip,
        separator=file.separator if len(file.separator) == 1 else UNIT,
        quote_char='"' if file.quoted else None,
        schema={c: numbers.dtype(c) for c in [*header, EXTRA]},
        missing_columns="insert",
        extra_columns="ignore",
        encoding="utf8-lossy" if lossy else "utf8",
        glob=False,
    )


def json_frame(data: bytes) -> pl.DataFrame:
    """Return the objects of JSON lines, all their keys as columns."""
    data = _whole_characters(data)
    try:
        return pl.read_ndjson(data, infer_schema_length=None)
    except (pl.exceptions.PolarsError, UnicodeError):
        return _json_lines(data)[0]


def _json_frame(data: bytes, columns: Sequence[str]) -> pl.DataFrame:
    bad: list[str | None] | None = None
    data = _whole_characters(data)
    try:
        frame = pl.read_ndjson(data, infer_schema_length=None) if data.strip() else pl.DataFrame()
        if frame.height != data.count(b"\n") + (not data.endswith(b"\n")):
            raise pl.exceptions.ComputeError("blank lines")
    except (pl.exceptions.PolarsError, UnicodeError):
        frame, bad = _json_lines(data)
    found = frame.select(c for c in columns if c in frame.columns)
    if not found.width:  # rows without any of the columns are rows all the same
        found = pl.select(pl.repeat(None, frame.height, dtype=pl.String).alias(EXTRA))
    return found.with_columns(pl.Series(BAD, bad, dtype=pl.String)) if bad is not None else found


def _whole_characters(data: bytes) -> bytes:
    """Put U+FFFD for halves of characters in JSON (a \\ud83d alone), which other languages write and no UTF-8 has."""
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    return _HALVES.sub(lambda found: found[1] or b"\\ufffd", data)


def _json_lines(data: bytes) -> tuple[pl.DataFrame, list[str | None]]:
    """Read JSON lines of which some cannot be read: those become rows of nulls, with the reason."""
    good: list[bytes] = []
    bad: list[str | None] = []
    lines = data.split(b"\n")
    for line in lines[: -1 if lines[-1] == b"" else None]:
        why = None
        try:
            if not isinstance(json.loads(line), dict):
                why = "not a JSON object"
        except (ValueError, RecursionError):
            why = "an empty line" if not line.strip() else "not a line of JSON"
        good.append(b"{}" if why else line)
        bad.append(why)
    try:
        frame = pl.read_ndjson(b"\n".join(good), infer_schema_length=None)
    except pl.exceptions.PolarsError:  # types that do not fit each other: all as text
        rows = [{k: _json_text(v) for k, v in json.loads(line).items()} for line in good]
        names = dict.fromkeys(k for row in rows for k in row)
        frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String))
    if frame.height != len(good):
        frame = pl.select(pl.repeat(None, len(good), dtype=pl.String).alias(EXTRA))
    return frame, bad


def _json_text(value: object) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)


def parquet_source(file: File) -> Path | io.BytesIO:
    """Return what polars can read a Parquet file from; one that was compressed once more is unpacked in memory."""
    if not file.compression:
        return Path(file.path)
    with _unreadable(file), _open(file) as f:
        return io.BytesIO(f.read())


def _parquet_frames(file: File, piece: Piece, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    scan = pl.scan_parquet(parquet_source(file), hive_partitioning=False, glob=False)
    rows = int(scan.select(pl.len()).collect().item()) if piece.end is None else piece.end
    for begin in range(piece.begin, rows, PIECE_ROWS):
        some = scan.slice(begin, min(PIECE_ROWS, rows - begin))
        if columns:
            yield some.select(columns).collect()
        else:
            yield pl.select(pl.repeat(None, min(PIECE_ROWS, rows - begin), dtype=pl.String).alias(EXTRA))


# --- URLs --------------------------------------------------------------------------------------------------------


def remote(file: File) -> pl.LazyFrame:
    """Return the scan of a Parquet file behind a URL."""
    return pl.scan_parquet(file.path, hive_partitioning=False, glob=False)


def remote_columns(file: File) -> list[str]:
    """Return the columns of a Parquet file behind a URL."""
    if file.compression:
        raise UserError(f"{file.path}: a Parquet file within {file.compression} is read from disk only")
    with _unreadable(file):
        return remote(file).collect_schema().names()


def remote_files(url: str) -> list[str]:
    """Return the URLs, in order, that a URL with wildcards or of a folder (it ends with /) stands for."""
    if url.startswith(("http://", "https://")) or not (is_glob(url) or url.endswith("/")):
        return [url]
    try:
        scan = pl.scan_csv(url, has_header=False, schema={"line": pl.String})
        node = scan._ldf.visit().view_current_node()  # a scan of the files found, or of nothing
        found = sorted(str(path) for path in getattr(node, "paths", ()))
    except (pl.exceptions.PolarsError, OSError) as e:
        raise _remote_error(url, e) from None
    if url.endswith("/"):
        found = [path for path in found if is_data(path.removeprefix(url))]
    if not found:
        raise UserError(f"no file matches {url}; check the bucket and the names, `aws s3 ls` shows them")
    return found


def _remote_frames(file: File, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    scan = remote(file)
    if columns:
        yield from scan.select(columns).collect_batches(chunk_size=PIECE_ROWS, maintain_order=True)
    else:
        rows = int(scan.select(pl.len()).collect().item())
        yield pl.select(pl.repeat(None, rows, dtype=pl.String).alias(EXTRA))


class _RemoteText(io.RawIOBase):
    """The lines of a text file behind a URL, compressed or not."""

    def __init__(self, url: str) -> None:
        lines = pl.scan_lines(url, glob=False)
        self._batches = iter(lines.collect_batches(chunk_size=REMOTE_LINES, maintain_order=True))
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._waiting:
            batch = next(self._batches, None)
            if batch is None:
                return 0
            if batch.height:
                self._waiting = memoryview(batch.select(pl.col("line").str.join("\n")).item().encode() + b"\n")
        n = min(len(buffer), len(self._waiting))
        buffer[:n], self._waiting = self._waiting[:n], self._waiting[n:]
        return n


def _remote_error(url: str, error: Exception) -> UserError:
    """Say in a paragraph why a URL cannot be read."""
    text = str(error)
    if "NoSuchBucket" in text:
        return UserError(f"{url} cannot be read: there is no bucket of this name")
    if isinstance(error, FileNotFoundError) or "expanded paths were empty" in text:
        return UserError(f"{url} is not there; check the bucket and the name, `aws s3 ls` shows them")
    if "//169.254.169.254/" in text:  # where credentials are asked for when there are none
        return UserError(
            f"{url} cannot be read: the environment has no credentials for it, such as AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY (docs/clusters.md)"
        )
    if "invalid utf8" in text:
        return UserError(f"{url} is not text in UTF-8; copy it here, and name its encoding, to have it read")
    first = text.strip().split("\n")[0].split(" (path: ")[0].removeprefix("object-store error: ")
    return UserError(
        f"{url} cannot be read: {first}. Is it whole, can its server be reached from here, and may you read it? "
        f"Credentials come from the environment (docs/clusters.md)"
    )
