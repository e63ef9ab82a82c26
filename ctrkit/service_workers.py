"""Processes that serve at one port, under one that starts them, has them swap models together, and stops them."""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import multiprocess

from ctrkit.errors import UserError
from ctrkit.progress import say
from ctrkit.service_metrics import FOLDER_VARIABLE
from ctrkit.service_process import LOG_FORMAT, STOPS, Models, Server, Serving, on_signals, told, url

Handle = Callable[[str, Any], Awaitable[Any]]
BACKLOG = 2048
PAUSES = (0.1, 1.0, 5.0, 15.0)
"""Seconds before a worker that died is started again, by how often it died without having served."""


def serve(serving: Serving, sock: socket.socket, workers: int) -> None:
    """Serve on a bound socket by several processes, until SIGTERM or SIGINT; what began then is finished.

    Raises UserError if the model cannot be used.
    """
    folder = tempfile.mkdtemp(prefix="ctrkit-metrics-")
    os.environ[FOLDER_VARIABLE] = folder
    try:
        with asyncio.Runner() as runner:
            runner.run(Watcher(serving, sock, workers).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Line:
    """Questions and answers between a watcher and a worker, over a pipe, in the event loop of either.

    handle: answers what the other side asks: (question, its argument) → answer; UserError comes out on the other side.
    lost: is called when the other side is gone.
    """

    def __init__(self, pipe: Connection, handle: Handle, lost: Callable[[], None]) -> None:
        self._pipe, self._handle, self._lost = pipe, handle, lost
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._answering: set[asyncio.Task[None]] = set()
        self._loop.add_reader(pipe.fileno(), self._read)

    async def ask(self, question: str, argument: Any = None) -> Any:
        """Return the other side's answer. Raises the UserError that it raised, and ConnectionError if it is gone."""
        if self._pipe.closed:
            raise ConnectionError
        self._number += 1
        answer = self._waiting[self._number] = self._loop.create_future()
        self._send("ask", self._number, question, argument)
        return await answer

    def close(self) -> None:
        """Hang up."""
        if not self._pipe.closed:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError())
        self._waiting.clear()

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone: `_read` finds that too
            self._pipe.send(message)

    def _read(self) -> None:
        try:
            kind, number, *content = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            self._lost()
            return
        if kind == "ask":
            task = self._loop.create_task(self._answer(number, *content))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif (answer := self._waiting.pop(number, None)) is not None and not answer.done():
            result, error = content
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(UserError(error))

    async def _answer(self, number: int, question: str, argument: Any) -> None:
        try:
            result = await self._handle(question, argument)
        except UserError as e:
            self._send("answer", number, None, e.message)
        except Exception as e:  # so that nobody waits for ever
            logging.getLogger("ctrkit.serve").exception("%s failed", question)
            self._send("answer", number, None, f"{question} failed: {type(e).__name__}: {e}")
        else:
            self._send("answer", number, result, None)


def _work(serving: Serving, folder: Path, connections: socket.socket, pipe: Connection) -> None:
    """Be a worker: load the model in `folder`, serve, and do as the watcher asks, until it says stop or is gone."""
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_watched(serving, folder, connections, pipe))


async def _serve_watched(serving: Serving, folder: Path, connections: socket.socket, pipe: Connection) -> None:
    from ctrkit.service_api import Service

    async def handle(question: str, argument: Any) -> Any:
        if question == "prepare":
            return await models.prepare(argument)
        if question == "commit":
            return models.commit()
        if question == "drop":
            return models.current.drop()
        if question == "count":
            return models.metrics.swapped(argument)
        assert question == "stop"
        return server.stop()

    def orphaned() -> None:
        shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)
        server.stop()

    async def swap() -> Any:
        return await line.ask("swap")

    line = _Line(pipe, handle, orphaned)
    telling: list[asyncio.Task[Any]] = []
    try:
        models = Models(serving, folder)
    except UserError as e:
        with contextlib.suppress(ConnectionError):
            await line.ask("failed", e.message)
        return
    service = Service(models.current, serving.limits, serving.token, swap, models.metrics)
    server = Server(
        service,
        serving.limits.seconds,
        lambda: telling.append(asyncio.create_task(line.ask("begun", models.current.model.digest))),
    )
    loop = asyncio.get_running_loop()
    joining: set[asyncio.Task[Any]] = set()

    def take() -> None:
        """Take over connections that the watcher has accepted."""
        with contextlib.suppress(BlockingIOError):
            while (given := socket.recv_fds(connections, 1, 1))[1]:
                accepted = loop.connect_accepted_socket(server.connection, socket.socket(fileno=given[1][0]))
                joining.add(task := loop.create_task(accepted))
                task.add_done_callback(joining.discard)
            loop.remove_reader(connections)  # the watcher is gone

    connections.setblocking(False)
    loop.add_reader(connections, take)
    await server.serve([])


