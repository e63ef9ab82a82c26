"""PReLU, Dice and sigmoid by compiled loops (`ctrkit.models.pair_loops`), a block of rows at a time; for CPUs.

h is what goes into a layer's activation without the layer's bias, x = h + bias. Shape letters as in
`ctrkit.models.pair_blocks`; C the rows of a block.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctrkit import numba_loops

if TYPE_CHECKING:
    from ctrkit.models.layers import Dice, PReLU

ROWS = 2048
"""Rows of a block, which stay in the cache."""


def loops(like: Tensor, module: str = "ctrkit.models.pair_loops") -> ModuleType | None:
    """Return a module of compiled loops; None without Numba, or where a tensor `like` this is nothing for them."""
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return None
    return None if torch.compiler.is_compiling() else numba_loops.load(module)


class CompiledPReLU:
    """max(x, 0) + a·min(x, 0)."""

    n_sums = 2
    waits = False

    def __init__(self, run: ModuleType, module: "PReLU") -> None:
        self.run, self.a_H = run, module.weight.detach().numpy()

    def forward(self, h_CH: Tensor, bias_H: Any, y_CH: Tensor) -> None:
        self.run.prelu(h_CH.numpy(), bias_H, self.a_H, y_CH.numpy())

    def backward(self, h_CH: Tensor, bias_H: Any, dy_CH: Tensor, y_CH: Tensor, sums: Any) -> None:
        """Compute y again, make dx of dy, and add to `sums` [n_sums, H]: first Σ dx, then the slope's gradient."""
        self.run.prelu_back(h_CH.numpy(), bias_H, self.a_H, dy_CH.numpy(), y_CH.numpy(), sums)


class CompiledSigmoid:
    n_sums = 1
    waits = False

    def __init__(self, run: ModuleType) -> None:
        self.run = run

    def forward(self, h_CH: Tensor, bias_H: Any, y_CH: Tensor) -> None:
        self.run.logistic(h_CH.numpy(), bias_H, y_CH.numpy())

    def backward(self, h_CH: Tensor, bias_H: Any, dy_CH: Tensor, y_CH: Tensor, sums: Any) -> None:
        self.run.logistic_back(h_CH.numpy(), bias_H, dy_CH.numpy(), y_CH.numpy(), sums)


class CompiledDice:
    """Dice; see `ctrkit.models.pair_blocks.BlockDice`. In training it `waits` for the statistics of all pairs."""

    n_sums = 4

    def __init__(self, run: ModuleType, module: "Dice", bias_H: Any, n_pairs: int) -> None:
        self.run, self.module, self.bias_H, self.n_pairs = run, module, bias_H, n_pairs
        self.a_H = module.a_H.detach().numpy()
        self.waits = module.training and n_pairs > 0
        if not self.waits:
            mean_H, var_H = (x.detach().numpy() for x in module.running())
            self.know(mean_H - bias_H, var_H)

    def know(self, mean_H: Any, var_H: Any) -> None:
        """Take the mean of h, without bias, and the variance."""
        self.mean_H, self.deviation_H = mean_H, np.sqrt(var_H)
        self.r_H = 1 / (self.deviation_H + self.module.eps)

    def observe(self, mean_H: Any, var_H: Any) -> None:
        """Take the batch's statistics of h, also into the running averages."""
        self.module.observe(torch.from_numpy(mean_H + self.bias_H), torch.from_numpy(var_H))
        self.know(mean_H, var_H)

    def forward(self, h_CH: Tensor, bias_H: Any, y_CH: Tensor) -> None:
        self.run.dice(h_CH.numpy(), bias_H, self.a_H, self.mean_H, self.r_H, y_CH.numpy())

    def backward(self, h_CH: Tensor, bias_H: Any, dy_CH: Tensor, y_CH: Tensor, sums: Any) -> None:
        arrays = h_CH.numpy(), bias_H, self.a_H, self.mean_H, self.r_H, dy_CH.numpy(), y_CH.numpy()
        self.run.dice_back(*arrays, sums)

    def settle(self, sums: Any) -> None:
        """Take the sums over all pairs."""
        safe_H = np.where(self.deviation_H > 0, self.deviation_H, np.inf)
        self.factor_H = (-sums[3] * self.r_H / (self.n_pairs * safe_H)).astype(sums.dtype)
        self.constant_H = -sums[2] * self.r_H / self.n_pairs

    def finish(self, h_CH: Tensor, dx_CH: Tensor) -> None:
        """Add to dx what reaches it through mean and variance."""
        self.run.dice_finish(h_CH.numpy(), self.mean_H, self.constant_H, self.factor_H, dx_CH.numpy())


