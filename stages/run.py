"""Run a recipe from raw data to report, through Make.

Reads the recipe and its raw data. Writes everything under `OUT/NAME/`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

import ctrkit
from ctrkit.errors import UserError
from ctrkit.options import path_option


@click.command("run")
@click.argument("recipe", default="demo")
@click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key.")
@path_option("--raw", "Folder of raw data; leave out where the recipe simulates its own.", required=False)
@click.option("--weights", help="Weights for extract-images: a state dict's path, `published` or `random`.")
@path_option("--out", "Folder of all runs.", default="runs", show_default=True)
@click.option("-j", "--jobs", default=min(2, os.cpu_count() or 1), show_default=True, help="Steps made side by side.")
@click.option("--target", default="all", show_default=True, help="What to make: a stage's name, or a file.")
def command(
    recipe: str,
    sets: tuple[str, ...],
    raw: Path | None,
    weights: str | None,
    out: Path,
    jobs: int,
    target: str,
) -> None:
    """Run a recipe from raw data to report, through Make.

    Only what changed is made again. RECIPE is a shipped recipe's name (demo, movielens) or a file.

    \b
    ctrkit run demo
    ctrkit run demo --set train.epochs=3
    ctrkit run movielens --raw ml-latest-small --weights squeezenet1_1.pth
    """
    make = shutil.which("make")
    if make is None:
        raise UserError("`ctrkit run` works through GNU Make, and there is no `make` on the PATH: install it")
    words = [
        make,
        "-f",
        str(Path(ctrkit.__file__).parent / "pipeline.mk"),
        f"-j{jobs}",
        "--no-print-directory",
    ]
    words += [f"CTRKIT={sys.executable} -m ctrkit", f"DATA={recipe}", f"OUT={out}"]
    words += [f"RAW={raw}"] if raw else []
    words += [f"WEIGHTS={weights}"] if weights else []
    for text in sets:
        if any(c.isspace() for c in text):
            raise UserError(f"--set {text!r}: leave out the blanks, since Make splits at them")
    words += [f"SET={' '.join(sets)}"] if sets else []
    sys.exit(subprocess.run([*words, target], check=False).returncode)
