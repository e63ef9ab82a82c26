"""ctrkit predict by several ranks that torchrun, the launcher of `--nproc` or a person starts: real processes."""

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit import ranks
from ctrkit.errors import UsageError
from ctrkit.ranks import Ranks
from tests.stages.test_train_ranks import BOUND, end, ranks_of, start
from tests.tiny_run import TinyRun

SETS: list[object] = ["--set", "train.user_ids=true"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("model") / "model", *SETS)


def words(tiny_run: TinyRun, model: Path, out: Path) -> list[object]:
    return ["predict", "--recipe", tiny_run.recipe, *tiny_run.reads(), "--model", model, *SETS, "--out", out]


def torchrun(line: list[object]) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "-m", "ctrkit", *map(str, line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_under_torchrun_scores_are_those_of_one_process(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    """Batches of five samples for three ranks: a user and day has more, so some rank has none."""
    tiny_run.must("predict", *tiny_run.reads(), "--model", model, *SETS, "--out", tmp_path / "one.parquet")
    done = torchrun([*words(tiny_run, model, tmp_path / "three.parquet"), "--set", "predict.batch=5"])
    assert done.returncode == 0, done.stderr
    one, three = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("one", "three"))
    assert done.stderr.count(f"predict: {one.height} impressions -> ") == 1
    assert three.drop("score").equals(one.drop("score"))
    assert one["score"].n_unique() > 50
    np.testing.assert_allclose(three["score"], one["score"], rtol=2e-6)


@pytest.mark.long
def test_under_torchrun_a_mistake_is_told_once(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    done = torchrun([*words(tiny_run, model, tmp_path / "out.parquet"), "--set", "train.user_ids=false"])
    assert done.returncode == 1
    assert done.stderr.count("Error: ") - done.stderr.count("ChildFailedError: ") == 1
    assert f"Error: {model} was not trained as the recipe says: with train.user_ids = true, not false" in done.stderr
    assert list(tmp_path.iterdir()) in ([], [tmp_path / ".out.parquet.lock"])


def test_a_rank_that_is_killed_before_the_others_have_met_it_ends_all(
    tiny_run: TinyRun, model: Path, tmp_path: Path
) -> None:
    launcher = start(*words(tiny_run, model, tmp_path / "out.parquet"), "--nproc", 2)
    while len(found := ranks_of(launcher)) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    os.kill(found[1], signal.SIGKILL)
    moment = time.monotonic()
    code, told = end(launcher)
    assert time.monotonic() - moment < BOUND
    assert code == 1
    assert "Error: rank 1 of 2 was killed (SIGKILL" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out.parquet").exists()


def test_a_rank_that_nobody_answers_can_be_stopped(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as first:  # which takes the call and says nothing
        first.settimeout(60)
        rank = subprocess.Popen(
            [sys.executable, "-m", "ctrkit", *map(str, words(tiny_run, model, tmp_path / "out.parquet"))],
            env={**os.environ, **alone, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            with first.accept()[0]:
                rank.terminate()
                rank.communicate(timeout=10)
        finally:
            rank.kill()
    assert rank.returncode == -signal.SIGTERM


def test_a_rank_that_finds_nobody_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(ranks, "JOINING", datetime.timedelta(seconds=1))
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    told = rf"rank 1 of 2 cannot reach the others at .* 127\.0\.0\.1:{port}: "
    with pytest.raises(UsageError, match=told), Ranks.of_environment().joined():
        raise AssertionError
    monkeypatch.setenv("MASTER_PORT", "here")
    told = r"127\.0\.0\.1:here: .*Start all of them with torchrun"
    with pytest.raises(UsageError, match=told), Ranks.of_environment().joined():
        raise AssertionError


def test_a_rank_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("2", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UsageError, match=f"RANK = {rank} and WORLD_SIZE = 2 in the environment do not fit"):
            Ranks.of_environment()
