"""Statistics of scores in merged runs: those of all rows at once, however they are cut."""

import math

import numpy as np
import pytest

from ctrkit import score_runs
from ctrkit.evaluation import ECE_BINS, SMALLEST, calibration, ece, log_loss
from ctrkit.exchange import Scratch
from ctrkit.gauc import auc, ordered
from ctrkit.score_runs import ScoreRuns, _scores

SCORES = {
    "distinct": lambda rng, n: rng.random(n),
    "tied": lambda rng, n: np.round(rng.random(n) * 9) / 9,
    "one": lambda rng, n: np.full(n, 0.25),
    "mostly one": lambda rng, n: np.where(rng.random(n) < 0.9, 0.5, rng.random(n)),
    "zeros of both signs": lambda rng, n: np.where(rng.random(n) < 0.5, -0.0, 0.0) + (rng.random(n) < 0.1) * 2**-149,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", SCORES)
def test_merged_runs_tell_what_all_rows_do(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(score_runs, "RANGE_ENTRIES", 40)
    monkeypatch.setattr(score_runs, "SAMPLE_EVERY", 5)
    rng = np.random.default_rng(2)
    score = SCORES[kind](rng, 2000).astype(dtype)
    click = rng.random(2000) < 0.1 + 0.5 * score
    runs = ScoreRuns(Scratch(tmp_path / "s"))
    for place, rows in enumerate(np.split(np.arange(2000), [1, 1, 300, 900, 1999])):
        runs.add((place,), score[rows], click[rows])
    made = runs.statistics(ECE_BINS, SMALLEST)
    assert (made.impressions, made.clicks) == (2000, click.sum())
    assert (made.lowest, made.highest) == (score.min(), score.max())
    assert made.auc == pytest.approx(auc(click, score), abs=1e-15)
    assert -made.log_likelihood / 2000 == pytest.approx(log_loss(click, score), rel=1e-12)
    assert made.predicted_of.sum() / made.clicks == pytest.approx(calibration(click, score), rel=1e-12)
    assert np.abs(made.predicted_of - made.clicks_of).sum() / 2000 == pytest.approx(ece(click, score), abs=1e-12)


def test_nothing_and_one_class(tmp_path):
    runs = ScoreRuns(Scratch(tmp_path / "s"))
    assert runs.statistics(20, SMALLEST) is None
    runs.add((0,), np.array([0.5, 0.25]), np.array([True, True]))
    made = runs.statistics(20, SMALLEST)
    assert made.auc is None
    assert made.log_likelihood == pytest.approx(math.log(0.5) + math.log(0.25))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_come_back_from_their_order(dtype):
    values = np.array([-3e38, -1, -(2.0**-149), 0, 2.0**-149, 0.1, 1, 3e38], dtype)
    keys = ordered(values)
    assert (np.diff(keys.astype(object)) > 0).all()
    np.testing.assert_array_equal(_scores(keys), values.astype(np.float64))
