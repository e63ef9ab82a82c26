"""Threads of ours: products that they share out are torch's, and each does its operations alone."""

import sys

import pytest
import torch

from ctrkit.models import layers, threads
from ctrkit.models.layers import Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 1, 4), (50, 6, 2)])
def test_shared_products(shape: tuple[int, int, int], n: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and all gradients are those of torch, also of a transposed input and through two layers."""
    monkeypatch.setattr(layers, "SHARED", 0)
    rows, width, out = shape
    torch.manual_seed(2)
    x = torch.randn(width, rows, dtype=torch.float64).t().requires_grad_()
    layer, weigh = Linear(width, out, bias=bias).double(), torch.randn(rows, out, dtype=torch.float64)

    def found() -> list[torch.Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad((y * weigh).sum(), [x, *layer.parameters()])]

    plain = found()
    with threads.own(n):
        shared = found()
        y = layer(x.detach())  # an input that needs no gradient
        (own,) = torch.autograd.grad((y * weigh).sum(), [layer.weight])
        with torch.inference_mode():
            bare = layer(x)
    for one, other in zip(shared, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert torch.equal(own, shared[2])
    assert torch.equal(bare, shared[0])


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("shared out")

    monkeypatch.setattr(threads, "side_by_side", fail)
    with threads.own(2):
        assert Linear(3, 4)(torch.ones(5, 3)).shape == (5, 4)
        with pytest.raises(AssertionError, match="shared out"):
            Linear(300, 400)(torch.ones(500, 300))
    assert Linear(300, 400)(torch.ones(500, 300)).shape == (500, 400)


def test_operations_run_alone_within_the_block_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads.own(3):
            assert (torch.get_num_threads(), threads.count()) == (1, 3)
            seen: list[tuple[int, int, bool]] = []
            threads.side_by_side(lambda i: seen.append((i, torch.get_num_threads(), torch.is_grad_enabled())), 3)
            assert sorted(seen) == [(0, 1, False), (1, 1, False), (2, 1, False)]
        assert (torch.get_num_threads(), threads.count()) == (2, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1])
def test_what_fails_in_a_thread_fails_here(number: int) -> None:
    def work(i: int) -> None:
        if i == number:
            raise ZeroDivisionError(i)

    with threads.own(2), pytest.raises(ZeroDivisionError, match=str(number)):
        threads.side_by_side(work, 2)


def test_what_the_interpreter_was_told_is_told_back() -> None:
    def fail() -> None:
        with threads.own(2):
            assert sys.getswitchinterval() == pytest.approx(threads.SWITCH)
            assert (torch.get_num_threads(), threads.owned()) == (1, 2)
            raise KeyError

    before = sys.getswitchinterval(), torch.get_num_threads()
    with pytest.raises(KeyError):
        fail()
    assert (sys.getswitchinterval(), torch.get_num_threads()) == before
    assert threads.owned() == 0
