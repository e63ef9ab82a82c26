"""The service's answers: its own OpenAPI page by schemathesis, hostile and huge inputs, limits."""

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import TOKEN, Running, exported
from tests.tiny_run import TinyRun

LIMITS = ["--max-request-mb", 0.05, "--max-ads", 5, "--max-behaviours", 20, "--max-at-once", 2, "--timeout", 1]
ADS = [{"ad_id": "a1"}, {}]


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_run, tmp_path_factory.mktemp("dicm"))


@pytest.fixture(scope="module")
def service(model: Path, tiny_run: TinyRun) -> Iterator[Running]:
    """A service with small limits. That it ends well, and has logged no traceback, is tested when it is stopped."""
    with Running(model, *LIMITS, "--features", tiny_run.features, token=TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def api(service: Running) -> Any:
    description = service.ask("GET", "/openapi.json")[1]
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=service.url, headers={"Authorization": f"Bearer {TOKEN}"})
    return schema


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=str)
def test_whatever_the_openapi_page_speaks_of_is_answered_as_it_says(mode: GenerationMode, api: Any) -> None:
    """What it allows, and what it does not, by each path and method."""
    asked = set()
    for result in api.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=25 if mode is GenerationMode.POSITIVE else 75,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def answered(case: schemathesis.Case) -> None:
            response = case.call(session=session)
            asked.add((case.operation.label, response.status_code))
            assert response.status_code < 500, response.text
            case.validate_response(
                response, checks=[content_type_conformance, response_schema_conformance, status_code_conformance]
            )

        try:
            with requests.Session() as session:
                answered()
        except hypothesis.errors.Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a path that takes nothing cannot be given what it does not take
    assert ("POST /score", 200 if mode is GenerationMode.POSITIVE else 422) in asked
    assert mode is GenerationMode.NEGATIVE or {("GET /health", 200), ("POST /reload", 200)} <= asked


