"""Groups: the samples of a user and day beside what they share, stored once (DIN section 5.1 calls them common)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import digests, partitions, vocabulary
from ctrkit.errors import UserError
from ctrkit.recipe import Recipe

BLOCKS_A_PART = 50
SPLITS = ("train", "valid", "test")
SAMPLE_COLUMNS = ("sample_id", "time", "ad", "click", "unseen_ad")


def group(recipe: Recipe, convert_folder: Path, behaviours: Path | None, out: Path) -> dict[str, Any]:
    """Write `train/`, `valid/`, `test/`, `counts/` and `schema.json` (docs/formats.md) into the folder `out`.

    Returns the counts.
    """
    names = {of: [n for n, f in recipe.features.items() if f.of == of] for of in ("user", "ad", "scene", "behaviour")}
    if names["behaviour"] and behaviours is None:
        raise UserError(
            f"the recipe has behaviour features ({', '.join(names['behaviour'])}); give the folder that "
            f"ctrkit select-clicks wrote with --behaviours"
        )
    split = partitions.read_split(convert_folder)
    sizes = {
        vocab: vocabulary.size(vocabulary.read(convert_folder / "vocab", vocab))
        for vocab in dict.fromkeys(f.vocab for f in recipe.features.values())
    }
    counts: dict[str, Any] = {}
    next_id = 0
    for part in SPLITS:
        samples = partitions.read_by_day(convert_folder / "samples", split[part])
        folder = out / part
        folder.mkdir(parents=True)
        if samples is None:
            continue
        groups = _gather(samples, names)
        if behaviours is not None and names["behaviour"]:
            groups = _attach(groups, partitions.read_by_day(behaviours, split[part]), names["behaviour"])
        groups = groups.with_columns(
            pl.int_range(next_id, next_id + groups.height, dtype=pl.Int64).alias("group_id")
        ).select("user", "day", "group_id", pl.exclude("user", "day", "group_id"))
        next_id += groups.height
        if part == "train":
            _write_counts(recipe, groups, sizes, out / "counts")
            order = np.random.default_rng(recipe.group.seed).permutation(groups.height)
            groups = groups[order]
        _write_parts(groups, folder, recipe.group.block_groups)
        counts[f"{part} groups"] = groups.height
        counts[f"{part} samples"] = samples.height
        if names["behaviour"]:
            history = pl.col(names["behaviour"][0]).list.len()
            counts[f"{part} groups with a history"] = int(groups.select((history > 0).sum()).item())
            counts[f"{part} behaviours"] = int(groups.select(history.cast(pl.Int64).sum()).item())
    schema = {
        "features": {name: f.model_dump(mode="json") for name, f in recipe.features.items()},
        "vocab_sizes": sizes,
        "vocab_digest": digests.Digests().of(convert_folder / "vocab"),
        "block_groups": recipe.group.block_groups,
    }
    (out / "schema.json").write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def _gather(samples: pl.DataFrame, names: dict[str, list[str]]) -> pl.DataFrame:
    """Return a row a (day, user), sorted: user features once, the rest as lists in order of sample_id."""
    missing = [n for of in ("user", "ad", "scene") for n in names[of] if n not in samples.columns]
    if missing:
        raise UserError(
            f"the samples have no feature {missing[0]!r}; they are of another recipe: run ctrkit convert again"
        )
    groups = (
        samples.sort("day", "user", "sample_id")
        .group_by("day", "user", maintain_order=True)
        .agg(
            *(pl.col(n).first() for n in names["user"]),
            *(pl.col(n).n_unique().alias(f"distinct {n}") for n in names["user"]),
            *(pl.col(c) for c in SAMPLE_COLUMNS),
            *(pl.col(n) for n in [*names["ad"], *names["scene"]]),
        )
    )
    for name in names["user"]:
        several = groups.filter(pl.col(f"distinct {name}") > 1)
        if several.height:
            user, day = several.select("user", "day").row(0)
            raise UserError(
                f'[features.{name}] is of = "user" but has more than one value within a day for {several.height:,} '
                f'users and days, such as user {user!r} on {day}; make it of = "scene"'
            )
    return groups.drop(f"distinct {n}" for n in names["user"])


def _attach(groups: pl.DataFrame, histories: pl.DataFrame | None, names: list[str]) -> pl.DataFrame:
    """Join each group's behaviour lists; a group without a history gets empty lists."""
    empty = pl.lit([], dtype=pl.List(pl.UInt32))
    if histories is None:
        return groups.with_columns(empty.alias(n) for n in names)
    missing = [n for n in names if n not in histories.columns]
    if missing:
        raise UserError(
            f"the behaviours have no feature {missing[0]!r}; they are of another recipe: run ctrkit select-clicks again"
        )
    joined = groups.join(histories.select("day", "user", *names), on=["day", "user"], how="left", maintain_order="left")
    return joined.with_columns(pl.col(n).fill_null(empty) for n in names)


