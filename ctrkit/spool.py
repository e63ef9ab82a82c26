"""Intermediate tables of the data stages: rows dealt to partitions, ids as small numbers, read without copying.

A *chunk* is what one piece of a raw file becomes. Its rows lie in order of their partition, so that a partition's are
one slice of every chunk. A *code* stands for a text: 0 for a missing one, k for the k-th of the chunk's dictionary.
"""

import contextlib
import functools
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash
import pyarrow
import pyarrow.ipc

from ctrkit import numba_loops

Ints = npt.NDArray[np.integer[Any]]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then takes the place of `path`: a task may be done twice, even at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield tmp
        tmp.replace(path)
    except BaseException:  # a full disk, say, whose room is needed
        tmp.unlink(missing_ok=True)
        raise


def write_frame(path: Path | str, frame: pl.DataFrame) -> None:
    """Write a frame as Arrow IPC, uncompressed, in one batch, so that `mapped_frame` needs no copy of it."""
    with whole(Path(path)) as tmp:
        frame.write_ipc(tmp, compression="uncompressed", record_batch_size=max(1, frame.height))


def mapped_frame(path: Path | str) -> pl.DataFrame:
    """Return what `write_frame` wrote, mapped into memory: what is not looked at is not read, and what was read is the
    page cache's to drop. (`pl.read_ipc` copies all of it.) The file may be removed, but not written, meanwhile."""
    with pyarrow.memory_map(str(path)) as file:
        frame = pl.from_arrow(pyarrow.ipc.open_file(file).read_all())
    assert isinstance(frame, pl.DataFrame)
    return frame


@functools.lru_cache(maxsize=4096)
def mapped(path: str) -> pl.Series:
    """Return the only column of a frame, mapped into memory; remembered, since every partition takes its part of it."""
    return mapped_frame(path).to_series()


def write_array(path: Path | str, array: Ints) -> None:
    """Write the bytes of an array; `np.fromfile` reads them."""
    with whole(Path(path)) as tmp, open(tmp, "wb") as f:
        _write_bytes(f, array)


def _write_bytes(f: BinaryIO, array: Ints) -> None:
    """Write the bytes of an array. Its own `tofile` tells nothing if the disk is full at the last ones."""
    f.write(np.ascontiguousarray(array).data)


def hashes(texts: pl.Series) -> pl.Series:
    """Return the xxhash64 (UInt64) of each text: the same everywhere and in every version."""
    return texts.to_frame("t").select(polars_hash.col("t").nchash.xxhash64().alias(texts.name)).to_series()


def partition_of(texts: pl.Series, partitions: int) -> Ints:
    """Return the partition (UInt16) of each text or whole number, which counts as its text."""
    if partitions == 1:
        return np.zeros(texts.len(), np.uint16)
    return (hashes(texts.cast(pl.String)) % partitions).cast(pl.UInt16).to_numpy()


NULL = (1 << 32) - 1
AT_ONCE = 1 << 17
"""Texts that are turned into numbers together, so that memory does not hold all of what is made on the way."""
RANGE = 1 << 20
"""Numbers that lie this close together are coded by a table."""
TAKEN = {np.dtype(dtype).itemsize: np.dtype(dtype) for dtype in (np.uint8, np.uint16, np.uint32, np.int64)}
"""Bytes of a value → the type that `take` has a loop for, of values and of places."""
MANY = 1 << 13
"""Rows from which on a compiled loop is worth that it is loaded."""
SAMPLE, FEW = 2048, 512
"""A column is taken to have few distinct texts if so many rows of it have."""


