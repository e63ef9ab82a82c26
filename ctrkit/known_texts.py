"""Texts to numbers, many at a time, where a dictionary would be too large for the caches.

A dictionary of a million texts lies all over 150 MB, and each lookup waits for four or five places in it, one after the
other. Here a lookup is one place in an array, and those of many texts wait together.

A text is known by Python's 64-bit hash of it, which is keyed anew in each process: an unknown one is taken for one of N
known ones with a probability of N / 2^64 (of a million: 5e-14).
"""

import array
import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

LARGE = 10_000
"""Texts from which on a dictionary of them leaves no cache to anything else."""
EMPTY = np.uint64(2**64 - 1)
"""Marks a place where no text is: the one number that Python's `hash` never gives (−1)."""
MASK = 2**64 - 1


class Known(Protocol):
    """Texts and their numbers."""

    def numbers(self, values: Sequence[Any], /) -> list[int]:
        """Return the number of each text, in order; `unknown` for what is none of them."""

    def number(self, value: Any, /) -> int:
        """Return the number of one."""


def finder(texts: Sequence[str | None], numbers: Sequence[int], unknown: int, *, at_once: bool = True) -> Known:
    """Return what looks up the numbers of texts, `unknown` for what is none of them.

    at_once: whether many are asked at once.
    """
    if at_once and len(texts) > LARGE:
        with contextlib.suppress(TwinsError):
            return KnownTexts(texts, numbers, unknown)
    return Dictionary(texts, numbers, unknown)


class Dictionary:
    """Texts and their numbers, in a dictionary."""

    def __init__(self, texts: Sequence[str | None], numbers: Sequence[int], unknown: int) -> None:
        self._get = dict(zip(texts, numbers, strict=True)).get
        self._unknown = unknown

    def numbers(self, values: Sequence[Any]) -> list[int]:
        """Return the number of each text, in order."""
        return list(map(self._get, values, itertools.repeat(self._unknown)))

    def number(self, value: Any) -> int:
        """Return the number of one text."""
        return self._get(value, self._unknown)


class TwinsError(ValueError):
    """Two texts have one hash."""


class KnownTexts:
    """Texts and their numbers, by linear probing. At most a quarter of the places is taken.

    Parameters
    ----------
    texts: N of them, all different; or None, which has a hash too.
    numbers: [N], below 2^31.
    unknown: the number of what is none of them.

    Raises TwinsError where two texts have one hash, which is so by chance for N² / 2^65 of processes.
    """

    def __init__(self, texts: Sequence[str | None], numbers: Sequence[int], unknown: int) -> None:
        self._unknown = unknown
        self._empty = numbers[texts.index("")] if "" in texts else unknown
        """The number of "", whose hash is that of 0."""
        hash_N = _hashes(texts)
        bits = max(1, int(4 * len(texts)).bit_length())
        self._shift = np.uint64(64 - bits)
        order_N = np.argsort(hash_N)
        hash_N = hash_N[order_N]
        if (hash_N[1:] == hash_N[:-1]).any():
            raise TwinsError
        # Each in its own place, or in the first one behind those of smaller hashes.
        count_N = np.arange(len(hash_N))
        place_N = np.maximum.accumulate((hash_N >> self._shift).astype(np.int64) - count_N) + count_N
        steps = int((place_N - (hash_N >> self._shift).astype(np.int64)).max(initial=0)) + 1
        self._steps_K = np.arange(steps)
        """From a text's own place to the last in which it may be."""
        size = (1 << bits) + 2 * steps
        self._hash = np.full(size, EMPTY)
        self._hash[place_N] = hash_N
        self._number = np.zeros(size, np.int32)
        self._number[place_N] = np.asarray(numbers, np.int32)[order_N]

    def numbers(self, values: Sequence[object]) -> list[int]:
        """Return the number of each text, in order; `unknown` also for what is no text."""
        hash_M1 = _hashes(values)[:, None]
        place_MK = (hash_M1 >> self._shift).astype(np.int64) + self._steps_K
        row, step = np.nonzero(self._hash[place_MK] == hash_M1)
        number_M = np.full(len(hash_M1), self._unknown, np.int32)
        number_M[row] = self._number[place_MK[row, step]]
        out: list[int] = number_M.tolist()
        if 0 in hash_M1:
            out = [self._of_hash_0(value, number) for value, number in zip(values, out, strict=True)]
        return out

    def number(self, value: object) -> int:
        """Return the number of one text."""
        of = hash(value) & MASK
        begin = of >> int(self._shift)
        places = self._hash[begin : begin + len(self._steps_K)].tolist()
        number = int(self._number[begin + places.index(of)]) if of in places else self._unknown
        return number if of else self._of_hash_0(value, number)

    def _of_hash_0(self, value: object, otherwise: int) -> int:
        return self._empty if value == "" else self._unknown if value == 0 else otherwise


def _hashes(values: Iterable[object]) -> npt.NDArray[np.uint64]:
    return np.asarray(array.array("q", map(hash, values))).view(np.uint64)
