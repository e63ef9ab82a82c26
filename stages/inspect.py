"""Show what is in any file or folder that ctrkit wrote.

Reads the files it is given, and their sidecars. Writes nothing.
"""

from pathlib import Path

import click

from ctrkit.inspection import show
from ctrkit.progress import console


@click.command("inspect")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH…")
def command(paths: tuple[Path, ...]) -> None:
    """Show what is in any file or folder that ctrkit wrote.

    Reads Parquet files and folders of them, features.h5, groups, models, metrics.json and sidecars. Writes
    nothing; prints the schema, the sizes, the first rows and what each thing was made from.

    \b
    ctrkit inspect runs/demo/convert runs/demo/features.h5
    ctrkit inspect runs/demo/full/model
    """
    out = console()
    for path in paths:
        show(path, out)
