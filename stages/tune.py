"""Search a recipe's settings for the best validation GAUC.

Reads the recipe and its raw data. Writes a study and what it comes to below `OUT/NAME/tune`.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctrkit.errors import UsageError, UserError
from ctrkit.options import FiniteRange, mlflow_option, path_option
from ctrkit.progress import console, say

if TYPE_CHECKING:
    from ctrkit.trials import Worker


@click.command("tune")
@click.argument("recipe")
@click.option("--variant", metavar="NAME", help="Search around this variant of the recipe.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key.")
@path_option("--raw", "Folder of raw data; leave out where the recipe simulates its own.", required=False)
@click.option("--weights", help="Weights for extract-images: a state dict's path, `published` or `random`.")
@click.option("--trials", type=click.IntRange(min=1), help="Trials in all. Default: the recipe's.")
@click.option("--timeout", type=FiniteRange(0, 1e6), metavar="MINUTES", help="Begin no trial after that; 0: never.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes that share them.")
@click.option("--keep-models", is_flag=True, help="Keep the models and data steps of all trials, not of the best only.")
@mlflow_option
@path_option("--out", "Folder of all runs.", default=Path("runs"), show_default=True)
def command(
    recipe: str,
    variant: str | None,
    sets: tuple[str, ...],
    raw: Path | None,
    weights: str | None,
    trials: int | None,
    timeout: float | None,
    workers: int,
    keep_models: bool,
    mlflow: str | None,
    out: Path,
) -> None:
    """Search a recipe's settings for the best validation GAUC.

    Reads the recipe, whose [tune] says which keys may be what, and its raw data, through the same steps as a run: what
    a trial does not change is made once. The first trial is the recipe as it stands. The test days are not looked at.

    Writes OUT/NAME/tune (OUT/NAME/VARIANT/tune): study.db (Optuna's, SQLite), trials.csv, history.png,
    importance.png, best.toml, a recipe that `make` and `ctrkit run` take, and trials/, with TensorBoard's curves of
    each trial and the model of the best. A search that was killed goes on when the same command is run again; that
    command may also be started several times at once, on one machine.

    \b
    ctrkit tune demo
    ctrkit tune shop.toml --raw logs --trials 40 --workers 2
    ctrkit tune demo --variant din --set 'tune.space={"train.tower"=[[200, 80], [64, 32]]}'
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("`ctrkit tune` needs Optuna, which is not installed: pip install 'ctrkit[tune]'")
    from ctrkit import pipeline
    from ctrkit import trials as tuning
    from ctrkit.recipe import load

    asked_tune = load(recipe, variant, sets).tune
    asked = tuning.Asked(
        setting=pipeline.Setting(recipe=recipe, raw=raw, weights=weights, sets=sets, out=out),
        variant=variant,
        trials=trials or asked_tune.trials,
        timeout_minutes=asked_tune.timeout_minutes if timeout is None else timeout,
        keep_models=keep_models,
        mlflow=mlflow,
    )
    worker = tuning.Worker(asked)
    if worker.outside:
        say(
            f"tune: the recipe's own {worker.outside[0]} lies outside of its range or choices, so no trial is the "
            "recipe as it stands"
        )
    code = tuning.work_side_by_side(asked, workers) if workers > 1 else 0
    if code == 0:
        worker.finish()
    _write_results(worker)
    if code:
        click.get_current_context().exit(code)


def _write_results(worker: "Worker") -> None:
    """Write and print what the study comes to."""
    from ctrkit import files, study_results
    from ctrkit.recipe import read

    asked, study, home = worker.asked, worker.study, worker.home
    with study.alone():
        rows, best = study.rows(), study.best()
        keys = [d.key for d in worker.dimensions]
        files.write_text(home / "trials.csv", study_results.as_csv(rows, keys))
        if best is None:
            raise UserError(f"no trial of {home} has come to its end; {home / 'trials.csv'} says what became of each")
        data = read(asked.setting.recipe, asked.variant, asked.setting.sets)
        name = "-".join([data["name"], *([asked.variant] if asked.variant else []), study_results.BEST])
        counted = sum(row.state in ("complete", "pruned", "failed") for row in rows)
        text = study_results.best_recipe(data, name, best, worker.own, counted)
        files.write_text(home / "best.toml", text)
        with files.atomic(home / "history.png") as path:
            study_results.draw_history(rows, path)
        if importances := study.importances():
            complete = sum(row.state == "complete" for row in rows)
            with files.atomic(home / "importance.png") as path:
                study_results.draw_importances(importances, complete, path)
    console().print(study_results.table(f"tune: {name.removesuffix('-' + study_results.BEST)}", rows, keys))
    states = [row.state for row in rows]
    told = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    first = next((row for row in rows if row.notes.get("recipe") and row.state == "complete"), None)
    than = f", the recipe as it is {first.value:.4f}" if first else ""
    say(f"tune: {told}; best validation GAUC {best.value:.4f} (trial {best.number}){than} -> {home / 'best.toml'}")
    worker.record_results(best)
