"""Put days, each trained from the day before, into one table.

Reads predictions, models and conversions of several days. Writes a folder: daily.json and daily.md.
"""

from pathlib import Path

import click

from ctrkit import files, provenance
from ctrkit.metric_tables import text_table
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import console, say
from ctrkit.recipe import Recipe

PLACE = click.Path(path_type=Path)


@click.command("daily")
@recipe_options
@click.option(
    "--tested",
    type=(str, str, PLACE, PLACE),
    multiple=True,
    required=True,
    metavar="DAY NAME DIR CONVERT",
    help="A variant on a day: the folder of its model and predictions.parquet, and of the day's conversion.",
)
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, tested: tuple[tuple[str, str, Path, Path], ...], out: Path) -> None:
    """Put days, each trained from the day before, into one table.

    Reads the predictions, the models and the conversions of each day and variant. Writes a folder, daily.json and
    daily.md: GAUC with its interval, impressions, what each model was trained on, the ids that the day brought, and,
    where a variant was trained from scratch too, the paired difference. `make daily FROM=… TO=…` or `ctrkit run
    --from … --to …` makes all that goes into it.

    \b
    ctrkit daily --recipe demo --out runs/demo/daily \\
        --tested 2024-03-06 din runs/demo/by-day/2024-03-06/din runs/demo/by-day/2024-03-06/convert
    """
    inputs = {f"predictions {day} {name}": folder / "predictions.parquet" for day, name, folder, _ in tested}
    inputs |= {f"model {day} {name}": folder / "model" for day, name, folder, _ in tested}
    inputs |= {f"conversion {day} {name}": convert for day, name, _, convert in tested}
    with provenance.output("daily", recipe, inputs, out) as work:
        from ctrkit import day_table

        table = day_table.make_table(recipe, [day_table.Tested(*one) for one in tested])
        work.path.mkdir()
        files.write_json(work.path / "daily.json", table)
        (work.path / "daily.md").write_text(day_table.markdown(recipe, table), encoding="utf-8")
        work.counts.update(rows=len(table["rows"]))
    console().print(text_table(f"{recipe.name}, day by day", day_table.HEADS, day_table.cells(table)))
    for said in day_table.further(table):
        say(f"daily: {said}")
    say(f"daily: {len(table['rows'])} rows -> {out / 'daily.md'}")
