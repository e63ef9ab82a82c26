"""Layers against their formulas: Dice (DIN eqs. 4, 5), PReLU (eq. 3), segments, the split first layer."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrkit.models.layers import (
    Dice,
    Discriminator,
    PReLU,
    mlp,
    segment_max,
    segment_softmax,
    segment_sum,
)
from ctrkit.models.pairs import PairMLP
from tests.models.reference import dice


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_dice(width: int) -> Dice:
    layer = Dice(width).double()
    with torch.no_grad():
        layer.a_H.copy_(draw(width, seed=9))
    return layer


def test_dice_in_training_uses_the_batch() -> None:
    layer, y = random_dice(3), draw(7, 3) * 4 + 1
    n = y.numpy()
    expected = dice(n, layer.a_H.detach().numpy(), n.mean(0), n.var(0))
    np.testing.assert_allclose(layer(y).detach(), expected, rtol=1e-13)


def test_dice_in_evaluation_uses_corrected_running_averages() -> None:
    """m ← 0.99·m + 0.01·batch from zero, over 1 − 0.99^t: after one batch it is that batch's own mean."""
    layer = random_dice(2)
    a = layer.a_H.detach().numpy()
    mean, var = np.zeros(2), np.zeros(2)
    probe = draw(4, 2, seed=99)
    for t in range(1, 6):
        y = draw(5 + t, 2, seed=t) * t + t
        layer.train()
        layer(y)
        mean = 0.99 * mean + 0.01 * y.numpy().mean(0)
        var = 0.99 * var + 0.01 * y.numpy().var(0)
        layer.eval()
        correction = 1 - 0.99**t
        expected = dice(probe.numpy(), a, mean / correction, var / correction)
        np.testing.assert_allclose(layer(probe).detach(), expected, rtol=1e-10)
        if t == 1:
            expected = dice(probe.numpy(), a, y.numpy().mean(0), y.numpy().var(0))
            np.testing.assert_allclose(layer(probe).detach(), expected, rtol=1e-10)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(draw(50, 2))
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_dice_on_no_row_one_row_and_equal_rows() -> None:
    layer = random_dice(3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    empty = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    out = layer(empty)
    out.sum().backward()
    assert out.shape == (0, 3)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    for y in (draw(1, 3), draw(1, 3).expand(5, 3)):
        leaf = y.clone().requires_grad_()
        out = layer(leaf)
        # Every row is the mean: p is one half.
        np.testing.assert_allclose(out.detach(), y * (0.5 + 0.5 * layer.a_H.detach()), rtol=1e-12)
        out.sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    layer.eval()
    assert torch.isfinite(layer(draw(1, 3))).all()
    assert torch.isfinite(Dice(3).eval()(torch.ones(2, 3))).all()


def test_dice_of_counted_rows_is_dice_of_all_rows() -> None:
    """Distinct rows with how often each stands in the batch: output, gradients and running averages."""
    count = torch.tensor([3.0, 1.0, 5.0, 0.0])
    repeats = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    distinct = (draw(4, 3) * 2 + 1).requires_grad_()
    counted, plain = random_dice(3), random_dice(3)
    one, all_rows = counted(distinct, count)[repeats], plain(distinct[repeats])
    torch.testing.assert_close(one, all_rows, rtol=1e-12, atol=1e-14)
    for name, tensor in counted.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-12, atol=1e-14)
    slopes = [torch.autograd.grad((out**2).sum(), (distinct, d.a_H)) for out, d in ((one, counted), (all_rows, plain))]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    counted.eval()
    plain.eval()
    torch.testing.assert_close(counted(distinct, count), plain(distinct), rtol=1e-12, atol=1e-14)


def test_gradients_of_dice() -> None:
    layer, y = random_dice(3), draw(6, 3).requires_grad_()

    def f(y: Tensor, a: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"a_H": a}, (y,))

    assert torch.autograd.gradcheck(f, (y, layer.a_H))
    layer.eval()
    assert torch.autograd.gradcheck(f, (y, layer.a_H))


