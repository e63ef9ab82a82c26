"""Values by their places, by a loop that Numba compiles. See `ctrkit.spool.take`."""

from typing import Any

from numba import types

from ctrkit.numba_loops import compiled, read

VALUES = (types.uint8, types.uint16, types.uint32, types.int64)
PLACES = (types.uint8, types.uint16, types.uint32, types.int64)


@compiled(*(types.void(read(v), read(p), types.Array(v, 1, "C")) for v in VALUES for p in PLACES))
def take(values: Any, places: Any, out: Any) -> None:
    """Write the value at each place. Places are not checked."""
    for i in range(len(places)):
        out[i] = values[places[i]]
