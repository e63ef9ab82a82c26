"""Write one HTML file of tables, curves and attention galleries.

Reads metrics.json and, where given, models, predictions, convert/, groups/, features.h5 and pictures. Writes
one HTML file that needs nothing else.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe
from ctrkit.report import Sources, make_report
from ctrkit.sources import picture_inputs


@click.command("report")
@recipe_options
@path_option("--metrics", "metrics.json, from eval.")
@click.option("--model", "models", multiple=True, metavar="NAME=DIR", help="A variant's model directory.")
@click.option("--predictions", multiple=True, metavar="NAME=FILE", help="A variant's predictions.parquet.")
@path_option("--convert", "convert/, for the counts of the data, the gallery and the contact sheet.", required=False)
@path_option("--groups", "groups/, for the gallery.", required=False)
@path_option("--features", "features.h5, for the gallery and the contact sheet.", required=False)
@path_option(
    "--pictures",
    "Where pictures are, as for extract-images, for gallery and contact sheet.",
    required=False,
)
@path_option("--out", "HTML file to write.")
def command(
    recipe: Recipe,
    metrics: Path,
    models: tuple[str, ...],
    predictions: tuple[str, ...],
    convert: Path | None,
    groups: Path | None,
    features: Path | None,
    pictures: Path | None,
    out: Path,
) -> None:
    """Write one HTML file of tables, curves and attention galleries.

    Reads metrics.json and the recipe's [report] table. What else is given is shown as well: counts of the
    data, learning curves of the models, for a model with attention over pictures, whose predictions, groups,
    features and pictures are given, which pictures of a user's history it looks at, and, from convert, features
    and pictures, a contact sheet: some pictures, each with those whose vectors are most like its own. Writes one
    HTML file that needs nothing else.

    \b
    ctrkit report --recipe demo --metrics runs/demo/metrics.json --convert runs/demo/convert \\
        --groups runs/demo/groups --features runs/demo/features.h5 --pictures runs/demo/raw/pictures \\
        --model full=runs/demo/full/model --predictions full=runs/demo/full/predictions.parquet \\
        --out runs/demo/report.html
    """
    sources = Sources(
        metrics=metrics,
        models=named(models, "--model"),
        predictions=named(predictions, "--predictions"),
        convert=convert,
        groups=groups,
        features=features,
        pictures=pictures,
    )
    inputs = sources.named()
    if pictures is not None:
        del inputs["pictures"]
        inputs |= picture_inputs(pictures, recipe.extract_images)
    for name, path in inputs.items():
        if path is not None and not path.exists():
            raise UsageError(f"{path} ({name}) is not there")
    with provenance.output("report", recipe, inputs, out) as work:
        work.path.write_text(make_report(recipe, sources), encoding="utf-8")
    say(f"report: {out}")


def named(arguments: tuple[str, ...], option: str) -> dict[str, Path]:
    """Return name → path for arguments NAME=PATH."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise UsageError(f"{option} {argument!r} is not of the form NAME=PATH")
        if name in paths:
            raise UsageError(f"{option} names {name!r} twice")
        paths[name] = Path(path)
    return paths
