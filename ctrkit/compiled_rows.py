"""Rows of embedding tables, by loops that Numba compiles: the distinct ones of a batch, sums of gradients, Adam."""

from typing import Any

import numpy as np
from numba import types

from ctrkit.numba_loops import compiled, compiled_as_called, read


@compiled(types.int64(read(types.int64), types.int32[::1], types.int64[::1]))
def note(rows: Any, place_V: Any, distinct: Any) -> int:
    """Put each row that has no place yet into `distinct`, in order of appearance, and return how many these are.

    Parameters
    ----------
    place_V: −1 for each row of the table; 0 afterwards for those that are noted.
    """
    n = 0
    for i in range(len(rows)):
        if place_V[rows[i]] < 0:
            place_V[rows[i]] = 0
            distinct[n] = rows[i]
            n += 1
    return n


@compiled(types.void(read(types.int64), types.int32[::1], read(types.int64), types.int64[::1]))
def places(rows: Any, place_V: Any, distinct: Any, out: Any) -> None:
    """Put the place of each row in `distinct` into `out`, and −1 back into `place_V`."""
    for i in range(len(distinct)):
        place_V[distinct[i]] = i
    for i in range(len(rows)):
        out[i] = place_V[rows[i]]
    for i in range(len(distinct)):
        place_V[distinct[i]] = -1


@compiled_as_called()
def add_rows(values: Any, index: Any, out: Any) -> None:
    """Add row i of `values` to row index[i] of `out`."""
    for i in range(len(index)):
        value, total = values[i], out[index[i]]
        for j in range(len(value)):
            total[j] += value[j]


@compiled_as_called()
def adam(
    rows: Any,
    grad_UD: Any,
    weight_VD: Any,
    m_VD: Any,
    v_VD: Any,
    decay_U: Any,
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
) -> None:
    """Take an Adam step on distinct rows of a table, but for row 0; decay_U·weight joins each row's gradient first."""
    number = weight_VD.dtype.type
    b1, b2, e, step, one = number(beta1), number(beta2), number(eps), number(size), number(1)
    for i in range(len(rows)):
        row = rows[i]
        if row == 0:
            continue
        grad, weight, m, v, decay = grad_UD[i], weight_VD[row], m_VD[row], v_VD[row], decay_U[i]
        for j in range(len(grad)):
            g = grad[j] + decay * weight[j]
            m[j] += (one - b1) * (g - m[j])
            v[j] = b2 * v[j] + (one - b2) * g * g
            weight[j] -= step * m[j] / (np.sqrt(v[j]) + e)
