"""Who runs the tasks of a data stage: processes here, or the workers of a Ray cluster.

A phase is a list of independent tasks: one function, called with different arguments, each of which writes files of
its own and returns a small JSON value. What is done is recorded in the phase's folder, so that a stage that was killed
goes on where it was, and a task of a worker that died is done again. The order of work never reaches the results.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ctrkit import numba_loops
from ctrkit.errors import Resumable, UserError
from ctrkit.progress import Meter
from ctrkit.workers import die_with_parent, quick_process

RAY_RETRIES = 5
"""How often Ray gives a task to another worker when one dies."""
RAY_PATIENCE = 10.0
"""Seconds to wait for a cluster to answer, and for cancelled tasks to end."""
SAME_VERSIONS = ("ctrkit", "numpy", "polars")
"""What all machines of a cluster must have alike."""
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(33554432),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 29),
    "_RJEM_MALLOC_CONF": "dirty_decay_ms:10000,muzzy_decay_ms:10000",
}
"""What tells the allocators of NumPy and polars to keep freed memory for the next array: a fifth of the time else."""
Function = Callable[..., Any]
Phase = tuple[str, Function, Sequence[tuple[Any, ...]]]
"""Name, the tasks' function, its arguments for each task."""
Job = tuple[Path, Function, tuple[Any, ...]]
"""Record of a task, its function and arguments."""


class Engine:
    """Runs tasks in this process. Use as a context manager; the subclasses hold workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        pass

    def run(self, phase: str, function: Function, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return `function(*task)` of each task, in order. `function` must be at the top of a module."""
        return self.run_together([(phase, function, tasks)])[0]

    def run_together(self, phases: Sequence[Phase]) -> list[list[Any]]:
        """Return what `run` would for each of some phases, none of which needs what another leaves: their tasks are
        given out in this order, without a wait in between."""
        jobs: list[list[Job]] = []
        for phase, function, tasks in phases:
            home = self.folder / phase
            home.mkdir(parents=True, exist_ok=True)
            jobs.append([(home / f"{i:06}.json", function, task) for i, task in enumerate(tasks)])
        left = [job for some in jobs for job in some if not job[0].is_file()]
        count = sum(map(len, jobs))
        with Meter(" and ".join(phase for phase, *_ in phases), count, "tasks") as meter:
            meter.add(count - len(left))
            self._each(left, meter.add)
        return [[json.loads(record.read_text(encoding="utf-8")) for record, *_ in some] for some in jobs]

    def _each(self, jobs: Sequence[Job], done: Callable[[], None]) -> None:
        for job in jobs:
            do_task(*job)
            done()


def do_task(record: Path, function: Function, task: tuple[Any, ...]) -> None:
    """Do one task and record its result. What the tasks of another phase left in this process goes first."""
    _give_back(function.__module__ + function.__qualname__)
    write_record(record, function(*task))


@functools.lru_cache(maxsize=1)
def _give_back(phase: str) -> None:
    """Give the memory that was freed, and kept for the next array of a phase like the last, back to the system when
    another phase (a name that differs from the last one given) begins."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def write_record(record: Path, result: Any) -> None:
    """Record what a task returned, which says that it is done."""
    tmp = record.with_name(f".{record.name}.{os.getpid()}")
    tmp.write_text(json.dumps(result), encoding="utf-8")
    tmp.replace(record)


class Pool:
    """Processes of this machine that do tasks. Use as a context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_begin
        )

    def submit(self, function: Function, tasks: Sequence[tuple[Any, ...]]) -> list["concurrent.futures.Future[Any]"]:
        """Have `function(*task)` called for each task."""
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        # A process starts when a task is submitted and none is idle, so there are never more than tasks.
        with _environment(POLARS_MAX_THREADS=str(threads), OMP_NUM_THREADS=str(threads), **KEEP_MEMORY):
            return [self._pool.submit(function, *task) for task in tasks]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)


def _begin() -> None:
    die_with_parent()
    quick_process()


def start_early(
    name: str, workers: int, tasks: int, modules: Sequence[str]
) -> contextlib.AbstractContextManager[Pool | None]:
    """Start the processes for an engine while the stage still looks at its inputs, with these modules imported, those
    of compiled loops too; None where it will need none.

    tasks: how many there will be at least. For the rest see `engine`. The stages import what takes long after it.
    """
    workers = min(workers or os.cpu_count() or 1, tasks)
    if name != "local" or workers < 2:
        return contextlib.nullcontext()
    pool = Pool(workers)
    pool.submit(_import, [(modules,)] * workers)
    return pool


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        if name.startswith("ctrkit.compiled"):
            numba_loops.load(name)
        else:
            importlib.import_module(name)


