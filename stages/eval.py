"""Compute GAUC and its kin from predictions, ours or anyone's.

Reads Parquet, CSV or TSV files of predictions. Prints tables; writes metrics.json if asked.
"""

from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import click

from ctrkit import files, provenance
from ctrkit.compat import Program
from ctrkit.errors import UsageError, nearest
from ctrkit.evaluation import evaluate
from ctrkit.metric_tables import (
    comparison_table,
    compat_table,
    computed_how,
    overall_table,
    slice_tables,
    statement,
)
from ctrkit.options import mlflow_option, path_option
from ctrkit.predictions import SEPARATORS
from ctrkit.progress import console, say
from ctrkit.recipe import Eval, Recipe, load


@click.command("eval")
@click.argument("predictions", nargs=-1, required=True, metavar="[NAME=]FILE...")
@click.option("--gauc", is_flag=True, help="Say what is wanted. GAUC is always computed, flag or not.")
@click.option("--user", default="user", show_default=True, metavar="COLUMN", help="The raw user.")
@click.option("--label", default="click", show_default=True, metavar="COLUMN", help="1 for a click, else 0.")
@click.option("--score", default="score", show_default=True, metavar="COLUMN", help="Higher: likelier.")
@click.option(
    "--by",
    "--slice",
    "slices",
    multiple=True,
    metavar="COLUMN",
    help="Evaluate by this column too. unseen-ad, history-length and day are always done where the file has them.",
)
@click.option(
    "--weight", type=click.Choice(["impressions", "clicks", "users"]), help="What a user's AUC counts with; users: 1."
)
@click.option("--baseline", metavar="NAME|FILE", help="File that gains and R-GAUC are against.")
@click.option(
    "--compare", multiple=True, metavar="BETTER,WORSE,...|all", help="Compare files, paired: each with those after it."
)
@click.option(
    "--compat",
    multiple=True,
    type=click.Choice(list(get_args(Program))),
    help="Give the GAUC that this program would print, too.",
)
@click.option("--bootstrap", type=click.IntRange(min=0), help="Resamples of users, at least 2; 0: no intervals.")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Of the resamples.")
@path_option("--json", "Write metrics.json here.", required=False)
@mlflow_option
@click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="Take [eval] from a recipe.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the recipe.")
def command(
    predictions: tuple[str, ...],
    gauc: bool,
    user: str,
    label: str,
    score: str,
    slices: tuple[str, ...],
    json: Path | None,
    mlflow: str | None,
    recipe_name: str | None,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Compute GAUC and its kin from predictions, ours or anyone's.

    Reads Parquet, CSV or TSV files with a user, a 0/1 label and a score in each row. Prints GAUC with how it
    was computed, AUC, log loss, normalised entropy and calibration, over all and over the slices that the
    columns unseen_ad, history_length and day allow; writes them as JSON with --json. Options override the
    recipe's [eval]. A file is called by its stem, or by its folder if it is a predictions.parquet. Parquet files
    may be larger than memory; with --bootstrap 0, a single one in memory that does not grow with the users either.
    With --mlflow the figures of a predictions.parquet go to the run of the model that lies beside it.

    \b
    ctrkit eval --gauc predictions.csv
    ctrkit eval --gauc scores.tsv --user uid --label clicked --score p --json metrics.json
    ctrkit eval --gauc new.parquet --baseline old.parquet --by country
    ctrkit eval --gauc a=1.parquet b=2.parquet c=3.parquet --compare all --compat recbole
    """
    if flags["bootstrap"] == 1:
        raise UsageError("--bootstrap 1: one resample has no spread; give at least 2, or 0 for no intervals")
    paths = name_files(predictions)
    if flags["baseline"]:
        flags["baseline"] = with_baseline(paths, flags["baseline"])
    if recipe_name is None and sets:
        raise UsageError("--set changes a recipe's keys; give the recipe with --recipe")
    recipe = load(recipe_name, sets=sets) if recipe_name else Recipe(name="eval")
    given = override(recipe, flags, paths)
    settings = given.eval.model_copy(update=among(paths, given.eval, recipe, flags))
    if json is None:
        metrics = evaluate(paths, settings, user=user, label=label, score=score, slices=slices)
    else:
        with provenance.output("eval", given, paths, json) as work:
            metrics = evaluate(paths, settings, user=user, label=label, score=score, slices=slices)
            files.write_json(work.path, metrics)
            work.counts.update({name: v["all"]["impressions"] for name, v in metrics["variants"].items()})
    if mlflow is not None:
        _record(mlflow, given.name, paths, metrics)
    show(metrics, slices)
    if json is not None:
        say(f"eval: {len(paths)} file{'s' if len(paths) > 1 else ''} -> {json}")


def _record(uri: str, experiment: str, paths: dict[str, Path], metrics: dict[str, Any]) -> None:
    """Record each file's metrics at MLflow: in the run of the training that made its model, where that is known, else
    in one of their own."""
    from ctrkit import mlflow_records

    store = mlflow_records.Store(uri, experiment, "eval")
    for name, path in paths.items():
        trained = provenance.read_sidecar(path.with_name("model")).get("counts", {}).get("mlflow run")
        run = mlflow_records.Run(store, name, {}, {"ctrkit.stage": "eval"}, run_id=store.known(trained))
        values = metrics["variants"][name]["all"]
        run.add({f"eval/{key}": value for key, value in values.items() if isinstance(value, int | float)})
        run.end()


def name_files(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return name → path for arguments FILE or NAME=FILE."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path_text = argument.partition("=")
        if not equals or Path(argument).exists():
            path = Path(argument)
            stem = path.name.split(".")[0]
            name = path.resolve().parent.name if stem == "predictions" else stem
        else:
            path = Path(path_text)
        if not name:
            raise UsageError(f"{argument!r} gives its file no name: write NAME=FILE")
        if name in paths:
            raise UsageError(
                f"{paths[name]} and {path} are both called {name!r}. Name them: NAME={paths[name]} OTHER={path}"
            )
        paths[name] = path
    return paths


def with_baseline(paths: dict[str, Path], baseline: str) -> str:
    """Return the baseline's name; where it is a file that is not among the paths, it joins them."""
    if baseline in paths:
        return baseline
    path = Path(baseline)
    for name, known in paths.items():
        if known == path or (known.exists() and path.exists() and known.samefile(path)):
            return name
    if not (path.is_file() or "=" in baseline):
        if len(path.parts) > 1 or set(path.suffixes) & {".parquet", *SEPARATORS}:
            raise UsageError(f"--baseline {baseline!r}: there is no such file{nearest(baseline, paths)}")
        return baseline  # a name, perhaps of the recipe's variants
    ((name, path),) = name_files((baseline,)).items()
    if name in paths:
        raise UsageError(f"{paths[name]} and {path} are both called {name!r}. Name them: --baseline OTHER={path}")
    paths[name] = path
    return name


def override(recipe: Recipe, flags: dict[str, Any], paths: dict[str, Path]) -> Recipe:
    """Return the recipe with the options that were given laid over its [eval]."""
    given = {k: v for k, v in flags.items() if v not in (None, ())}
    if "compare" in given:
        pairs: list[tuple[str, ...]] = []
        for text in given["compare"]:
            names = tuple(paths) if text == "all" and "all" not in paths else tuple(text.split(","))
            if len(names) < 2 or not all(names):
                raise UsageError(f"--compare {text!r} is not of the form BETTER,WORSE, and there must be two files")
            pairs += combinations(names, 2)
        given["compare"] = tuple(dict.fromkeys(pairs))
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=given)})


