"""ctrkit score, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from ctrkit.stages.score import command

from ctrkit.cli import COMMANDS, main
from tests import requests_of
from tests.tiny_run import TinyRun

TWICE = b'{"ads":[{}],"ads":[{}]}'


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("model") / "model", "--variant", "din")


@pytest.fixture(scope="module")
def exported(tiny_run: TinyRun, model: Path) -> Path:
    return requests_of.export(tiny_run, model, model.parent / "exported")


def score(folder: Path, lines: list[Any], *words: str) -> Result:
    """Run the command on lines: bytes as they are, other values as JSON."""
    data = b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    return CliRunner().invoke(main, ["score", "--model", str(folder), *words], input=data)


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["score"][1]


def test_an_answer_a_line_in_order(tiny_run: TinyRun, model: Path, exported: Path, tmp_path: Path) -> None:
    words = ["--variant", "din", "--model", model, "--out", tmp_path / "p.parquet"]
    tiny_run.must("predict", *tiny_run.reads(), *words)
    expected = pl.read_parquet(tmp_path / "p.parquet")["score"].to_numpy()
    result = score(exported, [r for _, r in requests_of.samples(tiny_run.groups, tiny_run.convert)])
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.output.splitlines()]
    np.testing.assert_allclose([a["scores"] for a in answers], expected[:, None], atol=1e-5)
    assert {key for a in answers for key in a} == {"scores", "unknown"}


def test_lines_that_are_no_requests(exported: Path) -> None:
    """Each is answered in its place by what is wrong and which line it is; exit code 1 after the last."""
    good = {"ads": [{"ad_id": "a1"}, {}]}
    result = score(exported, [good, b"{", {"ads": []}, TWICE, b"\xff\xfe", {**good, "time": 3}, good])
    assert result.exit_code == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert answers[0] == answers[6]
    assert len(answers[0]["scores"]) == 2
    assert [a.get("line") for a in answers] == [None, 2, 3, 4, 5, 6, None]
    assert answers[1]["error"] == "the request: invalid JSON: EOF while parsing an object at column 1"
    assert answers[2]["error"].startswith("ads: list should have at least 1 item")
    assert answers[3]["error"] == "the request: an object has the key 'ads' twice: leave one of them out"
    assert answers[5]["error"] == "time: there is no such field in this model's requests"
    assert "score: 5 lines were no requests; each is answered by what is wrong with it" in result.stderr
    assert "Traceback" not in result.output


def test_blank_lines_and_a_byte_order_mark_are_no_matter(exported: Path) -> None:
    """Blank lines count as lines, though."""
    good = b'{"ads":[{"ad_id":"a1"}]}'
    expected = score(exported, [good]).stdout
    result = score(exported, [b"\xef\xbb\xbf" + good, b"", b" \t\r", good + b"\r", b""])
    assert (result.exit_code, result.stdout, result.stderr) == (0, 2 * expected, "")
    assert (score(exported, [b"\xef\xbb\xbf", b""]).output, score(exported, [b""]).exit_code) == ("", 0)
    result = score(exported, [b"", b"", b"{", b"", b"\xef\xbb\xbf" + good])
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [3, 5]


@pytest.mark.parametrize("package", ["msgspec", "starlette", "uvicorn", "prometheus_client"])
def test_nothing_of_the_service_is_needed(package: str, exported: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from ctrkit.cli import main; main()"
    command = [sys.executable, "-c", code, "score", "--model", exported]
    done = subprocess.run(command, input=b'{"ads":[{}]}\n' + TWICE, capture_output=True)
    assert (done.returncode, [list(json.loads(line)) for line in done.stdout.splitlines()]) == (
        1,
        [["scores", "unknown"], ["error", "line"]],
    )


def test_a_full_disk_and_a_closed_pipe(exported: Path) -> None:
    command = [sys.executable, "-m", "ctrkit", "score", "--model", exported]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, input=b'{"ads":[{}]}\n' * 3, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"Error: cannot write to standard output: the disk is full\n")
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, input=b'{"ads":[{}]}\n' * 3, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, b"")


def test_attention(tiny_run: TinyRun, exported: Path) -> None:
    request = next(r for _, r in requests_of.samples(tiny_run.groups, tiny_run.convert) if len(r["behaviours"]) == 3)
    [answer] = [json.loads(line) for line in score(exported, [request], "--attention").output.splitlines()]
    np.testing.assert_allclose(np.sum(answer["attention"], 1), 1.0, atol=1e-5)
    assert np.shape(answer["attention"]) == (1, 3)


def test_no_lines_and_no_model(exported: Path, model: Path) -> None:
    assert (score(exported, []).exit_code, score(exported, []).output) == (0, "")
    result = score(model, [])
    assert result.exit_code == 1
    assert "is not an exported model: settings.json names no format (a model of `ctrkit train`, perhaps)" in " ".join(
        result.output.split()
    )
