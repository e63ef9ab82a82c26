"""Groups: the samples of a user and day beside what they share, stored once (DIN section 5.1 calls them common).

Each partition of users makes its own files. Which users those are is drawn by a hash, and the order of the groups over
all blocks of the partition at random, so every block is a random lot of groups; training takes the blocks of all in an
order drawn at random again.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import daily, digests, numba_loops, partitions, spool, vocabulary
from ctrkit.blocks import write_blocks
from ctrkit.engine import Engine
from ctrkit.errors import UserError
from ctrkit.facts import read_facts
from ctrkit.recipe import Feature, Recipe
from ctrkit.spool import Ints

BLOCKS_A_FILE = 50
SPLITS = ("train", "valid", "test")
SAMPLE_COLUMNS = ("sample_id", "time", "ad", "click", "unseen_ad")
CELLS = 1 << 18
"""Ids that are sorted at once."""
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
    facts = read_facts(convert_folder)
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
    largest_first = sorted(sizes, key=lambda vocab: (-sizes[vocab], vocab))
    engine.run("sum counts", write_counts, [(job, vocab, len(made)) for vocab in largest_first])

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
        result[name] = made.counts
        if name == "train":
            _count_part(job, made, part)
            if made.frame.height and part == 0:
                result["bytes"] = measure(made.frame.head(MEASURED_GROUPS), job)
        _write_groups(made.frame, job, job.out / name, part)
    return result


def _expand(begins: Ints, lengths: Ints) -> Ints:
    """Return the rows of slices, one after the other; slice i has `lengths[i]` rows from `begins[i]`."""
    ends = np.cumsum(lengths)
    rows: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - lengths), lengths)
    return rows


class _Part:
    """The groups of a split and partition: a row a group, or several rows for one with too many samples.

    Groups of training are in random order, others in order of day and user. Columns as in groups/, without `common`:
    every row has what its samples share.
    """

    def __init__(self, job: Job, split: str, part: int) -> None:
        samples = partitions.read_by_day(job.convert / "samples", job.split[split], (), part)
        users, own, histories = job.names("user"), job.names("ad", "scene"), job.names("behaviour")
        samples = _no_samples(job) if samples is None else samples.rechunk()
        missing = [n for n in (*users, *own) if n not in samples.columns]
        if missing:
            raise UserError(
                f"the samples have no feature {missing[0]!r}; they are of another recipe: run ctrkit convert again"
            )
        first = np.ones(samples.height, bool)
        first[1:] = _changes(samples["user"]) | _changes(samples["day"])
        for name in users:
            _check_common(samples, name, first)
        begins = np.flatnonzero(first)
        sizes = np.diff(begins, append=samples.height)
        self.counts = {"groups": len(begins), "samples": samples.height}
        shown = samples.select(*SAMPLE_COLUMNS, *own)
        if split == "train":
            order = np.random.default_rng([job.recipe.group.seed, part]).permutation(len(begins))
            begins, sizes = begins[order], sizes[order]
            shown = shown[_expand(begins, sizes)]
        most = job.recipe.group.max_samples
        rows_of_group = -(-sizes // most)
        group = np.repeat(np.arange(len(begins)), rows_of_group)
        place = np.arange(len(group)) - (np.cumsum(rows_of_group) - rows_of_group)[group]
        self.samples_of_row = np.minimum(sizes[group] - most * place, most)
        frame = samples.select("user", "day", pl.col("sample_id").alias("group_id"), *users)[begins[group]]
        del samples
        if histories:
            frame = _attach(job, frame, part, histories, job.split[split])
            lengths = frame[histories[0]].list.len().to_numpy()[place == 0]
            self.counts["groups with a history"] = int((lengths > 0).sum())
            self.counts["behaviours"] = int(lengths.sum())
        frame = frame.hstack(_lists(shown, self.samples_of_row))
        if split != "train":
            frame = frame.with_columns(
                _unknown(job, frame, n) for n in (*users, *own, *histories) if _is_extended(job, n)
            )
        self.frame = frame.select("user", "day", "group_id", *users, *histories, *SAMPLE_COLUMNS, *own)


def _changes(column: pl.Series) -> npt.NDArray[np.bool_]:
    """Return which values but the first, [rows − 1], differ from the one before."""
    return column.slice(1).ne_missing(column.head(-1)).to_numpy()


def _lists(frame: pl.DataFrame, lengths: Ints) -> pl.DataFrame:
    """Return lists of so many rows each."""
    row = pl.Series("row", np.repeat(np.arange(len(lengths)), lengths)).set_sorted()
    return frame.select(row, pl.all()).group_by("row", maintain_order=True).agg(pl.all()).drop("row")


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


def _check_common(samples: pl.DataFrame, name: str, first: Ints) -> None:
    differ = np.flatnonzero(_changes(samples[name]) & ~first[1:]) + 1
    if len(differ):
        groups = np.unique(np.cumsum(first)[differ])
        user, day = samples.select("user", "day").row(int(differ[0]))
        raise UserError(
            f'[features.{name}] is of = "user" but has more than one value within a day for {len(groups):,} '
            f'users and days, such as user {user!r} on {day}; make it of = "scene"'
        )


def _attach(
    job: Job, groups: pl.DataFrame, part: int, names: list[str], wanted: Sequence[datetime.date]
) -> pl.DataFrame:
    """Add each group's behaviour lists; a group without a history gets empty lists."""
    assert job.behaviours is not None
    empty = pl.lit([], dtype=pl.List(pl.UInt32))
    try:
        histories = partitions.read_by_day(job.behaviours, wanted, ("user", *names), part)
    except pl.exceptions.ColumnNotFoundError:
        there = partitions.read_by_day(job.behaviours, wanted, (), part)
        missing = [n for n in names if there is not None and n not in there.columns]
        raise UserError(
            f"the behaviours have no feature {missing[0]!r}; they are of another recipe: run ctrkit select-clicks again"
        ) from None
    if histories is None:
        return groups.with_columns(empty.alias(n) for n in names)
    row = histories.select("day", "user").with_row_index("row")
    rows = groups.select("day", "user").join(row, on=["day", "user"], how="left", maintain_order="left")["row"]
    lists = histories.select(names).rechunk().select(pl.all().gather(rows))
    return groups.hstack(lists.with_columns(pl.all().fill_null(empty)))


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
        write_blocks(some, folder / f"part-{part:04}-{i:04}.parquet", block)


