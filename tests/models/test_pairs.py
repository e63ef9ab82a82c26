"""Attention in blocks against the same written plainly, in float64: values, every gradient, Dice's running averages.

With and without compiled loops.
"""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from ctrkit import numba_loops
from ctrkit.models import pair_blocks, pair_net, pair_threads
from ctrkit.models.layers import Dice, PReLU
from ctrkit.models.pairs import PairMLP, attend, attend_plain

LENGTHS = {
    "mixed": ([2, 1, 3, 1, 0, 2], [3, 0, 5, 1, 2, 66]),
    "one group": ([4], [3]),
    "one pair": ([1], [1]),
    "no pairs": ([2, 1], [0, 0]),
    "ends without history": ([1, 2, 1], [0, 7, 0]),
}
"""Groups: samples and behaviours of each."""


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without Numba's loops, and with them by two threads."""
    if request.param == "compiled":
        pytest.importorskip("numba", exc_type=ImportError)
    else:
        monkeypatch.setattr(numba_loops, "load", lambda module: None)
    return str(request.param)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pairs_of(samples: Sequence[int], behaviours: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (sample, behaviour) of every pair of the groups."""
    found, s, b = [], 0, 0
    for n, m in zip(samples, behaviours, strict=True):
        found += [(s + i, b + j) for i in range(n) for j in range(m)]
        s, b = s + n, b + m
    table = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return table[:, 0], table[:, 1]


def random_unit(width: int, hidden: Sequence[int], act: str, parts: str, dtype: torch.dtype) -> PairMLP:
    torch.manual_seed(3)
    unit = PairMLP(width, width, hidden, act, parts).to(dtype)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for module in unit.modules():
            if isinstance(module, Dice):
                module.observe(torch.randn_like(module.mean_H), torch.rand_like(module.var_H))
    return unit


def inputs(n_samples: int, n_behaviours: int, dtype: torch.dtype, width: int = 4) -> list[Tensor]:
    """Return q [S, width], k [B, width], v [B, 3], leaves."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(n_samples, width), (n_behaviours, width), (n_behaviours, 3)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def both(unit: PairMLP, leaves: list[Tensor], pairs: tuple[Tensor, Tensor], softmax: bool) -> list[list[Tensor]]:
    """Return what `attend` and `attend_plain` give: the sum, all gradients, all buffers."""
    out = []
    for function in (attend, attend_plain):
        own = copy.deepcopy(unit)
        mine = [x.detach().clone().requires_grad_() for x in leaves]
        found = function(own, *mine, *pairs, softmax=softmax, scale=0.7)
        (found * torch.arange(found.numel()).view(found.shape).to(found.dtype).sin()).sum().backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (*mine, *own.parameters())]
        out.append([found.detach(), *gradients, *own.buffers()])
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("act", ["prelu", "dice", "sigmoid"])
@pytest.mark.parametrize(("parts", "hidden"), [("qk", (6, 4)), ("qkd", (5,)), ("qkdp", (6, 4)), ("qkdp", (7, 5, 3))])
def test_blocks_are_the_plain_form(
    parts: str, hidden: tuple[int, ...], act: str, softmax: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = random_unit(4, hidden, act, parts, torch.float64).train(training)
    for lengths in LENGTHS.values():
        pairs, leaves = pairs_of(*lengths), inputs(sum(lengths[0]), sum(lengths[1]), torch.float64)
        for block in (3, 1000):
            monkeypatch.setitem(pair_blocks.BLOCK, "cpu", block)
            monkeypatch.setattr(pair_threads, "ROWS", block)
            for one, other in zip(*both(unit, leaves, pairs, softmax), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("act", ["prelu", "sigmoid"])
def test_a_behaviour_that_counts_several_times(act: str, softmax: bool) -> None:
    """As so many behaviours alike: the sums, and of all copies together the gradients."""
    unit, times = random_unit(8, (24, 16), act, "qkdp", torch.float64), [1, 3, 2, 1, 4, 1, 1, 2]
    lengths, more = ([2, 1, 3], [3, 0, 5]), ([2, 1, 3], [6, 0, 9])
    leaves, copies = inputs(6, 8, torch.float64, 8), torch.repeat_interleave(torch.arange(8), torch.tensor(times))
    q, k, v = (x.detach().clone().requires_grad_() for x in leaves)
    once = attend(
        unit, *leaves, *pairs_of(*lengths), softmax=softmax, scale=0.7, times_B=torch.tensor(times, dtype=torch.float32)
    )
    each = attend_plain(unit, q, k[copies], v[copies], *pairs_of(*more), softmax=softmax, scale=0.7)
    torch.testing.assert_close(once, each, rtol=1e-9, atol=1e-11)
    sides = [
        torch.autograd.grad((out**2).sum(), [*x, *unit.parameters()]) for out, x in ((once, leaves), (each, (q, k, v)))
    ]
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["prelu", "dice"])
@pytest.mark.parametrize("hidden", [(24, 8), (8, 72, 16), (40,)])
def test_widths_that_vectors_divide(hidden: tuple[int, ...], act: str, training: bool, softmax: bool) -> None:
    """With compiled loops a network of PReLU is then one loop, products included."""
    unit = random_unit(8, hidden, act, "qkdp", torch.float64).train(training)
    for lengths in LENGTHS.values():
        pairs, leaves = pairs_of(*lengths), inputs(sum(lengths[0]), sum(lengths[1]), torch.float64, 8)
        found = both(unit, leaves, pairs, softmax)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        with torch.inference_mode():  # as scores are made, where nothing is kept
            again = attend(unit, *leaves, *pairs, softmax=softmax, scale=0.7)
        torch.testing.assert_close(again, found[1][0], rtol=1e-9, atol=1e-11)


class Pooled(nn.Module):
    """`attend` as a module."""

    def __init__(self, unit: PairMLP) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        return attend(self.unit, q, k, v, *pairs, softmax=True, scale=0.7)


@pytest.mark.parametrize("act", ["prelu", "dice", "sigmoid"])
def test_gradcheck(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against central differences, through Dice's batch statistics too."""
    monkeypatch.setitem(pair_blocks.BLOCK, "cpu", 4)
    monkeypatch.setattr(pair_threads, "ROWS", 4)
    unit = random_unit(4, (5, 3), act, "qkdp", torch.float64).train()
    pairs, leaves = pairs_of([2, 1, 1], [3, 0, 2]), inputs(4, 5, torch.float64)
    names = [name for name, _ in unit.named_parameters()]

    def function(*tensors: Tensor) -> Tensor:
        q, k, v, *parameters = tensors
        named = {f"unit.{name}": p for name, p in zip(names, parameters, strict=True)}
        out: Tensor = torch.func.functional_call(Pooled(unit), named, (q, k, v, pairs))
        return out

    parameters = [p.detach().clone().requires_grad_() for p in unit.parameters()]
    assert torch.autograd.gradcheck(function, (*leaves, *parameters), atol=1e-7)


def test_float32_is_within_rounding() -> None:
    pairs = pairs_of(*LENGTHS["mixed"])
    for act, width, hidden in (
        ("prelu", 4, (6, 4)),
        ("prelu", 24, (80, 40)),
        ("dice", 4, (6, 4)),
        ("sigmoid", 4, (6, 4)),
    ):
        leaves = inputs(9, 77, torch.float32, width)
        unit = random_unit(width, hidden, act, "qkdp", torch.float32).train()
        for one, other in zip(*both(unit, leaves, pairs, True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_autocast_takes_the_plain_form() -> None:
    """bfloat16 has 8 bits of mantissa: close to float32 by that much."""
    pairs, (q, k, v) = pairs_of(*LENGTHS["mixed"]), inputs(9, 77, torch.float32)
    unit = random_unit(4, (6, 4), "prelu", "qkdp", torch.float32)
    whole = attend(unit, q, k, v, *pairs, softmax=True)
    with torch.autocast("cpu", torch.bfloat16):
        short = attend(unit, q, k, v, *pairs, softmax=True)
    torch.testing.assert_close(short.float(), whole, rtol=0.1, atol=0.1)
    assert not torch.equal(short.float(), whole)


def test_without_gradients_and_again() -> None:
    """The same sum under inference_mode, and the same gradients from a graph that is gone through twice."""
    pairs, leaves = pairs_of(*LENGTHS["mixed"]), inputs(9, 77, torch.float64)
    unit = random_unit(4, (6, 4), "dice", "qkdp", torch.float64).train()
    with torch.inference_mode():
        bare = attend(copy.deepcopy(unit), *leaves, *pairs, softmax=True)
    out = attend(unit, *leaves, *pairs, softmax=True)
    assert torch.equal(out.detach(), bare)
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("act", ["prelu", "dice"])
def test_the_same_bits_every_time(act: str, width: int) -> None:
    """With two threads, and pairs for several blocks."""
    pairs, leaves = pairs_of([60] * 6, [60] * 6), inputs(360, 360, torch.float32, width)
    unit = random_unit(width, (16, 8), act, "qkdp", torch.float32).train()
    assert len(pairs[0]) > 2 * pair_blocks.BLOCK["cpu"] > 2 * pair_threads.ROWS
    found = []
    for _ in range(3):
        own = copy.deepcopy(unit)
        out = attend(own, *leaves, *pairs, softmax=True)
        found.append([out, *torch.autograd.grad(out.sum(), [*leaves, *own.parameters()]), *own.buffers()])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_which_way_is_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops where there is Numba, torch's operations without it."""
    taken = []
    for name, cls in (("torch", pair_blocks.Pairs), ("compiled", pair_threads.CompiledPairs)):
        take = cls.take
        monkeypatch.setattr(cls, "take", lambda *x, name=name, take=take: (taken.append(name), take(*x)))
    net = pair_net._Attend.apply
    monkeypatch.setattr(pair_net._Attend, "apply", lambda *x: (taken.append("one loop"), net(*x))[1])
    pairs = pairs_of(*LENGTHS["mixed"])
    for width, act in ((4, "prelu"), (8, "dice"), (8, "prelu")):
        leaves = inputs(9, 77, torch.float32, width)
        attend(random_unit(width, (16, 8), act, "qkdp", torch.float32), *leaves, *pairs, softmax=True)
    assert taken == [way, way, "one loop" if way == "compiled" else way]


@pytest.mark.parametrize("softmax", [True, False])
def test_pairs_that_dropout_left_out(softmax: bool) -> None:
    """Behaviours of a sample are then not neighbours, and some samples and behaviours have no pair."""
    sample_P, behaviour_P = pairs_of([2, 1, 3, 1, 0, 2], [3, 0, 5, 1, 2, 66])
    kept = torch.rand(len(sample_P), generator=torch.Generator().manual_seed(1)) < 0.6
    for width, act in ((4, "prelu"), (8, "prelu"), (8, "dice")):
        unit, leaves = random_unit(width, (16, 8), act, "qkdp", torch.float64), inputs(9, 77, torch.float64, width)
        for one, other in zip(*both(unit, leaves, (sample_P[kept], behaviour_P[kept]), softmax), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("act", "width"), [("prelu", 4), ("prelu", 8), ("dice", 4), ("sigmoid", 4)])
@pytest.mark.parametrize("softmax", [True, False])
def test_what_is_not_finite_stays_so(act: str, width: int, softmax: bool) -> None:
    """A NaN in one behaviour reaches the vectors of its samples, and the gradients."""
    pairs, (q, k, v) = pairs_of([2, 1], [3, 4]), inputs(3, 7, torch.float32, width)
    unit = random_unit(width, (16, 8), act, "qkdp", torch.float32).eval()
    with torch.no_grad():
        k[1, 2] = torch.nan
    out = attend(unit, q, k, v, *pairs, softmax=softmax)
    assert out[:2].isnan().all()
    assert out[2].isfinite().all()
    gradients = torch.autograd.grad(out[:2].sum(), list(unit.parameters()))
    assert any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    for lengths in ([[2, 1, 3, 1, 0, 2], [3, 0, 5, 1, 2, 66]], [[1] * 9, [4] * 9], [[3], [5]]):
        pairs, leaves = pairs_of(*lengths), inputs(sum(lengths[0]), sum(lengths[1]), torch.float64)
        unit = random_unit(4, (6, 4), "dice", "qkdp", torch.float64).train()
        for one, other in zip(*both(unit, leaves, pairs, True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        unit, leaves = (
            random_unit(8, (16, 8), "prelu", "qkdp", torch.float64),
            inputs(len(leaves[0]), len(leaves[1]), torch.float64, 8),
        )
        for one, other in zip(*both(unit, leaves, pairs, True), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_prelu_on_rows_is_torchs() -> None:
    """Values and gradients, at 0 too, and for slopes above 1 and below 0."""
    x = torch.tensor([[-2.0, 0.0, 3.0, -1.0], [4.0, -5.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    layer = PReLU(4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.25, 1.5, -0.5, 0.0]))
    weigh = torch.arange(1.0, 9.0, dtype=torch.float64).view(2, 4)
    sides = []
    for out in (layer(x), nn.functional.prelu(x, layer.weight)):
        sides.append([out.detach(), *torch.autograd.grad((out * weigh).sum(), [x, layer.weight])])
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)
