"""Metrics with known answers, intervals that cover, comparisons that are paired."""

import math
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest

from ctrkit import evaluation
from ctrkit.errors import UserError
from ctrkit.evaluation import (
    Pairing,
    calibration,
    ece,
    evaluate,
    evaluate_arrays,
    log_loss,
    measure_file,
    normalised_entropy,
    r_gauc,
)
from ctrkit.predictions import Predictions
from ctrkit.recipe import Eval


def predictions(user, click, score, **slices):
    names, codes = np.unique(np.asarray(user).astype(str), return_inverse=True)
    return Predictions(
        users=pl.Series(names),
        user=codes.astype(np.int64),
        click=np.asarray(click, bool),
        score=np.asarray(score, np.float64),
        slices={name: np.asarray(rows) for name, rows in slices.items()},
    )


def world(seed=0, n=3000, users=150):
    """Clicks that depend on a good signal; a bad score sees half of it."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=n)
    click = rng.random(n) < 1 / (1 + np.exp(1 - 2 * signal))
    table = pl.DataFrame(
        {
            "user": [f"u{u:03}" for u in rng.integers(0, users, n)],
            "click": click.astype(np.int8),
            "history_length": rng.integers(0, 30, n).astype(np.uint32),
            "unseen_ad": rng.random(n) < 0.3,
        }
    )
    good = 1 / (1 + np.exp(1 - 2 * signal))
    bad = 1 / (1 + np.exp(1 - signal - rng.normal(size=n)))
    return table.with_columns(score=good), table.with_columns(score=bad)


def write(folder, **tables):
    paths = {}
    for name, table in tables.items():
        paths[name] = folder / f"{name}.parquet"
        table.write_parquet(paths[name])
    return paths


@pytest.mark.parametrize(
    ("gauc", "percent"),
    [
        (0.6082, 0.0),
        (0.5980, -9.43),
        (0.6207, 11.55),
        (0.6195, 10.44),
        (0.6242, 14.79),
        (0.6230, 13.68),
        (0.6281, 18.39),
        (0.6263, 16.73),
    ],
)
def test_r_gauc_of_dicm_table_1(gauc, percent):
    assert round(100 * r_gauc(gauc, 0.6082), 2) == percent


DICM_TABLE_1 = {
    0.5980: -0.0102,
    0.6207: 0.0125,
    0.6195: 0.0113,
    0.6242: 0.0160,
    0.6230: 0.0148,
    0.6281: 0.0199,
    0.6263: 0.0181,
}
DIN_TABLE_3 = {0.5970: 0.0011, 0.6031: 0.0072, 0.6060: 0.0101, 0.6083: 0.0124}


def table_with_gauc(wanted):
    """A pair of impressions for each of 10,000 users, and so many of them in the right order: that GAUC exactly."""
    n = 10_000
    right = np.arange(n) < round(wanted * n)
    score = np.stack([right, ~right], axis=1).reshape(-1).astype(np.float32)
    return pl.DataFrame({"user": np.repeat(np.arange(n), 2), "click": np.tile([1, 0], n), "score": score})


@pytest.mark.parametrize(("base", "gains"), [(0.6082, DICM_TABLE_1), (0.5959, DIN_TABLE_3)])
def test_gains_of_both_papers_tables(tmp_path, base, gains):
    """Predictions that have the papers' GAUCs, evaluated against their baselines: the papers' gains."""
    paths = write(tmp_path, base=table_with_gauc(base), **{f"g{g}": table_with_gauc(g) for g in gains})
    made = evaluate(paths, Eval(baseline="base", bootstrap=0))["variants"]
    assert made["base"]["all"]["gauc"] == pytest.approx(base, abs=1e-12)
    for gauc, gain in gains.items():
        one = made[f"g{gauc}"]["all"]
        assert round(one["gain"], 4) == gain
        assert one["r_gauc"] == pytest.approx(gain / (base - 0.5), abs=1e-12)


def test_arrays_in_numbers_out(tmp_path):
    good, _ = world()
    arrays = (good[name].to_numpy() for name in ("user", "click", "score"))
    made = evaluate_arrays(*arrays, weight="clicks")
    from_file = evaluate(write(tmp_path, good=good), Eval(weight="clicks", bootstrap=0))["variants"]["good"]["all"]
    assert asdict(made) == from_file
    with pytest.raises(ValueError, match="no impressions"):
        evaluate_arrays([], [], [])
    with pytest.raises(ValueError, match="weight is 'x'"):
        evaluate_arrays([1, 1], [1, 0], [0.1, 0.2], weight="x")


def test_r_gauc_is_undefined_against_a_baseline_that_knows_nothing():
    assert r_gauc(0.6, 0.5) is None
    assert r_gauc(0.6, 0.45) is None
    assert r_gauc(None, 0.6) is None
    assert r_gauc(0.6, None) is None


def test_log_loss_normalised_entropy_and_calibration_by_hand():
    click, score = np.array([True, False, False, False]), np.array([0.5, 0.5, 0.2, 0.1])
    by_hand = -(math.log(0.5) + math.log(0.5) + math.log(0.8) + math.log(0.9)) / 4
    assert log_loss(click, score) == pytest.approx(by_hand)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert normalised_entropy(click, score) == pytest.approx(by_hand / entropy)
    assert calibration(click, score) == pytest.approx(1.3)
    assert normalised_entropy(click, np.full(4, 0.25)) == pytest.approx(1.0)
    assert normalised_entropy(~click & click, score) is None
    assert calibration(~click & click, score) is None
    assert log_loss(np.array([True]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_ece_by_hand_and_with_ties():
    # Two bins of two: |0.1 + 0.2 − 0| and |0.6 + 0.8 − 2|, over 4 rows.
    assert ece(np.array([0, 0, 1, 1], bool), np.array([0.1, 0.2, 0.6, 0.8]), bins=2) == pytest.approx(0.9 / 4)
    # Equal scores share a bin, whatever the order of the rows: one bin, calibrated.
    assert ece(np.array([1, 0, 1, 0], bool), np.full(4, 0.5), bins=2) == 0.0
    rng = np.random.default_rng(0)
    score = rng.random(100_000)
    assert ece(rng.random(100_000) < score, score) < 0.01
    assert ece(rng.random(100_000) < score / 2, score) == pytest.approx(0.25, abs=0.01)


def test_metrics_over_slices_equal_those_of_the_rows_alone(tmp_path):
    good, _ = world()
    part = good.filter("unseen_ad")
    made = evaluate(write(tmp_path, good=good, part=part), Eval(bootstrap=0))
    alone = made["variants"]["part"]["all"]
    assert made["variants"]["good"]["slices"]["unseen_ad=true"] == alone
    assert alone["impressions"] == part.height
    assert alone["clicks"] == part["click"].sum()
    assert alone["gauc_low"] is None


def test_scores_that_are_no_probabilities_have_ranking_metrics_only(tmp_path):
    good, _ = world()
    logits = good.with_columns(score=(pl.col("score") / (1 - pl.col("score"))).log())
    made = evaluate(write(tmp_path, good=good, logits=logits), Eval(bootstrap=20))
    a, b = made["variants"]["good"]["all"], made["variants"]["logits"]["all"]
    assert a["gauc"] == b["gauc"]
    assert a["auc"] == b["auc"]
    assert (b["log_loss"], b["normalised_entropy"], b["calibration"], b["ece"]) == (None,) * 4


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Each user has one pair, ordered rightly with chance 0.7: the true GAUC is 0.7."""
    rng = np.random.default_rng(11)
    n, trials, covered, width = 150, 200, 0, []
    user, click = np.repeat(np.arange(n), 2), np.tile([1, 0], n)
    for _ in range(trials):
        right = rng.random(n) < 0.7
        score = np.stack([right, ~right], axis=1).reshape(-1).astype(float)
        pairing = Pairing([measure_file("m", predictions(user, click, score), "impressions")])
        values = pairing.bootstrap(Eval(bootstrap=200, seed=3))["m", "all"]
        low, high = np.percentile(values, evaluation.INTERVAL)
        covered += low <= 0.7 <= high
        width.append(high - low)
    assert 0.90 <= covered / trials <= 0.99
    assert np.mean(width) == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / n), rel=0.05)


