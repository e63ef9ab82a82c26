"""Vocabularies: values to indexes. 0 is padding or missing, 1 is unknown, 2… are values."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ctrkit import partitions, provenance, spool
from ctrkit.errors import UserError
from ctrkit.recipe import Feature
from ctrkit.spool import Ints, hashes

MISSING, UNKNOWN, FIRST = 0, 1, 2
COUNTS_SCHEMA = {"value": pl.String, "count": pl.UInt64}
SIGNIFICANT_DIGITS = 4
"""Of the values from which quantiles are taken."""


def build(
    values: Sequence[pl.Series],
    counts: Sequence[Ints],
    feature: Feature,
    previous: pl.DataFrame | None = None,
    *,
    distinct: bool = False,
) -> tuple[pl.DataFrame, list[pl.Series]]:
    """Give values their indexes: those of training, at least `min_count` times, at most `top`; pictures all.

    Parameters
    ----------
    values: String or List(String), some values from each feature of the vocabulary.
    counts: how often each is in training; −1 where it is not to be in the vocabulary whatever happens.
    feature: any of the features.
    previous: an earlier vocabulary, whose values keep their indexes; new ones follow.
    distinct: no value (of the only feature) is there twice.

    Returns the vocabulary, `value` String, `index` UInt32 (2…), `count` UInt64, most frequent first, ties by value; and
    the UInt32 index of each value, 0 for null (a list: empty).
    """
    old = pl.DataFrame(schema=COUNTS_SCHEMA)
    if previous is not None and not feature.hash_buckets:
        old = previous.select("value", "count")
    flat = [_flatten(v) for v in values]
    if distinct and not old.height:
        there = values[0].is_not_null().to_numpy()
        codes, words = np.where(there, np.cumsum(there), 0), values[0].drop_nulls()
    else:
        every = [old["value"], *(f["value"] for f in flat)]
        codes, words = spool.code(pl.concat([v.rename("value") for v in every]))
        codes = codes.astype(np.int64)
    parts = np.split(codes, np.cumsum([old.height, *(f.height for f in flat)])[:-1])
    total = np.zeros(words.len() + 1, np.int64)
    known = np.zeros(words.len() + 1, bool)
    np.add.at(total, parts[0], old["count"].to_numpy().astype(np.int64))
    for one, some, rows in zip(counts, parts[1:], flat, strict=True):
        weights = one[rows["row"].to_numpy()]
        total += np.bincount(some, weights=np.maximum(weights, 0), minlength=len(total)).astype(np.int64)
        known[some[weights >= 0]] = True
    if feature.hash_buckets:
        return _buckets(words, total, parts[1:], values, flat, feature.hash_buckets, previous)
    is_new = known & (total >= (0 if feature.kind == "image" else feature.min_count))
    is_new[0] = False
    is_new[parts[0]] = False
    candidates = np.flatnonzero(is_new)
    candidates = candidates[spool.text_order(words.gather(candidates - 1))]
    most = int(total.max())
    candidates = candidates[spool.order_by([(most - total[candidates], most + 1)], len(candidates))]
    if feature.top:
        candidates = candidates[: max(0, feature.top - old.height)]
    order = np.concatenate([parts[0], candidates])
    index = np.full(len(total), UNKNOWN, np.uint32)
    index[0] = MISSING
    index[order] = np.arange(FIRST, FIRST + len(order))
    rows_all = pl.DataFrame({"value": words.gather(order - 1), "count": total[order].astype(np.uint64)})
    return _indexed(rows_all), [_restore(index[c], v, f) for c, v, f in zip(parts[1:], values, flat, strict=True)]


def look_up(values: pl.Series, feature: Feature, known: pl.DataFrame) -> pl.Series:
    """Return the UInt32 index of each value (String, or List(String) if multi-hot) of a feature in a vocabulary that is
    there, as convert gives them: 0 for null (a list: empty), 1 for a value that the vocabulary does not have."""
    nowhere = [np.full(len(values), -1, np.int64)]
    if feature.kind == "number":
        return build_numbers([values], nowhere, feature, known)[1][0]
    return build([values], nowhere, feature, known)[1][0]


def _flatten(values: pl.Series) -> pl.DataFrame:
    """Return `row` and `value`, a row a value; lists exploded, empty ones left out."""
    frame = values.to_frame("value").with_row_index("row")
    return frame.filter(pl.col("value").list.len() > 0).explode("value") if values.dtype == pl.List else frame


def _restore(index: Ints, values: pl.Series, flat: pl.DataFrame) -> pl.Series:
    """Return indexes in the form of the values."""
    if values.dtype != pl.List:
        return pl.Series(values.name, index.astype(np.uint32))
    lists = pl.DataFrame({"row": flat["row"], "index": index.astype(np.uint32)}).group_by("row", maintain_order=True)
    rows = pl.DataFrame({"row": np.arange(values.len(), dtype=np.uint32)})
    joined = rows.join(lists.agg("index"), on="row", how="left", maintain_order="left")
    return joined.select(pl.col("index").fill_null([]).cast(pl.List(pl.UInt32)).alias(values.name)).to_series()


def _buckets(
    words: pl.Series,
    total: Ints,
    parts: Sequence[Ints],
    values: Sequence[pl.Series],
    flat: Sequence[pl.DataFrame],
    buckets: int,
    previous: pl.DataFrame | None,
) -> tuple[pl.DataFrame, list[pl.Series]]:
    """Return a row a bucket, whose `value` is its number and `count` that of all its values; and the indexes."""
    bucket = (hashes(words) % buckets).to_numpy()
    counts = np.zeros(buckets, np.int64) if previous is None else previous["count"].to_numpy().astype(np.int64)
    np.add.at(counts, bucket, total[1:])
    index = np.concatenate([[MISSING], bucket + FIRST])
    names = pl.DataFrame({"value": [f"bucket {i}" for i in range(buckets)], "count": counts.astype(np.uint64)})
    return _indexed(names), [_restore(index[c], v, f) for c, v, f in zip(parts, values, flat, strict=True)]


def _indexed(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_row_index("index", offset=FIRST).select("value", pl.col("index").cast(pl.UInt32), "count")


def build_numbers(
    values: Sequence[pl.Series], counts: Sequence[Ints], feature: Feature, previous: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, list[pl.Series]]:
    """Give numbers (as text) their buckets, by edges given or taken from the training samples' values at four
    significant digits. Returns what `build` returns, `value` being a bucket's bounds; 1 for what is no number."""
    if previous is not None:
        edges: Sequence[float] = [float(v.rpartition("< ")[2]) for v in previous["value"][:-1]]
    else:
        edges = feature.edges or _quantiles(values, counts, feature.quantiles)
    indexes = [_bucket(v, edges) for v in values]
    total = np.zeros(len(edges) + 1, np.int64) if previous is None else previous["count"].to_numpy().astype(np.int64)
    for index, one in zip(indexes, counts, strict=True):
        found = index >= FIRST
        np.add.at(total, index[found].astype(np.int64) - FIRST, np.maximum(one[found], 0))
    bounds = ["-inf", *(repr(float(e)) for e in edges), "inf"]
    names = [f"{a} ≤ x < {b}" for a, b in itertools.pairwise(bounds)]
    words = _indexed(pl.DataFrame({"value": names, "count": total.astype(np.uint64)}))
    return words, [pl.Series(v.name, i) for v, i in zip(values, indexes, strict=True)]


