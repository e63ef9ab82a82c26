"""ID tables: only a batch's distinct rows are gathered, and only those are updated.

All vocabularies of one width lie in one matrix, each at its offset; row 0 is everyone's padding and stays zero.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
REGULARISATIONS = ("adaptive", "difacto", "l2", "dropout", "filter", "none")
"""Those of `[train] regularisation`. `dropout` and `filter` act on which ids a batch names (`ctrkit.id_masks`)."""


class Table:
    """The embeddings of several vocabularies of one width, with the moments of row-wise Adam.

    Parameters
    ----------
    sizes: vocabulary → its number of indexes (0 and 1 included).
    width: D.
    counts: vocabulary → [size], n_i, the training samples that contain index i (DIN section 4.4).
    frequent: vocabulary → [size] bool; where given, ids that are not frequent are unknown (DIN section 6.2, filter).
    dtype: of weights and moments. The first weights are drawn in float32, whatever it is.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        width: int,
        counts: Mapping[str, npt.NDArray[np.int64] | npt.NDArray[np.float64]],
        generator: torch.Generator,
        scale: float = 0.05,
        dtype: torch.dtype = torch.float32,
        frequent: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    ) -> None:
        self.width = width
        self.frequent = dict(frequent or {})
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self.offsets[name] = end
            end += size
        self.weight_VD = (torch.randn(end + 1, width, generator=generator) * scale).to(dtype)
        self.weight_VD[0] = 0.0
        n_V = torch.ones(end + 1, dtype=dtype)
        for name, size in sizes.items():
            known = torch.from_numpy(np.asarray(counts[name], np.float64)).to(dtype)
            n_V[self.offsets[name] + 1 : self.offsets[name] + size] = known[1:size].clamp(min=1.0)
        self.count_V = n_V
        # Written, not `zeros`, whose pages come one by one, by a fault each, when a step first touches them.
        self.m_VD = torch.full_like(self.weight_VD, 0.0)
        self.v_VD = torch.full_like(self.weight_VD, 0.0)
        self.step = 0

    def to(self, device: str) -> None:
        """Move weights, moments and counts to a device."""
        for name in ("weight_VD", "count_V", "m_VD", "v_VD"):
            setattr(self, name, getattr(self, name).to(device))

    def rows(self, vocab: str, index: Ints) -> Ints:
        """Return the matrix rows of vocabulary indexes; padding (0) is row 0, a filtered id the row of unknown."""
        if vocab in self.frequent:
            index = np.where(self.frequent[vocab][index], index, 1)
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
