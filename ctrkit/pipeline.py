"""A recipe as a graph of steps: which stage makes which file from which, for every variant. And as Make rules.

Variants share every step whose settings, and whose inputs' settings, are the same: the first variant that needs
a step owns it. Steps of the recipe as it stands lie in `OUT/NAME/`, a variant's own in `OUT/NAME/VARIANT/`.

What is stale is decided by content twice, never by time: when the rules are written, so that Make knows what it need
not touch, and by each stage when its turn comes, since its inputs may have come out as they were.
"""

import datetime
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ctrkit import digests, files, provenance
from ctrkit.cli import main as ctrkit_command
from ctrkit.errors import UsageError, nearest
from ctrkit.recipe import NO_CURVE, Recipe, load

OUTPUTS = {
    "simulate": "raw",
    "convert": "convert",
    "select-clicks": "behaviours",
    "tune-backbone": "backbone",
    "extract-images": "features.h5",
    "import-features": "features.h5",
    "group": "groups",
    "train": "model",
    "predict": "predictions.parquet",
    "export": "export",
    "eval": "metrics.json",
    "report": "report.html",
    "tables": "tables",
    "daily": "daily",
    "replay": "replay",
}


FIGURES = "report-figures"
"""Folder of the report's figures, which `report` makes with `report.html`."""
DAYS = "days"
"""Folder of the runs of single days."""
CHAIN = "by-day"
"""Folder of the days of `make daily`, each of which starts from the model of the day before."""
DAY_SPLIT = ("split.test=1", "split.valid=0")
"""Of the days of `make daily`: a day tests, and all before it in the window may train."""
NO_WARM_START = ("train.warm_start=", "train.warm_from=")
"""Of a day's model from scratch, whatever the variant says."""
TUNE = "tune"
"""Folder of the study of `ctrkit tune`."""
SCRATCH = "scratch"
"""Folder, beside a day's model, of the same one trained from scratch."""


@dataclass(frozen=True)
class Step:
    """One output to make."""

    stage: str
    output: Path
    variant: str | None
    options: tuple[str, ...]
    """Of the stage's command, but for recipe, variant, sets and out."""
    needs: tuple["Step", ...]
    """Steps whose outputs it reads."""
    sets: tuple[str, ...] = ()
    """Overrides of the recipe, besides the user's."""

    @property
    def target(self) -> Path:
        """The file that Make watches: the sidecar, which is written last."""
        return files.sidecar_path(self.output)


@dataclass(frozen=True)
class Setting:
    """What the user asked of a run."""

    recipe: str
    raw: Path | None
    """Raw data; None where the recipe simulates its own."""
    weights: str | None
    sets: tuple[str, ...]
    out: Path
    today: datetime.date | None = None
    """Convert this day on top of the last one that was; outputs go to `OUT/NAME/days/DAY/`."""
    tables: bool = False
    """Plan the papers' tables too, with the variants that only they need."""
    export: bool = False
    """Plan the export of every variant's model too."""
    since: datetime.date | None = None
    """Plan the days from this one to `until`, each from the model of the day before, and nothing else."""
    until: datetime.date | None = None
    mlflow: str | None = None
    """Where trainings, evaluation and report are recorded besides."""


@dataclass(frozen=True)
class Chain:
    """A variant's steps."""

    data: dict[str, Step]
    model: Step
    predict: Step


@dataclass(frozen=True)
class Earlier:
    """What an earlier day left of a variant: its conversion, and its model if there is one."""

    convert: Path
    model: Path | None
    steps: tuple[Step, ...] = ()
    """Those that make them, where they are of this run."""


