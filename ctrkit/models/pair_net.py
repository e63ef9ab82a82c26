"""Attention by a network of PReLU on [q; k; q − k; q∘k], all its layers in one compiled loop, a thread of ours a core.

The threads share out the pairs so that no sample and no behaviour is in two of them. What all pairs add to is added up
thread by thread, always in the same order, so the same number of threads gives the same bits. CPU only. Shape letters
as in `ctrkit.models.pair_blocks`; T the pairs of a thread.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrkit.models import threads
from ctrkit.models.compiled_layers import loops

if TYPE_CHECKING:
    from ctrkit.models.pairs import PairMLP

Pairs = tuple[Tensor, Tensor]
"""([P], [P]): sample and behaviour of each pair; samples rising."""


def net_loops(unit: "PairMLP", q_SD: Tensor) -> ModuleType | None:
    """Return the loops for a unit that has two hidden layers or more, all with PReLU, on all four parts; None where the
    plain way is to be taken."""
    from ctrkit.models.layers import PReLU

    layers = [layer for layer in unit.rest if isinstance(layer, nn.Linear)]
    parameters = [*unit.weight.values(), *unit.rest.parameters()]
    if unit.parts != "qkdp" or len(layers) < 2 or any(p.dtype != q_SD.dtype for p in parameters):
        return None
    if not all(isinstance(act, PReLU) for act in (unit.act, *list(unit.rest)[1::2])):
        return None
    run = loops(q_SD, "ctrkit.models.pair_net_loops")
    return run if run is not None and run.tiles.fits(q_SD.shape[1], *(layer.in_features for layer in layers)) else None


def attend_by_net(
    run: ModuleType,
    unit: "PairMLP",
    q_SD: Tensor,
    k_BD: Tensor,
    v_BE: Tensor,
    pairs: Pairs,
    softmax: bool,
    scale: float,
    times_B: Tensor | None = None,
) -> Tensor:
    """Return what `ctrkit.models.pairs.attend` does."""
    w_q, w_k = unit.first()
    layers = [(layer.weight, layer.bias) for layer in unit.rest if isinstance(layer, nn.Linear)]
    slopes = [act.weight for act in (unit.act, *list(unit.rest)[1::2])]
    first = w_q, w_k, unit.weight["p"], unit.bias
    inner = [p for slope, layer in zip(slopes, layers, strict=True) for p in (slope, *layer)]
    keep = torch.is_grad_enabled()
    times_B = q_SD.new_empty(0) if times_B is None else times_B.to(q_SD.dtype)
    out_SE: Tensor = _Attend.apply(run, *pairs, times_B, softmax, scale, keep, q_SD, k_BD, v_BE, *first, *inner)
    return out_SE


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: ModuleType,
        sample_P: Tensor,
        behaviour_P: Tensor,
        times_B: Tensor,
        softmax: bool,
        scale: float,
        keep: bool,
        *tensors: Tensor,
    ) -> Tensor:
        """tensors: q, k, v; W_q, W_k, W_p and bias of the first layer; then the slopes behind a layer, and matrix and
        bias of the next, to that of the logits."""
        q_SD, k_BD, v_BE, wq_HD, wk_HD, wp_HD, bias_H, *inner = _arrays(tensors)
        slopes, weights, biases = inner[0::3], inner[1::3], inner[2::3]
        parts = _parts(run, sample_P, behaviour_P)
        scale_1, dtype, times = np.array([scale], q_SD.dtype), q_SD.dtype, times_B.numpy()
        first = *(_transposed(w) for w in (wq_HD, wk_HD, wp_HD)), bias_H, slopes[0]
        layers = tuple(zip(map(_transposed, weights[:-1]), biases[:-1], slopes[1:], strict=True))
        out = weights[-1].reshape(-1), biases[-1]
        x_SH = np.empty((len(q_SD), len(bias_H)), dtype)
        into = [tuple(np.empty((len(s), len(b)), dtype) for b in biases[:-1]) for s, _ in parts]
        w_T = [np.empty(len(s), dtype) for s, _ in parts]
        out_SE = np.zeros((len(q_SD), v_BE.shape[1]), dtype)

        def part(i: int) -> None:
            logit_T = np.empty(len(w_T[i]), dtype)
            run.forward(q_SD, k_BD, *parts[i], first, layers, out, x_SH, into[i], logit_T)
            run.pool(logit_T, scale_1, softmax, *parts[i], times, v_BE, w_T[i], out_SE)

        threads.side_by_side(part, len(parts))
        if keep:
            ctx.save_for_backward(*tensors)
            ctx.run, ctx.parts, ctx.how, ctx.kept = run, parts, (scale_1, softmax, times), (x_SH, into, w_T)
        return torch.from_numpy(out_SE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_SE: Tensor) -> tuple[Any, ...]:
        run, parts, (x_SH, into, w_T), (*how, times) = ctx.run, ctx.parts, ctx.kept, ctx.how
        q_SD, k_BD, v_BE, wq_HD, wk_HD, wp_HD, bias_H, *inner = _arrays(ctx.saved_tensors)
        slopes, weights, biases = inner[0::3], inner[1::3], inner[2::3]
        first = _transposed(wk_HD), _transposed(wp_HD), wq_HD, wk_HD, wp_HD
        layers = tuple(zip(weights, [bias_H, *biases[:-1]], slopes, strict=True))
        dq_SD, dk_BD, dv_BE = (np.zeros_like(x) for x in (q_SD, k_BD, v_BE))
        dout = dout_SE.contiguous().numpy()
        found: list[Any] = [None] * len(parts)

        def part(i: int) -> None:
            dlogit_T1 = np.empty((len(w_T[i]), 1), w_T[i].dtype)
            run.pool_back(w_T[i], *how, *parts[i], times, v_BE, dout, dlogit_T1.reshape(-1), dv_BE)
            dfirst, dw = tuple(np.zeros_like(w) for w in (wq_HD, wk_HD, wp_HD)), tuple(map(np.zeros_like, weights))
            sums = tuple(np.zeros((2, len(slope)), slope.dtype) for slope in slopes)
            given = first, layers, x_SH, into[i], dlogit_T1
            run.backward(q_SD, k_BD, *parts[i], *given, dfirst, dw, sums, dq_SD, dk_BD)
            found[i] = *dfirst, *dw, *sums, dlogit_T1.sum(0)

        threads.side_by_side(part, len(parts))
        dwq, dwk, dwp, *rest, dlast = (torch.from_numpy(sum(of_parts)) for of_parts in zip(*found, strict=True))
        dw, sums = rest[: len(weights)], rest[len(weights) :]
        dbiases = [*(s[0] for s in sums[1:]), dlast]
        inside = [g for s, w, b in zip(sums, dw, dbiases, strict=True) for g in (s[1], w, b)]
        inputs = (torch.from_numpy(x) for x in (dq_SD, dk_BD, dv_BE))
        return *[None] * 7, *inputs, dwq, dwk, dwp, sums[0][0], *inside


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _transposed(w: Any) -> Any:
    return np.ascontiguousarray(w.T)


def _parts(run: ModuleType, sample_P: Tensor, behaviour_P: Tensor) -> list[tuple[Any, Any]]:
    """Return the pairs of each thread."""
    sample, behaviour = _arrays((sample_P, behaviour_P))
    n = threads.count()
    places = run.cuts(sample, behaviour, np.arange(1, n) * len(sample) // n)
    return list(zip(np.split(sample, places), np.split(behaviour, places), strict=True))
