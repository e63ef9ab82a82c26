"""Take picture vectors that were made elsewhere.

Reads files of vectors with ids and convert's `vocab/image.parquet`. Writes `features.h5` and
`features.h5.rejects.parquet`.
"""

import json
from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.importing import import_vectors, read_wanted
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe
from ctrkit.vector_files import open_file, with_ids


@click.command("import-features")
@recipe_options
@path_option("--vectors", "File, folder or glob of vectors; may be given several times.", multiple=True)
@path_option("--ids", "Of NPY: file of ids (text, NPY or Parquet), one a --vectors.", multiple=True, required=False)
@path_option("--convert", "Output of convert: its vocab/image.parquet names the pictures.", required=False)
@path_option("--out", "features.h5 to write.")
@click.option("--all", "all_vectors", is_flag=True, help="Every vector, not the vocabulary's pictures only.")
def command(
    recipe: Recipe,
    vectors: tuple[Path, ...],
    ids: tuple[Path, ...],
    convert: Path | None,
    out: Path,
    all_vectors: bool,
) -> None:
    """Take picture vectors that were made elsewhere.

    Reads vectors with ids: Parquet (a column of ids, one of lists), NPY with --ids, HDF5 (two data sets) or the
    image features of the Amazon product data (.b); [import-features] names columns and says how a vector's id becomes
    a picture's. Writes features.h5, as extract-images does (float16, most used first), and, beside it,
    features.h5.rejects.parquet: vectors that cannot be used, and pictures of the vocabulary that have none; more of
    them than max_bad_rate is an error. Files may be larger than memory.

    \b
    ctrkit import-features --recipe amazon --vectors image_features_Clothing.b --convert runs/amazon/convert \\
        --out runs/amazon/features.h5
    ctrkit import-features --recipe shop.toml --vectors vectors.npy --ids ids.txt --all --out vectors.h5
    """
    if convert is None and not all_vectors:
        raise UsageError("which vectors? Give --convert, whose vocabulary names the pictures, or --all for all of them")
    if convert is not None and all_vectors:
        raise UsageError("--all takes every vector, --convert those of its vocabulary alone: give one of the two")
    settings = recipe.import_features
    pairs = with_ids(vectors, ids, settings.format)
    vocab = convert / "vocab" / "image.parquet" if convert is not None and not all_vectors else None
    inputs = {f"vectors {number:04}": path for number, (path, _) in enumerate(pairs)}
    inputs |= {f"ids {number:04}": path for number, path in enumerate(path for _, path in pairs if path is not None)}
    with provenance.output("import-features", recipe, {**inputs, "vocab": vocab}, out, resumes=False) as work:
        wanted = read_wanted(vocab) if vocab is not None else None
        sources = [open_file(path, beside, settings.format, settings.id, settings.vector) for path, beside in pairs]
        attributes = {
            "backbone": settings.made_by or "made elsewhere, not said by what",
            "layer": "not known",
            "weights": "not known",
            "dtype": ", ".join(sorted({source.dtype for source in sources})),
            "preprocessing": "{}",
            "source": json.dumps([[path.name, work.inputs[name]] for name, path in inputs.items()]),
        }
        work.counts.update(import_vectors(sources, settings, wanted, out, work.path, attributes))
    n = work.counts
    say(
        f"import-features: {n['vectors']:,} vectors of {n['width']:,}, {n['pictures']:,} pictures, of these "
        f"{n['with a vector']:,} with a vector -> {out}"
    )
    for what in ("ids that are not in the vocabulary", "ids again", "without an id"):
        if n[what]:
            say(f"import-features: {n[what]:,} vectors not taken: {what}")
    if n["values clipped"]:
        say(f"import-features: {n['values clipped']:,} values were beyond float16 and are clipped to ±65504")
