"""The rows of one partition of users, gathered from all chunks of a log, and their order by day, user and time."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ctrkit import spool
from ctrkit.job import Chunk, Job, maps, state
from ctrkit.spool import Ints

CLOCK_BOUND = 1 << 27
"""Of the milliseconds in a day (of up to 25 hours)."""


@dataclass
class Rows:
    """The rows of one partition of a log, in the order of the log."""

    columns: dict[str, Ints]
    """`user` (rank of the user's text in the partition), `time`, what was asked for, …"""
    users: pl.Series
    """By rank."""
    lengths: list[int]
    """How many of each chunk there are."""
    starts: list[int]
    """Where they begin in the chunk's file."""

    @property
    def bases(self) -> Ints:
        """Where each chunk's rows begin here."""
        return np.cumsum([0, *self.lengths])

    @property
    def chunk(self) -> Ints:
        """The chunk of each row."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.uint32), self.lengths)


def gather(
    job: Job, log: str, part: int, plain: Sequence[str], coded: Iterable[str], users_too: Sequence[Chunk] = ()
) -> Rows:
    """Read a partition's rows from all chunks of a log.

    Parameters
    ----------
    plain: columns to take as they are; `user` and `time` come by themselves, and `row` is the row of the file.
    coded: dictionaries whose codes to take.
    users_too: chunks of another log whose users get ranks as well.
    """
    chunks: list[Chunk] = state(job.work, "scan")["chunks"][log]
    coded = list(dict.fromkeys(coded))
    found: dict[str, list[Ints]] = {name: [] for name in ("user", "time", *plain, *coded)}
    words = []
    for chunk in chunks:
        a, b = chunk["begins"][part], chunk["begins"][part + 1]
        there = spool.Columns(Path(f"{chunk['stem']}.rows"), chunk["layout"], a, b)
        found["user"].append(there["user"])
        found["time"].append(there["time"].astype(np.int64) + chunk["times"][0])
        for name in plain:
            column = there[name]
            found[name].append(column.astype(np.int64) + chunk["first_row"] if name == "row" else column)
        for name in coded:
            found[name].append(spool.take(maps(job.work).of(name, chunk["stem"]), there[name]))
        words.append(_users(chunk, part))
    users, ranks = _rank([*words, *(_users(chunk, part) for chunk in users_too)])
    found["user"] = [spool.take(ranks[i], local) for i, local in enumerate(found["user"])]
    lengths = [len(times) for times in found["time"]]
    empty = {"user": np.uint32, "time": np.int64, "row": np.int64}
    return Rows(
        {n: np.concatenate(p) if p else np.empty(0, empty.get(n, np.uint32)) for n, p in found.items()},
        users,
        lengths,
        [chunk["begins"][part] for chunk in chunks],
    )


def _users(chunk: Chunk, part: int) -> pl.Series:
    a, b = chunk["users"][part], chunk["users"][part + 1]
    return spool.mapped(f"{chunk['stem']}.users").slice(a, b - a)


def _rank(words: Sequence[pl.Series]) -> tuple[pl.Series, list[Ints]]:
    """Return the distinct texts of several series, sorted, and the rank of each text of each."""
    if len({w.dtype for w in words}) > 1:
        words = [w.cast(pl.String) for w in words]
    codes, distinct = spool.code(pl.concat(words) if words else pl.Series("user", [], dtype=pl.String))
    distinct = distinct.cast(pl.String)
    order = spool.text_order(distinct)
    rank = np.empty(len(order) + 1, np.uint32)
    rank[order + 1] = np.arange(len(order), dtype=np.uint32)
    ends = np.cumsum([w.len() for w in words])[:-1]
    return distinct.gather(order).rename("user"), np.split(rank[codes], ends) if words else []


def by_day(job: Job, rows: Mapping[str, Ints], users: int) -> tuple[Ints, Ints]:
    """Return how many rows each day has, and the order of rows by day, user, time and place in the log."""
    midnights = np.array([m for _, m in state(job.work, "scan")["midnights"]])
    time, user = rows["time"], rows["user"]
    if (time[1:] >= time[:-1]).all():  # most logs are written in order of time
        begins = np.append(np.searchsorted(time, midnights), len(time))
        days = [a + spool.order_by([(user[a:b], max(users, 1))], b - a) for a, b in itertools.pairwise(begins.tolist())]
        return np.diff(begins), np.concatenate(days) if days else np.empty(0, np.int64)
    day = (np.searchsorted(midnights, time, side="right") - 1).astype(np.uint32)
    clock = (time - midnights[day]).astype(np.uint32)
    order = spool.order_by([(day, len(midnights)), (user, max(users, 1)), (clock, CLOCK_BOUND)], len(day))
    return np.bincount(day, minlength=len(midnights)), order
