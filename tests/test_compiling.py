"""train.compile with a compiler and without one: the same training, to rounding and to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import TinyRun

FALLS_BACK = "nothing is compiled, and training is as without train.compile"


def train(tiny_run: TinyRun, out: Path, *words: str, **environment: str) -> str:
    """Train logistic regression in a process of its own; return what it said."""
    command = [sys.executable, "-m", "ctrkit", "train", "--recipe", tiny_run.recipe, "--variant", "lr"]
    command += ["--groups", tiny_run.groups, "--out", out, "--set", "train.log_every=5", *words]
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(out.with_name("cache")), **environment}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(model: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (model / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "model"
    tiny_run.must("train", "--variant", "lr", "--groups", tiny_run.groups, "--out", out, "--set", "train.log_every=5")
    return out


def test_without_a_compiler(tiny_run: TinyRun, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = train(tiny_run, tmp_path / "model", "--set", "train.compile=true", PATH=str(tmp_path / "empty"))
    (line,) = [line for line in said.splitlines() if FALLS_BACK in line]
    assert "No working C++ compiler" in line
    assert "Traceback" not in said
    for file in ("model.pt", "metrics.jsonl"):
        assert (tmp_path / "model" / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_a_compiler(tiny_run: TinyRun, plain: Path, tmp_path: Path) -> None:
    said = train(tiny_run, tmp_path / "model", "--set", "train.compile=true")
    assert FALLS_BACK not in said
    assert list((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    assert losses(tmp_path / "model") == pytest.approx(losses(plain), rel=1e-5)