class Graph:
    """The steps of a recipe, in an order in which they can be made."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.steps: list[Step] = []
        self._made: dict[str, Step] = {}
        base = load(setting.recipe, None, setting.sets)
        self._base = base
        self.whole = setting.out / base.name
        self.home = self.whole / DAYS / str(setting.today) if setting.today else self.whole
        _check_names(self.home, base)
        if setting.raw is None and base.simulate is None:
            raise UsageError(
                f"recipe {base.name!r} needs raw data: give its folder as RAW=… (make) or --raw (ctrkit run)"
            )
        self._names: list[str | None] = [v for v in base.variants if not base.is_extra(v)] or [None]
        self._chains: dict[str | None, Chain] = {}
        self._begun: list[str | None] = []
        self._day: datetime.date | None = None
        self._apart: Path | None = None
        if setting.until is not None and setting.since is None:
            raise UsageError(
                f"the days up to {setting.until} begin where? Give FROM=… (make) or --from (ctrkit run) too"
            )
        if setting.since is not None:
            self._by_day(setting.since, setting.until or setting.since)
            return
        # The recipe's own data steps come first, so that they lie in the run's folder whatever variants do.
        data = self._data(None, base)
        chains = {name or "model": self._chain(name) for name in self._names}
        scored = [f"{name}={chain.predict.output}" for name, chain in chains.items()]
        evaluated = ("--gauc", *scored, *self._mlflow)
        metrics = self._add("eval", None, base, evaluated, [c.predict for c in chains.values()])
        options = ["--metrics", str(metrics.output), *self._mlflow]
        needs = [metrics, data["convert"], data["group"]]
        for name, chain in chains.items():
            options += ["--model", f"{name}={chain.model.output}", "--predictions", f"{name}={chain.predict.output}"]
            needs += [chain.model, chain.predict]
        options += ["--convert", str(data["convert"].output), "--groups", str(data["group"].output)]
        if "extract-images" in data:
            options += ["--features", str(data["extract-images"].output)]
            if not base.import_features.files or base.simulate or self._pictures(base).exists():
                options += ["--pictures", str(self._pictures(base))]
            needs.append(data["extract-images"])
        self._add("report", None, base, options, needs)
        if setting.export:
            for variant in self._names:
                self._export(variant)
        if setting.tables and (base.paper_tables or base.curves):
            self._tables()
        if base.replay.arms:
            self._replay(data)

    def _chain(self, name: str | None) -> Chain:
        """Return a variant's steps, after those of the variant that it starts from."""
        if name in self._chains:
            return self._chains[name]
        if name in self._begun:
            circle = " -> ".join(repr(n) for n in (*self._begun[self._begun.index(name) :], name))
            raise UsageError(f"variants start from each other in a circle: {circle}; change a train.warm_from")
        self._begun.append(name)
        recipe = self._load(name)
        earlier = None
        if recipe.train.warm_start:
            source = recipe.train.warm_from
            who = f"variant {name!r}" if name else "the recipe"
            if not source:
                raise UsageError(
                    f"{who} has train.warm_start = {recipe.train.warm_start!r} and does not say from which variant: "
                    "set train.warm_from"
                )
            if source not in self._base.variants:
                raise UsageError(
                    f"{who} has train.warm_from = {source!r}, and there is no such variant"
                    f"{nearest(source, self._base.variants)}"
                )
            chain = self._chain(source)
            convert = chain.data["convert"]
            earlier = Earlier(convert.output, chain.model.output, (convert, chain.model))
        data = self._data(name, recipe)
        self._chains[name] = self._model(name, recipe, data, earlier)
        self._begun.pop()
        return self._chains[name]

    def _load(self, name: str | None, sets: tuple[str, ...] = ()) -> Recipe:
        """Return the recipe with a variant's overrides, the user's and further ones."""
        recipe = load(self.setting.recipe, name, (*self.setting.sets, *sets))
        if recipe.simulate != self._base.simulate:
            raise UsageError(f"variant {name!r} overrides [simulate]: all variants of a recipe share one world")
        return recipe

    def tuned(self, variant: str | None) -> Chain:
        """Return the steps of what a study starts from. Adds them if they are not of this run."""
        return self._chain(variant if variant in self._base.variants else None)

    def trial(self, variant: str | None, folder: str, sets: tuple[str, ...]) -> tuple[list[Step], Step]:
        """Return a trial's data steps and its training, which get these overrides besides the user's.

        folder: of the model and its TensorBoard, in `tune/` below the variant's folder. A data step that does what one
        of the recipe's does is that one; the others lie in `tune/data/`, where trials of the same settings share them.
        """
        recipe = self._load(variant, sets)
        self._apart = self.study_home(variant) / "data"
        data = self._data(variant, recipe, sets=sets)
        self._apart = None
        chain = self._model(variant, recipe, data, None, sets, f"{TUNE}/{folder}")
        return list(data.values()), chain.model

    def study_home(self, variant: str | None) -> Path:
        """Return the folder of a study."""
        return self.whole / (variant or "") / TUNE

    @property
    def _mlflow(self) -> list[str]:
        return ["--mlflow", self.setting.mlflow] if self.setting.mlflow else []

    def _export(self, name: str | None) -> None:
        """Add the export of a variant's model."""
        chain = self._chain(name)
        convert = chain.data["convert"]
        options = ("--convert", str(convert.output), str(chain.model.output))
        self._add("export", name, self._load(name), options, [convert, chain.model], own=True)

    def _tables(self) -> None:
        """Add the papers' tables and curves, after the variants in them."""
        tables, curves = self._base.paper_tables.values(), self._base.curves.values()
        in_tables = dict.fromkeys(row.variant for table in tables for row in table.rows)
        in_curves = dict.fromkeys(row.variant for figure in curves for row in figure.rows)
        for name in in_curves:
            if not self._load(name).train.validation:
                raise UsageError(f"variant {name!r}, which [curves] draws, has {NO_CURVE}")
        options: list[str] = []
        needs: list[Step] = []
        for name in in_tables:
            options += ["--predictions", f"{name}={self._chain(name).predict.output}"]
            needs.append(self._chain(name).predict)
        for name in in_curves:
            options += ["--model", f"{name}={self._chain(name).model.output}"]
            needs.append(self._chain(name).model)
        self._add("tables", None, self._base, options, needs)

    def _replay(self, data: dict[str, Step]) -> None:
        """Add the simulated A/B test of `replay.arms`, which read the same groups and features."""
        options = ["--raw", str(self._raw())]
        needs = [data[stage] for stage in ("simulate", "convert", "group", "extract-images") if stage in data]
        for stage, option in (("convert", "--convert"), ("group", "--groups"), ("extract-images", "--features")):
            options += [option, str(data[stage].output)] if stage in data else []
        for name in self._base.replay.arms:
            chain = self._chain(name)
            for stage in ("convert", "group", "extract-images"):
                if chain.data.get(stage) != data.get(stage):
                    raise UsageError(
                        f"replay.arms: variant {name!r} has {OUTPUTS[stage]} of its own, and the arms of a replay read "
                        f"the same ones; name variants that differ in [train] only"
                    )
            options += ["--arm", f"{name}={chain.model.output}"]
            needs.append(chain.model)
        self._add("replay", None, self._base, options, needs)

    def _by_day(self, since: datetime.date, until: datetime.date) -> None:
        """Add the days of a range, each with the models that start from the day before, and the table of all."""
        if until < since:
            raise UsageError(f"the days from {since} to {until} are none: FROM comes after TO")
        if self.setting.today is not None:
            raise UsageError("TODAY is one day and FROM and TO a range of days: give one or the other")
        names: list[str | None] = list(self._base.daily.variants) or self._names
        self._base = self._load(None, DAY_SPLIT)
        base_before = self._left_by_earlier_day(None, since, own=False)
        earlier: dict[str | None, Earlier] = {}
        options: list[str] = []
        needs: list[Step] = []
        for n in range((until - since).days + 1):
            self._day = since + datetime.timedelta(days=n)
            self.home = self.whole / CHAIN / str(self._day)
            data = self._data(None, self._base, base_before, DAY_SPLIT)
            base_before = Earlier(data["convert"].output, None, (data["convert"],))
            day = str(self._day)
            for name in names:
                label = name or "model"
                chains = self._one_day(name, label, earlier.get(name))
                for at, chain in chains.items():
                    folder, convert = chain.model.output.parent, chain.data["convert"].output
                    options += ["--tested", day, at, str(folder), str(convert)]
                    needs += [chain.predict, chain.model, chain.data["convert"]]
                first = chains[label]
                steps = (first.data["convert"], first.model)
                earlier[name] = Earlier(first.data["convert"].output, first.model.output, steps)
        self.home = self.whole
        self._add("daily", None, self._base, options, list(dict.fromkeys(needs)))

    def _one_day(self, name: str | None, label: str, before: Earlier | None) -> dict[str, Chain]:
        """Return a day's steps of a variant by their label: from the day before and, where asked, from scratch."""
        assert self._day is not None
        cold = (*DAY_SPLIT, *NO_WARM_START)
        plain = self._load(name, cold)
        before = before or self._left_by_earlier_day(name, self._day, own=not self._converts_as_base(plain))
        data = self._data(name, plain, before, DAY_SPLIT)
        if before is None or before.model is None:
            return {label: self._model(name, plain, data, None, cold)}
        keys = [f"train.{key}={json.dumps(value)}" for key, value in self._base.daily.train.items()]
        sets = (*cold, *keys, "train.first_day=-1", "train.warm_start=full")
        out = {label: self._model(name, self._load(name, sets), data, before, sets)}
        if self._base.daily.scratch:
            out[f"{label}, from scratch"] = self._model(name, plain, data, None, cold, SCRATCH)
        return out

    def _left_by_earlier_day(self, name: str | None, day: datetime.date, *, own: bool) -> Earlier | None:
        """Return what the latest earlier day on the disk has of a variant; None if there is no such day.

        own: the variant has a conversion of its own.
        """
        for home in sorted((self.whole / CHAIN).glob("????-??-??"), reverse=True):
            convert = home / (name or "" if own else "") / OUTPUTS["convert"]
            model = home / (name or "") / OUTPUTS["train"]
            if home.name < str(day) and files.sidecar_path(convert).is_file():
                return Earlier(convert, model if files.sidecar_path(model).is_file() else None)
        return None

    def _raw(self) -> Path:
        return self.setting.raw or self.whole / OUTPUTS["simulate"]

    def _converts_as_base(self, recipe: Recipe) -> bool:
        tables = provenance.TABLES["convert"]
        return recipe.tables(*tables) == self._base.tables(*tables)

    def _day_options(self, variant: str | None, before: Earlier | None) -> list[str]:
        """Return convert's options for a day: which, and the latest earlier day to extend, if there is one."""
        if self._day is not None:
            return ["--today", str(self._day), *(["--extend", str(before.convert)] if before else [])]
        if self.setting.today is None:
            return []
        outputs = self.whole.glob(f"{DAYS}/*/{variant + '/' if variant else ''}{OUTPUTS['convert']}")
        day_at = len(self.whole.parts) + 1
        earlier = [p for p in outputs if files.sidecar_path(p).is_file() and p.parts[day_at] < str(self.setting.today)]
        last = max(earlier, key=lambda p: p.parts[day_at], default=None)
        return ["--today", str(self.setting.today), *(["--extend", str(last)] if last else [])]

    def _pictures(self, recipe: Recipe) -> Path:
        return self._raw() / recipe.extract_images.folder

    def _data(
        self, variant: str | None, recipe: Recipe, before: Earlier | None = None, sets: tuple[str, ...] = ()
    ) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        raw, simulated = self._raw(), []
        if self.setting.raw is None:
            steps["simulate"] = self._add("simulate", None, recipe, (), ())
            simulated = [steps["simulate"]]
        day = self._day_options(None if self._converts_as_base(recipe) else variant, before)
        extended = [step for step in (before.steps if before else ()) if step.stage == "convert"]
        convert = steps["convert"] = self._add(
            "convert", variant, recipe, ("--raw", str(raw), *day), [*simulated, *extended], sets=sets
        )
        clicks = steps["select-clicks"] = self._add(
            "select-clicks",
            variant,
            recipe,
            ("--convert", str(convert.output)),
            [convert],
            sets=sets,
        )
        if any(f.kind == "image" for f in recipe.features.values()) and recipe.import_features.files:
            options = ["--convert", str(convert.output)]
            for option, names in (("--vectors", recipe.import_features.files), ("--ids", recipe.import_features.ids)):
                for name in [names] if isinstance(names, str) else names:
                    options += [option, str(raw / name)]
            # It stands where extract-images would.
            steps["extract-images"] = self._add(
                "import-features", variant, recipe, options, [*simulated, convert], sets=sets
            )
        elif any(f.kind == "image" for f in recipe.features.values()):
            pictures = ["--pictures", str(self._pictures(recipe))]
            weights = ["--weights", self.setting.weights] if self.setting.weights else []
            needs = [*simulated, convert]
            if recipe.extract_images.weights == "tuned":
                options = [*pictures, "--raw", str(raw), *weights]
                tuned = steps["tune-backbone"] = self._add(
                    "tune-backbone", variant, recipe, options, simulated, sets=sets
                )
                weights = ["--weights", str(tuned.output)]
                needs.append(tuned)
            options = [*pictures, "--convert", str(convert.output), *weights]
            steps["extract-images"] = self._add("extract-images", variant, recipe, options, needs, sets=sets)
        steps["group"] = self._add(
            "group",
            variant,
            recipe,
            ("--convert", str(convert.output), "--behaviours", str(clicks.output)),
            [convert, clicks],
            sets=sets,
        )
        return steps

    def _model(
        self,
        variant: str | None,
        recipe: Recipe,
        data: dict[str, Step],
        before: Earlier | None = None,
        sets: tuple[str, ...] = (),
        below: str = "",
    ) -> Chain:
        train = recipe.train
        options = ["--groups", str(data["group"].output)]
        needs = [data["group"]]
        if train.looks_at_pictures and "extract-images" in data:
            options += [
                "--features",
                str(data["extract-images"].output),
                "--convert",
                str(data["convert"].output),
            ]
            needs += [data["convert"], data["extract-images"]]
        warm, earlier = [], []
        if train.warm_start and before is not None:
            warm = ["--warm-start", str(before.model)]
            earlier = [step for step in before.steps if step not in needs and step.stage == "train"]
            if train.warm_start == "full" and before.convert != data["convert"].output:
                warm += ["--warm-convert", str(before.convert)]
                warm += [] if "--convert" in options else ["--convert", str(data["convert"].output)]
                earlier += [step for step in (data["convert"], *before.steps) if step not in (*needs, *earlier)]
        logs = self.home / (variant or "") / below / "tensorboard"
        options_ = (*options, *warm, "--tensorboard", str(logs), *self._mlflow)
        model = self._add("train", variant, recipe, options_, [*needs, *earlier], own=True, below=below, sets=sets)
        options_ = (*options, "--model", str(model.output))
        predict = self._add("predict", variant, recipe, options_, [*needs, model], own=True, below=below, sets=sets)
        return Chain(data, model, predict)

    def _add(
        self,
        stage: str,
        variant: str | None,
        recipe: Recipe,
        options: Sequence[str],
        needs: Sequence[Step],
        *,
        own: bool = False,
        below: str = "",
        sets: tuple[str, ...] = (),
    ) -> Step:
        """Add a step, or return the one that does the same work already."""
        tables = recipe.tables(*provenance.TABLES[stage])
        same = json.dumps([stage, tables, list(options), variant if own else None], sort_keys=True)
        if same not in self._made:
            home = self.whole if stage == "simulate" else self.home / (variant or "") / below
            if self._apart is not None and stage != "simulate":
                home = self._apart / digests.text(same)[:12]
            output = home / OUTPUTS[stage]
            self._made[same] = Step(stage, output, variant, tuple(options), tuple(needs), sets)
            self.steps.append(self._made[same])
        return self._made[same]

    def arguments(self, step: Step) -> list[str]:
        """Return the command line of a step, after `ctrkit`."""
        variant = ["--variant", step.variant] if step.variant else []
        sets = [part for text in (*self.setting.sets, *step.sets) for part in ("--set", text)]
        out = ["--json" if step.stage == "eval" else "--out", str(step.output)]
        return [step.stage, "--recipe", self.setting.recipe, *variant, *sets, *out, *step.options]

    def is_fresh(self, step: Step) -> bool:
        """Say whether the step's output is what its stage would make now. Its inputs must be."""
        name, *rest = self.arguments(step)
        with provenance.checking():
            try:
                ctrkit_command.main([name, *rest], standalone_mode=False)
            except provenance.Checked as checked:
                return checked.fresh
            except click.ClickException:
                return False  # the stage itself will say what is wrong
        return False

    def stale(self) -> list[Step]:
        """Return the steps that are not fresh, or whose inputs are not."""
        found: list[Step] = []
        for step in self.steps:
            if any(n in found for n in step.needs) or not self.is_fresh(step):
                found.append(step)
        return found


