"""Lay the metrics of several runs side by side.

Reads the metrics.json of each. Prints a table; writes it as one HTML page if asked.
"""

from pathlib import Path

import click

from ctrkit import files
from ctrkit.errors import UsageError, UserError
from ctrkit.options import path_option
from ctrkit.progress import console, say
from ctrkit.run_comparison import ALL, compare, metrics_path, page, table


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@click.option("--slice", "slice_name", default=ALL, show_default=True, metavar="SLICE", help="Over these impressions.")
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Only this variant; may be repeated.")
@path_option("--html", "Write the table here, as a page of its own.", required=False)
def command(runs: tuple[str, ...], slice_name: str, variants: tuple[str, ...], html: Path | None) -> None:
    """Lay the metrics of several runs side by side.

    Reads the metrics.json of each run: a folder that has one, or the file itself. Prints each variant's GAUC
    and other metrics in all runs, the difference from its first run, and where runs cannot be compared, since
    users count differently or the impressions are others. Writes one HTML page with --html.

    \b
    ctrkit compare runs/monday runs/tuesday
    ctrkit compare before=a/metrics.json after=b/metrics.json --slice unseen_ad=true --html compare.html
    """
    paths = name_runs(runs)
    for name, path in paths.items():
        if html is not None and html.exists() and path.samefile(html):
            raise UserError(f"{html} is an input ({name}) and would be written over; name another output")
    made = compare(paths, slice_name, variants)
    if html is not None:
        files.write_text(html, page(made, list(paths)))
    out = console()
    out.print(table(made))
    out.print()
    for note in made.notes:
        out.print(note, markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        say(f"compare: {len(paths)} run{'s' if len(paths) > 1 else ''} -> {html}")


def name_runs(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return name → metrics.json for arguments RUN or NAME=RUN; a run is called as its folder."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        named = equals and not Path(argument).exists()
        path = metrics_path(Path(text if named else argument))
        if not named:
            name = path.resolve().parent.name if path.name == "metrics.json" else path.name.split(".")[0]
        if not name:
            raise UsageError(f"{argument!r} gives its run no name: write NAME=RUN")
        if name in paths:
            raise UsageError(f"{paths[name]} and {path} are both called {name!r}. Name them: NAME={path}")
        paths[name] = path
    return paths
