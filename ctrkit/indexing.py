"""Count what training has, build the vocabularies, and write samples and behaviours as indexes."""

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import columns, daily, dictionaries, numba_loops, partitions, spool, vocabulary
from ctrkit.gathering import by_day, gather
from ctrkit.job import Job, Labelled, maps, state, texts
from ctrkit.partitions import ARROW
from ctrkit.spool import Ints

SAMPLE = ("sample_id", "time", "user", "click", "unseen_ad")
"""Columns of the samples whose values repeat, or nearly, from row to row."""
WORDS = {"goods": "goods.parquet", "type": "types.parquet"}
"""Columns of the behaviours whose texts stand in a file of their own; 1 is its first row, 0 none."""
CODES = {"goods": "goods_code", "type": "type_code"}


def _counted(job: Job) -> dict[str, int]:
    """Return the dictionaries that are counted → their sizes; each partition's counts follow this order, of training
    rows, and then of all rows those that hold pictures."""
    found = state(job.work, "dictionaries")["found"]
    names = ["ad", *(one.dictionary for one in job.inputs.values())]
    return {name: found[name]["size"] for name in dict.fromkeys(names) if name in found}


def count(job: Job, part: int) -> dict[str, Any]:
    """Task: draw negatives, count the texts of a partition's training impressions and of all its impressions; and
    those of a share of the behaviours' chunks."""
    split = state(job.work, "split")
    counts = _Counts(job)
    shown = Labelled(job, part)
    training = np.repeat(split["training"], np.diff(shown.begins))
    kept = _draw_negatives(job, shown, training)
    if kept is not None:
        spool.write_array(f"{shown.stem}.kept", kept)
        training &= kept
    rows = _rows(training)
    if shown.rows:
        for name in shown.columns:
            counts.add(name, shown.columns[name], rows, kept)
    for chunk in state(job.work, "scan")["chunks"]["behaviours"][part :: job.partitions]:
        there = spool.Columns(Path(f"{chunk['stem']}.rows"), chunk["layout"], 0, chunk["rows"])
        first, last = chunk["times"]
        early = None if last < split["end"] else _rows(there["time"] < max(split["end"] - first, 0))
        for name in chunk["words"]:
            counts.add(name, there[name], early, None, maps(job.work).of(name, chunk["stem"]))
    spool.write_array(job.work / "labelled" / f"counts-{part:04}", counts.counts)
    days_of = np.searchsorted(shown.begins, np.flatnonzero(kept), side="right") - 1 if kept is not None else None
    by_day = np.diff(shown.begins) if days_of is None else np.bincount(days_of, minlength=len(shown.begins) - 1)
    clicks = shown.columns["click"]
    return {
        "days": by_day.tolist(),
        "clicks": int((clicks if kept is None else clicks[kept]).sum()),
        "dropped negatives": shown.rows - int(by_day.sum()),
    }


def _rows(chosen: Ints) -> Ints | slice:
    """Return rows that are chosen (Boolean) as a slice, if they are one run."""
    begin, n = int(chosen.argmax()) if len(chosen) else 0, int(chosen.sum())
    return slice(begin, begin + n) if chosen[begin : begin + n].all() else chosen


class _Counts:
    """How often each text is in training; of dictionaries that pictures come from, also how often anywhere."""

    def __init__(self, job: Job) -> None:
        self._sizes = _counted(job)
        self._begins, total = _places(job)
        self.counts = np.zeros(total, np.uint32)

    def add(
        self,
        name: str,
        codes: Ints,
        training: Ints | slice | None,
        kept: Ints | None,
        meaning: Ints | None = None,
    ) -> None:
        """Count rows of a dictionary's codes, if it is one to count. training, kept: Boolean, or a slice, None for all
        rows; meaning: what the codes mean in the dictionary, if they are a chunk's."""
        if name not in self._sizes:
            return
        for begin, rows in zip(self._begins[name], (training, kept), strict=False):
            some = codes if rows is None else codes[rows]
            counts = self.counts[begin : begin + self._sizes[name]]
            if meaning is None:
                add_counts(some, counts)
            else:  # no two of a chunk's codes mean the same
                found = np.zeros(len(meaning), np.uint32)
                add_counts(some, found)
                counts[meaning] += found


