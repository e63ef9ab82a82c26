"""Write the Make rules of a recipe.

Reads the recipe and the outputs that are there. Writes `OUT/.NAME.mk` and prints its path.
"""

import datetime
from pathlib import Path

import click

from ctrkit import pipeline
from ctrkit.options import DAY, path_option


@click.command("rules")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe's name, or a file.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key.")
@path_option("--raw", "Folder of raw data; leave out where the recipe simulates its own.", required=False)
@click.option("--weights", help="Weights for extract-images: a state dict's path, `published` or `random`.")
@click.option("--today", type=DAY, help="Convert this day on top of the last one; outputs go to OUT/NAME/days/DAY/.")
@click.option("--from", "since", type=DAY, help="Days from this one to --to, each from the model of the day before.")
@click.option("--to", "until", type=DAY, help="The last of these days. Default: the first.")
@click.option("--tables", is_flag=True, help="Plan the papers' tables too, and the variants that only they need.")
@path_option("--out", "Folder of all runs.")
def command(
    recipe: str,
    sets: tuple[str, ...],
    raw: Path | None,
    weights: str | None,
    today: datetime.datetime | None,
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    tables: bool,
    out: Path,
) -> None:
    """Write the Make rules of a recipe (used by the Makefile).

    Reads the recipe, and what is below --out. Works out which stage makes which file for every variant, and which of
    them are stale: by the content of inputs, recipe tables and code, never by time. Writes OUT/.NAME.mk and prints
    that path.

    \b
    make -f "$(ctrkit rules --recipe demo --out runs)" CTRKIT=ctrkit all
    """
    graph = pipeline.Graph(
        pipeline.Setting(
            recipe,
            raw,
            weights,
            sets,
            out,
            today.date() if today else None,
            tables=tables,
            since=since.date() if since else None,
            until=until.date() if until else None,
        )
    )
    click.echo(pipeline.write_rules(graph, "$(CTRKIT)"))
