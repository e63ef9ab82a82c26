"""The simulated A/B test: the auction, the intervals, the world's truth, and what a page view's candidates hold."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from ctrkit import candidates, replay
from ctrkit.ab_test import Ratio, lift, split
from ctrkit.auction import auction, bids
from ctrkit.batches import GroupedData
from ctrkit.candidates import Indexer, Requests
from ctrkit.recipe import Replay, Simulate, load
from ctrkit.world import World, number_of, simulate, world
from tests.shop import TABLES, ctrkit

Floats = npt.NDArray[np.float64]
SMALL = Simulate(users=400, goods=60, days=3, history_days=2, ads=80, new_ads_per_day=10, picture_size=16, seed=5)


# --- the auction ------------------------------------------------------------------------------------------------------


def by_hand(score: Sequence[float], bid: Sequence[float], slots: int, price: str) -> list[tuple[int, float]]:
    """Return (candidate, price of a click) of each slot."""
    worth = [(s * b, -i) for i, (s, b) in enumerate(zip(score, bid, strict=True))]
    order = [-i for _, i in sorted(worth, reverse=True)]
    sold = []
    for k in range(slots):
        winner, next_one = order[k], order[k + 1]
        least = score[next_one] * bid[next_one] / score[winner]
        sold.append((winner, bid[winner] if price == "first" else least))
    return sold


@pytest.mark.parametrize("price", ["second", "first"])
@pytest.mark.parametrize("slots", [1, 3])
def test_an_auction_is_what_one_does_by_hand(slots: int, price: str) -> None:
    rng = np.random.default_rng(1)
    score = rng.uniform(0.01, 0.9, (40, 7)).astype(np.float32)
    bid = rng.lognormal(0, 0.7, (40, 7))
    score[5], bid[5] = 0.25, 1.0  # all alike: the first ones win, and pay their bid
    sold = auction(score, bid, Replay.model_validate({"slots": slots, "price": price, "candidates": 7}))
    for r in range(40):
        expected = by_hand([float(s) for s in score[r]], list(bid[r]), slots, price)
        assert sold.winner_RK[r].tolist() == [winner for winner, _ in expected]
        np.testing.assert_allclose(sold.price_RK[r], [cost for _, cost in expected], rtol=1e-12)
    assert sold.winner_RK[5].tolist() == list(range(slots))
    assert (sold.price_RK <= np.take_along_axis(bid, sold.winner_RK, axis=1) * (1 + 1e-12)).all()


def test_who_predicts_nothing_costs_nothing() -> None:
    sold = auction(np.zeros((1, 3)), np.ones((1, 3)), Replay(candidates=3))
    assert sold.price_RK.tolist() == [[0.0]]


def test_bids_are_log_normal_and_follow_the_seed() -> None:
    settings = Replay(bid_median=2.0, bid_sigma=0.5)
    drawn = np.log(bids(settings, 20_000) / 2.0)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 0.5) < 0.01
    assert (bids(settings, 10) == bids(settings, 20)[:10]).all()  # an ad's bid is its own, whatever ads come later
    assert (bids(settings.model_copy(update={"seed": 1}), 10) != bids(settings, 10)).all()
    assert (bids(settings.model_copy(update={"bid_sigma": 0.0}), 10) == 2.0).all()


# --- the split and the intervals --------------------------------------------------------------------------------------


def test_a_split_is_even_and_another_with_another_salt() -> None:
    users = pl.Series([f"u{n}" for n in range(30_000)])
    for arms in (2, 3):
        found = split(users, "salt", arms)
        assert np.abs(np.bincount(found) / len(users) - 1 / arms).max() < 0.01
        assert (found == split(users, "salt", arms)).all()
        assert abs((found == split(users, "pepper", arms)).mean() - 1 / arms) < 0.01


def population(rng: np.random.Generator, users: int, factor: float) -> tuple[Floats, Floats]:
    """Return (clicks, impressions) of users of whom those who come often click otherwise; `factor` times as often."""
    rate = rng.beta(2, 8, users)
    impressions = 1.0 + rng.poisson(1 + 12 * rate)
    return rng.binomial(impressions.astype(np.int64), np.minimum(factor * rate, 1)).astype(np.float64), impressions


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    true = {f: np.divide(*(x.sum() for x in population(rng, 2_000_000, f))) for f in (1.0, 1.1)}
    expected = true[1.1] / true[1.0] - 1
    covered, naive = 0, 0
    for _ in range(1500):
        treated, control = (Ratio(*population(rng, 250, f)) for f in (1.1, 1.0))
        found = lift(treated, control)
        assert found is not None
        covered += found.low <= expected <= found.high
        # As if impressions were independent of each other: users are not, and it shows.
        by_impression = sum((1 - r.value) / r.over_U.sum() for r in (treated, control))
        naive += abs(np.log(treated.value / control.value) - np.log1p(expected)) <= 1.96 * np.sqrt(by_impression)
    assert 0.935 <= covered / 1500 <= 0.965
    assert naive / 1500 < 0.92


def test_an_interval_is_that_of_a_bootstrap_by_user() -> None:
    rng = np.random.default_rng(4)
    a, b = population(rng, 800, 1.2), population(rng, 700, 1.0)
    drawn = []
    for _ in range(3000):
        rates = []
        for clicks, impressions in (a, b):
            users = rng.integers(0, len(clicks), len(clicks))
            rates.append(clicks[users].sum() / impressions[users].sum())
        drawn.append(rates[0] / rates[1] - 1)
    found = lift(Ratio(*a), Ratio(*b))
    assert found is not None
    assert found.value == pytest.approx(a[0].sum() / a[1].sum() / (b[0].sum() / b[1].sum()) - 1, rel=1e-12)
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, [2.5, 97.5]), atol=0.02)
    # Of the same users, whose differences are paired.
    clicks, impressions = population(rng, 800, 1.0)
    more = clicks + rng.binomial(1, 0.1, 800)
    drawn = []
    for _ in range(3000):
        users = rng.integers(0, 800, 800)
        drawn.append(more[users].sum() / clicks[users].sum() - 1)
    paired = lift(Ratio(more, impressions), Ratio(clicks, impressions), same_users=True)
    assert paired is not None
    np.testing.assert_allclose([paired.low, paired.high], np.percentile(drawn, [2.5, 97.5]), atol=0.01)


def test_nothing_is_told_where_there_is_too_little() -> None:
    some = Ratio(np.array([1.0, 0.0]), np.array([2.0, 2.0]))
    assert lift(some, Ratio(np.zeros(2), np.ones(2))) is None  # no click
    assert lift(some, Ratio(np.ones(1), np.ones(1))) is None  # one user
    assert lift(some, Ratio(np.zeros(0), np.zeros(0))) is None
    same = lift(some, some, same_users=True)
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)


# --- the world --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "raw"
    simulate(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def made() -> World:
    return world(SMALL)


def test_the_world_made_again_has_the_probabilities_that_clicks_were_drawn_from(raw: Path, made: World) -> None:
    logged = pl.read_csv(raw / "impressions.csv")
    logged = logged.join(pl.read_parquet(raw / "truth.parquet"), on="impression", maintain_order="left")
    user, ad = number_of(logged["user"]), number_of(logged["ad"])
    p = made.probability(user, ad, logged["position"].to_numpy())
    np.testing.assert_allclose(p, logged["probability"], rtol=1e-12)
    clicked = logged["impression"].is_in(pl.read_csv(raw / "clicks.csv")["impression"].implode()).to_numpy()
    part = np.searchsorted(np.quantile(p, np.arange(0.1, 1, 0.1)), p)
    for n in range(10):
        inside = part == n
        spread = np.sqrt((p[inside] * (1 - p[inside])).sum())
        assert abs(clicked[inside].sum() - p[inside].sum()) < 4 * spread
    assert abs(clicked.mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / len(p)
    wrong = world(SMALL.model_copy(update={"seed": 6})).probability(user, ad, logged["position"].to_numpy())
    assert np.abs(wrong - p).max() > 0.1


def test_candidates_are_alive_different_and_drawn_as_what_is_shown(raw: Path, made: World) -> None:
    rng = np.random.default_rng(0)
    shown = pl.read_csv(raw / "impressions.csv")
    day = (shown["time"].to_numpy() - shown["time"].to_numpy().min()) // 86_400
    for of_day in (0, 2):
        drawn = made.candidates(rng, np.repeat(np.arange(400), 5), of_day, 12)
        assert drawn.shape == (2000, 12)
        assert all(len(set(row)) == 12 for row in drawn.tolist())
        alive = made.alive(of_day)
        assert alive.tolist() == list(range(10 * of_day, 80 + 10 * of_day))
        assert np.isin(drawn, alive).all()
    often = np.bincount(drawn.reshape(-1), minlength=100) / drawn.size
    logged = number_of(shown["ad"].filter(pl.Series(day == 2)))
    assert np.corrcoef(often[20:], (np.bincount(logged, minlength=100) / len(logged))[20:])[0, 1] > 0.9


# --- the whole test, by scores that are known -------------------------------------------------------------------------


def requests_of(made: World, users: int, views: int, n: int) -> Requests:
    user = pl.Series("user", np.repeat(np.arange(users), views)).cast(pl.String).str.replace("^", "u")
    time = (SMALL.first_day.toordinal() - 719_163) * 86_400_000 + np.arange(users * views)
    frame = pl.DataFrame({"user": user, "time": time}).with_columns(day=pl.lit(SMALL.first_day))
    return candidates.draw(made, frame.sort("user", "time"), n, 0)


def test_the_truth_beats_a_coin_by_what_loops_give(made: World) -> None:
    settings = Replay(candidates=10, slots=2, splits=300)
    requests = requests_of(made, 300, 3, 10)
    truth_RN = made.probability(requests.user_R[:, None], requests.ad_RN, np.zeros(1, np.int64))
    coin_RN = np.random.default_rng(9).uniform(0.1, 0.5, truth_RN.shape)
    shown = {name: replay.show(s, requests, made, settings) for name, s in (("coin", coin_RN), ("truth", truth_RN))}
    found = replay.measure(shown, shown["truth"], requests, settings)

    bid = bids(settings, len(made.ads))
    ctr, ecpm = {}, {}
    for name, score_RN in (("coin", coin_RN), ("truth", truth_RN)):
        clicks, money, impressions = 0.0, 0.0, 0
        for r, user in enumerate(requests.frame["user"]):
            ads = requests.ad_RN[r].tolist()
            for slot, (winner, cost) in enumerate(by_hand(list(score_RN[r]), [bid[a] for a in ads], 2, "second")):
                u, a, at = np.array([int(user[1:])]), np.array([ads[winner]]), np.array([slot])
                p = float(made.probability(u, a, at)[0])
                clicks, money, impressions = clicks + p, money + p * cost, impressions + 1
        ctr[name], ecpm[name] = clicks / impressions, 1000 * money / impressions
        assert found["arms"][name]["all_traffic"] == pytest.approx({"ctr": ctr[name], "ecpm": ecpm[name]}, rel=1e-9)
    [one] = found["comparisons"]
    assert one["all_traffic"]["ctr"]["value"] == pytest.approx(ctr["truth"] / ctr["coin"] - 1, rel=1e-9)
    assert one["all_traffic"]["ecpm"]["value"] == pytest.approx(ecpm["truth"] / ecpm["coin"] - 1, rel=1e-9)
    assert one["all_traffic"]["ctr"]["low"] > 0.2
    for what in ("test", "expected"):  # the users of an arm are some of all
        interval = one[what]["ctr"]
        assert interval["low"] < one["all_traffic"]["ctr"]["value"] < interval["high"]
        assert interval["low"] > 0
    width = {w: one[w]["ctr"]["high"] - one[w]["ctr"]["low"] for w in ("test", "expected", "all_traffic")}
    assert width["test"] > width["expected"] > width["all_traffic"]
    assert sum(arm["test"]["users"] for arm in found["arms"].values()) == 300
    assert sum(arm["test"]["impressions"] for arm in found["arms"].values()) == 300 * 3 * 2
    assert found["by_the_truth"] == found["arms"]["truth"]["all_traffic"]


def test_a_model_against_itself_shows_no_difference(made: World) -> None:
    settings = Replay(candidates=10, splits=1500)
    requests = requests_of(made, 400, 3, 10)
    score_RN = np.random.default_rng(9).uniform(0.1, 0.5, requests.ad_RN.shape)
    shown = replay.show(score_RN, requests, made, settings)
    found = replay.measure({"a": shown, "b": shown}, shown, requests, settings)
    [one] = found["comparisons"]
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert one["all_traffic"] == {"ctr": nothing, "ecpm": nothing}
    for interval in (one["test"]["ctr"], one["test"]["ecpm"], found["a_a"]["ctr"], found["a_a"]["ecpm"]):
        assert interval["low"] < 0 < interval["high"]
    # The interval may leave out 0 in one of twenty splits: 1500 of them, so 5% ± 1.7% at three standard deviations.
    for metric in ("ctr", "ecpm"):
        assert 0.033 <= found["a_a"][f"{metric}_excludes_zero"] <= 0.067
    # And so where clicks are not drawn: what differs is which users an arm has.
    users = requests.frame["user"].unique().sort()
    by_user = shown.by_user(None, number_of(users)[np.repeat(np.arange(400), 3)], 400)
    wrong = 0
    for salt in range(1500):
        second = split(users, str(salt), 2) == 1
        difference = lift(by_user["ctr"].of(second), by_user["ctr"].of(~second))
        assert difference is not None
        wrong += difference.excludes_zero
    assert 0.033 <= wrong / 1500 <= 0.067


# --- candidates as a model reads them ---------------------------------------------------------------------------------

FEATURES = """
[features]
gender = { of = "user" }
ad_id = { of = "ad", column = "ad", switch = "ad_id", min_count = 20 }
ad_category = { of = "ad", column = "category", vocab = "category" }
ad_shop = { of = "ad", column = "shop", hash_buckets = 3 }
gender_category = { of = "scene", column = "{gender}-{category}" }
position = { of = "scene" }
hour = { of = "scene" }
late = { of = "scene", column = "hour", kind = "number", edges = [6, 12, 18] }
weekday = { of = "scene" }
ad_image = { of = "ad", kind = "image", column = "image" }
goods = { of = "behaviour" }
image = { of = "behaviour", kind = "image" }
"""
RECIPE = f"""
name = "small"
{TABLES}
[convert]
time_zone = "Asia/Shanghai"
{FEATURES}
[simulate]
users = 400
goods = 60
days = 3
history_days = 2
ads = 80
new_ads_per_day = 10
picture_size = 16
seed = 5
"""


@pytest.fixture(scope="module")
def folder(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's logs, converted and grouped."""
    out = tmp_path_factory.mktemp("grouped")
    (out / "small.toml").write_text(RECIPE, encoding="utf-8")
    for stage, words in (
        ("convert", ("--raw", raw, "--out", out / "convert")),
        ("select-clicks", ("--convert", out / "convert", "--out", out / "behaviours")),
        ("group", ("--convert", out / "convert", "--behaviours", out / "behaviours", "--out", out / "groups")),
    ):
        result = ctrkit(stage, "--recipe", out / "small.toml", *words)
        assert result.exit_code == 0, (result.output, result.exception)
    return out


