"""Turn pictures into vectors with a fixed network.

Reads a folder of pictures and convert's `vocab/image.parquet`. Writes `features.h5` and
`features.h5.rejects.parquet`.
"""

import itertools
from pathlib import Path
from typing import Any

import click

from ctrkit import files, provenance, shards, sources
from ctrkit.errors import UsageError, UserError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.ranks import Ranks
from ctrkit.recipe import ExtractImages, Recipe


def _list_layers(ctx: click.Context, _: click.Parameter, model: str | None) -> None:
    if model is None or ctx.resilient_parsing:
        return
    from ctrkit import backbones

    click.echo("\n".join(backbones.layer_names(model)))
    ctx.exit()


@click.command("extract-images")
@recipe_options
@path_option("--pictures", "Folder of pictures; tar, zip or Parquet file, or a folder or glob of such.")
@path_option("--convert", "Output of convert: its vocab/image.parquet names the pictures.", required=False)
@click.option("--weights", metavar="PATH|published|random", help="Override extract-images.weights.")
@path_option("--out", "features.h5 to write.")
@click.option("--all", "all_pictures", is_flag=True, help="Every picture of --pictures, not the vocabulary's.")
@click.option(
    "--list-layers",
    metavar="MODEL",
    is_eager=True,
    expose_value=False,
    callback=_list_layers,
    help="Print the names of a model's layers and exit.",
)
def command(
    recipe: Recipe, pictures: Path, convert: Path | None, weights: str | None, out: Path, all_pictures: bool
) -> None:
    """Turn pictures into vectors with a fixed network.

    Reads pictures and convert's vocab/image.parquet, which names them and says how often
    training uses them. Writes features.h5 (one float16 row a distinct picture, most used first) and, beside
    it, features.h5.rejects.parquet (pictures that are missing or cannot be read; more than max_bad_rate is an
    error). A run that was killed goes on where it was, and does at most one batch again.

    Under torchrun each process does a share, on the GPU of its LOCAL_RANK, and writes a shard into features.h5.shards;
    features.h5 is then a view of them. All have to see the same files.

    \b
    ctrkit extract-images --recipe demo --pictures runs/demo/raw/pictures \\
        --convert runs/demo/convert --out runs/demo/features.h5
    ctrkit extract-images --recipe demo --pictures photos --all --weights vgg16.pth --out photos.h5
    torchrun --nproc-per-node 8 -m ctrkit extract-images --recipe shop --pictures photos --all --out photos.h5
    ctrkit extract-images --list-layers resnet50
    """
    settings = recipe.extract_images
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
        recipe = recipe.model_copy(update={"extract_images": settings})
    if convert is None and not all_pictures:
        raise UsageError("which pictures? Give --convert, whose vocabulary names them, or --all for every one")
    if convert is not None and all_pictures:
        raise UsageError("--all takes every picture, --convert those of its vocabulary alone: give one of the two")
    if settings.weights == "tuned":
        raise UsageError(
            'extract-images.weights = "tuned" is for a run of the whole recipe, which tunes first. By hand, '
            "`ctrkit tune-backbone … --out backbone` comes first, and then --weights backbone here"
        )
    vocab = convert / "vocab" / "image.parquet" if convert is not None and not all_pictures else None
    from_file = Path(settings.weights) if settings.weights not in ("published", "random") else None
    inputs = {**sources.picture_inputs(pictures, settings), "vocab": vocab, "weights": from_file}
    shards.disown_if_incomplete(out)
    ranks = Ranks.of_environment()
    with ranks.joined(ranks.started("extract-images", recipe.tables("extract-images"), inputs)):
        if ranks.rank > 0:
            if ranks.follow():
                _help(settings, pictures, vocab, out, ranks)
            return
        with ranks.leading() as leader, provenance.output("extract-images", recipe, inputs, out) as work:
            leader.start()
            work.counts.update(_extract(settings, pictures, vocab, out, work.path, ranks))
    from ctrkit import extraction

    extraction.remove_parts(out)
    n = work.counts
    say(
        f"extract-images: {n['pictures']:,} pictures, {n['rejected']:,} rejected, {n['rows']:,} rows of "
        f"{n['width']:,} ({settings.backbone}, weights {n['weights']}) -> {out}"
    )
    if n["without an id"]:
        say(f"extract-images: {n['without an id']:,} of the rejected are pictures that no id names")
    if n["values clipped"]:
        say(f"extract-images: {n['values clipped']:,} values were beyond float16 and are clipped to ±65504")


def _help(settings: ExtractImages, pictures: Path, vocab: Path | None, out: Path, ranks: Ranks) -> None:
    """Do the share of a rank that is not the first."""
    try:
        _extract(settings, pictures, vocab, out, None, ranks)
    except OSError as e:
        if files.no_room(e):
            raise files.cannot_write(out, e) from None
        raise


def _extract(
    settings: ExtractImages, pictures: Path, vocab: Path | None, out: Path, path: Path | None, ranks: Ranks
) -> dict[str, Any]:
    import torch

    from ctrkit import backbones, devices, extraction, picture_sources

    if settings.threads:
        torch.set_num_threads(settings.threads)
    source = picture_sources.open_source(pictures, settings, out.parent)
    vocabulary = extraction.whole_source(source) if vocab is None else extraction.read_vocabulary(vocab, out.parent)
    if vocab is None and not vocabulary.images:
        named = f"extract-images.template = {settings.template!r}"
        if settings.index is not None:
            named = f"extract-images.index = {settings.index!r}"
        raise UserError(
            f"there are no pictures to extract: none in {pictures} is named as {named} says"
            + "".join(
                f"; {len(source.unnamed):,} have no id, such as {where}"
                for where, _ in itertools.islice(source.unnamed, 1)
            )
        )
    device = devices.resolve(settings.device, "extract-images.device")
    if device == "cuda" and ranks.count > 1:
        device = devices.resolve(f"cuda:{ranks.local_rank}", f"rank {ranks.rank}: extract-images.device")
    with devices.lock(device):
        network = backbones.load(
            settings.backbone,
            weights=settings.weights,
            seed=settings.seed,
            size=settings.size,
            dtype=settings.dtype,
            device=device,
        )
        if settings.weights == "random" and ranks.rank == 0:
            say(f"extract-images: weights are RANDOM ({network.weights}): the network has learned nothing")
        return extraction.extract(network, settings, source, vocabulary, out, path, ranks)
