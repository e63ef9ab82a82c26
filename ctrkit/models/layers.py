"""Layers that the models share. Shape letters as in `ctrkit.batches`; H is a hidden width."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrkit.models import threads
from ctrkit.models.compiled_layers import DiceRows, GatherRows, PReLURows, loops
from ctrkit.models.statistics import Group, moments, normalised
from ctrkit.models.tower_threads import Users, tower, tower_loops


class Dice(nn.Module):
    """DIN's data-dependent activation (eqs. 4, 5): y·(p + a·(1 − p)), p = sigmoid((y − E[y]) / (√Var[y] + ε)).

    a is learned per channel, E and Var are the batch's in training and running averages in evaluation:
    m ← 0.99·m + 0.01·batch with bias correction, since eqs. 6 and 7 as printed grow without bound.
    ε, open in the paper, bounds the gradient of channels that are constant over a batch (or have one row).
    Input and output [rows, H]; rows are real rows, never padding. `count` [rows] says how often each row counts
    where equal rows are given once; without it each counts once. With a `group` the statistics are those of the rows
    of all its ranks.
    """

    group: Group = None

    mean_H: Tensor
    var_H: Tensor
    seen: Tensor

    def __init__(self, width: int, momentum: float = 0.01, eps: float = 1e-4) -> None:
        super().__init__()
        self.a_H = nn.Parameter(torch.zeros(width))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean_H", torch.zeros(width))
        self.register_buffer("var_H", torch.zeros(width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, mean_H: Tensor, var_H: Tensor) -> None:
        """Take a batch's statistics into the running averages."""
        self.mean_H.lerp_(mean_H.to(self.mean_H.dtype), self.momentum)
        self.var_H.lerp_(var_H.to(self.var_H.dtype), self.momentum)
        self.seen += 1

    def of_all_ranks(self, n: Tensor, mean_H: Tensor, var_H: Tensor) -> tuple[Tensor, Tensor]:
        """Return (E, Var) of a batch of which all ranks have n [] rows, and observe them; the running averages where
        there is no row. Does not wait for the device."""
        before = self.mean_H.clone(), self.var_H.clone(), self.seen.clone()
        running = self.running()
        self.observe(mean_H.detach(), var_H.detach())
        there = n > 0
        with torch.no_grad():
            for now, then in zip((self.mean_H, self.var_H, self.seen), before, strict=True):
                now.copy_(torch.where(there, now, then))
        return torch.where(there, mean_H, running[0]), torch.where(there, var_H, running[1])

    def running(self) -> tuple[Tensor, Tensor]:
        """Return (E, Var), the bias-corrected averages."""
        correction = (1.0 - (1.0 - self.momentum) ** self.seen).clamp(min=self.momentum).to(self.mean_H.dtype)
        return self.mean_H / correction, self.var_H / correction

    def forward(self, y: Tensor, count: Tensor | None = None) -> Tensor:
        y = _wide(y)
        if self.training and self.group is not None:
            return self._activated(y, *self.of_all_ranks(*moments(y, count, self.group)))
        run = loops(y) if y.dtype == self.a_H.dtype and y.ndim == 2 and count is None else None
        if run is not None and self.training and len(y):
            out: Tensor = DiceRows.apply(y, self.a_H, self, run)
            return out
        if self.training and len(y):
            if count is None:
                mean_H, var_H = y.mean(0), y.var(0, unbiased=False)
            else:
                count = count.to(torch.promote_types(y.dtype, torch.float32))
                share_R1 = (count / count.sum()).unsqueeze(1)
                mean_H = (share_R1 * y).sum(0)
                var_H = (share_R1 * (y - mean_H) ** 2).sum(0)
            self.observe(mean_H.detach(), var_H.detach())
        else:
            mean_H, var_H = self.running()
        return self._activated(y, mean_H, var_H)

    def _activated(self, y: Tensor, mean_H: Tensor, var_H: Tensor) -> Tensor:
        # √ has no slope at 0: a constant channel passes no gradient through its deviation.
        deviation_H = torch.where(var_H > 0, var_H, 1.0).sqrt() * (var_H > 0)
        p = torch.sigmoid((y - mean_H) / (deviation_H + self.eps))
        return y * (p + self.a_H * (1.0 - p))


