"""Files of vectors that were made elsewhere, each vector with an id: Parquet, NPY, HDF5, and the Amazon binary.

They are read in batches, so that a file may be larger than memory.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.features import runs

Int = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npy": "npy",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".hdf": "hdf5",
    ".b": "amazon",
}
BATCH_BYTES = 8 << 20
"""Of vectors as float64 that are read at a time."""
BATCH_IDS = 1 << 16
AMAZON = np.dtype([("id", "S10"), ("vector", "<f4", (4096,))])
"""A record of the image features of the Amazon product data: the asin, and 4,096 numbers."""


@dataclass(frozen=True)
class Batch:
    """Some of the vectors that were asked for."""

    begin: int
    """Place of the first among those asked for."""
    vectors: Numbers
    """[n, width]."""
    faults: dict[int, str]
    """Place in this batch → why there is no vector; its numbers mean nothing."""


class VectorFile(ABC):
    """Vectors with ids.

    Attributes: `path`; `rows`; `width`, 0 where no row has a vector; `dtype`, of the numbers.
    """

    path: Path
    rows: int
    width: int
    dtype: str

    @abstractmethod
    def ids(self) -> Iterator[pl.Series]:
        """Yield the ids of all rows in order, as String, null where there is none."""

    @abstractmethod
    def read(self, rows: Int) -> Iterator[Batch]:
        """Yield the vectors of `rows` [n], which rise, in order."""


class _Matrix(VectorFile):
    """Vectors that are the rows of an array or of a data set of HDF5, [rows, width]."""

    def __init__(self, path: Path, data: Any) -> None:
        if len(data.shape) != 2:
            raise UserError(f"{path} has vectors of shape {list(data.shape)}, not [rows, width]; flatten them first")
        if not (np.issubdtype(data.dtype, np.floating) or np.issubdtype(data.dtype, np.integer)):
            raise UserError(f"{path} has vectors of type {data.dtype}, which are not numbers")
        self.path, self.data = path, data
        self.rows, self.width = data.shape
        self.dtype = data.dtype.name

    def read(self, rows: Int) -> Iterator[Batch]:
        at_a_time = _rows_of_a_batch(self.width)
        done = 0
        for begin, end in runs(rows, self.width * self.data.dtype.itemsize):
            for first in range(begin, end, at_a_time):
                last = min(first + at_a_time, end)
                upto = int(np.searchsorted(rows, last))
                if upto > done:
                    yield Batch(done, self.data[first:last][rows[done:upto] - first], {})
                    done = upto


class NpyVectors(_Matrix):
    """An NPY file [rows, width], and beside it one of ids: text with an id a line, NPY or Parquet."""

    def __init__(self, path: Path, ids: Path, id_name: str) -> None:
        super().__init__(path, _load_npy(path))
        self._ids = _read_ids(ids, id_name)
        if self._ids.len() != self.rows:
            raise UserError(f"{path} has {self.rows:,} vectors, and {ids} {self._ids.len():,} ids; each needs one")

    def ids(self) -> Iterator[pl.Series]:
        yield self._ids


class Hdf5Vectors(_Matrix):
    """Two data sets of an HDF5 file: ids [rows], and vectors [rows, width]."""

    def __init__(self, path: Path, id_name: str, vector_name: str) -> None:
        try:
            h5 = h5py.File(path, "r")
        except OSError as e:
            raise UserError(f"{path} is not an HDF5 file, or is damaged: {e}") from None
        shapes: dict[str, int] = {}
        h5.visititems(lambda name, it: shapes.update({name: len(it.shape)} if isinstance(it, h5py.Dataset) else {}))
        vector = _choose("vector", vector_name, [n for n, d in shapes.items() if d > 1], list(shapes), path)
        name = _choose("id", id_name, [n for n, d in shapes.items() if d == 1], list(shapes), path)
        super().__init__(path, h5[vector])
        self._ids = h5[name]
        if self._ids.shape != (self.rows,):
            raise UserError(
                f"{path}: data set {vector!r} has {self.rows:,} vectors, and {name!r} is {list(self._ids.shape)}; "
                "each vector needs one id"
            )

    def ids(self) -> Iterator[pl.Series]:
        ids = self._ids.asstr() if h5py.check_string_dtype(self._ids.dtype) else self._ids
        for begin in range(0, self.rows, BATCH_IDS):
            yield _texts(self.path, ids[begin : begin + BATCH_IDS])


class AmazonVectors(_Matrix):
    """The image features of the Amazon product data (`image_features_CATEGORY.b`)."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        if over := size % AMAZON.itemsize:
            raise UserError(
                f"{path} has {size:,} bytes, which are not whole records of {AMAZON.itemsize:,} (an id of 10 bytes, "
                f"4,096 numbers of 4 each): the last one lacks {AMAZON.itemsize - over:,} bytes. Was the download cut? "
                f"Fetch it again; or drop that record: truncate -s {size - over} {path}"
            )
        self._records = np.memmap(path, AMAZON, "r") if size else np.empty(0, AMAZON)
        super().__init__(path, self._records["vector"])

    def ids(self) -> Iterator[pl.Series]:
        for begin in range(0, self.rows, BATCH_IDS):
            raw = np.ascontiguousarray(self._records["id"][begin : begin + BATCH_IDS])
            letters = raw.view(np.uint8).reshape(-1, 10)
            wrong = np.flatnonzero(((letters < 33) | (letters > 126)).any(1))
            if len(wrong):
                raise UserError(
                    f"{self.path}: record {begin + wrong[0] + 1:,} begins with {bytes(letters[wrong[0]])!r}, which is "
                    "no id of ten letters and digits: the file is not in the format of the Amazon product data"
                )
            yield _texts(self.path, raw)


