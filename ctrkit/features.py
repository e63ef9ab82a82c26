"""Picture features as extract-images or import-features wrote them: rows by picture, read where they lie.

Rows are in order of use, most first, so that the pictures that are asked for most are a prefix of the file; what
training holds of them in memory is in `ctrkit.feature_cache`.
"""

import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.int64]

GAP = 32 << 10
"""Bytes between two rows up to which reading them too costs less than reading twice."""
BLOCK = 512 << 10
"""Bytes of rows that are gathered and then converted while they are in the processor's cache."""
IDS = 1 << 16
"""Ids of pictures that are read at a time."""


@dataclass(frozen=True)
class _Piece:
    """Rows `begin` to `end` of the features, from row `first` of `data` on."""

    begin: int
    end: int
    first: int
    data: Any
    """[rows, width]: an array that lies in memory or is mapped, or else a data set of HDF5."""
    file: int | None = None
    """Descriptor of the file, where `data` is mapped."""
    offset: int = 0
    """Bytes of the file before `data`."""

    def advise(self, rows: Int) -> None:
        """Have the system read sorted rows of this piece ahead, all at once; it goes on in the background.

        By `posix_fadvise`, for Python's `madvise` keeps the interpreter's lock, and a training waiting, for as long.
        """
        if self.file is None:
            return
        row_bytes = self.data[:1].nbytes
        for begin, end in runs(rows - self.begin + self.first, row_bytes):
            offset, size = self.offset + begin * row_bytes, (end - begin) * row_bytes
            os.posix_fadvise(self.file, offset, size, os.POSIX_FADV_WILLNEED)


class FeatureStore:
    """A features.h5, opened when it is first asked for anything. Threads may share it.

    Parameters
    ----------
    path: the file.
    shuffle_seed: give each picture that has a vector another picture's, always the same one: the control in
        which nothing visual can be learned. None: each its own.
    """

    def __init__(self, path: Path, shuffle_seed: int | None = None) -> None:
        self.path = path
        self.shuffle_seed = shuffle_seed

    @cached_property
    def _h5(self) -> Any:
        if not self.path.is_file():
            fault = "is a folder, not the file features.h5" if self.path.is_dir() else "is not there"
            raise UserError(f"{self.path} {fault}; `ctrkit extract-images` writes it")
        h5 = _open(self.path)
        missing = {"features", "image", "row"} - set(h5)
        if missing:
            raise UserError(f"{self.path} is not a features file: it has no data set {', '.join(sorted(missing))}")
        return h5

    @cached_property
    def _pieces(self) -> list[_Piece]:
        """The features where they lie: one piece, or one a shard."""
        return _pieces_of(self.path, self._h5["features"])

    @cached_property
    def _been_read(self) -> npt.NDArray[np.bool_] | None:
        """[rows]: which rows were asked for before, and so will still be in memory. None where the file is too large
        for that."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return np.zeros(self.rows, np.bool_) if self.rows * self.width * 2 <= memory // 2 else None

    @property
    def rows(self) -> int:
        """Vectors in the file."""
        return int(self._h5["features"].shape[0])

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._h5["features"].shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the vectors in the file."""
        found: np.dtype[Any] = self._h5["features"].dtype
        return found

    @property
    def attributes(self) -> dict[str, str]:
        """What the vectors are: backbone, layer, weights, preprocessing, versions."""
        return {name: str(value) for name, value in self._h5.attrs.items()}

    @cached_property
    def pictures(self) -> pl.DataFrame:
        """Every picture: `image` String, `row` Int64 (−1: no vector), shuffled if so asked."""
        image = pl.Series("image", [], pl.String)
        for some in self._ids():
            image.append(some)
        return pl.DataFrame({"image": image, "row": self._row()}, schema={"image": pl.String, "row": pl.Int64})

    def _row(self) -> Int:
        """Return the row of every picture, [pictures] int64, shuffled if so asked."""
        row: Int = self._h5["row"][:]
        if self.shuffle_seed is not None:
            # One cycle through all pictures in random order: none keeps its own place.
            order = np.random.default_rng(self.shuffle_seed).permutation(np.flatnonzero(row >= 0))
            row[order] = row[np.roll(order, -1)]
        return row

    def _ids(self) -> Iterator[pl.Series]:
        """Yield all ids, some at a time: h5py makes Python strings of them, which take ten times the memory."""
        texts = self._h5["image"].asstr()
        for begin in range(0, len(texts), IDS):
            yield pl.Series("image", texts[begin : begin + IDS], pl.String)

    def row_of(self, image_ids: Sequence[str] | pl.Series) -> Int:
        """Return the row of each picture, [n] int64; −1 where it has none or is not in the file."""
        asked = pl.DataFrame({"image": image_ids}, schema={"image": pl.String})
        if asked.height == len(self._h5["image"]) and all(
            some.equals(asked["image"].slice(number * IDS, IDS)) for number, some in enumerate(self._ids())
        ):
            return self._row()  # those of the file in its order, which then need not be held and joined
        found = asked.join(self.pictures, on="image", how="left", maintain_order="left")
        return found["row"].fill_null(-1).to_numpy().copy()

    def prefetch(self, rows: Int) -> None:
        """Start to read `rows` [n] int64 from the disk, side by side, and return at once: a later `read` finds them
        in memory. Rows that were read before are not read again, if the file fits into memory."""
        self._check(rows)
        been = self._been_read
        wanted = rows[rows >= 0]
        if been is not None:
            wanted = wanted[~been[wanted]]
        if len(wanted) == 0:
            return
        wanted = np.unique(wanted)
        for piece in self._pieces:
            piece.advise(wanted[np.searchsorted(wanted, piece.begin) : np.searchsorted(wanted, piece.end)])
        if been is not None:
            been[wanted] = True

    def read(self, rows: Int, out: Floats | None = None) -> Floats:
        """Return the vectors of `rows` [n] int64, as [n, width] float32; row −1 gives zeros.

        What is not in memory is read in the order of the file, close rows together, before any of it is waited for.

        out: [n, width] float32 or float16, written and returned. Fresh memory for the result costs the system as
        much time as reading it, so who reads often should use it again.
        """
        self.prefetch(rows)
        if out is None:
            out = np.empty((len(rows), self.width), np.float32)
        if out.shape != (len(rows), self.width):
            raise ValueError(f"out is {list(out.shape)}, and {len(rows)} rows of {self.width} are asked for")
        pieces = self._pieces
        if not pieces:
            out[:] = 0
            return out
        piece_of = np.searchsorted([p.end for p in pieces], np.maximum(rows, 0), side="right")
        local = rows + np.array([p.first - p.begin for p in pieces])[piece_of]
        arrays = [p.data for p in pieces]
        for i, array in enumerate(arrays):
            if not isinstance(array, np.ndarray):
                here = (piece_of == i) & (rows >= 0)
                arrays[i], local[here] = _read_runs(array, local[here])
        gather(arrays, piece_of, local, out)
        out[rows < 0] = 0
        return out

    def load(self, dtype: str = "float16") -> Floats:
        """Return all vectors, [rows, width], in memory."""
        held = np.empty((self.rows, self.width), dtype)
        _copy_rows(self._pieces, held)
        return held

    def _check(self, rows: Int) -> None:
        if len(rows) and not -1 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a file with {self.rows}")


