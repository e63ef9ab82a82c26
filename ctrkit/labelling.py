"""Label the impressions of a partition of users: drop duplicates, join clicks, sort."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import labels, spool
from ctrkit.gathering import by_day, gather
from ctrkit.job import Counts, Job, maps, state, texts, write_state
from ctrkit.spool import Ints


def label_impressions(job: Job, part: int) -> dict[str, Any]:
    """Task: drop duplicates, label, sort. Returns layout, rows by day, and counts."""
    scanned = state(job.work, "scan")
    options = job.recipe.convert
    dictionaries_here = list(scanned["chunks"]["impressions"][0]["words"])
    joined_by_time = bool(scanned["chunks"]["clicks"]) and "clicks" not in scanned["ids"]
    plain = ["row", *(["click"] if options.label else [])]
    rows = gather(
        job, "impressions", part, plain, dictionaries_here, scanned["chunks"]["clicks"] if joined_by_time else ()
    )
    columns_ = rows.columns
    row, chunk_of = columns_.pop("row"), rows.chunk
    n = len(row)
    columns_.setdefault("click", np.full(n, bool(options.sampled_negatives), np.int8))
    duplicate = np.zeros(n, bool)
    counts: Counts = {}
    if scanned["ids"]:
        for q, begins in enumerate(state(job.work, "match")):
            there = spool.mapped_frame(job.work / "marks" / f"{q:04}")
            marks = there.slice(begins[part], begins[part + 1] - begins[part])
            chunk = marks["chunk"].to_numpy()
            at = rows.bases[chunk] + marks["at"].to_numpy() - np.array(rows.starts, np.int64)[chunk]
            duplicate[at[marks["mark"].to_numpy() == labels.DUPLICATE]] = True
            columns_["click"][at[marks["mark"].to_numpy() == labels.CLICKED]] = 1
    if options.drop_repeats or (options.drop_repeats is None and options.clicks is not None and not scanned["ids"]):
        duplicate |= labels.repeated(columns_["user"], columns_["ad"], columns_["time"])
    stem = job.work / "labelled" / f"impressions-{part:04}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    spool.write_frame(f"{stem}.duplicates", pl.DataFrame({"chunk": chunk_of[duplicate], "row": row[duplicate]}))
    counts["duplicates"] = int(duplicate.sum())
    if options.negative_rate < 1:
        columns_ |= {"__chunk": chunk_of, "__row": row}
    if counts["duplicates"]:
        columns_ = {name: c[~duplicate] for name, c in columns_.items()}
    if joined_by_time:
        counts |= _join_clicks(job, part, columns_, f"{stem}.clicks")
    if options.sampled_negatives:
        counts |= _sample_negatives(job, part, columns_)
    days, order = by_day(job, columns_, rows.users.len())
    layout = spool.write(Path(f"{stem}.rows"), {name: spool.take(c, order) for name, c in columns_.items()})
    spool.write_frame(f"{stem}.users", rows.users.to_frame("user"))
    times = columns_["time"]
    return {
        "layout": layout,
        "days": days.tolist(),
        "clicks": int(columns_["click"].sum()),
        "times": [int(times.min()), int(times.max())] if len(times) else [],
        "counts": counts,
    }


def _join_clicks(job: Job, part: int, shown: dict[str, Ints], path: str) -> Counts:
    """Label impressions by user, ad and time; write the clicks that changed nothing."""
    impressions = state(job.work, "scan")["chunks"]["impressions"]
    clicks = gather(job, "clicks", part, ["row"], ["ad"], impressions)
    # Both ranks are over the users of both logs, so they mean the same.
    again = labels.repeated(*(clicks.columns[c] for c in ("user", "ad", "time")))
    fresh = {c: clicks.columns[c][~again] for c in ("user", "ad", "time")}
    hit, late = labels.nearest_impression(
        (shown["user"], shown["ad"], shown["time"]),
        (fresh["user"], fresh["ad"], fresh["time"]),
        round(job.recipe.convert.attribution_window * 1000),
    )
    shown["click"][hit[hit >= 0]] = 1
    kinds = np.full(len(again), "", dtype=object)
    kinds[again] = "duplicate"
    kinds[np.flatnonzero(~again)[hit < 0]] = "unmatched"
    kinds[np.flatnonzero(~again)[late]] = "further"
    used = kinds != ""
    frame = pl.DataFrame({"chunk": clicks.chunk[used], "row": clicks.columns["row"][used]})
    frame = frame.with_columns(pl.Series("kind", kinds[used].tolist(), dtype=pl.String))
    spool.write_frame(path, frame)
    return {
        "repeated clicks": int(again.sum()),
        "further clicks on a clicked impression": int(late.sum()),
        "clicks without an impression": int((hit < 0).sum()),
    }


def first_days(job: Job, share: int) -> None:
    """Task: find the first day of each ad in a share of the impressions' chunks, as its place among `midnights`."""
    scanned = state(job.work, "scan")
    midnights = [m for _, m in scanned["midnights"]]
    first = np.full(state(job.work, "dictionaries")["found"]["ad"]["size"], len(midnights), np.int32)
    for chunk in scanned["chunks"]["impressions"][share :: job.partitions]:
        there = spool.Columns(Path(f"{chunk['stem']}.rows"), chunk["layout"], 0, chunk["rows"])
        day = np.searchsorted(midnights, there["time"].astype(np.int64) + chunk["times"][0], side="right") - 1
        np.minimum.at(first, maps(job.work).of("ad", chunk["stem"])[there["ad"]], day.astype(np.int32))
    spool.write_array(job.work / "first-days" / f"{share:04}", first)


