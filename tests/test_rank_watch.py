"""Ranks that are stopped, killed, or not started alike, at any moment: all of them end, and say why. Real processes."""

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctrkit import ranks as ranks_module
from ctrkit.errors import UserError
from ctrkit.rank_meeting import About
from ctrkit.ranks import Ranks

SECONDS = 60.0
"""Within which all have to have ended."""
JOINING = 12.0
"""For how long ranks wait for one that does not come."""
SILENCE = 6.0
"""After which a rank counts as lost here, seconds."""


class Control:
    """What a scenario's parent does with its ranks."""

    def __init__(self, folder: Path, pids: list[int], codes: dict[int, int]) -> None:
        self.folder, self.pids, self.codes = folder, pids, codes

    def ready(self, *names: str) -> None:
        """Wait for files that ranks have left."""
        while not all((self.folder / name).exists() for name in names):
            time.sleep(0.02)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def ended(self, rank: int) -> None:
        while rank not in self.codes:
            time.sleep(0.02)


def collectives(ranks: Ranks, folder: Path, seconds: float = SECONDS) -> None:
    """Sum something again and again."""
    import torch
    import torch.distributed as dist

    until = time.monotonic() + seconds
    while True:
        left = torch.tensor([float(time.monotonic() < until)])
        dist.all_reduce(left)
        (folder / f"sums-{ranks.rank}").touch()
        time.sleep(0.01)
        if left < ranks.count:
            return


def at_store(ranks: Ranks, folder: Path, last: Callable[[], None]) -> None:
    """Have rank 0 wait at the store for rank 1, which does something else just then."""
    if ranks.rank == 0:
        (folder / "waits").touch()
        ranks.group("gloo")
    else:
        ranks.gather(None)
        last()


def fail() -> None:
    raise UserError("rank 1 has had enough")


