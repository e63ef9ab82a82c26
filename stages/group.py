"""Store common features once per user and day."""

import time
from pathlib import Path

import click

from ctrkit import counts, provenance
from ctrkit.engine import engine, start_early
from ctrkit.errors import UserError
from ctrkit.facts import partitions_of, read_facts
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe


@click.command("group")
@recipe_options
@path_option("--convert", "What ctrkit convert wrote.")
@path_option("--behaviours", "What ctrkit select-clicks wrote.", required=False)
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, convert: Path, behaviours: Path | None, out: Path) -> None:
    """Store common features once per user and day.

    Reads CONVERT/samples, CONVERT/vocab and CONVERT/split.json, and the behaviours of each user and day (not needed
    by a recipe without behaviour features).

    Writes OUT/train, OUT/valid and OUT/test (one row a user and day, training rows shuffled), OUT/counts (training
    samples that contain each id) and OUT/schema.json.

    \b
    ctrkit group --recipe demo --convert runs/demo/convert --behaviours runs/demo/behaviours --out runs/demo/groups
    """
    started = time.monotonic()
    _check_features(recipe, convert, behaviours)
    parts = partitions_of(convert) if provenance.will_work() else 0
    with start_early(recipe.engine, recipe.workers, parts, ("ctrkit.grouping", "ctrkit.compiled_counts")) as pool:
        from ctrkit.grouping import SPLITS, group

        with provenance.output("group", recipe, {"convert": convert, "behaviours": behaviours}, out) as work:
            if behaviours is not None:
                _check_made_from(behaviours, convert, work.inputs["convert"])
            small = read_facts(convert)["partitions"] == 1
            with engine(recipe.engine, recipe.workers, work.parts, small=small, pool=pool) as tasks:
                work.counts = group(recipe, convert, behaviours, work.begin(), tasks)
            work.end()
    found = work.counts
    notes = {
        f"{part} samples": f"{found[f'{part} samples'] / found[f'{part} groups']:.1f} a group"
        for part in SPLITS
        if found.get(f"{part} groups")
    }
    if "bytes of some groups" in found:
        ratio = found["bytes of their samples ungrouped"] / found["bytes of some groups"]
        notes["bytes of some groups"] = f"{_size(ratio)} than ungrouped, in random order"
    counts.show(f"group: {recipe.name}", found, notes)
    samples = sum(found.get(f"{part} samples", 0) for part in SPLITS)
    say(f"group: {samples:,} samples, {samples / (time.monotonic() - started):,.0f} a second")


def _size(ratio: float) -> str:
    """Say how many times smaller grouped samples are than ungrouped ones, or larger."""
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"


def _check_features(recipe: Recipe, convert: Path, behaviours: Path | None) -> None:
    """Refuse samples and behaviours that were made with other [features]."""
    if behaviours is not None:
        if not behaviours.is_dir():
            raise UserError(f"{behaviours} is not there; make it with ctrkit select-clicks")
        provenance.check_features(recipe, [n for n, f in recipe.features.items() if f.of == "behaviour"], behaviours)
    provenance.check_features(recipe, [n for n, f in recipe.features.items() if f.of != "behaviour"], convert)


def _check_made_from(behaviours: Path, convert: Path, digest: str) -> None:
    """Refuse behaviours whose sidecar says that they were encoded with another vocabulary."""
    if provenance.read_sidecar(behaviours).get("inputs", {}).get("convert", digest) != digest:
        raise UserError(
            f"{behaviours} was made from another {convert} than the one that is there now, so its indexes may mean "
            f"something else; run ctrkit select-clicks again"
        )
