"""Write one HTML file of tables, figures and pictures.

Reads metrics.json and, where given, models, predictions, convert/, groups/, features.h5 and pictures. Writes
one HTML file that needs nothing else, and beside it a folder with each figure as PNG and its numbers as CSV.
"""

from pathlib import Path

import click

from ctrkit import provenance, report_inputs
from ctrkit.errors import UsageError
from ctrkit.options import mlflow_option, path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe
from ctrkit.report import write_report
from ctrkit.report_content import Sources
from ctrkit.sources import picture_inputs


@click.command("report")
@recipe_options
@path_option("--metrics", "metrics.json, from eval.")
@click.option("--model", "models", multiple=True, metavar="NAME=DIR", help="A variant's model directory.")
@click.option("--predictions", multiple=True, metavar="NAME=FILE", help="A variant's predictions.parquet.")
@path_option("--convert", "convert/, for the counts of the data and what ids stand for.", required=False)
@path_option("--groups", "groups/, for what models attend to and the map of goods.", required=False)
@path_option("--features", "features.h5, for models that look at pictures and for pictures alike.", required=False)
@path_option("--pictures", "Where pictures are, as for extract-images.", required=False)
@mlflow_option
@path_option("--out", "HTML file to write; the figures go to a folder beside it, NAME-figures.")
def command(
    recipe: Recipe,
    metrics: Path,
    models: tuple[str, ...],
    predictions: tuple[str, ...],
    convert: Path | None,
    groups: Path | None,
    features: Path | None,
    pictures: Path | None,
    mlflow: str | None,
    out: Path,
) -> None:
    """Write one HTML file of tables, figures and pictures.

    Reads metrics.json and the recipe's [report] table. What else is given is shown as well: counts of the data,
    learning curves, calibration, which behaviours and pictures a model attends to, a map of the ads as it sees them,
    pictures alike to the network, and where the model errs; what is absent is said, with the reason. Writes one HTML
    file that needs nothing else, and beside it, in a folder REPORT-figures, each figure as PNG and its numbers as CSV.
    docs/report.md says what each shows.

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
    beside = figures_folder(out)
    with provenance.output("report", recipe, inputs, out, beside=beside) as work:
        report_inputs.check(metrics, sources.models, sources.predictions, convert, groups)
        work.counts.update(write_report(recipe, sources, work.path, work.beside))
    say(f"report: {out}, with its figures as PNG and CSV in {beside}")
    if mlflow is not None:
        from ctrkit import mlflow_records

        store = mlflow_records.Store(mlflow, recipe.name, "report")
        run = mlflow_records.Run(store, "report", {}, {"ctrkit.stage": "report"})
        run.end(artefacts=[(out, ""), (metrics, ""), (beside, beside.name)])


def figures_folder(out: Path) -> Path:
    """Return where the figures of a report lie: `report-figures` beside `report.html`."""
    return out.with_name(f"{out.stem}-figures")


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
