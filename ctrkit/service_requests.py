"""What the service takes from a request before it looks inside: limits, body, and refusals that say where and what."""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ctrkit.recipe import Feature
from ctrkit.request_model import faults

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Headers = Mapping[bytes, bytes]
SHOWN = 20
"""Faults of a request that are listed in its answer."""
MOST = 10_000
"""Faults of which none is listed: to look at them would take long."""
WRONG = "the request is not one that this model takes"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many may ask at once."""

    request_bytes: int = 4 << 20
    ads: int = 1000
    behaviours: int = 1000
    seconds: float = 10.0
    """From the request's first line to its answer."""
    at_once: int = 64
    """Requests for scores that a process has begun and not answered."""
    cache_bytes: int = 64 << 20
    """Of a process, for the ads that were asked for lately."""


@dataclass(eq=False)
class Refusal(Exception):
    """An answer other than 200. `details`: where in the request, and what is wrong there."""

    status: int
    message: str
    details: list[dict[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """Return the answer as JSON."""
        content: dict[str, Any] = {"error": self.message}
        if self.details:
            content["details"] = self.details
        return json.dumps(content).encode()


def check_json_headers(headers: Headers, limit: int) -> None:
    """Raise Refusal unless the headers announce plain JSON of at most `limit` bytes."""
    kind, _, parameters = headers.get(b"content-type", b"").partition(b";")
    if kind.strip().lower() != b"application/json":
        raise Refusal(415, "the body must be JSON: send the header Content-Type: application/json")
    charset = parameters.replace(b" ", b"").replace(b'"', b"").lower()
    if charset.startswith(b"charset=") and charset not in (b"charset=utf-8", b"charset=utf8"):
        raise Refusal(415, "JSON is UTF-8: send it without a charset")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise Refusal(415, "compressed bodies are not taken: send it without Content-Encoding")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _too_long(limit)


async def read_body(receive: Receive, limit: int) -> bytes:
    """Return the whole body. Raises Refusal if it is empty or longer than `limit` bytes, announced or not."""
    message = await receive()
    body = message.get("body", b"")
    if message.get("more_body"):
        pieces = [body]
        length = len(body)
        while message.get("more_body") and length <= limit:
            message = await receive()
            pieces.append(message.get("body", b""))
            length += len(pieces[-1])
        body = b"".join(pieces)
    if message["type"] == "http.disconnect":
        raise Refusal(499, "the client went away")  # which nobody reads, but it is counted
    if len(body) > limit:
        raise _too_long(limit)
    if not body:
        raise Refusal(400, "the body is empty: send a JSON object; /docs shows one")
    assert isinstance(body, bytes)
    return body


def _too_long(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit:,} bytes, the most that this service takes (--max-request-mb)")


def refusal_of(error: ValidationError, features: Mapping[str, Feature], picture_width: int) -> Refusal:
    """Return the answer to a body that is not what the model's request should be: 400 if it is no JSON, else 422."""
    if error.error_count() > MOST:
        return Refusal(422, f"{WRONG}: {error.error_count():,} faults; /docs shows what is")
    if (first := error.errors(include_url=False, include_input=False)[0])["type"] == "json_invalid":
        return Refusal(400, f"the body is no valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    found = faults(error, features, picture_width)
    details = [{"where": where(place), "what": what} for place, what in found[:SHOWN]]
    told = f"{len(found)} faults" if len(found) > 1 else "1 fault"
    return Refusal(422, f"{WRONG}: {told}; /docs shows what is", details)


def where(place: Iterable[int | str]) -> str:
    """Return where in a JSON text something is: ("ads", 3, "age") is "ads[3].age"."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step[:100]}" if text else step[:100]
    return text or "the whole body"
