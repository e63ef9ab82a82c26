"""Typical clicks: which of a user's behaviours before a day stand for the user (DICM section VI).

A goods that a user visited often, long and lately is typical of the user; a short click is likely an accident:

    score = (visits + dwell / dwell_scale) · 0.5^(age / half_life_days)

visits (each by the weight of its type) and dwell over the window, age in days from the last visit to the served
day's midnight. The order by score is the order by log2(visits + dwell / dwell_scale) + last visit / half_life_days,
which does not depend on the day. Among equal scores the later visit counts, then the smaller key.

A user's behaviours in order of time are one run of rows, and the window of a day one slice of it. Of each goods the
last row in the slice stands for all; what came before it is a difference of running sums.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl

from ctrkit import numba_loops, partitions, spool
from ctrkit.days import DAY_MS
from ctrkit.engine import Engine
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.facts import read_facts
from ctrkit.partitions import ARROW
from ctrkit.progress import say
from ctrkit.recipe import Recipe, SelectClicks
from ctrkit.spool import Ints

SLICE_ROWS = 2_000_000
"""Rows of (user, day) × behaviours worked on at once."""
MILLI = 1000
"""Weights are summed in thousandths, so that sums do not depend on the order of addition."""
TYPE, DWELL = "type_code", "dwell_ms"
"""Columns of the behaviours that convert writes; type is 0, dwell −1 where unknown."""
NEVER = np.iinfo(np.int64).max


def select_clicks(recipe: Recipe, convert_folder: Path, out: Path, engine: Engine) -> dict[str, Any]:
    """Write `out/day=*/part-PPPP.arrow` (docs/formats.md), one row a user and day with a history.

    Returns the counts.
    """
    features = [name for name, f in recipe.features.items() if f.of == "behaviour"]
    if not features:
        raise UsageError('the recipe has no behaviour features, such as [features.goods] with of = "behaviour"')
    served = partitions.days_there(convert_folder / "samples")
    if not served:
        raise UserError(f"{convert_folder} has no samples; run ctrkit convert with this recipe first")
    if not (convert_folder / "users").is_dir():
        raise UserError(f"{convert_folder} has no behaviours; it is of another recipe: run ctrkit convert again")
    facts = read_facts(convert_folder)
    tasks = [(recipe, convert_folder, out, part) for part in range(facts["partitions"])]
    for note in unknown_types(recipe.select_clicks, _types(recipe.select_clicks, convert_folder)):
        say(f"select-clicks: note: {note}")
    found = engine.run("select", select_part, tasks)
    return {key: sum(one[key] for one in found) for key in found[0] if any(one[key] for one in found) or key in ALWAYS}


def unknown_types(options: SelectClicks, types: Sequence[str]) -> list[str]:
    """Return a note for each type that the options name and no behaviour is of; with none at all left to select from,
    raise UsageError. `types` are those that there are; where none is known, nothing is said."""
    told = {
        (key, wanted): f"select-clicks.{key} names {wanted!r}, which no behaviour is{nearest(wanted, types)}"
        for key, some in (("types", options.types), ("type_weights", options.type_weights))
        for wanted in some
        if types and wanted not in types
    }
    if options.types and all(("types", wanted) in told for wanted in options.types):
        raise UsageError(f"{told['types', options.types[0]]}; so no behaviour would be left")
    return list(told.values())


ALWAYS = ("behaviours read", "users and days with samples", "of these with a history", "goods picked")


def _types(options: SelectClicks, convert_folder: Path) -> list[str]:
    """Return the types of behaviours by their code − 1; none where the log has no types."""
    path = convert_folder / "types.parquet"
    if path.is_file():
        types: list[str] = partitions.read(path)["type"].to_list()
        return types
    if (options.types or options.type_weights) and any((convert_folder / "behaviours").glob("day=*/part-*")):
        raise UsageError("[select-clicks] speaks of types, but the behaviour log has no column `type`")
    return []


def select_part(recipe: Recipe, convert_folder: Path, out: Path, part: int) -> dict[str, Any]:
    """Task: select for the users of one partition. Returns the counts, and the types of behaviours there are."""
    options = recipe.select_clicks
    features = [name for name, f in recipe.features.items() if f.of == "behaviour"]
    users = partitions.read_users(convert_folder, part)
    pairs, served_pairs = _pairs(convert_folder / "samples", users, part)
    log = _log(convert_folder / "behaviours", part, features)
    counts: dict[str, Any] = {"behaviours read": log.height}
    types = _types(options, convert_folder)
    rows = _usable(log, options, types, pairs, users.len(), counts)
    counts["users and days with samples"] = served_pairs
    rows, events = _events(log, rows, features, options, types)
    columns = {name: log[name].rechunk() for name in features}
    del log
    counts |= dict.fromkeys(["distinct goods in the windows", "goods picked", "of these with a history"], 0)
    of_slices = _selected(events, pairs["user"].to_numpy(), pairs["day"].to_physical().to_numpy(), options)
    for day, of_day in itertools.groupby(of_slices, lambda some: pairs["day"][some[0]]):
        picks = _together([some for _, some in of_day])
        counts["distinct goods in the windows"] += picks.candidates
        counts["goods picked"] += len(picks.event)
        lists = (
            pl.DataFrame(
                {
                    "pair": picks.pair,
                    **{name: _gather(column, spool.take(rows, picks.event)) for name, column in columns.items()},
                    "visits": picks.visits.astype(np.uint32),
                    "dwell": (picks.dwell / 1000).astype(np.float32),
                    "last_time": spool.take(events.time, picks.event),
                }
            )
            .with_columns(pl.col("pair").set_sorted())
            .group_by("pair", maintain_order=True)
            .agg(pl.all())
        )
        of_user = users.gather(pairs["user"].gather(lists["pair"])).alias("user")
        lists = lists.select(of_user, pl.exclude("pair"))
        partitions.write_days(lists, [str(day)], [lists.height], out, part, partitions.write_arrow, ARROW)
        counts["of these with a history"] += lists.height
    return counts


def _gather(column: pl.Series, rows: Ints) -> pl.Series:
    """Return some rows of a feature, UInt32."""
    if column.dtype == pl.List:
        return column.gather(rows)
    return pl.Series(spool.take(column.to_numpy(), rows).astype(np.uint32, copy=False))


def _pairs(samples: Path, users: pl.Series, part: int) -> tuple[pl.DataFrame, int]:
    """Return each `user` (row of `users`) and `day` that has a sample, in order of day and user, but for users without
    behaviours; and how many there are, those included."""
    found = partitions.read_by_day(samples, partitions.days_there(samples), ["user"], part)
    if found is None:
        return pl.DataFrame(schema={"user": pl.UInt32, "day": pl.Date}), 0
    changes = (pl.col("user") != pl.col("user").shift()) | (pl.col("day") != pl.col("day").shift())
    heads = found.filter(changes.fill_null(True))
    known = pl.DataFrame({"user": users, "row": np.arange(users.len(), dtype=np.uint32)})
    rows = heads.join(known, on="user", how="left", maintain_order="left")
    return rows.select(pl.col("row").alias("user"), "day").drop_nulls().sort("day", "user"), heads.height


def _log(behaviours: Path, part: int, features: list[str]) -> pl.DataFrame:
    """Return a partition's behaviours, in order of day, user and time."""
    log = partitions.read_by_day(behaviours, partitions.days_there(behaviours), (), part)
    if log is None:
        schema: dict[str, Any] = {"user_code": pl.UInt32, "time": pl.Int64, **dict.fromkeys(features, pl.UInt32)}
        return pl.DataFrame(schema=schema | {"day": pl.Date})
    missing = [n for n in features if n not in log.columns]
    if missing:
        raise UserError(
            f"{behaviours} has no feature {missing[0]!r}; it is of another recipe: run ctrkit convert again"
        )
    return log