MADE_ALIKE = ("backbone", "layer", "weights", "preprocessing")
"""Attributes in which two files of features have to agree to mean the same."""


def check_made_alike(store: FeatureStore, attributes: Mapping[str, str], width: int, model: Path) -> None:
    """Refuse picture vectors that were made in another way than those that a model was trained on, of which these are
    the attributes and the width."""
    if store.width != width:
        raise UserError(
            f"{model} was trained on picture vectors of width {width}, but {store.path} has width {store.width}: use "
            "the features it was trained with"
        )
    for key in MADE_ALIKE:
        then, now = attributes.get(key), store.attributes.get(key)
        if then != now:
            raise UserError(
                f"{model} was trained on picture vectors with {key} = {then}, but {store.path} has {key} = {now}: use "
                "the features it was trained with"
            )


def runs(rows: Int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of the runs in sorted rows, across gaps of at most `GAP` bytes."""
    if len(rows):
        last = np.flatnonzero(np.diff(rows) > 1 + GAP // max(1, row_bytes))
        yield from zip(rows[[0, *(last + 1)]].tolist(), (rows[[*last, -1]] + 1).tolist(), strict=True)


def _read_runs(data: Any, rows: Int) -> tuple[Floats, Int]:
    """Return the distinct rows of a data set, each read once, and where each of `rows` is among them."""
    distinct, place = np.unique(rows, return_inverse=True)
    held = np.empty((len(distinct), data.shape[1]), data.dtype)
    done = 0
    for begin, end in runs(distinct, data.shape[1] * data.dtype.itemsize):
        upto = int(np.searchsorted(distinct, end))
        held[done:upto] = data[begin:end][distinct[done:upto] - begin]
        done = upto
    return held, place.reshape(-1)


def gather(arrays: Sequence[Floats], array_of: Int, rows: Int, out: Floats) -> None:
    """Write row `rows[i]` of `arrays[array_of[i]]` to `out[i]`, block by block. Negative rows are written anyhow."""
    block = max(1, BLOCK // max(1, out.shape[1] * arrays[0].itemsize))
    widens = out.dtype != arrays[0].dtype
    gathered = np.empty((block if widens else 0, out.shape[1]), arrays[0].dtype)
    for begin in range(0, len(out), block):
        part = slice(begin, min(begin + block, len(out)))
        buffer = gathered[: part.stop - begin] if widens else out[part]
        here = np.unique(array_of[part])
        if len(here) == 1:
            _take(arrays[here[0]], rows[part], buffer)
        else:
            for i in here:
                places = np.flatnonzero(array_of[part] == i)
                buffer[places] = _take(arrays[i], rows[part][places])
        if widens:
            convert(buffer, out[part])


def _take(array: Floats, rows: Int, out: Floats | None = None) -> Floats:
    """Return rows of an array. One that has none gives zeros; rows beyond its ends, the nearest."""
    if len(array):
        return np.take(array, rows, axis=0, out=out, mode="clip")
    return np.zeros((len(rows), array.shape[1]), array.dtype)


def convert(values: Floats, out: Floats) -> None:
    """Copy values to an array of another type. torch takes float16 to float32 eight times as fast as numpy; where it
    has not been imported, that would take longer than it saves."""
    torch = sys.modules.get("torch")
    if torch is None or not values.dtype.isnative:
        np.copyto(out, values, casting="same_kind")
    else:
        torch.from_numpy(out).copy_(torch.from_numpy(values))


def _copy_rows(pieces: Sequence[_Piece], out: Floats) -> None:
    """Write the first rows to `out`, in the order of the file."""
    for piece in pieces:
        step = max(1, (16 << 20) // max(1, out[:1].nbytes))
        for begin in range(piece.begin, min(piece.end, len(out)), step):
            end = min(begin + step, piece.end, len(out))
            out[begin:end] = piece.data[begin - piece.begin + piece.first : end - piece.begin + piece.first]


def _open(path: Path) -> Any:
    try:
        return h5py.File(path, "r")
    except OSError as e:
        raise UserError(f"{path} is not an HDF5 file, or is damaged: {e}") from None


def _pieces_of(path: Path, data: Any) -> list[_Piece]:
    """Return a data set as pieces in order, mapped as far as the file holds it in one piece. A virtual data set has
    one for each of its sources."""
    if data.shape[0] == 0:
        return []
    if not data.is_virtual:
        return [_mapped(path, data, range(data.shape[0]), 0)]
    made = data.id.get_create_plist()
    sources = [i for i in range(made.get_virtual_count()) if made.get_virtual_vspace(i).get_select_npoints()]
    pieces = sorted((_source(path, data, made, i) for i in sources), key=lambda p: p.begin)
    ends = [0, *(p.end for p in pieces)]
    if [p.begin for p in pieces] != ends[:-1] or ends[-1] != data.shape[0]:
        raise UserError(f"{path}: not every row has one file that holds it; run the stage that wrote it again")
    return pieces


def _source(path: Path, data: Any, made: Any, number: int) -> _Piece:
    """Return the piece of a virtual data set that one source holds. HDF5 itself gives zeros for what is not there."""
    name, inside = made.get_virtual_filename(number), made.get_virtual_dsetname(number)
    file = path if name == "." else path.parent / name
    again = f"keep the files that lie beside {path.name} as they were, or run the stage that wrote them again"
    if not file.is_file():
        raise UserError(f"{path} has vectors in {file}, which is not there; {again}")
    inner = data.file if file == path else _open(file)
    if inside not in inner:
        raise UserError(f"{path} has vectors in {file}, which has no data set {inside!r}; {again}")
    held = inner[inside]
    rows = _whole_rows(made.get_virtual_vspace(number), data.shape)
    of = _whole_rows(made.get_virtual_srcspace(number), held.shape)
    if held.shape[1:] != data.shape[1:] or held.dtype != data.dtype:
        raise UserError(f"{path} and {file} have vectors of different width or type; {again}")
    if rows is None or of is None or len(rows) != len(of) or of.stop > held.shape[0]:
        raise UserError(f"{path}: {file} has other rows, or they are not mapped whole and in order; {again}")
    return _mapped(file, held, rows, of.start)


def _whole_rows(space: Any, shape: tuple[int, int]) -> range | None:
    """Return the rows of a selection if it is of whole rows, one after the other; else None."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return range(shape[0])
    low, high = space.get_select_bounds()
    rows = range(int(low[0]), int(high[0]) + 1)
    return rows if space.get_select_npoints() == len(rows) * shape[1] else None


def _mapped(path: Path, data: Any, rows: range, first: int) -> _Piece:
    offset = data.id.get_offset()
    if offset is None or data.size == 0:
        return _Piece(rows.start, rows.stop, first, data)
    file = os.open(path, os.O_RDONLY)
    whole = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(whole, data.dtype, data.size, offset).reshape(data.shape)
    piece = _Piece(rows.start, rows.stop, first, array, file, offset)
    weakref.finalize(piece, os.close, file)
    return piece
