"""A process that serves: its model, its signals, its HTTP server."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from ctrkit.errors import UserError
from ctrkit.progress import say
from ctrkit.service_connections import Connection
from ctrkit.service_requests import Limits

STOPS = (signal.SIGTERM, signal.SIGINT)
LOG_FORMAT = "%(name)s: %(message)s"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a process needs to know to serve.

    model: a folder of `ctrkit export`, or a link to one.
    features: features.h5, for pictures by name.
    token: what callers must know, or None.
    threads: CPU threads of one scoring.
    """

    model: Path
    features: Path | None
    token: str | None
    threads: int
    limits: Limits


def serve(serving: Serving, sock: socket.socket) -> None:
    """Serve on a bound socket in this process, until SIGTERM or SIGINT; what began then is finished.

    Raises UserError if the model cannot be used.
    """
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(serving, sock))


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us and says when it has begun."""

    def __init__(self, service: Any, seconds: float, begun: Callable[[], None]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            soft = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        Connection.most = max(soft - 100, 20)
        Connection.seconds = seconds
        config = uvicorn.Config(
            service,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            interface="asgi3",
            timeout_graceful_shutdown=int(seconds) + 5,
        )
        super().__init__(config)
        self._service, self._begun = service, begun

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begun()

    def connection(self) -> Connection:
        """Return what handles a connection that was accepted elsewhere."""
        return Connection(config=self.config, server_state=self.server_state, app_state={})

    def stop(self) -> None:
        """End once what has begun is answered; asked twice for it, at once."""
        for connection in list(self.server_state.connections) if self.should_exit else ():
            connection.transport.abort()  # whose requests then end by themselves
        self.force_exit = self.should_exit
        self.should_exit = self._service.stopping = True


class Models:
    """The model of one process: loads, swaps and tells it."""

    def __init__(self, serving: Serving, folder: Path) -> None:
        from ctrkit.service_metrics import Metrics
        from ctrkit.service_model import Current, ServedModel

        self.serving = serving
        self.metrics = Metrics()
        self._rest = (serving.features, serving.threads, serving.limits)
        self.current = Current(ServedModel(folder, *self._rest))
        self.metrics.in_use(self.current.model.digest)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look at it again and again

    async def prepare(self, folder: Path) -> str:
        """Load the model in a folder beside the one in use, in a thread. Return its digest. Raises UserError."""
        try:
            return await asyncio.to_thread(self.current.prepare, folder, *self._rest)
        except UserError:
            raise
        except Exception as e:
            logging.getLogger("ctrkit.serve").exception("loading %s failed", folder)
            raise UserError(f"{folder} cannot be loaded: {type(e).__name__}: {e}") from None

    def commit(self) -> dict[str, Any]:
        """Use what was prepared."""
        before = self.current.model.digest
        self.current.commit()
        after = self.current.model.digest
        self.metrics.in_use(after, before)
        return {"model": after, "changed": before != after}


async def _serve(serving: Serving, sock: socket.socket) -> None:
    from ctrkit.service_api import Service

    models = Models(serving, serving.model.resolve())
    swapping = asyncio.Lock()

    async def swap() -> dict[str, Any]:
        async with swapping:
            await models.prepare(serving.model.resolve())
            return models.commit()

    async def count(result: str) -> None:
        models.metrics.swapped(result)

    def begun() -> None:
        say(f"serve: {url(sock)}, model {models.current.model.digest}")

    swap_told = told(swap, count)
    service = Service(models.current, serving.limits, serving.token, swap_told, models.metrics)
    server = Server(service, serving.limits.seconds, begun)
    on_signals(server.stop, swap_told)
    await server.serve([sock])
    say("serve: stopped")


def told(swap: Callable[[], Any], count: Callable[[str], Any]) -> Callable[[], Any]:
    """Return `swap`, which counts and says what comes of it: "swapped", "same" or "failed"."""

    async def told() -> dict[str, Any]:
        try:
            result: dict[str, Any] = await swap()
        except UserError as e:
            await count("failed")
            say(f"serve: the model stays as it was: {e.message}")
            raise
        await count("swapped" if result["changed"] else "same")
        say(f"serve: model {result['model']}, " + ("swapped in" if result["changed"] else "the same as before"))
        return result

    return told


def on_signals(stop: Callable[[], None], swap: Callable[[], Any]) -> None:
    loop = asyncio.get_running_loop()
    running = set()

    async def quietly() -> None:
        with contextlib.suppress(UserError):  # it is told
            await swap()

    def reload() -> None:
        task = loop.create_task(quietly())
        running.add(task)
        task.add_done_callback(running.discard)

    for sig in STOPS:
        loop.add_signal_handler(sig, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
