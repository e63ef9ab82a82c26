"""Things made ahead: order, errors, and an end when nobody wants more."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ctrkit.ahead import NICENESS, ahead, in_step, one_behind, yield_cores


def test_all_in_order() -> None:
    assert list(ahead(range(1000), 3)) == list(range(1000))
    assert list(ahead([], 3)) == []


def test_they_are_made_in_another_thread_and_not_too_far_ahead() -> None:
    made: list[int] = []
    threads = set()

    def make() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            threads.add(threading.get_ident())
            yield n

    items = ahead(make(), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:  # 3 wait, one more is in the hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5
    assert threads.isdisjoint({threading.get_ident()})
    items.close()  # type: ignore[attr-defined]
    assert len(made) <= 6
    assert not any(t.name == "ahead" for t in threading.enumerate())


def test_an_error_comes_after_what_was_made() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = ahead(make(), 3)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_in_step_gives_all_in_order(n: int, length: int) -> None:
    with ThreadPoolExecutor(1) as worker:
        assert list(in_step(iter(range(length)), n, worker)) == list(range(length))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_in_step_makes_as_many_whenever_it_is_left(n: int) -> None:
    """Also those that were asked for and are not done: somebody may wait for this process to make them."""
    made: list[int] = []

    def slow() -> Iterator[int]:
        for i in range(100):
            time.sleep(0.002)
            made.append(i)
            yield i

    with ThreadPoolExecutor(1) as worker:
        items = in_step(slow(), n, worker)
        for wanted in range(4):
            assert next(items) == wanted
        items.close()
        assert made == list(range(4 + n))


def test_in_step_raises_what_making_raised_in_its_place() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with ThreadPoolExecutor(1) as worker:
        items = in_step(make(), 2, worker)
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)


def test_one_behind() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for i in range(3):
            made.append(i)
            yield i

    items = one_behind(make())
    assert [(item, len(made)) for item in items] == [(0, 2), (1, 3), (2, 3)]
    assert list(one_behind([])) == []


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_thread_that_yields_the_cores_leaves_the_others_as_they_are() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def made() -> Iterator[int]:
        yield priority()
        yield_cores()
        yield priority()

    here = priority()
    assert list(ahead(made(), 1)) == [here, max(here, NICENESS)]
    assert priority() == here
