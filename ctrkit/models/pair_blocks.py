"""`ctrkit.models.pairs.attend` in blocks of pairs that stay in the cache, forward and back.

A batch of 3,000 samples has 100,000 pairs, a hidden layer of 80 on each is 32 MB, and what the plain form costs is not
its arithmetic but the passes over such matrices. Here each block of pairs goes through all layers while it is in the
cache, and of a layer only what goes into its activation is kept for the way back. Same mathematics, in another order of
summation.

Shape letters as in `ctrkit.batches`; H is a hidden width, E the width of what is summed, C the pairs of a block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrkit.models.layers import Dice, PReLU, segment_softmax, segment_sum
from ctrkit.models.statistics import merged, summed

aten = torch.ops.aten
BLOCK = {"cpu": 8192, "cuda": 1 << 20}
"""Pairs of a block. On a CPU smaller ones lose more to the calls than they win in the cache, larger ones leave it."""


class Room:
    """Buffers that are used again for every block, so that they stay in the cache."""

    def __init__(self, like: Tensor, rows: int) -> None:
        self.like, self.rows = like, rows
        self.buffers: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, rows: int, width: int) -> Tensor:
        """Return [rows, width] of any content; the same memory for the same name."""
        buffer = self.buffers.get((name, width))
        if buffer is None:
            buffer = self.buffers[name, width] = self.like.new_empty(self.rows, width)
        return buffer if rows == self.rows else buffer[:rows]


class BlockPReLU:
    """max(h, 0) + a·min(h, 0), and its gradients."""

    n_sums = 1

    def __init__(self, module: PReLU) -> None:
        self.a_H = module.weight.detach()
        self.less_H = self.a_H - 1.0

    def forward(self, h_CH: Tensor, room: Room) -> Tensor:
        """Return the activation; `backward` finds in the room what came of it."""
        negative_CH = torch.clamp(h_CH, max=0, out=room("negative", *h_CH.shape))
        return torch.addcmul(h_CH, negative_CH, self.less_H, out=room("y", *h_CH.shape))

    def backward(self, h_CH: Tensor, dy_CH: Tensor, room: Room, sums: Tensor) -> Tensor:
        """Return dh, and add to `sums` [n_sums, H] what concerns all pairs: first the slope's gradient. Spoils dy."""
        positive_CH, dh_CH = room("y", *h_CH.shape), room("dh", *h_CH.shape)
        aten.threshold_backward.grad_input(dy_CH, h_CH, 0, grad_input=positive_CH)
        torch.lerp(positive_CH, dy_CH, self.a_H, out=dh_CH)
        sums[0] += dy_CH.mul_(room("negative", *h_CH.shape)).sum(0)
        return dh_CH


class BlockSigmoid:
    n_sums = 0

    def forward(self, h_CH: Tensor, room: Room) -> Tensor:
        return torch.sigmoid(h_CH, out=room("y", *h_CH.shape))

    def backward(self, h_CH: Tensor, dy_CH: Tensor, room: Room, sums: Tensor) -> Tensor:
        dh_CH = room("dh", *h_CH.shape)
        aten.sigmoid_backward.grad_input(dy_CH, room("y", *h_CH.shape), grad_input=dh_CH)
        return dh_CH


