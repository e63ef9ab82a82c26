"""Picture features as extract-images wrote them: rows by picture, read where they lie."""

from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.errors import UserError

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]


class FeatureStore:
    """A features.h5, opened when it is first asked for anything.

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
            raise UserError(f"{self.path} is not there; `ctrkit extract-images` writes it")
        try:
            h5 = h5py.File(self.path, "r")
        except OSError as e:
            raise UserError(f"{self.path} is not an HDF5 file, or is damaged: {e}") from None
        missing = {"features", "image", "row"} - set(h5)
        if missing:
            raise UserError(f"{self.path} is not a features file: it has no data set {', '.join(sorted(missing))}")
        return h5

    @cached_property
    def _features(self) -> Any:
        """[rows, width] float16: mapped into memory if the file holds it in one piece, else HDF5's view."""
        data = self._h5["features"]
        offset = data.id.get_offset()
        if offset is None or data.size == 0:
            return data
        return np.memmap(self.path, dtype=data.dtype, mode="r", offset=offset, shape=data.shape)

    @property
    def rows(self) -> int:
        """Vectors in the file."""
        return int(self._h5["features"].shape[0])

    @property
    def width(self) -> int:
        """Length of a vector."""
        return int(self._h5["features"].shape[1])

    @property
    def attributes(self) -> dict[str, str]:
        """What the vectors are: backbone, layer, weights, preprocessing, versions."""
        return {name: str(value) for name, value in self._h5.attrs.items()}

    @cached_property
    def pictures(self) -> pl.DataFrame:
        """Every picture: `image` String, `row` Int64 (−1: no vector), shuffled if so asked."""
        row: Int = self._h5["row"][:]
        if self.shuffle_seed is not None:
            # One cycle through all pictures in random order: none keeps its own place.
            order = np.random.default_rng(self.shuffle_seed).permutation(np.flatnonzero(row >= 0))
            row[order] = row[np.roll(order, -1)]
        image = self._h5["image"].asstr()[:]
        return pl.DataFrame({"image": image, "row": row}, schema={"image": pl.String, "row": pl.Int64})

    def row_of(self, image_ids: list[str]) -> Int:
        """Return the row of each picture, [n] int64; −1 where it has none or is not in the file."""
        asked = pl.DataFrame({"image": image_ids}, schema={"image": pl.String})
        found = asked.join(self.pictures, on="image", how="left", maintain_order="left")
        return found["row"].fill_null(-1).to_numpy().copy()

    def read(self, rows: Int) -> Float:
        """Return the vectors of `rows` [n] int64, as [n, width] float32; row −1 gives zeros.

        Each distinct row is read once, in the order of the file, neighbours together.
        """
        wanted, place = np.unique(rows, return_inverse=True)
        if len(wanted) and not -1 <= wanted[0] <= wanted[-1] < self.rows:
            raise IndexError(f"rows {wanted[0]} to {wanted[-1]} asked of a file with {self.rows}")
        vectors = np.zeros((len(wanted), self.width), dtype=np.float32)
        runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) != 1) + 1)
        for run in runs:
            if len(run) and wanted[run[0]] < 0:
                run = run[1:]
            if len(run):
                vectors[run[0] : run[-1] + 1] = self._features[wanted[run[0]] : wanted[run[-1]] + 1]
        return vectors[place]

    def load(self, dtype: str = "float16") -> npt.NDArray[np.floating[Any]]:
        """Return all vectors, [rows, width], in memory."""
        return np.array(self._features[:], dtype=dtype)