def order_ads(job: Job) -> None:
    """Write the codes of all ads that were shown, in order of their first day and then of their text; and how many
    there are up to each day."""
    found = [np.fromfile(path, np.int32) for path in sorted((job.work / "first-days").glob("*"))]
    first = np.min(found, axis=0)[1:]  # 0 is no ad
    order = spool.text_order(texts(job, "ad").slice(1))
    order = order[np.argsort(first[order], kind="stable")]
    upto = np.searchsorted(first[order], np.arange(len(state(job.work, "scan")["midnights"])), side="right")
    spool.write_array(job.work / "shown-ads", order[: upto[-1]].astype(np.uint32) + np.uint32(1))
    write_state(job, "shown ads", upto.tolist())


def _sample_negatives(job: Job, part: int, columns_: dict[str, Ints]) -> Counts:
    """Append, for each row, other ads at the same time without a click; return how many, and how many more were wanted.

    They are drawn evenly, none twice, from the ads that anybody was shown up to the row's day and its user never.
    """
    wanted = job.recipe.convert.sampled_negatives
    shown = np.fromfile(job.work / "shown-ads", np.uint32)
    n = len(shown)
    place = np.zeros(int(shown.max()) + 1, np.int64)
    place[shown] = np.arange(n)
    midnights = [m for _, m in state(job.work, "scan")["midnights"]]
    day = np.searchsorted(midnights, columns_["time"], side="right") - 1
    upto = np.array(state(job.work, "shown ads"))[day]
    base = columns_["user"].astype(np.int64) * n
    own = np.unique(base + place[columns_["ad"]])
    begin = np.searchsorted(own, base)
    free = upto - (np.searchsorted(own, base + upto) - begin)
    drawn = draw_distinct(np.random.default_rng([job.recipe.convert.seed, part]), free, wanted)
    source, column = np.nonzero(drawn >= 0)
    rank = drawn[source, column]
    # A user's own ads leave out places: the free place of a rank lies behind those with at most so many free before.
    first = np.searchsorted(own, own - own % n)
    before = own - (np.arange(len(own)) - first)
    left_out = np.searchsorted(before, base[source] + rank, side="right") - begin[source]
    ads = shown[rank + left_out]
    for name, values in columns_.items():
        added = values[source]
        if name == "ad":
            added = ads.astype(values.dtype)
        elif name == "click":
            added = np.zeros(len(source), values.dtype)
        columns_[name] = np.concatenate([values, added])
    return {"sampled negatives": len(source), "negatives that no ad was left for": drawn.size - len(source)}


def draw_distinct(rng: np.random.Generator, sizes: Ints, wanted: int) -> Ints:
    """Draw for each size `wanted` distinct numbers below it, [sizes, wanted], or as many as there are and −1.

    By Floyd's method: every set of numbers is as likely as any other.
    """
    drawn = np.full((len(sizes), wanted), -1, np.int64)
    there = np.minimum(sizes, wanted)
    for i in range(wanted):
        rows = np.flatnonzero(there > i)
        highest = sizes[rows] - there[rows] + i
        number = rng.integers(0, highest, endpoint=True)
        taken = (drawn[rows, :i] == number[:, None]).any(axis=1)
        drawn[rows, i] = np.where(taken, highest, number)
    return drawn