def _quantiles(values: Sequence[pl.Series], counts: Sequence[Ints], wanted: int) -> list[float]:
    """Return the edges between `wanted` buckets that hold about as many training values each."""
    flat = pl.DataFrame({"x": pl.concat(values), "count": np.maximum(np.concatenate(counts), 0)}).select(
        pl.col("x").cast(pl.Float64, strict=False).round_sig_figs(SIGNIFICANT_DIGITS), "count"
    )
    numbers = flat.filter(pl.col("x").is_finite() & (pl.col("count") > 0)).group_by("x").agg(pl.col("count").sum())
    numbers = numbers.sort("x")
    if numbers.is_empty():
        return []
    upto = numbers["count"].cum_sum().to_numpy()
    share = np.arange(1, wanted) / wanted * float(upto[-1])
    # An edge is the first value with at least that share of the samples below it.
    place = np.unique(np.searchsorted(upto, share, side="left") + 1)
    return [float(x) for x in numbers["x"].to_numpy()[place[place < len(upto)]]]


def _bucket(values: pl.Series, edges: Sequence[float]) -> Ints:
    numbers = values.cast(pl.Float64, strict=False).fill_nan(None)
    bucket = np.searchsorted(np.asarray(edges, np.float64), numbers.fill_null(0).to_numpy(), side="right") + FIRST
    index = np.where(numbers.is_null().to_numpy(), UNKNOWN, bucket)
    return np.where(values.is_null().to_numpy(), MISSING, index).astype(np.uint32)


def read(folder: Path, name: str) -> pl.DataFrame:
    """Read `folder/NAME.parquet`, as convert wrote it."""
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{path} is not there; run ctrkit convert with this recipe first")
    return partitions.read(path)


def size(vocabulary: pl.DataFrame) -> int:
    """Return the largest index + 1, with those of missing and unknown."""
    return vocabulary.height + FIRST


def require(convert: Path, option: str, digest: str, whose: str) -> None:
    """Refuse a folder that is not there, or whose vocabularies are others than those of a digest.

    Parameters
    ----------
    convert: as `option` gave it; what `ctrkit convert` wrote.
    digest: `vocab_digest` of a groups' schema.
    whose: who has that digest, for the message, such as "groups (--groups) was made with".
    """
    if not (convert / "vocab").is_dir():
        fault = "has no vocab/, so it is not what ctrkit convert wrote" if convert.exists() else "is not there"
        raise UserError(f"{convert} ({option}) {fault}; give the folder that ctrkit convert wrote")
    if provenance.cache().of(convert / "vocab") != digest:
        raise UserError(
            f"{convert} ({option}) has another vocabulary than {whose}, so ids and pictures would mean other things: "
            "give the folder of ctrkit convert that belongs to it"
        )


def require_of_groups(convert: Path | None, digest: str, groups: Path) -> None:
    """Refuse a `--convert`, if one is given, from which `--groups`, whose schema has this digest, were not made."""
    if convert is not None:
        require(convert, "--convert", digest, f"{groups} (--groups) was made with")