def among(paths: dict[str, Path], settings: Eval, recipe: Recipe, flags: dict[str, Any]) -> dict[str, Any]:
    """Return baseline and comparisons that the files at hand allow.

    A variant of the recipe that is not evaluated this time drops out with a word; any other name is an error.
    """

    def here(name: str, option: str) -> bool:
        if name in paths:
            return True
        if not flags[option] and name in recipe.variants:
            say(f"eval: no file of variant {name!r}, so [eval] {option} leaves it out")
            return False
        raise UsageError(f"{option} {name!r} is none of the files{nearest(name, paths)}")

    baseline = settings.baseline if settings.baseline and here(settings.baseline, "baseline") else ""
    for better, worse in settings.compare:
        if better == worse:
            raise UsageError(f"compare {better!r} with itself: name each file once")
    compare = tuple(pair for pair in settings.compare if all(here(name, "compare") for name in pair))
    return {"baseline": baseline, "compare": compare}


def show(metrics: dict[str, Any], by: tuple[str, ...] = ()) -> None:
    """Print the statement of every GAUC, then the tables. `by`: the columns that slices were asked for by."""
    starts = tuple(f"{ {'unseen-ad': 'unseen_ad', 'history-length': 'history'}.get(column, column) }=" for column in by)
    asked = [s for s in metrics["order"]["slices"] if s.startswith(starts)]
    shown = [s for s in metrics["order"]["slices"] if s in asked or not s.startswith("day=")]
    out = console()
    for line in statement(metrics):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print()
    out.print(overall_table(metrics))
    if metrics["settings"].get("compat"):
        out.print()
        out.print(compat_table(metrics))
    if shown:
        for table in slice_tables(metrics, shown):
            out.print()
            out.print(table)
    if metrics["comparisons"]:
        out.print()
        out.print(comparison_table(metrics, "all", "unseen_ad=true", *asked))
    out.print()
    out.print(computed_how(metrics), markup=False, highlight=False, soft_wrap=True)
