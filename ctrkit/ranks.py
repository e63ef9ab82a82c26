"""Several processes that share one piece of work, as torchrun starts them: on the GPUs of a machine, or on several.

Rank 0 leads: it holds the output's lock, writes it and tells the others whether there is anything to do. They speak
through gloo, and only about what has to be known by all; results go to files that all of them see.
"""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ctrkit.errors import Resumable, UsageError

PATIENCE = datetime.timedelta(days=30)
"""How long ranks wait for each other while all of them live. One that is gone is noticed at once."""
GLOO_THREAD, TASKS = "pt_gloo_runloop", Path("/proc/self/task")
THREAD_SECONDS = 3.0
"""How long to wait for gloo's threads to end."""
AGAIN = "What was done is kept: run the same command again and it goes on from there"


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""

    @classmethod
    def of_environment(cls) -> "Ranks":
        """Return what torchrun says in the environment; one process where it says nothing."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, count, local = (int(os.environ.get(n, "0")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError:
            raise UsageError("RANK, WORLD_SIZE or LOCAL_RANK in the environment is no number; use torchrun") from None
        return cls(rank, count, local) if count > 1 else cls()

    @property
    def name(self) -> str:
        """What to call this process in messages; "" if it is the only one."""
        return f", rank {self.rank} of {self.count}" if self.count > 1 else ""

    def share(self, total: int) -> range:
        """Return this rank's share of `total` things: neighbours, and as many for each as can be."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Connect the ranks for the block. A rank that loses another raises Resumable."""
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        with _told_to_stop(self):
            try:
                dist.init_process_group("gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as e:
                raise UsageError(
                    f"rank {self.rank} of {self.count} cannot reach the others at MASTER_ADDR "
                    f"{os.environ.get('MASTER_ADDR')!r}: {_first_line(e)}. Start all of them with torchrun"
                ) from None
            try:
                yield
            finally:
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()
                _wait_for_threads()

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave, in their order. All ranks have to call it."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as e:
            raise Resumable(
                f"rank {self.rank} of {self.count} has lost another one, whose own message says why "
                f"({_first_line(e)}). {AGAIN}"
            ) from None
        return found

    @contextlib.contextmanager
    def leading(self) -> Iterator["Leader"]:
        """For rank 0: yield what starts the others, which are sent home if the block ends before."""
        leader = Leader(self)
        try:
            yield leader
        except BaseException:
            if not leader.started:
                with contextlib.suppress(Resumable):
                    self.gather(False)
            raise

    def follow(self) -> bool:
        """For the other ranks: wait for rank 0, and say whether there is work."""
        return bool(self.gather(None)[0])


@dataclass
class Leader:
    """Rank 0, before and after it has told the others to start."""

    ranks: Ranks
    started: bool = False

    def start(self) -> None:
        """Tell the others that there is work."""
        self.started = True
        self.ranks.gather(True)


@contextlib.contextmanager
def _told_to_stop(ranks: Ranks) -> Iterator[None]:
    """Turn SIGTERM, by which torchrun ends the ranks when one of them has failed, into a message."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Resumable(f"rank {ranks.rank} of {ranks.count} was told to stop, as when another one has failed. {AGAIN}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for_threads() -> None:
    """Wait until gloo's threads are gone: one that gives up a tensor while Python ends aborts the process."""
    until = time.monotonic() + THREAD_SECONDS
    while time.monotonic() < until and any(_thread_name(thread) == GLOO_THREAD for thread in TASKS.iterdir()):
        time.sleep(0.01)


def _thread_name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # it has just ended
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
