"""Tasks in this process and in others: results in order, finished work kept, failures told."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ctrkit.engine import Engine, LocalEngine, Phase, engine
from ctrkit.errors import Resumable, UsageError, UserError
from tests.tiny_world import CHECKOUT


def slow_square(log: Path, number: int, seconds: float) -> dict[str, Any]:
    """Task: note that it ran, wait, return a JSON value."""
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"{number}\n")
    time.sleep(seconds)
    return {"square": number**2, "of": [number], "none": None}


def fail_unless(flag: Path, log: Path, number: int) -> int:
    """Task: number 2 fails until the flag is there."""
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"{number}\n")
    if number == 2 and not flag.is_file():
        raise UsageError("number 2 is wrong; raise it")
    return number


def die_unless(flag: Path, log: Path, number: int) -> int:
    """Task: number 3 kills its process until the flag is there."""
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"{number}\n")
    if number == 3 and not flag.is_file():
        while log.read_text().count("\n") < 4:  # the others have begun
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def break_down(number: int) -> int:
    """Task: a mistake in the program, not of the user."""
    return number // 0


def threads() -> list[str | None]:
    """Task: return how many threads this process may use."""
    return [os.environ.get("POLARS_MAX_THREADS"), os.environ.get("OMP_NUM_THREADS")]


def lines(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split()) if log.is_file() else []


def engine_of(folder: Path, workers: int) -> Engine:
    return LocalEngine(folder, workers) if workers > 1 else Engine(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_tasks_and_are_kept(tmp_path: Path, workers: int) -> None:
    log = tmp_path / "log"
    tasks = [(log, n, 0.2 / (n + 1)) for n in range(6)]
    expected = [{"square": n**2, "of": [n], "none": None} for n in range(6)]
    for _ in range(2):
        with engine_of(tmp_path / "parts", workers) as runner:
            assert runner.run("squares", slow_square, tasks) == expected
    assert lines(log) == list(range(6))
    with engine_of(tmp_path / "parts", workers) as runner:  # another phase is other work
        assert runner.run("again", slow_square, tasks[:2]) == expected[:2]
        assert runner.run("nothing", slow_square, []) == []
    assert lines(log) == [0, 0, 1, 1, 2, 3, 4, 5]
    assert not list((tmp_path / "parts").rglob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_phases_that_run_together_keep_their_results_apart(tmp_path: Path, workers: int) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"
    phases: list[Phase] = [
        ("squares", slow_square, [(log, n, 0.0) for n in (10, 11, 12)]),
        ("nothing", slow_square, []),
        ("numbers", fail_unless, [(flag, log, n) for n in range(4)]),
    ]
    squares = [{"square": n**2, "of": [n], "none": None} for n in (10, 11, 12)]
    with pytest.raises(UsageError, match="number 2 is wrong"), engine_of(tmp_path / "parts", workers) as runner:
        runner.run_together(phases)
    flag.touch()
    with engine_of(tmp_path / "parts", workers) as runner:
        assert runner.run_together(phases) == [squares, [], [0, 1, 2, 3]]
    done = lines(log)
    assert [done.count(n) for n in (0, 1, 2, 10, 11, 12)] == [1, 1, 2, 1, 1, 1]  # of 3, a killed one may be begun twice
    with engine_of(tmp_path / "parts", workers) as runner:  # each is found again by its own name
        assert runner.run("squares", slow_square, phases[0][2]) == squares
    assert lines(log) == done


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_its_type_and_what_was_done_stays(tmp_path: Path, workers: int) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"
    tasks = [(flag, log, n) for n in range(5)]
    with pytest.raises(UsageError, match="number 2 is wrong; raise it") as told, engine_of(tmp_path, workers) as runner:
        runner.run("phase", fail_unless, tasks)
    assert told.value.exit_code == 2
    flag.touch()
    done = [int(p.stem) for p in (tmp_path / "phase").glob("*.json")]
    assert set(done) >= {0, 1}
    assert 2 not in done
    before = lines(log)
    with engine_of(tmp_path, workers) as runner:
        assert runner.run("phase", fail_unless, tasks) == list(range(5))
    assert sorted([*before, *(n for n in range(5) if n not in done)]) == lines(log)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_program_is_not_hidden(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ZeroDivisionError), engine_of(tmp_path, workers) as runner:
        runner.run("phase", break_down, [(1,), (2,)])


def test_a_worker_that_is_killed_gives_one_error_and_the_same_call_goes_on(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"
    tasks = [(flag, log, n) for n in range(4)]
    with pytest.raises(Resumable) as told, LocalEngine(tmp_path, 2) as runner:
        runner.run("phase", die_unless, tasks)
    assert isinstance(told.value, UserError)
    assert "a worker process was killed" in told.value.message
    assert "run the same command again" in told.value.message
    done = [int(p.stem) for p in (tmp_path / "phase").glob("*.json")]
    assert done
    assert 3 not in done
    flag.touch()
    before = lines(log)
    with LocalEngine(tmp_path, 2) as runner:
        assert runner.run("phase", die_unless, tasks) == list(range(4))
    assert sorted([*before, *(n for n in range(4) if n not in done)]) == lines(log)


def test_workers_share_the_cores_and_leave_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARS_MAX_THREADS", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with LocalEngine(tmp_path, 2) as runner:
        assert os.environ["POLARS_MAX_THREADS"] == "7"
        assert "OMP_NUM_THREADS" not in os.environ
        found = runner.run("phase", threads, [(), (), ()])
    assert found == [[str(max(1, (os.cpu_count() or 1) // 2))] * 2] * 3


def test_there_are_never_more_processes_than_tasks(tmp_path: Path) -> None:
    with LocalEngine(tmp_path, 40) as runner:
        assert runner.run("nothing", threads, []) == []
        assert multiprocessing.active_children() == []
        runner.run("some", threads, [(), ()])
        assert 0 < len(multiprocessing.active_children()) <= 2


PROGRAM = """
import sys
from pathlib import Path
from ctrkit.engine import LocalEngine
from tests.test_engine import sleep

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with LocalEngine(folder / "parts", 2) as runner:
        runner.run("phase", sleep, [(folder, n) for n in range(4)])
