"""Real processes for tests: forked from one that has imported all, and joined through gloo as torchrun's are."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120
"""After which a round is too slow."""
ROUND = "ROUND"
"""In a rank's environment: the number of the round."""


def load_loops() -> None:
    """Load all loops that training uses, before ranks are forked: where they are compiled first, Python hears no signal
    for seconds."""
    from ctrkit import numba_loops

    for name in ("compiled_masks", "compiled_repeats", "compiled_rows"):
        numba_loops.load(f"ctrkit.{name}")
    for name in ("pair_loops", "pair_net_loops", "tower_loops"):
        numba_loops.load(f"ctrkit.models.{name}")


def main(module: str, function: str, counts: list[int], joined: bool, folder: Path) -> None:
    """Run `function(ranks, folder)` of a module on each number of ranks; pickle what each returns, or was killed by."""
    import importlib

    import torch

    from ctrkit.ranks import Ranks

    torch.set_num_threads(1)
    tests = importlib.import_module(module)
    act = getattr(tests, function)
    if hasattr(tests, "before_forks"):
        tests.before_forks()
    threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert "polars-0" not in threads, "a forked process waits for polars' threads forever: import nothing that uses it"
    for number, count in enumerate(counts):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = []
        for rank in range(count):
            children.append(os.fork())
            if not children[-1]:
                given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                given[ROUND] = number
                os.environ.update({name: str(value) for name, value in given.items()}, MASTER_ADDR="127.0.0.1")
                ranks = Ranks.of_environment()
                with ranks.joined() if joined else contextlib.nullcontext():
                    found = act(ranks, folder)
                (folder / f"{number}-{rank}.pickle").write_bytes(pickle.dumps(found))
                sys.stderr.flush()
                os._exit(0)
        for rank, child in enumerate(children):
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                (folder / f"{number}-{rank}.pickle").write_bytes(pickle.dumps(signal.Signals(os.WTERMSIG(status))))
            elif status:
                sys.exit(1)


def on_ranks(act: Callable[..., Any], counts: list[int], folder: Path, *, joined: bool = True) -> dict[int, list[Any]]:
    """Return number of ranks → what `act(ranks, folder)`, a module's function, returned on each, the last time."""
    return dict(zip(counts, rounds(act, counts, folder, joined=joined), strict=True))


def rounds(act: Callable[..., Any], counts: list[int], folder: Path, *, joined: bool = True) -> list[list[Any]]:
    """Return for each of some numbers of ranks, which work one after the other, what `act(ranks, folder)`, a module's
    function, returned on each rank, or the signal that killed it.

    joined: whether the ranks are connected already; else `act` does it.
    """
    given = (act.__module__, act.__name__, counts, joined)
    code = f"from pathlib import Path; from tests.ranks import main; main(*{given!r}, Path({str(folder)!r}))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS * len(counts))
    assert done.returncode == 0, done.stderr
    of_ranks = [[folder / f"{number}-{rank}.pickle" for rank in range(n)] for number, n in enumerate(counts)]
    return [[pickle.loads(path.read_bytes()) for path in paths] for paths in of_ranks]
