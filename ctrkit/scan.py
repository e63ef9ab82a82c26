"""The first pass over a log: parse a piece, turn texts into codes, deal the rows to partitions of users."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import days, plain_csv, spool
from ctrkit.columns import BETWEEN
from ctrkit.parsing import core, parse
from ctrkit.pieces import ROW, Piece, Text, texts
from ctrkit.plain_csv import PlainRows
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

    @property
    def needed(self) -> list[str]:
        """The columns that no row may lack."""
        return core(self.table, with_id=self.with_id)

    def texts(self) -> list[str]:
        """Return the columns whose texts are coded."""
        keys = [c for some in self.keys.values() for c in some if c not in CLOCK]
        return list(dict.fromkeys([*(["user"] if self.by_user else []), *keys]))

    def columns(self) -> list[str]:
        """Return the columns to read."""
        own = [c for keys in self.keys.values() for c in keys if c not in CLOCK]
        extra = ["dwell"] if self.table.name == "behaviours" and "dwell" in self.table.names else []
        if not self.by_user and self.end is not None and "time" in self.table.names:
            extra.append("time")
        return list(dict.fromkeys([*self.needed, *own, *extra]))


def scan(log: Log, number: int, piece: Piece, stem: Path) -> dict[str, Any]:
    """Write the chunks of a piece, files that begin with `stem`.

    Returns `rows` (in the piece), `read` (for which `where` holds), `rejected`, `other days`, and for each chunk where
    its rows and dictionaries begin.
    """
    result: dict[str, Any] = {"file": number, "rows": 0, "read": 0, "rejected": 0, "other days": 0, "chunks": []}
    bad_rows = []
    for i, some in enumerate(_read(log, number, piece)):
        result["rows"] += some.rows
        result["read"] += some.read
        result["other days"] += some.other_days
        bad_rows.append(some.bad)
        if some.good.height:
            result["chunks"].append(_write_chunk(log, some.good, f"{stem}-{i:04}"))
    rejected = pl.concat(bad_rows) if bad_rows else pl.DataFrame()
    if rejected.height:
        result["rejected"] = rejected.height
        rejected.write_parquet(f"{stem}-rejects.parquet")
    return result


@dataclass(frozen=True)
class Some:
    """Some rows of a piece."""

    rows: int
    read: int
    other_days: int
    good: "FrameRows | PlainRows"
    bad: pl.DataFrame


def _read(log: Log, number: int, piece: Piece) -> Iterator[Some]:
    """Yield the rows of a piece; plain text the quick way."""
    if not plain_csv.is_plain(log.table, number, log.texts(), log.needed):
        yield from _read_frames(log, number, piece)
        return
    begin = 1
    for text in texts(log.table.files[number], piece):
        found = plain_csv.read(log.table, number, text, begin, log.texts(), log.needed)
        if found is None or (log.end is not None and not found.is_between(log.begin, log.end)):
            for some in _read_frames(log, number, piece, text, begin):
                begin += some.rows
                yield some
        else:
            begin += found.rows
            yield Some(found.rows, found.rows, 0, found, found.bad)


def _read_frames(log: Log, number: int, piece: Piece, text: Text | None = None, begin: int = 1) -> Iterator[Some]:
    for frame, rows in log.table.read(number, piece, text, begin):
        good, bad = parse(log.table, frame, log.needed, log.columns())
        other_days = 0
        if log.end is not None and log.by_user:
            inside = good.filter(pl.col("time").is_between(log.begin, log.end, closed="left"))
            other_days = good.height - inside.height
            good = inside
        yield Some(rows, frame.height, other_days, FrameRows(good, log), bad)


class FrameRows:
    """The good rows of a log as `parsing.parse` gives them."""

    def __init__(self, good: pl.DataFrame, log: Log) -> None:
        self.height = good.height
        self._good, self._log = good, log

    @property
    def row(self) -> Ints:
        """The number of each row in the piece, from 1."""
        return self._good[ROW].to_numpy()

    @property
    def time(self) -> Ints:
        """Int64 milliseconds."""
        return self._good["time"].to_numpy()

    @property
    def other_day(self) -> Ints | None:
        """Whether (0, 1) a click known by its id is of a day that is not read; any may answer an impression."""
        if self._log.by_user or "time" not in self._good.columns:
            return None
        inside = self._good["time"].is_between(self._log.begin, self._log.end, closed="left").fill_null(True)
        return (~inside).cast(pl.UInt8).to_numpy()

    @property
    def click(self) -> Ints | None:
        """Int8, 0 or 1."""
        return self._good["click"].to_numpy() if "click" in self._good.columns else None

    @property
    def dwell(self) -> Ints | None:
        """Int64 milliseconds from 1; 0 is unknown."""
        return (self._good["dwell"] + 1).fill_null(0).to_numpy() if "dwell" in self._good.columns else None

    def code(self, column: str) -> tuple[Ints, pl.Series]:
        """Return codes and dictionary of a column of texts."""
        return spool.code(self._good[column])

    def code_users(self, partitions: int) -> tuple[Ints, pl.Series, Ints]:
        """Return codes and dictionary of the users, and the partition of each of its words."""
        codes, words = self.code("user")
        return codes, words, spool.partition_of(words, partitions)

    def ids(self, partitions: int) -> tuple[pl.Series, Ints]:
        """Return the id of each row, and its partition."""
        return self._good["id"], spool.partition_of(self._good["id"], partitions)


def _write_chunk(log: Log, good: FrameRows | PlainRows, stem: str) -> dict[str, Any]:
    """Write STEM.rows, STEM.words and, where rows have ids, STEM.ids."""
    columns: dict[str, Ints] = {}
    row = good.row
    chunk: dict[str, Any] = {"stem": stem, "rows": good.height, "first_row": int(row[0])}
    if log.table.name != "behaviours":  # of which none becomes a duplicate or otherwise unused
        columns["row"] = (row - row[0]).astype(np.uint32)
    if log.by_user:
        users, words, part_of_user = good.code_users(log.partitions)
        by_part = np.argsort(part_of_user, kind="stable")
        chunk["users"] = spool.offsets(part_of_user, log.partitions)
        lengths = np.diff(chunk["users"])
        rank = np.zeros(len(by_part) + 1, spool.smallest(max(lengths)))
        rank[by_part + 1] = np.arange(len(by_part)) - np.repeat(chunk["users"][:-1], lengths)
        columns["user"] = rank[users]
        parts = np.concatenate([np.zeros(1, np.uint16), part_of_user])[users]
        spool.write_frame(f"{stem}.users", words.gather(by_part).to_frame("user"))
        order = np.argsort(parts, kind="stable")
        times = good.time
        first, last = int(times.min()), int(times.max())
        columns["time"] = (times - first).astype(spool.smallest(last - first + 1))
        chunk["times"] = [first, last]
    else:
        parts, order = np.zeros(good.height, np.uint16), np.arange(good.height)
        if good.other_day is not None:
            columns["other_day"] = good.other_day
    chunk["begins"] = spool.offsets(parts, log.partitions)
    if good.click is not None:
        columns["click"] = good.click
    if good.dwell is not None:
        dwell = good.dwell
        columns["dwell"] = dwell.astype(spool.smallest(int(dwell.max()) + 1))
    chunk["words"] = _add_codes(log, good, columns, stem)
    chunk["layout"] = spool.write(Path(f"{stem}.rows"), {n: c[order] for n, c in columns.items()})
    if log.with_id:
        chunk["ids"], chunk["ids_layout"] = _write_ids(log, good, parts, order, stem)
    return chunk


def _add_codes(log: Log, good: FrameRows | PlainRows, columns: dict[str, Ints], stem: str) -> dict[str, list[Any]]:
    """Add a column of codes a dictionary, and write the dictionaries' words.

    STEM.words has all the short ones, a long one has a file of its own. Returns, by dictionary, the end of the file's
    name, and where the words begin and end in it.
    """
    short: list[pl.Series] = []
    places: dict[str, list[Any]] = {}
    at = 0
    for name, keys in log.keys.items():
        columns[name], words = _code(good, keys, log.zone) if len(keys) == 1 else _code_together(good, keys, log.zone)
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


def _code(good: FrameRows | PlainRows, keys: Sequence[str], zone: str) -> tuple[Ints, pl.Series]:
    """Return codes and dictionary of a column, or of what the clock says."""
    if keys[0] not in CLOCK:
        return good.code(keys[0])
    local = days.local("time", zone).dt
    clock = local.hour() if keys[0] == "clock.hour" else local.weekday() - 1
    codes = pl.DataFrame({"time": good.time}).select(clock.cast(pl.UInt8) + 1).to_series().to_numpy()
    return codes, pl.Series("value", [str(v) for v in CLOCK[keys[0]]])


def _code_together(good: FrameRows | PlainRows, keys: Sequence[str], zone: str) -> tuple[Ints, pl.Series]:
    """Return codes and dictionary of the texts of several columns, those of a row joined to one."""
    together = np.zeros(good.height, np.int64)
    texts_of: list[pl.Series] = []
    for key in keys:
        codes, words = _code(good, (key,), zone)
        both = together * (words.len() + 1) + codes
        found, together = np.unique(both, return_inverse=True)
        texts_of = [known.gather(found // (words.len() + 1)) for known in texts_of]
        own = pl.concat([pl.Series(key, [""]), words.cast(pl.String).rename(key)])
        texts_of.append(own.gather(found % (words.len() + 1)))
    joined = pl.DataFrame(texts_of).select(pl.concat_str(pl.all(), separator=BETWEEN).alias("value")).to_series()
    return (together + 1).astype(spool.smallest(joined.len() + 1)), joined


def _write_ids(
    log: Log, good: FrameRows | PlainRows, parts: Ints, order: Ints, stem: str
) -> tuple[list[int], spool.Layout]:
    """Write STEM.ids, the ids in order of their own partition, and STEM.at: `part` (of the user), `at` (the row's place
    in STEM.rows); return where each partition begins, and the layout of the latter."""
    at = np.empty(len(order), np.uint32)
    at[order] = np.arange(len(order), dtype=np.uint32)
    ids, own = good.ids(log.partitions)
    by_part = np.argsort(own, kind="stable")
    spool.write_frame(f"{stem}.ids", ids.gather(by_part).to_frame("id"))
    layout = spool.write(Path(f"{stem}.at"), {"part": parts[by_part], "at": at[by_part]})
    return spool.offsets(own, log.partitions), layout
