"""Which ids are trained as unknown, by a loop that Numba compiles. See `ctrkit.id_masks`."""

from typing import Any

from numba import types, uint64

from ctrkit.numba_loops import compiled, read


@compiled("u8(u8,u8)")
def _mixed(z: Any, other: Any) -> Any:
    """Take another number into a hash (splitmix64)."""
    z = (z ^ other) + uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


IDS = read(types.int64)


@compiled(types.void(IDS, types.uint64, IDS, read(types.uint64), IDS, types.float64, types.float64, types.int64[::1]))
def replace_unknown(
    key_n: Any, purpose: int, index_n: Any, seed: Any, count_V: Any, rate: float, rest: float, out_n: Any
) -> None:
    """Put each index into `out`, or 1 where its draw, a hash of key, purpose, index and seed, is below
    rate + rest / count."""
    for i in range(len(index_n)):
        index = index_n[i]
        z = _mixed(_mixed(uint64(key_n[i]), purpose), uint64(index))
        for j in range(len(seed)):
            z = _mixed(z, seed[j])
        draw = float(z >> uint64(11)) * 2.0**-53
        out_n[i] = 1 if index > 1 and draw < rate + rest / max(float(count_V[index]), 1.0) else index
