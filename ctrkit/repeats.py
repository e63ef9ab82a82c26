"""Pairs of samples and behaviours, those that are alike once.

An attention that compares ids gives pairs of equal ids equal weights. Users come back to the same goods, and the same
ad is shown to them again: within a group, samples whose compared ids are equal are one query, behaviours with equal ids
one key, which counts as often as it is there. Exact but for rounding. Letters as in `ctrkit.models.batch`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctrkit import numba_loops
from ctrkit.models.batch import DistinctPairs

Ints = npt.NDArray[np.int64]
WORTH = 0.95
"""Share of the pairs that may be left where looking at each once pays."""


def all_pairs(group_N: Ints, offsets_G: Ints) -> tuple[Ints, Ints]:
    """Return ([P], [P]): everything of N, each with all that its group g has, offsets_G[g] to offsets_G[g + 1]."""
    lengths_N = np.diff(offsets_G)[group_N]
    n = int(lengths_N.sum())
    if (code := numba_loops.load("ctrkit.compiled_repeats")) is None:
        start_N = np.cumsum(lengths_N) - lengths_N
        return np.repeat(np.arange(len(group_N)), lengths_N), np.arange(n) + np.repeat(
            offsets_G[:-1][group_N] - start_N, lengths_N
        )
    one_P, other_P = np.empty(n, np.int64), np.empty(n, np.int64)
    code.pairs(group_N, np.ascontiguousarray(offsets_G, np.int64), one_P, other_P)
    return one_P, other_P


def distinct_pairs(
    group_S: Ints, asked: Mapping[str, Ints], group_B: Ints, had: Mapping[str, Ints], n_groups: int, n_pairs: int
) -> DistinctPairs | None:
    """Return a batch's pairs, those alike once; None where few are alike, or without Numba.

    Parameters
    ----------
    group_S, group_B: the group of each sample and behaviour, rising.
    asked, had: feature → [S] ids that are compared, [B] all ids of the behaviours.
    n_pairs: the number of all pairs.
    """
    if (code := numba_loops.load("ctrkit.compiled_repeats")) is None:
        return None
    query_S, first_Q = _numbered(code.number, group_S, asked)
    key_B, first_K = _numbered(code.number, group_B, had)
    keys_G = np.bincount(group_B[first_K], minlength=n_groups)
    offsets_G = np.concatenate([[0], np.cumsum(keys_G)])
    group_Q = group_S[first_Q]
    if keys_G[group_Q].sum() > WORTH * n_pairs:
        return None
    query_P, key_P = all_pairs(group_Q, offsets_G)
    index = {name: ids[first_Q] for name, ids in asked.items()} | {name: ids[first_K] for name, ids in had.items()}
    return DistinctPairs(
        {name: torch.from_numpy(ids) for name, ids in index.items()},
        torch.from_numpy(query_S),
        torch.from_numpy(np.bincount(key_B, minlength=len(first_K)).astype(np.float32)),
        torch.from_numpy(query_P),
        torch.from_numpy(key_P),
    )


def _numbered(number: Any, group_N: Ints, ids: Mapping[str, Ints]) -> tuple[Ints, Ints]:
    """Return [N] the number of each row among the distinct ones, and the first row of each number."""
    number_N, first_N = np.empty(len(group_N), np.int64), np.empty(len(group_N), np.int64)
    n = number(np.stack([group_N, *ids.values()], 1), number_N, first_N)
    return number_N, first_N[:n]
