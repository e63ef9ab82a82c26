"""Requests to a service over keep-alive sockets, as cheaply as Python can: from one thread, by epoll, without parsing.

    python benchmarks/serve_load.py URL BODIES [--connections 4] [--seconds 10] [--rate 500]

BODIES is a file of requests, a line each, sent one after the other to URL/score. Without --rate each connection sends
its next request when it has the answer to the last. With --rate requests are due at even intervals whatever the service
does, each waits for a free connection, and its latency counts from when it was due. Prints one JSON object.
"""

import argparse
import json
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

OK = b"HTTP/1.1 200"


class Client:
    """One connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self._parts: list[bytes] = []
        self._missing = -1

    def send(self, request: bytes, began: float) -> None:
        """Send a request, which fits the socket's buffer."""
        self.began = began
        self._parts, self._missing = [], -1
        self.socket.sendall(request)

    def read(self) -> bytes | None:
        """Return the answer's first line once the answer is whole, b"" if the connection has ended, else None."""
        data = self.socket.recv(1 << 18)
        if not data:
            return b""
        self._parts.append(data)
        if self._missing < 0:
            so_far = data if len(self._parts) == 1 else b"".join(self._parts)
            end = so_far.find(b"\r\n\r\n")
            if end < 0:
                return None
            place = so_far.find(b"content-length: ", 0, end)
            self._missing = int(so_far[place + 16 : so_far.find(b"\r", place)]) - (len(so_far) - end - 4)
        else:
            self._missing -= len(data)
        return self._parts[0][:12] if self._missing == 0 else None


def load(url: str, bodies: list[bytes], connections: int, seconds: float, rate: float | None) -> dict[str, Any]:
    """Send requests for so long; return how many were answered and in what time, in seconds, and how many were not."""
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    head = (
        f"POST /score HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    requests = [(head % len(body)).encode() + body for body in bodies]
    clients = [Client((where.hostname, where.port)) for _ in range(connections)]
    by_number = {client.socket.fileno(): client for client in clients}
    ready = select.epoll()
    for number in by_number:
        ready.register(number, select.EPOLLIN)
    free = deque(clients)
    latencies: list[float] = []
    errors: list[str] = []
    sent = 0
    begun, cpu = time.perf_counter(), time.process_time()
    end = begun + seconds
    while True:
        now = time.perf_counter()
        due = begun + sent / rate if rate else now
        while free and due <= now and due < end:
            free.popleft().send(requests[sent % len(requests)], due)
            sent += 1
            due = begun + sent / rate if rate else now
        if due >= end and len(free) == len(by_number):
            break
        wait = max(due - time.perf_counter(), 0.0) if rate and free and due < end else 5.0
        for number, _ in ready.poll(wait):
            client = by_number[number]
            line = client.read()
            if line is None:
                continue
            if line == OK:
                latencies.append(time.perf_counter() - client.began)
            else:
                errors.append(line.decode("latin-1"))
            if line == b"":
                del by_number[number]
            else:
                free.append(client)
    took = time.perf_counter() - begun
    latencies.sort()
    return {
        "requests": len(latencies),
        "errors": len(errors),
        "first_errors": errors[:5],
        "per_second": len(latencies) / took,
        "cpu_ms": 1e3 * (time.process_time() - cpu) / max(sent, 1),
        **{f"p{q}_ms": 1e3 * latencies[min(int(len(latencies) * q / 100), len(latencies) - 1)] for q in (50, 99)},
        "longest_ms": 1e3 * latencies[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float)
    args = parser.parse_args()
    found = load(args.url, args.bodies.read_bytes().splitlines(), args.connections, args.seconds, args.rate)
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
