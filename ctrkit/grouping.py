"""Groups: the samples of a user and day beside what they share, stored once (DIN section 5.1 calls them common).

Each partition of users makes its own files. Which users those are is drawn by a hash, and the order of the groups over
all blocks of the partition at random, so every block is a random lot of groups; training takes the blocks of all in an
order drawn at random again.
"""

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import daily, digests, partitions, spool, vocabulary
from ctrkit.engine import Engine
from ctrkit.errors import UserError
from ctrkit.recipe import Feature, Recipe
from ctrkit.sources import fields
from ctrkit.spool import Ints

BLOCKS_A_FILE = 50
SPLITS = ("train", "valid", "test")
SAMPLE_COLUMNS = ("sample_id", "time", "ad", "click", "unseen_ad")
MEASURED_GROUPS = 4000
"""Groups that are written both ways to measure what grouping saves."""


@dataclass(frozen=True)
class Job:
    """What every task knows."""

    recipe: Recipe
    convert: Path
    behaviours: Path | None
    work: Path
    out: Path
    split: Mapping[str, Sequence[datetime.date]]
    sizes: Mapping[str, int]
    known: Mapping[str, int]
    """Vocabulary → its size after the training days, where later days have extended it."""

    def names(self, *owners: str) -> list[str]:
        """Return the features of these owners."""
        return [n for n, f in self.recipe.features.items() if f.of in owners]


def group(recipe: Recipe, convert_folder: Path, behaviours: Path | None, out: Path, engine: Engine) -> dict[str, Any]:
    """Write `train/`, `valid/`, `test/`, `counts/` and `schema.json` (docs/formats.md) into the folder `out`.

    Returns the counts.
    """
    histories = [n for n, f in recipe.features.items() if f.of == "behaviour"]
    if histories and behaviours is None:
        raise UserError(
            f"the recipe has behaviour features ({', '.join(histories)}); give the folder that "
            f"ctrkit select-clicks wrote with --behaviours"
        )
    facts = partitions.read_facts(convert_folder)
    sizes = {
        vocab: vocabulary.size(vocabulary.read(convert_folder / "vocab", vocab))
        for vocab in dict.fromkeys(f.vocab for f in recipe.features.values())
    }
    split = partitions.read_split(convert_folder)
    job = Job(recipe, convert_folder, behaviours, engine.folder, out, split, sizes, daily.known_sizes(convert_folder))
    for part in SPLITS:
        (out / part).mkdir(parents=True, exist_ok=True)
    parts = range(facts["partitions"])
    made = engine.run("group", group_part, [(job, p) for p in parts])
    _write_counts(job, len(made))

    counts: dict[str, Any] = {}
    for part in SPLITS:
        own = [one[part] for one in made]
        if not sum(one["samples"] for one in own):
            continue
        counts |= {f"{part} {key}": sum(one[key] for one in own) for key in own[0]}
    measured = next((one["bytes"] for one in made if one["bytes"]), None)
    if measured:
        counts["bytes of some groups"], counts["bytes of their samples ungrouped"] = measured
    schema = {
        "features": {name: f.model_dump(mode="json") for name, f in recipe.features.items()},
        "vocab_sizes": sizes,
        "vocab_digest": digests.Digests().of(convert_folder / "vocab"),
        "block_groups": recipe.group.block_groups,
        "negative_rate": facts["negative_rate"],
    }
    (out / "schema.json").write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


# --- one partition of users --------------------------------------------------------------------------------------


def group_part(job: Job, part: int) -> dict[str, Any]:
    """Task: write the groups of one partition, those of training in random order; count ids; measure."""
    result: dict[str, Any] = {"bytes": None}
    for name in SPLITS:
        made = _Part(job, name, part)
        groups = made.frame
        result[name] = made.counts
        if name == "train":
            _count_part(job, made, part)
            order = np.random.default_rng([job.recipe.group.seed, part]).permutation(made.counts["groups"])
            groups = groups[_expand(made.group_begins, order)]
            if groups.height and part == 0:
                result["bytes"] = measure(groups.head(MEASURED_GROUPS), job)
        _write_groups(groups, job, job.out / name, part)
    return result


def _expand(begins: Ints, order: Ints) -> Ints:
    """Return the rows of groups in a new order; group i has rows `begins[i]` to `begins[i + 1]`."""
    lengths = np.diff(begins)[order]
    ends = np.cumsum(lengths)
    rows: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins[:-1][order] - (ends - lengths), lengths)
    return rows


