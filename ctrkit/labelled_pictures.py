"""Pictures by category, for tuning a backbone: which there are, which can be used, and which validate.

What counts is a picture's content, never its id: the same bytes under ten ids are one picture, in training or in
validation and never in both; bytes that go under several categories (such as "no picture yet") teach nothing.
"""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.distinct_pictures import Contents
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.pieces import BAD, EXTRA, UNIT
from ctrkit.recipe import Recipe, Source, TuneBackbone
from ctrkit.tables import RawTable, as_text, open_table

Int = npt.NDArray[np.int64]
AMBIGUOUS = "the same picture is in another category too"


@dataclass(frozen=True)
class Split:
    """The pictures that train and validate, as places in `Contents`, and what became of every labelled picture."""

    categories: list[str]
    """In order of name; a category is its place here."""
    train: Int
    valid: Int
    category: Int
    """[contents]: of each, −1 where it is not used."""
    table: pl.DataFrame
    """A row a labelled picture: `image`, `category`, `split` ("train", "valid"; null if not used), `reason` if not."""
    counts: dict[str, int]

    def per_category(self) -> pl.DataFrame:
        """Return `index` UInt32, `category` String, `train` and `valid` UInt32 (distinct pictures), by index."""
        sizes = [np.bincount(self.category[some], minlength=len(self.categories)) for some in (self.train, self.valid)]
        return pl.DataFrame(
            {"index": range(len(self.categories)), "category": self.categories, "train": sizes[0], "valid": sizes[1]},
            schema={"index": pl.UInt32, "category": pl.String, "train": pl.UInt32, "valid": pl.UInt32},
        )


def labels_table(recipe: Recipe, raw: Path | None, labels: Path | None) -> RawTable:
    """Open the table that names the category of each picture: the file `labels`, or the recipe's goods or ads."""
    if labels is not None:
        if not labels.is_file():
            raise UserError(f"--labels {labels} is not a file")
        return open_table("labels", Source(files=labels.name), labels.parent)
    name = recipe.tune_backbone.table
    source: Source | None = getattr(recipe.convert, name)
    if raw is None or source is None:
        missing = "" if raw is None else f" (and the recipe has no [convert.{name}])"
        raise UsageError(
            "of which category is a picture? Give --labels FILE, a table with the columns that [tune-backbone] image "
            f"and category name, or --raw FOLDER, in which the recipe's [convert.{name}] says it{missing}"
        )
    return open_table(name, source, raw, recipe)


def read_labels(table: RawTable, options: TuneBackbone) -> pl.DataFrame:
    """Return the distinct pairs of `image` and `category` String in the order of the table; category may be null.

    After them, with the reason in `fault` String, null elsewhere, all rows that name no picture.
    """
    fields = _fields(options.image)
    for key, columns in (("image", fields), ("category", [options.category])):
        for column in columns:
            if column not in table.names:
                raise UserError(
                    f"{table.files[0].path} has no column {column!r}{_end(nearest(column, table.names))} Name the "
                    f"column with --set tune-backbone.{key}=…"
                )
    table.prepare([*fields, options.category])
    found = []
    for number, piece in table.pieces():
        for frame, _ in table.read(number, piece):
            fault = (
                pl.when(pl.col(BAD).is_not_null())
                .then(pl.col(BAD))
                .when(pl.col(EXTRA).is_not_null())
                .then(pl.lit("the row has more cells than the header"))
                .when(pl.col("image").is_null() | (pl.col("image") == ""))
                .then(pl.lit("the row names no picture"))
            )
            told = frame.select(_image(frame, options.image).alias("image"), _category(frame, options), BAD, EXTRA)
            found.append(told.select("image", "category", fault.alias("fault")))
    pairs = pl.concat(found) if found else pl.DataFrame(schema=dict.fromkeys(("image", "category", "fault"), pl.String))
    nameless = pairs.drop_nulls("fault").with_columns(pl.lit(None, pl.String).alias("image"))
    return pl.concat([pairs.filter(pl.col("fault").is_null()).unique(maintain_order=True), nameless])


