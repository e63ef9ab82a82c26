"""Say what is wrong with a recipe's inputs, and what its stages will need."""

import shutil
import tempfile
from pathlib import Path

import click
from rich.table import Table

from ctrkit import checking, estimates
from ctrkit.checking import Findings, Inputs
from ctrkit.estimates import Estimate, Pictures
from ctrkit.options import path_option
from ctrkit.progress import console
from ctrkit.recipe import Recipe, load


@click.command("check")
@click.argument("recipe")
@path_option("--raw", "Folder of the raw logs.")
@click.option("--variant", metavar="NAME", help="Only this variant of the recipe, not all that a run makes.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key.")
@path_option("--out", "Folder of all runs, whose disk must have room.", required=False, default=Path("runs"))
def command(recipe: str, raw: Path, variant: str | None, sets: tuple[str, ...], out: Path) -> None:
    """Say what is wrong with the inputs, and what each stage will need.

    Reads the recipe and, of the raw logs, at most some 100,000 rows a table in windows from the beginning to the end;
    tries convert, select-clicks and group on them. Tells all errors (a stage would fail, or nothing could be learned)
    and warnings (rows that will be dropped, likely mistakes), then the time and disk of each stage, estimated.

    Writes nothing. The exit code is 1 where there is an error.

    \b
    ctrkit check demo --raw runs/demo/raw
    ctrkit check shop.toml --raw logs --set convert.time_unit=ms
    """
    base = load(recipe, variant, sets)
    named = [name for name in base.variants if not base.is_extra(name)] if variant is None else []
    variants = {name: load(recipe, name, sets) for name in named} or {variant or base.name: base}
    found = Findings()
    inputs = checking.look(base, raw, found)
    needed = _try(base, variants, raw, inputs, found)
    if needed is not None:
        _check_disk(needed, out, found)
    for text in found.errors:
        click.echo(f"error: {text}")
    for text in found.warnings:
        click.echo(f"warning: {text}")
    if inputs.seen:
        console().print(_inputs_table(base, inputs))
    if needed is not None:
        console().print(_stages_table(needed))
        click.echo(
            f"Figures are estimates from the sample; train, predict and eval from constants of two cores. Disk in all: "
            f"{_bytes(needed.disk)}. Peak memory of the data stages: about {_bytes(needed.memory)} ({needed.workers} "
            f"worker{'s' * (needed.workers != 1)}, {needed.partitions} partition{'s' * (needed.partitions != 1)} of "
            f"users; less with fewer workers or more convert.partitions)."
        )
    else:
        click.echo("No estimate of time and disk while there are errors that convert would stop at.")
    click.echo(f"check: {_plural(len(found.errors), 'error')}, {_plural(len(found.warnings), 'warning')}")
    if found.errors:
        click.get_current_context().exit(1)


def _try(recipe: Recipe, variants: dict[str, Recipe], raw: Path, inputs: Inputs, found: Findings) -> Estimate | None:
    """Try the stages on the sample, unless what was found would stop them."""
    if not inputs.usable:
        return None
    with tempfile.TemporaryDirectory(prefix="ctrkit-check-") as folder, found.catching():
        trial = estimates.attempt(recipe, inputs, Path(folder))
        checking.check_counts(trial.counts["convert"], inputs, found)
        checking.check_features(recipe, trial.encoded, found)
        pictures = Pictures()
        if trial.images and recipe.import_features.files:
            with found.catching():
                pictures = Pictures(0.0, checking.width_of_vectors(recipe, raw))
        elif trial.images:
            decoding = 0.0
            if checking.are_pictures_there(recipe, raw):
                with found.catching():
                    decoding = checking.check_pictures(recipe, raw, trial.images, found)
            if any(one.train.looks_at_pictures for one in variants.values()):
                with found.catching():
                    pictures = estimates.time_network(recipe.extract_images, decoding)
        return estimates.estimate(recipe, variants, inputs, trial, pictures)
    return None


def _check_disk(needed: Estimate, out: Path, found: Findings) -> None:
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed.disk:
        found.error(
            f"the disk of {there} has {_bytes(free)} free, and about {_bytes(needed.disk)} are needed; make room, or "
            f"name another folder with --out"
        )


def _inputs_table(recipe: Recipe, inputs: Inputs) -> Table:
    table = Table(title=f"check: inputs of {recipe.name}", title_justify="left")
    for column in ("table", "files", "rows", "sampled", "rejected"):
        table.add_column(column, justify="left" if column == "table" else "right")
    for name, seen in inputs.seen.items():
        taken = seen.sample
        how = "" if taken.counted else "about "
        rejected = f"{seen.bad.height / max(taken.frame.height, 1):.2%}" if taken.frame.height else ""
        table.add_row(name, f"{len(taken.table.files):,}", f"{how}{taken.rows_in_all:,}", f"{taken.rows:,}", rejected)
    return table


def _stages_table(needed: Estimate) -> Table:
    table = Table(title="check: what the stages need (estimates)", title_justify="left")
    for column in ("stage", "rows", "time", "disk", "disk while it runs"):
        table.add_column(column, justify="left" if column in ("stage", "rows") else "right")
    for stage in needed.stages:
        more = f"+ {_bytes(stage.temporary)}" if stage.temporary else ""
        table.add_row(stage.name, stage.amount, _time(stage.seconds), _bytes(stage.size), more)
    return table


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
