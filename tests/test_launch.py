"""What the launcher says of ranks that failed; tests/stages/test_train_ranks.py has real ones."""

from dataclasses import dataclass

import pytest

from ctrkit import launch
from ctrkit.errors import Resumable
from ctrkit.ranks import LOST_ANOTHER


@dataclass
class Failure:
    """As torch's launcher tells it."""

    exitcode: int


def told(*codes: int, restarts: int = 0) -> int:
    return launch._told({rank: Failure(code) for rank, code in enumerate(codes)}, len(codes), restarts)


WHY = [(9, r"SIGKILL, .* memory is short"), (7, r"SIGBUS, .* its disk is gone"), (11, "SIGSEGV")]


@pytest.mark.parametrize(("signal", "why"), WHY)
def test_who_was_killed_by_what(signal: int, why: str) -> None:
    with pytest.raises(Resumable, match=rf"^rank 1 of 3 was killed \({why}\); the others were stopped\. "):
        told(LOST_ANOTHER, -signal, -15)
    with pytest.raises(Resumable, match=r"\), 3 times in all; "):
        told(LOST_ANOTHER, -signal, restarts=2)


def test_who_failed_has_spoken() -> None:
    assert told(LOST_ANOTHER, 2, 1) == 2
    assert told(1, LOST_ANOTHER) == 1
    assert told(LOST_ANOTHER, -15) == 1
