"""Real services for tests: `ctrkit serve` in processes of its own, and requests to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests import requests_of
from tests.tiny_run import TinyRun

TOKEN = "correct-horse-battery-staple"


def exported(run: TinyRun, folder: Path, *words: str) -> Path:
    """Train a model of the tiny run into `folder`/model and export it; return the export."""
    return requests_of.export(run, run.train(folder / "model", *words), folder / "exported")


def workers_of(watcher: int) -> list[int]:
    """Return the processes that one of several workers started to serve."""
    children = Path(f"/proc/{watcher}/task/{watcher}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Running:
    """A service on a free port. Use as a context manager: at the end it is stopped, and must end well."""

    def __init__(self, model: Path, *words: object, token: str | None = None) -> None:
        command = [sys.executable, "-m", "ctrkit", "serve", str(model), "--port", "0", *map(str, words)]
        env = {name: value for name, value in os.environ.items() if name != "CTRKIT_TOKEN"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=env | ({"CTRKIT_TOKEN": token} if token else {})
        )
        self.token = token
        self.log: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = self.said(r"http://\S+(?=,)")
        self.port = urlsplit(self.url).port

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
        if exc[0] is None:
            assert self.process.returncode == 0, self.log
            assert "Traceback" not in "".join(self.log), self.log

    def said(self, pattern: str, after: int = 0) -> str:
        """Wait for a line of its log, behind the first `after`, that has a pattern; return what matches."""
        with self._news:
            assert self._news.wait_for(lambda: self._found(pattern, after) or self._ended, 60), (pattern, self.log)
        found = self._found(pattern, after)
        assert found is not None, (pattern, self.log)
        return found

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        connection: http.client.HTTPConnection | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Return an answer's status, body (read as JSON where it is) and headers. body: JSON, or bytes as they are."""
        headers = dict(headers or {})
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        own = connection or self.connected()
        try:
            own.request(method, path, body, headers)
            answer = own.getresponse()
            content = answer.read()
        finally:
            if connection is None:
                own.close()
        is_json = answer.headers.get_content_type() == "application/json" and content
        return answer.status, json.loads(content) if is_json else content.decode(), answer.headers

    def connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def scores(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request that must be answered."""
        status, answer, _ = self.ask("POST", "/score", request)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def counted(self, name: str) -> float:
        """Return a number of /metrics, by its name with labels; 0 if it is not there."""
        status, text, _ = self.ask("GET", "/metrics")
        assert status == 200
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {named: float(value) for named, _, value in lines}.get(name, 0.0)

    def workers(self) -> list[int]:
        """Return the processes that it started to serve."""
        return workers_of(self.process.pid)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.log.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def _ended(self) -> bool:
        return self.process.poll() is not None

    def _found(self, pattern: str, after: int) -> str | None:
        found = (re.search(pattern, line) for line in self.log[after:])
        return next((match[0] for match in found if match), None)


class Callers:
    """Threads that ask again and again, each over a connection of its own, until they are stopped.

    ask: one request over a connection; what it returns is kept, in order.
    """

    def __init__(self, running: Running, count: int, ask: Callable[[http.client.HTTPConnection], Any]) -> None:
        self.results: list[list[Any]] = [[] for _ in range(count)]
        self.faults: list[BaseException] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(running, ask, to)) for to in self.results]
        for thread in self._threads:
            thread.start()

    def wait_for(self, more: int) -> None:
        """Return when each thread has had as many answers more."""
        goals = [len(result) + more for result in self.results]
        end = time.monotonic() + 60
        while any(len(r) < goal for r, goal in zip(self.results, goals, strict=True)) and not self.faults:
            assert time.monotonic() < end
            time.sleep(0.005)

    def stop(self) -> None:
        """End them. Raises what a thread raised."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        if self.faults:
            raise self.faults[0]

    def _run(self, running: Running, ask: Callable[[http.client.HTTPConnection], Any], to: list[Any]) -> None:
        connection = running.connected()
        try:
            while not self._stopped.is_set():
                to.append(ask(connection))
        except BaseException as e:
            self.faults.append(e)
        finally:
            connection.close()
