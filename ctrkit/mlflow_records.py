"""Records of trainings, studies and evaluations at MLflow, where `--mlflow URI` asks for them.

A side output, as TensorBoard is: mistakes in the URI are told before the work begins, but a server that does not answer
stops nothing. It is told once; what could not be sent waits and is tried again, no sooner than `AGAIN_SECONDS` later
and a last time at the end. Each try waits some seconds at most. All of it is in metrics.jsonl and TensorBoard anyway.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ctrkit import __version__
from ctrkit.errors import UsageError, UserError
from ctrkit.progress import say
from ctrkit.recipe import Recipe

AGAIN_SECONDS = 60.0
"""After a failure, before the next try."""
OFTEN_SECONDS = 2.0
"""Between two sendings."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own variables and what they are here unless they are set: its own would wait for many minutes."""
MOST_METRICS, MOST_PARAMS, MOST_TEXT = 1000, 100, 6000
"""Of one call of MLflow's, and characters of a parameter's value."""
STATES = ("FINISHED", "FAILED", "KILLED")
TABLES = ("split", "select-clicks", "extract-images", "train")
"""Of the recipe, that are parameters."""


class Store:
    """A tracking store: sqlite:///FILE, or http(s)://SERVER.

    Parameters
    ----------
    uri: as MLflow takes it.
    experiment: what the runs are put into; made if it is not there.
    who: begins the messages.

    Raises UsageError where MLflow is not installed or cannot work with the URI, UserError where a store is there and
    refuses.
    """

    def __init__(self, uri: str, experiment: str, who: str) -> None:
        self.uri, self.experiment, self.who = uri, experiment, who
        self.shown = _without_password(uri)
        self._client: Any = _client(uri)
        self._experiment_id: str | None = None
        self._not_before = 0.0
        self._told = False
        try:
            self.experiment_id()
        except Exception as e:
            if not _no_answer(uri, e):
                raise UserError(f"--mlflow {self.shown}: {_first_line(e)}") from None
            self._failed(e)

    def experiment_id(self) -> str:
        """Return the experiment's id."""
        if self._experiment_id is None:
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                try:
                    self._experiment_id = self._client.create_experiment(
                        self.experiment, artifact_location=_artefacts_of(self.uri, self.experiment)
                    )
                except Exception:  # perhaps another process has just made it
                    found = self._client.get_experiment_by_name(self.experiment)
                    if found is None:
                        raise
            if found is not None:
                self._experiment_id = found.experiment_id
        assert self._experiment_id is not None
        return self._experiment_id

    @property
    def client(self) -> Any:
        """MLflow's own."""
        return self._client

    def known(self, run_id: str | None) -> str | None:
        """Return the id of a run if the store has it, else None."""
        if run_id is not None and not self.rests:
            with contextlib.suppress(Exception):  # another store's
                found: str = self._client.get_run(run_id).info.run_id
                return found
        return None

    @property
    def rests(self) -> bool:
        """Whether it is too early for the next try."""
        return time.monotonic() < self._not_before

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Within the block an error of the store's is told, once, and ends the block only."""
        try:
            yield
        except Exception as e:
            self._failed(e)
        else:
            self._not_before = 0.0

    def _failed(self, error: Exception) -> None:
        self._not_before = time.monotonic() + AGAIN_SECONDS
        if not self._told:
            say(
                f"warning: {self.who}: MLflow at {self.shown} does not take the records: {_first_line(error)}. The "
                f"work goes on; what is missing is sent again, once in {AGAIN_SECONDS:.0f} s at most and at the end"
            )
        self._told = True