class ParquetVectors(VectorFile):
    """A column of ids and a list column of numbers."""

    def __init__(self, path: Path, id_name: str, vector_name: str) -> None:
        self.path = path
        self._file = _open_parquet(path)
        schema = self._file.schema_arrow
        can_be_id = [f.name for f in schema if _may_be_id(f.type)]
        self._id = _choose("id", id_name, can_be_id, schema.names, path, _no_id(schema))
        vectors = [f.name for f in schema if _may_be_vector(f.type)]
        self._vector = _choose("vector", vector_name, vectors, schema.names, path)
        if self._vector not in vectors:
            raise UserError(
                f"{path}: column {self._vector!r} is {schema.field(self._vector).type}, not lists of numbers"
            )
        self._values = schema.field(self._vector).type.value_type
        self.rows = self._file.metadata.num_rows
        self.dtype = str(np.dtype(self._values.to_pandas_dtype()).name)
        self.width = self._first_width()

    def ids(self) -> Iterator[pl.Series]:
        for batch in self._file.iter_batches(BATCH_IDS, columns=[self._id]):
            yield _texts(self.path, pl.Series("id", pl.from_arrow(batch.column(0))))

    def read(self, rows: Int) -> Iterator[Batch]:
        first = done = 0
        for group in range(self._file.num_row_groups):
            last = first + self._file.metadata.row_group(group).num_rows
            if int(np.searchsorted(rows, last)) > done:
                for lists in self._lists([group], _rows_of_a_batch(self.width)):
                    upto = int(np.searchsorted(rows, first + len(lists)))
                    if upto > done:
                        yield self._batch(done, lists.take(pa.array(rows[done:upto] - first)))
                        done = upto
                    first += len(lists)
            first = last

    def _lists(self, groups: Sequence[int], at_a_time: int) -> Iterator[Any]:
        """Yield the vectors of some row groups as arrays of lists."""
        for batch in self._file.iter_batches(at_a_time, row_groups=groups, columns=[self._vector]):
            yield batch.column(0).cast(pa.large_list(self._values))

    def _first_width(self) -> int:
        for lists in self._lists(range(self._file.num_row_groups), 256):
            for length in lists.value_lengths().to_pylist():
                if length is not None:
                    return int(length)
        return 0

    def _batch(self, begin: int, lists: Any) -> Batch:
        there = lists.is_valid().to_numpy(zero_copy_only=False)
        lengths = lists.value_lengths().fill_null(0).to_numpy()
        right = there & (lengths == self.width)
        faults = {
            int(place): f"{lengths[place]:,} numbers, where the first vector has {self.width:,}"
            if there[place]
            else "no vector"
            for place in np.flatnonzero(~right)
        }
        # Numbers that are missing become NaN.
        values = lists.filter(pa.array(right)).flatten().to_numpy(zero_copy_only=False)
        vectors = np.zeros((len(lists), self.width), values.dtype)
        vectors[right] = values.reshape(-1, self.width)
        return Batch(begin, vectors, faults)


def find(given: Sequence[Path], wanted_format: str = "") -> list[Path]:
    """Return the files that paths, folders and patterns name: of a folder those that may be of the format."""
    found = []
    for path in given:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            formats = {wanted_format} if wanted_format else set(SUFFIXES.values())
            known = [p for p in below if _by_name(p) in formats]
            if not known:
                raise UserError(f"{path} has no file of vectors; their names end in {', '.join(SUFFIXES)}")
            found += known
        elif path.exists():
            found.append(path)
        else:
            base = Path(path.anchor or ".")
            matching = sorted(base.glob(str(path.relative_to(path.anchor)))) if set("*?[") & set(str(path)) else []
            if not matching:
                raise UserError(f"{path} is not there")
            found += matching
    if odd := next((path for path in found if not path.is_file()), None):
        raise UserError(
            f"{odd} is not a file{' but a folder' * odd.is_dir()}; vectors and ids are read from files alone, some of "
            "them twice, and not from pipes, sockets or devices"
        )
    return found