def add_counts(codes: Ints, counts: npt.NDArray[np.uint32]) -> None:
    """Add to the counts of codes the rows that have them."""
    code = numba_loops.load("ctrkit.compiled_counts") if len(codes) >= spool.MANY else None
    if code is not None:
        code.count_codes(np.ascontiguousarray(codes), counts)
    else:
        found = np.bincount(codes).astype(np.uint32)
        counts[: len(found)] += found


def _places(job: Job) -> tuple[dict[str, list[int]], int]:
    """Return where each dictionary's counts begin, of training and (for pictures) of all rows; and how many there
    are."""
    sizes = _counted(job)
    begins: dict[str, list[int]] = {name: [] for name in sizes}
    at = 0
    for names in (sizes, [name for name in sizes if _holds_pictures(job, name)]):
        for name in names:
            begins[name].append(at)
            at += sizes[name]
    return begins, at


def _holds_pictures(job: Job, name: str) -> bool:
    features = job.recipe.features
    return any(one.dictionary == name and features[f].kind == "image" for f, one in job.inputs.items())


def _draw_negatives(job: Job, shown: Labelled, training: Ints) -> Ints | None:
    """Return which rows stay (Boolean), None for all: clicks, rows after training, and negatives that are drawn."""
    options = job.recipe.convert
    if options.negative_rate == 1:
        return None
    rows = pl.DataFrame(
        {
            "user": shown.users().gather(shown.columns["user"]),
            "ad": texts(job, "ad").gather(shown.columns["ad"]),
            "time": shown.columns["time"],
        }
    ).with_columns(pl.int_range(pl.len()).over("user", "ad", "time").alias("n"))
    drawn = spool.hashes(rows.select(pl.concat_str(pl.lit(options.seed), pl.all(), separator="|")).to_series())
    below = drawn.to_numpy() < np.uint64(int(options.negative_rate * 2**64))
    kept: Ints = (shown.columns["click"] == 1) | ~training | below
    return kept


def _sum_counts(job: Job, name: str) -> list[Ints]:
    """Return how often each code of a dictionary is in training, and (for pictures) anywhere."""
    size = _counted(job)[name]
    begins = _places(job)[0][name]
    sums: list[Ints] = [np.zeros(size, np.uint64) for _ in begins]
    for part in range(job.partitions):
        path = job.work / "labelled" / f"counts-{part:04}"
        for total, begin in zip(sums, begins, strict=True):
            total += np.fromfile(path, np.uint32, size, offset=4 * begin)
    return sums


def texts_of(job: Job, vocab: str) -> int:
    """Return of how many texts a vocabulary is made."""
    found = state(job.work, "dictionaries")["found"]
    own = [job.inputs[name].dictionary for name, f in job.recipe.features.items() if f.vocab == vocab]
    return sum(found[name]["size"] for name in own if name in found)


def build_vocabulary(job: Job, vocab: str) -> int:
    """Task: build one vocabulary and the indexes of each of its features' texts; return its size."""
    features = {name: f for name, f in job.recipe.features.items() if f.vocab == vocab}
    keyed = {p.stem: pl.read_ipc(p) for p in sorted((job.work / "keyed").glob("*.ipc"))}
    values, counts = [], []
    for name, feature in features.items():
        source = job.inputs[name]
        values.append(columns.values(texts(job, source.dictionary), name, feature, source, keyed))
        training, *everywhere = _sum_counts(job, source.dictionary)
        wanted = everywhere[0] if feature.kind == "image" else training
        counts.append(np.where(wanted > 0, training.astype(np.int64), -1))
    one = next(iter(features.values()))
    old = vocabulary.read(job.previous / "vocab", vocab) if job.previous is not None else None
    if one.kind == "number":
        words, indexes = vocabulary.build_numbers(values, counts, one, old)
    else:
        distinct = len(features) == 1 and not one.multi_hot and columns.is_key(job.inputs[next(iter(features))])
        words, indexes = vocabulary.build(values, counts, one, old, distinct=distinct)
    folder = job.work / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    dtype = spool.smallest(words.height + vocabulary.FIRST)
    for name, index in zip(features, indexes, strict=True):
        narrow = index if index.dtype == pl.List else pl.Series(index.to_numpy().astype(dtype))
        spool.write_frame(folder / name, narrow.to_frame("index"))
    partitions.write_parquet(words, job.out / "vocab" / f"{vocab}.parquet")
    return words.height


