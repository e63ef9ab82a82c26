"""Turn pictures into vectors with a fixed network.

Reads a folder of pictures and convert's `vocab/image.parquet`. Writes `features.h5` and
`features.h5.rejects.parquet`.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError, UserError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe


def _list_layers(ctx: click.Context, _: click.Parameter, model: str | None) -> None:
    if model is None or ctx.resilient_parsing:
        return
    from ctrkit import backbones

    click.echo("\n".join(backbones.layer_names(model)))
    ctx.exit()


@click.command("extract-images")
@recipe_options
@path_option("--pictures", "Folder of pictures.")
@path_option("--convert", "Output of convert: its vocab/image.parquet names the pictures.", required=False)
@click.option("--weights", metavar="PATH|published|random", help="Override extract-images.weights.")
@path_option("--out", "features.h5 to write.")
@click.option("--all", "all_pictures", is_flag=True, help="Every picture of the folder, not the vocabulary's.")
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

    Reads a folder of pictures and convert's vocab/image.parquet, which names the pictures and says how often
    training uses them. Writes features.h5 (one float16 row a distinct picture, most used first) and, beside
    it, features.h5.rejects.parquet (pictures that are missing or cannot be read; more than max_bad_rate is an
    error). A run that was killed goes on where it was.

    \b
    ctrkit extract-images --recipe demo --pictures runs/demo/raw/pictures \\
        --convert runs/demo/convert --out runs/demo/features.h5
    ctrkit extract-images --recipe demo --pictures photos --all --weights vgg16.pth --out photos.h5
    ctrkit extract-images --list-layers resnet50
    """
    settings = recipe.extract_images
    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
        recipe = recipe.model_copy(update={"extract_images": settings})
    if convert is None and not all_pictures:
        raise UsageError("which pictures? Give --convert, whose vocabulary names them, or --all for the folder")
    if not pictures.is_dir():
        raise UserError(f"--pictures {pictures} is not a folder")
    vocab = convert / "vocab" / "image.parquet" if convert is not None and not all_pictures else None
    from_file = Path(settings.weights) if settings.weights not in ("published", "random") else None
    inputs = {"pictures": pictures, "vocab": vocab, "weights": from_file}
    with provenance.output("extract-images", recipe, inputs, out) as work:
        import torch

        from ctrkit import backbones, devices, extraction

        if settings.threads:
            torch.set_num_threads(settings.threads)
        if vocab is None:
            vocabulary = extraction.whole_folder(pictures, settings.template)
        else:
            vocabulary = extraction.read_vocabulary(vocab)
        device = devices.resolve(settings.device, "extract-images.device")
        with devices.lock(device):
            network = backbones.load(
                settings.backbone,
                weights=settings.weights,
                seed=settings.seed,
                size=settings.size,
                dtype=settings.dtype,
                device=device,
            )
            if settings.weights == "random":
                say(f"extract-images: weights are RANDOM ({network.weights}): the network has learned nothing")
            work.counts.update(extraction.extract(network, settings, pictures, vocabulary, out, work.path))
    extraction.remove_parts(out)
    n = work.counts
    say(
        f"extract-images: {n['pictures']:,} pictures, {n['rejected']:,} rejected, {n['rows']:,} rows of "
        f"{n['width']:,} ({settings.backbone}, weights {n['weights']}) -> {out}"
    )
    if n["values clipped"]:
        say(f"extract-images: {n['values clipped']:,} values were beyond float16 and are clipped to ±65504")
