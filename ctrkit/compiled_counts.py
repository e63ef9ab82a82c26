"""How many rows have a code, and samples an id, by loops that Numba compiles. See `ctrkit.indexing.add_counts` and
`ctrkit.grouping.count_samples`."""

from typing import Any

import numpy as np
from numba import types

from ctrkit.numba_loops import compiled, read

COUNTS, IDS, LENGTHS = types.uint32[::1], read(types.uint32), read(types.int64)


@compiled(*(types.void(read(dtype), COUNTS) for dtype in (types.uint8, types.uint16, types.uint32)))
def count_codes(codes: Any, counts: Any) -> None:
    """Add to the counts of codes the rows that have them."""
    for i in range(len(codes)):
        counts[codes[i]] += np.uint32(1)


@compiled(types.void(LENGTHS, IDS, LENGTHS, IDS, COUNTS, types.int64[::1]))
def count_ids(lengths: Any, shared: Any, samples: Any, own: Any, seen: Any, counts: Any) -> None:
    """Add to the counts of ids the samples that have them.

    Parameters
    ----------
    lengths: of the lists of a row's shared ids, which stand in `shared` one after the other.
    samples: how many samples each row has.
    own: the id of each sample, or none at all.
    seen: UInt32 [ids], zero.
    """
    at = sample = 0
    for row in range(len(lengths)):
        for i in range(at, at + lengths[row]):
            if seen[shared[i]] != row + 1:
                seen[shared[i]] = row + 1
                counts[shared[i]] += samples[row]
        at += lengths[row]
        if len(own):
            for i in range(sample, sample + samples[row]):
                if seen[own[i]] != row + 1:
                    counts[own[i]] += 1
            sample += samples[row]
