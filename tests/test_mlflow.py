"""Records at MLflow: what is in a local store afterwards, and servers that are no help."""

import http.server
import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctrkit import mlflow_records
from tests.shop import ctrkit
from tests.tiny_run import TinyRun
from tests.tiny_world import Run

# MLflow's own way with SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
WORDS = ["--set", "train.epochs=3", "--set", "train.log_every=2"]


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    """Return the runs of an experiment, the first one first."""
    store = client(uri)
    found = store.get_experiment_by_name(experiment)
    return sorted(store.search_runs([found.experiment_id]), key=lambda run: int(run.info.start_time))


def history(uri: str, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, metric)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def plain(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was recorded nowhere."""
    return tiny_run.train(tmp_path_factory.mktemp("plain") / "model", *WORDS)


def test_a_training_and_its_evaluation(tiny_run: TinyRun, plain: Path, tmp_path: Path) -> None:
    uri, folder = f"sqlite:///{tmp_path}/store/mlflow.db", tmp_path / "sum"
    (tmp_path / "store").mkdir()
    model = tiny_run.train(folder / "model", *WORDS, "--mlflow", uri)
    assert contents(model) == contents(plain)
    [run] = runs(uri, tiny_run.folder.name)
    assert (run.info.run_name, run.info.status) == ("sum", "FINISHED")
    records = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    judged = [(r["step"], r["valid_gauc"]) for r in records if "valid_gauc" in r]
    assert len(judged) == 3
    assert history(uri, run, "valid/gauc") == judged
    assert sorted(history(uri, run, "train/loss")) == sorted((r["step"], r["loss"]) for r in records)
    assert run.data.params["train.extractor"] == "[16, 6]"
    assert run.data.params["train.epochs"] == "3"
    assert run.data.params["select-clicks.max_behaviours"] == "10"
    kept = client(uri).download_artifacts(run.info.run_id, "model", str(tmp_path))
    assert contents(Path(kept)) == contents(model)
    assert run.info.artifact_uri.startswith((tmp_path / "store").as_uri())
    tiny_run.must("predict", *tiny_run.reads(), *WORDS, "--model", model, "--out", folder / "predictions.parquet")
    metrics = tmp_path / "metrics.json"
    result = ctrkit(
        *("eval", folder / "predictions.parquet", "--recipe", tiny_run.recipe, "--bootstrap", "0"),
        *("--json", metrics, "--mlflow", uri),
    )
    assert result.exit_code == 0, result.output
    [run] = runs(uri, tiny_run.folder.name)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/gauc"] == json.loads(metrics.read_text())["variants"]["sum"]["all"]["gauc"]
    # Of predictions without a model beside them, a run of their own.
    shutil.copy(folder / "predictions.parquet", tmp_path / "other.parquet")
    assert ctrkit("eval", tmp_path / "other.parquet", "--bootstrap", "0", "--mlflow", uri).exit_code == 0
    [other] = runs(uri, "eval")
    assert other.info.run_name == "other"
    assert other.data.metrics["eval/gauc"] == run.data.metrics["eval/gauc"]


def test_a_training_that_fails(tiny_run: TinyRun, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["--set", "train.learning_rate=1e29", "--mlflow", uri, "--out", tmp_path / "model"]
    assert tiny_run.call("train", *tiny_run.reads(), *words).exit_code == 1
    [run] = runs(uri, tiny_run.folder.name)
    assert run.info.status == "FAILED"


def test_a_study(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder)
    uri = "sqlite:///mlflow.db"
    space = ["--set", 'tune.space."train.pooling"=["attentive", "sum"]', "--trials", "3"]
    assert ctrkit("tune", "tiny.toml", *space, "--mlflow", uri).exit_code == 0
    parent, *trials = runs(uri, "tiny")
    assert (parent.info.run_name, parent.info.status) == ("tune", "FINISHED")
    assert parent.data.params["space.train.pooling"] == '["attentive", "sum"]'
    assert {t.data.tags["mlflow.parentRunId"] for t in trials} == {parent.info.run_id}
    # A trial with an earlier one's values is not trained.
    assert [t.data.params for t in trials] == [{"train.pooling": t.data.params["train.pooling"]} for t in trials]
    assert {t.data.params["train.pooling"] for t in trials} == {"attentive", "sum"}
    assert parent.data.metrics["valid_gauc"] == max(t.data.metrics["valid_gauc"] for t in trials)
    names = {a.path for a in client(uri).list_artifacts(parent.info.run_id)}
    assert {"trials.csv", "best.toml", "history.png", "model"} <= names
    assert (run.folder / "mlartifacts").is_dir()
    assert not (run.folder / "mlruns").exists()


def test_a_run_hands_the_uri_on(run: Run) -> None:
    """To the stages that record; and what was made without it is as good as ever."""
    lines = run.make("-n", "MLFLOW=sqlite:///mlflow.db", "SET=train.epochs=2").splitlines()
    stages = {
        line.split(f" {run.python[-1]} ")[1].split()[0] for line in lines if "--mlflow sqlite:///mlflow.db" in line
    }
    assert stages == {"train", "eval", "report"}
    run.make("MLFLOW=sqlite:///mlflow.db", "SET=report.title=Shop")
    uri = f"sqlite:///{run.folder}/mlflow.db"
    [recorded] = runs(uri, "tiny")
    assert (recorded.info.run_name, recorded.info.status) == ("report", "FINISHED")
    names = {a.path for a in client(uri).list_artifacts(recorded.info.run_id)}
    assert names == {"report.html", "report-figures", "metrics.json"}


class Silent:
    """A server that takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self.taken.append(self._socket.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        for one in (self._socket, *self.taken):
            one.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


def test_a_server_that_is_not_there(tiny_run: TinyRun, plain: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    board = tmp_path / "board"
    words = ["--out", tmp_path / "model", "--mlflow", uri, "--tensorboard", board]
    result = tiny_run.must("train", *tiny_run.reads(), *WORDS, *words)
    assert contents(tmp_path / "model") == contents(plain)
    assert any(board.iterdir())
    assert result.output.count(f"MLflow at {uri} does not take the records") == 1
    assert result.output.count("is not complete") == 1


def test_a_server_that_does_not_answer(
    tiny_run: TinyRun, plain: Path, silent: Silent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    words = ["--out", tmp_path / "model", "--mlflow", silent.uri]
    result = tiny_run.must("train", *tiny_run.reads(), *WORDS, *words)
    assert contents(tmp_path / "model") == contents(plain)
    assert result.output.count("does not take the records") == 1
    assert len(silent.taken) <= 2 * 2  # one try at the beginning and one at the end, each made twice


def test_what_waits_is_sent_when_the_server_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store whose file cannot be written to for a while."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    store = mlflow_records.Store(uri, "x", "train")
    run = mlflow_records.Run(store, "r", {"a": 1})
    record = {"loss": 0.5, "learning_rate": 0.1, "epoch": 1, "samples": 10, "valid_loss": 0.4, "valid_gauc": 0.6}
    run.watch({**record, "step": 1})
    log_batch = store.client.log_batch

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no answer")

    monkeypatch.setattr(store.client, "log_batch", broken)
    run.watch({**record, "step": 2})
    assert store.rests
    monkeypatch.setattr(store.client, "log_batch", log_batch)
    run.watch({**record, "step": 3})  # too early to try again
    assert [step for step, _ in history(uri, runs(uri, "x")[0], "valid/gauc")] == [1]
    assert run.end()
    assert [step for step, _ in history(uri, runs(uri, "x")[0], "valid/gauc")] == [1, 2, 3]


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers that one may not."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"who are you?")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_refuses(tiny_run: TinyRun, tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:secret@127.0.0.1:{server.server_port}"
        result = tiny_run.call("train", *tiny_run.reads(), "--out", tmp_path / "model", "--mlflow", uri)
        server.shutdown()
    assert result.exit_code == 1
    assert "401" in result.output
    assert "secret" not in result.output
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("mlruns", "no longer keeps its records in plain folders. Give a file of SQLite, such as sqlite:///mlflow.db"),
        ("file:///tmp/mlruns", "no longer keeps its records in plain folders"),
        ("nothing://there", "unsupported URI 'nothing://there'"),
    ],
)
def test_stores_that_cannot_be(tiny_run: TinyRun, tmp_path: Path, uri: str, error: str) -> None:
    result = tiny_run.call("train", *tiny_run.reads(), "--out", tmp_path / "model", "--mlflow", uri)
    assert result.exit_code == 2, result.output
    assert error in result.output
    assert not (tmp_path / "model").exists()


def test_without_mlflow(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    result = tiny_run.call("train", *tiny_run.reads(), "--out", tmp_path / "model", "--mlflow", "sqlite:///x.db")
    assert result.exit_code == 2
    assert "--mlflow needs MLflow, which is not installed: pip install 'ctrkit[mlflow]'" in result.output
