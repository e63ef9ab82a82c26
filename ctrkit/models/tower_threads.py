"""BatchNorm and a tower of layers with PReLU, by compiled loops and a thread of ours a core. In training, on a CPU.

Each thread takes its share of the rows through all layers. What all rows add to is added up thread by thread, always in
the same order, so the same number of threads gives the same bits. Letters as in `ctrkit.models.tower_loops`.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrkit.models import threads
from ctrkit.models.compiled_layers import ROWS, loops

if TYPE_CHECKING:
    from ctrkit.models.layers import BatchNorm

SMALLEST = 1 << 23
"""Multiply-adds of the first layer from which on a tower is shared out."""


def tower_loops(x_RD: Tensor, layers: Sequence[nn.Linear], slopes: Sequence[Tensor]) -> ModuleType | None:
    """Return the loops for a tower of these layers on these rows; None where the plain way is to be taken."""
    if not threads.owned() or torch.is_autocast_enabled("cpu") or len(layers) < 2 or not torch.is_grad_enabled():
        return None
    if x_RD.ndim != 2 or len(x_RD) < 2 or len(x_RD) * layers[0].weight.numel() < SMALLEST:
        return None
    run = loops(x_RD, "ctrkit.models.tower_loops")
    of_one_kind = all(p.dtype == x_RD.dtype for p in (*slopes, *(layer.weight for layer in layers)))
    if run is None or not of_one_kind or not run.tiles.fits(*(layer.in_features for layer in layers)):
        return None
    return run


def tower(
    run: ModuleType, x_RD: Tensor, norm: "BatchNorm | None", layers: Sequence[nn.Linear], slopes: Sequence[Tensor]
) -> Tensor:
    """Return [R]: the difference of the two outputs of the last layer."""
    last = layers[-1]
    gamma_D, beta_D = (
        (x_RD.new_ones(x_RD.shape[1]), x_RD.new_zeros(x_RD.shape[1])) if norm is None else (norm.weight, norm.bias)
    )
    inner = [p for layer, slope in zip(layers, slopes, strict=False) for p in (layer.weight, layer.bias, slope)]
    ends = last.weight[1:] - last.weight[:1], last.bias[1:] - last.bias[:1]
    out: Tensor = _Tower.apply(run, norm, x_RD, gamma_D, beta_D, *ends, *inner)
    return out


class _Tower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: ModuleType, norm: "BatchNorm | None", *tensors: Tensor) -> Tensor:
        """tensors: x, γ, β, matrix [1, H] and bias [1] of the logits, then matrix, bias and slopes of each layer."""
        x_RD, gamma_D, beta_D, out_1H, out_1, *inner = (t.detach().contiguous().numpy() for t in tensors)
        parts = _parts(len(x_RD))
        mean_D, r_D = _statistics(run, norm, x_RD)
        how = mean_D, r_D, gamma_D, beta_D
        layers = tuple(
            (np.ascontiguousarray(w_OH.T), bias, a)
            for w_OH, bias, a in zip(*(inner[i::3] for i in range(3)), strict=True)
        )
        into = [np.empty((len(x_RD), len(layer[1])), x_RD.dtype) for layer in layers]
        logit_R = torch.empty(len(x_RD), dtype=tensors[0].dtype)

        def part(i: int) -> None:
            rows = parts[i]
            out, mine = (out_1H.reshape(-1), out_1), tuple(h[rows] for h in into)
            run.forward(x_RD[rows], how, layers, out, mine, logit_R.numpy()[rows])

        threads.side_by_side(part, len(parts))
        ctx.save_for_backward(*tensors)
        ctx.run, ctx.how, ctx.into, ctx.normal = run, how, into, norm is not None
        return logit_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogit_R: Tensor) -> tuple[Any, ...]:
        run, how, into = ctx.run, ctx.how, ctx.into
        x_RD, gamma_D, beta_D, out_1H, _, *inner = (t.detach().contiguous().numpy() for t in ctx.saved_tensors)
        layers = tuple(zip(*(inner[i::3] for i in range(3)), strict=True))
        dlogit_R1, parts = dlogit_R.contiguous().numpy().reshape(-1, 1), _parts(len(x_RD))
        found: list[Any] = [None] * len(parts)

        def part(i: int) -> None:
            rows = parts[i]
            dw, sums = (
                tuple(np.zeros_like(w) for w, _, _ in layers),
                tuple(np.zeros((2, len(b)), b.dtype) for _, b, _ in layers),
            )
            dout_1H, mine = np.zeros_like(out_1H), tuple(h[rows] for h in into)
            run.backward(x_RD[rows], how, layers, out_1H, mine, dlogit_R1[rows], dw, sums, dout_1H)
            found[i] = *dw, *sums, dout_1H

        threads.side_by_side(part, len(parts))
        *both, dout_1H = (functools.reduce(np.add, of_parts) for of_parts in zip(*found, strict=True))
        dw, sums = both[: len(layers)], both[len(layers) :]
        # Of the first layer dw is Σ dh·x̂, from which follow the sums over all rows that dx wants.
        w_HD, dh_H, dhx_HD = layers[0][0], sums[0][0], dw[0]
        dbeta_D, dgamma_D = (w_HD * dh_H[:, None]).sum(0), (w_HD * dhx_HD).sum(0)
        dw[0] = dhx_HD * gamma_D + dh_H[:, None] * beta_D
        scale_D = gamma_D * how[1]
        mean = scale_D / len(x_RD) if ctx.normal else np.zeros_like(scale_D)
        dx_RD, ends = np.empty_like(x_RD), (w_HD * scale_D, mean * dbeta_D, mean * dgamma_D)

        def enter(i: int) -> None:
            rows = parts[i]
            run.enter_back(x_RD[rows], how, into[0][rows], *ends, dx_RD[rows])

        threads.side_by_side(enter, len(parts))
        grads = [g for w, s in zip(dw, sums, strict=True) for g in (w, s[0], s[1])]
        dout_1 = dlogit_R.sum().reshape(1)
        return (
            None,
            None,
            *(torch.from_numpy(g) for g in (dx_RD, dgamma_D, dbeta_D, dout_1H)),
            dout_1,
            *map(torch.from_numpy, grads),
        )


def _parts(rows: int) -> list[slice]:
    """Return the rows of each thread; none has no row."""
    n = min(threads.count(), rows)
    return [slice(rows * i // n, rows * (i + 1) // n) for i in range(n)]


def _statistics(run: ModuleType, norm: "BatchNorm | None", x_RD: Any) -> tuple[Any, Any]:
    """Return mean [D] and r [D] = 1/√(variance + ε), and take them into the running statistics."""
    width, dtype = x_RD.shape[1], x_RD.dtype
    if norm is None:
        return np.zeros(width, dtype), np.ones(width, dtype)
    n_1, mean_D, square_D = (np.zeros(n, dtype) for n in (1, width, width))
    for begin in range(0, len(x_RD), ROWS):
        run.moments(x_RD[begin : begin + ROWS], n_1, mean_D, square_D)
    r_D = 1 / np.sqrt(square_D / len(x_RD) + norm.eps)
    norm.observe(torch.from_numpy(mean_D), torch.from_numpy(square_D / (len(x_RD) - 1)))
    return mean_D, r_D.astype(dtype)
