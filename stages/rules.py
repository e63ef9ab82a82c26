"""Write the Make rules of a recipe.

Reads the recipe and the outputs that are there. Writes `OUT/.NAME.mk` and prints its path.
"""

from pathlib import Path
from typing import Any

import click

from ctrkit import pipeline
from ctrkit.options import path_option, setting_options


@click.command("rules")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe's name, or a file.")
@setting_options
@click.option("--tables", is_flag=True, help="Plan the papers' tables too, and the variants that only they need.")
@click.option("--export", is_flag=True, help="Plan the export of the models too.")
@path_option("--out", "Folder of all runs.")
def command(
    recipe: str,
    asked: dict[str, Any],
    tables: bool,
    export: bool,
    out: Path,
) -> None:
    """Write the Make rules of a recipe (used by the Makefile).

    Reads the recipe, and what is below --out. Works out which stage makes which file for every variant, and which of
    them are stale: by the content of inputs, recipe tables and code, never by time. Writes OUT/.NAME.mk and prints
    that path.

    \b
    make -f "$(ctrkit rules --recipe demo --out runs)" CTRKIT=ctrkit all
    """
    graph = pipeline.Graph(pipeline.Setting(recipe=recipe, out=out, tables=tables, export=export, **asked))
    click.echo(pipeline.write_rules(graph, "$(CTRKIT)"))
