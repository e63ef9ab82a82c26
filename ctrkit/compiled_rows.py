"""Rows of embedding tables, by loops that Numba compiles: the distinct ones of a batch, and sums of gradients."""

from typing import Any

from ctrkit.numba_loops import compiled, compiled_as_called


@compiled("i8(i8[::1],i4[::1],i8[::1])")
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


@compiled("void(i8[::1],i4[::1],i8[::1],i8[::1])")
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
