"""Which impressions are duplicates and which were clicked: by id, or by user, ad and time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import spool
from ctrkit.spool import Ints

Chunk = Mapping[str, Any]
DUPLICATE, CLICKED = 1, 2


def match_ids(
    part: int,
    partitions: int,
    impressions: Sequence[Chunk],
    clicks: Sequence[Chunk],
    out: Path,
    some_days: bool = False,
) -> dict[str, Any]:
    """Find, among the ids of one partition, duplicates and clicks.

    Writes OUT: `chunk`, `at` (row of the chunk's file) and `mark` of the impressions to change, in order of their
    user's partition; and OUT.clicks: `chunk`, `at`, `kind` of the clicks that change nothing. Returns where each
    partition begins, and counts.

    some_days: the impressions are of some days only, the clicks of any. Those without an impression here whose time is
    of other days, or not in the log, are left out and counted alone.
    """
    shown = _ids(part, impressions, with_part=True)
    first = shown["id"].is_first_distinct()
    repeats = shown.filter(~first).with_columns(pl.lit(DUPLICATE, dtype=pl.UInt8).alias("mark"))
    marks = [repeats]
    counts = {"duplicates": repeats.height}
    if clicks:
        clicked = _ids(part, clicks, with_part=False)
        if clicked["id"].dtype != shown["id"].dtype:
            shown, clicked = (ids.with_columns(pl.col("id").cast(pl.String)) for ids in (shown, clicked))
        firsts = shown.filter(first)
        if some_days:
            elsewhere = _other_day(clicked, clicks) & ~clicked["id"].is_in(firsts["id"].implode())
            counts["clicks of other days"] = int(elsewhere.sum())
            clicked = clicked.filter(~elsewhere)
        new = clicked["id"].is_first_distinct()
        hit = firsts.join(clicked.filter(new).select("id"), on="id", how="semi", maintain_order="left")
        marks.append(hit.with_columns(pl.lit(CLICKED, dtype=pl.UInt8).alias("mark")))
        lost = clicked.filter(new).join(firsts.select("id"), on="id", how="anti", maintain_order="left")
        useless = pl.concat(
            [
                clicked.filter(~new).with_columns(pl.lit("duplicate").alias("kind")),
                lost.with_columns(pl.lit("unmatched").alias("kind")),
            ]
        ).select("chunk", "at", "kind")
        counts |= {"repeated clicks": int((~new).sum()), "clicks without an impression": lost.height}
        spool.write_frame(f"{out}.clicks", useless)
    every = pl.concat(marks).sort("part", "chunk", "at")
    spool.write_frame(out, every.select("chunk", "at", "mark"))
    return {"begins": spool.offsets(every["part"].to_numpy(), partitions), "counts": counts}


def _ids(part: int, chunks: Sequence[Chunk], *, with_part: bool) -> pl.DataFrame:
    """Return `id` (Int64 where all are whole numbers, else String), `chunk`, `at` and, if asked, `part` of the ids of a
    partition, in the order of the log."""
    frames = []
    for i, chunk in enumerate(chunks):
        a, b = chunk["ids"][part], chunk["ids"][part + 1]
        if b > a:
            there = spool.Columns(Path(f"{chunk['stem']}.at"), chunk["ids_layout"], a, b)
            columns = {name: there[name] for name in (("at", "part") if with_part else ("at",))}
            ids = spool.mapped(f"{chunk['stem']}.ids").slice(a, b - a)
            own = pl.DataFrame({"id": ids, "chunk": pl.repeat(i, b - a, dtype=pl.UInt32, eager=True), **columns})
            frames.append(own)
    if not frames:
        schema = {"id": pl.String, "chunk": pl.UInt32, "at": pl.UInt32}
        return pl.DataFrame(schema=schema | ({"part": pl.UInt16} if with_part else {}))
    if len({frame["id"].dtype for frame in frames}) > 1:
        frames = [frame.with_columns(pl.col("id").cast(pl.String)) for frame in frames]
    return pl.concat(frames)


def _other_day(ids: pl.DataFrame, chunks: Sequence[Chunk]) -> pl.Series:
    """Return which rows (Boolean) are of other days; where the log has no times, all may be."""
    other = np.ones(ids.height, bool)
    at = ids["at"].to_numpy()
    for (number,), rows in ids.with_row_index("row").group_by("chunk"):
        chunk = chunks[int(str(number))]
        if "other_day" in chunk["layout"]:
            there = spool.Columns(Path(f"{chunk['stem']}.rows"), chunk["layout"], 0, chunk["rows"])
            row = rows["row"].to_numpy()
            other[row] = there["other_day"][at[row]] > 0
    return pl.Series("other", other)


def repeated(user: Ints, ad: Ints, time: Ints) -> Ints:
    """Return which rows (Boolean) repeat the user, ad and time of an earlier one."""
    frame = pl.DataFrame({"user": user, "ad": ad, "time": time})
    return ~frame.select(pl.struct("user", "ad", "time").is_first_distinct()).to_series().to_numpy()


def nearest_impression(
    shown: tuple[Ints, Ints, Ints], clicked: tuple[Ints, Ints, Ints], window: int
) -> tuple[Ints, Ints]:
    """Give each click to the latest impression of its user and ad at or before it, at most `window` earlier.

    Parameters
    ----------
    shown, clicked: user, ad, time (milliseconds) of impressions and clicks, in the order of the logs.
    window: milliseconds.

    Returns the impression (row of `shown`) of each click, −1 for none; and which clicks (Boolean) fell on an impression
    that an earlier click had already. Of impressions at the same time the last in the log counts.
    """
    left = pl.DataFrame(dict(zip(("user", "ad", "time"), clicked, strict=True))).with_row_index("click")
    right = pl.DataFrame(dict(zip(("user", "ad", "time"), shown, strict=True))).with_row_index("row")
    found = left.sort("time", "click").join_asof(
        right.sort("time", "row"),
        on="time",
        by=["user", "ad"],
        strategy="backward",
        tolerance=window,
        check_sortedness=False,
    )
    again = (
        found["row"].is_not_null()
        & ~pl.DataFrame({"r": found["row"]}).select(pl.col("r").is_first_distinct()).to_series()
    )
    back = found.with_columns(again.alias("again")).sort("click")
    return back["row"].cast(pl.Int64).fill_null(-1).to_numpy(), back["again"].to_numpy()
