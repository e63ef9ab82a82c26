"""Turn raw impression and click logs into samples and vocabularies."""

from pathlib import Path

import click

from ctrkit import counts, provenance
from ctrkit.convert import convert
from ctrkit.options import path_option, recipe_options
from ctrkit.recipe import Recipe
from ctrkit.sources import raw_inputs


@click.command("convert")
@recipe_options
@path_option("--raw", "Folder of the raw logs.")
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, raw: Path, out: Path) -> None:
    """Turn raw impression and click logs into samples and vocabularies.

    Reads the tables of the recipe's [convert] (impressions; clicks, behaviours, users, ads, goods where there are)
    below --raw: CSV, TSV, JSONL or Parquet, also .gz or .zst.

    Writes OUT/samples/day=*/part-*.parquet (one row an impression), OUT/vocab/NAME.parquet (from training days
    only), OUT/split.json (which days train, validate and test) and OUT/rejects.parquet (bad rows and why).

    \b
    ctrkit convert --recipe demo --raw runs/demo/raw --out runs/demo/convert
    """
    with provenance.output("convert", recipe, raw_inputs(recipe, raw), out) as work:
        work.path.mkdir()
        work.counts = convert(recipe, raw, work.path)
    counts.show(f"convert: {recipe.name}", work.counts, _identity(work.counts))


def _identity(found: dict[str, int]) -> dict[str, str]:
    """Show where every impression row went."""
    read, rejected = found["impressions read"], found["impressions rejected"]
    dropped, samples = found["duplicate impressions dropped"], found["samples"]
    sign = "=" if read == samples + rejected + dropped else "≠"
    return {
        "impressions read": f"{sign} {samples:,} samples + {rejected:,} rejects + {dropped:,} duplicates",
        "clicks among samples": f"{found['clicks among samples'] / samples:.2%} of samples",
    }
