"""Pairs of samples and behaviours, and rows of ids that are alike, by loops that Numba compiles."""

from typing import Any

import numpy as np
from numba import types, uint64

from ctrkit.numba_loops import compiled, read

IDS = read(types.int64)
ROWS = types.Array(types.int64, 2, "C", readonly=True)


@compiled(types.int64(ROWS, types.int64[::1], types.int64[::1]))
def number(id_NF: Any, number_N: Any, first_N: Any) -> int:
    """Number the distinct rows in order of appearance; return how many there are.

    Parameters
    ----------
    number_N: for the number of each row.
    first_N: for the first row that has each number.
    """
    size = 2
    while size < 2 * len(id_NF):
        size *= 2
    table, found = np.full(size, -1, np.int32), 0
    for i in range(len(id_NF)):
        row, z = id_NF[i], uint64(0)
        for j in range(len(row)):
            z = (z ^ uint64(row[j])) * uint64(0x9E3779B97F4A7C15)
            z = z ^ (z >> uint64(32))
        at = z & uint64(size - 1)
        while True:
            known = table[at]
            if known < 0:
                table[at] = known = found
                first_N[found] = i
                found += 1
                break
            other, alike = id_NF[first_N[known]], True
            for j in range(len(row)):
                alike = alike and row[j] == other[j]
            if alike:
                break
            at = (at + uint64(1)) & uint64(size - 1)
        number_N[i] = known
    return found


@compiled(types.void(IDS, IDS, types.int64[::1], types.int64[::1]))
def pairs(group_N: Any, offsets_G: Any, one_P: Any, other_P: Any) -> None:
    """Pair everything of N with all that its group has, from offsets_G[g] to offsets_G[g + 1]; in order."""
    p = 0
    for i in range(len(group_N)):
        for j in range(offsets_G[group_N[i]], offsets_G[group_N[i] + 1]):
            one_P[p], other_P[p] = i, j
            p += 1
