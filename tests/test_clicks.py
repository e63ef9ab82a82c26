"""Typical clicks against a nested-loop reference."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from ctrkit import clicks, numba_loops
from ctrkit.clicks import Events, Picks, select
from ctrkit.days import DAY_MS
from ctrkit.recipe import SelectClicks
from ctrkit.spool import Ints


@pytest.fixture(autouse=True, params=["compiled", "not compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test run with and without compiled code."""
    if request.param == "compiled":
        pytest.importorskip("numba", exc_type=ImportError)
    else:
        monkeypatch.setattr(numba_loops, "load", lambda module: None)


START = 19_783  # 2024-03-01
Pick = tuple[int, int, int, int, int]
Pairs = list[tuple[int, int]]


def events_of(user: Ints, key: Ints, time: Ints, dwell: Ints, weight: Ints) -> Events:
    """Return events in the order that `select` needs."""
    order = np.lexsort((key, time, user))
    user, key, time, dwell, weight = (column[order] for column in (user, key, time, dwell, weight))
    return Events(user, time // DAY_MS, time, key, dwell, weight)


def random_log(seed: int, users: int = 8, keys: int = 12, days: int = 20, n: int = 900) -> tuple[Events, Pairs]:
    """Return events and the (user, day) pairs to serve; some users have no event, some no day, some moments two."""
    rng = np.random.default_rng(seed)
    time = START * DAY_MS + rng.integers(0, days * DAY_MS, n)
    time[::5] -= time[::5] % 7_200_000
    events = events_of(
        rng.integers(0, users, n),
        rng.integers(0, keys, n),
        time,
        rng.integers(0, 60_000, n) * rng.integers(0, 2, n),
        np.full(n, clicks.MILLI),
    )
    pairs = [(u, START + d) for u in range(1, users + 2) for d in range(days + 2) if rng.random() < 0.4]
    return events, pairs


def reference(events: Events, pairs: Pairs, options: SelectClicks) -> dict[tuple[int, int], list[Pick]]:
    """Return (user, day) → the picks, oldest first: (key, row of the last visit, visits, dwell, last time). Loops."""
    columns = (events.user, events.key, events.time, events.dwell, events.weight)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    out = {}
    for user, day in pairs:
        midnight = day * DAY_MS
        seen = defaultdict(list)
        for row, (event_user, key, time, dwell, weight) in enumerate(rows):
            in_window = options.window_days is None or time >= midnight - options.window_days * DAY_MS
            if event_user == user and time < midnight and in_window:
                seen[key].append((time, row, dwell, weight))
        ranked = []
        for key, visits in seen.items():
            last, row, *_ = max(visits)
            dwell = sum(v[2] for v in visits)
            interest = sum(v[3] for v in visits) / clicks.MILLI + dwell / 1000 / options.dwell_scale
            score = interest * 0.5 ** ((midnight - last) / DAY_MS / options.half_life_days)
            ranked.append((-score, -last, key, (key, row, len(visits), dwell, last)))
        picked = [r[3] for r in sorted(ranked)[: options.max_behaviours]]
        out[user, day] = sorted(picked, key=lambda p: (p[4], p[0]))
    return {pair: picks for pair, picks in out.items() if picks}


def chosen(events: Events, pairs: Pairs, options: SelectClicks) -> Picks:
    return select(events, np.array([u for u, _ in pairs]), np.array([d for _, d in pairs]), options)


def picked(events: Events, pairs: Pairs, options: SelectClicks) -> dict[tuple[int, int], list[Pick]]:
    """Return what `reference` returns, in the order in which `select` gives it."""
    picks = chosen(events, pairs, options)
    assert picks.pair.tolist() == sorted(picks.pair.tolist())
    out = defaultdict(list)
    for pair, event, visits, dwell in zip(picks.pair, picks.event, picks.visits, picks.dwell, strict=True):
        pick = (events.key[event], event, visits, dwell, events.time[event])
        out[pairs[pair]].append(tuple(int(x) for x in pick))
    return dict(out)


@pytest.mark.parametrize("window", [1, 3, 14, "all"])
@pytest.mark.parametrize("most", [1, 5, 50])
def test_selection_is_that_of_nested_loops(window: int | str, most: int) -> None:
    options = SelectClicks.model_validate({"window_days": window, "max_behaviours": most, "half_life_days": 2.5})
    events, pairs = random_log(seed=most)
    expected = reference(events, pairs, options)
    assert len(expected) > 40
    assert picked(events, pairs, options) == expected


@pytest.mark.parametrize("weights", [[0, 1000, 3000], [0], [1, 500_000]])
def test_visits_weigh_what_their_type_does(weights: list[int]) -> None:
    """Weights of 0 to 500 visits; a goods whose visits weigh nothing comes after all others, the latest first."""
    rng = np.random.default_rng(len(weights))
    plain, pairs = random_log(seed=8)
    events = replace(plain, weight=rng.choice(weights, len(plain.user)), dwell=plain.dwell * (len(weights) > 1))
    for most in (1, 4):
        options = SelectClicks(max_behaviours=most, half_life_days=2.0)
        expected = reference(events, pairs, options)
        assert picked(events, pairs, options) == expected
        assert expected != reference(plain, pairs, options)


def test_candidates_are_the_goods_in_the_windows() -> None:
    events, pairs = random_log(seed=5)
    for window in (3, "all"):
        options = SelectClicks.model_validate({"window_days": window, "max_behaviours": 2})
        everything = reference(events, pairs, options.model_copy(update={"max_behaviours": 10_000}))
        assert chosen(events, pairs, options).candidates == sum(map(len, everything.values()))


def test_all_and_a_window_longer_than_the_log_are_the_same() -> None:
    events, pairs = random_log(seed=6)
    long, every = SelectClicks(window_days=1000, max_behaviours=4), SelectClicks(window_days=None, max_behaviours=4)
    assert picked(events, pairs, long) == picked(events, pairs, every)


def test_cutting_into_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events, pairs = random_log(seed=7)
    whole, order = picked(events, pairs, SelectClicks()), np.random.default_rng(0).permutation(len(pairs))
    monkeypatch.setattr(clicks, "SLICE_ROWS", 300)
    assert picked(events, pairs, SelectClicks()) == whole
    assert picked(events, [pairs[i] for i in order], SelectClicks()) == whole


def log_of(*rows: tuple[int, float, float]) -> Events:
    """Return events of user 0: key, day (with its fraction) after the start, dwell seconds."""
    time = [START * DAY_MS + round(day * DAY_MS) for _, day, _ in rows]
    dwell = [round(seconds * 1000) for *_, seconds in rows]
    columns = ([0] * len(rows), [key for key, *_ in rows], time, dwell, [clicks.MILLI] * len(rows))
    return events_of(*(np.array(column, np.int64) for column in columns))


def keys_picked(events: Events, day: int, **options: object) -> list[int]:
    picks = picked(events, [(0, START + day)], SelectClicks.model_validate(options))
    return [key for key, *_ in picks.get((0, START + day), [])]


@pytest.mark.parametrize("window", [30, "all"])
def test_what_makes_a_click_typical(window: int | str) -> None:
    same = {"window_days": window, "max_behaviours": 1}
    # Two visits beat one, a long one beats a short one, a late one an early one.
    assert keys_picked(log_of((1, 5, 0), (2, 5, 0), (2, 5.5, 0)), 9, **same) == [2]
    assert keys_picked(log_of((1, 5.5, 100), (2, 5.5, 1)), 9, **same) == [1]
    assert keys_picked(log_of((1, 8.5, 3), (2, 3.5, 3)), 9, **same) == [1]
    # Ties: of equal scores the lower key.
    assert keys_picked(log_of((2, 5, 3), (1, 5, 3), (3, 5, 3)), 9, **same) == [1]


def test_a_type_that_weighs_more_beats_more_visits() -> None:
    events = log_of((1, 5.1, 0), (1, 5.2, 0), (2, 5.0, 0))
    heavy = replace(events, weight=np.where(events.key == 2, 3 * clicks.MILLI, clicks.MILLI))
    options = SelectClicks(max_behaviours=1)
    pair = (0, START + 9)
    assert picked(events, [pair], options)[pair][0][0] == 1
    key, _, visits, *_ = picked(heavy, [pair], options)[pair][0]
    assert (key, visits) == (2, 1)


@pytest.mark.parametrize("window", [30, "all"])
def test_a_goods_that_fell_out_comes_back_with_its_whole_history(window: int | str) -> None:
    events = log_of((1, 0.5, 0), (1, 0.6, 0), (2, 8.5, 900), (1, 9.5, 0))
    options = SelectClicks.model_validate({"window_days": window, "max_behaviours": 1, "half_life_days": 1.0})
    pairs = [(0, START + 9), (0, START + 10)]
    assert [p[0][:1] + p[0][2:4] for p in picked(events, pairs, options).values()] == [(2, 1, 900_000), (2, 1, 900_000)]
    back = options.model_copy(update={"dwell_scale": 900.0})
    assert [p[0][0] for p in picked(events, pairs, back).values()] == [2, 1]
    assert picked(events, pairs, back)[0, START + 10][0][2] == 3


def test_the_window_ends_at_midnights() -> None:
    events = log_of((1, 2 - 1e-7, 0), (2, 2.0, 0), (3, 5 - 1e-7, 0), (4, 5.0, 0))
    assert keys_picked(events, 5, window_days=3) == [2, 3]
    assert keys_picked(events, 5, window_days="all") == [1, 2, 3]


def test_nothing_before_the_day_gives_no_row() -> None:
    for window in (14, None):
        for events in (log_of((1, 5, 0)), log_of()):
            picks = chosen(events, [(0, START + 5), (3, START + 9)], SelectClicks(window_days=window))
            assert len(picks.event) == 0
            assert picks.candidates == 0
        assert len(chosen(log_of((1, 5, 0)), [], SelectClicks(window_days=window)).event) == 0


def test_the_score_does_not_underflow_over_decades() -> None:
    options = {"half_life_days": 0.5, "max_behaviours": 2}
    events = log_of((1, 0, 0), (2, 1, 0), (3, 2, 0))
    assert keys_picked(events, 9000, window_days="all", **options) == [2, 3]
    assert keys_picked(events, 9000, window_days=9999, **options) == [2, 3]