def refused(running: Running, body: bytes, status: int, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the JSON of an answer that must refuse a body."""
    got, answer, _ = running.ask("POST", "/score", body, headers)
    assert got == status, (got, answer)
    assert isinstance(answer, dict)
    assert set(answer) <= {"error", "details"}
    assert "Traceback" not in json.dumps(answer)
    return answer


DEEP = b'{"ads":' + b"[" * 20_000
NO_JSON = [
    (b"{", "EOF while parsing an object"),
    (b'{"ads":[{}]}}', "trailing characters"),
    (b"\x00\x01\x02", "expected value"),
    (b'{"ads":[{"ad_id":"\xff\xfe"}]}', "invalid unicode code point"),
    (b'{"ads":[{"ad_id":"\\ud800"}]}', "unexpected end of hex escape"),
    (b'{"ads":[{"ad_id":"a\nb"}]}', "control character"),
    (DEEP, "recursion limit exceeded"),
    (b'{"a":' * 5000, "recursion limit exceeded"),
    (b'{"ads":[{"ad_id":' + b"1" * 5000 + b"}]}", "number out of range"),
    (b"\xef\xbb\xbf{}", "expected value"),
    (json.dumps({"ads": ADS}).encode("utf-16"), "expected value"),
]


@pytest.mark.parametrize(("body", "error"), NO_JSON)
def test_what_is_no_json_is_told_with_its_place(body: bytes, error: str, service: Running) -> None:
    answer = refused(service, body, 400)["error"]
    assert answer.startswith("the body is no valid JSON: ")
    assert error in answer
    assert "line 1 column" in answer or "line 2 column" in answer


OTHERS: list[tuple[Any, str, str]] = [
    ([], "the whole body", "input should be an object"),
    ({}, "ads", "field required"),
    ({"ads": []}, "ads", "list should have at least 1 item"),
    ({"ads": [{}] * 6}, "ads", "list should have at most 5 items"),
    ({"ads": ADS, "behaviours": [{}] * 21}, "behaviours", "list should have at most 20 items"),
    ({"ads": ADS, "usr": {}}, "usr", "no such field"),
    ({"ads": [{}, {"adid": 1}]}, "ads[1].adid", "there is no such field"),
    ({"ads": [{}, 7]}, "ads[1]", "input should be an object"),
    ({"ads": [{}, {"ad_id": {"x": 1}}]}, "ads[1].ad_id", "has to be text, a number"),
    ({"ads": [{"ad_id": "x" * 3000}]}, "ads[0].ad_id", "at most 2000 characters"),
    ({"ads": ADS, "user": []}, "user", "input should be an object"),
    ({"ads": [{"ad_image": [1.0, 2.0]}]}, "ads[0].ad_image", "at least 512 items"),
    ({"ads": [{"ad_image": [1e30] * 512}]}, "ads[0].ad_image", "less than or equal to 65504"),
    ({"ads": [{"ad_image": ["1"] * 512}]}, "ads[0].ad_image", "picture's name, a list of 512 numbers"),
    ({"ads": [{"ad_image": [True] * 512}]}, "ads[0].ad_image", "picture's name, a list of 512 numbers"),
    ({"ads": [{"ad_image": [float("nan")] * 512}]}, "ads[0].ad_image", "picture's name, a list of 512 numbers"),
    ({"ads": [{"ad_id": float("nan")}]}, "ads[0].ad_id", "has to be text, a number"),
    ({"ads": [{"ad_id": float("-inf")}]}, "ads[0].ad_id", "has to be text, a number"),
]


@pytest.mark.parametrize(("request_", "where", "what"), OTHERS)
def test_what_the_model_does_not_take_is_told_with_its_place(
    request_: Any, where: str, what: str, service: Running
) -> None:
    details = refused(service, json.dumps(request_).encode(), 422)["details"]
    assert details[0]["where"] == where
    assert what in details[0]["what"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"ads":[{"ad_id":"a","ad_id":"b"}]}',
        b'{"ads":[{}],"user":{},"ads":[{}]}',
        b'{"ads":[{"ad_id":"a"}],"user":{"gender" : 1,"gender":1}}',
        b'{"ads":[{"ad_id":":"},{"ad_id" :1, "ad_id": ":::"}]}',
        b'{"ads":[{"ad_\\u0069d":"a","ad_id":"b"}]}',
    ],
)
def test_a_key_twice_is_refused(body: bytes, service: Running) -> None:
    assert "twice" in refused(service, body, 400)["error"]


def test_colons_in_texts_are_no_keys(service: Running) -> None:
    service.scores({"ads": [{"ad_id": 'a:b":"c'}, {"ad_id": "http://x/:"}]})


def test_hundreds_of_faults_are_counted_and_some_are_listed(service: Running) -> None:
    answer = refused(service, json.dumps({"ads": [{f"x{i}": 1 for i in range(300)}]}).encode(), 422)
    assert "300 faults" in answer["error"]
    assert len(answer["details"]) == 20


def test_thousands_of_faults_are_counted(service: Running) -> None:
    answer = refused(service, json.dumps({"ads": ADS, "behaviours": [{"image": [{}] * 512}] * 20}).encode(), 422)
    count = re.search(r"([\d,]+) faults", answer["error"])
    assert count is not None
    assert int(count[1].replace(",", "")) >= 20 * 512
    assert "details" not in answer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "br, gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8", "Content-Encoding": "identity"}, 200),
        ({"Content-Type": "Application/JSON"}, 200),
    ],
)
def test_only_plain_json_is_read(headers: dict[str, str], status: int, service: Running) -> None:
    assert service.ask("POST", "/score", {"ads": ADS}, headers)[0] == status


def test_empty_and_long_bodies(service: Running) -> None:
    assert "is empty" in refused(service, b"", 400)["error"]
    limit = int(0.05 * 2**20)
    long = b'{"ads":[{}]}'.ljust(limit)
    assert service.ask("POST", "/score", long)[0] == 200
    assert f"longer than {limit:,} bytes" in refused(service, long + b" ", 413)["error"]
    connection = service.connected()  # its end is not announced
    heads = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    connection.request("POST", "/score", iter([b" " * 4096] * 100), heads, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    answer.read()
    connection.close()


def test_ways_methods_and_queries(service: Running) -> None:
    assert service.ask("GET", "/nothing")[:2] == (404, {"error": "there is no /nothing; /docs lists what there is"})
    status, answer, headers = service.ask("GET", "/score")
    assert (status, answer["error"], headers["Allow"]) == (405, "/score takes POST, not GET", "POST")
    assert service.ask("POST", "/health", {})[0] == 405
    for query in ("attention", "attention=1", "attention=true&attention=true", "x=1", "%00"):
        assert service.ask("POST", f"/score?{query}", {"ads": ADS})[0] == 400
    assert "attention" not in service.scores({"ads": ADS})
    answer = service.ask("POST", "/score?attention=true", {"ads": ADS, "behaviours": [{}, {"goods": "g1"}]})[1]
    assert [len(weights) for weights in answer["attention"]] == [2, 2]
    assert service.ask("POST", "/score/", {"ads": ADS})[0] == 404


def test_pictures_by_name_and_as_vectors_score_alike(service: Running, tiny_run: TinyRun) -> None:
    import h5py

    with h5py.File(tiny_run.features) as h5:
        names, rows = h5["image"].asstr()[:], h5["row"][:]
        name, vector = names[0], h5["features"][rows[0]].astype(float).tolist()
    request = {"ads": [{"ad_image": name}, {"ad_image": vector}, {"ad_image": None}], "behaviours": [{"image": name}]}
    by_name, as_vector, missing = service.scores(request)["scores"]
    assert by_name == pytest.approx(as_vector, abs=1e-6)
    assert abs(by_name - missing) > 1e-6


HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEAD += f"Authorization: Bearer {TOKEN}\r\n".encode()
BODY = b'{"ads":[{}]}'
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nContent-Length: 12\r\n\r\n"
RAW = {
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
    "negative length": (HEAD + b"Content-Length: -5\r\n\r\n" + BODY, b"400"),
    "two lengths": (HEAD + b"Content-Length: 12\r\nContent-Length: 13\r\n\r\n" + BODY, b"400"),
    "a length and chunks": (HEAD + b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    "huge length": (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", b"400"),
    "no chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    "nul": (b"GET /he\x00alth HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "connect": (b"CONNECT a.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
    "all headers": (HEAD + b"X: y\r\n" * 40_000, b"431"),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nc\r\n" + BODY + b"\r\n0\r\n\r\n", b"200"),
    "another protocol is offered": (HEAD + UPGRADE + BODY, b"200"),
    "twice at once": ((HEAD + b"Content-Length: 12\r\n\r\n" + BODY) * 2, b"200"),
    "old": (b"GET /health HTTP/1.0\r\n\r\n", b"200"),
    "a wait for leave": (HEAD + b"Expect: 100-continue\r\nContent-Length: 12\r\n\r\n" + BODY, b"100"),
}


@pytest.mark.parametrize("name", RAW)
def test_odd_http_is_answered(name: str, service: Running) -> None:
    sent, status = RAW[name]
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as one:
        for start in range(0, len(sent), 8192):
            try:
                one.sendall(sent[start : start + 8192])
            except (BrokenPipeError, ConnectionResetError):
                break  # it has said no already
            time.sleep(0.005 if len(sent) > 8192 else 0)
        assert one.recv(4096).startswith(b"HTTP/1.1 " + status)
    assert service.ask("GET", "/health")[0] == 200


def test_a_request_that_does_not_go_on_is_ended(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as slow:
        slow.sendall(HEAD + b"Content-Length: 12\r\n\r\n" + BODY[:5])
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert (answer.status, b"the body did not arrive within 1 s" in answer.read()) == (408, True)
        answer.close()
    for begun in (b"", HEAD):
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as slow:
            slow.sendall(begun)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(4096) == b""


def status_of(one: socket.socket) -> int:
    """Return the status of the next answer, which must be one that can be read to its end."""
    answer = http.client.HTTPResponse(one)
    answer.begin()
    assert answer.read()
    answer.close()
    return answer.status


@pytest.mark.parametrize("piece", [1 << 20, 6000, 1000])
@pytest.mark.parametrize(
    ("length", "status"), [(32 << 10, 200), ((32 << 10) + 1, 431), (33_500, 431), (60_000, 431), (500_000, 431)]
)
def test_the_length_of_a_head_counts_however_it_arrives(piece: int, length: int, status: int, service: Running) -> None:
    """All is sent before the answer is read; what follows a refused head is no obstacle."""
    start = HEAD + b"Content-Length: 12\r\nX: "
    sent = start.ljust(length - 4, b"x") + b"\r\n\r\n" + BODY
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as one:
        for begin in range(0, len(sent), piece):
            one.sendall(sent[begin : begin + piece])
            if length < 100_000:
                time.sleep(0.001)
        assert status_of(one) == status
        if status == 431:
            assert one.recv(1) == b""


@pytest.mark.parametrize("piece", [1 << 20, 7000])
def test_the_length_of_a_head_is_that_of_one_request(piece: int, service: Running) -> None:
    """Of those that follow one another over a connection, bodies not counted either."""
    rest = b'{"ads":[{}]}'.ljust(40_000)
    head = (HEAD + b"Content-Length: 40000\r\nX: ").ljust(30_000, b"x") + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as one:
        for _ in range(3):
            sent = head + rest
            for begin in range(0, len(sent), piece):
                one.sendall(sent[begin : begin + piece])
                time.sleep(0.001)
            assert status_of(one) == 200


def test_the_answer_to_a_request_before_a_refused_one_is_the_last(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as one:
        one.sendall(HEAD + b"Content-Length: 12\r\n\r\n" + BODY + HEAD + b"X: ".ljust(40_000, b"x") + b"\r\n\r\n")
        answer = http.client.HTTPResponse(one)
        answer.begin()
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert "scores" in json.loads(answer.read())
        answer.close()
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(1) == b""


def test_more_than_so_many_at_once_are_told_to_come_again(service: Running) -> None:
    head = HEAD + b"Content-Length: 12\r\n\r\n"
    half = [socket.create_connection(("127.0.0.1", service.port), timeout=20) for _ in range(2)]
    for one in half:
        one.sendall(head + BODY[:5])
    while service.counted("ctrkit_open_requests") < 2:
        time.sleep(0.005)
    status, answer, headers = service.ask("POST", "/score", {"ads": ADS})
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "of at most 2" in answer["error"]
    assert service.ask("GET", "/ready")[0] == 200
    for one in half:
        one.sendall(BODY[5:])
        answer = http.client.HTTPResponse(one)
        answer.begin()
        assert answer.status == 200
        answer.close()
        one.close()
    service.scores({"ads": ADS})


def test_a_client_that_goes_away_is_counted(service: Running) -> None:
    gone = 'ctrkit_requests_total{path="/score",status="499"}'
    before = service.counted(gone)
    with socket.create_connection(("127.0.0.1", service.port)) as one:
        one.sendall(HEAD + b"Content-Length: 12\r\n\r\n" + BODY[:5])
        while service.counted("ctrkit_open_requests") < 1:
            time.sleep(0.005)
    while service.counted(gone) < before + 1:
        time.sleep(0.005)


def test_metrics_are_in_prometheus_own_form(service: Running) -> None:
    service.scores({"ads": ADS})
    families = {family.name: family for family in text_string_to_metric_families(service.ask("GET", "/metrics")[1])}
    model = service.ask("GET", "/ready")[1]["model"]
    (loaded,) = families["ctrkit_model_loaded_timestamp_seconds"].samples
    assert (loaded.labels, loaded.value <= time.time()) == ({"model": model}, True)
    assert {"ctrkit_requests", "ctrkit_score_seconds", "ctrkit_scored_ads", "process_resident_memory_bytes"} <= set(
        families
    )


def test_the_openapi_page_has_the_limits_and_the_features(service: Running) -> None:
    schemas = service.ask("GET", "/openapi.json")[1]["components"]["schemas"]
    request = schemas["Request"]["properties"]
    assert (request["ads"]["minItems"], request["ads"]["maxItems"]) == (1, 5)
    assert request["behaviours"]["maxItems"] == 20
    ad = schemas[request["ads"]["items"]["$ref"].rpartition("/")[2]]
    assert ad["additionalProperties"] is False
    assert {"ad_id", "ad_image", "position"} <= ad["properties"].keys()


def test_the_page_shows_everything_and_loads_nothing(service: Running) -> None:
    page = service.ask("GET", "/docs")[1]
    for path in service.ask("GET", "/openapi.json")[1]["paths"]:
        assert path in page
    for name in ("ad_id", "gender", "image", "scene"):
        assert name in page
    assert not [word for word in ("<script", "http://", "https://", "src=", "@import", "url(") if word in page]
