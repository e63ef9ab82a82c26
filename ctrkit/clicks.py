"""Typical clicks: which of a user's behaviours before a day stand for the user (DICM section VI).

A goods that a user visited often, long and lately is typical of the user; a short click is likely an accident:

    score = (visits + dwell / dwell_scale) · 0.5^(age / half_life_days)

visits and dwell over the window, age in days from the last visit to the served day's midnight. The order by score
is the order by log2(visits + dwell / dwell_scale) + last visit / half_life_days, which does not depend on the day.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import columns, days, logs, partitions, vocabulary
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.recipe import Recipe, SelectClicks
from ctrkit.tables import Rejects, open_tables

PAIR_ROWS = 4_000_000
"""Rows of (user, day) × behaviours worked on at once."""
BEST_FIRST = {"score": True, "last_time": True, "key": False}
"""Sort columns of the candidates of a (user, day) → descending."""


def select_clicks(recipe: Recipe, raw: Path, convert_folder: Path, out: Path) -> dict[str, Any]:
    """Write `out/day=*/part-0000.parquet` (docs/formats.md), one row a user and day with a history.

    Returns the counts.
    """
    features = [name for name, f in recipe.features.items() if f.of == "behaviour"]
    if not features:
        raise UsageError('the recipe has no behaviour features, such as [features.goods] with of = "behaviour"')
    tables = open_tables(recipe, raw, "behaviours", "goods")
    plan = columns.plan(recipe, tables, ["behaviour"])
    rejects = Rejects()
    log, counts = logs.behaviours_with_goods(recipe, tables, plan, rejects)
    rejects.check(recipe.convert.max_reject_rate)
    for name in features:
        feature = recipe.features[name]
        texts = columns.values(log, name, feature, plan[name])
        words = vocabulary.read(convert_folder / "vocab", feature.vocab)
        log = log.with_columns(vocabulary.encode(texts, words).alias(f"index.{name}"))

    pairs = _pairs(convert_folder / "samples", recipe.convert.time_zone)
    log, dropped = _usable(log, recipe.select_clicks, pairs)
    counts |= dropped
    events, items = _events(log, features, recipe.convert.time_zone)
    users = pairs.select("user").unique().sort("user").with_row_index("user_code")
    numbered = pairs.join(users, on="user").select("user_code", "day", "midnight").sort("user_code", "day")
    events = events.join(users, on="user").drop("user")

    picks = select(events, numbered, recipe.select_clicks)
    lists = (
        picks.table.join(items, on="item", how="left", maintain_order="left")
        .sort("day", "user_code", "last_time", "key")
        .group_by("day", "user_code", maintain_order=True)
        .agg(
            *(pl.col(f"index.{name}").alias(name) for name in features),
            pl.col("visits").cast(pl.UInt32),
            (pl.col("dwell") / 1000).cast(pl.Float32),
            pl.col("last_time"),
        )
        .join(users, on="user_code", how="left", maintain_order="left")
        .select("day", "user", *features, "visits", "dwell", "last_time")
    )
    partitions.write_by_day(lists, out)
    counts |= {
        "users and days with samples": pairs.height,
        "of these with a history": lists.height,
        "distinct goods in the windows": picks.candidates,
        "goods picked": picks.table.height,
    }
    return counts


def _pairs(samples: Path, zone: str) -> pl.DataFrame:
    """Return each `user` and `day` that has a sample, with the day's `midnight` (epoch milliseconds)."""
    folders = sorted(samples.glob("day=*"))
    present = [datetime.date.fromisoformat(f.name.removeprefix("day=")) for f in folders]
    frame = partitions.read_by_day(samples, present, ["user"])
    if frame is None:
        raise UserError(f"{samples} has no samples; run ctrkit convert with this recipe first")
    midnights = pl.DataFrame(
        {"day": present, "midnight": [days.midnight(d, zone) for d in present]},
        schema={"day": pl.Date, "midnight": pl.Int64},
    )
    return frame.unique().join(midnights, on="day", how="left").sort("user", "day")


