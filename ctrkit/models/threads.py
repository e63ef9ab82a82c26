"""Threads of ours that share out a step's work on a CPU.

torch's own threads wait awake for the next operation, and take the cores from whoever prepares batches. While
`own(threads)` holds, torch's operations run in the thread that calls them, and what is worth it is shared out by
`side_by_side`.
"""

import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import torch

SWITCH = 0.0005
"""Seconds after which a thread that waits for the interpreter is let in, 0.005 otherwise: so that one that is to do its
share of a step does not wait long for the one that prepares batches."""
_here = threading.local()
"""`threads`: of ours, for work that this thread shares out."""


@contextlib.contextmanager
def own(threads: int) -> Iterator[None]:
    """Have operations of this thread run alone within the block, and `side_by_side` by so many threads."""
    before, outer, patience = torch.get_num_threads(), owned(), sys.getswitchinterval()
    torch.set_num_threads(1)
    _here.threads = threads
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(patience)
        _here.threads = outer
        torch.set_num_threads(before)


def owned() -> int:
    """Return the threads of the `own` that holds here; 0 if none does."""
    return getattr(_here, "threads", 0)


def count() -> int:
    """Return how many threads work is shared out to: those of `own`, or else as many as torch has."""
    return owned() or torch.get_num_threads()


def side_by_side(work: Callable[[int], None], threads: int) -> None:
    """Call work(0) to work(threads − 1), each in a thread that does its tensor operations alone, without gradients."""
    here = torch.get_num_threads() == 1
    waiting = [_pool(threads, os.getpid()).submit(_without_gradients, work, i) for i in range(int(here), threads)]
    try:
        if here:
            with torch.inference_mode(False):
                _without_gradients(work, 0)
    finally:
        concurrent.futures.wait(waiting)
    for future in waiting:
        future.result()


def _without_gradients(work: Callable[[int], None], number: int) -> None:
    with torch.no_grad():
        work(number)


@functools.cache
def _pool(threads: int, process: int) -> concurrent.futures.ThreadPoolExecutor:
    # set_num_threads is of the thread that calls it.
    return concurrent.futures.ThreadPoolExecutor(threads, "side", torch.set_num_threads, (1,))
