"""Count what training has, build the vocabularies, and write samples and behaviours as indexes."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import columns, daily, dictionaries, partitions, spool, vocabulary
from ctrkit.job import Job, Labelled, state, texts
from ctrkit.spool import Ints

GOODS = ".goods"
"""What the codes of goods become, among the indexes."""


def _counted(job: Job) -> dict[str, int]:
    """Return the dictionaries that are counted → their sizes; each partition's counts follow this order, of training
    rows and then of all rows."""
    found = state(job.work, "dictionaries")["found"]
    names = ["ad", *(one.dictionary for one in job.inputs.values())]
    return {name: found[name]["size"] for name in dict.fromkeys(names) if name in found}


def count(job: Job, part: int) -> dict[str, Any]:
    """Task: draw negatives, count the texts of a partition's training rows and of all its rows."""
    split = state(job.work, "split")
    sizes = _counted(job)
    total = sum(sizes.values())
    counts = np.zeros(2 * total, np.uint32)
    places = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1].tolist(), strict=True))
    shown = Labelled(job, "impressions", part)
    training = np.repeat(split["training"], np.diff(shown.begins))
    kept = _draw_negatives(job, part, shown, training)
    if kept is not None:
        spool.write_array(f"{shown.stem}.kept", kept)
        training &= kept
    for log, rows in (("impressions", shown), ("behaviours", Labelled(job, "behaviours", part))):
        if not rows.rows:
            continue
        if log == "behaviours":
            training = rows.column("time") < split["end"]
        keep = kept if log == "impressions" else None
        for name in sizes:
            if name not in rows.layout:
                continue
            codes = rows.column(name)
            begin = places[name]
            counts[begin : begin + sizes[name]] += np.bincount(codes[training], minlength=sizes[name]).astype(np.uint32)
            if _holds_pictures(job, name):
                every = np.bincount(codes if keep is None else codes[keep], minlength=sizes[name])
                counts[total + begin : total + begin + sizes[name]] += every.astype(np.uint32)
    spool.write_array(job.work / "labelled" / f"counts-{part:04}", counts)
    days_of = np.searchsorted(shown.begins, np.flatnonzero(kept), side="right") - 1 if kept is not None else None
    by_day = np.diff(shown.begins) if days_of is None else np.bincount(days_of, minlength=len(shown.begins) - 1)
    clicks = shown.column("click")
    return {
        "days": by_day.tolist(),
        "clicks": int((clicks if kept is None else clicks[kept]).sum()),
        "dropped negatives": shown.rows - int(by_day.sum()),
    }


def _holds_pictures(job: Job, name: str) -> bool:
    features = job.recipe.features
    return any(one.dictionary == name and features[f].kind == "image" for f, one in job.inputs.items())


def _draw_negatives(job: Job, part: int, shown: Labelled, training: Ints) -> Ints | None:
    """Return which rows stay (Boolean), None for all: clicks, rows after training, and negatives that are drawn."""
    options = job.recipe.convert
    if options.negative_rate == 1:
        return None
    rows = pl.DataFrame(
        {
            "user": shown.users().gather(shown.column("user")),
            "ad": texts(job, "ad").gather(shown.column("ad")),
            "time": shown.column("time"),
        }
    ).with_columns(pl.int_range(pl.len()).over("user", "ad", "time").alias("n"))
    drawn = spool.hashes(rows.select(pl.concat_str(pl.lit(options.seed), pl.all(), separator="|")).to_series())
    below = drawn.to_numpy() < np.uint64(int(options.negative_rate * 2**64))
    kept: Ints = (shown.column("click") == 1) | ~training | below
    return kept


def _sum_counts(job: Job, name: str) -> tuple[Ints, Ints]:
    """Return how often each code of a dictionary is in training, and (for pictures) anywhere."""
    sizes = _counted(job)
    total = sum(sizes.values())
    begin = 0
    for other, size in sizes.items():
        if other == name:
            break
        begin += size
    sums = [np.zeros(sizes[name], np.uint64) for _ in range(2)]
    for part in range(job.partitions):
        path = job.work / "labelled" / f"counts-{part:04}"
        for i in range(2):
            sums[i] += np.fromfile(path, np.uint32, sizes[name], offset=4 * (i * total + begin))
    return sums[0], sums[1]


def build_vocabulary(job: Job, vocab: str) -> int:
    """Task: build one vocabulary and the indexes of each of its features' texts; return its size."""
    features = {name: f for name, f in job.recipe.features.items() if f.vocab == vocab}
    keyed = {p.stem: pl.read_ipc(p) for p in sorted((job.work / "keyed").glob("*.ipc"))}
    values, counts = [], []
    for name, feature in features.items():
        source = job.inputs[name]
        values.append(columns.values(texts(job, source.dictionary), name, feature, source, keyed))
        training, everywhere = _sum_counts(job, source.dictionary)
        wanted = everywhere if feature.kind == "image" else training
        counts.append(np.where(wanted > 0, training.astype(np.int64), -1))
    one = next(iter(features.values()))
    old = vocabulary.read(job.previous / "vocab", vocab) if job.previous is not None else None
    words, indexes = (vocabulary.build_numbers if one.kind == "number" else vocabulary.build)(values, counts, one, old)
    folder = job.work / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, index in zip(features, indexes, strict=True):
        if features[name].multi_hot:
            spool.write_frame(folder / f"{name}.lists", index.to_frame("index"))
        else:
            spool.write_array(folder / name, index.to_numpy())
    partitions.write_parquet(words, job.out / "vocab" / f"{vocab}.parquet")
    return words.height


