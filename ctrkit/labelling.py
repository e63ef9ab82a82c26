"""Label a partition of users: gather its rows from all chunks, drop duplicates, join clicks, sort."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import labels, spool
from ctrkit.job import Chunk, Counts, Job, maps, state
from ctrkit.spool import Ints

CLOCK_BOUND = 1 << 27
"""Of the milliseconds in a day (of up to 25 hours)."""


@dataclass
class Rows:
    """The rows of one partition of a log, in the order of the log."""

    columns: dict[str, Ints]
    """`user` (rank of the user's text in the partition), `time`, codes by dictionary, …"""
    chunk: Ints
    row: Ints
    """Of the file."""
    users: pl.Series
    bases: list[int]
    """Where each chunk's rows begin here, and where in the chunk's file they begin."""
    starts: list[int]


def _gather(job: Job, log: str, part: int, names: Iterable[str], users_too: Sequence[Chunk] = ()) -> Rows:
    """Read a partition's rows from all chunks of a log."""
    chunks: list[Chunk] = state(job.work, "scan")["chunks"][log]
    found: dict[str, list[Ints]] = {name: [] for name in names}
    chunk_of, row_of, words, bases, starts = [], [], [], [0], []
    for i, chunk in enumerate(chunks):
        a, b = chunk["begins"][part], chunk["begins"][part + 1]
        path, layout = Path(f"{chunk['stem']}.rows"), chunk["layout"]
        for name, parts in found.items():
            column = spool.read(path, layout, name, a, b)
            if name in chunk["words"]:
                column = maps(job.work).translate(name, chunk["stem"], column)
            elif name == "user":
                column = column - np.uint32(chunk["users"][part])
            parts.append(column)
        chunk_of.append(np.full(b - a, i, np.uint32))
        row_of.append(spool.read(path, layout, "row", a, b).astype(np.int64) + chunk["first_row"])
        words.append(_users(chunk, part))
        bases.append(bases[-1] + b - a)
        starts.append(a)
    own = len(words)
    words += [_users(chunk, part) for chunk in users_too]
    if len({w.dtype for w in words}) > 1:
        words = [w.cast(pl.String) for w in words]
    codes, distinct = spool.code(pl.concat(words) if words else pl.Series("user", [], dtype=pl.String))
    distinct = distinct.cast(pl.String)
    order = distinct.arg_sort().to_numpy()
    rank = np.empty(len(order) + 1, np.uint32)
    rank[order + 1] = np.arange(len(order))
    ranks = np.split(rank[codes], np.cumsum([w.len() for w in words])[:-1]) if words else []
    found["user"] = [ranks[i][local] for i, local in enumerate(found["user"][:own])]
    return Rows(
        {n: np.concatenate(p) if p else np.empty(0, np.int64) for n, p in found.items()},
        np.concatenate(chunk_of) if chunk_of else np.empty(0, np.uint32),
        np.concatenate(row_of) if row_of else np.empty(0, np.int64),
        distinct.gather(order),
        bases,
        starts,
    )


def _users(chunk: Chunk, part: int) -> pl.Series:
    a, b = chunk["users"][part], chunk["users"][part + 1]
    return pl.read_ipc(f"{chunk['stem']}.users")["user"].slice(a, b - a)


def _day_order(job: Job, columns: Mapping[str, Ints], users: int) -> tuple[Ints, Ints]:
    """Return the day of each row, and the order by day, user, time and place in the log."""
    midnights = np.array([m for _, m in state(job.work, "scan")["midnights"]])
    day = (np.searchsorted(midnights, columns["time"], side="right") - 1).astype(np.uint32)
    clock = (columns["time"] - midnights[day]).astype(np.uint32)
    order = spool.order_by([(day, len(midnights)), (columns["user"], max(users, 1)), (clock, CLOCK_BOUND)], len(day))
    return day, order


def label_impressions(job: Job, part: int) -> dict[str, Any]:
    """Task: drop duplicates, label, sort. Returns layout, rows by day, and counts."""
    scanned = state(job.work, "scan")
    options = job.recipe.convert
    dictionaries_here = list(scanned["chunks"]["impressions"][0]["words"])
    own = ["user", "time", *dictionaries_here, *(["click"] if options.label else [])]
    joined_by_time = bool(scanned["chunks"]["clicks"]) and "clicks" not in scanned["ids"]
    rows = _gather(job, "impressions", part, own, scanned["chunks"]["clicks"] if joined_by_time else ())
    columns_ = rows.columns
    n = len(rows.row)
    columns_.setdefault("click", np.full(n, bool(options.sampled_negatives), np.int8))
    duplicate = np.zeros(n, bool)
    counts: Counts = {}
    if scanned["ids"]:
        for q, begins in enumerate(state(job.work, "match")):
            marks = pl.read_ipc(job.work / "marks" / f"{q:04}").slice(begins[part], begins[part + 1] - begins[part])
            chunk = marks["chunk"].to_numpy()
            at = np.array(rows.bases)[chunk] + marks["at"].to_numpy() - np.array(rows.starts, np.int64)[chunk]
            duplicate[at[marks["mark"].to_numpy() == labels.DUPLICATE]] = True
            columns_["click"][at[marks["mark"].to_numpy() == labels.CLICKED]] = 1
    if options.drop_repeats or (options.drop_repeats is None and options.clicks is not None and not scanned["ids"]):
        duplicate |= labels.repeated(columns_["user"], columns_["ad"], columns_["time"])
    stem = job.work / "labelled" / f"impressions-{part:04}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    _write_unused(f"{stem}.duplicates", rows, duplicate)
    counts["duplicates"] = int(duplicate.sum())
    if counts["duplicates"]:
        columns_ = {name: c[~duplicate] for name, c in columns_.items()}
        rows = Rows(columns_, rows.chunk[~duplicate], rows.row[~duplicate], rows.users, [], [])
    if joined_by_time:
        counts |= _join_clicks(job, part, rows, f"{stem}.clicks")
    if options.negative_rate < 1:
        columns_ |= {"__chunk": rows.chunk, "__row": rows.row}
    if options.sampled_negatives:
        counts["sampled negatives"] = _sample_negatives(job, part, columns_)
    day, order = _day_order(job, columns_, rows.users.len())
    layout = spool.write(Path(f"{stem}.rows"), {name: c[order] for name, c in columns_.items()})
    spool.write_frame(f"{stem}.users", rows.users.to_frame("user"))
    by_day = np.bincount(day, minlength=len(scanned["midnights"]))
    times = columns_["time"]
    return {
        "layout": layout,
        "days": by_day.tolist(),
        "clicks": int(columns_["click"].sum()),
        "times": [int(times.min()), int(times.max())] if len(times) else [],
        "counts": counts,
    }


def _write_unused(path: str, rows: Rows, which: Ints) -> None:
    spool.write_frame(path, pl.DataFrame({"chunk": rows.chunk[which], "row": rows.row[which]}))


def _join_clicks(job: Job, part: int, rows: Rows, path: str) -> Counts:
    """Label impressions by user, ad and time; write the clicks that changed nothing."""
    impressions = state(job.work, "scan")["chunks"]["impressions"]
    clicks = _gather(job, "clicks", part, ["user", "time", "ad"], impressions)
    # Both ranks are over the users of both logs, so they mean the same.
    again = labels.repeated(*(clicks.columns[c] for c in ("user", "ad", "time")))
    fresh = {c: clicks.columns[c][~again] for c in ("user", "ad", "time")}
    shown = rows.columns
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
    frame = pl.DataFrame(
        {"chunk": clicks.chunk[used], "row": clicks.row[used], "kind": pl.Series(kinds[used].tolist(), dtype=pl.String)}
    )
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


def label_behaviours(job: Job, part: int) -> dict[str, Any]:
    """Task: sort a partition's behaviours. Returns layout and rows by day."""
    scanned = state(job.work, "scan")
    stem = job.work / "labelled" / f"behaviours-{part:04}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    if not scanned["chunks"]["behaviours"]:
        return {"layout": {}, "days": [0] * len(scanned["midnights"])}
    first = scanned["chunks"]["behaviours"][0]
    names = ["user", "time", *first["words"], *(["dwell"] if "dwell" in first["layout"] else [])]
    rows = _gather(job, "behaviours", part, names)
    day, order = _day_order(job, rows.columns, rows.users.len())
    layout = spool.write(Path(f"{stem}.rows"), {name: c[order] for name, c in rows.columns.items()})
    spool.write_frame(f"{stem}.users", rows.users.to_frame("user"))
    return {"layout": layout, "days": np.bincount(day, minlength=len(scanned["midnights"])).tolist()}
