"""Starts the ranks of a command on this machine, through torch's elastic launcher (what torchrun is), and says in one
sentence which of them failed first."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from ctrkit import provenance
from ctrkit.errors import Resumable
from ctrkit.ranks import AGAIN, LAUNCHED, LOST_ANOTHER, is_rank

_WHY: dict[int, str] = {
    signal.SIGKILL: ", as the system does where memory is short",
    signal.SIGBUS: ", as the system does where a file that is being read has become shorter, or its disk is gone",
}
POLL_SECONDS = 0.1
"""Between looks at whether all ranks live."""


def wanted(nproc: int) -> bool:
    """Say whether this command is to be started as several ranks, and is none of them yet."""
    return nproc > 1 and not is_rank() and not provenance.is_checking()


def launch(nproc: int, max_restarts: int = 0) -> int:
    """Run this process's own command line as so many ranks; return the exit code.

    max_restarts: how often all of them are started again after one has failed.

    A rank that fails tells why; one that was killed cannot, so this raises Resumable for it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells of every process it stops
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=POLL_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ctrkit", *sys.argv[1:])
    except ChildFailedError as e:
        return _told(e.failures, nproc, max_restarts)
    except SignalException as e:
        return 128 + int(e.sigval)
    return 0


def _told(failures: Mapping[int, Any], nproc: int, max_restarts: int) -> int:
    """Return the exit code of the rank that failed first, or raise Resumable if it was killed."""
    exits = {rank: int(failure.exitcode) for rank, failure in failures.items()}
    first = {rank: code for rank, code in exits.items() if code not in (LOST_ANOTHER, -signal.SIGTERM)}
    if not first:
        return 1
    killed = {rank: code for rank, code in first.items() if code < 0}
    if not killed:
        return max(first.values())
    rank, code = min(killed.items())
    name = signal.Signals(-code).name
    why = _WHY.get(-code, "")
    again = f", {max_restarts + 1} times in all" if max_restarts else ""
    raise Resumable(f"rank {rank} of {nproc} was killed ({name}{why}){again}; the others were stopped. {AGAIN}")