class Run:
    """One run of MLflow's, begun with the first thing that can be sent. Use as a context manager, or call `end`.

    Parameters
    ----------
    name, params, tags: of the run.
    parent: id of the run that it belongs to.
    run_id: of a run that is there already.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self.store, self.name, self.run_id = store, name, run_id
        self._params = [] if run_id else [(key, _as_text(value)) for key, value in params.items()]
        self._tags = {"ctrkit.version": __version__, **(tags or {})}
        if parent:
            self._tags["mlflow.parentRunId"] = parent
        self._pending: list[Any] = []
        self._sent = 0.0
        self.ended = False

    def __enter__(self) -> "Run":
        if not self.store.rests:
            self._send()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        if not self.ended:
            self.end("FAILED" if kind else "FINISHED")

    def watch(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl; see `ctrkit.watching`."""
        values = {"train/loss": record["loss"], "train/learning_rate": record["learning_rate"]}
        values |= {"train/epoch": record["epoch"], "train/samples": record["samples"]}
        judged = "valid_gauc" in record
        if judged:
            values |= {"valid/loss": record["valid_loss"], "valid/gauc": record["valid_gauc"]}
        self.add(values, record["step"])
        if not self.store.rests and (judged or time.monotonic() - self._sent >= OFTEN_SECONDS):
            self._send()

    def add(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Take points of metrics, to be sent with the next ones; None is no point."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]

    def end(self, state: str = "FINISHED", artefacts: Iterable[tuple[Path, str]] = ()) -> bool:
        """Send what is left, then files or folders (path, folder at MLflow; "" for none), and close the run as one of
        `STATES`; say whether all is there."""
        assert state in STATES
        self.ended = True
        whole = self._send()
        if whole:
            whole = False
            with self.store.trying():
                for path, folder in artefacts:
                    send = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
                    send(self.run_id, str(path), folder or None)
                self.store.client.set_terminated(self.run_id, state)
                whole = True
        if not whole:
            say(f"warning: {self.store.who}: the run {self.name!r} at MLflow ({self.store.shown}) is not complete")
        return whole

    def _send(self) -> bool:
        """Send what waits; say whether nothing is left."""
        from mlflow.entities import Param

        self._sent = time.monotonic()
        with self.store.trying():
            client = self.store.client
            if self.run_id is None:
                made = client.create_run(self.store.experiment_id(), run_name=self.name, tags=self._tags)
                self.run_id = made.info.run_id
            while self._params:
                some = [Param(key, value) for key, value in self._params[:MOST_PARAMS]]
                client.log_batch(self.run_id, params=some)
                del self._params[:MOST_PARAMS]
            while self._pending:
                client.log_batch(self.run_id, metrics=self._pending[:MOST_METRICS])
                del self._pending[:MOST_METRICS]
            return True
        return False


def params_of(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's settings that are parameters of its training, by `table.key`."""
    names = [name for name in TABLES if name != "extract-images" or recipe.train.looks_at_pictures]
    tables = recipe.tables(*names)
    return {f"{table}.{key}": value for table, keys in tables.items() for key, value in keys.items()}


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise UsageError("--mlflow needs MLflow, which is not installed: pip install 'ctrkit[mlflow]'") from None
    for name in ("mlflow", "alembic", "urllib3"):  # which tell what is told below
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return MlflowClient(tracking_uri=uri)
    except ImportError as e:
        raise UsageError(f"--mlflow {_without_password(uri)} needs another package: {_first_line(e)}") from None
    except Exception as e:
        if "MLFLOW_ALLOW_FILE_STORE" in str(e):
            raise UsageError(
                f"--mlflow {uri}: MLflow no longer keeps its records in plain folders. Give a file of SQLite, such as "
                "sqlite:///mlflow.db, or a server, http://…; or set MLFLOW_ALLOW_FILE_STORE=true to use the folder "
                "all the same"
            ) from None
        raise UsageError(f"--mlflow {_without_password(uri)}: {_first_line(e)}") from None


def _no_answer(uri: str, error: Exception) -> bool:
    """Say whether it is the server's fault, or the network's, that nothing was recorded; not the user's."""
    if not uri.startswith(("http://", "https://")):
        return False
    status = getattr(error, "get_http_status_code", lambda: 500)()
    refused = 400 <= status < 500 or any(f"error code {code}" in str(error) for code in range(400, 500))
    return not refused


def _artefacts_of(uri: str, experiment: str) -> str | None:
    """Return where the artefacts of a new experiment go: beside a file of SQLite; else MLflow knows."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / experiment).as_uri()


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "…@", 1) if "@" in parts.netloc else uri


def _as_text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:MOST_TEXT]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"://[^/@\s]*@", "://…@", lines[0])
    return text.partition(" (Caused by ")[0][:240].rstrip(".")
