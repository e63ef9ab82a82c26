"""The tower by compiled loops against the same by torch: values, every gradient, running statistics."""

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba", exc_type=ImportError)

from ctrkit.models import threads, tower_threads
from ctrkit.models.layers import Discriminator

CASES = [(1, [16, 8], True), (2, [16, 8], True), (3, [24], True), (2, [16, 40, 8], False)]
"""Threads, hidden widths, BatchNorm."""


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_threads, "SMALLEST", 0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def random_tower(hidden: list[int], batch_norm: bool, act: str = "prelu") -> Discriminator:
    torch.manual_seed(4)
    made = Discriminator(40, hidden, act, batch_norm).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def found(
    made: Discriminator, x: Tensor, n_threads: int, users: tuple[Tensor, Tensor] | None = None
) -> tuple[bool, list[Tensor]]:
    """Return whether the loops did it, and what they or torch gave; by torch without threads."""
    made, leaves = copy.deepcopy(made).train(), [x.clone().requires_grad_()]
    if users is not None:
        leaves.append(users[0].clone().requires_grad_())
    with threads.own(n_threads):
        logit = made(leaves[0]) if users is None else made(leaves[0], (leaves[1], users[1]))
        (logit * torch.arange(len(x)).sin()).sum().backward()
    by_loops = type(logit.grad_fn).__name__ == "_TowerBackward"
    gradients = [p.grad for p in (*leaves, *made.parameters()) if p.grad is not None]
    assert len(gradients) == len(leaves) + len(list(made.parameters()))
    return by_loops, [logit.detach(), *gradients, *made.buffers()]


@pytest.mark.parametrize(("n_threads", "hidden", "batch_norm"), CASES)
@pytest.mark.parametrize("rows", [2, 61, 400])
def test_as_torch_does_it(rows: int, n_threads: int, hidden: list[int], batch_norm: bool) -> None:
    made, x = random_tower(hidden, batch_norm), drawn(rows, 40) * torch.arange(1, 41) + 3
    by_loops, ours = found(made, x, n_threads)
    by_torch, theirs = found(made, x, 0)
    assert (by_loops, by_torch) == (True, False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(("width", "n_threads"), [(8, 2), (24, 3), (12, 2)])
def test_columns_that_a_group_shares(width: int, n_threads: int, batch_norm: bool) -> None:
    """As if each row had them for itself; also a group without rows, and widths that the loops do not split."""
    made = random_tower([16, 8], batch_norm)
    group_R = torch.tensor([0] * 70 + [1] + [3] * 150 + [4] * 9)
    u, x = drawn(5, width) * 2 + 1, drawn(len(group_R), 40 - width)
    by_loops, ours = found(made, x, n_threads, (u, group_R))
    _, theirs = found(made, x, 0, (u, group_R))
    assert by_loops
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    whole = torch.cat([u[group_R], x], 1)
    torch.testing.assert_close(found(made, whole, 0)[1][0], ours[0], rtol=1e-8, atol=1e-9)


def test_a_constant_column_stays_finite() -> None:
    made, x = random_tower([16, 8], batch_norm=True), drawn(50, 40)
    x[:, 3] = 7.0
    for one, other in zip(found(made, x, 2)[1], found(made, x, 0)[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-7)


def test_the_same_bits_every_time() -> None:
    made, x = random_tower([16, 8], batch_norm=True).float(), drawn(500, 40).float()
    first, again = found(made, x, 2)[1], found(made, x, 2)[1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_not_a_number_comes_out() -> None:
    made, x = random_tower([16, 8], batch_norm=True), drawn(50, 40)
    x[7, 3] = torch.nan
    assert found(made, x, 2)[1][0].isnan().all()


@pytest.mark.parametrize(
    ("hidden", "act", "rows"), [([12, 8], "prelu", 50), ([16, 8], "dice", 50), ([16, 8], "prelu", 1)]
)
def test_what_the_loops_do_not_do_torch_does(hidden: list[int], act: str, rows: int) -> None:
    by_loops, _ = found(random_tower(hidden, True, act), drawn(rows, 40), 2)
    assert not by_loops


def test_evaluation_is_not_of_the_loops() -> None:
    made, x = random_tower([16, 8], batch_norm=True).eval(), drawn(50, 40)
    with threads.own(2):
        assert type(made(x).grad_fn).__name__ != "_TowerBackward"
