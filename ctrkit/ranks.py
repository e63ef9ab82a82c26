"""Several processes that share one piece of work, as torchrun starts them: on the GPUs of a machine, or on several.

Rank 0 leads: it holds the output's lock, writes it and tells the others whether there is anything to do. They speak
through gloo, and only about what has to be known by all; results go to files that all of them see.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ctrkit.errors import Resumable, UsageError, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ctrkit.rank_meeting import About

PATIENCE = datetime.timedelta(days=30)
"""How long ranks wait for each other while all of them live (`ctrkit.rank_watch`). One that is gone is noticed at once.
"""
JOINING = datetime.timedelta(minutes=10)
"""How long a rank tries to reach the first one, and to connect with each; the first one waits as long for all."""
GLOO_THREAD, TASKS = "pt_gloo_runloop", Path("/proc/self/task")
THREAD_SECONDS = 3.0
"""How long to wait for gloo's threads to end."""
AGAIN = "What was done is kept: run the same command again and it goes on from there"


LAUNCHED = "CTRKIT_LAUNCHED"
"""In the environment of ranks that `ctrkit.launch` started, which says itself which one failed first."""
LOST_ANOTHER = 75
"""Exit code of such a rank that ends because another one has."""


class LostRank(Resumable):
    """What a rank says that ends because of another one."""


class SilentlyLostRank(LostRank):
    """The same where the launcher tells of the other one."""

    exit_code = LOST_ANOTHER

    def show(self, file: IO[Any] | None = None) -> None:
        pass


def is_rank() -> bool:
    """Say whether this process was started as a rank, as torchrun does."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


class NotAlike(UsageError):
    """What all ranks raise that met and cannot work together, each with the same message."""


class ToldByFirst(UserError):
    """What a rank raises for an error that rank 0 raises too, and tells."""

    def __init__(self) -> None:
        super().__init__("rank 0 says what is wrong")

    def show(self, file: IO[Any] | None = None) -> None:
        pass


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_count: int = 1
    """The ranks of this machine."""

    @classmethod
    def of_environment(cls) -> "Ranks":
        """Return what torchrun says in the environment; one process where it says nothing."""
        if not is_rank():
            return cls()
        try:
            rank, count, local = (int(os.environ.get(n, "0")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
            here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        except ValueError:
            raise UsageError(
                "RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE in the environment is no number; use torchrun"
            ) from None
        if not 0 <= rank < count:
            raise UsageError(
                f"RANK = {rank} and WORLD_SIZE = {count} in the environment do not fit: ranks are numbered from 0 to "
                "WORLD_SIZE - 1; use torchrun"
            )
        return cls(rank, count, local, max(1, here)) if count > 1 else cls()

    @property
    def name(self) -> str:
        """What to call this process in messages; "" if it is the only one."""
        return f", rank {self.rank} of {self.count}" if self.count > 1 else ""

    def share(self, total: int) -> range:
        """Return this rank's share of `total` things: neighbours, and as many for each as can be."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def started(
        self, command: str, tables: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Path | None]
    ) -> "About | None":
        """Return for `joined` how this rank was started: a command, tables of the recipe, and its inputs."""
        if self.count == 1:
            return None
        from ctrkit.rank_meeting import About

        return About.of(command, tables, inputs)

    @contextlib.contextmanager
    def joined(self, about: "About | None" = None) -> Iterator[None]:
        """Connect the ranks for the block.

        about: how this one was started, which has to be as all were.

        Raises UsageError where a rank does not come or was started otherwise: the same on all that came. A rank that
        loses another one raises Resumable.
        """
        if self.count == 1:
            yield
            return
        store = self._store()
        import torch.distributed as dist

        from ctrkit import rank_meeting, rank_watch

        watch = rank_watch.Watch(self, store)
        with watch.running():  # not before: who waits for the store hears no signal that Python has to handle
            try:
                rank_meeting.meet(self, store, about or rank_meeting.About(), JOINING.total_seconds(), watch.raise_lost)
                dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.count, timeout=JOINING)
                _wait_longer(dist.group.WORLD)
                store.set_timeout(PATIENCE)  # NCCL connects through it with the first message
                yield
            except RuntimeError as e:
                if _lost(e):
                    raise self._lost_another(e) from None
                raise
            except OSError as e:
                raise Resumable(f"rank {self.rank} of {self.count} cannot go on: {_first_line(e)}. {AGAIN}") from None
            finally:
                watch.leave()
                if dist.is_initialized():
                    with contextlib.suppress(RuntimeError):
                        dist.destroy_process_group()
                _wait_for_threads()

    def _store(self) -> Any:
        """Return torch's store, which rank 0 or its launcher holds."""
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a store that ends is told with torch's own stack
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:  # as if alone: who else comes is found out by looking, since torch's own wait for all hears nothing
            store = next(rendezvous("env://", self.rank, 1, timeout=JOINING))[0]
        except (RuntimeError, ValueError) as e:
            where = ":".join(os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UsageError(
                f"rank {self.rank} of {self.count} cannot reach the others at MASTER_ADDR:MASTER_PORT, {where}: "
                f"{_first_line(e)}. Start all of them with torchrun"
            ) from None
        # torchrun's store outlives a restart, with the addresses of those that have ended.
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

    def group(self, backend: str) -> "ProcessGroup":
        """Return a new process group of all ranks. All have to call it, and each waits until all do."""
        import torch.distributed as dist

        self.gather(None)  # where one that has ended is noticed, as it is not at the store
        try:
            group = dist.new_group(backend=backend, timeout=JOINING)
        except RuntimeError as e:
            if "timeout" not in str(e):
                raise self._lost_another(e) from None
            raise _lost_rank(
                f"rank {self.rank} of {self.count} has waited {JOINING.total_seconds() / 60:.3g} minutes for another "
                f"one to connect with it, which has ended or stands still ({_first_line(e)}). {AGAIN}"
            ) from None
        assert isinstance(group, dist.ProcessGroup)
        _wait_longer(group)
        return group

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave, in their order. All ranks have to call it."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as e:
            raise self._lost_another(e) from None
        return found

    def gather_first(self, value: Any) -> list[Any]:
        """Return at rank 0 what each rank gave, in their order; elsewhere nothing. All ranks have to call it."""
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.count if self.rank == 0 else None
        try:
            dist.gather_object(value, found)
        except RuntimeError as e:
            raise self._lost_another(e) from None
        return found or []

    def tell(self, value: Any = None) -> Any:
        """Return what rank 0 gave. All ranks have to call it."""
        return self.gather(value)[0]

    def _lost_another(self, error: Exception) -> Resumable:
        return _lost_rank(
            f"rank {self.rank} of {self.count} has lost another one, whose own message says why "
            f"({_first_line(error)}). {AGAIN}"
        )

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


ALONE = Ranks()
"""One process."""


@dataclass
class Leader:
    """Rank 0, before and after it has told the others to start."""

    ranks: Ranks
    started: bool = False

    def start(self) -> None:
        """Tell the others that there is work."""
        self.started = True
        self.ranks.gather(True)


def _wait_longer(group: Any) -> None:
    """Let a group whose ranks have met wait while all of them live."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else distributed_c10d._set_pg_timeout
    set_timeout(PATIENCE, group)


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


def _lost_rank(message: str) -> LostRank:
    return SilentlyLostRank(message) if LAUNCHED in os.environ else LostRank(message)


def _lost(error: RuntimeError) -> bool:
    """Say whether an error is that of a collective whose other side is gone."""
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
