"""`ctrkit.models.pair_blocks` with compiled loops between the products, a thread of ours a core. CPU only.

The threads share out the pairs so that no sample and no behaviour is in two of them; each takes its pairs through the
layers in blocks, with buffers of its own. What all pairs add to (the parameters' gradients, Dice's statistics) is added
up thread by thread, always in the same order, so the same number of threads gives the same bits.

Shape letters as in `ctrkit.models.pair_blocks`; T the pairs of a thread.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrkit.models import threads
from ctrkit.models.compiled_layers import ROWS, CompiledDice, CompiledPReLU, CompiledSigmoid
from ctrkit.models.layers import Dice, PReLU
from ctrkit.models.pair_blocks import Moments, Room

_own = threading.local()
"""`rooms`: dtype and rows → the buffers of this thread."""


class Part:
    """A thread's pairs, and what they add up to."""

    room: Room
    n_1: Any
    mean_H: Any
    square_H: Any

    def __init__(self, sample_T: Any, behaviour_T: Any, place: slice) -> None:
        self.sample_T, self.behaviour_T, self.place = sample_T, behaviour_T, place
        self.into: list[Tensor] = []
        """Layer → [T, H], what goes into its activation, without the bias."""
        self.waiting: dict[int, Tensor] = {}
        """Layer of a Dice → [T, H], the gradient that it passes on."""
        self.logit_T1: Tensor
        self.sums: list[Any] = []
        """Layer → [n_sums, H], what its activation adds up."""
        self.matrices: list[Any] = []
        """The gradients of the matrices, that of the products first."""

    def blocks(self) -> Iterator[tuple[slice, Any, Any]]:
        """Yield (pairs, their samples, their behaviours)."""
        for start in range(0, len(self.sample_T), ROWS):
            block = slice(start, min(start + ROWS, len(self.sample_T)))
            yield block, self.sample_T[block], self.behaviour_T[block]


