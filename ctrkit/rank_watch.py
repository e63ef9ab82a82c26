"""Ends a rank that would wait for ever: one that is told to stop, or has lost another one, while torch waits in C++.

Python hears signals between two instructions of its main thread, and torch may wait there for days. Two threads run
meanwhile, since torch gives up the interpreter's lock while it waits. One tells the store that this rank lives, and
looks whether others do: rank 0 at all, the others at rank 0 and at a note that any may leave. The other one hears
signals, and ends the process where the main thread does not.

A connection that is closed is noticed at once by who waits at it; this is for the store, at which nothing is closed,
for processes that are stopped, and for machines and networks that are gone without a word.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from ctrkit.ranks import AGAIN, LAUNCHED, LOST_ANOTHER, LostRank, NotAlike, Ranks, ToldByFirst

BEAT_SECONDS = 5.0
"""Between two signs of life."""
SILENCE_SECONDS = 600.0
"""After so long without one a rank counts as lost."""
NOTICE_SECONDS = 20.0
"""How long a rank may take to notice by itself that another one has gone, before it is told to stop."""
HEARING_SECONDS = 15.0
"""How long the main thread may take to hear that it is to stop."""
LEAVING_SECONDS = 30.0
"""How long it may then take to end."""
LAST_SECONDS = 5.0
"""How long rank 0 waits for the others to leave before it."""
GONE = "gone"
"""Key of the note."""
DONE = -(1 << 40)
"""What a rank adds to its signs of life when it ends well."""


class Watch:
    """The two threads of a rank.

    Parameters
    ----------
    ranks: more than one.
    store: of torch, for the main thread, which may wait in it; the threads have a connection of their own.
    """

    def __init__(self, ranks: Ranks, store: Any) -> None:
        self.ranks, self._store, self._own = ranks, store, store.clone()
        self.lost = ""
        """Who is lost, once that is known."""
        self.silent = False
        """Whether it has not said so itself."""
        self._lost_at = self._signalled_at = self._leaving_at = 0.0
        """Moments; 0: never. Each is set by one thread."""
        self._signal = signal.SIGTERM
        self._unanswered = 0.0
        self._ended = threading.Event()
        self._told, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        self._threads = [threading.Thread(target=f, name="watch", daemon=True) for f in (self._beat, self._listen)]

    @property
    def leaving(self) -> bool:
        """Whether the main thread is on its way out."""
        return self._leaving_at > 0

    def leave(self) -> None:
        """Say that the main thread is on its way out, and has some seconds for it."""
        self._leaving_at = self._leaving_at or time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch within the block, which belongs to the main thread; turn SIGTERM, by which torchrun ends the ranks when
        one of them has failed, into LostRank."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, frame: FrameType | None) -> None:
            if self.leaving:
                return
            if LAUNCHED in os.environ and not self.silent:  # as if killed, which leaves all that was done, and no word
                os._exit(LOST_ANOTHER)
            why = self._last_word()
            self.leave()
            raise LostRank(why)

        def interrupt(number: int, frame: FrameType | None) -> None:
            if not self.leaving:
                self.leave()
                signal.default_int_handler(number, frame)

        os.register_at_fork(after_in_child=self._forget)
        woken = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, stop)
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        with contextlib.suppress(RuntimeError):  # the first sign of life: who never gave one is not missed
            self._own.add(_key(self.ranks.rank), 1)
        for thread in self._threads:
            thread.start()
        try:
            yield
        except BaseException as e:
            self.leave()
            with contextlib.suppress(RuntimeError):
                if isinstance(e, click.exceptions.Exit):
                    self._end_well()
                elif not isinstance(e, NotAlike | ToldByFirst):  # of which the others know
                    who = f"rank {self.ranks.rank} of {self.ranks.count} has ended, and its own message says why"
                    self._store.compare_set(GONE, "", who)
            raise
        else:
            self.leave()
            with contextlib.suppress(RuntimeError):
                self._end_well()
        finally:
            self._ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            self._tell.send(b"\0")
            for thread in self._threads:
                thread.join(1.0)

    def _end_well(self) -> None:
        """Say that this rank gives no more signs of life. Rank 0, which may hold the store, is the last to leave."""
        self._store.add(_key(self.ranks.rank), DONE)
        until = time.monotonic() + LAST_SECONDS
        others = set(range(1, self.ranks.count)) if self.ranks.rank == 0 else set()
        while others and time.monotonic() < until:
            others = {rank for rank in others if self._store.add(_key(rank), 0) >= 0}
            time.sleep(0.01 if others else 0)

    def _forget(self) -> None:
        """In a child that is forked: its signals are not this process's."""
        if not self._ended.is_set():
            signal.set_wakeup_fd(-1)

    def raise_lost(self) -> None:
        """Raise LostRank where a rank is known to be lost."""
        if self.lost:
            self.leave()
            raise LostRank(self._last_word())

    def _beat(self) -> None:
        ranks, store = self.ranks, self._own
        looked_at = range(1, ranks.count) if ranks.rank == 0 else [0]
        seen: Counter[int] = Counter()
        quiet: Counter[int] = Counter()
        try:
            while not self._ended.wait(BEAT_SECONDS):
                store.add(_key(ranks.rank), 1)
                for rank in looked_at:
                    signs = store.add(_key(rank), 0)
                    # In beats, not by the clock: time during which this process was stopped itself does not count.
                    quiet[rank] = quiet[rank] + 1 if signs == seen[rank] > 0 else 0
                    seen[rank] = signs
                    if quiet[rank] * BEAT_SECONDS >= SILENCE_SECONDS and not self.lost:
                        self.silent = True
                        who = f"rank {rank} of {ranks.count} has not stirred for {SILENCE_SECONDS / 60:.3g} minutes"
                        self._lose(f"{who}: it stands still, or its machine or the network is gone; see to it there")
                        store.compare_set(GONE, "", self.lost)
                if not self.lost and store.check([GONE]):
                    self._lose(store.get(GONE).decode())
                self._unanswered = 0.0
        except RuntimeError:  # the store is gone; `_listen` sees that nothing answers
            pass

    def _lose(self, who: str) -> None:
        self.lost, self._lost_at = who, time.monotonic()

    def _listen(self) -> None:
        asked = False
        while not self._ended.is_set():
            tick = min(1.0, BEAT_SECONDS)
            if select.select([self._told], [], [], tick)[0]:
                for number in self._told.recv(64):
                    if number in (signal.SIGTERM, signal.SIGINT) and not self._signalled_at:
                        self._signal, self._signalled_at = signal.Signals(number), time.monotonic()
            else:
                self._unanswered += tick
            now = time.monotonic()
            if self._unanswered > SILENCE_SECONDS + BEAT_SECONDS and not self.lost:
                self.silent = True
                where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
                self._lose(
                    f"rank 0 or its launcher, at {where}, has not answered for {SILENCE_SECONDS / 60:.3g} minutes"
                )
            if self.leaving:
                if now > self._leaving_at + LEAVING_SECONDS:
                    self._end()
            elif self._signalled_at:
                if now > self._signalled_at + HEARING_SECONDS:
                    self._end()
            elif self.lost and not asked and now > self._lost_at + (0 if self.silent else NOTICE_SECONDS):
                asked = True
                main = threading.main_thread().ident
                if main is not None:
                    signal.pthread_kill(main, signal.SIGTERM)

    def _end(self) -> None:
        if self._ended.is_set():
            return
        if LAUNCHED in os.environ and not self.silent:
            os._exit(LOST_ANOTHER)
        with contextlib.suppress(OSError):
            os.write(2, f"Error: {self._last_word()}\n".encode())
        os._exit(1 if self.lost or not self._signalled_at else 128 + self._signal)

    def _last_word(self) -> str:
        who = f"rank {self.ranks.rank} of {self.ranks.count}"
        if self.lost:
            return f"{who} has lost another one: {self.lost}. {AGAIN}"
        if self.leaving and not self._signalled_at:
            return f"{who} could not take leave of the others within {LEAVING_SECONDS:.0f} seconds. {AGAIN}"
        return f"{who} was told to stop, as when another one has failed. {AGAIN}"


def _key(rank: int) -> str:
    return f"alive/{rank}"