class BlockDice:
    """DIN's Dice with given statistics: y = h·(a + (1 − a)·p), p = sigmoid(z), z = (h − E)/(√Var + ε).

    Where E and Var are the batch's, dh has two more terms, one the same for all pairs and one in proportion to h − E.
    `finish` adds them, when `backward` has seen all pairs and `settle` has their sums.
    """

    n_sums = 3

    def __init__(self, module: Dice, mean_H: Tensor, var_H: Tensor, n_pairs: int | Tensor) -> None:
        self.a_H, self.mean_H, self.n_pairs = module.a_H.detach(), mean_H, n_pairs
        self.deviation_H = torch.where(var_H > 0, var_H, 1.0).sqrt() * (var_H > 0)
        self.r_H = 1.0 / (self.deviation_H + module.eps)
        self.shift_H, self.rest_H = -mean_H * self.r_H, 1.0 - self.a_H

    def forward(self, h_CH: Tensor, room: Room) -> Tensor:
        z_CH = torch.addcmul(self.shift_H, h_CH, self.r_H, out=room("z", *h_CH.shape))
        p_CH = torch.sigmoid(z_CH, out=room("p", *h_CH.shape))
        slope_CH = torch.addcmul(self.a_H, p_CH, self.rest_H, out=room("slope", *h_CH.shape))
        return torch.mul(slope_CH, h_CH, out=room("y", *h_CH.shape))

    def backward(self, h_CH: Tensor, dy_CH: Tensor, room: Room, sums: Tensor) -> Tensor:
        z_CH, p_CH, slope_CH = (room(name, *h_CH.shape) for name in ("z", "p", "slope"))
        dh_CH = torch.mul(slope_CH, dy_CH, out=room("dh", *h_CH.shape))
        dyh_CH, dz_CH = dy_CH.mul_(h_CH), slope_CH
        aten.sigmoid_backward.grad_input(dyh_CH, p_CH, grad_input=dz_CH)
        dh_CH.addcmul_(dz_CH.mul_(self.rest_H), self.r_H)
        sums[0] += dyh_CH.addcmul_(dyh_CH, p_CH, value=-1.0).sum(0)
        sums[1] += dz_CH.sum(0)
        sums[2] += dz_CH.mul_(z_CH).sum(0)
        return dh_CH

    def settle(self, sums: Tensor) -> None:
        """Take the sums over all pairs: Σ dz and Σ dz·z."""
        # dE = −Σ dz·r, d√Var = −Σ dz·z·r; E = Σ h/P, √Var = √(Σ (h − E)²/P), whose slope is (h − E)/(P·√Var).
        safe_H = torch.where(self.deviation_H > 0, self.deviation_H, torch.inf)
        self.factor_H = -sums[2] * self.r_H / (self.n_pairs * safe_H)
        self.constant_H = -sums[1] * self.r_H / self.n_pairs - self.mean_H * self.factor_H

    def finish(self, h_CH: Tensor, dh_CH: Tensor, room: Room) -> Tensor:
        """Return dh with the gradient that reaches the pairs through E and Var."""
        return torch.addcmul(self.constant_H, h_CH, self.factor_H, out=room("dh", *h_CH.shape)).add_(dh_CH)


class Moments:
    """Mean and variance of rows that come a block at a time (the pairwise update of Chan, Golub and LeVeque)."""

    n = 0
    mean_H: Tensor
    square_H: Tensor

    def add(self, h_CH: Tensor, room: Room) -> None:
        mean_H = h_CH.mean(0)
        self.merge(len(h_CH), mean_H, torch.sub(h_CH, mean_H, out=room("t", *h_CH.shape)).square_().sum(0))

    def merge(self, n: int, mean_H: Tensor, square_H: Tensor) -> None:
        """Take in n rows of this mean and this sum of squared distances from it."""
        if self.n == 0:
            self.n, self.mean_H, self.square_H = n, mean_H, square_H
            return
        delta_H, total = mean_H - self.mean_H, self.n + n
        self.mean_H = self.mean_H + delta_H * (n / total)
        self.square_H = self.square_H + square_H + delta_H.square() * (self.n * n / total)
        self.n = total