def write_words(job: Job, name: str) -> None:
    """Task: write the texts of a column of the behaviours, goods or type, those of earlier days first, and what each
    code here becomes."""
    if f"behaviours.{name}" not in state(job.work, "dictionaries")["found"]:
        return
    path = WORDS[name]
    words = dictionaries.words(job.work / "dictionaries", f"behaviours.{name}").rename(name)
    old = pl.Series(name, [], dtype=pl.String)
    if job.previous is not None and (job.previous / path).is_file():
        old = pl.read_parquet(job.previous / path)[name]
    every, row = _append(old, words)
    (job.work / "indexes").mkdir(parents=True, exist_ok=True)
    table = np.concatenate([np.zeros(1, np.uint32), row + np.uint32(1)]).astype(spool.smallest(every.len() + 1))
    spool.write_frame(job.work / "indexes" / f".{name}", pl.DataFrame({"code": table}))
    partitions.write_parquet(every.to_frame(), job.out / path)


@functools.lru_cache(maxsize=256)
def _indexes(work: Path, name: str) -> pl.Series:
    """Return the indexes of a feature by the code of its dictionary: of the smallest type, or lists; and what
    `write_words` left."""
    return spool.mapped_frame(work / "indexes" / name).to_series()


def encode_impressions(job: Job, part: int) -> int:
    """Task: write a partition's samples, a file a day; return how many."""
    counted = state(job.work, "count")
    scanned = state(job.work, "scan")
    rows = Labelled(job, part)
    if not rows.rows:
        return 0
    ads = texts(job, "ad")
    known = _sum_counts(job, "ad")[0] > 0
    first_id = 0
    if job.previous is not None:
        earlier = pl.read_ipc(job.work / daily.TRAINING_ADS)["ad"]
        seen = ads.is_in(earlier.implode()).fill_null(False).to_numpy()
        known = seen | known if state(job.work, "split")["trains"] else seen
        first_id = daily.next_sample_id(job.previous)
    by_day = np.array([one["days"] for one in counted])  # [partitions, days]
    before = first_id + np.concatenate([[0], np.cumsum(by_day.sum(0))])[:-1] + by_day[:part].sum(0)
    lengths = by_day[part]
    begins = np.cumsum(lengths) - lengths
    there = rows.columns
    found: dict[str, Any] = {
        "time": there["time"],
        "user": rows.users().gather(there["user"]),
        "ad": ads.gather(there["ad"]),
        "click": there["click"].astype(np.int8),
        "unseen_ad": ~known[there["ad"]],
    }
    for name in job.features("impressions"):
        index, codes = _indexes(job.work, name), there[job.inputs[name].dictionary]
        found[name] = (
            index.gather(codes) if index.dtype == pl.List else spool.take(index.to_numpy(), codes).astype(np.uint32)
        )
    frame = pl.DataFrame(found)
    if job.recipe.convert.negative_rate < 1:
        frame = frame.filter(pl.Series(np.fromfile(f"{rows.stem}.kept", bool)))
    ids = np.repeat(before - begins, lengths) + np.arange(frame.height)
    frame = frame.insert_column(0, pl.Series("sample_id", ids, dtype=pl.Int64))
    dates = [day for day, _ in scanned["midnights"]]
    partitions.write_days(frame, dates, lengths, job.out / "samples", part, _writer(job))
    return frame.height


