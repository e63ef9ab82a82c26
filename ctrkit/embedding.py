"""ID tables: only a batch's distinct rows are gathered, and only those are updated.

All vocabularies of one width lie in one matrix, each at its offset; row 0 is everyone's padding and stays zero.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctrkit.models import threads
from ctrkit.models.compiled_layers import loops

Ints = npt.NDArray[np.int64]
REGULARISATIONS = ("adaptive", "difacto", "l2", "dropout", "filter", "none")
"""Those of `[train] regularisation`. `dropout` and `filter` act on which ids a batch names (`ctrkit.id_masks`)."""


BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's."""
DRAW = 1 << 20
"""Rows whose first weights are drawn at a time; a multiple of 16."""


class Table:
    """The embeddings of several vocabularies of one width, with the moments of row-wise Adam.

    Parameters
    ----------
    sizes: vocabulary → its number of indexes (0 and 1 included).
    width: D.
    counts: vocabulary → [size], n_i, the training samples that contain index i (DIN section 4.4).
    frequent: vocabulary → [size] bool; where given, ids that are not frequent are unknown (DIN section 6.2, filter).
    dtype: of weights and moments. The first weights are drawn in float32, whatever it is.
    share: (rank, ranks): of a matrix that is spread over ranks, row i lies on rank i mod ranks, as its row
        1 + i div ranks; row 0 is padding on all of them. The weights are those that one process would draw.
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
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.width = width
        self.rank, self.ranks = share
        self.frequent = dict(frequent or {})
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self.offsets[name] = end
            end += size
        self.n_rows = end + 1
        """Of the whole matrix."""
        padding = [torch.zeros(1, width, dtype=dtype)] * self.sharded
        drawn = [
            (self.own(torch.randn(stop - start, width, generator=generator), start) * scale).to(dtype)
            for start, stop in _draws(self.n_rows)
        ]
        self.weight_VD = torch.cat([*padding, *drawn])
        self.weight_VD[self.local_padding] = 0.0
        n_V = torch.ones(self.n_rows, dtype=dtype)
        for name, size in sizes.items():
            known = torch.from_numpy(np.asarray(counts[name], np.float64)).to(dtype)
            n_V[self.offsets[name] + 1 : self.offsets[name] + size] = known[1:size].clamp(min=1.0)
        self.count_V = torch.cat([n_V[:1], self.own(n_V)]) if self.sharded else n_V
        # Written, not `zeros`, whose pages come one by one, by a fault each, when a step first touches them.
        self.m_VD = torch.full_like(self.weight_VD, 0.0)
        self.v_VD = torch.full_like(self.weight_VD, 0.0)
        self.step = 0

    @property
    def sharded(self) -> bool:
        """Whether the matrix is spread over ranks."""
        return self.ranks > 1

    @property
    def local_padding(self) -> slice:
        """The rows here that are padding: the first, and where the whole matrix's own lies."""
        return slice(0, 2 if self.sharded and self.rank == 0 else 1)

    def own(self, rows: Tensor, first: int = 0) -> Tensor:
        """Return those of some neighbouring rows of the whole matrix, of which `first` is the first, that lie here."""
        return rows[(self.rank - first) % self.ranks :: self.ranks]

    def local(self, rows: Tensor) -> Tensor:
        """Return where rows of the whole matrix lie in this rank's; they have to lie here. Padding is row 0."""
        return torch.where(rows == 0, 0, rows // self.ranks + 1) if self.sharded else rows

    def is_here(self, rows_R: Tensor) -> Tensor:
        """Return [R] bool: whether rows of the whole matrix lie here."""
        return rows_R % self.ranks == self.rank

    def put(self, name: str, rows_R: Tensor, values_RD: Tensor) -> None:
        """Set rows of the whole `weight_VD`, `m_VD` or `v_VD`: of them those that lie here. Padding stays as it is."""
        matrix = getattr(self, name)
        here = self.is_here(rows_R)
        matrix[self.local(rows_R[here]).to(matrix.device)] = values_RD[here].to(matrix.device, matrix.dtype)

    def take_over(self, name: str, whole_VD: Tensor) -> None:
        """Set `weight_VD`, `m_VD` or `v_VD` to what lies here of a whole matrix."""
        matrix = getattr(self, name)
        matrix[self.sharded :].copy_(self.own(whole_VD))

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
        n_U = self.count_V.index_select(0, rows_U)
        decay_U = {"adaptive": strength / n_U, "difacto": strength * n_U, "l2": torch.full_like(n_U, strength)}.get(
            regularisation, torch.zeros_like(n_U)
        )
        # SparseAdam adds eps to the uncorrected root of v.
        size = learning_rate * math.sqrt(1 - BETA2**self.step) / (1 - BETA1**self.step)
        run = loops(weight_UD, "ctrkit.compiled_rows")
        if run is None:
            self._adam(rows_U, weight_UD.detach(), grad_UD, decay_U.unsqueeze(1), size)
            return
        arrays = rows_U.numpy(), grad_UD.contiguous().numpy(), decay_U.numpy()
        matrices = self.weight_VD.numpy(), self.m_VD.numpy(), self.v_VD.numpy()
        n = max(threads.owned(), 1)

        def part(i: int) -> None:
            of_rows = slice(len(rows_U) * i // n, len(rows_U) * (i + 1) // n)
            rows, grad, decay = (x[of_rows] for x in arrays)
            run.adam(rows, grad, *matrices, decay, BETA1, BETA2, EPS, size)

        threads.side_by_side(part, n) if n > 1 else part(0)

    def _adam(self, rows_U: Tensor, w_UD: Tensor, grad_UD: Tensor, decay_U1: Tensor, size: float) -> None:
        """As `ctrkit.compiled_rows.adam`."""
        grad_UD = grad_UD + decay_U1 * w_UD
        m_UD = self.m_VD.index_select(0, rows_U).lerp_(grad_UD, 1 - BETA1)
        v_UD = self.v_VD.index_select(0, rows_U).mul_(BETA2).addcmul_(grad_UD, grad_UD, value=1 - BETA2)
        new_UD = w_UD.addcdiv(m_UD, v_UD.sqrt().add_(EPS), value=-size)
        for matrix, value_UD in ((self.m_VD, m_UD), (self.v_VD, v_UD), (self.weight_VD, new_UD)):
            value_UD[rows_U == 0] = 0.0
            matrix.index_copy_(0, rows_U, value_UD)


def _draws(n_rows: int) -> list[tuple[int, int]]:
    """Cut rows into runs such that normal numbers drawn run by run are those drawn at once: torch draws them sixteen
    at a time, and the last sixteen anew where the number of all is no multiple."""
    starts = [start for start in range(0, n_rows, DRAW) if start == 0 or n_rows - start >= 16]
    return list(zip(starts, [*starts[1:], n_rows], strict=True))
