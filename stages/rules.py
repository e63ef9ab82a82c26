"""Write the Make rules of a recipe.

Reads the recipe and the outputs that are there. Writes `OUT/.NAME.mk` and prints its path.
"""

from pathlib import Path

import click

from ctrkit import files, pipeline
from ctrkit.options import path_option

COMMAND = "$(CTRKIT)"


@click.command("rules")
@click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe's name, or a file.")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key.")
@path_option("--raw", "Folder of raw data; leave out where the recipe simulates its own.", required=False)
@click.option("--weights", help="Weights for extract-images: a state dict's path, `published` or `random`.")
@path_option("--out", "Folder of all runs.")
@path_option("--stamp", "Only say, by a stamp file's time, whether this output has to be made again.", required=False)
def command(
    recipe: str, sets: tuple[str, ...], raw: Path | None, weights: str | None, out: Path, stamp: Path | None
) -> None:
    """Write the Make rules of a recipe (used by the Makefile).

    Works out which stage makes which file for every variant, and which of them are stale: by the content of
    inputs, recipe tables and code, never by time. Prints the path of the rules file.

    \b
    make -f "$(ctrkit rules --recipe demo --out runs)" CTRKIT=ctrkit all
    """
    graph = pipeline.Graph(pipeline.Setting(recipe, raw, weights, sets, out))
    if stamp is None:
        path = out / f".{graph.home.name}.mk"
        files.write_text(path, pipeline.make_rules(graph, COMMAND))
        click.echo(path)
    else:
        step = next(s for s in graph.steps if s.output == stamp)
        pipeline.settle(step, graph.is_fresh(step))