class PReLU(nn.PReLU):
    """DIN eq. 3, a slope per channel, starting at 0.25."""

    def __init__(self, width: int) -> None:
        super().__init__(width)

    def forward(self, input: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or input.device.type != "cpu" or input.dtype != self.weight.dtype
        if plain or input.ndim != 2:
            return super().forward(input)
        run = loops(input)
        out: Tensor = (
            _PReLU.apply(input, self.weight) if run is None else PReLURows.apply(input, self.weight, self, run)
        )
        return out


class _PReLU(torch.autograd.Function):
    """PReLU on [rows, H], whose gradient goes through no mask: on a CPU that takes a tenth of torch's own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a_H: Tensor) -> Tensor:
        ctx.save_for_backward(y, a_H)
        return nn.functional.prelu(y, a_H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        y, a_H = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(dout, y, 0)
        return torch.lerp(positive, dout, a_H), ((dout - positive) * y).sum(0)


SHARED = 1 << 23
"""Multiply-adds of a layer from which on it is shared out."""


class Linear(nn.Linear):
    """A fully connected layer whose products our threads share out where they do (`ctrkit.models.threads.own`)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [rows, I] · weightᵀ [I, O] + bias."""
    plain = torch.compiler.is_compiling() or not threads.owned() or x.dtype != weight.dtype
    if plain or x.ndim != 2 or torch.is_autocast_enabled("cpu") or x.shape[0] * weight.numel() < SHARED:
        return nn.functional.linear(x, weight, bias)
    out: Tensor = _SharedLinear.apply(x, weight, bias)
    return out


class _SharedLinear(torch.autograd.Function):
    """Rows of the output and of the input's gradient, and columns of the weight's, a share each for every thread."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        with torch.inference_mode(False):  # the threads, which write into it, are in none
            out_RO = torch.empty(len(x_RI), len(weight_OI), dtype=x_RI.dtype)
        n = threads.count()

        def part(i: int) -> None:
            rows = _share(len(x_RI), i, n)
            if bias_O is None:
                torch.mm(x_RI[rows], weight_OI.t(), out=out_RO[rows])
            else:
                torch.addmm(bias_O, x_RI[rows], weight_OI.t(), out=out_RO[rows])

        threads.side_by_side(part, n)
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RO: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x_RI, weight_OI = ctx.saved_tensors
        dx_RI = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        dweight_OI, n = torch.empty_like(weight_OI), threads.count()

        def part(i: int) -> None:
            rows, columns = _share(len(x_RI), i, n), _share(x_RI.shape[1], i, n)
            if dx_RI is not None:
                torch.mm(dout_RO[rows], weight_OI, out=dx_RI[rows])
            torch.mm(dout_RO.t(), x_RI[:, columns], out=dweight_OI[:, columns])

        threads.side_by_side(part, n)
        return dx_RI, dweight_OI, dout_RO.sum(0) if ctx.needs_input_grad[2] else None


def _share(size: int, i: int, n: int) -> slice:
    """Return what of `size` things the thread i of n does."""
    return slice(size * i // n, size * (i + 1) // n)


def activation(name: str, width: int) -> nn.Module:
    """Return a PReLU, Dice or sigmoid for `width` channels."""
    if name == "sigmoid":
        return nn.Sigmoid()
    return Dice(width) if name == "dice" else PReLU(width)


class MLP(nn.Sequential):
    """Layers one after the other; `count` [rows] goes to those that count rows, as in `Dice`."""

    def forward(self, x: Tensor, count: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, count) if isinstance(layer, Dice) else layer(x)
        return x


def mlp(widths: Sequence[int], act: str) -> MLP:
    """Return fully connected layers of these widths, an activation between them and none after the last."""
    layers: list[nn.Module] = []
    for i in range(1, len(widths)):
        layers.append(Linear(widths[i - 1], widths[i]))
        if i < len(widths) - 1:
            layers.append(activation(act, widths[i]))
    return MLP(*layers)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of [rows, width]; over the rows of all ranks of `group`, where there is one. A batch of one row, which
    has no variance, is normalised by the running statistics."""

    group: Group = None

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.group is not None:
            return self._over_ranks(_wide(input))
        if len(input) == 1:
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)
        return super().forward(input)

    @torch.no_grad()
    def observe(self, mean_H: Tensor, unbiased_H: Tensor) -> None:
        """Take a batch's mean and variance into the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean_H, self.momentum or 0.0)
        self.running_var.lerp_(unbiased_H, self.momentum or 0.0)
        self.num_batches_tracked += 1

    def _over_ranks(self, x_RH: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        running = self.running_mean, self.running_var
        out, n, mean_H, var_H = normalised(x_RH, self.weight, self.bias, self.eps, running, self.group)
        several = n > 1
        unbiased_H = torch.where(several, var_H * (n / (n - 1).clamp(min=1)), var_H)
        self.running_mean.lerp_(mean_H, self.momentum or 0.0)
        self.running_var.lerp_(unbiased_H, self.momentum or 0.0)
        self.num_batches_tracked += several
        return out


class Discriminator(nn.Module):
    """Concatenated middle vectors → BatchNorm → fully connected layers → two outputs (DICM section IV).

    Returns log-odds [S]: the difference of the two outputs, whose sigmoid is the softmax's click probability.
    """

    def __init__(self, width: int, hidden: Sequence[int], act: str, batch_norm: bool) -> None:
        super().__init__()
        self.norm = BatchNorm(width) if batch_norm else nn.Identity()
        self.layers = mlp([width, *hidden, 2], act)

    def forward(self, x_SD: Tensor, users: Users | None = None) -> Tensor:
        """users: the first columns of the input, once a group, and the group of each sample; x has the others."""
        run = self._loops(x_SD)
        if users is not None and (run is None or not run.tiles.fits(users[0].shape[1], x_SD.shape[1])):
            x_SD, users = torch.cat([gather_rows(*users), x_SD], 1), None
        if run is not None:
            norm = self.norm if isinstance(self.norm, BatchNorm) else None
            return tower(run, users, x_SD, norm, self._linear, self._slopes)
        out_S2: Tensor = self.layers(self.norm(x_SD))
        return out_S2[:, 1] - out_S2[:, 0]

    @property
    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @property
    def _slopes(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers if isinstance(layer, PReLU)]

    def _loops(self, x_SD: Tensor) -> ModuleType | None:
        """Return the loops that do all of it, in training; None where they do not."""
        alike = len(self._slopes) == len(self._linear) - 1
        over_ranks = isinstance(self.norm, BatchNorm) and self.norm.group is not None
        if not self.training or over_ranks or not alike or torch.compiler.is_compiling():
            return None
        return tower_loops(x_SD, self._linear, self._slopes)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of x [rows, D] that `index` [n] names."""
    run = loops(x, "ctrkit.compiled_rows")
    out: Tensor = x.index_select(0, index) if run is None else GatherRows.apply(x, index, run)
    return out


def _wide(x: Tensor) -> Tensor:
    """Return x in 32 bits or more: sums over many rows need them, where autocast gives 16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def segment_sum(values: Tensor, segment: Tensor, n: int) -> Tensor:
    """Return [n, …]: the sum of the rows of `values` in each segment; zero where there are none."""
    values = _wide(values)
    return values.new_zeros((n, *values.shape[1:])).index_add_(0, segment, values)


def segment_max(values: Tensor, segment: Tensor, n: int) -> Tensor:
    """Return [n, D]: the maximum of the rows of `values` in each segment; zero where there are none."""
    index = segment.unsqueeze(1).expand_as(values)
    out = values.new_zeros((n, values.shape[1]))
    return out.scatter_reduce(0, index, values, "amax", include_self=False)


def segment_softmax(logits_P: Tensor, segment_P: Tensor, n: int) -> Tensor:
    """Return [P]: a softmax over the rows of each segment."""
    logits_P = _wide(logits_P)
    top_n = logits_P.detach().new_full((n,), -torch.inf).scatter_reduce(0, segment_P, logits_P.detach(), "amax")
    e_P = torch.exp(logits_P - top_n.index_select(0, segment_P))
    return e_P / segment_sum(e_P, segment_P, n).index_select(0, segment_P)
