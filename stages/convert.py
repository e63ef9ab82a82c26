"""Turn raw impression and click logs into samples and vocabularies."""

import datetime
from collections.abc import Iterable
from pathlib import Path

import click

from ctrkit import counts, provenance
from ctrkit.engine import engine, start_early
from ctrkit.options import DAY, path_option, recipe_options
from ctrkit.recipe import Recipe
from ctrkit.sources import SOURCES, for_day, raw_inputs

TASK_BYTES = 32 << 20
"""Of logs: at least a task to scan."""


@click.command("convert")
@recipe_options
@path_option("--raw", "Folder of the raw logs.")
@path_option("--out", "Folder to write.")
@path_option("--extend", "What ctrkit convert wrote on an earlier day: read today's rows only.", required=False)
@click.option("--today", type=DAY, help="Leave out later days, and those before the window.")
def command(recipe: Recipe, raw: Path, out: Path, extend: Path | None, today: datetime.datetime | None) -> None:
    """Turn raw impression and click logs into samples and vocabularies.

    Reads the tables of the recipe's [convert] (impressions; clicks, behaviours, users, ads, goods where there are)
    below --raw or from URLs: CSV, TSV, JSONL or Parquet, also .gz or .zst. Big files are read in pieces, side by side.

    Writes OUT/samples/day=*/part-*.parquet (one row an impression), OUT/behaviours/day=*/part-*.arrow (the log of
    behaviours), OUT/vocab/NAME.parquet (from training days only), OUT/split.json (which days train, validate and
    test) and OUT/rejects.parquet (every row that was not used, and why).

    With --today, only days up to it and in the window of [daily] are used; with --extend as well, only today's rows are
    read, earlier days are taken over, and the vocabularies grow without moving an index.

    \b
    ctrkit convert --recipe demo --raw runs/demo/raw --out runs/demo/convert
    """
    day = today.date() if today else None
    recipe = for_day(recipe, day if extend else None)
    inputs = {**raw_inputs(recipe, raw), "previous": extend}
    modules = ("ctrkit.convert", "ctrkit.compiled", "ctrkit.compiled_take")
    with (
        start_early(recipe.engine, recipe.workers, _pieces(inputs.values()), modules) as pool,
        provenance.output("convert", recipe, inputs, out, {"today": str(day)} if day else None) as work,
    ):
        from ctrkit.convert import SMALL_BYTES, convert, input_bytes
        from ctrkit.tables import open_tables

        tables = open_tables(recipe, raw, *SOURCES)
        small = input_bytes(recipe, tables) < SMALL_BYTES
        with engine(recipe.engine, recipe.workers, work.parts, small=small, pool=pool) as tasks:
            work.counts = convert(recipe, tables, work.begin(), tasks, day, extend)
        work.end()
    notes = _identity(work.counts)
    if extend is not None:
        notes["duplicate impressions dropped"] = "found among the rows of the day alone"
    counts.show(f"convert: {recipe.name}", work.counts, notes)


def _pieces(inputs: Iterable[Path | None]) -> int:
    """Return about how many pieces there will be to scan; 0 if that is not sure to happen."""
    if not provenance.will_work():
        return 0
    return sum(path.stat().st_size for path in inputs if path is not None and path.is_file()) // TASK_BYTES


def _identity(found: dict[str, int]) -> dict[str, str]:
    """Show where every impression row went."""
    ends = {
        "samples": found["samples"],
        "rejects": found["impressions rejected"],
        "duplicates": found["duplicate impressions dropped"],
        "dropped negatives": found.get("dropped negatives", 0),
    }
    begun = found["impressions read"] + found.get("sampled negatives", 0)
    sign = "=" if begun == sum(ends.values()) else "≠"
    sampled = f"(+ {found['sampled negatives']:,} sampled negatives) " if "sampled negatives" in found else ""
    return {
        "impressions read": sampled + sign + " " + " + ".join(f"{n:,} {what}" for what, n in ends.items()),
        "clicks among samples": f"{found['clicks among samples'] / max(found['samples'], 1):.2%} of samples",
    }
