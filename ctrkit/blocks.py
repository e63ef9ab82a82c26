"""Training files: Parquet whose row groups are shuffle blocks, small because of how whole numbers are laid out.

Of a column's numbers, those in lists too, the lowest bytes of all stand first, then the next ones, and so on (the
encoding BYTE_STREAM_SPLIT): zstd packs that to a sixth less. polars reads it, but cannot write it.

Where lists begin and end is said for every value of every column (its levels: the definition and the repetition level
of Dremel's paper, which Parquet follows). The columns of a block have few distinct lengths of lists between them, so
the levels are made once for all columns of the same lengths; making them was half the time of other writers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow
import zstandard

from ctrkit import thrift
from ctrkit.files import write_back
from ctrkit.spool import Ints, whole
from ctrkit.thrift import BINARY, I32, I64, LIST, STRUCT, items, struct

MAGIC = b"PAR1"
# Numbers that the format gives its types, encodings and codecs.
BOOLEAN, INT32, INT64, BYTE_ARRAY = 0, 1, 2, 6
PLAIN, RLE, BYTE_STREAM_SPLIT = 0, 3, 9
DATA_PAGE, ZSTD, LISTS, REQUIRED, REPEATED = 0, 6, 3, 0, 2
KINDS: dict[Any, tuple[int, int | None]] = {
    pl.String: (BYTE_ARRAY, 0),
    pl.Boolean: (BOOLEAN, None),
    pl.Date: (INT32, 6),
    pl.UInt8: (INT32, 11),
    pl.UInt16: (INT32, 12),
    pl.UInt32: (INT32, 13),
    pl.UInt64: (INT64, 14),
    pl.Int8: (INT32, 15),
    pl.Int16: (INT32, 16),
    pl.Int32: (INT32, None),
    pl.Int64: (INT64, None),
}
"""Type of a column → how its values lie, and what they mean, where that is something else."""
LEVEL = 1
"""Of zstd."""


def write_blocks(frame: pl.DataFrame, path: Path, rows: int) -> None:
    """Write a Parquet file with `rows` rows in a row group, whole or not at all.

    frame: columns of texts, dates, Booleans and whole numbers, and of lists of them, and lists of lists; none of them
    null, which raises ValueError.
    """
    columns = [_Column(name, dtype) for name, dtype in frame.schema.items()]
    arrays = [c.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()) for c in frame.get_columns()]
    with whole(path) as tmp, open(tmp, "wb") as f:
        f.write(MAGIC)
        groups = []
        for start in range(0, frame.height, rows):
            some = [array.slice(start, rows) for array in arrays]
            groups.append(_write_row_group(f, columns, some, min(rows, frame.height - start)))
        root = struct((4, BINARY, b"schema"), (5, I32, len(columns)))
        footer = struct(
            (1, I32, 2),
            (2, LIST, items(STRUCT, [root, *(element for column in columns for element in column.schema())])),
            (3, I64, frame.height),
            (4, LIST, items(STRUCT, groups)),
            (6, BINARY, b"ctrkit"),
        )
        f.write(footer + len(footer).to_bytes(4, "little") + MAGIC)
    write_back(path)


class _Column:
    def __init__(self, name: str, dtype: Any) -> None:
        self.path = [name]
        """Names from the column to its values."""
        while isinstance(dtype, pl.List):
            dtype, self.path = dtype.inner, [*self.path, "list", "element"]
        self.names = items(BINARY, [part.encode() for part in self.path])
        self.physical, self.meaning = KINDS[dtype]

    def schema(self) -> list[bytes]:
        """Return the footer's elements for the column, the outer ones first."""
        elements = []
        for name in self.path[:-1:2]:
            elements.append(struct((3, I32, REQUIRED), (4, BINARY, name.encode()), (5, I32, 1), (6, I32, LISTS)))
            elements.append(struct((3, I32, REPEATED), (4, BINARY, b"list"), (5, I32, 1)))
        meaning = [] if self.meaning is None else [(6, I32, self.meaning)]
        values = struct((1, I32, self.physical), (3, I32, REQUIRED), (4, BINARY, self.path[-1].encode()), *meaning)
        return [*elements, values]


def _write_row_group(f: BinaryIO, columns: Sequence[_Column], arrays: Sequence[pyarrow.Array], rows: int) -> bytes:
    """Write a row group; return what the footer says of it."""
    pack = zstandard.ZstdCompressor(level=LEVEL).compress
    known: dict[tuple[bytes, ...], tuple[bytes, int]] = {}
    chunks, total = [], 0
    for column, array in zip(columns, arrays, strict=True):
        lengths, values = _opened(array)
        key = tuple(some.tobytes() for some in lengths)
        if key not in known:
            known[key] = _levels(rows, lengths)
        levels, entries = known[key]
        encoding, data = _encoded(values)
        page = levels + data
        packed = pack(page)
        about = struct((1, I32, entries), (2, I32, encoding), (3, I32, RLE), (4, I32, RLE))
        header = struct((1, I32, DATA_PAGE), (2, I32, len(page)), (3, I32, len(packed)), (5, STRUCT, about))
        chunk = struct(
            (1, I32, column.physical),
            (2, LIST, items(I32, [RLE, encoding])),
            (3, LIST, column.names),
            (4, I32, ZSTD),
            (5, I64, entries),
            (6, I64, len(header) + len(page)),
            (7, I64, len(header) + len(packed)),
            (9, I64, f.tell()),
        )
        chunks.append(struct((2, I64, 0), (3, STRUCT, chunk)))
        total += len(header) + len(page)
        f.write(header)
        f.write(packed)
    return struct((1, LIST, items(STRUCT, chunks)), (2, I64, total), (3, I64, rows))


