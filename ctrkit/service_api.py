"""The HTTP side of the service: who may ask what, and what is answered."""

import asyncio
import functools
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ctrkit import service_page
from ctrkit.errors import UserError
from ctrkit.service_metrics import Metrics
from ctrkit.service_model import Current
from ctrkit.service_requests import Headers, Limits, Refusal, check_json_headers, read_body

Swap = Callable[[], Awaitable[dict[str, Any]]]
"""Takes into use what now lies where the model was read: {"model": digest, "changed": whether it is another}.
Raises UserError where that cannot be used, and the old one stays."""
OPEN = frozenset({"/health", "/ready"})
"""What may be asked without the token."""
ATTENTION = {b"": False, b"attention=false": False, b"attention=true": True}
"""Query → whether attention weights are asked for."""
SHORT_BYTES = 1 << 17
"""Requests up to this length are scored in the event loop."""
LOG = logging.getLogger("ctrkit.serve")


class Service:
    """The ASGI application.

    Parameters
    ----------
    current: the model in use.
    limits: see `Limits`.
    token: what a caller must know, or None where callers are of this machine.
    swap: what `POST /reload` does.
    """

    def __init__(self, current: Current, limits: Limits, token: str | None, swap: Swap, metrics: Metrics) -> None:
        self.current, self.limits, self.metrics = current, limits, metrics
        self.stopping = False
        self._swap = swap
        self._token = token.encode() if token else None
        self._open = 0
        self._pool = ThreadPoolExecutor(1, "scoring")
        """Of long requests, so that the others need not wait to be told of."""
        routes = [
            Route("/score", self._score, methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/reload", self._reload, methods=["POST"]),
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
        ]
        self._paths = {route.path for route in routes}
        handlers = {HTTPException: _problem, Refusal: _refused, Exception: _failed}
        self._routed = Starlette(routes=routes, exception_handlers=handlers)
        self._routed.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Whatever is refused, or fails, is answered in JSON."""
        path = scope["path"]

        async def counted(message: MutableMapping[str, Any]) -> None:
            if "status" in message:  # counted before it is sent: who has the answer finds it in the metrics
                self.metrics.answered(path if path in self._paths else "other", message["status"])
            await send(message)

        answer: Any = self._routed
        try:
            try:
                self._admit(path, dict(scope["headers"]))
            except Refusal as e:
                answer = _response(e)
            await answer(scope, receive, counted)
        except Exception:  # `_failed` has answered
            LOG.exception("a request for %s failed here, which should not be: please report it", path)

    def _admit(self, path: str, headers: Headers) -> None:
        """Raise Refusal if the caller may not ask for a path."""
        if self._token is None:
            # A page in a browser of this machine could reach the service under a name of its own.
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not _is_loopback(host):
                message = f"without a token this service answers to names of this machine, not to {host[:100]!r}"
                raise Refusal(403, message)
        elif path not in OPEN:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
                message = "send the service's token in the header Authorization: Bearer TOKEN"
                raise Refusal(401, message, headers={"WWW-Authenticate": "Bearer"})

    async def _score(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        scope = request.scope
        attention = ATTENTION.get(scope["query_string"])
        if attention is None:
            raise Refusal(400, "the query may be attention=true or attention=false, and nothing else")
        check_json_headers(dict(scope["headers"]), self.limits.request_bytes)
        self._open += 1
        self.metrics.open.inc()
        what = Refusal(408, f"the body did not arrive within {self.limits.seconds:g} s")
        try:
            async with asyncio.timeout(self.limits.seconds):
                self._refuse_too_many()
                body = await read_body(request.receive, self.limits.request_bytes)
                await asyncio.sleep(0)  # so that all that has arrived is counted before any of it is answered
                self._refuse_too_many()
                what = _busy(f"no answer within {self.limits.seconds:g} s")
                work = functools.partial(self.current.model.answer, body, attention=attention)
                # What is short is soon done: a thread, and waiting for it, would cost a third of the rate.
                scored = work() if len(body) <= SHORT_BYTES else await loop.run_in_executor(self._pool, work)
        except TimeoutError:
            raise what from None
        finally:
            self._open -= 1
            self.metrics.open.dec()
        self.metrics.scored(time.perf_counter() - begun, scored.ads, scored.known_ads, scored.unknown)
        return Response(scored.body, media_type="application/json")

    def _refuse_too_many(self) -> None:
        if self._open > self.limits.at_once:
            raise _busy(f"{self._open} requests wait for scores, of at most {self.limits.at_once}")

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if self.stopping:
            raise Refusal(503, "the service is stopping")
        return JSONResponse({"status": "ready", "model": self.current.model.digest, "loaded": self.current.loaded})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _reload(self, request: Request) -> Response:
        if self._token is None:
            raise Refusal(403, "start the service with a token to swap models over HTTP, or send it the signal HUP")
        try:
            return JSONResponse(await self._swap())
        except UserError as e:
            raise Refusal(409, e.message) from None

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._description())

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(service_page.page(self._description()))

    def _description(self) -> dict[str, Any]:
        return service_page.openapi(self.current.model.request, with_token=self._token is not None)


def _is_loopback(host: str) -> bool:
    """Return whether a Host header names this machine by a name that no other site can have."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower().rstrip(".") == "localhost"


def _busy(why: str) -> Refusal:
    return Refusal(503, f"{why}: try again", headers={"Retry-After": "1"})


def _response(refusal: Refusal) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _response(error)


async def _failed(request: Request, error: Exception) -> Response:
    return _response(Refusal(500, "the service failed at this request; its log says how"))


async def _problem(request: Request, error: Exception) -> Response:
    """Return what Starlette refuses (no such path, another method) in the form of the other refusals."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"there is no {request.url.path[:100]}; /docs lists what there is"
    elif error.status_code == 405:
        message = f"{request.url.path} takes {headers.get('Allow', 'another method')}, not {request.method}"
    else:
        message = error.detail
    return _response(Refusal(error.status_code, message, headers=headers))
