"""Connections of the service: uvicorn's, with limits on their number, on headers, and on what is thrown away."""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 32 << 10
"""Of a request line and headers."""
THROWN_BYTES = 64 << 20
"""Of what comes after the answer, which is read and thrown away, so that the client sees the answer."""
_OFFERS = frozenset({b"upgrade", b"connection", b"http2-settings"})


class _Answer:
    """The transport of one answer, whose head goes with the first of its body: each piece that goes by itself is a
    call of the system, and wakes the client."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing, self.close = transport.is_closing, transport.close

    def write(self, data: bytes) -> None:
        if self.is_closing():  # the client has gone, which nobody has been told of yet
            pass
        elif self._head or data.startswith(b"HTTP/1.1 100 "):
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._head = data


class Connection(HttpToolsProtocol):
    """One connection. `most` and `seconds` are set once, for all of a process."""

    most = 1000
    """Connections at once."""
    seconds = 10.0
    """For a request line and headers."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._in_head = False
        self._refused = False
        self._count = 0
        """Bytes of a head that has not ended, but for those that came with the body before it; or thrown away."""
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(b"503 Service Unavailable", "too many connections: try again", b"retry-after: 1\r\n")
            transport.close()  # and wait for nobody
        else:
            self._deadline = self.loop.call_later(self.seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what has come whole, though its client sends no more."""
        waits = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        if waits:
            self.cycle.keep_alive = False
        return waits

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._refused:
            self._throw_away(data)
            return
        self._unset_keepalive_if_required()
        before = self.cycle
        all_of_head = self._in_head or before is None or not before.more_body
        self._feed(data)
        if self._in_head:
            if all_of_head and self.cycle is before:
                self._count += len(data)
            if self._count > HEAD_BYTES:
                self._refuse_head()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(self.seconds, self.transport.abort)
        elif self.cycle is not None and self.cycle.response_complete and self.cycle.more_body:
            self._throw_away(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._count = True, 0

    def on_headers_complete(self) -> None:
        method = self.parser.get_method()
        lines = len(method) + len(self.url) + len("  HTTP/1.1\r\n\r\n")
        if lines + sum([len(name) + len(value) + len(": \r\n") for name, value in self.headers]) > HEAD_BYTES:
            self._refuse_head()
        elif method == b"CONNECT":
            self._refuse(b"405 Method Not Allowed", "this is no proxy")
        if self._refused:
            raise ConnectionRefusedError  # so that the parser does not go on
        if not self.parser.should_upgrade():  # else `_feed` goes on
            super().on_headers_complete()
            if method != b"HEAD":  # whose answer has no body
                self.cycle.transport = _Answer(self.transport)  # type: ignore[assignment]
            self._in_head, self._count = False, 0
            self._in_time()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request", "this is no HTTP/1.1 request")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            # The parser takes the body for another protocol, such as HTTP/2, which some clients offer in each first
            # request. A server need not accept: read the same request again, without the offer.
            if not self.transport.is_closing():
                lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url)]
                lines += [b"%s: %s" % header for header in self.headers if header[0] not in _OFFERS]
                self.parser = httptools.HttpRequestParser(self)
                self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + data[e.args[0] :])
        except httptools.HttpParserError:
            if not self._refused:
                self.send_400_response("")

    def _in_time(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _throw_away(self, data: bytes) -> None:
        self._count += len(data)
        if self._count > THROWN_BYTES:
            self.transport.abort()

    def _refuse_head(self) -> None:
        message = f"the request line and headers are longer than {HEAD_BYTES:,} bytes"
        self._refuse(b"431 Request Header Fields Too Large", message)

    def _refuse(self, status: bytes, message: str, more: bytes = b"") -> None:
        """Answer what is no request for the service, and hang up once the client has.

        To close the connection while it still sends would take the answer from it.
        """
        self._in_time()
        self._in_head, self._refused, self._count = False, True, 0
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:  # a request before this one: its answer is the last
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.pipeline.clear()
            self.flow.resume_reading()
        body = b'{"error": "%s"}' % message.encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body), more) + body)
        self.transport.write_eof()
        self._deadline = self.loop.call_later(self.seconds, self.transport.abort)