class _Part:
    """The groups of a split and partition: a row a group, or several rows for one with too many samples.

    Columns as in groups/, without `common`: every row has what its samples share.
    """

    def __init__(self, job: Job, split: str, part: int) -> None:
        samples = partitions.read_by_day(job.convert / "samples", job.split[split], (), part)
        users, own = job.names("user"), job.names("ad", "scene")
        if samples is None:
            samples = _no_samples(job)
        missing = [n for n in (*users, *own) if n not in samples.columns]
        if missing:
            raise UserError(
                f"the samples have no feature {missing[0]!r}; they are of another recipe: run ctrkit convert again"
            )
        day = samples["day"].to_physical().to_numpy()
        first = np.ones(samples.height, bool)
        if samples.height:
            first[1:] = ((samples["user"] != samples["user"].shift()).to_numpy()[1:]) | (day[1:] != day[:-1])
        group = np.cumsum(first) - 1
        begins = np.flatnonzero(first)
        place = np.arange(samples.height) - begins[group] if samples.height else np.empty(0, np.int64)
        starts = place % job.recipe.group.max_samples == 0
        for name in users:
            _check_common(samples, name, first, group)
        row = np.cumsum(starts) - 1
        rows = np.flatnonzero(starts)
        heads = samples.select("user", "day", *users)[rows]
        lists = (
            samples.select(pl.Series("row", row, dtype=pl.Int64).set_sorted(), *SAMPLE_COLUMNS, *own)
            .group_by("row", maintain_order=True)
            .agg(pl.all())
            .drop("row")
        )
        self.samples_of_row = np.diff(np.append(rows, samples.height))
        self.group_begins = np.append(np.flatnonzero(first[rows]), len(rows))
        frame = pl.concat([heads, lists], how="horizontal")
        frame = frame.with_columns(pl.Series("group_id", samples["sample_id"].to_numpy()[begins][group[rows]]))
        histories = job.names("behaviour")
        if histories:
            frame = _attach(job, frame, part, histories, job.split[split])
        if split != "train":
            frame = frame.with_columns(
                _unknown(job, frame, n) for n in (*users, *own, *histories) if _is_extended(job, n)
            )
        self.frame = frame.select("user", "day", "group_id", *users, *histories, *SAMPLE_COLUMNS, *own)
        self.counts = {"groups": len(begins), "samples": samples.height}
        if histories:
            lengths = self.frame[histories[0]].list.len().to_numpy()[self.group_begins[:-1]]
            self.counts["groups with a history"] = int((lengths > 0).sum())
            self.counts["behaviours"] = int(lengths.sum())


def _is_extended(job: Job, name: str) -> bool:
    vocab = job.recipe.features[name].vocab
    return job.known.get(vocab, job.sizes[vocab]) < job.sizes[vocab]