def write_goods(job: Job) -> None:
    """Write the texts of the behaviours' goods codes, those of earlier days first, and what each code here becomes."""
    if "behaviours.goods" not in state(job.work, "dictionaries")["found"]:
        return
    words = dictionaries.words(job.work / "dictionaries", "behaviours.goods").rename("goods")
    old = pl.Series("goods", [], dtype=pl.String)
    if job.previous is not None and (job.previous / "goods.parquet").is_file():
        old = pl.read_parquet(job.previous / "goods.parquet")["goods"]
    every, row = _append(old, words)
    spool.write_array(job.work / "indexes" / GOODS, np.concatenate([np.zeros(1, np.uint32), row + np.uint32(1)]))
    partitions.write_parquet(every.to_frame(), job.out / "goods.parquet")


@functools.lru_cache(maxsize=256)
def _indexes(work: Path, name: str, multi_hot: bool) -> Ints | pl.Series:
    if multi_hot:
        return pl.read_ipc(work / "indexes" / f"{name}.lists")["index"]
    return np.fromfile(work / "indexes" / name, np.uint32)


def _features(job: Job, log: str, rows: Labelled) -> dict[str, Any]:
    """Return the indexes of a log's features in all rows of a partition."""
    out: dict[str, Any] = {}
    for name in job.features(log):
        feature = job.recipe.features[name]
        codes = rows.column(job.inputs[name].dictionary)
        index = _indexes(job.work, name, feature.multi_hot)
        out[name] = index.gather(codes) if isinstance(index, pl.Series) else index[codes]
    return out


def encode_impressions(job: Job, part: int) -> int:
    """Task: write a partition's samples, a file a day; return how many."""
    counted = state(job.work, "count")
    scanned = state(job.work, "scan")
    rows = Labelled(job, "impressions", part)
    if not rows.rows:
        return 0
    ads = texts(job, "ad")
    known = _sum_counts(job, "ad")[0] > 0
    first_id = 0
    if job.previous is not None:
        earlier = daily.known_ads(job.recipe, job.previous, scanned["midnights"][-1][0])
        known = ads.is_in(earlier.implode()).fill_null(False).to_numpy()
        first_id = daily.next_sample_id(job.previous)
    by_day = np.array([one["days"] for one in counted])  # [partitions, days]
    before = first_id + np.concatenate([[0], np.cumsum(by_day.sum(0))])[:-1] + by_day[:part].sum(0)
    lengths = by_day[part]
    begins = np.cumsum(lengths) - lengths
    ad = rows.column("ad")
    frame = pl.DataFrame(
        {
            "time": rows.column("time"),
            "user": rows.users().gather(rows.column("user")),
            "ad": ads.gather(ad),
            "click": rows.column("click").astype(np.int8),
            "unseen_ad": ~known[ad],
            **_features(job, "impressions", rows),
        }
    )
    if job.recipe.convert.negative_rate < 1:
        frame = frame.filter(pl.Series(np.fromfile(f"{rows.stem}.kept", bool)))
    ids = np.repeat(before - begins, lengths) + np.arange(frame.height)
    frame = frame.insert_column(0, pl.Series("sample_id", ids, dtype=pl.Int64))
    dates = [day for day, _ in scanned["midnights"]]
    partitions.write_days(frame, dates, lengths, job.out / "samples", part)
    return frame.height


def encode_behaviours(job: Job, part: int) -> int:
    """Task: write a partition's behaviours, a file a day; return how many."""
    rows = Labelled(job, "behaviours", part)
    if not rows.rows:
        if job.previous is not None:
            _write_users(job, pl.Series("user", [], dtype=pl.String), part)
        return 0
    code = _write_users(job, rows.users(), part)
    found: dict[str, Any] = {"user_code": code[rows.column("user")], "time": rows.column("time")}
    if "behaviours.goods" in rows.layout:
        found["goods_code"] = np.fromfile(job.work / "indexes" / GOODS, np.uint32)[rows.column("behaviours.goods")]
    if "behaviours.type" in rows.layout:
        found["behaviour_type"] = texts(job, "behaviours.type").gather(rows.column("behaviours.type"))
    if "dwell" in rows.layout:
        found["dwell_ms"] = rows.column("dwell")
    found |= _features(job, "behaviours", rows)
    dates = [day for day, _ in state(job.work, "scan")["midnights"]]
    partitions.write_days(pl.DataFrame(found), dates, np.diff(rows.begins), job.out / "behaviours", part)
    return int(rows.rows)


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
