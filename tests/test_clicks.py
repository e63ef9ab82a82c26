"""Typical clicks against a nested-loop reference."""

import datetime
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit import clicks
from ctrkit.clicks import select
from ctrkit.days import DAY_MS
from ctrkit.recipe import SelectClicks

START = datetime.date(2024, 3, 1)
Pick = tuple[int, int, int, int, int]


def number(day: datetime.date) -> int:
    return (day - datetime.date(1970, 1, 1)).days


def random_log(
    seed: int, users: int = 8, keys: int = 12, days: int = 20, n: int = 900
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return events and the (user, day) pairs to serve; some users have no event, some no day."""
    rng = np.random.default_rng(seed)
    time = number(START) * DAY_MS + rng.integers(0, days * DAY_MS, n)
    key = rng.integers(0, keys, n)
    events = pl.DataFrame(
        {
            "user_code": rng.integers(0, users, n).astype(np.uint32),
            "key": key.astype(np.uint32),
            "item": (2 * key + rng.integers(0, 2, n)).astype(np.uint32),
            "time": time,
            "day": pl.Series(time // DAY_MS).cast(pl.Int32).cast(pl.Date),
            "dwell": rng.integers(0, 60_000, n) * rng.integers(0, 2, n),
        }
    )
    chosen = [(u, d) for u in range(1, users + 2) for d in range(days + 2) if rng.random() < 0.4]
    pairs = pl.DataFrame(
        {
            "user_code": pl.Series([u for u, _ in chosen], dtype=pl.UInt32),
            "day": [START + datetime.timedelta(days=d) for _, d in chosen],
        }
    ).with_columns(midnight=pl.col("day").cast(pl.Int32).cast(pl.Int64) * DAY_MS)
    return events, pairs.sort("user_code", "day")


def reference(events: pl.DataFrame, pairs: pl.DataFrame, options: SelectClicks) -> dict[tuple[int, int], list[Pick]]:
    """Return (user, day number) → the picks, oldest first: (key, item, visits, dwell, last time). Loops only."""
    rows = events.select("user_code", "key", "item", "time", "dwell").rows()
    out = {}
    for user, midnight in pairs.select("user_code", "midnight").iter_rows():
        seen = defaultdict(list)
        for event_user, key, item, time, dwell in rows:
            in_window = options.window_days is None or time >= midnight - options.window_days * DAY_MS
            if event_user == user and time < midnight and in_window:
                seen[key].append((time, item, dwell))
        ranked = []
        for key, visits in seen.items():
            last, item, _ = max(visits)
            dwell = sum(v[2] for v in visits)
            interest = len(visits) + dwell / 1000 / options.dwell_scale
            score = interest * 0.5 ** ((midnight - last) / DAY_MS / options.half_life_days)
            ranked.append((-score, -last, key, (key, item, len(visits), dwell, last)))
        picked = [r[3] for r in sorted(ranked)[: options.max_behaviours]]
        out[user, midnight // DAY_MS] = sorted(picked, key=lambda p: (p[4], p[0]))
    return {pair: picks for pair, picks in out.items() if picks}


def picked(events: pl.DataFrame, pairs: pl.DataFrame, options: SelectClicks) -> dict[tuple[int, int], list[Pick]]:
    out = defaultdict(list)
    table = select(events, pairs, options).table.sort("user_code", "day", "last_time", "key")
    for user, day, *pick in table.select("user_code", "day", "key", "item", "visits", "dwell", "last_time").iter_rows():
        out[user, number(day)].append(tuple(pick))
    return dict(out)


@pytest.mark.parametrize("window", [1, 3, 14, "all"])
@pytest.mark.parametrize("most", [1, 5, 50])
def test_selection_is_that_of_nested_loops(window: int | str, most: int) -> None:
    options = SelectClicks.model_validate({"window_days": window, "max_behaviours": most, "half_life_days": 2.5})
    events, pairs = random_log(seed=most)
    expected = reference(events, pairs, options)
    assert len(expected) > 40
    assert picked(events, pairs, options) == expected


def test_candidates_are_the_goods_in_the_windows() -> None:
    events, pairs = random_log(seed=5)
    for window in (3, "all"):
        options = SelectClicks.model_validate({"window_days": window, "max_behaviours": 2})
        everything = reference(events, pairs, options.model_copy(update={"max_behaviours": 10_000}))
        assert select(events, pairs, options).candidates == sum(map(len, everything.values()))


def test_all_and_a_window_longer_than_the_log_are_the_same() -> None:
    events, pairs = random_log(seed=6)
    long, every = SelectClicks(window_days=1000, max_behaviours=4), SelectClicks(window_days=None, max_behaviours=4)
    assert picked(events, pairs, long) == picked(events, pairs, every)


def test_cutting_by_users_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events, pairs = random_log(seed=7)
    whole = picked(events, pairs, SelectClicks())
    monkeypatch.setattr(clicks, "PAIR_ROWS", 300)
    assert picked(events, pairs, SelectClicks()) == whole


def test_order_of_the_log_changes_nothing() -> None:
    events, pairs = random_log(seed=8)
    for window in (5, None):
        options = SelectClicks(window_days=window, max_behaviours=3)
        assert picked(events.reverse(), pairs, options) == picked(events, pairs, options)


def log_of(*rows: tuple[int, float, float]) -> pl.DataFrame:
    """Return one user's events from (key, days after START, dwell seconds)."""
    base = number(START) * DAY_MS
    return pl.DataFrame(
        {
            "user_code": pl.Series([0] * len(rows), dtype=pl.UInt32),
            "key": pl.Series([k for k, _, _ in rows], dtype=pl.UInt32),
            "item": pl.Series([k for k, _, _ in rows], dtype=pl.UInt32),
            "time": [base + round(d * DAY_MS) for _, d, _ in rows],
            "day": [START + datetime.timedelta(days=math.floor(d)) for _, d, _ in rows],
            "dwell": [round(s * 1000) for _, _, s in rows],
        }
    )


def serve(day: int) -> pl.DataFrame:
    served = START + datetime.timedelta(days=day)
    return pl.DataFrame(
        {"user_code": pl.Series([0], dtype=pl.UInt32), "day": [served], "midnight": [number(served) * DAY_MS]}
    )


def keys_picked(events: pl.DataFrame, day: int, **options: object) -> list[int]:
    (picks,) = picked(events, serve(day), SelectClicks.model_validate(options)).values() or ([],)
    return [p[0] for p in picks]


@pytest.mark.parametrize("window", [30, "all"])
def test_what_makes_a_click_typical(window: int | str) -> None:
    same = {"window_days": window, "max_behaviours": 1}
    # Two visits beat one, a long one beats a short one, a late one an early one.
    assert keys_picked(log_of((1, 5, 0), (2, 5, 0), (2, 5.5, 0)), 9, **same) == [2]
    assert keys_picked(log_of((1, 5.5, 100), (2, 5.5, 1)), 9, **same) == [1]
    assert keys_picked(log_of((1, 8.5, 3), (2, 3.5, 3)), 9, **same) == [1]
    # Ties: of equal scores the lower key.
    assert keys_picked(log_of((2, 5, 3), (1, 5, 3), (3, 5, 3)), 9, **same) == [1]


@pytest.mark.parametrize("window", [30, "all"])
def test_a_goods_that_fell_out_comes_back_with_its_whole_history(window: int | str) -> None:
    events = log_of((1, 0.5, 0), (1, 0.6, 0), (2, 8.5, 900), (1, 9.5, 0))
    options = SelectClicks.model_validate({"window_days": window, "max_behaviours": 1, "half_life_days": 1.0})
    pairs = pl.concat([serve(9), serve(10)])
    assert [p[0][:1] + p[0][2:4] for p in picked(events, pairs, options).values()] == [(2, 1, 900_000), (2, 1, 900_000)]
    back = options.model_copy(update={"dwell_scale": 900.0})
    assert [p[0][0] for p in picked(events, pairs, back).values()] == [2, 1]
    assert picked(events, pairs, back)[0, number(START) + 10][0][2] == 3


def test_the_window_ends_at_midnights() -> None:
    events = log_of((1, 2 - 1e-7, 0), (2, 2.0, 0), (3, 5 - 1e-7, 0), (4, 5.0, 0))
    assert keys_picked(events, 5, window_days=3) == [2, 3]
    assert keys_picked(events, 5, window_days="all") == [1, 2, 3]


def test_nothing_before_the_day_gives_no_row() -> None:
    for window in (14, None):
        picks = select(log_of((1, 5, 0)), serve(5), SelectClicks(window_days=window))
        assert picks.table.is_empty()
        assert picks.candidates == 0


def test_the_score_does_not_underflow_over_decades(tmp_path: Path) -> None:
    options = {"half_life_days": 0.5, "max_behaviours": 2}
    events = log_of((1, 0, 0), (2, 1, 0), (3, 2, 0))
    assert keys_picked(events, 9000, window_days="all", **options) == [2, 3]
    assert keys_picked(events, 9000, window_days=9999, **options) == [2, 3]
