"""Values of a binary Parquet column one at a time: what pyarrow and polars read by whole row groups only.

The headers of a column's pages tell which page has which rows. A value costs reading and unpacking its page, a
megabyte as polars writes it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from ctrkit.archive_file import ArchiveFile
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.parquet_footer import thrift_struct

CACHE_BYTES = 256 << 20
"""Unpacked pages that a process keeps, with what Python takes for their values."""
VALUE_BYTES = 192
"""A memoryview and where it is listed."""
TEXTS = 1 << 16
"""Rows whose texts are in memory at a time."""
HEADER_BYTES = 1 << 10
"""Of a page, read at first. Statistics may make its header longer."""
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8
DAMAGE = (OSError, ValueError, IndexError, KeyError, TypeError, pyarrow.ArrowException)
"""What broken files raise."""
Values = list[memoryview | None]


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a column chunk."""

    file: ArchiveFile
    offset: int
    """Of what follows the header."""
    packed: int
    unpacked: int
    """Bytes."""
    values: int
    """Rows, or entries of a dictionary; missing ones count."""
    codec: str
    """In which the values are packed; "" if they are not."""
    encoding: int
    levels: int
    """Bytes of definition levels before the values; −1: said before them."""
    max_level: int
    """Definition level of a value that is there."""
    dictionary: "Page | None"

    @property
    def held(self) -> int:
        """Bytes that the values take in memory."""
        return self.unpacked + VALUE_BYTES * self.values

    def read(self) -> Values:
        """Return the values; None where one is missing. Raises BadPicture if the file has changed, ValueError if it is
        damaged."""
        data = memoryview(self.file.read(self.offset, self.packed))
        before = max(self.levels, 0)
        body = data[before:]
        if self.codec:
            body = memoryview(pyarrow.decompress(body, self.unpacked - before, codec=self.codec)).cast("B")
        there = np.ones(self.values, dtype=np.bool_)
        if self.max_level:
            levels = data[:before]
            if self.levels < 0:
                length = int.from_bytes(body[:4], "little")
                levels, body = body[4 : 4 + length], body[4 + length :]
            there = _hybrid(levels, self.max_level.bit_length(), self.values) == self.max_level
        count = int(there.sum())
        if self.dictionary is None:
            found = _plain(body, count)
        else:
            entries = cache.values(self.dictionary)
            found = [entries[i] for i in _hybrid(body[1:], body[0], count).tolist()] if count else []
        if count == self.values:
            return found
        rest = iter(found)
        return [next(rest) if is_there else None for is_there in there.tolist()]


def _plain(data: memoryview, count: int) -> Values:
    values: Values = []
    at = 0
    for _ in range(count):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError("a value ends beyond its page")
        values.append(data[at + 4 : end])
        at = end
    return values


def _hybrid(data: memoryview, width: int, count: int) -> npt.NDArray[np.int64]:
    """Decode [count] numbers of `width` bits, in runs of equal ones and groups of eight packed ones."""
    out = np.zeros(count, dtype=np.int64)
    at = done = 0
    while done < count and width:
        head = shift = 0
        while True:
            byte = data[at]
            at += 1
            head |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        rest = count - done
        if head & 1:
            run_length = min((head >> 1) * 8, rest)
            length = (head >> 1) * width
            packed = np.frombuffer(data[at : at + length], dtype=np.uint8)  # the last group's end may be left out
            bits = np.unpackbits(packed, bitorder="little")[: run_length * width]
            run = bits.reshape(-1, width) @ (1 << np.arange(width, dtype=np.int64))
        else:
            run_length = min(head >> 1, rest)
            length = (width + 7) // 8
            run = np.full(run_length, int.from_bytes(data[at : at + length], "little"))
        if not run_length or len(run) < run_length:
            raise ValueError("runs of numbers end too early")
        out[done : done + run_length] = run
        at, done = at + length, done + run_length
    return out


class Cache:
    """The values of the pages that were read last."""

    def __init__(self) -> None:
        self._pages: OrderedDict[Page, Values] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def values(self, page: Page) -> Values:
        """Return the page's values."""
        with self._lock:
            if page in self._pages:
                self._pages.move_to_end(page)
                return self._pages[page]
        values = page.read()
        with self._lock:
            if page not in self._pages:
                self._pages[page] = values
                self._bytes += page.held
            while self._bytes > CACHE_BYTES and len(self._pages) > 1:
                self._bytes -= self._pages.popitem(last=False)[0].held
        return values


