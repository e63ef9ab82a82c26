"""Vocabularies: text values to indexes. 0 is padding or missing, 1 is unknown, 2… are values."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl

from ctrkit.errors import UserError

MISSING, UNKNOWN, FIRST = 0, 1, 2
COUNTS_SCHEMA = {"value": pl.String, "count": pl.UInt64}


def count_values(values: pl.Series) -> pl.DataFrame:
    """Count the values of a String or List(String) series: `value`, `count` UInt64. Nulls do not count."""
    if isinstance(values.dtype, pl.List):
        values = values.explode()
    counted = pl.DataFrame({"value": values}).drop_nulls().group_by("value").agg(pl.len().alias("count"))
    return counted.cast(COUNTS_SCHEMA)  # type: ignore[arg-type]


def build(counts: Iterable[pl.DataFrame], min_count: int) -> pl.DataFrame:
    """Merge counts and give the values seen at least `min_count` times their indexes.

    Returns `value` String, `index` UInt32 (2…), `count` UInt64: most frequent first, ties by value.
    """
    merged = pl.concat([pl.DataFrame(schema=COUNTS_SCHEMA), *counts]).group_by("value").agg(pl.col("count").sum())
    kept = merged.filter(pl.col("count") >= min_count).sort("count", "value", descending=[True, False])
    return kept.with_row_index("index", offset=FIRST).select("value", pl.col("index").cast(pl.UInt32), "count")


def encode(values: pl.Series, vocabulary: pl.DataFrame) -> pl.Series:
    """Return the UInt32 indexes of String values, or List(UInt32) of List(String): null is 0 (a list: empty)."""
    name = values.name
    if isinstance(values.dtype, pl.List):
        index = pl.element().replace_strict(
            vocabulary["value"], vocabulary["index"], default=UNKNOWN, return_dtype=pl.UInt32
        )
        lists = values.fill_null(pl.Series([[]], dtype=pl.List(pl.String)))
        return lists.to_frame().select(pl.col(name).list.eval(index)).to_series()
    found = values.to_frame().join(
        vocabulary.select("value", "index"), left_on=name, right_on="value", how="left", maintain_order="left"
    )
    code = pl.when(pl.col(name).is_null()).then(MISSING).otherwise(pl.col("index").fill_null(UNKNOWN))
    return found.select(code.cast(pl.UInt32).alias(name)).to_series()


def read(folder: Path, name: str) -> pl.DataFrame:
    """Read `folder/NAME.parquet`, as convert wrote it."""
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{path} is not there; run ctrkit convert with this recipe first")
    return pl.read_parquet(path)


def size(vocabulary: pl.DataFrame) -> int:
    """Return the largest index + 1, with those of missing and unknown."""
    return vocabulary.height + FIRST