def _write_parts(groups: pl.DataFrame, folder: Path, block_groups: int) -> None:
    """Write parts of up to `BLOCKS_A_PART` Parquet row groups of `block_groups` rows."""
    rows = BLOCKS_A_PART * block_groups
    for i, start in enumerate(range(0, groups.height, rows)):
        part = groups[start : start + rows].rechunk()
        part.write_parquet(folder / f"part-{i:04}.parquet", row_group_size=block_groups)


def _write_counts(recipe: Recipe, groups: pl.DataFrame, sizes: dict[str, int], folder: Path) -> None:
    """Write `folder/VOCAB.parquet`: the n_i of every index."""
    folder.mkdir()
    for vocab, size in sizes.items():
        names = [n for n, f in recipe.features.items() if f.vocab == vocab]
        shared = [n for n in names if recipe.features[n].of in ("user", "behaviour")]
        own = [n for n in names if recipe.features[n].of in ("ad", "scene")]
        counts = np.zeros(size, np.uint64)
        for start in range(0, groups.height, recipe.group.block_groups):
            found = count_samples(groups[start : start + recipe.group.block_groups], shared, own)
            counts[found["index"].to_numpy()] += found["count"].to_numpy()
        frame = pl.DataFrame({"index": np.arange(size, dtype=np.uint32), "count": counts})
        frame.write_parquet(folder / f"{vocab}.parquet")


def count_samples(groups: pl.DataFrame, shared: list[str], own: list[str]) -> pl.DataFrame:
    """Count the samples that contain each id at least once: n_i of DIN eqs. 9 and 10.

    Parameters
    ----------
    groups: rows as in groups/.
    shared: features that all samples of a group have (user and behaviour ids).
    own: features of the samples (ad and scene ids).

    Returns `index` UInt32 (0, missing, left out), `count` UInt64.
    """
    both = {"group_id": pl.Int64, "index": pl.UInt32}
    common = pl.concat(
        [pl.DataFrame(schema=both), *(_flat(groups.select("group_id", pl.col(n).alias("index"))) for n in shared)]
    ).unique()
    of_groups = common.join(groups.select("group_id", pl.col("sample_id").list.len().alias("n")), on="group_id")
    samples = [
        _flat(
            groups.select("group_id", "sample_id", pl.col(n).alias("index")).explode("sample_id", "index"),
        )
        for n in own
    ]
    of_samples = (
        pl.concat([pl.DataFrame(schema={"group_id": pl.Int64, "sample_id": pl.Int64, "index": pl.UInt32}), *samples])
        .unique()
        .join(common, on=["group_id", "index"], how="anti")
    )
    counted = pl.concat(
        [of_groups.select("index", pl.col("n").cast(pl.UInt64)), of_samples.select("index", _one().alias("n"))]
    )
    return counted.group_by("index").agg(pl.col("n").sum().alias("count")).sort("index")


def _one() -> pl.Expr:
    return pl.lit(1, dtype=pl.UInt64)


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Return one row an id, lists exploded, missing ids (0) left out."""
    if isinstance(frame.schema["index"], pl.List):
        frame = frame.filter(pl.col("index").list.len() > 0).explode("index")
    return frame.filter(pl.col("index") > 0)


def ungroup(groups: pl.DataFrame, shared: list[str], own: list[str]) -> pl.DataFrame:
    """Return the samples of groups, one row a sample in order of sample_id: `SAMPLE_COLUMNS`, `user`, `day` and
    the features named, those that the samples share repeated."""
    flat = groups.select("user", "day", *shared, *SAMPLE_COLUMNS, *own).explode(*SAMPLE_COLUMNS, *own)
    return flat.sort("sample_id")