def test_features_of_a_candidate_are_those_that_convert_gives_a_logged_impression(raw: Path, folder: Path) -> None:
    indexer = Indexer(load(folder / "small.toml"), raw, folder / "convert")
    logged = pl.read_csv(raw / "impressions.csv", infer_schema=False)
    logged = logged.with_columns(time=1000 * pl.col("time").cast(pl.Int64)).unique(["user", "ad", "time"])
    samples = pl.read_parquet(folder / "convert" / "samples" / "**" / "*.parquet")
    rows = samples.join(logged.select("user", "ad", "time", "position"), on=["user", "ad", "time"], suffix="_text")
    assert rows.height == samples.height > 5000
    given = rows.select("user", "ad", "time", position="position_text")
    names = [name for name, f in indexer.recipe.features.items() if f.of in ("ad", "scene")]
    assert len(names) == 9
    for name in names:
        assert indexer.index(name, given).to_list() == rows[name].to_list(), name
    assert indexer.is_unseen(rows["ad"]).to_list() == rows["unseen_ad"].to_list()
    assert set(rows["unseen_ad"]) == {True, False}
    assert 1 in rows["ad_id"].to_list()  # some are unknown


def test_candidates_have_the_history_of_the_users_day_and_the_features_of_their_ads(raw: Path, folder: Path) -> None:
    recipe = load(folder / "small.toml")
    made = replay.open_world(recipe, raw)
    views = candidates.page_views(recipe, raw, folder / "groups")
    logged = pl.read_csv(raw / "impressions.csv").filter(pl.col("position") == 0)
    last = pl.read_parquet(folder / "groups" / "test" / "*.parquet")
    assert views["day"].unique().to_list() == last["day"].unique().to_list()
    pages = logged.select("user", time=1000 * pl.col("time")).join(views, on=["user", "time"])
    assert pages.height == views.height > last.height
    requests = candidates.draw(made, views, 12, 0)
    out = folder / "candidates"
    candidates.write_groups(Indexer(recipe, raw, folder / "convert"), folder / "groups", requests, out)
    written = pl.concat(
        GroupedData(out, "test", []).frames(["user", "day", "gender", "goods", "image", "sample_id", "ad"])
    )
    assert len(GroupedData(out, "test", [])) == 12 * views.height
    both = written.join(last, on=["user", "day"], suffix="_logged")
    assert both.height == written.height == last.height
    for name in ("gender", "goods", "image"):
        assert both[name].to_list() == both[f"{name}_logged"].to_list()
    assert both["goods"].list.len().max() > 0  # type: ignore[operator]
    flat = written.select("user", "sample_id", "ad").explode("sample_id", "ad")
    assert flat["sample_id"].to_list() == list(range(12 * views.height))
    assert number_of(flat["ad"]).tolist() == requests.ad_RN.reshape(-1).tolist()
    assert flat["user"].to_list() == views["user"].gather(np.repeat(np.arange(views.height), 12)).to_list()
    again = candidates.draw(made, views, 12, 0)
    assert (again.ad_RN == requests.ad_RN).all()
    assert (candidates.draw(made, views, 12, 1).ad_RN != requests.ad_RN).any()


