"""Things made ahead of their use, in a thread: while a batch trains, the next ones are read and prepared."""

import contextlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

T = TypeVar("T")
NICENESS = 10
"""Of a thread that yields the cores."""


def yield_cores() -> None:
    """Have this thread run where a core is idle rather than beside threads that compute. On Linux, whose priorities are
    of threads; elsewhere nothing is done."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def ahead(items: Iterable[T], n: int) -> Iterator[T]:
    """Yield the items, in order, while a thread makes the next ones, at most `n` of them.

    What making them raises is raised here. The thread ends when the iterator is closed or forgotten; until then nobody
    else may use what `items` uses.
    """
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(n)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None, more: bool) -> bool:
        while not stopped.is_set():
            try:
                made.put((item, error, more), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item, None, True):
                    return
        except BaseException as e:
            put(None, e, False)
        else:
            put(None, None, False)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = made.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def in_step(items: Iterator[T], n: int, worker: Executor) -> Generator[T]:
    """Yield the items, in order, while a worker of one thread makes the next ones, `n` of them.

    Item i + n is asked of the worker when item i is wanted, whatever the timing. So processes that want the same items
    ask the same of their workers, who may wait for each other; nobody leaves before his worker has done what he asked.
    """
    end = object()
    coming: deque[Future[T | object]] = deque(worker.submit(next, items, end) for _ in range(n))
    try:
        while True:
            coming.append(worker.submit(next, items, end))
            item = coming[0].result()  # and is waited for below, where this is interrupted
            coming.popleft()
            if item is end:
                return
            yield item  # type: ignore[misc]
    finally:
        wait(coming)


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each when the next one has been made."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held