def _writer(job: Job) -> Callable[[pl.DataFrame, Path], None]:
    """Return what writes samples: of rows in order of user and time, what the user decides repeats."""
    of_user = [name for name, feature in job.recipe.features.items() if feature.of == "user"]
    return functools.partial(partitions.write_rows, packed={*SAMPLE, *of_user})


def hold_out(job: Job, day: datetime.date, part: int) -> None:
    """Task: take over a part of an earlier day that is held out; what is `unseen_ad` changes as training moves on."""
    assert job.previous is not None
    known = pl.read_ipc(job.work / daily.TRAINING_ADS)["ad"]
    samples = partitions.read_by_day(job.previous / "samples", [day], (), part)
    if samples is not None:
        unseen = ~samples["ad"].is_in(known.implode())
        samples = samples.drop("day").with_columns(unseen.alias("unseen_ad"))
        partitions.write_days(samples, [str(day)], [samples.height], job.out / "samples", part, _writer(job))


def encode_behaviours(job: Job, part: int) -> int:
    """Task: write a partition's behaviours in order of day, user and time, a file a day; return how many."""
    chunks = state(job.work, "scan")["chunks"]["behaviours"]
    tables: dict[str, tuple[str, pl.Series]] = {}  # column → dictionary, and what its codes become
    for name in WORDS:
        if chunks and f"behaviours.{name}" in chunks[0]["words"]:
            tables[CODES[name]] = f"behaviours.{name}", _indexes(job.work, f".{name}")
    for name in job.features("behaviours"):
        tables[name] = job.inputs[name].dictionary, _indexes(job.work, name)
    plain = [n for n in ("dwell",) if chunks and n in chunks[0]["layout"]]
    rows = gather(job, "behaviours", part, plain, [dictionary for dictionary, _ in tables.values()])
    code = _write_users(job, rows.users, part)
    days, order = by_day(job, rows.columns, rows.users.len())
    ordered = {name: spool.take(column, order) for name, column in rows.columns.items()}
    found: dict[str, Any] = {"user_code": spool.take(code, ordered["user"]), "time": ordered["time"]}
    found |= dict.fromkeys((*(name for name in CODES.values() if name in tables), *(["dwell_ms"] if plain else [])))
    for name, (dictionary, table) in tables.items():
        codes = ordered[dictionary]
        found[name] = table.gather(codes) if table.dtype == pl.List else spool.take(table.to_numpy(), codes)
    if plain:
        dwell = ordered["dwell"]
        found["dwell_ms"] = dwell.astype(np.int32 if dwell.itemsize < 4 else np.int64) - 1
    dates = [day for day, _ in state(job.work, "scan")["midnights"]]
    partitions.write_days(pl.DataFrame(found), dates, days, job.out / "behaviours", part, partitions.write_arrow, ARROW)
    return len(order)


def _write_users(job: Job, users: pl.Series, part: int) -> Ints:
    """Write the users of a partition, those of earlier days first; return the row of each of `users` there."""
    old = partitions.read_users(job.previous, part) if job.previous is not None else users.clear()
    every, row = _append(old, users)
    partitions.write_parquet(every.to_frame("user"), job.out / "users" / f"part-{part:04}.parquet")
    return row


def _append(old: pl.Series, new: pl.Series) -> tuple[pl.Series, Ints]:
    """Return distinct texts with the new ones of others after them, and the row there of each of the others."""
    if not old.len():
        return new, np.arange(new.len(), dtype=np.uint32)
    every = pl.concat([old, new.filter(~new.is_in(old.implode()))])
    known = pl.DataFrame({"text": every, "row": np.arange(every.len(), dtype=np.uint32)})
    rows = new.to_frame("text").join(known, on="text", how="left", maintain_order="left")["row"]
    return every, rows.to_numpy()