def test_prelu() -> None:
    layer = PReLU(3)
    assert layer.weight.tolist() == [0.25] * 3
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    y = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 3.0, 2.0]])
    assert layer(y).tolist() == [[-0.5, 2.0, 0.0], [0.0, 3.0, 2.0]]
    empty = torch.zeros(0, 3, requires_grad=True)
    layer(empty).sum().backward()
    assert layer(empty).shape == (0, 3)


SEGMENT = torch.tensor([4, 1, 1, 4, 0, 1])
N = 6  # segments 2, 3 and 5 are empty


def test_segments_against_loops() -> None:
    values = draw(6, 3)
    total, top = np.zeros((N, 3)), np.zeros((N, 3))
    for s in range(N):
        members = [values[r].numpy() for r in range(6) if SEGMENT[r] == s]
        if members:
            total[s], top[s] = np.sum(members, 0), np.max(members, 0)
    np.testing.assert_allclose(segment_sum(values, SEGMENT, N), total, rtol=1e-14)
    np.testing.assert_array_equal(segment_max(values, SEGMENT, N), top)
    assert (top < 0).any()  # a segment's maximum may be negative: the zeros of empty ones must not win
    logits = draw(6)
    expected = [
        math.exp(logits[r]) / sum(math.exp(logits[o]) for o in range(6) if SEGMENT[o] == SEGMENT[r]) for r in range(6)
    ]
    np.testing.assert_allclose(segment_softmax(logits, SEGMENT, N), expected, rtol=1e-14)


def test_gradients_of_segments() -> None:
    values, logits = draw(6, 3).requires_grad_(), draw(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, SEGMENT, N), (values,))
    assert torch.autograd.gradcheck(lambda v: segment_max(v, SEGMENT, N), (values,))
    assert torch.autograd.gradcheck(lambda z: segment_softmax(z, SEGMENT, N), (logits,))


def test_nothing_in_any_segment() -> None:
    none, nobody = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert segment_sum(none, nobody, 2).tolist() == [[0.0] * 3] * 2
    assert segment_max(none, nobody, 2).tolist() == [[0.0] * 3] * 2
    assert segment_softmax(none[:, 0], nobody, 2).tolist() == []


def test_softmax_of_large_logits() -> None:
    segment = torch.tensor([0, 0, 1, 1, 2])
    logits = torch.tensor([1e4, 1e4 - 1, -1e4, -1e4, -3e38], requires_grad=True)
    out = segment_softmax(logits, segment, 3)
    torch.testing.assert_close(out.detach(), torch.tensor([0.7310586, 0.2689414, 0.5, 0.5, 1.0]))
    out[::2].sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def whole_layer(unit: PairMLP) -> nn.Linear:
    """Put the split first layer together again: one `nn.Linear` over the concatenation."""
    weight = torch.cat([unit.weight[p].detach() for p in unit.parts], 1)
    first = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        first.weight.copy_(weight)
        first.bias.copy_(unit.bias)
    return first


