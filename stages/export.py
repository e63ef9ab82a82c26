"""Write a trained model as programs that serve it: ONNX, or torch.export's.

Reads a model folder and convert/. Writes a folder.
"""

from pathlib import Path

import click

from ctrkit import files, provenance, run_folder
from ctrkit.batches import Schema
from ctrkit.errors import UsageError, UserError
from ctrkit.options import maybe_recipe_options, path_option
from ctrkit.progress import say
from ctrkit.recipe import Export, Recipe


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(["onnx", "pt2"]), help="ONNX or torch.export. Default: the recipe's, onnx.")
@path_option("--convert", "Folder that `ctrkit convert` wrote. Default: that of MODEL's run.", required=False)
@maybe_recipe_options
@path_option("--out", "Folder to write.")
def command(model: Path, format: str | None, convert: Path | None, recipe: Recipe | None, out: Path) -> None:
    """Write a trained model as programs that serve it.

    Reads MODEL, a folder of `ctrkit train`, and the vocabularies of convert/. Writes the programs (what depends on a
    picture alone, on the user alone, and on the ads), vocabularies and settings, in one folder that needs nothing else
    but features.h5 for pictures by name; and compares their scores with the trained network's. How many behaviours of a
    request count is the recipe's select-clicks.max_behaviours; without --recipe, that of MODEL's run.

    \b
    ctrkit export runs/demo/din/model --format onnx --out exported/din
    ctrkit export model --recipe shop.toml --convert convert --format pt2 --out exported
    """
    most = run_folder.max_behaviours(model) if recipe is None else recipe.select_clicks.max_behaviours
    format = format or (Export() if recipe is None else recipe.export).format
    if convert is None:
        convert = run_folder.of_model(model).convert
    if not (model / "model.pt").is_file():
        raise UsageError(f"{model} is not a model folder: it has no model.pt. Make one with `ctrkit train`.")
    if recipe is not None:
        _check_features(model, recipe)
    inputs = {"model": model, "vocabularies": convert / "vocab"}
    options = {"format": format, "max_behaviours": str(most)}
    with provenance.output("export", recipe, inputs, out, options) as work:
        import torch

        from ctrkit import exporting

        torch.set_num_threads(1)
        work.counts.update(exporting.export(model, convert, work.path, format, most))
    say(f"export: {model} -> {out}, scores within {work.counts['largest difference']:.1e} of the trained network's")


def _check_features(model: Path, recipe: Recipe) -> None:
    """Refuse a recipe of other features than the model was trained with."""
    try:
        Schema.from_json(files.read_json(model / "settings.json")["schema"]).of_recipe(recipe.features, model)
    except UserError as e:
        raise UsageError(
            f"--recipe is not that of this model: {e.message.partition(': ')[0]}. Give the recipe that it was trained "
            "with; a model in the folder of its run needs none"
        ) from None