def _check_names(home: Path, recipe: Recipe) -> None:
    """Refuse what cannot be the name of a Make target, or would be in the way of another output."""
    if bad := re.search(r"[^\w./+@,-]", str(home)):
        raise UsageError(
            f"outputs would go to {str(home)!r}, and Make cannot work with {bad.group()!r} in their path; give OUT=… "
            f"(make) or --out (ctrkit run) without it, perhaps relative to where you are"
        )
    taken = {name + end for name in OUTPUTS.values() for end in ("", ".json")} | {DAYS, CHAIN, FIGURES, TUNE}
    if clash := sorted(taken & set(recipe.variants)):
        raise UsageError(f"a variant cannot be called {clash[0]!r}, which is the name of an output; rename it")


def make_rules(graph: Graph, command: str) -> str:
    """Return the Make rules of a graph, and sweep what killed runs left beside its fresh outputs.

    `command` is how Make calls ctrkit. A stale step runs after its inputs, but leaves its output alone if it turns
    out fresh by then (CTRKIT_UNLESS_FRESH, see `ctrkit.provenance`).
    """
    stale = {step.output for step in graph.stale()}
    by_stage: dict[str, list[Step]] = {stage: [] for stage in OUTPUTS}
    lines = [".PHONY: FORCE", "FORCE:"]
    for step in graph.steps:
        by_stage[step.stage].append(step)
        if step.output in stale:
            needs = " ".join(str(n.target) for n in step.needs)
            lines += ["", f"{step.target}: FORCE | {needs}", "\t" + _shell([command, *graph.arguments(step)])]
        else:
            files.tidy(step.output)
            lines += ["", f"{step.target}:"]
    for last in by_stage["report"]:
        said = "done" if last.output in stale else "nothing to do"
        end = f"{graph.home.name}: {said}, the report is {last.output}"
        lines += ["", ".PHONY: all", f"all: {last.target}", "\t@" + _shell(["echo", end])]
    if graph.setting.since is not None:
        lines += ["", "all: daily"]
    for stage, steps in by_stage.items():
        lines += ["", f".PHONY: {stage}", f"{stage}: {' '.join(str(s.target) for s in steps)}"]
        if not any(s.output in stale for s in steps):
            made = "nothing to do" if steps else "this recipe has no such step"
            made += f", see {steps[0].output}" if steps and stage in ("tables", "daily", "replay") else ""
            lines.append("\t@" + _shell(["echo", f"{stage}: {made}"]))
    return "\n".join(lines) + "\n"


def write_rules(graph: Graph, command: str) -> Path:
    """Write the Make rules of a graph to `OUT/.NAME.mk`; return that path."""
    path = graph.setting.out / f".{graph.whole.name}.mk"
    files.write_text(path, make_rules(graph, command))
    return path


def find_target(graph: Graph, name: str) -> str:
    """Return what Make calls a target that the user named: `all`, a stage, or the path of an output."""
    if name == "all" or name in OUTPUTS:
        return name
    for step in graph.steps:
        if Path(name) in (step.output, step.target):
            return str(step.target)
    known = ["all", *OUTPUTS, *(str(step.output) for step in graph.steps)]
    raise UsageError(f"there is nothing called {name!r} to make{nearest(name, known)}")


def _shell(words: Sequence[str]) -> str:
    """Return a shell command for a Make recipe; its first word is left as it is."""
    command, *rest = words
    return " ".join([command, *(shlex.quote(w).replace("$", "$$") for w in rest)])
