"""Answer requests for scores over HTTP.

Reads a folder of `ctrkit export` and, for pictures by name, features.h5. Writes nothing.
"""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import click

from ctrkit.errors import UsageError, UserError
from ctrkit.options import FiniteRange, path_option

SHORTEST_TOKEN = 16


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@path_option("--features", "features.h5, where requests name pictures.", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at. Others need a token.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen at; 0: any free one."
)
@path_option(
    "--token-file",
    f"File with the token that callers send, {SHORTEST_TOKEN} characters or more. Default: $CTRKIT_TOKEN.",
    required=False,
)
@click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes that share the port."
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="CPU threads of one scoring."
)
@click.option(
    "--max-request-mb", type=FiniteRange(0.001, 1024), default=4.0, show_default=True, help="Longest body, in MiB."
)
@click.option(
    "--max-ads", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="Most ads of a request."
)
@click.option(
    "--max-behaviours",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Most behaviours of a request.",
)
@click.option(
    "--max-at-once",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests for scores that a process takes at once; to more it answers 503.",
)
@click.option(
    "--cache-mb",
    type=FiniteRange(0, 65_536),
    default=64.0,
    show_default=True,
    help="Memory of a process for the ads that it was asked for lately, in MiB; 0: it knows none.",
)
@click.option(
    "--timeout",
    type=FiniteRange(0.01, 3600),
    default=10.0,
    show_default=True,
    help="Seconds that a request may take.",
)
def command(
    model: Path,
    features: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    workers: int,
    threads: int,
    max_request_mb: float,
    max_ads: int,
    max_behaviours: int,
    max_at_once: int,
    cache_mb: float,
    timeout: float,
) -> None:
    """Answer requests for scores over HTTP.

    Reads a folder that `ctrkit export` wrote, or a link to one, and, where requests name pictures, features.h5. Writes
    nothing. POST /score takes a user, a scene, behaviours and candidate ads, as raw values, and answers the click
    probability of each ad; GET /docs shows its form, /openapi.json too, /health, /ready and /metrics say how it is.

    SIGTERM finishes what has begun and ends. SIGHUP, or POST /reload, which takes a token, swaps in the model that now
    lies in MODEL, without losing a request; one that cannot be used changes nothing.

    \b
    ctrkit serve runs/demo/din/export --port 8000
    ctrkit serve current --features features.h5 --host 0.0.0.0 --token-file token --workers 4
    """
    token = _token(token_file)
    address = _address(host, port)
    if token is None and not ipaddress.ip_address(str(address[1][0]).partition("%")[0]).is_loopback:
        raise UsageError(
            f"--host {host} can be reached from other machines, so callers have to know a token: give --token-file "
            "or set CTRKIT_TOKEN; python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    if not model.is_dir():
        raise UserError(f"{model} is no folder: give the one that `ctrkit export` wrote")
    try:
        from ctrkit import service_api, service_process, service_workers  # noqa: F401 (where packages may be missing)
        from ctrkit.service_requests import Limits
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package == "ctrkit":
            raise
        raise UserError(f"serve needs {package}; install it with: pip install 'ctrkit[serve]'") from None
    limits = Limits(
        request_bytes=int(max_request_mb * 2**20),
        ads=max_ads,
        behaviours=max_behaviours,
        seconds=timeout,
        at_once=max_at_once,
        cache_bytes=int(cache_mb * 2**20),
    )
    serving = service_process.Serving(model=model, features=features, token=token, threads=threads, limits=limits)
    with _bound(*address) as sock:
        if workers == 1:
            service_process.serve(serving, sock)
        else:
            service_workers.serve(serving, sock, workers)


def _token(file: Path | None) -> str | None:
    """Return the token that callers have to send, or None. Raises UsageError if it is none that can be sent."""
    if file is None:
        token, where = os.environ.get("CTRKIT_TOKEN"), "CTRKIT_TOKEN"
        if token is None:
            return None
    else:
        where = str(file)
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"--token-file {file} cannot be read: {e}") from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"the token in {where} has to be one word of {SHORTEST_TOKEN} or more letters and digits")
    return token


def _address(host: str, port: int) -> tuple[int, Any]:
    """Return the family of a host's first address, and what to bind. Raises UsageError if it has none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        raise UsageError(f"--host {host!r} is no address of this machine: {e}") from None
    return family, address


def _bound(family: int, address: Any) -> socket.socket:
    """Return a socket bound to an address. Raises UsageError if it is taken or none of this machine's."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as e:
        sock.close()
        host, port = address[:2]
        raise UsageError(f"cannot listen at {host}, port {port}: {e.strerror}; choose with --host and --port") from None
    return sock