"""


def sleep(folder: Path, number: int) -> int:
    """Task: say which process this is, and wait to be killed."""
    (folder / f"{number}.tmp").write_text(str(os.getpid()))
    (folder / f"{number}.tmp").rename(folder / f"{number}.pid")
    time.sleep(60)
    return number


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_process_that_started_them(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    main = subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path], env=environment)
    try:
        assert until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        workers = [int(p.read_text()) for p in tmp_path.glob("*.pid")]
        assert len(set(workers)) == 2
        assert all(alive(pid) for pid in workers)
        main.send_signal(how)
        main.wait(timeout=30)
        assert until(lambda: not any(alive(pid) for pid in workers))
    finally:
        main.kill()
        main.wait()


def test_which_engine(tmp_path: Path) -> None:
    """Little work is done here unless workers are asked for."""
    assert type(engine("local", 0, tmp_path, small=True)) is Engine
    assert type(engine("local", 1, tmp_path)) is Engine
    found = engine("local", 3, tmp_path, small=True)
    assert isinstance(found, LocalEngine)
    assert found.workers == 3
    every = engine("local", 0, tmp_path)
    cores = os.cpu_count() or 1
    assert (every.workers if isinstance(every, LocalEngine) else 1) == cores


def test_records_are_small_json_files(tmp_path: Path) -> None:
    with Engine(tmp_path) as runner:
        runner.run("phase", slow_square, [(tmp_path / "log", 3, 0.0)])
    [record] = (tmp_path / "phase").iterdir()
    assert json.loads(record.read_text()) == {"square": 9, "of": [3], "none": None}