def _usable(
    log: pl.DataFrame,
    options: SelectClicks,
    types: Sequence[str],
    pairs: pl.DataFrame,
    users: int,
    counts: dict[str, Any],
) -> Ints:
    """Return the rows that count: of the wanted types, not too short, of users with samples."""
    usable = np.ones(log.height, bool)
    if options.types and TYPE in log.columns:
        usable = np.array([False, *(t in options.types for t in types)])[log[TYPE].to_numpy()]
        counts["behaviours of other types"] = int((~usable).sum())
    if DWELL in log.columns:
        dwell = log[DWELL].to_numpy()
        short = usable & (dwell >= 0) & (dwell < options.min_dwell * 1000)
        counts["behaviours shorter than min_dwell"] = int(short.sum())
        usable &= ~short
    counts["behaviours kept"] = int(usable.sum())
    served = np.zeros(users, bool)
    served[pairs["user"].to_numpy()] = True
    return np.flatnonzero(usable & served[log["user_code"].to_numpy()])


@dataclass(frozen=True)
class Events:
    """Behaviours of several users, a row each, in order of user, time and key."""

    user: Ints
    day: Ints
    """Days since 1970 of the time."""
    time: Ints
    key: Ints
    """What was visited."""
    dwell: Ints
    """Milliseconds, 0 if unknown."""
    weight: Ints
    """Thousandths of a visit."""


