"""BatchNorm and Dice over the rows of several ranks, as real processes, against one process that has all rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ctrkit.models.layers import BatchNorm, Dice
from ctrkit.models.statistics import over_all_ranks
from ctrkit.ranks import ALONE, Ranks
from tests.ranks import on_ranks

WIDTH = 3
SHARES = {2: [[5, 0], [3, 2], [1, 0], [0, 0]], 4: [[0, 4, 0, 1], [0, 0, 0, 1], [2, 2, 2, 2], [0, 0, 0, 0]]}
"""Ranks → rows of each in each batch: many, one, none; none of any."""


def batch(number: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows far from zero, so that sums of squares would lose digits; and how often each counts."""
    generator = torch.Generator().manual_seed(number)
    x_RH = 100.0 + torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator)
    return x_RH, torch.randint(1, 5, (rows,), generator=generator).double()


def steps(ranks: Ranks, shares: list[list[int]]) -> list[Any]:
    """What each layer gives for each batch: outputs and gradients of this rank's rows, statistics after."""
    torch.manual_seed(1)
    layers = nn.ModuleList([BatchNorm(WIDTH), Dice(WIDTH), Dice(WIDTH)]).double()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.rand(WIDTH))
    if ranks.count > 1:
        over_all_ranks(layers, dist.new_group())
    out = []
    for number, share in enumerate(shares):
        begin = sum(share[: ranks.rank])
        own = slice(begin, begin + share[ranks.rank])
        for kind, layer in enumerate(layers):
            x_RH, count_R = batch(number, sum(share))
            x_RH = x_RH[own].clone().requires_grad_()
            y_RH = layer(x_RH, count_R[own]) if kind == 2 else layer(x_RH)
            (y_RH * y_RH.detach().cos() * count_R[own].unsqueeze(1)).sum().backward()
            assert x_RH.grad is not None
            buffers = {name: b.clone().numpy() for name, b in layer.named_buffers()}
            out.append((y_RH.detach().numpy(), x_RH.grad.numpy(), buffers))
    return out


def on_rank(ranks: Ranks, folder: Path) -> list[Any]:
    return steps(ranks, SHARES[ranks.count])


def test_statistics_over_ranks_are_those_of_all_rows(tmp_path: Path) -> None:
    for count, ranks in on_ranks(on_rank, [2, 4], tmp_path).items():
        wholes = steps(ALONE, [[sum(share)] for share in SHARES[count] if sum(share)])
        for number, (y_RH, slope_RH, buffers) in enumerate(wholes):
            found = [rank[number] for rank in ranks]
            np.testing.assert_allclose(np.concatenate([f[0] for f in found]), y_RH, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(np.concatenate([f[1] for f in found]), slope_RH, rtol=1e-7, atol=1e-7)
            for name, value in buffers.items():
                for f in found:
                    np.testing.assert_allclose(f[2][name], value, rtol=1e-9)
        # A batch without any row changes nothing.
        for rank in ranks:
            for kind in range(3):
                for name, value in rank[len(wholes) + kind][2].items():
                    np.testing.assert_array_equal(value, rank[len(wholes) - 3 + kind][2][name])