def _unknown(job: Job, frame: pl.DataFrame, name: str) -> pl.Expr:
    """Return a feature with the indexes that no training day had made unknown."""
    size = job.known[job.recipe.features[name].vocab]

    def hide(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
        if isinstance(dtype, pl.List):
            return value.list.eval(hide(pl.element(), dtype.inner))  # type: ignore[arg-type]
        return pl.when(value < size).then(value).otherwise(pl.lit(vocabulary.UNKNOWN, dtype=pl.UInt32))

    return hide(pl.col(name), frame.schema[name]).alias(name)


def _no_samples(job: Job) -> pl.DataFrame:
    """Return the samples of any day, without rows."""
    day = partitions.days_there(job.convert / "samples")[0]
    some = partitions.read_by_day(job.convert / "samples", [day])
    assert some is not None
    return some.clear()


def _check_common(samples: pl.DataFrame, name: str, first: Ints, group: Ints) -> None:
    column = samples[name]
    heads = column.filter(pl.Series(first)).gather(group) if samples.height else column
    differ = (column != heads) if not isinstance(column.dtype, pl.List) else ~column.eq_missing(heads)
    if differ.any():
        groups = np.unique(group[differ.to_numpy()])
        user, day = samples.select("user", "day").row(int(np.flatnonzero(differ.to_numpy())[0]))
        raise UserError(
            f'[features.{name}] is of = "user" but has more than one value within a day for {len(groups):,} '
            f'users and days, such as user {user!r} on {day}; make it of = "scene"'
        )


def _attach(
    job: Job, groups: pl.DataFrame, part: int, names: list[str], wanted: Sequence[datetime.date]
) -> pl.DataFrame:
    """Join each group's behaviour lists; a group without a history gets empty lists."""
    assert job.behaviours is not None
    empty = pl.lit([], dtype=pl.List(pl.UInt32))
    histories = partitions.read_by_day(job.behaviours, wanted, (), part)
    if histories is None:
        return groups.with_columns(empty.alias(n) for n in names)
    missing = [n for n in names if n not in histories.columns]
    if missing:
        raise UserError(
            f"the behaviours have no feature {missing[0]!r}; they are of another recipe: run ctrkit select-clicks again"
        )
    joined = groups.join(histories.select("day", "user", *names), on=["day", "user"], how="left", maintain_order="left")
    return joined.with_columns(pl.col(n).fill_null(empty) for n in names)


# --- files -------------------------------------------------------------------------------------------------------


def _write_groups(groups: pl.DataFrame, job: Job, folder: Path, part: int) -> None:
    """Write files `part-PPPP-NNNN.parquet` of up to `BLOCKS_A_FILE` row groups, with `common`.

    Of a group's rows in a row group only the first carries what they share.
    """
    block = job.recipe.group.block_groups
    rows = BLOCKS_A_FILE * block
    for i, start in enumerate(range(0, groups.height, rows)):
        some = groups[start : start + rows].rechunk()
        ids = some["group_id"].to_numpy()
        place = np.arange(len(ids)) % block
        starts = np.ones(len(ids), bool)
        starts[1:] = (ids[1:] != ids[:-1]) | (place[1:] == 0)
        common = place[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
        if not starts.all():
            some = _without_repeats(some, job.names("user", "behaviour"), pl.Series(starts))
        some = some.insert_column(3, pl.Series("common", common, dtype=pl.Int32))
        partitions.write_parquet(
            some, folder / f"part-{part:04}-{i:04}.parquet", row_group_size=block, compression_level=1
        )


def _without_repeats(groups: pl.DataFrame, shared: Sequence[str], carries: pl.Series) -> pl.DataFrame:
    empty: dict[str, Any] = {c: [] if isinstance(groups.schema[c], pl.List) else 0 for c in shared}
    return groups.with_columns(
        pl.when(carries).then(pl.col(c)).otherwise(pl.lit(empty[c], dtype=groups.schema[c])) for c in shared
    )


# --- what grouping saves -----------------------------------------------------------------------------------------


def measure(groups: pl.DataFrame, job: Job) -> list[int]:
    """Write some groups, and the same samples ungrouped in an order drawn at random, as a trainer needs them.

    Returns the bytes of both.
    """
    flat = ungroup(groups, job.names("user", "behaviour"), job.names("ad", "scene"))
    flat = flat[np.random.default_rng(0).permutation(flat.height)]
    sizes = []
    for name, frame, rows in (("grouped", groups, groups.height), ("ungrouped", flat, flat.height)):
        path = job.work / f"{name}.measured"
        frame.write_parquet(path, statistics=False, row_group_size=max(1, min(rows, 100_000)))
        sizes.append(path.stat().st_size)
        path.unlink()
    return sizes


def ungroup(groups: pl.DataFrame, shared: list[str], own: list[str]) -> pl.DataFrame:
    """Return the samples of groups, one row a sample in order of sample_id: `SAMPLE_COLUMNS`, `user`, `day` and
    the features named, those that the samples share repeated.

    groups: rows as in groups/, row groups one after the other; rows of one group find its features by `group_id`.
    """
    carriers = groups.unique("group_id", keep="first", maintain_order=True).select("group_id", *shared)
    rows = groups.select("user", "day", "group_id", *SAMPLE_COLUMNS, *own).explode(*SAMPLE_COLUMNS, *own)
    flat = rows.join(carriers, on="group_id", how="left", maintain_order="left")
    return flat.select("user", "day", *shared, *SAMPLE_COLUMNS, *own).sort("sample_id")


# --- how many samples have an id ---------------------------------------------------------------------------------


def _count_part(job: Job, made: _Part, part: int) -> None:
    """Write how many of a partition's training samples have each id."""
    for vocab, size in job.sizes.items():
        features = {n: f for n, f in job.recipe.features.items() if f.vocab == vocab}
        counts = count_samples(made.frame, made.samples_of_row, features, size, _apart(job))
        spool.write_array(job.work / f"counts-{part:04}-{vocab}", counts)


def _write_counts(job: Job, parts: int) -> None:
    """Write `counts/VOCAB.parquet`: the n_i of every index."""
    (job.out / "counts").mkdir(exist_ok=True)
    for vocab, size in job.sizes.items():
        total = np.zeros(size, np.uint64)
        for part in range(parts):
            total += np.fromfile(job.work / f"counts-{part:04}-{vocab}", np.uint64)
        frame = pl.DataFrame({"index": np.arange(size, dtype=np.uint32), "count": total})
        frame.write_parquet(job.out / "counts" / f"{vocab}.parquet")


def _apart(job: Job) -> list[str]:
    """Return the behaviour features of which no two goods have the same value: goods differ within a history."""
    goods = (job.convert / "goods.parquet").is_file()
    features = {n: f for n, f in job.recipe.features.items() if f.of == "behaviour" and f.kind != "number"}
    return [n for n, f in features.items() if goods and fields(f) == ["goods"] and not f.hash_buckets]


def count_samples(
    groups: pl.DataFrame, samples: Ints, features: Mapping[str, Feature], size: int, apart: Collection[str] = ()
) -> Ints:
    """Count the samples that contain each id at least once: n_i of DIN eqs. 9 and 10.

    Parameters
    ----------
    groups: rows as in groups/, each with what its samples share.
    samples: how many samples each row has.
    features: those of one vocabulary; `size` is its largest index + 1.
    apart: features of which no row has an index twice, but for unknown.

    Returns UInt64 [size]; 0, missing, has count 0.
    """
    shared = [n for n, f in features.items() if f.of in ("user", "behaviour")]
    own = [n for n, f in features.items() if f.of in ("ad", "scene")]
    counts = np.zeros(size, np.uint64)
    if len(shared) == 1 and shared[0] in apart:
        row, common = _pairs(groups[shared[0]])
        known = common != vocabulary.UNKNOWN
        unknown = np.unique(row[~known])
        row, common = (
            np.concatenate([row[known], unknown]),
            np.concatenate([common[known], np.full(len(unknown), vocabulary.UNKNOWN)]),
        )
    else:
        row, common = _distinct([_pairs(groups[n]) for n in shared], groups.height)
    counts += np.bincount(common, weights=samples[row], minlength=size).astype(np.uint64)
    if own:
        row_of_sample = np.repeat(np.arange(groups.height), samples)
        columns = [groups[n].explode() for n in own]
        pairs = [_pairs(column) for column in columns]
        sample, index = _distinct(pairs, len(row_of_sample))
        index = index[~_among(row_of_sample[sample], index, row, common, groups.height, size)]
        counts += np.bincount(index, minlength=size).astype(np.uint64)
    counts[vocabulary.MISSING] = 0
    return counts


def _among(row: Ints, index: Ints, other_row: Ints, other_index: Ints, rows: int, size: int) -> Ints:
    """Return which (row, index) are among others (Boolean)."""
    found = np.zeros(len(row), bool)
    if len(other_row) and len(row):
        both = np.concatenate([other_row, row]), np.concatenate([other_index, index])
        order = spool.order_by([(both[0], rows), (both[1], size)], len(both[0]))
        a, b = both[0][order], both[1][order]
        starts = np.ones(len(order), bool)
        starts[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
        is_other = order < len(other_row)
        # The sort is stable, so a run of equal pairs begins with one of the others, if it has any.
        known = is_other[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
        found[order[~is_other] - len(other_row)] = known[~is_other]
    return found


def _pairs(column: pl.Series) -> tuple[Ints, Ints]:
    """Return (row, id) of a column of ids or of lists of ids."""
    if not isinstance(column.dtype, pl.List):
        return np.arange(column.len()), column.to_numpy().astype(np.int64)
    lengths = column.list.len().to_numpy()
    return np.repeat(np.arange(column.len()), lengths), column.filter(column.list.len() > 0).explode().to_numpy()


def _distinct(pairs: Sequence[tuple[Ints, Ints]], rows: int) -> tuple[Ints, Ints]:
    """Return the distinct (row, id) of several columns."""
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    row, index = (np.concatenate(c) for c in zip(*pairs, strict=True))
    if len(pairs) == 1 and len(row) == rows and (row == np.arange(rows)).all():  # one id a row
        return row, index
    order = spool.order_by([(row, max(rows, 1)), (index, int(index.max(initial=0)) + 1)], len(row))
    row, index = row[order], index[order]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (index[1:] != index[:-1])
    return row[new], index[new]