def _events(
    log: pl.DataFrame, rows: Ints, features: list[str], options: SelectClicks, types: Sequence[str]
) -> tuple[Ints, Events]:
    """Return the rows of the log in order of user, time and key, and what they say as events."""
    user = spool.take(log["user_code"].to_numpy(), rows)
    order = spool.order_by([(user, int(user.max(initial=0)) + 1)], len(rows))
    rows, user = spool.take(rows, order), spool.take(user, order)
    time = spool.take(log["time"].to_numpy(), rows)
    if "goods_code" in log.columns:
        key = spool.take(log["goods_code"].to_numpy(), rows)
    else:
        key = np.array(log.select(features)[rows].select(pl.struct(features).rank("dense") - 1).to_series())
    tied = np.zeros(len(rows), bool)
    tied[1:] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    if tied.any():
        some = np.flatnonzero(tied | np.append(tied[1:], False))
        by_key = some[np.lexsort((key[some], np.cumsum(~tied)[some]))]
        rows[some], key[some] = rows[by_key], key[by_key]
    weight = np.full(len(rows), MILLI, np.int64)
    if options.type_weights and TYPE in log.columns:
        weights = [MILLI, *(round(options.type_weights.get(t, 1) * MILLI) for t in types)]
        weight = np.array(weights, np.int64)[spool.take(log[TYPE].to_numpy(), rows)]
    dwell = np.zeros(len(rows), np.int64)
    if DWELL in log.columns:
        dwell = np.maximum(spool.take(log[DWELL].to_numpy(), rows), 0).astype(np.int64)
    return rows, Events(user, spool.take(log["day"].to_physical().to_numpy(), rows), time, key, dwell, weight)


@dataclass(frozen=True)
class Picks:
    """What was selected, in order of pair, oldest first."""

    pair: Ints
    """Row of the pairs."""
    event: Ints
    """Row of the events: the last visit."""
    visits: Ints
    dwell: Ints
    """Milliseconds."""
    candidates: int
    """How many goods there were to pick from, over all pairs."""


def select(events: Events, user: Ints, day: Ints, options: SelectClicks) -> Picks:
    """Pick the typical goods of each pair of user and day; only events of earlier days count.

    user, day: of the pairs, in any order; days since 1970.
    """
    return _together([some for _, some in _selected(events, user, day, options)])


def _selected(events: Events, user: Ints, day: Ints, options: SelectClicks) -> Iterator[tuple[int, Picks]]:
    """Yield the picks of runs of pairs with one day, and each run's first pair."""
    begin, end = _windows(events, user, day, options.window_days)
    code = numba_loops.load("ctrkit.compiled_windows")
    goods_of = _chained(events) if code is None else _compiled(code, events)
    for a, b in _slices(end - begin, day):
        some = _pick(events, goods_of(begin[a:b], end[a:b]), b - a, options)
        yield a, replace(some, pair=some.pair + a)


def _together(parts: Sequence[Picks]) -> Picks:
    """Put runs of picks one behind the other."""

    def joined(arrays: Iterable[Ints]) -> Ints:
        return np.concatenate([np.empty(0, np.int64), *arrays])

    return Picks(
        joined(p.pair for p in parts),
        joined(p.event for p in parts),
        joined(p.visits for p in parts),
        joined(p.dwell for p in parts),
        sum(p.candidates for p in parts),
    )


def _windows(events: Events, user: Ints, day: Ints, window: int | None) -> tuple[Ints, Ints]:
    """Return the first event of each pair's window, and the first after it."""
    low = int(min(events.day.min(initial=0), day.min(initial=0))) - (window or 0)
    span = int(max(events.day.max(initial=0), day.max(initial=0))) - low + 2
    place = events.user.astype(np.int64) * span + (events.day - low)
    base = user.astype(np.int64) * span
    earliest = base if window is None else base + (day.astype(np.int64) - window - low)
    return np.searchsorted(place, earliest), np.searchsorted(place, base + (day.astype(np.int64) - low))


def _slices(lengths: Ints, day: Ints) -> Iterator[tuple[int, int]]:
    """Cut pairs into runs of one day, whose windows have at most about `SLICE_ROWS` rows in all."""
    run = np.cumsum(lengths) // SLICE_ROWS
    edges = np.flatnonzero((np.diff(run) > 0) | (np.diff(day) != 0)) + 1
    bounds = [0, *edges.tolist(), len(lengths)]
    yield from ((a, b) for a, b in itertools.pairwise(bounds) if b > a)


@dataclass(frozen=True)
class _Goods:
    """The goods of windows, in order of window and last visit there."""

    window: Ints
    event: Ints
    """The last visit."""
    visits: Ints
    weight: Ints
    dwell: Ints


