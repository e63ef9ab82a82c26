"""The goods of windows of behaviours, by loops that Numba compiles. See `ctrkit.clicks`."""

from typing import Any

import numpy as np

from ctrkit.numba_loops import compiled
from ctrkit.spool import Ints


@compiled("Tuple((i8[::1],i8[::1],i8[::1],i8[::1],i8[::1]))(u4[::1],i8[::1],i8[::1],i8[::1],i8[::1],i8,u8[::1])")
def goods_of_windows(
    key: Any, weight: Any, dwell: Any, begin: Any, end: Any, first: Any, seen: Any
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Sum the events of each window up by key.

    Parameters
    ----------
    key, weight, dwell: of the events.
    begin, end: the events of each window, one slice.
    first: the number of the first window, from 1, in the life of `seen`.
    seen: UInt64 [keys], zero at first.

    Returns, a row a window and key, in order of the window and the key's last event there: window, that event, number
    of events, sum of weights, sum of dwells; all Int64.
    """
    room, longest = 0, 0
    for window in range(len(begin)):
        room += end[window] - begin[window]
        longest = max(longest, end[window] - begin[window])
    windows, events, visits = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    weights, dwells = np.empty(room, np.int64), np.empty(room, np.int64)
    last, number = np.empty(longest, np.int64), np.empty(longest, np.int64)
    heavy, long = np.empty(longest, np.int64), np.empty(longest, np.int64)
    n = 0
    for window in range(len(begin)):
        mark = np.uint64(first + window) << np.uint64(32)
        keys = 0
        for event in range(begin[window], end[window]):
            there = seen[key[event]]
            if there >> np.uint64(32) << np.uint64(32) != mark:
                there = mark | np.uint64(keys)
                seen[key[event]] = there
                number[keys] = heavy[keys] = long[keys] = 0
                keys += 1
            place = np.int64(there & np.uint64(0xFFFFFFFF))
            last[place] = event
            number[place] += 1
            heavy[place] += weight[event]
            long[place] += dwell[event]
        for event in range(begin[window], end[window]):
            place = np.int64(seen[key[event]] & np.uint64(0xFFFFFFFF))
            if last[place] == event:
                windows[n], events[n], visits[n] = window, event, number[place]
                weights[n], dwells[n] = heavy[place], long[place]
                n += 1
    return windows[:n], events[:n], visits[:n], weights[:n], dwells[:n]
