"""Fine-tune a backbone on pictures labelled by category.

Reads pictures and a table that names their categories. Writes a folder with the weights that extract-images takes.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe
from ctrkit.sources import picture_inputs, raw_inputs


@click.command("tune-backbone")
@recipe_options
@path_option("--pictures", "Where the pictures are, as for extract-images.")
@path_option("--raw", "Raw folder, in which the recipe's goods (or ads) say the category.", required=False)
@path_option("--labels", "CSV, TSV, JSONL or Parquet file that says the category instead.", required=False)
@click.option("--weights", metavar="PATH|published|random", help="Override tune-backbone.weights.")
@path_option("--out", "Folder to write.")
def command(
    recipe: Recipe, pictures: Path, raw: Path | None, labels: Path | None, weights: str | None, out: Path
) -> None:
    """Fine-tune a backbone on pictures labelled by category.

    Reads pictures and a table with a picture and its category in each row: a file of your own (--labels) or the
    recipe's goods (--raw). Writes a folder: MODEL.pth (the network of the best epoch without its last layer, for
    `extract-images --weights`), head.pth (the last layer), categories.parquet, pictures.parquet (which picture
    trained, which validated, which was left out and why) and metrics.jsonl. A run that was killed goes on where it
    was.

    \b
    ctrkit tune-backbone --recipe demo --pictures runs/demo/raw/pictures --raw runs/demo/raw --out backbone
    ctrkit tune-backbone --recipe shop.toml --pictures photos --labels categories.csv \\
        --set tune-backbone.model=resnet50 --set tune-backbone.freeze=layer2 --out backbone
    """
    if weights is not None:
        options = recipe.tune_backbone.model_copy(update={"weights": weights})
        recipe = recipe.model_copy(update={"tune_backbone": options})
    options = recipe.tune_backbone
    if labels is not None and raw is not None:
        raise UsageError("--labels and --raw both say the category of each picture: give one of the two")
    from_file = Path(options.weights) if options.weights not in ("published", "random") else None
    where_pictures = picture_inputs(pictures, recipe.extract_images)
    inputs: dict[str, Path | None] = {**where_pictures, "labels": labels, "weights": from_file}
    if labels is None and raw is not None:
        inputs |= raw_inputs(recipe, raw, options.table)
    with provenance.output("tune-backbone", recipe, inputs, out) as work:
        import torch

        from ctrkit import devices, labelled_pictures, picture_sources, tuning
        from ctrkit.distinct_pictures import tell_distinct_in_memory
        from ctrkit.pictures import quiet

        device = devices.resolve(options.device, "tune-backbone.device")
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
        # Filling takes a seventh of the time, and nobody reads it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        table = labelled_pictures.labels_table(recipe, raw, labels)
        where = table.files[0].path
        begin = tuning.start(options)
        pairs = labelled_pictures.read_labels(table, options)
        wanted = labelled_pictures.candidates(pairs, options.min_count, where)
        images = wanted["image"].unique(maintain_order=True).to_list()
        if options.weights == "random":
            say(f"tune-backbone: it starts from RANDOM weights ({begin.weights}), so it has to learn everything here")
        with quiet():
            contents = tell_distinct_in_memory(picture_sources.open_source(pictures, recipe.extract_images), images)
            folder = tuning.checkpoint_folder(out, options, begin, device, pairs, contents)
            broken = tuning.find_broken(contents.places, options.size, folder / "broken.json")
            split = labelled_pictures.split(pairs, images, contents, broken, options, where)
            with devices.lock(device):
                network = tuning.make_network(options, begin, len(split.categories))
                tuner = tuning.Tuner(network, begin.head, options, contents.places, split, folder, device)
                state = tuner.run()
        tuning.write(work.path, tuner, state)
        best, last = tuner.best(), tuner.history[-1]
        commonest = tuner.commonest()
        work.counts.update(split.counts, weights=begin.weights, best=best, epochs=last["epoch"])
        work.counts["validation pictures of the most frequent category"] = commonest
    tuning.remove_checkpoints(out)
    n = split.counts
    say(
        f"tune-backbone: {n['categories']:,} categories ({n['categories with too few pictures']:,} left out, with too "
        f"few pictures), {n['training pictures']:,} pictures train and {n['validation pictures']:,} validate"
    )
    if n["rows without a picture"]:
        say(
            f"tune-backbone: {n['rows without a picture']:,} rows of {where} name no picture, which "
            "pictures.parquet lists"
        )
    say(
        f"tune-backbone: epoch {best['epoch']} of {last['epoch']} is the best: top-1 {best['valid_top1']:.3f}, top-5 "
        f"{best['valid_top5']:.3f} (always the most frequent category: top-1 {commonest:.3f}) -> {out}"
    )
