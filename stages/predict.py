"""Score the impressions of a split with a trained model.

Reads a model folder, groups/ and, for models that look at pictures, features.h5 and convert/. Writes Parquet.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ctrkit import launch, provenance
from ctrkit.options import path_option, rank_options, recipe_options
from ctrkit.progress import say
from ctrkit.ranks import Ranks
from ctrkit.recipe import Recipe


@click.command("predict")
@recipe_options
@path_option("--model", "Folder that `ctrkit train` wrote.")
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote, for models that look at pictures.", required=False)
@rank_options
@path_option("--out", "Parquet file to write.")
def command(
    recipe: Recipe,
    model: Path,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    nproc: int | None,
    max_restarts: int,
    out: Path,
) -> None:
    """Score the impressions of a split with a trained model.

    Reads a model folder, groups/, and features.h5 and convert/vocab/image.parquet where the model looks at pictures.
    Writes sample_id, user, ad, day, click, score, history_length, unseen_ad. The recipe's [train] table, with --variant
    and --set, has to be the one that the model was trained with. Several processes (--nproc, torchrun) score a share of
    each batch, with the same scores to rounding.

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
    if launch.wanted(nproc or recipe.predict.processes):
        raise click.exceptions.Exit(launch.launch(nproc or recipe.predict.processes, max_restarts))
    ranks = Ranks.of_environment()
    job = (recipe, model, groups, features, convert)
    with ranks.joined(ranks.started("predict", recipe.tables("predict", "train", "features"), inputs)):
        if ranks.rank > 0:
            if ranks.follow():
                _predict(*job, ranks, lambda: None)
            return
        with ranks.leading() as leader, provenance.output("predict", recipe, inputs, out) as work:
            table = _predict(*job, ranks, leader.start)
            table.write_parquet(work.path)
            work.counts.update(samples=table.height)
    say(f"predict: {table.height:,} impressions -> {out}")


def _predict(
    recipe: Recipe,
    model: Path,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    ranks: Ranks,
    start: Callable[[], None],
) -> Any:
    """Score as one of the ranks; the first gets the table. `start`: is called when nothing can be wrong any more with
    what the user gave."""
    import torch

    from ctrkit import devices, modelfile, placement, scoring
    from ctrkit.data_parallel import DataParallel
    from ctrkit.feature_service import FeatureService

    device = devices.of_rank(recipe.train.device, "train.device", ranks)
    torch.set_num_threads(recipe.train.threads)
    modelfile.check_recipe(model, recipe.train)
    trained = modelfile.load(model, groups, features, convert, ranks, recipe.train).to(device)
    spread = placement.spreads_pictures(trained.plan, ranks.count)
    start()
    if ranks.count > 1:
        parallel = DataParallel(ranks, device)
        trained.service = FeatureService(parallel, trained.tables, trained.pictures, spread_pictures=spread)
    with devices.lock(device):
        return scoring.predict(trained, groups, recipe.predict.split, recipe.predict.batch)
