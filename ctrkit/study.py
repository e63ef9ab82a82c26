"""A study of `ctrkit tune` on the disk: Optuna's, in SQLite, shared by any number of processes of one machine.

A process holds the lock of the trial that it works on, so a trial that is said to run and whose lock nobody holds was
interrupted; it is begun anew, with the same values, by whoever comes next. Trials are drawn one at a time, under the
study's lock, each by a sampler that is seeded with the number of trials before it: one process draws the same trials
whether it is interrupted or not.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from ctrkit import files
from ctrkit.errors import Resumable, UserError
from ctrkit.recipe import Tune
from ctrkit.search_space import Dimension

DATABASE = "study.db"
TRIALS = "trials"
"""Folder of the trials' folders."""
WAIT_SECONDS = 60.0
"""For a database that another process is writing to."""
ATTEMPTS = 3
"""A trial whose process was killed so many times has failed."""
FAILURES = 5
"""So many failed trials one after the other end the study."""
KEPT = "metrics.jsonl"
"""What is kept of a model that goes."""
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Begun:
    """A trial that this process works on."""

    trial: optuna.Trial
    folder: Path
    values: dict[str, Any]
    """Key → value."""


@dataclass(frozen=True)
class Row:
    """A trial as the tables show it."""

    number: int
    state: str
    """complete, pruned, failed, interrupted, running, or waiting."""
    value: float | None
    """Validation GAUC: the best of a complete trial, the last of a pruned one."""
    values: dict[str, Any]
    notes: dict[str, Any]
    """`folder`, `recipe` (it is the recipe as it stands), `seconds`, `best_step`, `validations`, `why`, …"""
    history: tuple[tuple[int, float], ...]
    """Number of the validation, GAUC."""


