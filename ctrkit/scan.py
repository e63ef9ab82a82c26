"""The first pass over a log: parse a piece, turn texts into codes, deal the rows to partitions of users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import days, spool
from ctrkit.columns import BETWEEN
from ctrkit.parsing import core, parse
from ctrkit.pieces import ROW, Piece
from ctrkit.spool import Ints
from ctrkit.tables import RawTable

SHORT_WORDS = 4096
CLOCK = {"clock.hour": range(24), "clock.weekday": range(1, 8)}


@dataclass(frozen=True)
class Log:
    """What to take from a log."""

    table: RawTable
    keys: Mapping[str, tuple[str, ...]]
    """Dictionary → the columns whose texts it holds."""
    with_id: bool
    partitions: int
    zone: str
    begin: int = 0
    end: int | None = None
    """Rows of other times (epoch milliseconds; `end` not included) are left out, clicks known by an id marked."""

    @property
    def by_user(self) -> bool:
        """Whether its rows have a user to be dealt by (clicks known by an id have none)."""
        return not (self.table.name == "clicks" and self.with_id)

    def columns(self) -> list[str]:
        """Return the columns to read."""
        own = [c for keys in self.keys.values() for c in keys if c not in CLOCK]
        extra = ["dwell"] if self.table.name == "behaviours" and "dwell" in self.table.names else []
        if not self.by_user and self.end is not None and "time" in self.table.names:
            extra.append("time")
        return list(dict.fromkeys([*core(self.table, with_id=self.with_id), *own, *extra]))


def scan(log: Log, number: int, piece: Piece, stem: Path) -> dict[str, Any]:
    """Write the chunks of a piece, files that begin with `stem`.

    Returns `rows` (in the piece), `read` (for which `where` holds), `rejected`, `other days`, and for each chunk where
    its rows and dictionaries begin.
    """
    needed = core(log.table, with_id=log.with_id)
    result: dict[str, Any] = {"file": number, "rows": 0, "read": 0, "rejected": 0, "other days": 0, "chunks": []}
    bad_rows = []
    for i, (frame, rows) in enumerate(log.table.read(number, piece)):
        good, bad = parse(log.table, frame, needed, log.columns())
        result["rows"] += rows
        result["read"] += frame.height
        bad_rows.append(bad)
        if log.end is not None and log.by_user:
            inside = good.filter(pl.col("time").is_between(log.begin, log.end, closed="left"))
            result["other days"] += good.height - inside.height
            good = inside
        if good.height:
            result["chunks"].append(_write_chunk(log, good, f"{stem}-{i:04}"))
    rejected = pl.concat(bad_rows) if bad_rows else pl.DataFrame()
    if rejected.height:
        result["rejected"] = rejected.height
        rejected.write_parquet(f"{stem}-rejects.parquet")
    return result


def _write_chunk(log: Log, good: pl.DataFrame, stem: str) -> dict[str, Any]:
    """Write STEM.rows, STEM.words and, where rows have ids, STEM.ids."""
    columns: dict[str, Ints] = {}
    chunk: dict[str, Any] = {"stem": stem, "rows": good.height, "first_row": good[ROW][0]}
    if log.table.name != "behaviours":  # of which none becomes a duplicate or otherwise unused
        columns["row"] = (good[ROW] - good[ROW][0]).to_numpy().astype(np.uint32)
    if log.by_user:
        users, words = spool.code(good["user"])
        part_of_user = spool.partition_of(words, log.partitions)
        by_part = np.argsort(part_of_user, kind="stable")
        chunk["users"] = spool.offsets(part_of_user, log.partitions)
        lengths = np.diff(chunk["users"])
        rank = np.zeros(len(by_part) + 1, spool.smallest(max(lengths)))
        rank[by_part + 1] = np.arange(len(by_part)) - np.repeat(chunk["users"][:-1], lengths)
        columns["user"] = rank[users]
        parts = np.concatenate([np.zeros(1, np.uint16), part_of_user])[users]
        spool.write_frame(f"{stem}.users", words.gather(by_part).to_frame("user"))
        order = np.argsort(parts, kind="stable")
        times = good["time"].to_numpy()
        first, last = int(times.min()), int(times.max())
        columns["time"] = (times - first).astype(spool.smallest(last - first + 1))
        chunk["times"] = [first, last]
    else:
        parts, order = np.zeros(good.height, np.uint16), np.arange(good.height)
        if "time" in good.columns:  # a click of any time may answer an impression
            inside = good["time"].is_between(log.begin, log.end, closed="left").fill_null(True)
            columns["other_day"] = (~inside).cast(pl.UInt8).to_numpy()
    chunk["begins"] = spool.offsets(parts, log.partitions)
    if "click" in good.columns:
        columns["click"] = good["click"].to_numpy()
    if "dwell" in good.columns:  # from 1, so that 0 is unknown
        dwell = (good["dwell"] + 1).fill_null(0).to_numpy()
        columns["dwell"] = dwell.astype(spool.smallest(int(dwell.max()) + 1))
    chunk["words"] = _add_codes(log, good, columns, stem)
    chunk["layout"] = spool.write(Path(f"{stem}.rows"), {n: c[order] for n, c in columns.items()})
    if log.with_id:
        chunk["ids"], chunk["ids_layout"] = _write_ids(log, good["id"], parts, order, stem)
    return chunk


def _add_codes(log: Log, good: pl.DataFrame, columns: dict[str, Ints], stem: str) -> dict[str, list[Any]]:
    """Add a column of codes a dictionary, and write the dictionaries' words.

    STEM.words has all the short ones, a long one has a file of its own. Returns, by dictionary, the end of the file's
    name, and where the words begin and end in it.
    """
    short: list[pl.Series] = []
    places: dict[str, list[Any]] = {}
    at = 0
    for name, keys in log.keys.items():
        if keys[0] in CLOCK and len(keys) == 1:
            local = days.local("time", log.zone).dt
            clock = local.hour() if keys[0] == "clock.hour" else local.weekday() - 1
            columns[name] = good.select(clock.cast(pl.UInt8) + 1).to_series().to_numpy()
            words = pl.Series("value", [str(v) for v in CLOCK[keys[0]]])
        else:
            columns[name], words = spool.code(_texts(good, keys, log.zone))
        whole = words.dtype == pl.Int64
        if words.len() > SHORT_WORDS:
            end = f".words-{len(places)}"
            spool.write_frame(stem + end, words.to_frame())
            places[name] = [end, 0, words.len(), whole]
        else:
            short.append(words.cast(pl.String))
            places[name] = [".words", at, at + words.len(), whole]
            at += words.len()
    if short:
        spool.write_frame(f"{stem}.words", pl.concat(short).to_frame())
    return places


def _texts(good: pl.DataFrame, keys: Sequence[str], zone: str) -> pl.Series:
    if len(keys) == 1:
        return good[keys[0]]
    local = days.local("time", zone).dt
    clock = {"clock.hour": local.hour(), "clock.weekday": local.weekday()}
    texts = [clock[k].cast(pl.String) if k in clock else pl.col(k).fill_null("") for k in keys]
    return good.select(pl.concat_str(texts, separator=BETWEEN)).to_series()


def _write_ids(log: Log, ids: pl.Series, parts: Ints, order: Ints, stem: str) -> tuple[list[int], spool.Layout]:
    """Write STEM.ids, the ids in order of their own partition, and STEM.at: `part` (of the user), `at` (the row's place
    in STEM.rows); return where each partition begins, and the layout of the latter."""
    at = np.empty(len(order), np.uint32)
    at[order] = np.arange(len(order), dtype=np.uint32)
    own = spool.partition_of(ids, log.partitions)
    by_part = np.argsort(own, kind="stable")
    spool.write_frame(f"{stem}.ids", ids.gather(by_part).to_frame("id"))
    layout = spool.write(Path(f"{stem}.at"), {"part": parts[by_part], "at": at[by_part]})
    return spool.offsets(own, log.partitions), layout
