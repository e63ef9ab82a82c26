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

Users = tuple[Tensor, Tensor]
"""([G, K], [R]): columns that rows of a group share, and the group of each row."""
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
    run: ModuleType,
    users: "Users | None",
    x_RD: Tensor,
    norm: "BatchNorm | None",
    layers: Sequence[nn.Linear],
    slopes: Sequence[Tensor],
) -> Tensor:
    """Return [R]: the difference of the two outputs of the last layer, whose input are `users` and x side by side."""
    last = layers[-1]
    if norm is None:
        gamma_D, beta_D = x_RD.new_ones(layers[0].in_features), x_RD.new_zeros(layers[0].in_features)
    else:
        gamma_D, beta_D = norm.weight, norm.bias
    inner = [p for layer, slope in zip(layers, slopes, strict=False) for p in (layer.weight, layer.bias, slope)]
    ends = last.weight[1:] - last.weight[:1], last.bias[1:] - last.bias[:1]
    of_groups = (x_RD.new_empty(0, 0), torch.zeros(len(x_RD), dtype=torch.int64)) if users is None else users
    out: Tensor = _Tower.apply(run, norm, *of_groups, x_RD, gamma_D, beta_D, *ends, *inner)
    return out


class _Tower(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: ModuleType, norm: "BatchNorm | None", u_GK: Tensor, group_R: Tensor, *tensors: Tensor
    ) -> Tensor:
        """u, group: the first K columns of the input, once a group. tensors: x, the others; γ, β of all columns; matrix
        [1, H] and bias [1] of the logits; matrix, bias and slopes of each layer."""
        u, group, x, gamma_D, beta_D, out_1H, out_1, *inner = _arrays(u_GK, group_R, *tensors)
        of_groups, of_rows = slice(u.shape[1]), slice(u.shape[1], None)
        parts = _parts(len(x))
        mean_D, r_D = _statistics(run, norm, u, np.bincount(group, minlength=len(u)), x)
        first, *others = (np.ascontiguousarray(w_OH.T) for w_OH in inner[0::3])
        layers = tuple(zip([first[of_rows], *others], inner[1::3], inner[2::3], strict=True))
        into = [np.empty((len(x), len(layer[1])), x.dtype) for layer in layers]
        h_GH, logit_R = np.empty((len(u), first.shape[1]), x.dtype), np.empty(len(x), x.dtype)
        u = (u - mean_D[of_groups]) * r_D[of_groups]
        if len(u):
            run.tiles.product(u * gamma_D[of_groups] + beta_D[of_groups], first[of_groups], h_GH, False)
        how = tuple(each_D[of_rows] for each_D in (mean_D, r_D, gamma_D, beta_D))

        def part(i: int) -> None:
            rows = parts[i]
            out, mine = (out_1H.reshape(-1), out_1), tuple(h[rows] for h in into)
            run.forward(x[rows], how, group[rows], h_GH, layers, out, mine, logit_R[rows])

        threads.side_by_side(part, len(parts))
        ctx.save_for_backward(group_R, *tensors)
        ctx.run, ctx.how, ctx.u, ctx.r_D, ctx.into, ctx.normal = run, how, u, r_D, into, norm is not None
        return torch.from_numpy(logit_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogit_R: Tensor) -> tuple[Any, ...]:
        run, how, u, into = ctx.run, ctx.how, ctx.u, ctx.into
        group, x, gamma_D, beta_D, out_1H, _, *inner = _arrays(*ctx.saved_tensors)
        of_groups, of_rows = slice(u.shape[1]), slice(u.shape[1], None)
        layers = tuple(zip(*(inner[i::3] for i in range(3)), strict=True))
        dlogit_R1, parts = dlogit_R.contiguous().numpy().reshape(-1, 1), _parts(len(x))
        w_HD = layers[0][0]
        found: list[Any] = [None] * len(parts)

        def part(i: int) -> None:
            rows = parts[i]
            dw = tuple(np.zeros_like(w) for w in (w_HD[:, of_rows], *inner[3::3]))
            sums = tuple(np.zeros((2, len(bias)), bias.dtype) for bias in inner[1::3])
            dh_GH, dout_1H = np.zeros((len(u), len(w_HD)), x.dtype), np.zeros_like(out_1H)
            mine = tuple(h[rows] for h in into)
            run.backward(x[rows], how, group[rows], dh_GH, layers, out_1H, mine, dlogit_R1[rows], dw, sums, dout_1H)
            found[i] = *dw, *sums, dh_GH, dout_1H

        threads.side_by_side(part, len(parts))
        *both, dh_GH, dout_1H = (functools.reduce(np.add, of_parts) for of_parts in zip(*found, strict=True))
        dw, sums = both[: len(layers)], both[len(layers) :]
        # Of the first layer these are Σ dh·x̂, from which follow the sums over all rows that the input's gradient wants.
        dhu_HK = np.zeros((len(w_HD), u.shape[1]), x.dtype)
        if len(u):
            run.tiles.product_t(dh_GH, 0, u, dhu_HK)
        dh_H, dhx_HD = sums[0][0], np.concatenate([dhu_HK, dw[0]], 1)
        dbeta_D, dgamma_D = (w_HD * dh_H[:, None]).sum(0), (w_HD * dhx_HD).sum(0)
        dw[0] = dhx_HD * gamma_D + dh_H[:, None] * beta_D
        scale_D = gamma_D * ctx.r_D
        share = scale_D / len(x) if ctx.normal else np.zeros_like(scale_D)
        scaled_HD, constant_D, factor_D = w_HD * scale_D, share * dbeta_D, share * dgamma_D
        dx = np.empty_like(x)
        ends = np.ascontiguousarray(scaled_HD[:, of_rows]), constant_D[of_rows], factor_D[of_rows]

        def enter(i: int) -> None:
            rows = parts[i]
            run.enter_back(x[rows], how, into[0][rows], *ends, dx[rows])

        threads.side_by_side(enter, len(parts))
        du = np.empty_like(u)
        if len(u):
            run.tiles.product(dh_GH, np.ascontiguousarray(scaled_HD[:, of_groups]), du, False)
            count_G1 = np.bincount(group, minlength=len(u)).astype(x.dtype)[:, None]
            du -= count_G1 * (constant_D[of_groups] + u * factor_D[of_groups])
        grads = [g for w, s in zip(dw, sums, strict=True) for g in (w, s[0], s[1])]
        before = (torch.from_numpy(g) for g in (dx, dgamma_D, dbeta_D, dout_1H))
        dout_1 = dlogit_R.sum().reshape(1)
        return None, None, torch.from_numpy(du), None, *before, dout_1, *map(torch.from_numpy, grads)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _parts(rows: int) -> list[slice]:
    """Return the rows of each thread; none has no row."""
    n = min(threads.count(), rows)
    return [slice(rows * i // n, rows * (i + 1) // n) for i in range(n)]


def _statistics(run: ModuleType, norm: "BatchNorm | None", u_GK: Any, count_G: Any, x_RD: Any) -> tuple[Any, Any]:
    """Return mean and r = 1/√(variance + ε) of u's columns and x's, and take them into the running statistics. A row of
    u counts as often as `count_G` says."""
    rows, width, dtype = len(x_RD), x_RD.shape[1], x_RD.dtype
    if norm is None:
        return np.zeros(u_GK.shape[1] + width, dtype), np.ones(u_GK.shape[1] + width, dtype)
    n_1, mean_D, square_D = (np.zeros(n, dtype) for n in (1, width, width))
    for begin in range(0, rows, ROWS):
        run.moments(x_RD[begin : begin + ROWS], n_1, mean_D, square_D)
    count_G1 = count_G[:, None]
    mean_K = (count_G1 * u_GK).sum(0) / rows
    square_K = (count_G1 * (u_GK - mean_K) ** 2).sum(0)
    mean_D, square_D = np.concatenate([mean_K, mean_D]), np.concatenate([square_K, square_D])
    found = mean_D, square_D / (rows - 1), 1 / np.sqrt(square_D / rows + norm.eps)
    mean_D, unbiased_D, r_D = (each_D.astype(dtype) for each_D in found)
    norm.observe(torch.from_numpy(mean_D), torch.from_numpy(unbiased_D))
    return mean_D, r_D