def test_bootstrap_equals_a_loop_over_resampled_users(monkeypatch):
    """Each resample's GAUC is that of the drawn users, however many resamples are held at once."""
    good, _ = world(n=400, users=30)
    made = predictions(good["user"], good["click"], good["score"])
    pairing = Pairing([measure_file("m", made, "clicks")])
    settings = Eval(weight="clicks", bootstrap=25, seed=9)
    values = pairing.bootstrap(settings)["m", "all"]
    by_user = pairing.files["m"].by_user["all"]
    kept = np.flatnonzero(by_user.kept)
    rng = np.random.default_rng(9)
    for value in values:
        drawn = kept[rng.integers(0, len(kept), len(kept))]
        expected = sum(by_user.clicks[u] * by_user.auc[u] for u in drawn) / sum(by_user.clicks[u] for u in drawn)
        assert value == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(evaluation, "DRAWS_AT_ONCE", 40)
    np.testing.assert_allclose(pairing.bootstrap(settings)["m", "all"], values, rtol=1e-14)


def test_a_model_against_itself_differs_by_nothing(tmp_path):
    good, _ = world()
    made = evaluate(write(tmp_path, a=good, b=good), Eval(baseline="a", compare=(("b", "a"),), bootstrap=50))
    assert made["comparisons"]
    for c in made["comparisons"]:
        assert (c["difference"], c["low"], c["high"], c["significant"]) == (0.0, 0.0, 0.0, False)
    b = made["variants"]["b"]["all"]
    assert (b["gain"], b["gain_low"], b["gain_high"], b["r_gauc"]) == (0.0, 0.0, 0.0, 0.0)


