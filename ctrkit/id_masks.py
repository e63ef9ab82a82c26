"""Which ids of a batch a model does not see: trained as unknown, discarded by dropout, too rare for the filter.

Each draw is a hash of what it is about and of a seed, so that batch size, order and grouping change nothing.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ctrkit import numba_loops

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
UNKNOWN, DROPOUT = 0xA1, 0xD0
"""What a draw is for. Hashed with the sample first: a neighbour with the neighbouring id would else share its draw."""


def unknown_mask(
    key: Ints, seed: Sequence[Ints | int], index: Ints, count_i: npt.NDArray[np.float64], rate: float
) -> Bools:
    """Say which ids of a batch are trained as unknown.

    An id seen n times in training becomes unknown with probability rate + (1/2 − rate)/n: often if rare, so that
    the unknown row learns what a new id looks like; `rate` 0 switches it off. The draw is a hash of `key` (the
    sample or group), the id and `seed`. Arguments are broadcast.
    """
    if rate == 0.0:
        return np.zeros(index.shape, np.bool_)
    return (index > 1) & (_uniform(key, UNKNOWN, index, *seed) < _unknown_chance(count_i, rate))


def replace_unknown(key_n: Ints, seed: Sequence[int], index_n: Ints, count_V: Ints, rate: float) -> Ints:
    """Return ids [n] with 1 in the place of those that `unknown_mask` names; count_V: how often each id is seen."""
    code = numba_loops.load("ctrkit.compiled_masks")
    if code is None:
        return np.where(unknown_mask(key_n, seed, index_n, count_V[index_n].astype(np.float64), rate), 1, index_n)
    out_n, numbers = np.empty(len(index_n), np.int64), np.array(seed, np.int64).astype(np.uint64)
    arrays = (np.ascontiguousarray(x, np.int64) for x in (key_n, index_n, count_V))
    key_n, index_n, count_V = arrays
    code.replace_unknown(key_n, UNKNOWN, index_n, numbers, count_V, rate, max(0.0, 0.5 - rate), out_n)
    return out_n


def with_unknown(count_V: Ints, rate: float) -> npt.NDArray[np.float64]:
    """Return n_i with the samples that are expected to train the unknown row added to index 1."""
    n_V = count_V.astype(np.float64)
    if rate > 0.0:
        n_V[1] += (n_V[2:] * _unknown_chance(n_V[2:], rate)).sum()
    return n_V


def _unknown_chance(count: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.float64]:
    return np.asarray(rate + max(0.0, 0.5 - rate) / np.maximum(count, 1.0), np.float64)


def dropout_mask(sample_id_P: Ints, place_P: Ints, seed: Sequence[int], rate: float) -> Bools:
    """Say which (sample, behaviour) pairs keep the behaviour's ids (DIN section 6.2, dropout).

    Parameters
    ----------
    sample_id_P: the sample of each pair, by its id.
    place_P: the behaviour's place in its history, from 0.
    rate: chance that a sample does not see a behaviour.

    Returns [P], true for a pair that is kept. Samples that share a history draw each for itself.
    """
    return _uniform(sample_id_P, DROPOUT, place_P, *seed) >= rate


def most_frequent(count_V: Ints, top: int) -> Bools:
    """Return [V]: whether an index is one of the `top` most frequent ids (DIN section 6.2, filter).

    Of equally frequent ones the lower index is kept. Indexes 0 (missing) and 1 (unknown) are always true.
    """
    out_V = np.ones(len(count_V), np.bool_)
    out_V[2 + np.argsort(-count_V[2:], kind="stable")[top:]] = False
    return out_V


def _uniform(key: Ints, *others: Ints | int) -> npt.NDArray[np.float64]:
    """Hash to [0, 1), one of the others after the other (splitmix64)."""
    z = key.astype(np.uint64)
    with np.errstate(over="ignore"):
        for other in others:
            z = z ^ np.atleast_1d(np.asarray(other)).astype(np.uint64)
            z += np.uint64(0x9E3779B97F4A7C15)
            z ^= z >> np.uint64(30)
            z *= np.uint64(0xBF58476D1CE4E5B9)
            z ^= z >> np.uint64(27)
            z *= np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return np.asarray(z >> np.uint64(11), np.float64) * 2.0**-53