def _opened(array: pyarrow.Array) -> tuple[list[Ints], pyarrow.Array]:
    """Return how long the lists of a column are, then those in them, and so on, and the values in the innermost."""
    lengths = []
    while pyarrow.types.is_large_list(array.type):
        if array.null_count:
            raise ValueError("a list is null")
        offsets = array.offsets.to_numpy()
        lengths.append(np.diff(offsets))
        array = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    if array.null_count:
        raise ValueError("a value is null")
    return lengths, array


def _levels(rows: int, lengths: Sequence[Ints]) -> tuple[bytes, int]:
    """Return the encoded levels of columns of such lengths, and how many entries they have: one a value, and one a
    list that is empty.

    An entry's repetition level is the depth of the list that it goes on with, 0 at the begin of a row; its definition
    level is the number of lists around it that have something in them.
    """
    repeated, defined = np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
    for depth, of_lists in enumerate(lengths, 1):
        entries = np.ones(len(defined), np.int64)
        lists = np.flatnonzero(defined == depth - 1)
        entries[lists] = np.maximum(of_lists, 1)
        defined[lists[of_lists > 0]] = depth
        begins = np.cumsum(entries) - entries
        before, repeated = repeated, np.full(int(entries.sum()), depth, np.uint8)
        repeated[begins] = before
        defined = np.repeat(defined, entries)
    if not lengths:
        return b"", rows
    bits = len(lengths).bit_length()
    encoded = [_hybrid(levels, bits) for levels in (repeated, defined)]
    return b"".join(len(some).to_bytes(4, "little") + some for some in encoded), len(defined)


def _hybrid(levels: Ints, bits: int) -> bytes:
    """Encode levels in so many bits each: as one run, or all packed (the format's RLE/bit-packing hybrid)."""
    if len(levels) and (levels == levels[0]).all():
        return thrift.varint(len(levels) << 1) + bytes([levels[0]])
    padded = np.zeros(-(-len(levels) // 8) * 8, np.uint8)
    padded[: len(levels)] = levels
    flat = padded if bits == 1 else np.unpackbits(padded[:, None], axis=1, count=bits, bitorder="little")
    return thrift.varint(len(padded) // 8 << 1 | 1) + np.packbits(flat, bitorder="little").tobytes()


def _encoded(values: pyarrow.Array) -> tuple[int, bytes]:
    """Return the encoding of values without nulls, and their bytes."""
    if pyarrow.types.is_large_string(values.type):
        return PLAIN, _texts(values)
    if pyarrow.types.is_boolean(values.type):
        there = values.to_numpy(zero_copy_only=False)
        return PLAIN, np.packbits(there, bitorder="little").tobytes()
    if pyarrow.types.is_date(values.type):
        values = values.cast(pyarrow.int32())
    numbers = values.to_numpy()
    return BYTE_STREAM_SPLIT, _split(numbers.astype("<i8" if numbers.itemsize == 8 else "<i4", copy=False))


def _split(numbers: Ints) -> bytes:
    """Return the lowest bytes of all numbers, then the next ones, and so on; most numbers have zeros in the highest."""
    size = numbers.itemsize
    planes = np.zeros((size, len(numbers)), np.uint8)
    unsigned = numbers.view(f"<u{size}")
    highest = int(unsigned.max(initial=0))
    raw = unsigned.view(np.uint8)
    for i in range(-(-highest.bit_length() // 8)):
        planes[i] = raw[i::size]
    return planes.tobytes()


def _texts(values: pyarrow.Array) -> bytes:
    """Return each text's length in bytes, UInt32, and the text."""
    _, offsets, data = values.buffers()
    if not len(values):
        return b""
    ends = np.frombuffer(offsets, np.int64, len(values) + 1, 8 * values.offset)
    raw = np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]
    lengths = np.diff(ends)
    if (lengths == lengths[0]).all():  # a table of lengths and texts
        heads = lengths.astype("<u4").view(np.uint8).reshape(-1, 4)
        return np.concatenate([heads, raw.reshape(len(lengths), int(lengths[0]))], axis=1).tobytes()
    out = np.empty(len(raw) + 4 * len(lengths), np.uint8)
    heads = ends[:-1] - ends[0] + 4 * np.arange(len(lengths))
    is_text = np.ones(len(out), bool)
    for i in range(4):
        out[heads + i] = (lengths >> 8 * i).astype(np.uint8)
        is_text[heads + i] = False
    out[is_text] = raw
    return out.tobytes()