class Pairs:
    """The pairs of a batch on their way through a `PairMLP`, forward and back, without autograd.

    Layer 0 is the split one; layer i > 0 has `matrices[i]` and `biases[i]`; layer `depth` makes the logits. Behind
    every other layer stands an activation. Where that is a Dice in training, all pairs must have reached it before any
    goes on: so a sweep goes over all blocks, from the layer after one such to the next such, or to the logits.
    """

    def __init__(
        self, modules: Sequence[nn.Module], sample_P: Tensor, behaviour_P: Tensor, softmax: bool, scale: float
    ) -> None:
        self.modules, self.sample_P, self.behaviour_P = modules, sample_P, behaviour_P
        self.softmax, self.scale = softmax, scale
        self.depth, self.n_pairs = len(modules), len(sample_P)
        self.acts: dict[int, Any] = {}
        waits = []
        for layer, module in enumerate(modules):
            if isinstance(module, Dice) and module.training and (self.n_pairs or module.group is not None):
                waits.append(layer)
            elif isinstance(module, Dice):
                self.acts[layer] = BlockDice(module, *module.running(), self.n_pairs)
            else:
                self.acts[layer] = BlockPReLU(module) if isinstance(module, PReLU) else BlockSigmoid()
        self.sweeps = list(zip([0, *[layer + 1 for layer in waits]], [*waits, self.depth], strict=True))
        self.into: list[Tensor] = []

    def take(self, tensors: Sequence[Any]) -> None:
        """Take the tensors of `Attend.forward`."""
        self.h_SH, self.h_BH, self.q_SD, self.k_BD, self.product_HD, self.v_BE, *rest = tensors
        weights = rest[self.depth :]
        self.matrices, self.biases = [None, *weights[0::2]], [None, *weights[1::2]]
        self.widths = [self.h_SH.shape[1], *(len(b_H) for b_H in self.biases[1:])]
        self.rows = BLOCK["cuda" if self.h_SH.is_cuda else "cpu"]
        self.room = Room(self.h_SH, min(self.rows, self.n_pairs))
        self.sums: dict[str, Tensor] = {}

    def drop(self) -> None:
        """Let go of what `take` took."""
        del self.h_SH, self.h_BH, self.q_SD, self.k_BD, self.product_HD, self.v_BE, self.matrices, self.biases
        del self.room, self.sums

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (pairs, their samples, their behaviours)."""
        for start in range(0, self.n_pairs, self.rows):
            pairs = slice(start, min(start + self.rows, self.n_pairs))
            yield pairs, self.sample_P[pairs], self.behaviour_P[pairs]

    def sum(self, name: str, *shape: int) -> Tensor:
        """Return a sum over all blocks; zeros at first."""
        if name not in self.sums:
            self.sums[name] = self.h_SH.new_zeros(shape)
        return self.sums[name]

    def gather(self, sample_C: Tensor, behaviour_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([C, D], [C, D]): q and k of a block."""
        shape = (len(sample_C), self.q_SD.shape[1])
        q_CD = torch.index_select(self.q_SD, 0, sample_C, out=self.room("q", *shape))
        return q_CD, torch.index_select(self.k_BD, 0, behaviour_C, out=self.room("k", *shape))

    def enter(self, sample_C: Tensor, behaviour_C: Tensor, out_CH: Tensor) -> None:
        """Compute layer 0."""
        torch.index_select(self.h_SH, 0, sample_C, out=out_CH)
        out_CH += torch.index_select(self.h_BH, 0, behaviour_C, out=self.room("y", *out_CH.shape))
        if self.product_HD is not None:
            q_CD, k_CD = self.gather(sample_C, behaviour_C)
            out_CH.addmm_(q_CD.mul_(k_CD), self.product_HD.t())

    def leave(self, sample_C: Tensor, behaviour_C: Tensor, dh_CH: Tensor) -> None:
        """Add a block's gradients of layer 0."""
        self.sum("h_S", *self.h_SH.shape).index_add_(0, sample_C, dh_CH)
        self.sum("h_B", *self.h_BH.shape).index_add_(0, behaviour_C, dh_CH)
        if self.product_HD is not None:
            q_CD, k_CD = self.gather(sample_C, behaviour_C)
            product_CD = torch.mul(q_CD, k_CD, out=self.room("qk", *q_CD.shape))
            self.sum("product", *self.product_HD.shape).addmm_(dh_CH.t(), product_CD)
            dproduct_CD = torch.mm(dh_CH, self.product_HD, out=product_CD)
            self.sum("q", *self.q_SD.shape).index_add_(0, sample_C, k_CD.mul_(dproduct_CD))
            self.sum("k", *self.k_BD.shape).index_add_(0, behaviour_C, q_CD.mul_(dproduct_CD))

    def logits(self, keep: bool) -> Tensor:
        """Return [P], the network's outputs; leave in `into` what goes into each activation, where kept or needed."""
        if keep or len(self.sweeps) > 1:
            self.into = [self.h_SH.new_empty(self.n_pairs, width) for width in self.widths[:-1]]
        logit_P1: Tensor = self.h_SH.new_empty(self.n_pairs, 1)
        for begin, end in self.sweeps:
            moments = self.sweep(begin, end, logit_P1)
            if end < self.depth:
                module = self.modules[end]
                assert isinstance(module, Dice)
                self.acts[end] = self.dice(module, moments, self.widths[end])
        logit_P: Tensor = logit_P1.squeeze(1)
        return logit_P

    def dice(self, module: Dice, moments: Moments, width: int) -> BlockDice:
        """Return a Dice with the moments of all pairs, which it observes; those of all ranks, where it has a group."""
        if module.group is None:
            mean_H, var_H = moments.mean_H, moments.square_H / moments.n
            module.observe(mean_H, var_H)
            return BlockDice(module, mean_H, var_H, self.n_pairs)
        none_H = self.h_SH.new_zeros(width)
        mean_H, square_H = (moments.mean_H, moments.square_H) if self.n_pairs else (none_H, none_H)
        n, mean_H, var_H = merged(self.h_SH.new_tensor(self.n_pairs), mean_H, square_H, module.group)
        return BlockDice(module, *module.of_all_ranks(n, mean_H, var_H), n.clamp(min=1))

    def sweep(self, begin: int, end: int, logit_P1: Tensor) -> Moments:
        """Compute layers begin to end; return the moments of layer end, unless it is that of the logits."""
        room, moments = self.room, Moments()
        for pairs, sample_C, behaviour_C in self.blocks():
            y_CH = self.acts[begin - 1].forward(self.into[begin - 1][pairs], room) if begin else None
            for layer in range(begin, end + 1):
                if layer == self.depth:
                    h_CH = logit_P1[pairs]
                elif self.into:
                    h_CH = self.into[layer][pairs]
                else:
                    h_CH = room("h", len(sample_C), self.widths[layer])
                if y_CH is None:
                    self.enter(sample_C, behaviour_C, h_CH)
                else:
                    torch.addmm(self.biases[layer], y_CH, self.matrices[layer].t(), out=h_CH)
                if layer < end:
                    y_CH = self.acts[layer].forward(h_CH, room)
                elif layer < self.depth:
                    moments.add(h_CH, room)
        return moments

    def forward(self, keep: bool) -> tuple[Tensor, Tensor]:
        """Return ([S, E], [P]): Σ w·v over the pairs of each sample, and w; `keep` what the way back needs."""
        w_P = self.logits(keep).mul_(self.scale)
        if self.softmax:
            w_P = segment_softmax(w_P, self.sample_P, len(self.h_SH))
        return self.weigh(w_P), w_P

    def backward(self, w_P: Tensor, dout_SE: Tensor) -> list[Tensor | None]:
        """Return the gradients of what `take` took, from those of the sum."""
        dw_P, dv_BE = self.weigh_back(w_P, dout_SE)
        if self.softmax:
            mean_S = segment_sum(dw_P * w_P, self.sample_P, len(dout_SE))
            dw_P = dw_P.sub_(mean_S.index_select(0, self.sample_P)).mul_(w_P)
        dlogit_P = dw_P.mul_(self.scale)
        waiting = {begin - 1: torch.empty_like(self.into[begin - 1]) for begin, _ in self.sweeps if begin}
        for begin, end in reversed(self.sweeps):
            self.sweep_back(begin, end, dlogit_P, waiting)
            if begin:
                sums, group = self.sum(f"act {begin - 1}", 3, self.widths[begin - 1]), self.modules[begin - 1].group
                self.acts[begin - 1].settle(sums if group is None else summed(sums, group))
        out: list[Tensor | None] = [self.sum("h_S", *self.h_SH.shape), self.sum("h_B", *self.h_BH.shape)]
        for name, x in (("q", self.q_SD), ("k", self.k_BD), ("product", self.product_HD)):
            out.append(None if x is None else self.sum(name, *x.shape))
        out.append(dv_BE)
        for layer in range(self.depth):
            n = self.acts[layer].n_sums
            out.append(self.sum(f"act {layer}", n, self.widths[layer])[0] if n else None)
        for layer in range(1, self.depth + 1):
            out += [self.sum(f"matrix {layer}", *self.matrices[layer].shape)]
            out += [self.sum(f"bias {layer}", *self.biases[layer].shape)]
        return out

    def sweep_back(self, begin: int, end: int, dlogit_P: Tensor, waiting: dict[int, Tensor]) -> None:
        """Go from layer end back to begin.

        `waiting`: layer of a Dice → [P, H], the gradient that it passes on, but for what goes through its statistics.
        """
        room = self.room
        for pairs, sample_C, behaviour_C in self.blocks():
            if end == self.depth:
                dh_CH = dlogit_P[pairs].unsqueeze(1)
            else:
                dh_CH = self.acts[end].finish(self.into[end][pairs], waiting[end][pairs], room)
            for layer in range(end, max(begin, 1) - 1, -1):
                act, matrix, h_CH = self.acts[layer - 1], self.matrices[layer], self.into[layer - 1][pairs]
                y_CH = act.forward(h_CH, room)
                self.sum(f"matrix {layer}", *matrix.shape).addmm_(dh_CH.t(), y_CH)
                self.sum(f"bias {layer}", len(matrix)).add_(dh_CH.sum(0))
                dy_CH = torch.mm(dh_CH, matrix, out=room("dy", *h_CH.shape))
                dh_CH = act.backward(h_CH, dy_CH, room, self.sum(f"act {layer - 1}", act.n_sums, h_CH.shape[1]))
            if begin:
                waiting[begin - 1][pairs] = dh_CH
            else:
                self.leave(sample_C, behaviour_C, dh_CH)

    def weigh(self, w_P: Tensor) -> Tensor:
        """Return [S, E]: Σ w·v over the pairs of each sample."""
        n_samples, width = len(self.h_SH), self.v_BE.shape[1]
        for pairs, sample_C, behaviour_C in self.blocks():
            v_CE = self.room("v", len(sample_C), width)
            torch.index_select(self.v_BE, 0, behaviour_C, out=v_CE).mul_(w_P[pairs].unsqueeze(1))
            self.sum("out", n_samples, width).index_add_(0, sample_C, v_CE)
        return self.sum("out", n_samples, width)

    def weigh_back(self, w_P: Tensor, dout_SE: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([P], [B, E]): the gradients of the weights and of v."""
        dw_P = torch.empty_like(w_P)
        for pairs, sample_C, behaviour_C in self.blocks():
            shape = (len(sample_C), self.v_BE.shape[1])
            dout_CE = torch.index_select(dout_SE, 0, sample_C, out=self.room("dv", *shape))
            v_CE = torch.index_select(self.v_BE, 0, behaviour_C, out=self.room("v", *shape))
            torch.sum(v_CE.mul_(dout_CE), 1, out=dw_P[pairs])
            self.sum("v", *self.v_BE.shape).index_add_(0, behaviour_C, dout_CE.mul_(w_P[pairs].unsqueeze(1)))
        return dw_P, self.sum("v", *self.v_BE.shape)


class Attend(torch.autograd.Function):
    """`attend` after the projections."""

    @staticmethod
    def forward(ctx: Any, pairs: Any, keep: bool, *tensors: Tensor | None) -> Tensor:
        """Return [S, E].

        `pairs`: a `Pairs`, or what does the same another way. `tensors`: h_SH, h_BH, q_SD, k_BD, product_HD (these
        three or none), v_BE, a slope (or None) a hidden layer, then matrix and bias of each layer after the first.
        """
        pairs.take(tensors)
        out_SE: Tensor
        out_SE, w_P = pairs.forward(keep)
        pairs.drop()
        if keep:
            ctx.save_for_backward(*tensors, w_P)
            ctx.pairs = pairs
        return out_SE

    @staticmethod
    def backward(ctx: Any, dout_SE: Tensor) -> Any:
        pairs = ctx.pairs
        *tensors, w_P = ctx.saved_tensors
        pairs.take(tensors)
        found = pairs.backward(w_P, dout_SE)
        pairs.drop()
        return (None, None, *found)
