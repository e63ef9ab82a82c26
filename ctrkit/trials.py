"""Works on a study's trials: makes their data steps, trains, tells the study the validation GAUC.

A trial goes through the recipe's own graph (`ctrkit.pipeline`), with its values as overrides: a step whose settings and
inputs are as another's is that one, and is made once. The training is the stage `train`, within this process, and the
study hears each validation. No trial predicts, and none reads the test days' samples.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ctrkit
from ctrkit import files, pipeline, provenance, search_space
from ctrkit.cli import main as ctrkit_command
from ctrkit.errors import Resumable, UserError
from ctrkit.pipeline import Graph, Step
from ctrkit.progress import say
from ctrkit.recipe import NOT_THE_MODEL, Recipe, load
from ctrkit.study import Begun, Row, Study, as_asked
from ctrkit.watching import Looking, Watch, nobody, several
from ctrkit.workers import die_with_parent

if TYPE_CHECKING:
    from ctrkit import mlflow_records

COMPARED = (*search_space.TUNABLE, "split", "convert")
"""Tables that decide what a trial's value is."""
ONE_PROCESS = "train.processes=1"
"""A trial's override: processes share trials, not one training."""
LOOK_SECONDS = 0.5
"""Between looks at whether other processes are done."""


@dataclass(frozen=True)
class Asked:
    """What the user asked of a study."""

    setting: pipeline.Setting
    variant: str | None
    trials: int
    timeout_minutes: float
    keep_models: bool
    mlflow: str | None


class Pruned(Exception):
    """Ends a training whose trial the study does not want to go on with."""