def smallest(size: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest unsigned type that holds 0 to size − 1."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if size <= np.iinfo(dtype).max + 1:
            return dtype
    return np.uint64


def code(values: pl.Series) -> tuple[Ints, pl.Series]:
    """Return the code of each text or whole number (0: null), and the dictionary: each distinct one, by code from 1."""
    if values.dtype == pl.Int64 and values.len():
        low, high = (int(str(v or 0)) for v in (values.min(), values.max()))
        if high - low < max(RANGE, 4 * values.len()):
            return _code_range(values, low, high)
    few = values.dtype == pl.String and values.head(SAMPLE).n_unique() <= FEW
    codes, first = _code_few(values) if few else _code_many(values)
    return codes.astype(smallest(len(first) + 1), copy=False), values.gather(first).rename("value")


def _code_range(values: pl.Series, low: int, high: int) -> tuple[Ints, pl.Series]:
    """Return codes and dictionary of numbers from a small range, by a table of that range."""
    place = values.fill_null(low - 1).to_numpy() - (low - 1)  # 0: null
    there = np.zeros(high - low + 2, bool)
    there[place] = True
    there[0] = False
    words = np.flatnonzero(there) + (low - 1)
    codes = np.cumsum(there, dtype=np.uint32).astype(smallest(len(words) + 1))
    codes[0] = 0
    return codes[place], pl.Series("value", words, dtype=pl.Int64)


def code_ranges(parts: Iterable[pl.Series]) -> tuple[Iterator[Ints], pl.Series] | None:
    """Return what `code` would give of the whole numbers of all parts (Int64, without nulls), the codes (UInt32) part
    by part; None where they are not from a small range. Goes through the parts three times and holds none of them."""
    full = [(int(p.min()), int(p.max()), len(p)) for p in (part.to_numpy() for part in parts) if len(p)]
    if not full:
        return None
    low, high = min(a for a, _, _ in full), max(b for _, b, _ in full)
    if high - low >= max(RANGE, 4 * sum(n for _, _, n in full)):
        return None
    there = np.zeros(high - low + 1, bool)
    for part in parts:
        there[part.to_numpy() - low] = True
    codes = np.cumsum(there, dtype=np.uint32)
    words = pl.Series("value", np.flatnonzero(there) + low, dtype=pl.Int64)
    return (codes[part.to_numpy() - low] for part in parts), words


def _code_few(texts: pl.Series) -> tuple[Ints, Ints]:
    """Return codes, and the first row of each: polars' own, given in order of appearance; fast for few texts."""
    codes = texts.cast(pl.Categorical(pl.Categories.random())).to_physical()
    numbers: Ints = codes.fill_null(NULL).to_numpy() + np.uint32(1) if texts.null_count() else codes.to_numpy() + 1
    highest = np.maximum.accumulate(numbers)
    return numbers, np.flatnonzero(np.diff(highest, prepend=np.uint32(0)))


def _code_many(texts: pl.Series) -> tuple[Ints, Ints]:
    """Return codes, and the first row of each: by a radix sort of 48 bits of a hash, checked against the texts."""
    hashed = texts.hash().to_numpy()
    digits = np.ascontiguousarray(hashed.view(np.uint16).reshape(-1, 4)[:, 1:].T)
    order = np.argsort(digits[0], kind="stable")
    for digit in digits[1:]:
        order = order[np.argsort(digit[order], kind="stable")]
    del digits  # each is as long as the texts are many, and what follows needs as much again
    ordered = hashed[order] >> np.uint64(16)
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    del hashed, ordered
    first = order[new]
    codes = np.empty(len(order), np.uint32)
    codes[order] = np.cumsum(new, dtype=np.uint32)
    del order, new
    if not texts.gather(first).gather(codes - 1).equals(texts):  # two of one hash
        return _code_few(texts.cast(pl.String))
    if texts.null_count():
        null = codes[texts.is_null().arg_max() or 0]
        first = np.delete(first, null - 1)
        codes = np.where(codes == null, 0, codes - (codes > null))
    return codes, first


def order_by(keys: Sequence[tuple[Ints, int]], rows: int) -> Ints:
    """Return the stable order of rows by several non-negative keys, the first weighing most.

    keys: each with a bound that none of its values reaches. A radix sort, 16 bits at a time.
    """
    order: Ints | None = None
    for key, bound in reversed(keys):
        for shift in range(0, max(1, (bound - 1).bit_length()), 16):
            digit = (key >> shift if shift else key).astype(np.uint16)
            if order is None:
                order = np.argsort(digit, kind="stable")
            else:
                order = order[np.argsort(digit[order], kind="stable")]
    return np.arange(rows) if order is None else order


def text_order(texts: pl.Series) -> Ints:
    """Return the order of texts by their bytes: by the first eight as a number, then those that share them."""
    key = np.empty(texts.len(), np.uint64)
    for begin in range(0, len(key), AT_ONCE):
        padded = (texts.slice(begin, AT_ONCE) + "\0" * 8).cast(pl.Binary).bin.slice(0, 8)
        key[begin : begin + AT_ONCE] = padded.bin.reinterpret(dtype=pl.UInt64, endianness="big").to_numpy()
    order = pl.Series(key).arg_sort().to_numpy()
    ordered = key[order]
    again = np.zeros(len(order) + 1, bool)
    again[1:-1] = ordered[1:] == ordered[:-1]
    tied = np.flatnonzero(again[:-1] | again[1:])
    if len(tied):
        rows = order[tied]
        some = pl.DataFrame({"key": key[rows], "text": texts.gather(rows), "row": rows}).sort("key", "text")
        order = np.array(order)
        order[tied] = some["row"].to_numpy()
    return order


def take(values: Ints, places: Ints) -> Ints:
    """Return `values[places]`, a copy, in a third of the time where there are many; they are not checked then."""
    code = numba_loops.load("ctrkit.compiled_take") if len(places) >= MANY else None
    if code is None or places.dtype not in TAKEN.values() or not values.flags.c_contiguous:
        return values[places]
    out = np.empty(len(places), values.dtype)
    dtype = TAKEN[values.itemsize]
    code.take(values.view(dtype), np.ascontiguousarray(places), out.view(dtype))
    return out


def offsets(parts: Ints, partitions: int) -> list[int]:
    """Return where each partition begins among rows in order of their partition; `partitions` + 1 numbers."""
    return [0, *np.cumsum(np.bincount(parts, minlength=partitions)).tolist()]


Layout = dict[str, tuple[str, int]]
"""Columns of a spool file: type, byte at which the column begins."""


def write(path: Path, columns: Mapping[str, Ints]) -> Layout:
    """Write columns of numbers, one after the other; return their layout, a JSON value."""
    layout: Layout = {}
    with whole(path) as tmp, open(tmp, "wb") as f:
        for name, column in columns.items():
            f.write(bytes(-f.tell() % column.itemsize))
            layout[name] = (column.dtype.str, f.tell())
            _write_bytes(f, column)
    return layout


class Columns(Mapping[str, Ints]):
    """Rows `begin` to `end` of the columns of a spool file, mapped into memory: what is not looked at is not read."""

    def __init__(self, path: Path, layout: Layout, begin: int, end: int) -> None:
        self._layout, self._begin, self._rows = layout, begin, end - begin
        self._bytes = np.memmap(path, np.uint8, "r") if end > begin else np.empty(0, np.uint8)

    def __getitem__(self, name: str) -> Ints:
        dtype, at = self._layout[name]
        offset = at + self._begin * np.dtype(dtype).itemsize
        return np.frombuffer(self._bytes, dtype, self._rows, offset) if self._rows else np.empty(0, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)