class _Worker:
    """A process that serves, as its watcher sees it.

    begun: its model's digest, once it serves, or the UserError because of which it does not.
    ended: is set when it is no more.
    """

    def __init__(self, serving: Serving, folder: Path, asked: Handle) -> None:
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[str] = loop.create_future()
        self.ended = asyncio.Event()
        self._asked = asked
        spawn = multiprocessing.get_context("spawn")
        pipe, theirs = spawn.Pipe()
        self._connections, takes = socket.socketpair()
        self._connections.setblocking(False)
        self.process = spawn.Process(target=_work, args=(serving, folder, takes, theirs), daemon=True)
        # A terminal or a service manager may send these to all of its processes. Workers, which have them blocked,
        # heed their watcher only.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPS, signal.SIGHUP))
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        takes.close()
        self.line = _Line(pipe, self._handle, lambda: None)
        loop.add_reader(self.process.sentinel, self._end)

    @property
    def serves(self) -> bool:
        """Whether it takes connections."""
        begun = self.begun
        return begun.done() and not begun.cancelled() and begun.exception() is None and not self.ended.is_set()

    def give(self, connection: socket.socket) -> bool:
        """Give it a connection. False if it does not even take them over."""
        try:
            socket.send_fds(self._connections, [b"c"], [connection.fileno()])
        except OSError:
            return False
        return True

    async def stop(self, seconds: float) -> None:
        """Have it finish what it began, for so long at most, and end."""
        if self.serves:
            asking = asyncio.ensure_future(self.line.ask("stop"))
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        else:
            self.process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)
        self.process.kill()
        await self.ended.wait()

    async def _handle(self, question: str, argument: Any) -> Any:
        if question not in ("begun", "failed"):
            return await self._asked(question, argument)
        if self.begun.done():  # nobody waits for it any more
            return None
        if question == "begun":
            self.begun.set_result(argument)
        else:
            self.begun.set_exception(UserError(argument))
        return None

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self.process.sentinel)
        self.process.join()
        self.line.close()
        self._connections.close()
        if not self.begun.done():
            self.begun.set_exception(UserError(f"a worker ended with code {self.process.exitcode} before it served"))
        self.ended.set()


class Watcher:
    """Starts workers, starts them again when they die, has them swap models together, and stops them."""

    def __init__(self, serving: Serving, sock: socket.socket, count: int) -> None:
        self._serving, self._sock, self._count = serving, sock, count
        self._folder = serving.model.resolve()
        self._workers: dict[int, _Worker] = {}
        self._turn = 0
        self._listens = False
        self._busy = asyncio.Lock()
        """Held while models are swapped or a worker starts, so that all have the same."""
        self._swap = told(self._swap_all, self._count_swap)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises UserError if the first workers cannot use the model."""
        stopping = asyncio.Event()

        def stop() -> None:
            """End once what has begun is answered; asked twice for it, at once."""
            if stopping.is_set():
                self._kill()
            stopping.set()

        on_signals(stop, self._swap)
        serving, stopped = asyncio.create_task(self._serve()), asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            serving.cancel()
            stopped.cancel()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            if not self._listens:  # nothing has begun
                self._kill()
            seconds = self._serving.limits.seconds + 10
            await asyncio.gather(*(worker.stop(seconds) for worker in self._workers.values()))
        say("serve: stopped")

    async def _serve(self) -> None:
        async with self._busy:
            at_once = len(os.sched_getaffinity(0))
            for first in range(0, self._count, at_once):
                places = range(first, min(first + at_once, self._count))
                await asyncio.gather(*(self._start(place) for place in places))
        self._sock.setblocking(False)
        self._sock.listen(BACKLOG)
        self._listens = True
        self._listen()
        model = self._workers[0].begun.result()
        say(f"serve: {url(self._sock)}, model {model}, {self._count} processes")
        await asyncio.gather(*(self._keep(place) for place in range(self._count)))

    def _kill(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()

    def _listen(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Give new connections to the workers in turn: each gets as many, also of a few that stay open."""
        while True:
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, ConnectionError):  # there is none, or it has gone
                return
            except OSError:  # too many are open
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._sock)
                loop.call_later(0.1, self._listen)
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer is more than one write
                for _ in range(self._count):
                    self._turn = (self._turn + 1) % self._count
                    worker = self._workers[self._turn]
                    if worker.serves and worker.give(connection):
                        break

    async def _start(self, place: int) -> None:
        async def asked(question: str, argument: Any) -> Any:
            assert question == "swap"
            return await self._swap()

        worker = self._workers[place] = _Worker(self._serving, self._folder, asked)
        await worker.begun

    async def _keep(self, place: int) -> None:
        """Start a worker again whenever it dies."""
        failed = 0
        while True:
            worker = self._workers[place]
            await worker.ended.wait()
            multiprocess.mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
            say(f"serve: a worker ended with code {worker.process.exitcode}; another one is started")
            await asyncio.sleep(PAUSES[min(failed, len(PAUSES) - 1)])
            async with self._busy:
                try:
                    await self._start(place)
                    failed = 0
                except UserError as e:
                    failed += 1
                    say(f"serve: it did not start: {e.message}")

    async def _swap_all(self) -> dict[str, Any]:
        """Have all workers load what now lies where the model was read, and use it if all of them could."""
        async with self._busy:
            folder = self._serving.model.resolve()
            answers = await self._ask_all("prepare", folder)
            errors = [answer for answer in answers if isinstance(answer, UserError)]
            if not errors and len(set(answers)) != 1:
                errors.append(
                    UserError(f"{folder} changed while it was read: export elsewhere and rename, or swap a link")
                )
            if errors:
                await self._ask_all("drop")
                raise errors[0]
            self._folder = folder
            done_by_all = await self._ask_all("commit")
            return {"model": answers[0], "changed": any(done["changed"] for done in done_by_all)}

    async def _count_swap(self, result: str) -> None:
        """Have one worker count an attempt to swap, for all."""
        for worker in [worker for worker in self._workers.values() if worker.serves]:
            with contextlib.suppress(ConnectionError):
                await worker.line.ask("count", result)
                return

    async def _ask_all(self, question: str, argument: Any = None) -> list[Any]:
        """Return what the workers answer, UserErrors included, but for those that died over it."""
        asked = [worker.line.ask(question, argument) for worker in self._workers.values() if not worker.ended.is_set()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, ConnectionError)]
