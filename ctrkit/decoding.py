"""Batches of pictures read and decoded ahead of whoever uses them, in threads or in processes.

Pillow decodes and resizes without Python's lock, and a few threads are enough for a network on a CPU. What remains
under the lock bounds any number of threads, so that a GPU has processes. These write pixels into memory that they share
with this one, and only reasons travel between them.
"""

import contextlib
import itertools
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from ctrkit import pictures
from ctrkit.errors import Resumable
from ctrkit.pictures import BadPicture, Pixels, Place
from ctrkit.workers import die_with_parent

AHEAD = 2
"""Batches that are decoded while one is used, at least."""
TASK = 8
"""Pictures that a thread or process takes at a time, at most."""
THREADS = 8
"""At most, where threads decode."""


@dataclass(frozen=True)
class Decoded:
    """A batch of pictures."""

    number: int
    pixels: Pixels
    """[usable pictures, 3, size, size]; changes once the next batch is asked for."""
    bad: dict[int, str]
    """Position in the batch → why that picture cannot be used."""


@dataclass(frozen=True)
class _Memory:
    """Slots for pictures, [slots, batch, 3, size, size] uint8, in memory that other processes can map."""

    pid: int
    fd: int
    shape: tuple[int, int, int, int, int]

    def map(self) -> Pixels:
        """Return the slots, in the process that made them or in another."""
        size = max(1, int(np.prod(self.shape)))
        if self.pid == os.getpid():
            return np.frombuffer(mmap.mmap(self.fd, size), np.uint8).reshape(self.shape)
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR)
        try:
            return np.frombuffer(mmap.mmap(fd, size), np.uint8).reshape(self.shape)
        finally:
            os.close(fd)


def cores() -> int:
    """Return how many cores this process may use; under torchrun, its share of them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Decoder:
    """Decodes batches of pictures. Use as a context manager.

    Parameters
    ----------
    size: side of the square that is made of each.
    batch: pictures in a batch, at most.
    workers: processes that decode; 0: threads of this one.
    crop: share of a picture's shorter side that the square keeps.
    """

    def __init__(self, size: int, batch: int, workers: int, crop: float = pictures.CROP) -> None:
        self.size, self.batch, self.workers, self.crop = size, batch, workers, crop
        self.threads = min(THREADS, cores())
        hands = workers or self.threads
        self._task = max(1, min(TASK, batch // hands))
        self.ahead = max(AHEAD, -(-2 * hands * self._task // batch))
        self._shape = (self.ahead + 1, batch, 3, size, size)

    def __enter__(self) -> "Decoder":
        self._closing = contextlib.ExitStack()
        try:
            self._pool = self._processes() if self.workers else self._threads()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._closing.close()

    def decode(self, batches: Iterable[tuple[int, Sequence[Place]]]) -> Iterator[Decoded]:
        """Yield batches, (number, places) each, in order; the next ones are decoded meanwhile."""
        waiting: deque[_Waiting] = deque()
        slots = itertools.cycle(range(self.ahead + 1))
        try:
            for (number, places), slot in zip(batches, slots, strict=False):
                waiting.append(_Waiting(number, slot, self._submit(slot, places)))
                if len(waiting) > self.ahead:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        except BrokenProcessPool:
            raise Resumable(
                "a process that decodes pictures was killed, most likely because memory ran out; run the same command "
                "again with fewer (--set extract-images.workers=1). What was done is kept"
            ) from None

    def _threads(self) -> Executor:
        self._slots: Pixels = np.empty(self._shape, np.uint8)
        return ThreadPoolExecutor(self.threads)

    def _processes(self) -> Executor:
        # Not /dev/shm, which containers keep small; and it goes with the last process that has it, however that ends.
        fd = os.memfd_create("ctrkit-pictures")
        self._closing.callback(os.close, fd)
        os.ftruncate(fd, max(1, int(np.prod(self._shape))))
        memory = _Memory(os.getpid(), fd, self._shape)
        self._slots = memory.map()
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, context, _begin_worker, (memory,))

    def _submit(self, slot: int, places: Sequence[Place]) -> list["Future[list[str]]"]:
        starts = range(0, len(places), self._task)
        tasks = [(slot, start, places[start : start + self._task]) for start in starts]
        if self.workers:
            return [self._pool.submit(_decode_in_worker, *task, self.size, self.crop) for task in tasks]
        return [self._pool.submit(_decode, self._slots, *task, self.size, self.crop) for task in tasks]

    def _finish(self, waiting: "_Waiting") -> Decoded:
        reasons = [reason for future in waiting.futures for reason in future.result()]
        pixels = self._slots[waiting.slot, : len(reasons)]
        bad = {place: reason for place, reason in enumerate(reasons) if reason}
        if bad:
            pixels = pixels[[not reason for reason in reasons]]
        return Decoded(waiting.number, pixels, bad)


@dataclass(frozen=True)
class _Waiting:
    """A batch that is being decoded."""

    number: int
    slot: int
    futures: list["Future[list[str]]"]


def _decode(slots: Pixels, slot: int, start: int, places: Sequence[Place], size: int, crop: float) -> list[str]:
    """Decode pictures into a slot, from `start` on; return for each why it cannot be used, "" if it can."""
    reasons = []
    for row, place in enumerate(places, start):
        try:
            slots[slot, row] = pictures.decode(pictures.read(place), size, crop)
            reasons.append("")
        except BadPicture as bad:
            reasons.append(str(bad) or "cannot be used")
    return reasons


_worker_slots: Pixels
"""Of the process that a worker works for."""


def _begin_worker(memory: _Memory) -> None:
    global _worker_slots
    _worker_slots = memory.map()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    pictures.quiet().__enter__()
    die_with_parent()


def _decode_in_worker(slot: int, start: int, places: Sequence[Place], size: int, crop: float) -> list[str]:
    return _decode(_worker_slots, slot, start, places, size, crop)