class PReLURows(torch.autograd.Function):
    """PReLU on [rows, H]."""

    @staticmethod
    def forward(ctx: Any, h_RH: Tensor, a_H: Tensor, module: "PReLU", run: ModuleType) -> Tensor:
        h_RH = h_RH.contiguous()
        y_RH, bias_H = torch.empty_like(h_RH), np.zeros_like(a_H.detach().numpy())
        CompiledPReLU(run, module).forward(h_RH.detach(), bias_H, y_RH)
        ctx.save_for_backward(h_RH, a_H)
        ctx.run, ctx.module = run, module
        return y_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h_RH, _ = ctx.saved_tensors
        act = CompiledPReLU(ctx.run, ctx.module)
        dx_RH, sums = _back(act, h_RH, dy_RH)
        return dx_RH, torch.from_numpy(sums[1]), None, None


class DiceRows(torch.autograd.Function):
    """Dice on [rows, H] in training, each row once."""

    @staticmethod
    def forward(ctx: Any, h_RH: Tensor, a_H: Tensor, module: "Dice", run: ModuleType) -> Tensor:
        h_RH = h_RH.contiguous()
        zero_H = np.zeros_like(a_H.detach().numpy())
        n_1, mean_H, square_H = np.zeros(1, zero_H.dtype), zero_H.copy(), zero_H.copy()
        for block in _blocks(len(h_RH)):
            run.moments(h_RH.detach()[block].numpy(), n_1, mean_H, square_H)
        act = CompiledDice(run, module, zero_H, len(h_RH))
        act.observe(mean_H, square_H / n_1[0])
        y_RH = torch.empty_like(h_RH)
        act.forward(h_RH.detach(), zero_H, y_RH)
        ctx.save_for_backward(h_RH, a_H)
        ctx.act = act
        return y_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h_RH, _ = ctx.saved_tensors
        dx_RH, sums = _back(ctx.act, h_RH, dy_RH)
        ctx.act.settle(sums)
        ctx.act.finish(h_RH, dx_RH)
        return dx_RH, torch.from_numpy(sums[1]), None, None


def _back(act: CompiledPReLU | CompiledDice, h_RH: Tensor, dy_RH: Tensor) -> tuple[Tensor, Any]:
    """Return dx [rows, H], and the sums over all rows [n_sums, H]."""
    dx_RH = dy_RH.clone(memory_format=torch.contiguous_format)
    y_CH = torch.empty(min(ROWS, len(h_RH)), h_RH.shape[1], dtype=h_RH.dtype)
    zero_H = np.zeros_like(act.a_H)
    sums = np.zeros((act.n_sums, len(zero_H)), zero_H.dtype)
    for block in _blocks(len(h_RH)):
        dx_CH = dx_RH[block]
        act.backward(h_RH[block], zero_H, dx_CH, y_CH[: len(dx_CH)], sums)
    return dx_RH, sums


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


class GatherRows(torch.autograd.Function):
    """Rows of a matrix, whose gradient is added up by a compiled loop."""

    @staticmethod
    def forward(ctx: Any, x_UD: Tensor, index_n: Tensor, run: ModuleType) -> Tensor:
        ctx.save_for_backward(index_n)
        ctx.shape, ctx.run = x_UD.shape, run
        return x_UD.index_select(0, index_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_nD: Tensor) -> tuple[Tensor, None, None]:
        (index_n,) = ctx.saved_tensors
        dx_UD = dout_nD.new_zeros(ctx.shape)
        ctx.run.add_rows(dout_nD.contiguous().numpy(), index_n.contiguous().numpy(), dx_UD.numpy())
        return dx_UD, None, None