def _fields(image: str) -> list[str]:
    return [f for _, f, _, _ in string.Formatter().parse(image) if f] if "{" in image else [image]


def _image(frame: pl.DataFrame, image: str) -> pl.Expr:
    if "{" not in image:
        return as_text(frame.schema[image], image)
    parts = []
    for literal, field, _, _ in string.Formatter().parse(image):
        parts += [pl.lit(literal)] + ([as_text(frame.schema[field], field)] if field else [])
    return pl.concat_str(parts)


def _category(frame: pl.DataFrame, options: TuneBackbone) -> pl.Expr:
    """Return the category, the first one where a cell holds several."""
    text = as_text(frame.schema[options.category], options.category).str.strip_prefix(UNIT)
    for between in (UNIT, options.separator):
        if between:
            text = text.str.split(between).list.first()
    text = text.str.strip_chars()
    return pl.when(text != "").then(text).alias("category")


def _end(hint: str) -> str:
    return hint if hint.endswith("?") else hint + "."


def candidates(pairs: pl.DataFrame, min_count: int, where: str) -> pl.DataFrame:
    """Return the pairs worth reading: those of categories with at least `min_count` ids, which is the most that can
    be left of them."""
    known = pairs.filter(pl.col("fault").is_null()).drop_nulls("category")
    enough = known.filter(pl.len().over("category") >= min_count)
    if enough["category"].n_unique() < 2:
        largest = known["category"].value_counts(sort=True).head(3).rows()
        told = ", ".join(f"{category!r} {n:,}" for category, n in largest) or "none at all"
        raise UserError(
            f"{where} has {enough['category'].n_unique()} categories with at least tune-backbone.min_count = "
            f"{min_count} pictures, and two are needed (largest: {told}). Lower min_count, or name another column "
            "with --set tune-backbone.category=…"
        )
    return enough