def _without_repeats(groups: pl.DataFrame, shared: Sequence[str], carries: pl.Series) -> pl.DataFrame:
    empty: dict[str, Any] = {c: [] if isinstance(groups.schema[c], pl.List) else 0 for c in shared}
    return groups.with_columns(
        pl.when(carries).then(pl.col(c)).otherwise(pl.lit(empty[c], dtype=groups.schema[c])) for c in shared
    )


# --- what grouping saves -----------------------------------------------------------------------------------------


def measure(groups: pl.DataFrame, job: Job) -> list[int]:
    """Write some groups, and the same samples ungrouped in an order drawn at random, as a trainer needs them, the
    latter as ordinary Parquet.

    Returns the bytes of both.
    """
    flat = ungroup(groups, job.names("user", "behaviour"), job.names("ad", "scene"))
    flat = flat[np.random.default_rng(0).permutation(flat.height)]
    path = job.work / "measured"
    write_blocks(groups, path, max(1, groups.height))
    grouped = path.stat().st_size
    flat.write_parquet(path, compression_level=1, statistics=False, row_group_size=max(1, min(flat.height, 100_000)))
    return [grouped, path.stat().st_size]


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
        counts = count_samples(made.frame, made.samples_of_row, features, size)
        spool.write_array(job.work / f"counts-{part:04}-{vocab}", counts.astype(np.uint32))


def write_counts(job: Job, vocab: str, parts: int) -> None:
    """Task: write `counts/VOCAB.parquet`, the n_i of every index, from those of the partitions."""
    (job.out / "counts").mkdir(exist_ok=True)
    size = job.sizes[vocab]
    total = np.zeros(size, np.uint64)
    for part in range(parts):
        total += np.fromfile(job.work / f"counts-{part:04}-{vocab}", np.uint32)
    frame = pl.DataFrame({"index": np.arange(size, dtype=np.uint32), "count": total})
    with spool.whole(job.out / "counts" / f"{vocab}.parquet") as tmp:
        frame.write_parquet(tmp)


