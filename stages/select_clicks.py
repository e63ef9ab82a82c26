"""Pick each user's typical clicks before each day."""

from pathlib import Path

import click

from ctrkit import counts, provenance
from ctrkit.clicks import select_clicks
from ctrkit.options import path_option, recipe_options
from ctrkit.recipe import Recipe
from ctrkit.sources import raw_inputs


@click.command("select-clicks")
@recipe_options
@path_option("--raw", "Folder of the raw logs.")
@path_option("--convert", "What ctrkit convert wrote.")
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, raw: Path, convert: Path, out: Path) -> None:
    """Pick each user's typical clicks before each day.

    Reads the behaviours and goods of the recipe's [convert] below --raw, and CONVERT/samples and CONVERT/vocab.
    Only behaviours strictly before a day's midnight serve that day's samples; [select-clicks] says how far back,
    how long a visit must be, and how many goods are kept.

    Writes OUT/day=*/part-*.parquet, one row a user and day: the goods picked, oldest first.

    \b
    ctrkit select-clicks --recipe demo --raw runs/demo/raw --convert runs/demo/convert --out runs/demo/behaviours
    """
    inputs = {**raw_inputs(recipe, raw, "behaviours", "goods"), "convert": convert}
    with provenance.output("select-clicks", recipe, inputs, out) as work:
        work.counts = select_clicks(recipe, raw, convert, work.path)
    counts.show(f"select-clicks: {recipe.name}", work.counts, _shares(work.counts))


def _shares(found: dict[str, int]) -> dict[str, str]:
    def share(part: str, of: str, what: str) -> str:
        return f"{found[part] / found[of]:.1%} of {what}" if found[of] else ""

    return {
        "behaviours kept": share("behaviours kept", "behaviours read", "those read"),
        "of these with a history": share("of these with a history", "users and days with samples", "them"),
        "goods picked": share("goods picked", "distinct goods in the windows", "those in the windows"),
    }