def split(
    pairs: pl.DataFrame,
    images: Sequence[str],
    contents: Contents,
    broken: Mapping[int, str],
    options: TuneBackbone,
    where: str,
) -> Split:
    """Decide which distinct pictures train and which validate.

    Parameters
    ----------
    pairs: `image`, `category`, `fault`, as `read_labels` gives them.
    images: the pictures that were read, those of `candidates`, each once.
    contents: what `tell_distinct_in_memory` found of them.
    broken: content → reason, of those that cannot be decoded.
    where: what the labels were read from, for messages.

    In each category the share `valid_share` validates, at least one: those first in the order of a digest of
    (seed, content). Raises UserError where too many pictures cannot be used or fewer than two categories are left.
    """
    unusable = {images[number]: reason for number, reason in contents.reasons.items()}
    place = pl.DataFrame(
        {"image": images, "content": contents.content}, schema={"image": pl.String, "content": pl.Int64}
    )
    unusable |= {image: broken[content] for image, content in place.iter_rows() if content in broken}
    named, faults = pairs.filter(pl.col("fault").is_null()), pairs["fault"].drop_nulls().to_list()
    _check_rate(unusable, faults, len(images), options.max_bad_rate)
    told = pl.DataFrame(
        {"image": list(unusable), "unusable": list(unusable.values())},
        schema={"image": pl.String, "unusable": pl.String},
    )
    table = pairs.join(place, on="image", how="left", maintain_order="left")
    table = table.join(told, on="image", how="left", maintain_order="left")
    of_content = pl.col("category").drop_nulls().n_unique().over("content")
    few = f"its category has fewer than {options.min_count} pictures"
    reason = (
        pl.when(pl.col("fault").is_not_null())
        .then(pl.col("fault"))
        .when(pl.col("category").is_null())
        .then(pl.lit("no category"))
        .when(pl.col("unusable").is_not_null())
        .then(pl.col("unusable"))
        .when(pl.col("content").is_null())
        .then(pl.lit(few))
        .when(of_content > 1)
        .then(pl.lit(AMBIGUOUS))
    )
    table = table.with_columns(reason.alias("reason")).drop("unusable")
    used = table.filter(pl.col("reason").is_null()).select("content", "category").unique(maintain_order=True)
    used = used.filter(pl.len().over("category") >= options.min_count)
    categories = used["category"].unique().sort().to_list()
    if len(categories) < 2:
        raise UserError(
            f"{len(categories)} of the categories in {where} have at least tune-backbone.min_count = "
            f"{options.min_count} usable pictures of different content, and two are needed: {_reasons(table)}. Lower "
            "min_count, or look after the pictures"
        )
    draw = [_draw(options.seed, contents.digests[c].tobytes()) for c in used["content"]]
    size = pl.len().over("category")
    wanted = (size * options.valid_share).round().cast(pl.Int64).clip(1, None)
    used = used.with_columns(pl.Series("draw", draw))
    is_valid = pl.col("draw").rank("ordinal").over("category") <= pl.min_horizontal(wanted, size - 1)
    used = used.with_columns(
        is_valid.alias("valid"), pl.col("category").replace_strict(_numbers(categories)).alias("n")
    )
    category = np.full(len(contents.digests), -1, dtype=np.int64)
    category[used["content"].to_numpy()] = used["n"].to_numpy()
    names = pl.when(pl.col("valid")).then(pl.lit("valid")).otherwise(pl.lit("train")).alias("split")
    table = table.join(
        used.select("content", "category", names), on=["content", "category"], how="left", maintain_order="left"
    )
    unused = pl.col("split").is_null() & pl.col("reason").is_null()
    table = table.with_columns(pl.when(unused).then(pl.lit(few)).otherwise(pl.col("reason")).alias("reason"))
    valid = used["valid"].to_numpy()
    places = used["content"].to_numpy()
    counts = {
        "labelled pictures": named.height,
        "rows without a picture": len(faults),
        "without a category": int(named["category"].null_count()),
        "unusable pictures": len(unusable),
        "pictures in several categories": table.filter(pl.col("reason") == AMBIGUOUS)["content"].n_unique(),
        "categories": len(categories),
        "categories with too few pictures": named["category"].drop_nulls().n_unique() - len(categories),
        "training pictures": int((~valid).sum()),
        "validation pictures": int(valid.sum()),
    }
    table = table.select("image", "category", "split", "reason")
    return Split(categories, np.sort(places[~valid]), np.sort(places[valid]), category, table, counts)


def _draw(seed: int, digest: bytes) -> str:
    return hashlib.blake2b(digest, key=str(seed).encode()).hexdigest()


def _numbers(categories: Sequence[str]) -> dict[str, int]:
    return {category: number for number, category in enumerate(categories)}


def _check_rate(unusable: dict[str, str], faults: list[str], read: int, max_rate: float) -> None:
    """Raise UserError if more than `max_rate` of the pictures read and the rows that name none cannot be used."""
    bad, total = len(unusable) + len(faults), read + len(faults)
    if bad <= max_rate * total:
        return
    told = pl.DataFrame({"image": [*unusable, *[None] * len(faults)], "reason": [*unusable.values(), *faults]})
    raise UserError(
        f"{bad:,} of {total:,} labelled pictures ({bad / total:.1%}) cannot be used, more than "
        f"tune-backbone.max_bad_rate = {max_rate:g} allows: {_reasons(told)}. Check --pictures, "
        "extract-images.template and tune-backbone.image, or raise max_bad_rate."
    )


def _reasons(table: pl.DataFrame) -> str:
    """Return the three most frequent reasons, each with a picture."""
    bad = table.drop_nulls("reason").group_by("reason", maintain_order=True).agg(pl.len().alias("n"), pl.first("image"))
    common = bad.sort("n", "reason", descending=[True, False]).head(3)
    return "; ".join(
        f"{n:,} × {reason}" + f" (such as {image})" * (image is not None) for reason, n, image in common.iter_rows()
    )
