"""Picture vectors as models see them: centred and scaled, by index of the vocabulary `image`."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ctrkit.errors import UserError
from ctrkit.feature_cache import HOST_BYTES, FeatureCache
from ctrkit.features import FeatureStore
from ctrkit.progress import say

NORM = 4.0
"""Root mean square of the vectors' norms after scaling. An Adam step moves an output of the first layer by up to
the learning rate times the vector's 1-norm, so wide vectors of unit coordinates make the first steps too long: with
4096 coordinates the demo's attention was not learned at all, and the smaller of 64, 20, 8 and 4 was always better."""
SAME = 1e-12
"""Variance, as a share of the mean's square, that is rounding and no difference."""
CONTROL_SEED = 20_170_711
"""Of the permutation of `[train] shuffle_pictures`."""


class PictureVectors:
    """Reads picture vectors by vocabulary index.

    Raw CNN vectors share a large common part that drowns the differences; so the mean over training pictures is
    taken off, and one scale makes the root mean square of the remaining norms `NORM`. A picture without a row is zero,
    as the average picture is; `has_picture` tells them apart.

    Parameters
    ----------
    features: `features.h5`.
    convert: the folder that `ctrkit convert` wrote, for its vocabulary `image`.
    shuffle: give each picture another picture's vector, a control.
    has_picture: add a last coordinate, 1 for a picture that has a vector and 0 otherwise.
    host_bytes, device_bytes: of features that are held in the host's memory and, where batches are wanted on a GPU, on
        it; see `ctrkit.feature_cache`.
    """

    def __init__(
        self,
        features: Path,
        convert: Path,
        *,
        shuffle: bool = False,
        has_picture: bool = False,
        host_bytes: int = HOST_BYTES,
        device_bytes: int = 0,
    ) -> None:
        self.has_picture = has_picture
        seed = CONTROL_SEED if shuffle else None
        self.store = FeatureStore(features, shuffle_seed=seed)
        self._host_bytes, self._device_bytes = host_bytes, device_bytes
        self.cache = FeatureCache(self.store, host_bytes=host_bytes)
        self._vocabulary = convert / "vocab" / "image.parquet"
        if not self._vocabulary.is_file():
            raise UserError(
                f"{convert} has no vocabulary of pictures (vocab/image.parquet): give the folder that ctrkit convert "
                "wrote with a recipe whose [features] has kind = 'image'"
            )
        vocab = pl.read_parquet(self._vocabulary)
        row_V = np.full(int(vocab["index"].max() or 1) + 1, -1, np.int64)  # type: ignore[arg-type]
        row_V[vocab["index"].to_numpy()] = self.store.row_of(vocab["value"])
        self.row_V = row_V
        self._training = np.unique(row_V[vocab.filter(pl.col("count") > 0)["index"].to_numpy()])
        if (row_V >= 0).sum() == 0:
            raise UserError(
                f"{features} has no vector for any picture of {convert}: was it extracted for other data? "
                "Run `ctrkit extract-images` with this --convert folder."
            )
        self.mean_W = torch.zeros(self.store.width)
        self.scale = torch.ones(())

    def to(self, dtype: torch.dtype) -> None:
        """Give vectors, mean and scale in this dtype from now on; float32 at first."""
        self.mean_W, self.scale = self.mean_W.to(dtype), self.scale.to(dtype)

    def wanted(self, *, device: str | None = None, share: tuple[int, int] | None = None) -> None:
        """Say on which device vectors are wanted, and which rows will be asked for: (first, step), as `FeatureCache`
        has it. What is held already is read anew."""
        where = torch.device(device) if device is not None else self.cache.device
        self.cache = FeatureCache(
            self.store,
            host_bytes=self._host_bytes,
            device_bytes=0 if where.type == "cpu" else self._device_bytes,
            device=str(where),
            share=share or self.cache.share,
        )

    @property
    def width(self) -> int:
        """Numbers a picture, W: the file's, and the flag where there is one."""
        return self.store.width + self.has_picture

    @property
    def missing(self) -> int:
        """How many pictures of the vocabulary have no vector."""
        return int((self.row_V[2:] < 0).sum())

    def fit(
        self,
        count_V: npt.NDArray[np.int64] | None = None,
        share: tuple[int, int] = (0, 1),
        summed: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]] = lambda x: x,
    ) -> None:
        """Set mean and scale from the pictures that training refers to: those with a count, where counts are given.

        share: (first, step): read the rows first, first + step, … only; `summed` then adds what all have found.
        """
        rows = self._training
        if count_V is not None:
            rows = np.unique(self.row_V[np.flatnonzero(count_V[: len(self.row_V)])])
        rows = rows[rows >= 0]
        if len(rows) == 0:
            raise UserError("no training sample refers to a picture that has a vector")
        total = np.zeros(self.store.width)
        square = np.zeros(self.store.width)
        own = rows[rows % share[1] == share[0]]
        for part in np.array_split(own, max(1, len(own) // 8192)):
            x = self.store.read(part).astype(np.float64)
            total += x.sum(0)
            square += (x * x).sum(0)
        total, square = summed(np.stack([total, square]))
        if not np.isfinite(square).all():
            raise UserError(
                f"{self.store.path} has vectors with infinite or missing numbers (NaN), of pictures in training: "
                "`ctrkit import-features` leaves such vectors out; make the file again"
            )
        mean = total / len(rows)
        variance = np.maximum(square / len(rows) - mean * mean, 0.0).mean()
        dtype = self.scale.dtype
        self.mean_W = torch.from_numpy(mean).to(dtype)
        if variance <= SAME * (mean * mean).mean():
            say(f"train: the vectors of all pictures in training are the same in {self.store.path}: they say nothing")
            variance = 0.0
        scale = NORM / np.sqrt(variance * self.store.width) if variance > 0 else 1.0
        self.scale = torch.tensor(scale, dtype=dtype)

    @cached_property
    def _names(self) -> pl.DataFrame:
        return pl.read_parquet(self._vocabulary, columns=["index", "value"]).cast({"index": pl.Int64})

    def names(self, index: npt.NDArray[np.integer]) -> pl.Series:
        """Return the pictures' ids for indexes [n] of the vocabulary `image`, String; "" where it has none."""
        asked = pl.DataFrame({"index": index}).cast({"index": pl.Int64})
        return asked.join(self._names, on="index", how="left", maintain_order="left")["value"].fill_null("")

    def distinct(self, index: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return ([N] distinct rows of the file, rising, [len(index)] positions in N) for indexes of the vocabulary
        `image`; row −1 stands for all pictures without a vector."""
        rows = np.where(index < len(self.row_V), self.row_V[np.minimum(index, len(self.row_V) - 1)], -1)
        distinct, position = np.unique(rows, return_inverse=True)
        return torch.from_numpy(distinct), torch.from_numpy(position.reshape(-1).astype(np.int64))

    def vectors(self, row_N: npt.NDArray[np.int64]) -> Tensor:
        """Return [N, W], where they are wanted: the vectors of rows, rising, of which −1 can be the first only."""
        x_NW = self.cache.read(row_N)
        x_NW = x_NW.to(self.scale.dtype).sub_(self.mean_W.to(x_NW.device)).mul_(self.scale)
        if len(row_N) and row_N[0] < 0:
            x_NW[0] = 0.0
        if self.has_picture:
            x_NW = torch.cat([x_NW, torch.from_numpy(row_N >= 0).to(x_NW).unsqueeze(1)], 1)
        return x_NW

    def gather(self, index: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return ([N, W] distinct vectors, [len(index)] positions in N) for indexes of the vocabulary `image`."""
        row_N, position = self.distinct(index)
        return self.vectors(row_N.numpy()), position