cache = Cache()


def pages(path: Path, column: str, key: str) -> Iterator[Page]:
    """Yield the data pages of a binary column, by rows; `key` of the recipe names it. Raises UserError."""
    file = ArchiveFile.open(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            metadata = parquet.metadata
            names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            number = _place_of(column, names, path, key)
            about = metadata.schema.column(number)
            if about.physical_type != "BYTE_ARRAY" or about.max_repetition_level:
                raise UsageError(f"{path}: column {column!r} ({key}) does not hold one value of bytes a row")
            if about.logical_type.type == "STRING" or about.converted_type == "UTF8":
                raise UsageError(f"{path}: column {column!r} ({key}) holds texts, and pictures are bytes; name another")
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                chunk = metadata.row_group(group).column(number)
                found = 0
                for page in _chunk_pages(file, chunk, about.max_definition_level):
                    found += page.values
                    yield page
                if found != rows:
                    raise ValueError("its pages do not have as many rows as its footer says")
    except DAMAGE as e:
        raise _damaged(path, e) from None


def texts(path: Path, column: str, key: str) -> Iterator[list[str | None]]:
    """Yield a column as texts, some rows at a time, `a.b` the field b of the struct a; `key` of the recipe names it.
    Raises UserError."""
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            schema = parquet.metadata.schema
            _place_of(column, [schema.column(i).path for i in range(parquet.metadata.num_columns)], path, key)
            for batch in parquet.iter_batches(TEXTS, columns=[column]):
                table = pyarrow.Table.from_batches([batch])
                while any(pyarrow.types.is_struct(field.type) for field in table.schema):
                    table = table.flatten()
                yield table.column(0).cast(pyarrow.string()).to_pylist()
    except DAMAGE as e:
        raise _damaged(path, e) from None


def _place_of(column: str, names: list[str], path: Path, key: str) -> int:
    if column not in names:
        raise UsageError(f"{path} has no column {column!r} ({key}){nearest(column, names)}")
    return names.index(column)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0] or type(error).__name__}")


def _chunk_pages(file: ArchiveFile, chunk: Any, max_level: int) -> Iterator[Page]:
    codec = {"UNCOMPRESSED": "", "LZ4": "lz4_raw"}.get(chunk.compression, chunk.compression.lower())
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        at = min(at, chunk.dictionary_page_offset)
    end = at + chunk.total_compressed_size
    dictionary: Page | None = None
    while at < end:
        header, length = _header(file, at)
        kind, unpacked, packed = header[1], header[2], header[3]
        inner = header.get({DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}.get(kind, -1))
        at += length + packed
        if inner is None:
            continue  # an index page
        v2 = kind == DATA_PAGE_V2
        encoding = inner[4 if v2 else 2]
        if kind == DICTIONARY_PAGE:
            encoding = PLAIN  # written as PLAIN_DICTIONARY by some
        if encoding not in (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY) or (kind == DATA_PAGE and inner[3] != RLE):
            raise UserError(
                f"{file.path}: column {chunk.path_in_schema!r} has an encoding (number {encoding}) that is not read "
                f"here; write the file again with plain encoding, as polars and pyarrow do by default"
            )
        page = Page(
            file,
            at - packed,
            packed,
            unpacked,
            inner[1],
            codec if not v2 or inner.get(7, True) else "",
            encoding,
            inner[5] + inner[6] if v2 else -1,
            0 if kind == DICTIONARY_PAGE else max_level,
            None if encoding == PLAIN else dictionary,
        )
        if kind == DICTIONARY_PAGE:
            dictionary = page
        else:
            yield page


def _header(file: ArchiveFile, at: int) -> tuple[dict[int, Any], int]:
    """Return the header of the page at an offset, and its length."""
    size = HEADER_BYTES
    while True:
        data = file.read(at, min(size, file.size - at))
        try:
            return thrift_struct(data)
        except IndexError:
            if size > file.size - at:
                raise ValueError("it is damaged, or cut off") from None
            size *= 16
