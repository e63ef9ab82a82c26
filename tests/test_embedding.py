"""Row-wise Adam against torch's SparseAdam and against loops; regularisers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrkit.embedding import REGULARISATIONS, Table

SIZES = {"a": 6, "b": 4}
COUNTS = {"a": np.array([0, 0, 7, 3, 1, 40]), "b": np.array([0, 2, 900, 5])}


def table(width: int = 3) -> Table:
    return Table(SIZES, width, COUNTS, torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(seed: int, n: int, width: int) -> tuple[Tensor, Tensor]:
    """Return random distinct rows, row 0 often among them, and their gradient."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(n, rng.integers(1, n), replace=False))
    return torch.from_numpy(rows), torch.from_numpy(rng.normal(size=(len(rows), width)))


def step(t: Table, rows: Tensor, grad: Tensor, learning_rate: float, regularisation: str, strength: float) -> None:
    leaf = t.gather(rows)
    leaf.grad = grad.clone()
    t.update(rows, leaf, learning_rate, regularisation, strength)


def test_rows_lie_one_vocabulary_after_the_other() -> None:
    t = table()
    assert t.rows("a", np.array([0, 1, 5])).tolist() == [0, 1, 5]
    assert t.rows("b", np.array([0, 1, 3])).tolist() == [0, 7, 9]
    every = [*t.rows("a", np.arange(1, 6)), *t.rows("b", np.arange(1, 4))]
    assert len(set(every)) == len(every)
    assert max(every) < len(t.weight_VD)
    assert not t.weight_VD[0].any()
    assert t.weight_VD[1:].all()
    assert t.count_V[every].tolist() == [1, 7, 3, 1, 40, 2, 900, 5]  # never below 1: eq. 9 divides by it


def test_gather_is_a_leaf_and_a_copy() -> None:
    t = table()
    rows = torch.tensor([2, 5])
    leaf = t.gather(rows)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert torch.equal(leaf.detach(), t.weight_VD[rows])
    assert leaf.data_ptr() != t.weight_VD.data_ptr()


def test_twenty_steps_are_sparse_adams() -> None:
    t = table()
    weight = t.weight_VD.clone().requires_grad_()
    adam = torch.optim.SparseAdam([weight], lr=0.01)
    for n in range(20):
        rows, grad = gradients(n, len(weight), 3)
        grad[rows == 0] = 0.0  # SparseAdam knows no padding
        weight.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad, weight.shape, check_invariants=True).coalesce()
        adam.param_groups[0]["lr"] = rate = 0.01 * 0.9**n
        adam.step()
        step(t, rows, grad, rate, "none", 1e9)
        torch.testing.assert_close(t.weight_VD, weight.detach(), rtol=1e-12, atol=1e-15)
    state = adam.state[weight]
    torch.testing.assert_close(t.m_VD, state["exp_avg"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(t.v_VD, state["exp_avg_sq"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("regularisation", REGULARISATIONS)
def test_regularised_steps_against_loops(regularisation: str) -> None:
    """DIN eq. 9 (adaptive), eq. 10 (difacto) and plain L2: the term joins the gradient of the batch's rows only."""
    t, strength, rate = table(), 0.3, 0.02
    w = t.weight_VD.numpy().copy()
    n_V = np.ones(len(w))
    n_V[2:6], n_V[7:10] = COUNTS["a"][2:], COUNTS["b"][1:]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t_ in range(1, 11):
        rows, grad = gradients(t_, len(w), 3)
        for i, g in zip(rows.tolist(), grad.numpy(), strict=True):
            factor = {"adaptive": 1 / n_V[i], "difacto": n_V[i], "l2": 1.0}.get(regularisation, 0.0)
            for d in range(3):
                full = g[d] + strength * factor * w[i, d]
                m[i, d] = 0.9 * m[i, d] + 0.1 * full
                v[i, d] = 0.999 * v[i, d] + 0.001 * full**2
                if i != 0:
                    size = rate * math.sqrt(1 - 0.999**t_) / (1 - 0.9**t_)
                    w[i, d] -= size * m[i, d] / (math.sqrt(v[i, d]) + 1e-8)
        step(t, rows, grad, rate, regularisation, strength)
        np.testing.assert_allclose(t.weight_VD, w, rtol=1e-11, atol=1e-14)


def test_only_the_batchs_rows_move_and_padding_never() -> None:
    t = table()
    for n in range(5):
        before = [x.clone() for x in (t.weight_VD, t.m_VD, t.v_VD)]
        rows, grad = gradients(n, len(t.weight_VD), 3)
        rows = torch.unique(torch.cat([torch.tensor([0]), rows]))
        grad = torch.ones(len(rows), 3, dtype=torch.float64)
        step(t, rows, grad, 0.1, "adaptive", 0.01)
        resting = torch.ones(len(t.weight_VD), dtype=torch.bool)
        resting[rows] = False
        for old, new in zip(before, (t.weight_VD, t.m_VD, t.v_VD), strict=True):
            assert torch.equal(old[resting], new[resting])
        assert not t.weight_VD[0].any()
        assert (t.weight_VD[rows[1:]] != before[0][rows[1:]]).all()


def test_rows_without_a_gradient_are_left() -> None:
    t = table()
    before = t.weight_VD.clone()
    rows = torch.tensor([1, 2])
    t.update(rows, t.gather(rows), 0.1, "l2", 1.0)
    assert torch.equal(t.weight_VD, before)
