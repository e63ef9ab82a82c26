"""Label the impressions of a partition of users: drop duplicates, join clicks, sort."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import labels, spool
from ctrkit.gathering import Lookup, by_day, gather
from ctrkit.job import Counts, Job, state
from ctrkit.spool import Ints


def label_impressions(job: Job, part: int) -> dict[str, Any]:
    """Task: drop duplicates, label, sort. Returns layout, rows by day, and counts."""
    scanned = state(job.work, "scan")
    options = job.recipe.convert
    dictionaries_here = list(scanned["chunks"]["impressions"][0]["words"])
    joined_by_time = bool(scanned["chunks"]["clicks"]) and "clicks" not in scanned["ids"]
    plain = ["row", *(["click"] if options.label else [])]
    codes: dict[str, Lookup] = {name: (name, None) for name in dictionaries_here}
    rows = gather(job, "impressions", part, plain, codes, scanned["chunks"]["clicks"] if joined_by_time else ())
    columns_ = rows.columns
    row, chunk_of = columns_.pop("row"), rows.chunk
    n = len(row)
    columns_.setdefault("click", np.full(n, bool(options.sampled_negatives), np.int8))
    duplicate = np.zeros(n, bool)
    counts: Counts = {}
    if scanned["ids"]:
        for q, begins in enumerate(state(job.work, "match")):
            marks = pl.read_ipc(job.work / "marks" / f"{q:04}").slice(begins[part], begins[part + 1] - begins[part])
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
        counts["sampled negatives"] = _sample_negatives(job, part, columns_)
    days, order = by_day(job, columns_, rows.users.len())
    layout = spool.write(Path(f"{stem}.rows"), {name: c[order] for name, c in columns_.items()})
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
    clicks = gather(job, "clicks", part, ["row"], {"ad": ("ad", None)}, impressions)
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


def _sample_negatives(job: Job, part: int, columns_: dict[str, Ints]) -> int:
    """Append, for each row, other ads at the same time without a click; return how many."""
    wanted = job.recipe.convert.sampled_negatives
    ads = state(job.work, "dictionaries")["found"]["ad"]["size"] - 1
    rng = np.random.default_rng([job.recipe.convert.seed, part])
    user, ad = columns_["user"].astype(np.int64), columns_["ad"].astype(np.int64)
    known = np.unique(user * (ads + 1) + ad)
    source = np.repeat(np.arange(len(user)), wanted)
    drawn = np.zeros(len(source), np.int64)
    left = np.flatnonzero(np.bincount(known // (ads + 1), minlength=int(user.max(initial=0)) + 1)[user[source]] < ads)
    usable = np.zeros(len(source), bool)
    usable[left] = True
    while len(left):
        drawn[left] = rng.integers(1, ads + 1, len(left))
        pairs = user[source[left]] * (ads + 1) + drawn[left]
        place = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
        left = left[known[place] == pairs]
    source, drawn = source[usable], drawn[usable]
    for name, column in columns_.items():
        added = column[source]
        if name == "ad":
            added = drawn.astype(column.dtype)
        elif name == "click":
            added = np.zeros(len(source), column.dtype)
        columns_[name] = np.concatenate([column, added])
    return len(source)
