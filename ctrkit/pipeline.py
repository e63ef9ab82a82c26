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

from ctrkit import files, provenance
from ctrkit.cli import main as ctrkit_command
from ctrkit.errors import UsageError, nearest
from ctrkit.recipe import Recipe, load

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
    "eval": "metrics.json",
    "report": "report.html",
}


DAYS = "days"
"""Folder of the runs of single days."""


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
        names: list[str | None] = list(base.variants) or [None]
        # The recipe's own data steps come first, so that they lie in the run's folder whatever variants do.
        data = self._data(None, base)
        chains = {}
        for name in names:
            recipe = load(setting.recipe, name, setting.sets)
            if recipe.simulate != base.simulate:
                raise UsageError(f"variant {name!r} overrides [simulate]: all variants of a recipe share one world")
            steps = self._data(name, recipe)
            chains[name or "model"] = (steps, *self._model(name, recipe, steps))
        predictions = {name: predict for name, (_, _, predict) in chains.items()}
        scored = [f"{name}={step.output}" for name, step in predictions.items()]
        metrics = self._add("eval", None, base, ("--gauc", *scored), tuple(predictions.values()))
        options = ["--metrics", str(metrics.output)]
        needs = [metrics, data["convert"], data["group"]]
        for name, (_, model, predict) in chains.items():
            options += ["--model", f"{name}={model.output}", "--predictions", f"{name}={predict.output}"]
            needs += [model, predict]
        options += ["--convert", str(data["convert"].output), "--groups", str(data["group"].output)]
        if "extract-images" in data:
            options += ["--features", str(data["extract-images"].output)]
            if not base.import_features.files or base.simulate or self._pictures(base).exists():
                options += ["--pictures", str(self._pictures(base))]
            needs.append(data["extract-images"])
        self._add("report", None, base, options, needs)

    def _raw(self) -> Path:
        return self.setting.raw or self.whole / OUTPUTS["simulate"]

    def _converts_as_base(self, recipe: Recipe) -> bool:
        tables = provenance.TABLES["convert"]
        return recipe.tables(*tables) == self._base.tables(*tables)

    def _day_options(self, variant: str | None) -> list[str]:
        """Return convert's options for a day: which, and the latest earlier day to extend, if there is one."""
        if self.setting.today is None:
            return []
        outputs = self.whole.glob(f"{DAYS}/*/{variant + '/' if variant else ''}{OUTPUTS['convert']}")
        day_at = len(self.whole.parts) + 1
        earlier = [p for p in outputs if files.sidecar_path(p).is_file() and p.parts[day_at] < str(self.setting.today)]
        last = max(earlier, key=lambda p: p.parts[day_at], default=None)
        return ["--today", str(self.setting.today), *(["--extend", str(last)] if last else [])]

    def _pictures(self, recipe: Recipe) -> Path:
        return self._raw() / recipe.extract_images.folder

    def _data(self, variant: str | None, recipe: Recipe) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        raw, simulated = self._raw(), []
        if self.setting.raw is None:
            steps["simulate"] = self._add("simulate", None, recipe, (), ())
            simulated = [steps["simulate"]]
        day = self._day_options(None if self._converts_as_base(recipe) else variant)
        convert = steps["convert"] = self._add("convert", variant, recipe, ("--raw", str(raw), *day), simulated)
        clicks = steps["select-clicks"] = self._add(
            "select-clicks",
            variant,
            recipe,
            ("--convert", str(convert.output)),
            [convert],
        )
        if any(f.kind == "image" for f in recipe.features.values()) and recipe.import_features.files:
            options = ["--convert", str(convert.output)]
            for option, names in (("--vectors", recipe.import_features.files), ("--ids", recipe.import_features.ids)):
                for name in [names] if isinstance(names, str) else names:
                    options += [option, str(raw / name)]
            # It stands where extract-images would.
            steps["extract-images"] = self._add("import-features", variant, recipe, options, [*simulated, convert])
        elif any(f.kind == "image" for f in recipe.features.values()):
            pictures = ["--pictures", str(self._pictures(recipe))]
            weights = ["--weights", self.setting.weights] if self.setting.weights else []
            needs = [*simulated, convert]
            if recipe.extract_images.weights == "tuned":
                options = [*pictures, "--raw", str(raw), *weights]
                tuned = steps["tune-backbone"] = self._add("tune-backbone", variant, recipe, options, simulated)
                weights = ["--weights", str(tuned.output)]
                needs.append(tuned)
            options = [*pictures, "--convert", str(convert.output), *weights]
            steps["extract-images"] = self._add("extract-images", variant, recipe, options, needs)
        steps["group"] = self._add(
            "group",
            variant,
            recipe,
            ("--convert", str(convert.output), "--behaviours", str(clicks.output)),
            [convert, clicks],
        )
        return steps

    def _model(self, variant: str | None, recipe: Recipe, data: dict[str, Step]) -> tuple[Step, Step]:
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
        logs = self.home / (variant or "") / "tensorboard"
        model = self._add("train", variant, recipe, (*options, "--tensorboard", str(logs)), needs, own=True)
        predict = self._add(
            "predict", variant, recipe, (*options, "--model", str(model.output)), [*needs, model], own=True
        )
        return model, predict

    def _add(
        self,
        stage: str,
        variant: str | None,
        recipe: Recipe,
        options: Sequence[str],
        needs: Sequence[Step],
        own: bool = False,
    ) -> Step:
        """Add a step, or return the one that does the same work already."""
        tables = recipe.tables(*provenance.TABLES[stage])
        same = json.dumps([stage, tables, list(options), variant if own else None], sort_keys=True)
        if same not in self._made:
            output = (self.whole if stage == "simulate" else self.home / (variant or "")) / OUTPUTS[stage]
            self._made[same] = Step(stage, output, variant, tuple(options), tuple(needs))
            self.steps.append(self._made[same])
        return self._made[same]

    def arguments(self, step: Step) -> list[str]:
        """Return the command line of a step, after `ctrkit`."""
        variant = ["--variant", step.variant] if step.variant else []
        sets = [part for text in self.setting.sets for part in ("--set", text)]
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
    taken = {name + end for name in OUTPUTS.values() for end in ("", ".json")} | {DAYS}
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
    report = by_stage["report"][0]
    said = "done" if report.output in stale else "nothing to do"
    end = f"{graph.home.name}: {said}, the report is {report.output}"
    lines += ["", ".PHONY: all", f"all: {report.target}", "\t@" + _shell(["echo", end])]
    for stage, steps in by_stage.items():
        lines += ["", f".PHONY: {stage}", f"{stage}: {' '.join(str(s.target) for s in steps)}"]
        if not any(s.output in stale for s in steps):
            made = "nothing to do" if steps else "this recipe has no such step"
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