class LocalEngine(Engine):
    """Runs tasks in processes of this machine."""

    def __init__(self, folder: Path, workers: int, pool: Pool | None = None) -> None:
        super().__init__(folder)
        self.workers, self._pool = workers, pool

    def __enter__(self) -> "LocalEngine":
        self._pool = self._pool or Pool(self.workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        assert self._pool is not None
        self._pool.__exit__(kind, *rest)

    def _each(self, jobs: Sequence[Job], done: Callable[[], None]) -> None:
        assert self._pool is not None
        waiting = self._pool.submit(do_task, jobs)
        try:
            for future in concurrent.futures.as_completed(waiting):
                future.result()
                done()
        except concurrent.futures.process.BrokenProcessPool:
            raise Resumable(
                "a worker process was killed, most likely because memory ran out; run the same command again with "
                "fewer workers (--set workers=1) or smaller parts (a larger convert.partitions). What was done is kept"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


class _environment:
    """Sets variables of the environment for the processes started in the block."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *exc: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RayEngine(Engine):
    """Runs tasks on a Ray cluster, whose machines all see the raw files and the output folder at the same paths.

    The cluster is the one that RAY_ADDRESS names; without it, one is started on this machine. See docs/clusters.md.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        super().__init__(folder.absolute())
        self.workers = workers

    def __enter__(self) -> "RayEngine":
        try:
            import ray
        except ImportError:
            raise UserError('engine = "ray" needs Ray; install it with: pip install "ctrkit[ray]"') from None
        self._ray = ray
        address = os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"POLARS_MAX_THREADS": "1"}}}
        private = {}
        if address == "local":
            options |= {"num_cpus": self.workers or None, "include_dashboard": False}
            private = {"RAY_USAGE_STATS_ENABLED": "0"}
        try:
            _reach(address)
            with _environment(**private):
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
            raise UserError(
                f"cannot use the Ray cluster at RAY_ADDRESS = {address}: {_first_line(e)}. Is it running, with "
                f"the same Ray and Python as here, and is this machine one of it? `ray status` tells"
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        self._ray.shutdown()

    def _each(self, jobs: Sequence[Job], done: Callable[[], None]) -> None:
        here = Place.here(self.folder)
        remote = self._ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(far_task)
        records = {remote.remote(here, function, task): record for record, function, task in jobs}
        waiting = list(records)
        try:
            while waiting:
                (ready,), waiting = self._ray.wait(waiting, num_returns=1)
                write_record(records[ready], self._ray.get(ready))
                done()
        except self._ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, UserError):
                raise e.cause from None
            raise
        except self._ray.exceptions.RayError as e:
            raise Resumable(
                f"a task failed {RAY_RETRIES + 1} times because its worker or machine died or ran out of memory "
                f"({_first_line(e)}). Run the same command again, with smaller parts (a larger convert.partitions) if "
                f"it was memory. What was done is kept"
            ) from None
        finally:  # nothing may go on writing when the stage has ended
            for task in waiting:
                self._ray.cancel(task, force=True)
            self._ray.wait(waiting, num_returns=len(waiting), timeout=RAY_PATIENCE) if waiting else None


@dataclass(frozen=True)
class Place:
    """What a worker on another machine must find as it is here."""

    folder: Path
    current: str
    """The folder that relative paths begin at."""
    versions: dict[str, str]

    @classmethod
    def here(cls, folder: Path) -> "Place":
        """Describe this machine."""
        return cls(folder, os.getcwd(), {name: importlib.metadata.version(name) for name in SAME_VERSIONS})

    def enter(self) -> None:
        """Make this process, on whatever machine, one that can do the tasks; raise UserError if it cannot."""
        machine = platform.node()
        if not self.folder.is_dir():
            raise UserError(
                f"the machine {machine} of the Ray cluster does not see {self.folder}; the raw files and the output "
                f"folder must lie on storage that all its machines have at the same path"
            )
        own = Place.here(self.folder).versions
        for name, version in self.versions.items():
            if own[name] != version:
                raise UserError(
                    f"the machine {machine} of the Ray cluster has {name} {own[name]}, and this command {version}, so "
                    f"they may not write the same bytes; install the same version on all its machines"
                )
        os.chdir(self.current)


def far_task(place: Place, function: Function, task: tuple[Any, ...]) -> Any:
    """Do one task on a machine of a cluster."""
    place.enter()
    return function(*task)


def _reach(address: str) -> None:
    """Raise OSError if nobody listens at an address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), RAY_PATIENCE).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")


def engine(name: str, workers: int, folder: Path, *, small: bool = False, pool: Pool | None = None) -> Engine:
    """Return the engine of a recipe. Little work (`small`) is done in this process, where no other is asked for.

    folder: where finished tasks are recorded; the stage removes it at its end.
    pool: processes that run already, by `start_early`.
    """
    if name == "ray":
        return RayEngine(folder, workers)
    workers = workers or (1 if small else os.cpu_count() or 1)
    return (
        LocalEngine(folder, workers, pool if pool and pool.workers == workers else None)
        if workers > 1
        else Engine(folder)
    )
