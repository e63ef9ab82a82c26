"""Write the demo shop: raw logs and pictures with known answers.

Reads the recipe's `[simulate]` table. Writes a folder of CSV logs and `pictures/`.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe


@click.command("simulate")
@recipe_options
@path_option("--out", "Folder to write: CSV logs and pictures/.")
def command(recipe: Recipe, out: Path) -> None:
    """Write the demo shop: raw logs and pictures with known answers.

    Reads the recipe's [simulate] table. Writes impressions.csv, clicks.csv, behaviours.csv, users.csv, ads.csv,
    goods.csv, pictures/ and truth.parquet (the true click probabilities, which no other stage reads).

    \b
    ctrkit simulate --recipe demo --out runs/demo/raw
    ctrkit simulate --recipe demo --set simulate.picture_signal=0 --out runs/null/raw
    """
    if recipe.simulate is None:
        raise UsageError(f"recipe {recipe.name!r} has no [simulate] table; give its raw data with --raw instead")
    with provenance.output("simulate", recipe, {}, out) as work:
        from ctrkit.world import simulate

        work.counts.update(simulate(recipe.simulate, work.path))
    counts = ", ".join(f"{n:,} {name}" for name, n in work.counts.items())
    say(f"simulate: {counts} -> {out} (simulated data)")
