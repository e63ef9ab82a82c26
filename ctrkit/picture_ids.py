"""Ids of pictures, as many as there are: as text that lies side by side, in a fifth of what Python's strings take."""

from collections.abc import Iterator, Sequence
from typing import overload

import polars as pl

AT_ONCE = 1 << 14
"""Ids that become Python's strings at a time."""


class PictureIds(Sequence[str]):
    """A sequence of ids that cannot be changed.

    Parameters
    ----------
    ids: texts, none of them missing.
    """

    def __init__(self, ids: Sequence[str] | pl.Series) -> None:
        self._ids = pl.Series("image", ids, pl.String).rechunk()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._ids)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "PictureIds": ...
    def __getitem__(self, at: int | slice) -> "str | PictureIds":
        """Return one id, or some of them."""
        return PictureIds(self._ids[at]) if isinstance(at, slice) else str(self._ids[int(at)])

    def __iter__(self) -> Iterator[str]:
        """Yield the ids."""
        for begin in range(0, len(self._ids), AT_ONCE):
            yield from self._ids[begin : begin + AT_ONCE].to_list()
