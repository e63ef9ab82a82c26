"""ID tables: only a batch's distinct rows are gathered, and only those are updated.

All vocabularies of one width lie in one matrix, each at its offset; row 0 is everyone's padding and stays zero.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
REGULARISATIONS = ("adaptive", "difacto", "l2", "none")


class Table:
    """The embeddings of several vocabularies of one width, with the moments of row-wise Adam.

    Parameters
    ----------
    sizes: vocabulary → its number of indexes (0 and 1 included).
    width: D.
    counts: vocabulary → [size], n_i, the training samples that contain index i (DIN section 4.4).
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        width: int,
        counts: Mapping[str, npt.NDArray[np.int64] | npt.NDArray[np.float64]],
        generator: torch.Generator,
        scale: float = 0.05,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.width = width
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self.offsets[name] = end
            end += size
        self.weight_VD = torch.randn(end + 1, width, generator=generator, dtype=dtype) * scale
        self.weight_VD[0] = 0.0
        n_V = torch.ones(end + 1, dtype=dtype)
        for name, size in sizes.items():
            known = torch.from_numpy(np.asarray(counts[name], np.float64)).to(dtype)
            n_V[self.offsets[name] + 1 : self.offsets[name] + size] = known[1:size].clamp(min=1.0)
        self.count_V = n_V
        self.m_VD = torch.zeros_like(self.weight_VD)
        self.v_VD = torch.zeros_like(self.weight_VD)
        self.step = 0

    def to(self, device: str) -> None:
        """Move weights, moments and counts to a device."""
        for name in ("weight_VD", "count_V", "m_VD", "v_VD"):
            setattr(self, name, getattr(self, name).to(device))

    def rows(self, vocab: str, index: Ints) -> Ints:
        """Return the matrix rows of vocabulary indexes; padding (0) is row 0."""
        return np.where(index == 0, 0, index + self.offsets[vocab])

    def gather(self, rows_U: Tensor) -> Tensor:
        """Return [U, D], a leaf that collects the gradient of these rows."""
        return self.weight_VD.index_select(0, rows_U).requires_grad_()

    @torch.no_grad()
    def update(
        self, rows_U: Tensor, weight_UD: Tensor, learning_rate: float, regularisation: str, strength: float
    ) -> None:
        """Take one Adam step on the rows of a batch, from the gradient that `weight_UD` collected.

        Moments move for touched rows only and the bias correction counts all steps, as in
        `torch.optim.SparseAdam`. The regulariser joins the gradient: λ·w_i/n_i (DIN eq. 9), λ·n_i·w_i (eq. 10)
        or λ·w_i, for the rows of the batch.
        """
        self.step += 1
        grad_UD = weight_UD.grad
        if grad_UD is None:
            return
        w_UD = weight_UD.detach()
        n_U1 = self.count_V.index_select(0, rows_U).unsqueeze(1)
        if regularisation == "adaptive":
            grad_UD = grad_UD + strength * w_UD / n_U1
        elif regularisation == "difacto":
            grad_UD = grad_UD + strength * w_UD * n_U1
        elif regularisation == "l2":
            grad_UD = grad_UD + strength * w_UD
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        m_UD = self.m_VD.index_select(0, rows_U).lerp_(grad_UD, 1 - beta1)
        v_UD = self.v_VD.index_select(0, rows_U).mul_(beta2).addcmul_(grad_UD, grad_UD, value=1 - beta2)
        self.m_VD.index_copy_(0, rows_U, m_UD)
        self.v_VD.index_copy_(0, rows_U, v_UD)
        size = learning_rate * math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)
        # SparseAdam adds eps to the uncorrected root of v.
        new_UD = w_UD.addcdiv(m_UD, v_UD.sqrt().add_(eps), value=-size)
        new_UD[rows_U == 0] = 0.0
        self.weight_VD.index_copy_(0, rows_U, new_UD)


def unknown_mask(
    key: Ints, seed: Sequence[int], index: Ints, count_i: npt.NDArray[np.float64], rate: float
) -> npt.NDArray[np.bool_]:
    """Say which ids of a batch are trained as unknown.

    An id seen n times in training becomes unknown with probability rate + (1/2 − rate)/n: often if rare, so that
    the unknown row learns what a new id looks like; `rate` 0 switches it off. The draw is a hash of `key` (the
    sample or group), the id and `seed`, so that batching and grouping change nothing.
    """
    if rate == 0.0:
        return np.zeros(len(index), np.bool_)
    return (index > 1) & (_uniform(key, index, seed) < _unknown_chance(count_i, rate))


def with_unknown(count_V: npt.NDArray[np.int64], rate: float) -> npt.NDArray[np.float64]:
    """Return n_i with the samples that are expected to train the unknown row added to index 1."""
    n_V = count_V.astype(np.float64)
    if rate > 0.0:
        n_V[1] += (n_V[2:] * _unknown_chance(n_V[2:], rate)).sum()
    return n_V


def _unknown_chance(count: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.float64]:
    return np.asarray(rate + max(0.0, 0.5 - rate) / np.maximum(count, 1.0), np.float64)


def _uniform(key: Ints, index: Ints, seed: Sequence[int]) -> npt.NDArray[np.float64]:
    """Hash to [0, 1) (splitmix64)."""
    with np.errstate(over="ignore"):
        z = key.astype(np.uint64)
        for s in (index.astype(np.uint64), *(np.full(1, s, np.uint64) for s in seed)):
            z = (z ^ s) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return np.asarray(z >> np.uint64(11), np.float64) * 2.0**-53
