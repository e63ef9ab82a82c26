"""train.compile with a compiler and without one: the same training, to rounding and to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctrkit import compiling
from tests.tiny_run import TinyRun

FALLS_BACK = "nothing is compiled, and training is as without train.compile"


def train(tiny_run: TinyRun, out: Path, *words: str, **environment: str) -> str:
    """Train logistic regression in a process of its own; return what it said."""
    command = [sys.executable, "-m", "ctrkit", "train", "--recipe", tiny_run.recipe, "--variant", "lr"]
    command += ["--groups", tiny_run.groups, "--out", out, "--set", "train.log_every=5", *words]
    env = {k: v for k, v in os.environ.items() if k != "CXX"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(out.with_name("cache")), "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment}
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


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_with_a_compiler(tiny_run: TinyRun, plain: Path, tmp_path: Path) -> None:
    said = train(tiny_run, tmp_path / "model", "--set", "train.compile=true")
    assert FALLS_BACK not in said
    assert list((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    assert losses(tmp_path / "model") == pytest.approx(losses(plain), rel=1e-5)


def test_the_compiler_is_not_imported_where_nothing_is_compiled(tiny_run: TinyRun, tmp_path: Path) -> None:
    """It would take 1.5 s of every start."""
    model = tmp_path / "model"
    train = ["--recipe", tiny_run.recipe, *tiny_run.reads(), "--out", model]
    predict = ["--recipe", tiny_run.recipe, *tiny_run.reads(), "--model", model, "--out", tmp_path / "scores.parquet"]
    calls = [["train", *map(str, train)], ["predict", *map(str, predict)]]
    code = "import sys\nfrom ctrkit.cli import main\n"
    code += f"for words in {calls!r}: main(words, standalone_mode=False)\n"
    code += "assert 'torch' in sys.modules\n"
    code += "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")


def test_adam_is_torchs_own_to_the_bit() -> None:
    found = []
    for kind in (torch.optim.Adam, compiling.Adam):
        rng = torch.Generator().manual_seed(1)
        weights = torch.nn.Parameter(torch.randn(20, 3, generator=rng))
        adam = kind([{"params": [weights], "weight_decay": 0.1}], lr=0.01, fused=True)
        for step in range(5):
            adam.zero_grad()
            (weights * torch.randn(20, 3, generator=rng)).square().sum().backward()
            adam.found_inf = torch.tensor(float(step == 2))
            adam.step()
        found.append([weights.detach(), *adam.state[weights].values()])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
