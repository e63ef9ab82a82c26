"""Put variants beside the papers' tables and figures.

Reads predictions and models of a recipe's variants. Writes a folder: tables.md, tables.html, tables.json, and a PNG and
a CSV file a figure.
"""

from pathlib import Path

import click

from ctrkit import files, provenance
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.metric_tables import text_table
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import console, say
from ctrkit.recipe import Recipe


@click.command("tables")
@recipe_options
@click.option("--predictions", multiple=True, metavar="NAME=FILE", help="A variant's predictions.parquet.")
@click.option("--model", "models", multiple=True, metavar="NAME=DIR", help="A variant's model directory, for curves.")
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, predictions: tuple[str, ...], models: tuple[str, ...], out: Path) -> None:
    """Put variants beside the papers' tables and figures.

    Reads the recipe's [tables] and [curves], the predictions of the tables' variants and the models of the curves'.
    Writes a folder: tables.md, tables.html and tables.json with GAUC, gain and R-GAUC, each with a 95% interval, beside
    the paper's own, and whether the direction of each difference agrees; a PNG and a CSV of each figure's curves.
    `make tables DATA=demo` makes all that goes into it.

    \b
    ctrkit tables --recipe demo --predictions din=runs/demo/din/predictions.parquet \\
        --model din=runs/demo/din/model --out runs/demo/tables
    """
    if not recipe.paper_tables and not recipe.curves:
        raise UsageError(f"recipe {recipe.name!r} has neither [tables.NAME] nor [curves.NAME], so there is no table")
    scored, trained = named("--predictions", predictions), named("--model", models)
    wanted = [("--predictions", row.variant, scored) for t in recipe.paper_tables.values() for row in t.rows]
    wanted += [("--model", row.variant, trained) for c in recipe.curves.values() for row in c.rows]
    for option, given in (("--predictions", scored), ("--model", trained)):
        for variant in given:
            if variant not in recipe.variants:
                known = nearest(variant, recipe.variants)
                raise UsageError(f"{option} {variant}=…: recipe {recipe.name!r} has no variant {variant!r}{known}")
    for option, variant, given in wanted:
        if variant not in given:
            raise UserError(f"the tables of recipe {recipe.name!r} need variant {variant!r}: give {option} {variant}=…")
    inputs = {f"predictions {name}": path for name, path in scored.items()}
    inputs |= {f"model {name}": path for name, path in trained.items()}
    with provenance.output("tables", recipe, inputs, out) as work:
        from ctrkit import curves, paper_tables

        work.path.mkdir()
        tables = {
            name: paper_tables.make_table(table, scored, recipe.eval) for name, table in recipe.paper_tables.items()
        }
        figures = {name: curves.make_curves(name, figure, trained, work.path) for name, figure in recipe.curves.items()}
        files.write_json(work.path / "tables.json", {"tables": tables, "curves": figures})
        page = paper_tables.html(recipe, tables, figures, work.path)
        (work.path / "tables.html").write_text(page, encoding="utf-8")
        text = paper_tables.markdown(recipe, tables, figures)
        (work.path / "tables.md").write_text(text, encoding="utf-8")
        work.counts.update(tables=len(tables), curves=len(figures))
    shown = console()
    for table in tables.values():
        shown.print(text_table(table["title"], *paper_tables.cells(table)))
        if table["comparisons"]:
            shown.print(text_table("", *paper_tables.comparison_cells(table)))
    for figure in figures.values():
        for said in figure["reach"]:
            say(f"tables: {said['text']}")
    say(f"tables: {len(tables)} tables and {len(figures)} figures -> {out / 'tables.html'}")


def named(option: str, arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return name → path for arguments NAME=PATH."""
    out: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"{option} {argument!r} is not of the form VARIANT=PATH")
        if name in out:
            raise UsageError(f"{option} names {name!r} twice")
        out[name] = Path(path)
    return out
