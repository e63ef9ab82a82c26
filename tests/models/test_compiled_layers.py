"""PReLU, Dice and gathers of rows by compiled loops against torch's operations, in float64, over several blocks."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrkit import numba_loops
from ctrkit.collate import Collator
from ctrkit.modelfile import build
from ctrkit.models import compiled_layers
from ctrkit.models.compiled_layers import DiceRows, GatherRows, PReLURows
from ctrkit.models.layers import Dice, PReLU, gather_rows
from ctrkit.recipe import Train
from tests.small_groups import SCHEMA, SIZES, some_groups, to_block

pytest.importorskip("numba", exc_type=ImportError)
COUNTS = {vocab: np.full(size, 3, np.int64) for vocab, size in SIZES.items()}


def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_loops, "load", lambda module: None)


def found(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return values, the gradients of x and parameters, and buffers, for weights that differ from place to place."""
    x = x.clone().requires_grad_()
    out = function(x)
    weigh = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    gradients = torch.autograd.grad((out * weigh).sum(), [x, *module.parameters()])
    return [out.detach(), *gradients, *module.buffers()]


@pytest.mark.parametrize("rows", [1, 3, 5_000])
@pytest.mark.parametrize("kind", [PReLU, Dice])
def test_activations(kind: type[PReLU] | type[Dice], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layer = kind(7).double()
    with torch.no_grad():
        next(layer.parameters()).copy_(torch.randn(7))
    x = torch.randn(7, rows, dtype=torch.float64).t() * 3 + 1  # not contiguous
    x[:, 2] = 1.5  # a channel that is constant
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    compiled = found(one, one, x)
    without_loops(monkeypatch)
    for a, b in zip(compiled, found(other, other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_compiled_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for cls in (PReLURows, DiceRows, GatherRows):
        apply = cls.apply
        monkeypatch.setattr(cls, "apply", lambda *x, name=cls.__name__, apply=apply: (taken.append(name), apply(*x))[1])
    x = torch.randn(4, 3)
    PReLU(3)(x), Dice(3)(x), gather_rows(x, torch.tensor([1, 1]))
    assert taken == ["PReLURows", "DiceRows", "GatherRows"]
    taken.clear()
    (
        Dice(3)(x, torch.ones(4)),
        Dice(3).eval()(x),
        PReLU(3).bfloat16()(x.bfloat16()),
        gather_rows(x.int(), torch.tensor([1, 1])),
    )
    assert taken == []


def test_gathered_rows() -> None:
    """A row that is asked for often gets all of its gradients."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4, 4, 2])
    weigh = torch.randn(5, 3, dtype=torch.float64)
    sides = []
    for out in (gather_rows(x, index), x.index_select(0, index)):
        sides.append([out.detach(), *torch.autograd.grad((out * weigh).sum(), [x])])
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_batches_are_the_same_without_numba(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the places of one batch leave nothing behind for the next."""
    made = build(Train(model="din"), SCHEMA, COUNTS, None)
    blocks = [to_block(some_groups()), to_block(some_groups()[1:]), to_block(some_groups())]
    batches = []
    for _ in range(2):
        collate = Collator(made.plan, made.tables, None, COUNTS, rate)
        batches.append([collate(block, (1, 2)) for block in blocks])
        without_loops(monkeypatch)
    for one, other in zip(*batches, strict=True):
        for width, rows_U in one.rows.items():
            assert torch.equal(rows_U, other.rows[width])
            assert rows_U.tolist() == sorted(set(rows_U.tolist()))
        for name, places in one.index.items():
            assert torch.equal(places, other.index[name])


def test_there_are_several_blocks() -> None:
    assert compiled_layers.ROWS < 5_000