class CompiledPairs:
    """As `ctrkit.models.pair_blocks.Pairs`."""

    def __init__(
        self,
        run: ModuleType,
        modules: Sequence[nn.Module],
        sample_P: Tensor,
        behaviour_P: Tensor,
        softmax: bool,
        scale: float,
        times_B: Tensor | None = None,
    ) -> None:
        """times_B as in `ctrkit.models.pairs.attend`."""
        self.run, self.modules, self.softmax, self.scale = run, modules, softmax, scale
        self.times_B = times_B
        self.depth, self.n_pairs, self.threads = len(modules), len(sample_P), threads.count()
        sample_p, behaviour_p = sample_P.contiguous().numpy(), behaviour_P.contiguous().numpy()
        self.parts = []
        wanted = np.arange(1, self.threads) * self.n_pairs // self.threads
        begin = 0
        for end in [*run.cuts(sample_p, behaviour_p, wanted).tolist(), self.n_pairs]:
            self.parts.append(Part(sample_p[begin:end], behaviour_p[begin:end], slice(begin, end)))
            begin = end
        self.acts: list[CompiledPReLU | CompiledSigmoid | CompiledDice] = []

    def take(self, tensors: Sequence[Any]) -> None:
        """Take the tensors of `Attend.forward`."""
        own: list[Any] = [None if x is None else x.detach().contiguous() for x in tensors]
        self.h_SH, self.h_BH, self.q_SD, self.k_BD, self.product_HD, self.v_BE, *rest = own
        weights = rest[self.depth :]
        self.matrices = [self.product_HD, *weights[0::2]]
        self.widths = [self.h_SH.shape[1], *(len(b_H) for b_H in weights[1::2])]
        first_H = self.h_SH.new_zeros(self.widths[0])  # the bias of layer 0 is in h_SH
        self.biases = [first_H.numpy(), *(b_H.numpy() for b_H in weights[1::2])]
        dtype = first_H.numpy().dtype
        self.scale_1 = np.array([self.scale], dtype)
        self.times = np.zeros(0, dtype) if self.times_B is None else self.times_B.numpy().astype(dtype)

    def drop(self) -> None:
        """Let go of what `take` took."""
        del self.h_SH, self.h_BH, self.q_SD, self.k_BD, self.product_HD, self.v_BE, self.matrices, self.biases

    def forward(self, keep: bool) -> tuple[Tensor, Tensor]:
        """Return ([S, E], [P]): Σ w·v over the pairs of each sample, and w."""
        self.acts = [self._act(module, bias_H) for module, bias_H in zip(self.modules, self.biases, strict=False)]
        waits = [layer for layer, act in enumerate(self.acts) if act.waits]
        self.sweeps = list(zip([0, *[layer + 1 for layer in waits]], [*waits, self.depth], strict=True))
        w_P, out_SE = self.h_SH.new_empty(self.n_pairs), self.h_SH.new_zeros(len(self.h_SH), self.v_BE.shape[1])
        with torch.inference_mode(False):  # the threads, which write into these, are in none
            for part in self.parts:
                n, inner = len(part.sample_T), self.widths[:-1]
                part.into = [self._new(n, width) for width in inner] if keep or waits else []
                part.logit_T1 = self._new(n, 1)
        for begin, end in self.sweeps:
            threads.side_by_side(functools.partial(self._sweep, begin, end, w_P.numpy(), out_SE.numpy()), self.threads)
            if end < self.depth:
                act, moments = self.acts[end], Moments()
                for part in self.parts:
                    if part.n_1[0]:
                        moments.merge(int(part.n_1[0]), torch.from_numpy(part.mean_H), torch.from_numpy(part.square_H))
                assert isinstance(act, CompiledDice)
                act.observe(moments.mean_H.numpy(), (moments.square_H / moments.n).numpy())
        return out_SE, w_P

    def backward(self, w_P: Tensor, dout_SE: Tensor) -> list[Tensor | None]:
        """Return the gradients of what `take` took."""
        like = (self.h_SH, self.h_BH, self.q_SD, self.k_BD, self.v_BE)
        found = [None if x is None else torch.zeros_like(x) for x in like]
        dtype = self.scale_1.dtype
        for part in self.parts:
            part.sums = [np.zeros((a.n_sums, w), dtype) for a, w in zip(self.acts, self.widths, strict=False)]
            part.matrices = [x if x is None else torch.zeros_like(x) for x in self.matrices]
            layers = [begin - 1 for begin, _ in self.sweeps if begin]
            part.waiting = {layer: torch.empty_like(part.into[layer]) for layer in layers}
        arrays = [None if x is None else x.numpy() for x in found]
        weights, dout = w_P.numpy(), dout_SE.contiguous().numpy()
        for begin, end in reversed(self.sweeps):
            threads.side_by_side(functools.partial(self._sweep_back, begin, end, weights, dout, arrays), self.threads)
            if begin:
                act, sums = self.acts[begin - 1], self._sum([part.sums[begin - 1] for part in self.parts])
                assert isinstance(act, CompiledDice)
                act.settle(sums)
        matrices = [self._sum([part.matrices[i] for part in self.parts]) for i in range(self.depth + 1)]
        sums = [torch.from_numpy(self._sum([part.sums[i] for part in self.parts])) for i in range(self.depth)]
        biases = [self._bias(act, sums_nH) for act, sums_nH in zip(self.acts, sums, strict=True)]
        biases.append(self._sum([part.logit_T1.sum(0) for part in self.parts]))
        dh_S, dh_B, dq, dk, dv = found
        out = [dh_S, dh_B, dq, dk, matrices[0], dv]
        out += [sums_nH[1] if len(sums_nH) > 1 else None for sums_nH in sums]
        for layer in range(1, self.depth + 1):
            out += [matrices[layer], biases[layer]]
        for part in self.parts:
            part.sums, part.matrices, part.waiting = [], [], {}
        return out

    def _act(self, module: nn.Module, bias_H: Any) -> CompiledPReLU | CompiledSigmoid | CompiledDice:
        if isinstance(module, Dice):
            return CompiledDice(self.run, module, bias_H, self.n_pairs)
        return CompiledPReLU(self.run, module) if isinstance(module, PReLU) else CompiledSigmoid(self.run)

    def _bias(self, act: CompiledPReLU | CompiledSigmoid | CompiledDice, sums_nH: Tensor) -> Tensor:
        through = torch.from_numpy(act.constant_H) * self.n_pairs if act.waits else 0.0  # type: ignore[union-attr]
        return sums_nH[0] + through

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.h_SH.dtype)

    @staticmethod
    def _sum(of_parts: Sequence[Any]) -> Any:
        """Add up what the parts have, in their order."""
        return None if of_parts[0] is None else functools.reduce(lambda one, other: one + other, of_parts)

    def _room(self) -> Room:
        """Return this thread's buffers."""
        rooms, key = _own.__dict__.setdefault("rooms", {}), (self.h_SH.dtype, ROWS)
        if key not in rooms:
            rooms[key] = Room(self._new(0), ROWS)
        room: Room = rooms[key]
        return room

    def _sweep(self, begin: int, end: int, w_P: Any, out_SE: Any, number: int) -> None:
        """Compute layers begin to end for one part; then the moments of layer end, or the weights and sums."""
        run, part, room = self.run, self.parts[number], self._room()
        width = self.widths[end]
        part.n_1, part.mean_H, part.square_H = (np.zeros(n, self.scale_1.dtype) for n in (1, width, width))
        h_SH, h_BH = self.h_SH.numpy(), self.h_BH.numpy()
        for block, sample_C, behaviour_C in part.blocks():
            n = len(sample_C)
            y_CH: Any = room("y", n, self.widths[begin - 1]) if begin else None
            if begin:
                self.acts[begin - 1].forward(part.into[begin - 1][block], self.biases[begin - 1], y_CH)
            for layer in range(begin, end + 1):
                if layer == self.depth:
                    bias_1 = torch.from_numpy(self.biases[layer])
                    torch.addmm(bias_1, y_CH, self.matrices[layer].t(), out=part.logit_T1[block])
                    break
                h_CH = part.into[layer][block] if part.into else room("h", n, self.widths[layer])
                if y_CH is not None:
                    torch.mm(y_CH, self.matrices[layer].t(), out=h_CH)
                else:
                    if self.product_HD is not None:
                        torch.mm(self._products(room, sample_C, behaviour_C), self.product_HD.t(), out=h_CH)
                    run.enter(h_SH, h_BH, sample_C, behaviour_C, h_CH.numpy(), self.product_HD is not None)
                if layer < end:
                    y_CH = room("y", n, self.widths[layer])
                    self.acts[layer].forward(h_CH, self.biases[layer], y_CH)
                else:
                    run.moments(h_CH.numpy(), part.n_1, part.mean_H, part.square_H)
        if end == self.depth:
            ids = part.sample_T, part.behaviour_T
            logit_T = part.logit_T1.numpy().reshape(-1)
            w_T, v_BE = w_P[part.place], self.v_BE.numpy()
            run.pool(logit_T, self.scale_1, self.softmax, *ids, self.times, v_BE, w_T, out_SE)

    def _sweep_back(self, begin: int, end: int, w_P: Any, dout_SE: Any, found: list[Any], number: int) -> None:
        """Go from layer end back to begin, for one part."""
        run, part, room = self.run, self.parts[number], self._room()
        dh_S, dh_B, dq, dk, dv = found
        if end == self.depth:
            ids = part.sample_T, part.behaviour_T
            dlogit_T = part.logit_T1.numpy().reshape(-1)  # in the logits' place
            v_BE = self.v_BE.numpy()
            run.pool_back(w_P[part.place], self.scale_1, self.softmax, *ids, self.times, v_BE, dout_SE, dlogit_T, dv)
        for block, sample_C, behaviour_C in part.blocks():
            n = len(sample_C)
            if end == self.depth:
                dh_CH = part.logit_T1[block]
            else:
                dh_CH = part.waiting[end][block]
                self.acts[end].finish(part.into[end][block], dh_CH)  # type: ignore[union-attr]
            for layer in range(end, max(begin, 1) - 1, -1):
                width = self.widths[layer - 1]
                waiting = part.waiting.get(layer - 1)
                dy_CH = room(f"dy {layer % 2}", n, width) if waiting is None else waiting[block]
                torch.mm(dh_CH, self.matrices[layer], out=dy_CH)
                y_CH, sums = room("y", n, width), part.sums[layer - 1]
                self.acts[layer - 1].backward(part.into[layer - 1][block], self.biases[layer - 1], dy_CH, y_CH, sums)
                part.matrices[layer].addmm_(dh_CH.t(), y_CH)
                dh_CH = dy_CH
            if begin:
                continue
            run.enter_back(dh_CH.numpy(), sample_C, behaviour_C, dh_S, dh_B)
            if self.product_HD is not None:
                product_CD = self._products(room, sample_C, behaviour_C)
                part.matrices[0].addmm_(dh_CH.t(), product_CD)
                torch.mm(dh_CH, self.product_HD, out=product_CD)
                q_SD, k_BD = self.q_SD.numpy(), self.k_BD.numpy()
                run.multiply_back(q_SD, k_BD, sample_C, behaviour_C, product_CD.numpy(), dq, dk)

    def _products(self, room: Room, sample_C: Any, behaviour_C: Any) -> Tensor:
        """Return q∘k of a block's pairs."""
        product_CD = room("qk", len(sample_C), self.q_SD.shape[1])
        self.run.multiply(self.q_SD.numpy(), self.k_BD.numpy(), sample_C, behaviour_C, product_CD.numpy())
        return product_CD
