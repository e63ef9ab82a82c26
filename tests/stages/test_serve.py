"""ctrkit serve, as real processes: the scores of `ctrkit predict`, stops, kills, swaps, tokens and counts."""

import asyncio
import http.client
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import uvloop
from ctrkit.stages.serve import command

from ctrkit.cli import COMMANDS
from ctrkit.service_connections import _Answer
from tests import requests_of
from tests.serving import TOKEN, Callers, Running, exported, workers_of
from tests.shop import ctrkit
from tests.tiny_run import TinyRun

SETTINGS = {
    "dicm": [],
    "din": ["--set", 'train.model="din"'],
    "other": ["--set", 'train.model="din"', "--set", "train.seed=2"],
}
REQUEST: dict[str, Any] = {
    "user": {"gender": "f"},
    "behaviours": [{"goods": "g1", "category": "c1"}, {"goods": "never seen"}],
    "ads": [{"ad_id": "a1"}, {"ad_id": "never seen", "ad_category": "c1"}],
}


@pytest.fixture(scope="module")
def models(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported models, by name."""
    folder = tmp_path_factory.mktemp("models")
    return {name: exported(tiny_run, folder / name, *words) for name, words in SETTINGS.items()}


@pytest.fixture
def current(models: dict[str, Path], tmp_path: Path) -> Path:
    """A link to the model `din`."""
    (tmp_path / "current").symlink_to(models["din"])
    return tmp_path / "current"


def point(link: Path, to: Path) -> None:
    """Let a link point elsewhere, at once."""
    new = link.with_name("new")
    new.symlink_to(to)
    new.rename(link)


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["serve"][1]


@pytest.mark.parametrize("name", ["din", "dicm"])
def test_scores_equal_those_of_predict(name: str, models: dict[str, Path], tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    model = models[name].parent / "model"
    tiny_run.must("predict", *tiny_run.reads(), "--model", model, *SETTINGS[name], "--out", out)
    expected = dict(pl.read_parquet(out).select("sample_id", "score").iter_rows())
    asked = dict(requests_of.samples(tiny_run.groups, tiny_run.convert))
    with Running(models[name], "--features", tiny_run.features) as running:
        connection = running.connected()
        found, again = (
            {
                sample: running.ask("POST", "/score?attention=true", request, connection=connection)[1]
                for sample, request in asked.items()
            }
            for _ in range(2)
        )
        connection.close()
        assert again == found
        assert found.keys() == expected.keys()
        assert len(found) > 200
        for sample, answer in found.items():
            assert answer["scores"] == pytest.approx([expected[sample]], abs=1e-5, rel=0)
            assert len(answer["attention"][0]) == len(asked[sample]["behaviours"])
        assert running.counted("ctrkit_scored_ads_total") == 2 * len(found)
        assert len(found) < running.counted("ctrkit_known_ads_total") < 2 * len(found)
        assert running.counted('ctrkit_requests_total{path="/score",status="200"}') == 2 * len(found)


def test_unknown_and_missing_values_are_told_and_counted(models: dict[str, Path]) -> None:
    with Running(models["din"]) as running:
        answer = running.scores(REQUEST)
        assert answer["unknown"]["ad_id"] == {"unknown": 1}
        assert answer["unknown"]["goods"]["unknown"] == 1
        assert answer["unknown"]["ad_shop"] == {"missing": 2}
        running.scores(REQUEST)
        assert running.counted('ctrkit_unknown_values_total{feature="ad_id",kind="unknown"}') == 2
        assert running.counted('ctrkit_unknown_values_total{feature="ad_shop",kind="missing"}') == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_finishes_what_began_and_takes_no_more(models: dict[str, Path], workers: int) -> None:
    body = json.dumps(REQUEST).encode()
    head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    with Running(models["din"], "--workers", workers) as running:
        expected = running.scores(REQUEST)
        with socket.create_connection(("127.0.0.1", running.port)) as half:
            half.sendall(head.format(len(body)).encode() + body[:10])
            while running.counted("ctrkit_open_requests") < 1:
                time.sleep(0.01)
            running.process.send_signal(signal.SIGTERM)
            refused = False
            while not refused:
                try:
                    socket.create_connection(("127.0.0.1", running.port)).close()
                    time.sleep(0.01)
                except ConnectionRefusedError:
                    refused = True
            assert running.process.poll() is None
            half.sendall(body[10:])
            answer = http.client.HTTPResponse(half)
            answer.begin()
            assert json.loads(answer.read()) == expected
            answer.close()
        assert running.process.wait(20) == 0
        assert running.log[-1] == "serve: stopped\n"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_workers_start_a_few_at_a_time_and_stop_while_they_do(models: dict[str, Path], stop: signal.Signals) -> None:
    """On one core one begins after the other; all have ended when the service has."""
    folder, cores = models["din"], os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        command = [sys.executable, "-m", "ctrkit", "serve", str(folder), "--port", "0", "--workers", "8"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, cores)
    try:
        seen: list[int] = []
        while len(seen) < 2 and process.poll() is None:
            seen += [pid for pid in workers_of(process.pid) if pid not in seen]
            assert len(seen) <= 2
            time.sleep(0.01)
        process.send_signal(stop)
        log = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert (process.returncode, log) == (0, "serve: stopped\n")
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen)


def test_a_second_sigterm_ends_at_once(models: dict[str, Path]) -> None:
    """Though a request has begun, which had a minute."""
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n"
    for workers in (1, 2):
        running = Running(models["din"], "--workers", workers, "--timeout", 60)
        with running, socket.create_connection(("127.0.0.1", running.port)) as half:
            half.sendall(head)
            while running.counted("ctrkit_open_requests") < 1:
                time.sleep(0.01)
            running.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                running.process.wait(0.5)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0


@pytest.mark.parametrize(
    "words",
    [
        *(("--max-request-mb", x) for x in ("inf", "nan", "0", "-1", "1025", "1e308")),
        *(("--timeout", x) for x in ("inf", "nan", "0", "-inf", "3601")),
        *(("--workers", x) for x in ("0", "257", "10000")),
        *(("--cache-mb", x) for x in ("inf", "nan", "-1", "65537")),
        ("--threads", "1025"),
    ],
    ids=" ".join,
)
def test_numbers_that_nothing_can_be_done_with(words: tuple[str, str]) -> None:
    result = ctrkit("serve", "nowhere", *words)
    assert result.exit_code == 2, result.output
    assert f"Error: Invalid value for '{words[0]}': " in result.output


def test_a_killed_service_starts_again_at_the_same_port(models: dict[str, Path]) -> None:
    with Running(models["din"], "--workers", 2) as running:
        expected = running.scores(REQUEST)
        workers = running.workers()
        assert len(workers) == 2
        running.process.kill()
        running.process.wait()
        for pid in workers:  # nobody asks them any more, so they end
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.01)
        with Running(models["din"], "--port", running.port) as again:
            assert again.port == running.port
            assert again.scores(REQUEST) == expected
        running.process.returncode = 0


def test_counts_of_workers_add_up_and_outlive_them(models: dict[str, Path]) -> None:
    """Connections go to the workers in turn; a killed one is replaced, and the other goes on meanwhile."""
    with Running(models["din"], "--workers", 2) as running:
        open_, expected = [running.connected(), running.connected()], running.scores(REQUEST)
        for number, connection in enumerate(open_):
            for _ in range(3 + number):
                assert running.ask("POST", "/score", REQUEST, connection=connection)[1] == expected
        assert running.counted("ctrkit_score_seconds_count") == 8
        assert running.counted('ctrkit_score_seconds_bucket{le="+Inf"}') == 8
        killed, kept = running.workers()
        os.kill(killed, signal.SIGKILL)
        running.said("a worker ended with code -9")
        works = []
        for connection in open_:  # one each
            connection.auto_open = 0
            try:
                works.append(running.ask("POST", "/score", REQUEST, connection=connection)[1] == expected)
            except (http.client.HTTPException, OSError):
                works.append(False)
            connection.close()
        assert sorted(works) == [False, True]
        for _ in range(5):
            assert running.scores(REQUEST) == expected
        while len(running.workers()) < 2:
            time.sleep(0.01)
        assert kept in running.workers()
        assert running.counted('ctrkit_requests_total{path="/score",status="200"}') == 14
        assert running.counted("ctrkit_scored_ads_total") == 28
        assert running.counted("ctrkit_open_requests") == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_is_swapped_in_under_load_without_losing_a_request(
    workers: int, models: dict[str, Path], current: Path
) -> None:
    with Running(current, "--workers", workers, token=TOKEN) as running:
        first = running.scores(REQUEST)
        callers = Callers(running, 3, lambda c: running.ask("POST", "/score", REQUEST, connection=c)[:2])
        callers.wait_for(20)
        point(current, models["other"])
        running.process.send_signal(signal.SIGHUP)
        running.said("swapped in")
        callers.wait_for(20)
        second = running.scores(REQUEST)
        assert second["model"] != first["model"]
        assert second["scores"] != first["scores"]
        lines = len(running.log)
        point(current, models["din"].parent)  # what is no model
        running.process.send_signal(signal.SIGHUP)
        running.said("the model stays as it was: .* is not an exported model", lines)
        status, answer, _ = running.ask("POST", "/reload")
        assert status == 409
        assert "is not an exported model" in answer["error"]
        callers.wait_for(20)
        point(current, models["din"])
        assert running.ask("POST", "/reload")[:2] == (200, {"model": first["model"], "changed": True})
        for _ in range(10):  # now all workers have it
            assert running.scores(REQUEST) == first
        callers.stop()
        assert len(callers.results) == 3
        for result in callers.results:
            assert {status for status, _ in result} == {200}
            answers = [answer for _, answer in result]
            assert all(answer in (first, second) for answer in answers)
            assert first in answers
            assert second in answers
        text = running.ask("GET", "/metrics")[1]
        loaded = re.findall(r'^ctrkit_model_loaded_timestamp_seconds\{model="(.*)"\} (.*)$', text, re.M)
        assert [model for model, _ in loaded] == [first["model"]]
        assert float(loaded[0][1]) > time.time() - 600
        assert running.counted('ctrkit_model_swaps_total{result="swapped"}') == 2
        assert running.counted('ctrkit_model_swaps_total{result="failed"}') == 2


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_clients_that_go_away_at_any_moment(models: dict[str, Path]) -> None:
    """Short requests and long ones, which are scored in a thread, cut anywhere. No traceback: `Running` looks."""
    rng = random.Random(1)
    bodies = [json.dumps({**REQUEST, "ads": REQUEST["ads"] * n}).encode() for n in (1, 100, 2000)]
    with Running(models["din"], "--max-ads", 5000) as running:
        for _ in range(300):
            body = rng.choice(bodies)
            text = HEAD % len(body) + body
            with socket.create_connection(("127.0.0.1", running.port)) as one:
                one.sendall(text[: rng.choice([len(text), rng.randrange(1, len(text))])])
                if rng.random() < 0.7:  # and throw away what has not been sent
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                time.sleep(rng.choice([0, 0, 0.001, 0.003, 0.01]))
        assert len(running.scores(REQUEST)["scores"]) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_sends_no_more_is_answered(models: dict[str, Path], count: int) -> None:
    body = json.dumps(REQUEST).encode()
    with Running(models["din"]) as running, socket.create_connection(("127.0.0.1", running.port)) as one:
        one.sendall((HEAD % len(body) + body) * count)
        one.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: one.recv(10_000), b""))
        assert answer.count(b"HTTP/1.1 200 OK") == count


def test_an_answer_to_a_closed_connection_is_dropped() -> None:
    async def write() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
            answer = _Answer(transport)
            answer.write(b"head ")
            answer.write(b"body")
            assert theirs.recv(100) == b"head body"
            transport.abort()
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError):
                transport.write(b"x")
            answer.write(b"head ")
            answer.write(b"body")

    uvloop.run(write())


def test_a_token_is_asked_for_but_for_health(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    with Running(models["din"], "--host", "0.0.0.0", "--token-file", tmp_path / "token") as running:
        for path in ("/metrics", "/docs", "/openapi.json", "/nothing"):
            assert running.ask("GET", path)[0] == 401
        for given in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer t\xf6ken"):
            status, answer, headers = running.ask("POST", "/score", REQUEST, {"Authorization": given})
            assert status == 401
            assert headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in json.dumps(answer)
        assert running.ask("GET", "/health")[:2] == (200, {"status": "ok"})
        assert running.ask("GET", "/ready", headers={"Host": "shop.example"})[0] == 200
        running.token = TOKEN
        assert running.ask("GET", "/docs")[0] == 200
        running.scores(REQUEST)
        assert running.ask("POST", "/reload")[1]["changed"] is False


def test_without_a_token_only_this_machine_may_ask(models: dict[str, Path]) -> None:
    with Running(models["din"]) as running:
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "8.8.8.8",
            "[2001:db8::1]:80",
            "",
        ):
            status, answer, _ = running.ask("GET", "/health", headers={"Host": host})
            assert (status, "without a token" in answer["error"]) == (403, True), host
        for host in ("localhost", f"localhost:{running.port}", "127.0.0.1", "127.8.8.8:1", "[::1]:80"):
            assert running.ask("GET", "/health", headers={"Host": host})[0] == 200, host
        status, answer, _ = running.ask("POST", "/reload")
        assert status == 403
        assert "token" in answer["error"]


@pytest.mark.parametrize(
    ("words", "token", "error"),
    [
        (
            ["--host", "0.0.0.0"],
            None,
            "--host 0.0.0.0 can be reached from other machines, so callers have to know a token",
        ),
        (["--host", "::"], None, "--host :: can be reached from other machines"),
        (["--host", "no such host"], None, "--host 'no such host' is no address of this machine"),
        (["--host", "192.0.2.1"], TOKEN, "cannot listen at 192.0.2.1"),
        ([], "short", "the token in CTRKIT_TOKEN has to be one word of 16 or more letters and digits"),
        ([], "two words are no token", "the token in CTRKIT_TOKEN has to be one word"),
        (["--token-file", "nothing"], None, "--token-file nothing cannot be read: "),
    ],
)
def test_what_is_refused_before_anything_is_served(
    words: list[str], token: str | None, error: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTRKIT_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("CTRKIT_TOKEN", token)
    result = ctrkit("serve", models["din"], "--port", "0", *words)
    assert result.exit_code == 2, result.output
    assert f"Error: {error}" in result.output


def test_a_taken_port_and_what_is_no_model(models: dict[str, Path], tiny_run: TinyRun, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ctrkit("serve", models["din"], "--port", port)
        assert (
            result.exit_code,
            f"cannot listen at 127.0.0.1, port {port}: Address already in use" in result.output,
        ) == (2, True)
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "ctrkit", "serve", "--port", "0", "--workers", workers]
        for folder, error in ((tmp_path / "nothing", "is no folder"), (tiny_run.groups, "is not an exported model")):
            done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
            assert done.stderr.startswith(f"Error: {folder}")
            assert error in done.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client", "uvloop", "httptools"])
def test_a_missing_package_says_how_to_install_it(package: str, models: dict[str, Path]) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from ctrkit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "serve", models["din"]], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"Error: serve needs {package}; install it with: pip install 'ctrkit[serve]'\n"