def _compiled(code: ModuleType, events: Events) -> Callable[[Ints, Ints], _Goods]:
    """Return what finds the goods of windows (first events, ends), by compiled code."""
    key = events.key.astype(np.uint32)
    seen = np.zeros(int(key.max(initial=0)) + 1, np.uint64)
    done = 0

    def goods_of(begin: Ints, end: Ints) -> _Goods:
        nonlocal done
        done += len(begin)
        first = done - len(begin) + 1
        return _Goods(*code.goods_of_windows(key, events.weight, events.dwell, begin, end, first, seen))

    return goods_of


def _chained(events: Events) -> Callable[[Ints, Ints], _Goods]:
    """Return what finds the goods of windows (first events, ends), by the chains of events of one user and key."""
    n = len(events.user)
    bound = int(events.user.max(initial=0)) + 1
    order = spool.order_by([(events.user, bound), (events.key, int(events.key.max(initial=0)) + 1)], n)
    user, key = events.user[order], events.key[order]
    same = (user[1:] == user[:-1]) & (key[1:] == key[:-1])
    following, previous = np.full(n, NEVER), np.full(n, -1)
    following[order[:-1][same]] = order[1:][same]
    previous[order[1:][same]] = order[:-1][same]
    chain = np.concatenate([[0], np.cumsum(~same)]) if n else np.empty(0, np.int64)
    place = chain * n + order  # rises
    chain_of, rank = np.empty(n, np.int64), np.empty(n, np.int64)
    chain_of[order], rank[order] = chain, np.arange(n)
    weights = np.concatenate([[0], np.cumsum(events.weight[order])])
    dwells = np.concatenate([[0], np.cumsum(events.dwell[order])])

    def goods_of(begin: Ints, end: Ints) -> _Goods:
        lengths = end - begin
        window = np.repeat(np.arange(len(begin)), lengths)
        event = np.arange(len(window)) + np.repeat(begin - np.cumsum(lengths) + lengths, lengths)
        last = following[event] >= end[window]
        window, event = window[last], event[last]
        visits, weight, dwell = np.ones(len(event), np.int64), events.weight[event], events.dwell[event]
        again = np.flatnonzero(previous[event] >= begin[window])
        some = event[again]
        first = np.searchsorted(place, chain_of[some] * n + begin[window[again]])
        visits[again] = rank[some] - first + 1
        weight[again] = weights[rank[some] + 1] - weights[first]
        dwell[again] = dwells[rank[some] + 1] - dwells[first]
        return _Goods(window, event, visits, weight, dwell)

    return goods_of


def _score(goods: _Goods, events: Events, options: SelectClicks) -> Any:
    """Return what orders goods as their score does, Float64."""
    much = goods.weight / MILLI + goods.dwell / (1000 * options.dwell_scale)
    with np.errstate(divide="ignore"):  # visits that weigh nothing come last
        return np.log2(much) + events.time[goods.event] / (options.half_life_days * DAY_MS)


def _pick(events: Events, goods: _Goods, windows: int, options: SelectClicks) -> Picks:
    score, n = _score(goods, events, options), options.max_behaviours
    keep = _best(goods.window, score, events.time[goods.event], events.key[goods.event], windows, n)
    return Picks(goods.window[keep], goods.event[keep], goods.visits[keep], goods.dwell[keep], len(goods.event))


def _best(pair: Ints, score: Any, time: Ints, key: Ints, pairs: int, n: int) -> Ints:
    """Return which rows (Boolean) are among the `n` best of their pair: by score, later time, smaller key."""
    counts = np.bincount(pair, minlength=pairs)
    keep = np.ones(len(pair), bool)
    begins = np.cumsum(counts) - counts
    long = np.flatnonzero(counts > n)
    for some in _alike(long, counts):
        width = int(counts[some].max())
        column = np.arange(width)
        there = column < counts[some][:, None]
        rows = np.where(there, begins[some][:, None] + column, 0)
        scores = np.where(there, score[rows], -np.inf)  # [pairs, width]
        least = np.partition(scores, width - n, axis=1)[:, width - n][:, None]  # the n-th best
        better, equal = scores > least, (scores == least) & there
        wanted = better | equal
        spare = n - better.sum(1)
        for i in np.flatnonzero(equal.sum(1) > spare):
            tied = rows[i][equal[i]]
            order = np.lexsort((key[tied], -time[tied]))
            wanted[i, np.flatnonzero(equal[i])[order[spare[i] :]]] = False
        keep[rows[there]] = wanted[there]
    return keep


def _alike(pairs: Ints, counts: Ints) -> Iterator[Ints]:
    """Yield pairs whose counts differ by at most a factor of two, so that few cells of a table stay empty."""
    size = np.log2(counts[pairs]).astype(np.int64)
    for s in np.unique(size):
        yield pairs[size == s]