class Worker:
    """A process that works on a study's trials.

    Raises UsageError for a space that cannot be searched, UserError where the data steps fail or the folder holds
    another study.
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        setting = asked.setting
        self.dimensions, self.own = search_space.checked(setting.recipe, asked.variant, setting.sets)
        self.recipe = load(setting.recipe, asked.variant, setting.sets)
        self.store = _store(asked.mlflow, self.recipe)
        self.graph = Graph(setting)
        self.home = self.graph.study_home(asked.variant)
        self._until = time.monotonic() + 60 * asked.timeout_minutes if asked.timeout_minutes else float("inf")
        with environment(setting.out):
            steps = self.graph.tuned(asked.variant).data.values()
            for step in steps:
                if code := make(self.graph, step):
                    raise click.exceptions.Exit(code)
            data = {f"data {s.stage}": provenance.read_sidecar(s.output).get("content", "") for s in steps}
        parameters = {d.key: d.parameter(self.own[d.key]) for d in self.dimensions}
        self.outside = [key for key, parameter in parameters.items() if parameter is None]
        """Keys whose own value lies outside their range, so that no trial is the recipe as it stands."""
        self.study = Study(
            self.home, self.recipe.tune, self.dimensions, {**_asked(self.recipe), **data}, self._first(parameters)
        )
        self.parent: str | None = None
        if self.store is not None:
            self.parent = self.study.remember(f"mlflow {self.store.shown}", self._begin_parent)

    def _first(self, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if self.outside else dict(parameters)

    def _begin_parent(self) -> str | None:
        """Begin the run at MLflow that the trials' runs belong to; return its id, or None if it cannot be."""
        from ctrkit import mlflow_records

        assert self.store is not None
        params = {f"space.{key}": asked for key, asked in self.recipe.tune.space.items()}
        tags = {"ctrkit.stage": "tune", "ctrkit.output": str(self.home)}
        run = mlflow_records.Run(self.store, "tune", mlflow_records.params_of(self.recipe) | params, tags)
        run.__enter__()
        return run.run_id

    @property
    def late(self) -> bool:
        """Whether no trial may be begun any more."""
        return time.monotonic() >= self._until

    def work(self) -> None:
        """Work on trials until all are begun, or time is up."""
        with environment(self.asked.setting.out):
            while not self.late:
                with self.study.begin(self.asked.trials) as begun:
                    if begun is None:
                        return
                    self._work_on(begun)
                if not self.asked.keep_models:
                    self.study.tidy()
                gc.collect()

    def finish(self) -> None:
        """Work on trials until all are done, by other processes too, or time is up."""
        self.work()
        while not self.late and self.study.unfinished():
            time.sleep(LOOK_SECONDS)
            self.work()  # a process that was killed leaves its trial to be done
        self.study.interrupted()
        if not self.asked.keep_models:
            self._remove_data()

    def record_results(self, best: Row) -> None:
        """Record at MLflow what the study came to, where that is asked for."""
        if self.store is None:
            return
        from ctrkit import mlflow_records

        if self.parent is None:  # the server did not answer at first
            self.parent = self.study.remember(f"mlflow {self.store.shown}", self._begin_parent)
        record = mlflow_records.Run(self.store, "tune", {}, run_id=self.parent)
        record.add({"valid_gauc": best.value, "trial": best.number})
        names = ("trials.csv", "history.png", "importance.png", "best.toml")
        there = [(self.home / name, "") for name in names if (self.home / name).is_file()]
        record.end(
            artefacts=[*there, (best_model, "model")] if (best_model := self._model_of(best)).is_dir() else there
        )

    def _model_of(self, row: Row) -> Path:
        return self.home / "trials" / str(row.notes["folder"]) / "model"

    def _work_on(self, begun: Begun) -> None:
        began = time.monotonic()
        number = begun.trial.number
        shown = ", ".join(search_space.override(*one) for one in begun.values.items())
        say(f"tune: trial {number}: {shown}")
        if same := self.study.same(begun):
            assert same.value is not None
            self.study.complete(begun, same.value, seconds=0.0, same_as=same.number, best_step=same.notes["best_step"])
            say(f"tune: trial {number}: validation GAUC {same.value:.4f}, as trial {same.number}, whose values it has")
            return
        hears = _Hears(self.study, begun)
        with self._recorded(begun) as (record, watch):
            try:
                best = self._train(begun, several(watch, hears))
            except Pruned:
                self.study.prune(begun, validations=hears.validations, seconds=_since(began))
                _end(record, "KILLED")
                say(f"tune: trial {number}: pruned after validation {hears.validations}, {hears.last:.4f}")
            except Resumable:
                raise
            except UserError as e:
                self.study.fail(begun, e.message, seconds=_since(began))
                _end(record, "FAILED")
                say(f"tune: trial {number}: failed: {e.message}")
            else:
                notes = {"best_step": best["step"], "validations": hears.validations, "seconds": _since(began)}
                self.study.complete(begun, best["valid_gauc"], **notes)
                if record is not None:
                    record.add({"valid_gauc": best["valid_gauc"]}, best["step"])
                    record.end()
                say(f"tune: trial {number}: validation GAUC {best['valid_gauc']:.4f} at step {best['step']}")

    def _train(self, begun: Begun, watch: Watch) -> dict[str, Any]:
        """Make a trial's steps; return the record of its best validation."""
        sets = (*(search_space.override(*one) for one in begun.values.items()), ONE_PROCESS)
        folder = begun.folder.relative_to(self.home)
        steps, training = self.graph.trial(self.asked.variant, str(folder), sets)
        for step in steps:
            if code := make(self.graph, step, quiet=True):
                raise UserError(f"{step.stage} ended with exit code {code}; it said why")
        heard: list[Mapping[str, Any]] = []
        with contextlib.redirect_stdout(io.StringIO()):  # tables of each training would drown what counts
            ctrkit_command.main(
                self.graph.arguments(training), standalone_mode=False, obj=Looking(several(heard.append, watch))
            )
        if not heard:  # it was trained by a process that was killed before it could tell
            for line in (training.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                watch(json.loads(line))
        best = provenance.read_sidecar(training.output).get("counts", {}).get("best")
        if best is None:
            raise UserError("no validation user has both clicks and non-clicks, so there is no validation GAUC")
        found: dict[str, Any] = best
        return found

    @contextlib.contextmanager
    def _recorded(self, begun: Begun) -> "Iterator[tuple[mlflow_records.Run | None, Watch]]":
        if self.store is None:
            yield None, nobody
            return
        from ctrkit import mlflow_records

        tags = {"ctrkit.stage": "tune", "ctrkit.trial": str(begun.trial.number)}
        name = f"trial {begun.trial.number}"
        with mlflow_records.Run(self.store, name, begun.values, tags, self.parent) as record:
            yield record, record.watch

    def _remove_data(self) -> None:
        """Remove what data steps made for trials, but for the best one's, unless somebody works."""
        data = self.home / "data"
        with self.study.alone():
            if not data.is_dir() or self.study.someone_works():
                return
            kept: set[Path] = set()
            if best := self.study.best():
                sets = (*(search_space.override(*one) for one in best.values.items()), ONE_PROCESS)
                steps, _ = self.graph.trial(self.asked.variant, f"trials/{best.notes['folder']}", sets)
                kept = {step.output.parent for step in steps}
            for folder in data.iterdir():
                if folder not in kept:
                    files.remove(folder)


class _Hears:
    """Tells a study of each validation, and ends the training if it wants no more of it."""

    def __init__(self, study: Study, begun: Begun) -> None:
        self._study, self._begun = study, begun
        self.validations = 0
        self.last = float("nan")

    def __call__(self, record: Mapping[str, Any]) -> None:
        if "valid_gauc" not in record:
            return
        self.validations += 1
        if record["valid_gauc"] is None:
            return
        self.last = float(record["valid_gauc"])
        if self._study.report(self._begun, self.last, self.validations):
            raise Pruned


def work_side_by_side(asked: Asked, workers: int) -> int:
    """Have so many processes work on a study until no trial is left to begin; return the exit code of one that failed,
    or 0. One that is killed leaves its trial to the others. All end with this one."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_work_apart, args=(asked,), name=f"tune-{n}") for n in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode or 0 for process in processes]
    if killed := [code for code in codes if code < 0]:
        say(
            f"tune: {len(killed)} of {workers} processes were killed (signal {-killed[0]}); their trials are begun anew"
        )
    return max((code for code in codes if code > 0), default=0)


def _work_apart(asked: Asked) -> None:
    die_with_parent()
    try:
        Worker(asked).work()
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        sys.exit(1)


def make(graph: Graph, step: Step, *, quiet: bool = False) -> int:
    """Have a stage make a step's output, unless it is fresh; return its exit code. The inputs must be fresh.

    quiet: without its tables.
    """
    if files.is_locked(step.output):  # somebody makes it: perhaps another process, for a trial like this one
        with files.locked(step.output, quiet=True):
            pass
    if graph.is_fresh(step):
        return 0
    package = Path(ctrkit.__file__).parent
    # -P keeps the current folder off Python's path, unless it is where ctrkit lies.
    python = [sys.executable, *([] if package.parent == Path.cwd() else ["-P"]), "-m", "ctrkit"]
    out = subprocess.DEVNULL if quiet else None
    return subprocess.run([*python, *graph.arguments(step)], check=False, stdout=out).returncode


@contextlib.contextmanager
def environment(out: Path) -> Iterator[None]:
    """Within the block stages leave alone what is fresh, and share what they know of digests, as in a run."""
    names = {"CTRKIT_UNLESS_FRESH": "1", "CTRKIT_DIGESTS": str(out / ".digests.json")}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _asked(recipe: Recipe) -> dict[str, str]:
    """Return all settings that make values comparable."""
    tables = recipe.tables(*COMPARED, "tune")
    tables["train"] = {key: value for key, value in tables["train"].items() if key not in NOT_THE_MODEL}
    tune = tables.pop("tune")
    space = {f"space {key}": value for key, value in tune.pop("space").items()}
    for key in ("trials", "timeout_minutes"):
        del tune[key]
    return as_asked(**tables, tune={**tune, **space})


def _store(uri: str | None, recipe: Recipe) -> "mlflow_records.Store | None":
    if uri is None:
        return None
    from ctrkit import mlflow_records

    return mlflow_records.Store(uri, recipe.name, "tune")


def _end(record: "mlflow_records.Run | None", state: str) -> None:
    if record is not None:
        record.end(state)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)
