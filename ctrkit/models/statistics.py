"""Mean and variance over the rows of all ranks, for BatchNorm and Dice. R rows of this rank, H channels, W ranks.

Each rank sends how many rows it has, their mean and the sum of their squared distances from it; merged, these give
what one process would find in all rows (Chan, Golub and LeVeque's update). A rank may have no row.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Group = Any
"""A process group of torch.distributed; None: this process alone."""


def moments(x_RH: Tensor, weight_R: Tensor | None, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([] rows, [H] mean, [H] variance) over all ranks' rows, with their gradients.

    weight_R: how often each row counts; None: once. Without any row mean and variance are 0. A collective, and so is
    its gradient.
    """
    if weight_R is None:
        weight_R = x_RH.new_ones(len(x_RH))
    weight_R1 = weight_R.to(x_RH.dtype).unsqueeze(1)
    n = weight_R1.sum()
    mean_H = (weight_R1 * x_RH).sum(0) / n.clamp(min=1)
    square_H = (weight_R1 * (x_RH - mean_H) ** 2).sum(0)
    return merged(n, mean_H, square_H, group)


def merged(n: Tensor, mean_H: Tensor, square_H: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([] rows, [H] mean, [H] variance) over all ranks from each one's rows, mean and sum of squared distances
    from it. A collective, and so is its gradient."""
    all_WK: Tensor = _Gather.apply(torch.cat([n.view(1), mean_H, square_H]), group)
    n_W, mean_WH, square_WH = all_WK[:, 0], *all_WK[:, 1:].chunk(2, 1)
    total = n_W.sum()
    share_W1 = (n_W / total.clamp(min=1)).unsqueeze(1)
    all_H = (share_W1 * mean_WH).sum(0)
    var_H = square_WH.sum(0) / total.clamp(min=1) + (share_W1 * (mean_WH - all_H) ** 2).sum(0)
    return total, all_H, var_H


def normalised(
    x_RH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, running: tuple[Tensor, Tensor], group: Group
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ([R, H] BatchNorm of x over the rows of all ranks, [] rows, [H] mean, [H] variance); the first has a
    gradient. Where all ranks have one row together, mean and variance are the `running` ones. A collective, and so is
    its gradient."""
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalised.apply(x_RH, weight_H, bias_H, eps, running, group)
    return out


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of the ranks' tensors, without a gradient. A collective."""
    out = x.clone()
    dist.all_reduce(out, group=group)
    return out


class _Normalised(torch.autograd.Function):
    """Few passes over the rows: moments, the normalising, and back the sums and what they add."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        weight_H: Tensor,
        bias_H: Tensor,
        eps: float,
        running: tuple[Tensor, Tensor],
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = len(x_RH)
        var_H, mean_H = torch.var_mean(x_RH, 0, correction=0) if rows else (torch.zeros_like(weight_H),) * 2
        n = x_RH.new_tensor(rows)
        n, mean_H, var_H = merged(n, mean_H, var_H * rows, group)
        several = n > 1
        mean_H, var_H = torch.where(several, mean_H, running[0]), torch.where(several, var_H, running[1])
        ctx.save_for_backward(x_RH, weight_H, n, mean_H, var_H)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(n, mean_H, var_H)
        out_RH = (
            torch.batch_norm(x_RH, weight_H, bias_H, mean_H, var_H, False, 0.0, eps, False) if rows else x_RH.clone()
        )
        return out_RH, n, mean_H, var_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RH: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_RH, weight_H, n, mean_H, var_H = ctx.saved_tensors
        dx_RH, dweight_H, dbias_H = dout_RH, torch.zeros_like(weight_H), torch.zeros_like(weight_H)
        if len(x_RH):  # with mean and variance as constants
            dx_RH, dweight_H, dbias_H = torch.ops.aten.native_batch_norm_backward(
                dout_RH, x_RH, weight_H, mean_H, var_H, None, None, False, ctx.eps, [True, True, True]
            )
        of_weight_H, of_bias_H = summed(torch.stack([dweight_H, dbias_H]), ctx.group)
        # And as what they are. The gradient of mean and variance is nothing where they are the running ones.
        per_H = (var_H + ctx.eps).rsqrt()
        share_H = torch.where(n > 1, weight_H * per_H / n.clamp(min=1), 0.0)
        slope_H = share_H * per_H * of_weight_H
        dx_RH = torch.addcmul(dx_RH, x_RH, slope_H, value=-1.0).add_(slope_H * mean_H - share_H * of_bias_H)
        return dx_RH, dweight_H, dbias_H, None, None, None


class _Gather(torch.autograd.Function):
    """[K] of each rank → [W, K] on every rank."""

    @staticmethod
    def forward(ctx: Any, x_K: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x_K.new_empty(dist.get_world_size(group) * len(x_K))
        dist.all_gather_into_tensor(out, x_K.contiguous(), group=group)
        return out.view(-1, len(x_K))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_WK: Tensor) -> tuple[Tensor, None]:
        return summed(dout_WK, ctx.group)[dist.get_rank(ctx.group)], None


def over_all_ranks(network: nn.Module, group: Group) -> None:
    """Have every BatchNorm and Dice of a network take its statistics over the rows of all ranks of a group."""
    for module in network.modules():
        if hasattr(module, "group"):
            module.group = group