def count_samples(groups: pl.DataFrame, samples: Ints, features: Mapping[str, Feature], size: int) -> Ints:
    """Count the samples that contain each id at least once: n_i of DIN eqs. 9 and 10.

    Parameters
    ----------
    groups: rows as in groups/, each with what its samples share.
    samples: how many samples each row has.
    features: those of one vocabulary; `size` is its largest index + 1.

    Returns UInt64 [size]; 0, missing, has count 0.
    """
    shared = [groups[n] for n, f in features.items() if f.of in ("user", "behaviour")]
    own = [groups[n].explode() for n, f in features.items() if f.of in ("ad", "scene")]
    counts = np.zeros(size, np.int64)
    code = numba_loops.load("ctrkit.compiled_counts")
    if code is not None and len(shared) == 1 and [isinstance(o.dtype, pl.List) for o in own] in ([], [False]):
        lengths, ids = _ids(shared[0])
        of_samples = own[0].to_numpy() if own else np.empty(0, np.uint32)
        given = (lengths, np.int64), (ids, np.uint32), (samples, np.int64), (of_samples, np.uint32)
        code.count_ids(
            *(np.ascontiguousarray(array, dtype) for array, dtype in given), np.zeros(size, np.uint32), counts
        )
        counts[vocabulary.MISSING] = 0
        return counts.view(np.uint64)
    if shared:
        row, common = _distinct(shared)
        counts += np.bincount(common, weights=samples[row], minlength=size).astype(np.int64)
    if own:
        sample, index = _distinct(own)
        if shared:
            row_of_sample = np.repeat(np.arange(groups.height), samples)
            index = index[~_among(row_of_sample[sample], index, row, common)]
        counts += np.bincount(index, minlength=size)
    counts[vocabulary.MISSING] = 0
    return counts.view(np.uint64)


def _among(row: Ints, index: Ints, other_row: Ints, other_index: Ints) -> npt.NDArray[np.bool_]:
    """Return which (row, index) are among others, which are in order."""
    pairs, others = row << 32 | index, other_row << 32 | other_index
    if not len(others):
        return np.zeros(len(pairs), bool)
    found: npt.NDArray[np.bool_] = others.take(np.searchsorted(others, pairs), mode="clip") == pairs
    return found


def _distinct(columns: Sequence[pl.Series]) -> tuple[Ints, Ints]:
    """Return the distinct (row, id) of several columns of ids or of lists of ids, in order of both.

    Missing ones are left out, but for those of a single column of ids.
    """
    if len(columns) == 1 and not isinstance(columns[0].dtype, pl.List):
        return np.arange(columns[0].len()), columns[0].to_numpy()
    rows = columns[0].len()
    lists = [_ids(column) for column in columns]
    width = sum((lengths for lengths, _ in lists), np.zeros(rows, np.int64))
    ends = [np.append(0, np.cumsum(lengths, dtype=np.int64)) for lengths, _ in lists]
    found, how_many = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for begin, end in _slices(width):
        padded = np.concatenate(
            [
                _padded(lengths[begin:end], ids[upto[begin] : upto[end]])
                for (lengths, ids), upto in zip(lists, ends, strict=True)
            ],
            axis=1,
        )
        padded.sort(axis=1)
        new = padded != vocabulary.MISSING
        new[:, 1:] &= padded[:, 1:] != padded[:, :-1]
        found.append(padded[new])
        how_many.append(new.sum(axis=1))
    return np.repeat(np.arange(rows), np.concatenate(how_many)), np.concatenate(found)


def _ids(column: pl.Series) -> tuple[Ints, Ints]:
    """Return how many ids each row has, and those of all rows."""
    if not isinstance(column.dtype, pl.List):
        return np.ones(column.len(), np.int64), column.to_numpy()
    return column.list.len().to_numpy(), column.explode(empty_as_null=False).to_numpy()


def _padded(lengths: Ints, ids: Ints) -> Ints:
    """Return ids as a row each, [rows, longest], filled up with missing ones."""
    longest = int(lengths.max())
    padded = np.full((len(lengths), longest), vocabulary.MISSING, np.uint32)
    padded[np.arange(longest) < lengths[:, None]] = ids
    return padded


def _slices(width: Ints) -> Iterator[tuple[int, int]]:
    """Yield where slices of rows begin and end that have at most `CELLS` cells once padded, or are a single row."""
    begin = 0
    while begin < len(width):
        end = min(begin + CELLS, len(width))
        while end - begin > 1 and (end - begin) * int(width[begin:end].max()) > CELLS:
            end -= (end - begin) // 2
        yield begin, end
        begin = end
