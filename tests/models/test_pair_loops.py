"""Compiled loops on pairs: exp and sigmoid in float32, where the pairs are cut."""

import numpy as np
import pytest
import torch

from ctrkit.models import compiled_layers
from tests.models.test_pairs import pairs_of

pytest.importorskip("numba", exc_type=ImportError)
run = compiled_layers.loops(torch.empty(0))
assert run is not None


def sigmoids(x_N: np.ndarray) -> np.ndarray:
    y_1N = np.empty_like(x_N)[None]
    run.logistic(x_N[None], np.zeros_like(x_N), y_1N)
    return y_1N[0]


def exponentials(x_N: np.ndarray) -> np.ndarray:
    """eˣ as the loops compute it: weights of pairs x and 0 of one sample are eˣ and 1 over their sum, for x ≤ 0."""
    out = np.empty_like(x_N)
    for i, x in enumerate(x_N):
        w_P, out_SE, ids = np.empty(2, x_N.dtype), np.zeros((1, 1), x_N.dtype), np.zeros(2, np.int64)
        logit_P, v_BE = np.array([x, 0], x_N.dtype), np.zeros((1, 1), x_N.dtype)
        run.pool(logit_P, np.ones(1, x_N.dtype), True, ids, ids, np.zeros(0, x_N.dtype), v_BE, w_P, out_SE)
        out[i] = w_P[0] / w_P[1]
    return out


def test_sigmoid_in_float32() -> None:
    """Within a few units of the last place of float64's, from the smallest to 1."""
    x_N = np.concatenate([np.linspace(-86, 86, 40_001), np.geomspace(1e-30, 1, 200), [0.0]]).astype(np.float32)
    exact_N = 1 / (1 + np.exp(-x_N.astype(np.float64)))
    assert (np.abs(sigmoids(x_N) - exact_N) <= 4 * np.spacing(exact_N.astype(np.float32))).all()


def test_sigmoid_at_the_ends() -> None:
    ends = sigmoids(np.array([-np.inf, -1e30, 1e30, np.inf, np.nan], np.float32))
    assert (ends[:2] < 1e-37).all()
    assert (ends[:2] >= 0).all()
    assert ends[2:4].tolist() == [1.0, 1.0]
    assert np.isnan(ends[4])


def test_sigmoid_in_float64() -> None:
    x_N = np.linspace(-40, 40, 999)
    np.testing.assert_allclose(sigmoids(x_N), 1 / (1 + np.exp(-x_N)), rtol=1e-15)


def test_exponential_in_float32() -> None:
    x_N = np.linspace(-80, 0, 2_001).astype(np.float32)
    exact_N = np.exp(x_N.astype(np.float64))
    assert (np.abs(exponentials(x_N) - exact_N) <= 3 * np.spacing(exact_N.astype(np.float32))).all()


@pytest.mark.parametrize(
    ("samples", "behaviours"),
    [([2, 1, 3, 1, 0, 2], [3, 0, 5, 1, 2, 6]), ([4], [3]), ([1, 1, 1], [2, 2, 2]), ([2, 1], [0, 0])],
)
def test_cuts_part_no_sample_and_no_behaviour(samples: list[int], behaviours: list[int]) -> None:
    """The first place from the one wanted that parts none, found by trying all."""
    sample_P, behaviour_P = (x.contiguous().numpy() for x in pairs_of(samples, behaviours))
    n = len(sample_P)

    def parts(p: int) -> bool:
        return any(set(x[:p]) & set(x[p:]) for x in (sample_P, behaviour_P))

    for wanted in range(n + 1):
        expected = next((p for p in range(max(wanted, 1), n) if not parts(p)), n)
        assert run.cuts(sample_P, behaviour_P, np.array([wanted, n])).tolist() == [expected, n]