def test_a_better_model_is_found_better_and_pairing_narrows_the_interval(tmp_path):
    good, bad = world()
    settings = Eval(baseline="bad", compare=(("good", "bad"), ("bad", "good")), bootstrap=300)
    made = evaluate(write(tmp_path, good=good, bad=bad), settings)
    c = {(c["better"], c["slice"]): c for c in made["comparisons"]}
    assert {s for _, s in c} == {"all", *made["order"]["slices"]}
    one, other = c["good", "all"], c["bad", "all"]
    assert one["significant"]
    assert one["low"] > 0
    assert other["difference"] == -one["difference"]
    assert (other["low"], other["high"]) == pytest.approx((-one["high"], -one["low"]))
    g, b = made["variants"]["good"]["all"], made["variants"]["bad"]["all"]
    assert g["gain"] == g["gauc"] - b["gauc"] == one["difference"]
    assert (g["gain_low"], g["gain_high"]) == (one["low"], one["high"])
    assert g["r_gauc"] == pytest.approx((g["gauc"] - 0.5) / (b["gauc"] - 0.5) - 1)
    unpaired = math.hypot(g["gauc_high"] - g["gauc_low"], b["gauc_high"] - b["gauc_low"])
    assert one["high"] - one["low"] < unpaired


def test_noise_is_not_found_better(tmp_path):
    good, _ = world(seed=4)
    rng = np.random.default_rng(0)
    noise = {n: good.with_columns(score=pl.Series(rng.random(good.height))) for n in ("a", "b")}
    made = evaluate(write(tmp_path, **noise), Eval(compare=(("a", "b"),), bootstrap=300))
    assert made["comparisons"][0]["slice"] == "all"
    assert not made["comparisons"][0]["significant"]


def test_pairs_are_joined_by_user_not_by_row(tmp_path):
    good, bad = world()
    settings = Eval(compare=(("good", "bad"),), bootstrap=50)
    straight = evaluate(write(tmp_path, good=good, bad=bad), settings)
    shuffled = evaluate(write(tmp_path, good=good, bad=bad.sample(fraction=1, shuffle=True, seed=1)), settings)
    assert straight["comparisons"] == shuffled["comparisons"]


@pytest.mark.parametrize("option", ["compare", "baseline"])
def test_files_over_other_impressions_are_not_compared(tmp_path, option):
    good, bad = world()
    settings = Eval(compare=(("good", "bad"),)) if option == "compare" else Eval(baseline="bad")
    with pytest.raises(UserError, match=r"3,000 impressions .* against 2,990"):
        evaluate(write(tmp_path, good=good, bad=bad.head(2990)), settings)
    flipped = bad.with_columns(click=pl.Series([1 - bad["click"][0], *bad["click"][1:].to_list()]))
    with pytest.raises(UserError, match=f"1 of 150 users differ, the first is '{bad['user'][0]}'"):
        evaluate(write(tmp_path, good=good, bad=flipped), settings)
    other_users = bad.with_columns(user="x" + pl.col("user"))
    with pytest.raises(UserError, match="300 of 300 users differ"):
        evaluate(write(tmp_path, good=good, bad=other_users), settings)


def test_slices_that_differ_between_files_are_left_out_of_comparisons(tmp_path):
    good, bad = world()
    longer = bad.with_columns(pl.col("history_length") + 1)
    made = evaluate(
        write(tmp_path, good=good, bad=longer), Eval(baseline="bad", compare=(("good", "bad"),), bootstrap=9)
    )
    assert [c["slice"] for c in made["comparisons"]] == ["all", "unseen_ad=true", "unseen_ad=false"]
    assert made["variants"]["good"]["slices"]["history=1-5"]["gain"] is None
    assert made["variants"]["good"]["all"]["gain"] is not None


def test_no_user_with_both_classes_gives_nulls(tmp_path):
    table = pl.DataFrame({"user": ["a", "a", "b"], "click": [1, 1, 0], "score": [0.1, 0.2, 0.3]})
    made = evaluate(write(tmp_path, a=table, b=table), Eval(baseline="a", compare=(("b", "a"),)))
    one = made["variants"]["b"]["all"]
    assert (one["gauc"], one["gauc_low"], one["r_gauc"], one["gain"]) == (None,) * 4
    assert (one["users_kept"], one["users_dropped"], one["share_covered"]) == (0, 2, 0.0)
    assert one["auc"] == 0.0
    assert made["comparisons"] == []


def test_one_user_has_no_interval(tmp_path):
    table = pl.DataFrame({"user": ["a", "a"], "click": [1, 0], "score": [0.2, 0.1]})
    one = evaluate(write(tmp_path, a=table), Eval())["variants"]["a"]["all"]
    assert (one["gauc"], one["gauc_low"], one["gauc_high"]) == (1.0, None, None)
