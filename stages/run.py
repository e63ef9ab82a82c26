"""Run a recipe from raw data to report, through Make.

Reads the recipe and its raw data. Writes everything under `OUT/NAME/`.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import click

import ctrkit
from ctrkit import pipeline
from ctrkit.errors import UserError
from ctrkit.options import path_option, setting_options


@click.command("run")
@click.argument("recipe", default="demo")
@setting_options
@path_option("--out", "Folder of all runs.", default="runs", show_default=True)
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Steps made side by side.")
@click.option("--target", default="all", show_default=True, help="What to make: a stage, or an output's path.")
def command(
    recipe: str,
    asked: dict[str, Any],
    out: Path,
    jobs: int,
    target: str,
) -> None:
    """Run a recipe from raw data to report, through Make.

    Reads the recipe and its raw data. Writes everything below OUT/NAME/, and makes again only what changed. RECIPE
    is a shipped recipe's name (demo, movielens) or a file. With --from and --to: days one after the other, each trained
    from the model of the day before and tested on its own, into one table, OUT/NAME/daily.

    \b
    ctrkit run demo
    ctrkit run demo --set train.epochs=3
    ctrkit run demo --target tables
    ctrkit run demo --target export
    ctrkit run demo --from 2024-03-06 --to 2024-03-08
    ctrkit run movielens --raw ml-latest-small --weights squeezenet1_1.pth
    """
    make = shutil.which("make")
    if make is None:
        raise UserError("`ctrkit run` works through GNU Make, and there is no `make` on the PATH: install it")
    if asked["since"] is not None and target == "all":
        target = "daily"
    path = target not in ("all", *pipeline.OUTPUTS)
    tables, export = path or target == "tables", path or target == "export"
    graph = pipeline.Graph(pipeline.Setting(recipe=recipe, out=out, tables=tables, export=export, **asked))
    target = pipeline.find_target(graph, target)
    package = Path(ctrkit.__file__).parent
    # -P keeps the current folder off Python's path, unless it is where ctrkit lies.
    python = [sys.executable, *([] if package.parent == Path.cwd() else ["-P"]), "-m", "ctrkit"]
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # this Make is nobody's child
        os.environ.pop(name, None)
    os.environ["CTRKIT_DIGESTS"] = str(out / ".digests.json")
    rules = pipeline.write_rules(graph, shlex.join(python))
    words = [make, "-f", str(package / "pipeline.mk"), f"-j{jobs}", f"OUT={out}", f"CTRKIT_RULES={rules}", target]
    sys.stdout.flush()
    os.execv(make, words)