def killed_between(ranks: Ranks, folder: Path) -> None:
    at_store(ranks, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def failed_between(ranks: Ranks, folder: Path) -> None:
    at_store(ranks, folder, fail)


def told_at_the_store(ranks: Ranks, folder: Path) -> None:
    def wait() -> None:
        (folder / "gathered").touch()
        time.sleep(SECONDS)

    at_store(ranks, folder, wait)


def terminated_at_the_store(control: Control) -> None:
    control.ready("waits", "gathered")
    time.sleep(0.5)
    control.send(0, signal.SIGTERM)


def interrupted_at_the_store(control: Control) -> None:
    control.ready("waits", "gathered")
    time.sleep(0.5)
    control.send(0, signal.SIGINT)


def one_stands_still(control: Control) -> None:
    control.ready("sums-0", "sums-1")
    control.send(1, signal.SIGSTOP)
    control.ended(0)
    control.send(1, signal.SIGCONT)


def first_stands_still(control: Control) -> None:
    control.ready("sums-0", "sums-1")
    control.send(0, signal.SIGSTOP)
    control.ended(1)
    control.send(0, signal.SIGCONT)


def all_stand_still(control: Control) -> None:
    control.ready("sums-0", "sums-1")
    for rank in (1, 0):
        control.send(rank, signal.SIGSTOP)
    time.sleep(SILENCE * 1.5)
    for rank in (0, 1):
        control.send(rank, signal.SIGCONT)


def one_is_told(control: Control) -> None:
    control.ready("sums-0", "sums-1")
    control.send(1, signal.SIGTERM)


def tidy(ranks: Ranks, folder: Path) -> None:
    """Be told while Python runs, and put things away."""
    if ranks.rank == 0:
        collectives(ranks, folder)
    try:
        for rank in range(2):
            (folder / f"sums-{rank}").touch()
        time.sleep(SECONDS)
    finally:
        time.sleep(0.3)
        (folder / "tidied").touch()


def a_while(ranks: Ranks, folder: Path) -> None:
    collectives(ranks, folder, SILENCE * 3)


def a_child_is_told(ranks: Ranks, folder: Path) -> None:
    """Have a forked child, which inherits all handlers, be told to stop."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(7))
        while True:
            time.sleep(0.1)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    collectives(ranks, folder, 4.0)


def nothing(ranks: Ranks, folder: Path) -> None:
    return


def no_control(control: Control) -> None:
    return


def unlike(rank: int) -> About:
    """The number of threads is each rank's own affair."""
    return About.of("train", {"train": {"model": ["din", "base"][rank > 1], "threads": rank}, "features": {"age": {}}})


SCENARIOS: dict[str, tuple[int, Callable[..., Any], Callable[[Control], None]]] = {
    "killed between": (2, killed_between, no_control),
    "failed between": (2, failed_between, no_control),
    "terminated at the store": (2, told_at_the_store, terminated_at_the_store),
    "interrupted at the store": (2, told_at_the_store, interrupted_at_the_store),
    "one stands still": (2, collectives, one_stands_still),
    "first stands still": (2, collectives, first_stands_still),
    "all stand still": (2, a_while, all_stand_still),
    "a child is told": (2, a_child_is_told, no_control),
    "one is told": (2, tidy, one_is_told),
    "not alike": (4, nothing, no_control),
    "other data": (2, nothing, no_control),
    "other command": (2, nothing, no_control),
    "other number": (2, nothing, no_control),
    "absent": (3, nothing, no_control),
    "same number": (3, nothing, no_control),
}
ABOUT: dict[str, Callable[[int], About]] = {
    "not alike": unlike,
    "other data": lambda rank: About({"command": "train"}, {"groups": str(rank), "features": "same"}),
    "other command": lambda rank: About.of(["train", "predict"][rank], {}),
}
GIVEN: dict[str, Callable[[int], dict[str, int]]] = {
    "other number": lambda rank: {"WORLD_SIZE": 2 + rank},
    "absent": lambda rank: {"WORLD_SIZE": 5},
    "same number": lambda rank: {"RANK": min(rank, 1)},
}


def rank_of(name: str, number: int, count: int, port: int, folder: Path, act: Callable[..., Any]) -> None:
    """Be a rank, in a process of its own; leave what is said in a file."""
    err = os.open(folder / f"{number}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(err, 2)
    given = {"RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port, **GIVEN.get(name, lambda rank: {})(number)}
    os.environ.update({key: str(value) for key, value in given.items()}, MASTER_ADDR="127.0.0.1")
    code = 0
    try:
        ranks = Ranks.of_environment()
        with ranks.joined(ABOUT[name](number) if name in ABOUT else None):
            act(ranks, folder)
    except UserError as e:
        e.show()
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException as e:
        sys.stderr.write(f"Traceback: {e!r}")
        code = 99
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> None:
    """Run all scenarios at the same time; leave exit codes."""
    import torch.distributed.rendezvous

    from ctrkit import rank_watch

    torch.set_num_threads(1)
    rank_watch.BEAT_SECONDS, rank_watch.SILENCE_SECONDS = 0.1, SILENCE
    rank_watch.NOTICE_SECONDS, rank_watch.HEARING_SECONDS, rank_watch.LEAVING_SECONDS = 1.0, 1.0, 10.0
    found: dict[str, dict[int, int]] = {}
    controls = []
    pids: dict[int, tuple[str, int]] = {}
    for name, (count, act, control) in SCENARIOS.items():
        ranks_module.JOINING = datetime.timedelta(seconds=JOINING if name in ("absent", "same number") else SECONDS)
        own, found[name] = folder / name, {}
        own.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = []
        for number in range(count):
            child = os.fork()
            if not child:
                rank_of(name, number, count, port, own, act)
            children.append(child)
            pids[child] = name, number
        controls.append((control, Control(own, children, found[name])))
    for act, control in controls:
        threading.Thread(target=act, args=(control,), daemon=True).start()
    until = time.monotonic() + SECONDS
    while pids and time.monotonic() < until:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            name, number = pids.pop(pid)
            found[name][number] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


Found = dict[str, tuple[list[int | None], list[str]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Scenario → what became of its ranks: exit codes (None: it had to be killed), what they said; torch says more."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"from pathlib import Path; from tests.test_rank_watch import main; main(Path({str(folder)!r}))"
    # The store's server asks for the name of each caller's address, and answers nobody until it knows.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    told: Found = {}
    for name, (count, _, _) in SCENARIOS.items():
        said = [(folder / name / f"{number}.err").read_text() for number in range(count)]
        assert "Traceback" not in "".join(said), said
        ours = ["".join(line for line in one.splitlines(True) if line.startswith("Error: ")) for one in said]
        told[name] = [codes[name].get(str(number)) for number in range(count)], ours
    told["folder"] = [], [str(folder)]
    return told


def errors(said: str) -> list[str]:
    return said.splitlines()


def test_all_end(found: Found) -> None:
    stuck = {name: codes for name, (codes, _) in found.items() if None in codes}
    assert not stuck, found


def test_a_rank_that_is_killed_as_others_connect_with_it(found: Found) -> None:
    codes, said = found["killed between"]
    assert codes == [1, -signal.SIGKILL]
    (told,) = errors(said[0])
    assert told.startswith("Error: rank 0 of 2 has lost another one: rank 1 of 2 has not stirred for 0.1 minutes: ")
    assert told.endswith("What was done is kept: run the same command again and it goes on from there")


def test_a_rank_that_fails_as_others_connect_with_it(found: Found) -> None:
    codes, said = found["failed between"]
    assert codes == [1, 1]
    assert errors(said[1]) == ["Error: rank 1 has had enough"]
    (told,) = errors(said[0])
    assert "rank 0 of 2 has lost another one: rank 1 of 2 has ended, and its own message says why" in told


def test_a_rank_that_waits_at_the_store_can_be_stopped(found: Found) -> None:
    for name, number in (("terminated", signal.SIGTERM), ("interrupted", signal.SIGINT)):
        codes, said = found[f"{name} at the store"]
        assert codes == [128 + number, 1]
        (told,) = errors(said[0])
        assert told.startswith("Error: rank 0 of 2 was told to stop, as when another one has failed. What was done is ")
        assert "rank 1 of 2 has lost another one" in said[1]


@pytest.mark.parametrize(("name", "other"), [("one stands still", 1), ("first stands still", 0)])
def test_a_rank_that_stands_still_is_lost(found: Found, name: str, other: int) -> None:
    codes, said = found[name]
    assert codes == [1, 1]
    (told,) = errors(said[1 - other])
    assert f"rank {1 - other} of 2 has lost another one: " in told
    assert "0.1 minutes" in told
    (told,) = errors(said[other])
    assert f"rank {other} of 2 has lost another one" in told


def test_time_for_which_all_stood_still_does_not_count(found: Found) -> None:
    assert found["all stand still"] == ([0, 0], ["", ""])


def test_a_child_that_is_told_to_stop_is_another_process(found: Found) -> None:
    assert found["a child is told"] == ([0, 0], ["", ""])


def test_a_rank_that_can_hear_ends_in_its_own_way(found: Found) -> None:
    codes, said = found["one is told"]
    assert codes == [1, 1]
    assert (Path(found["folder"][1][0]) / "one is told" / "tidied").exists()
    assert len(errors(said[1])) == 1
    assert errors(said[1])[0].startswith("Error: rank 1 of 2 was told to stop")
    assert errors(said[0])[0].startswith("Error: rank 0 of 2 has lost another one")


def test_ranks_that_were_not_started_alike_say_the_same(found: Found) -> None:
    codes, said = found["not alike"]
    assert codes == [2] * 4
    wanted = (
        'Error: the ranks were not started alike: train.model is "din" for ranks 0 and 1 and "base" for ranks 2 and 3. '
        "Start all of them with the same command and the same files\n"
    )
    assert said == [wanted] * 4
    codes, said = found["other data"]
    assert codes == [2, 2]
    assert said[0] == said[1]
    assert "alike: what rank 1 finds as groups is not what rank 0 finds. " in said[0]
    codes, said = found["other command"]
    assert codes == [2, 2]
    assert said[0] == said[1]
    assert 'alike: command is "train" for rank 0 and "predict" for rank 1. ' in said[0]


def test_ranks_that_count_otherwise_say_so(found: Found) -> None:
    codes, said = found["other number"]
    assert codes == [2, 2]
    assert said[0] == said[1]
    assert "alike: WORLD_SIZE is 2 for rank 0 and 3 for rank 1. " in said[0]


def test_who_did_not_come_is_named(found: Found) -> None:
    codes, said = found["absent"]
    assert codes == [2] * 3
    assert said[0] == said[1] == said[2]
    assert "Error: ranks 3 and 4 of 5 did not come within 12 seconds: start as many as WORLD_SIZE says" in said[0]


def test_two_processes_with_one_number_are_told_apart(found: Found) -> None:
    codes, said = found["same number"]
    assert codes == [2, 2, 2]
    assert "Error: rank 2 of 3 did not come within 12 seconds" in said[0]
    told = sorted(said[1:])
    assert told[0].startswith("Error: another process has come as rank 1 of 3: start all of them anew")
    assert told[1] == said[0]