def _usable(log: pl.DataFrame, options: SelectClicks, pairs: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Drop behaviours of other types, short visits, and those of users without samples."""
    counts = {}
    if options.types:
        if "type" not in log.columns:
            raise UsageError("select-clicks.types is set, but the behaviour log has no column `type`")
        known = log["type"].unique().drop_nulls().to_list()
        for wanted in options.types:
            if wanted not in known:
                raise UsageError(f"select-clicks.types names {wanted!r}, which no behaviour is{nearest(wanted, known)}")
        before = log.height
        log = log.filter(pl.col("type").is_in(list(options.types)))
        counts["behaviours of other types"] = before - log.height
    before = log.height
    log = log.filter((pl.col("dwell") >= options.min_dwell * 1000).fill_null(True))
    counts["behaviours shorter than min_dwell"] = before - log.height
    counts["behaviours kept"] = log.height
    return log.join(pairs.select("user").unique(), on="user", how="semi", maintain_order="left"), counts


def _events(log: pl.DataFrame, features: list[str], zone: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the behaviours as numbers, and what the numbers stand for.

    Events: `user`, `key` (the goods, or the features where there are no goods; in order of the text or indexes),
    `item` (key and features), `time`, `day` and `dwell` (milliseconds, 0 if unknown). Items: `item`, "index.F".
    """
    indexes = [f"index.{name}" for name in features]
    what = ["goods"] if "goods" in log.columns else indexes
    keys = log.select(what).unique().sort(what).with_row_index("key")
    whole = list(dict.fromkeys([*what, *indexes]))
    items = log.select(whole).unique().sort(whole).with_row_index("item")
    events = (
        log.join(keys, on=what, how="left")
        .join(items, on=whole, how="left")
        .select(
            "user",
            "key",
            "item",
            "time",
            days.day_of("time", zone).alias("day"),
            pl.col("dwell").fill_null(0),
        )
    )
    return events, items.select("item", *indexes)


@dataclass(frozen=True)
class Picks:
    """What was selected."""

    table: pl.DataFrame
    """`user_code`, `day`, `key`, `item`, `visits`, `dwell` (milliseconds), `last_time`; in no particular order."""
    candidates: int
    """How many goods there were to pick from, over all users and days."""


def select(events: pl.DataFrame, pairs: pl.DataFrame, options: SelectClicks) -> Picks:
    """Pick the typical goods of each user and day.

    Parameters
    ----------
    events: `user_code`, `key`, `item`, `time` Int64, `day` Date (of the time), `dwell` Int64 milliseconds.
    pairs: `user_code`, `day` Date to serve, `midnight` Int64, sorted; only events of earlier days count.
    """
    daily = (
        events.sort("user_code", "key", "time", "item")
        .group_by("user_code", "key", "day", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("visits"),
            pl.col("dwell").sum(),
            pl.col("time").last().alias("last_time"),
            pl.col("item").last(),
        )
    )
    if options.window_days is None:
        return _select_from_all(daily, pairs, options)
    tables, candidates = [], 0
    for some_daily, some_pairs in _by_users(daily, pairs):
        before = (pl.col("day") < pl.col("served")) & (
            pl.col("day") >= pl.col("served").dt.offset_by(f"-{options.window_days}d")
        )
        goods = (
            some_pairs.select("user_code", pl.col("day").alias("served"))
            .join(some_daily, on="user_code", how="inner", maintain_order="left_right")
            .filter(before)
            .group_by("user_code", "served", "key", maintain_order=True)
            .agg(pl.col("visits", "dwell").sum(), pl.col("last_time", "item").last())
            .rename({"served": "day"})
        )
        candidates += goods.height
        tables.append(_best(goods.with_columns(_score(options)), ["user_code", "day"], options.max_behaviours))
    return Picks(pl.concat([t.drop("score") for t in tables]), candidates)


def _score(options: SelectClicks) -> pl.Expr:
    """Return log2 of the score, but for the served day's own part, which is one for all its goods."""
    interest = pl.col("visits") + pl.col("dwell") / (1000 * options.dwell_scale)
    return (interest.log(2) + pl.col("last_time") / (days.DAY_MS * options.half_life_days)).alias("score")


def _best(candidates: pl.DataFrame, within: list[str], n: int) -> pl.DataFrame:
    """Keep the best `n` rows within each group, best first."""
    descending = [False] * len(within) + list(BEST_FIRST.values())
    ranked = candidates.sort(*within, *BEST_FIRST, descending=descending)
    return ranked.filter(pl.int_range(pl.len()).over(within) < n)


def _by_users(daily: pl.DataFrame, pairs: pl.DataFrame) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Cut both tables into runs of users whose joined rows are about `PAIR_ROWS`."""
    size = (
        pairs.group_by("user_code")
        .agg(pl.len().cast(pl.Int64).alias("n"))
        .join(daily.group_by("user_code").agg(pl.len().cast(pl.Int64).alias("m")), on="user_code", how="left")
        .sort("user_code")
        .select("user_code", ((pl.col("n") * pl.col("m").fill_null(0)).cum_sum() // PAIR_ROWS).alias("run"))
    )
    runs = size.group_by("run").agg(pl.col("user_code").min().alias("a"), pl.col("user_code").max().alias("b"))
    for a, b in runs.sort("run").select("a", "b").iter_rows():
        chosen = pl.col("user_code").is_between(a, b)
        yield daily.filter(chosen), pairs.filter(chosen)


def _select_from_all(daily: pl.DataFrame, pairs: pl.DataFrame, options: SelectClicks) -> Picks:
    """Pick from all earlier days without joining every day to every earlier behaviour.

    A goods' score order only rises with each visit, so one that has fallen out of the best n of a user comes back
    only when it is visited again. So each user's days are served in turn, from the last best n and what is new.
    """
    by_goods = ["user_code", "key"]
    versions = daily.sort(*by_goods, "day").with_columns(
        pl.col("visits", "dwell").cum_sum().over(by_goods),
        (pl.int_range(pl.len()).over(by_goods) == 0).alias("first"),
    )
    rounds = pairs.select(
        "user_code",
        "day",
        pl.int_range(pl.len()).over("user_code").alias("round"),
        pl.col("day").dt.offset_by("-1d").alias("latest"),
    )
    # The first day of the user to be served after the version's own day.
    versions = (
        versions.sort("day")
        .join_asof(
            rounds.select("user_code", "latest", "round").sort("latest"),
            left_on="day",
            right_on="latest",
            by="user_code",
            strategy="forward",
            check_sortedness=False,
        )
        .filter(pl.col("round").is_not_null())
        .with_columns(_score(options))
        .sort("round", *by_goods, "day")
    )
    columns_kept = ["user_code", "key", "item", "visits", "dwell", "last_time", "score"]
    arriving = versions.partition_by("round", as_dict=True, include_key=False, maintain_order=True)
    served = rounds.partition_by("round", as_dict=True, include_key=False, maintain_order=True)
    state = versions.head(0).select(columns_kept)
    tables = []
    for number in range(len(served)):
        today = served[(number,)].select("user_code", "day")
        if (number,) in arriving:
            state = pl.concat([state, arriving[(number,)].select(columns_kept)])
            state = state.unique(by_goods, keep="last", maintain_order=True)
            state = _best(state, ["user_code"], options.max_behaviours)
        state = state.join(today.select("user_code"), on="user_code", how="semi", maintain_order="left")
        tables.append(state.drop("score").join(today, on="user_code", how="left", maintain_order="left"))
    return Picks(pl.concat(tables), _count_candidates(versions, rounds))


def _count_candidates(versions: pl.DataFrame, rounds: pl.DataFrame) -> int:
    """Count the distinct goods before each served day, over all users and days."""
    new = versions.filter("first").group_by("user_code", "round").agg(pl.len().cast(pl.Int64).alias("new"))
    # A goods that is new in a round is there in that and every later one of its user.
    last = rounds.group_by("user_code").agg(pl.col("round").max().alias("last"))
    total = new.join(last, on="user_code").select((pl.col("new") * (pl.col("last") - pl.col("round") + 1)).sum())
    return int(total.item() or 0)