def with_ids(vectors: Sequence[Path], ids: Sequence[Path], given_format: str) -> list[tuple[Path, Path | None]]:
    """Return the files of vectors, each with its file of ids, which only NPY has. Raises UserError.

    vectors, ids: files, folders and patterns; ids in the order of the NPY files.
    """
    files, id_files = find(vectors, given_format), find(ids)
    are_npy = [format_of(path, given_format) == "npy" for path in files]
    if sum(are_npy) != len(id_files):
        raise UsageError(
            f"{sum(are_npy)} NPY files of vectors and {len(id_files)} files of ids: each NPY file needs an --ids, in "
            "the same order; other formats have their ids inside"
        )
    waiting = iter(id_files)
    return [(path, next(waiting) if is_npy else None) for path, is_npy in zip(files, are_npy, strict=True)]


def format_of(path: Path, given: str) -> str:
    """Return the format of a file of vectors, as it is given or by the ending of its name."""
    found = given or _by_name(path)
    if not found:
        raise UsageError(
            f"what is {path}? Its name does not end in {', '.join(SUFFIXES)}; say it with --set import-features.format="
            "parquet, npy, hdf5 or amazon"
        )
    return found


def _by_name(path: Path) -> str:
    return SUFFIXES.get(path.suffix.lower(), "")


def open_file(path: Path, ids: Path | None, given_format: str, id_name: str, vector_name: str) -> VectorFile:
    """Open a file of vectors. ids: the file of ids, which only NPY has."""
    kind = format_of(path, given_format)
    if kind == "npy":
        assert ids is not None
        return NpyVectors(path, ids, id_name)
    if kind == "parquet":
        return ParquetVectors(path, id_name, vector_name)
    return Hdf5Vectors(path, id_name, vector_name) if kind == "hdf5" else AmazonVectors(path)


def _rows_of_a_batch(width: int) -> int:
    return max(1, BATCH_BYTES // (8 * max(1, width)))


def _no_id(schema: Any) -> str:
    """Say why none of the columns can be the ids."""
    floats = [f.name for f in schema if pa.types.is_floating(f.type)]
    return f"; {', '.join(floats)}: floats cannot be ids, only texts and whole numbers can" if floats else ""


def _choose(key: str, given: str, candidates: Sequence[str], known: Sequence[str], path: Path, why: str = "") -> str:
    """Return the column or data set that is named, or else the only one that may be meant."""
    if given:
        if given not in known:
            raise UsageError(f"{path} has nothing called {given!r} (import-features.{key}){nearest(given, known)}")
        return given
    if len(candidates) != 1:
        which = f"one of {', '.join(candidates)}" if candidates else f"it has {', '.join(known) or 'nothing'}{why}"
        raise UsageError(f"{path}: what holds the {key}s? Name it with --set import-features.{key}=…: {which}")
    return candidates[0]


def _texts(path: Path, ids: Any) -> pl.Series:
    """Return ids as String, null where there is none or an empty one; whole numbers become their digits."""
    series = pl.Series("id", ids)
    if series.dtype == pl.Binary or series.dtype == pl.Categorical or series.dtype == pl.Null:
        series = series.cast(pl.String)
    if series.dtype != pl.String and not series.dtype.is_integer():
        raise UserError(f"{path} has ids of type {series.dtype}, which are neither texts nor whole numbers")
    return series.cast(pl.String).replace("", None)


def _load_npy(path: Path) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        reason = (
            "it holds Python objects, or is no NPY file at all" if re.search("pickle|Python objects", str(e)) else e
        )
        raise UserError(f"{path} is not an NPY file of numbers or texts, or is damaged: {reason}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path} is an archive of several arrays (NPZ); save the one that is meant as NPY")
    return array


def _read_ids(path: Path, id_name: str) -> pl.Series:
    if _by_name(path) == "npy":
        array = np.array(_load_npy(path))
        if array.ndim != 1:
            raise UserError(f"{path} has ids of shape {list(array.shape)}, not one after the other")
        return _texts(path, array)
    if _by_name(path) == "parquet":
        file = _open_parquet(path)
        candidates = [f.name for f in file.schema_arrow if _may_be_id(f.type)]
        name = _choose("id", id_name, candidates, file.schema_arrow.names, path)
        parts = [_texts(path, pl.Series("id", pl.from_arrow(c))) for c in file.read([name]).column(0).chunks]
        return pl.concat([pl.Series("id", [], pl.String), *parts])
    try:
        lines = pl.read_lines(path).to_series()
    except (pl.exceptions.PolarsError, OSError) as e:
        raise UserError(f"{path} is not a text file of ids: {str(e).splitlines()[0]}") from None
    # Some editors write a byte order mark before the first.
    return lines.rename("id").str.strip_prefix("\ufeff").str.strip_chars().replace("", None)


def _open_parquet(path: Path) -> Any:
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path} is not a Parquet file, or is damaged: {str(e).splitlines()[0]}") from None


def _may_be_id(kind: Any) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.types.is_integer(inner) or any(is_text(inner) for is_text in texts)


def _may_be_vector(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists):
        return False
    return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