def test_ids_that_came_after_training_are_unknown_where_days_were_added_one_by_one(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE.replace(", min_count = 20", ""), encoding="utf-8")
    earlier, convert = tmp_path / "earlier", tmp_path / "convert"
    for stage, words in (
        ("convert", ("--raw", raw, "--today", "2024-03-02", "--out", earlier)),
        ("convert", ("--raw", raw, "--today", "2024-03-03", "--extend", earlier, "--out", convert)),
        ("select-clicks", ("--convert", convert, "--out", tmp_path / "behaviours")),
        ("group", ("--convert", convert, "--behaviours", tmp_path / "behaviours", "--out", tmp_path / "groups")),
    ):
        result = ctrkit(stage, "--recipe", tmp_path / "small.toml", "--set", "split.valid=0", *words)
        assert result.exit_code == 0, (result.output, result.exception)
    indexer = Indexer(load(tmp_path / "small.toml"), raw, convert)
    names = [name for name, f in indexer.recipe.features.items() if f.of in ("ad", "scene")]
    lists = ["ad", "time", "unseen_ad", *names]
    samples = pl.read_parquet(tmp_path / "groups" / "test" / "*.parquet").select("user", *lists).explode(lists)
    logged = pl.read_csv(raw / "impressions.csv", infer_schema=False)
    logged = logged.with_columns(time=1000 * pl.col("time").cast(pl.Int64)).unique(["user", "ad", "time"])
    rows = samples.join(logged.select("user", "ad", "time", "position"), on=["user", "ad", "time"], suffix="_text")
    assert rows.height == samples.height > 1000
    given = rows.select("user", "ad", "time", position="position_text")
    for name in names:
        assert indexer.index(name, given).to_list() == rows[name].to_list(), name
    unseen = rows.filter("unseen_ad")
    assert unseen.height > 0
    assert unseen["ad_id"].unique().to_list() == [1]
    assert indexer.is_unseen(rows["ad"]).to_list() == rows["unseen_ad"].to_list()
