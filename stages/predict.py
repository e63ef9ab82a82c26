"""Score the impressions of a split with a trained model.

Reads a model folder, groups/ and, for models that look at pictures, features.h5 and convert/. Writes Parquet.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe


@click.command("predict")
@recipe_options
@path_option("--model", "Folder that `ctrkit train` wrote.")
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote, for models that look at pictures.", required=False)
@path_option("--out", "Parquet file to write.")
def command(recipe: Recipe, model: Path, groups: Path, features: Path | None, convert: Path | None, out: Path) -> None:
    """Score the impressions of a split with a trained model.

    Reads a model folder, groups/, and features.h5 and convert/vocab/image.parquet where the model looks at pictures.
    Writes sample_id, user, ad, day, click, score, history_length, unseen_ad. The recipe's [train] table, with --variant
    and --set, has to be the one that the model was trained with.

    \b
    ctrkit predict --recipe demo --variant din --model runs/demo/din/model --groups runs/demo/groups \\
        --out runs/demo/din/predictions.parquet
    """
    inputs = {
        "model": model,
        "groups": groups,
        "features": features,
        "image vocabulary": convert / "vocab" / "image.parquet" if convert else None,
    }
    with provenance.output("predict", recipe, inputs, out) as work:
        import torch

        from ctrkit import devices, modelfile, scoring

        device = devices.resolve(recipe.train.device, "train.device")
        torch.set_num_threads(recipe.train.threads)
        modelfile.check_recipe(model, recipe.train)
        trained = modelfile.load(model, groups, features, convert).to(device)
        with devices.lock(device):
            table = scoring.predict(trained, groups, recipe.predict.split, recipe.predict.batch)
        table.write_parquet(work.path)
        work.counts.update(samples=table.height)
    say(f"predict: {table.height:,} impressions -> {out}")
