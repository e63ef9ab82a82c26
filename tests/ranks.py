"""Real processes for tests: forked from one that has imported all, and joined through gloo as torchrun's are."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120


def main(module: str, function: str, counts: list[int], joined: bool, folder: Path) -> None:
    """Run `function(ranks, folder)` of a module on each number of ranks; pickle what each rank returns."""
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
    for count in counts:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = []
        for rank in range(count):
            children.append(os.fork())
            if not children[-1]:
                given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in given.items()}, MASTER_ADDR="127.0.0.1")
                ranks = Ranks.of_environment()
                with ranks.joined() if joined else contextlib.nullcontext():
                    found = act(ranks, folder)
                (folder / f"{count}-{rank}.pickle").write_bytes(pickle.dumps(found))
                sys.stderr.flush()
                os._exit(0)
        for child in children:
            if os.waitpid(child, 0)[1]:
                sys.exit(1)


def on_ranks(act: Callable[..., Any], counts: list[int], folder: Path, *, joined: bool = True) -> dict[int, list[Any]]:
    """Return number of ranks → what `act(ranks, folder)`, a module's function, returned on each.

    joined: whether they are connected already; else `act` does it.
    """
    given = (act.__module__, act.__name__, counts, joined)
    code = f"from pathlib import Path; from tests.ranks import main; main(*{given!r}, Path({str(folder)!r}))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return {n: [pickle.loads((folder / f"{n}-{r}.pickle").read_bytes()) for r in range(n)] for n in counts}
