"""What the benchmarks share: timing a command and all that it starts, and printing what was found.

Peak memory is that of the process tree: the sum over its processes of resident memory that is no mapped file
(RssAnon + RssShmem of /proc/PID/status), sampled every `INTERVAL` seconds; new processes are looked for at every
`LOOK_EVERY`th sample. Pages that processes share count once for each, so the sum may be too high, never too low, by
that. Pages of mapped files are the page cache's and do not count.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05
LOOK_EVERY = 4
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    """Wall time from start to exit."""
    cpu_seconds: float
    """Of it and of all children that it waited for."""
    peak_bytes: int
    output: str
    """What it printed."""


class TreeMemory(threading.Thread):
    """Samples the memory of a process and its descendants, also of those whose parent has gone, until `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._tree = {pid: start_time(pid)}
        self._stopped = threading.Event()

    def run(self) -> None:
        for number in itertools.count():
            if number % LOOK_EVERY == 0:
                self._look_for_children()
            self.peak_bytes = max(self.peak_bytes, sum(map(resident, self._tree)))
            if self._stopped.wait(INTERVAL):
                return

    def stop(self) -> int:
        """End the sampling; return the peak."""
        self._stopped.set()
        self.join()
        return self.peak_bytes

    def _look_for_children(self) -> None:
        parents = {int(name): parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        self._tree = {pid: start for pid, start in self._tree.items() if start and start_time(pid) == start}
        found = list(self._tree)
        while found:  # children, their children, and so on
            found = [pid for pid, of in parents.items() if of in found and pid not in self._tree]
            self._tree |= {pid: start_time(pid) for pid in found}


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def parent(pid: int) -> int:
    return int((_stat(pid) or ["", "0"])[1])


def start_time(pid: int) -> str:
    """Return what tells a process from a later one of the same number; "" if there is none."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def resident(pid: int) -> int:
    """Return the bytes of a process that are in memory and of no file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end and measure it. Ends this process with the command's output if it fails."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=env)
        memory = TreeMemory(process.pid)
        memory.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = memory.stop()
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{output}\n{' '.join(map(str, command))} ended with exit status {process.returncode}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, peak, output)


def ctrkit(*words: str | Path) -> Measured:
    """Run a ctrkit command. It must not take over what an earlier run left, nor its digests."""
    env = {k: v for k, v in os.environ.items() if k not in ("CTRKIT_DIGESTS", "CTRKIT_UNLESS_FRESH")}
    return run([sys.executable, "-m", "ctrkit", *words], env)


def warm(files: Iterable[Path]) -> None:
    """Read files, so that they are in the page cache as far as memory allows."""
    for path in files:
        with path.open("rb", buffering=0) as f:
            while f.read(MIB):
                pass


def drop(path: Path) -> None:
    """Have the system forget what it holds of a file. Pages that a process maps stay."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def bytes_below(folder: Path, pattern: str = "**/*") -> int:
    return sum(f.stat().st_size for f in folder.glob(pattern) if f.is_file())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        first, *others = (cell.rjust(w) for cell, w in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *others]).rstrip())


def last_line(**found: object) -> None:
    """Print the result as one JSON object; a benchmark's last line."""
    print(json.dumps(found), flush=True)