class Study:
    """The study in a folder.

    Parameters
    ----------
    folder: where study.db is, or will be.
    tune: how it is searched.
    dimensions: what is drawn.
    asked: all that makes values comparable: key → text. A study that has another one is refused.
    first: the values of the first trial; None where the sampler draws it.

    Raises UserError where the folder holds another study.
    """

    def __init__(
        self,
        folder: Path,
        tune: Tune,
        dimensions: Sequence[Dimension],
        asked: Mapping[str, str],
        first: Mapping[str, Any] | None,
    ) -> None:
        self.folder, self.tune, self.dimensions = folder, tune, list(dimensions)
        self.path = folder / DATABASE
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._alone():
            with contextlib.closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as database:
                database.execute("PRAGMA journal_mode=WAL")  # readers and a writer at once; stays with the file
            waits = {"connect_args": {"timeout": WAIT_SECONDS}}
            self._storage = RDBStorage(f"sqlite:///{self.path.absolute()}", engine_kwargs=waits)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed=0),
                pruner=_pruner(tune),
            )
            before = self._study.user_attrs.get("asked")
            if before is None:
                if first is not None and not self._study.get_trials(deepcopy=False):
                    self._enqueue(first, {"recipe": True})
                self._study.set_user_attr("asked", dict(asked))
            elif difference := _difference(before, asked):
                raise UserError(
                    f"{folder} holds a study with which new trials cannot be compared: {difference}. Set it back, or "
                    f"move that folder away to begin a new study"
                )

    @contextlib.contextmanager
    def begin(self, trials: int) -> Iterator[Begun | None]:
        """Yield a trial to work on, or None if there are `trials` already; hold its lock within the block."""
        with contextlib.ExitStack() as held:
            with self._alone():
                begun = self._begin(trials, held)
            yield begun

    def _begin(self, most: int, held: contextlib.ExitStack) -> Begun | None:
        self._reap()
        every = self._study.get_trials(deepcopy=False)
        taken = [t for t in every if t.state != TrialState.WAITING and not t.user_attrs.get("interrupted")]
        if len(taken) >= most:
            return None
        recent = [t.state for t in sorted(taken, key=lambda t: t.number) if t.state.is_finished()][-FAILURES:]
        if recent == [TrialState.FAIL] * FAILURES:
            last = [t for t in taken if t.state == TrialState.FAIL][-1]
            raise UserError(
                f"the last {FAILURES} trials of {self.folder} failed; the last one: {last.user_attrs.get('why')}"
            )
        seed = (self.tune.seed * 1_000_003 + len(taken)) % 2**32
        self._study.sampler = _sampler(self.tune, seed)
        trial = self._study.ask()
        folder = self.folder / TRIALS / _folder_name(trial.number, trial.user_attrs)
        held.enter_context(files.locked(folder, quiet=True))
        trial.set_user_attr("folder", folder.name)
        return Begun(trial, folder, {d.key: d.suggest(trial) for d in self.dimensions})

    def same(self, begun: Begun) -> Row | None:
        """Return a complete trial with the same values, if there is one."""
        return next((r for r in self.rows() if r.state == "complete" and r.values == begun.values), None)

    def report(self, begun: Begun, value: float, validation: int) -> bool:
        """Tell what a validation gave; say whether the trial is to be stopped."""
        with self._told():
            begun.trial.report(value, validation)
            return begun.trial.should_prune()

    def complete(self, begun: Begun, value: float, **notes: Any) -> None:
        """Tell a trial's value; `notes` are for the tables."""
        self._tell(begun, notes, values=value)

    def prune(self, begun: Begun, **notes: Any) -> None:
        """Tell that a trial was stopped."""
        self._tell(begun, notes, state=TrialState.PRUNED)

    def fail(self, begun: Begun, why: str, **notes: Any) -> None:
        """Tell that a trial cannot be."""
        self._tell(begun, {**notes, "why": why}, state=TrialState.FAIL)

    def _tell(self, begun: Begun, notes: Mapping[str, Any], **told: Any) -> None:
        with self._alone():
            for name, note in notes.items():
                begun.trial.set_user_attr(name, note)
            self._study.tell(begun.trial.number, **told)

    def rows(self) -> list[Row]:
        """Return all trials, by number."""
        return [self._row(t) for t in self._study.get_trials(deepcopy=False)]

    def best(self) -> Row | None:
        """Return the complete trial of the highest value, the first of several."""
        rows = [row for row in self.rows() if row.state == "complete" and row.value is not None]
        return max(rows, key=lambda row: (row.value, -row.number), default=None)

    def unfinished(self) -> bool:
        """Say whether a trial is worked on, or was when its process was killed."""
        return bool(self._running())

    def someone_works(self) -> bool:
        """Say whether a process works on a trial."""
        return any(files.is_locked(self._folder(t)) for t in self._running())

    def interrupted(self) -> None:
        """Note which trials are no longer worked on."""
        with self._alone():
            self._reap()

    def remember(self, name: str, make: Any) -> Any:
        """Return what the study remembers by a name; what `make()` returns, the first time."""
        with self._alone():
            if name not in self._study.user_attrs:
                if (made := make()) is None:
                    return None
                self._study.set_user_attr(name, made)
            return self._study.user_attrs[name]

    def tidy(self) -> None:
        """Remove the models of finished trials, but of the best; their metrics.jsonl stay, in the trial's folder."""
        with self._alone():
            best = self.best()
            working = {t.user_attrs.get("folder") for t in self._running()}
            for row in self.rows():
                name = row.notes.get("folder")
                model = self.folder / TRIALS / str(name) / "model"
                if name is None or name in working or row.state in ("running", "interrupted", "waiting"):
                    continue
                if (model / KEPT).is_file() and not (model.parent / KEPT).is_file():
                    files.write_text(model.parent / KEPT, (model / KEPT).read_text(encoding="utf-8"))
                if best is None or name != best.notes.get("folder"):
                    files.sidecar_path(model).unlink(missing_ok=True)
                    files.remove(model)
                    files.tidy(model)

    def importances(self) -> dict[str, float]:
        """Return how much of the values' variance each key explains (fANOVA over the complete trials); empty where
        there are too few trials, or their values are all the same."""
        complete = [row for row in self.rows() if row.state == "complete"]
        if len(complete) < 3 or len({row.value for row in complete}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {key: float(share) for key, share in found.items()}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the study's lock within the block."""
        with self._alone():
            yield

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with files.locked(self.path, quiet=True), self._told():
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within the block errors of the database are the user's, who may mend them."""
        try:
            yield
        except (sqlite3.Error, optuna.exceptions.StorageInternalError) as e:
            why = str(e.__cause__ or e).splitlines()[0]
            raise Resumable(
                f"{self.path}: {why}. If the disk is full, make room and run the same command again: it goes on from "
                "what was done"
            ) from None

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _folder(self, trial: FrozenTrial) -> Path:
        return self.folder / TRIALS / _folder_name(trial.number, trial.user_attrs)

    def _reap(self) -> None:
        """End the trials that nobody works on any more, and have those begun anew."""
        for trial in self._running():
            if files.is_locked(self._folder(trial)):
                continue
            attempt = trial.user_attrs.get("attempt", 1)
            values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            known = {"folder": self._folder(trial).name, "recipe": trial.user_attrs.get("recipe", False)}
            study_id = self._storage.get_study_id_from_name(self._study.study_name)
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            if attempt < ATTEMPTS:
                self._storage.set_trial_user_attr(trial_id, "interrupted", True)
                if len(values) == len(self.dimensions):
                    self._enqueue(values, {**known, "attempt": attempt + 1})
            else:
                self._storage.set_trial_user_attr(trial_id, "why", f"its process was killed {attempt} times")
            self._study.tell(trial.number, state=TrialState.FAIL)
            files.tidy(self._folder(trial))

    def _enqueue(self, parameters: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        self._study.enqueue_trial(dict(parameters), user_attrs=dict(notes))

    def _row(self, trial: FrozenTrial) -> Row:
        of = {d.key: d for d in self.dimensions}
        state = "interrupted" if trial.user_attrs.get("interrupted") else STATES[trial.state]
        values = {key: of[key].value(p) for key, p in trial.params.items() if key in of}
        value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
        history = tuple(sorted(trial.intermediate_values.items()))
        return Row(trial.number, state, value, values, dict(trial.user_attrs), history)


def _folder_name(number: int, notes: Mapping[str, Any]) -> str:
    """Return the name of a trial's folder: of one that is begun anew, that of the first attempt."""
    return str(notes.get("folder", f"{number:04}"))


def _sampler(tune: Tune, seed: int) -> optuna.samplers.BaseSampler:
    if tune.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=tune.startup_trials)


def _pruner(tune: Tune) -> optuna.pruners.BasePruner:
    if tune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=tune.startup_trials, n_warmup_steps=tune.warm_up + 1)
    if tune.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1)
    return optuna.pruners.NopPruner()


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in what two studies differ; "" if in nothing."""
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if not differ:
        return ""
    key, others = differ[0], len(differ) - 1
    was, has = (_shown(of.get(key)) for of in (before, now))
    told = "the data have changed since" if key.startswith("data ") else f"{key} was {was} and is {has}"
    return told + (f", and so for {others} more" if others else "")


def _shown(text: str | None) -> str:
    return "not there" if text is None else text if len(text) <= 100 else f"{text[:100]}…"


def as_asked(**tables: Any) -> dict[str, str]:
    """Return tables as a study remembers them: `table.key` → JSON."""
    return {
        f"{table}.{key}": json.dumps(value, sort_keys=True, default=str)
        for table, keys in tables.items()
        for key, value in keys.items()
    }