@pytest.mark.parametrize("act", ["prelu", "dice", "sigmoid"])
@pytest.mark.parametrize(("parts", "q", "k"), [("qk", 5, 3), ("qkd", 4, 4), ("qkdp", 4, 4)])
def test_split_first_layer_and_jagged_are_concatenated_and_padded(parts: str, q: int, k: int, act: str) -> None:
    """The same network on [samples, longest, …] with a mask, every pair's concatenation built: scores and softmax."""
    unit = PairMLP(q, k, (6, 5), act, parts).double().eval()
    first, layers = whole_layer(unit), [unit.act, *unit.rest]
    lengths = [3, 0, 1, 4]
    q_SD, k_BD = draw(4, q, seed=1), draw(8, k, seed=2)
    sample_P = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    padded_SLD, mask_SL = torch.full((4, 4, k), 7.0, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.bool)
    for s, start in enumerate([0, 3, 3, 4]):
        padded_SLD[s, : lengths[s]] = k_BD[start : start + lengths[s]]
        mask_SL[s, : lengths[s]] = True
    query_SLD = q_SD.unsqueeze(1).expand(4, 4, q)
    inputs = [query_SLD, padded_SLD]
    if "d" in parts:
        inputs.append(query_SLD - padded_SLD)
    if "p" in parts:
        inputs.append(query_SLD * padded_SLD)
    h = first(torch.cat(inputs, -1)).reshape(16, -1)
    for layer in layers:
        h = layer(h)
    scores_SL = h.reshape(4, 4)
    found_P = unit(q_SD, k_BD, sample_P, torch.arange(8))
    torch.testing.assert_close(found_P, scores_SL[mask_SL], rtol=1e-12, atol=1e-14)
    masked = torch.softmax(scores_SL.masked_fill(~mask_SL, -1e30), 1)[mask_SL]
    torch.testing.assert_close(segment_softmax(found_P, sample_P, 4), masked, rtol=1e-12, atol=1e-14)


def test_split_first_layer_starts_as_the_whole_would() -> None:
    """The same seed gives the numbers that one `nn.Linear` over the concatenation starts with."""
    torch.manual_seed(3)
    unit = PairMLP(4, 4, (6, 5), "prelu", "qkdp")
    torch.manual_seed(3)
    whole = nn.Linear(16, 6)
    assert torch.equal(torch.cat([unit.weight[p] for p in "qkdp"], 1), whole.weight)
    assert torch.equal(unit.bias, whole.bias)


def test_gradients_of_the_pair_network() -> None:
    unit = PairMLP(3, 3, (4,), "dice", "qkdp").double()
    q, k = draw(3, 3, seed=1).requires_grad_(), draw(4, 3, seed=2).requires_grad_()
    sample_P, behaviour_P = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda q, k, *_: unit(q, k, sample_P, behaviour_P), (q, k, *unit.parameters()))


def test_pair_network_refuses_what_it_cannot_subtract() -> None:
    with pytest.raises(ValueError, match="equal widths, not 3 and 4"):
        PairMLP(3, 4, (5,), "prelu", "qkd")


def test_discriminator() -> None:
    """BatchNorm, then the layers; the log-odds are those of a softmax over the two outputs."""
    net = Discriminator(4, (5, 3), "prelu", True).double()
    x = draw(6, 4)
    y = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)
    two = net.layers(y)
    torch.testing.assert_close(torch.sigmoid(net(x)), torch.softmax(two, 1)[:, 1])
    assert [m.out_features for m in net.layers if isinstance(m, nn.Linear)] == [5, 3, 2]
    assert torch.equal(Discriminator(4, (5,), "prelu", False).norm(x), x)


def test_one_row_is_normalised_by_the_running_statistics() -> None:
    net = Discriminator(4, (5,), "prelu", True).double()
    net(draw(20, 4) * 3 + 1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    one = draw(1, 4, seed=5)
    trained = net.train()(one)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    torch.testing.assert_close(trained, net.eval()(one))


def test_mlp_ends_without_an_activation() -> None:
    kinds = [type(layer).__name__ for layer in mlp([3, 4, 5, 2], "dice")]
    assert kinds == ["Linear", "Dice", "Linear", "Dice", "Linear"]
    assert [type(layer).__name__ for layer in mlp([3, 2], "dice")] == ["Linear"]


@pytest.mark.parametrize("widths", [(3, 2), (3, 4, 2), (5, 4, 3, 2), (5, 4, 3, 3, 2)])
@pytest.mark.parametrize("act", ["prelu", "dice"])
def test_gradients_of_extractors(widths: tuple[int, ...], act: str) -> None:
    """One to four layers, with rows that count several times."""
    net, count = mlp(widths, act).double(), torch.tensor([2.0, 1.0, 4.0])
    names = [name for name, _ in net.named_parameters()]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x, count))

    assert torch.autograd.gradcheck(f, (draw(3, widths[0]).requires_grad_(), *net.parameters()))
