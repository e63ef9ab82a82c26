"""Embeddings and picture vectors for the batches of several ranks, each kept where it belongs.

A table or the pictures' features are spread over the ranks, row i on rank i mod W, or replicated. Of a spread table a
batch's distinct rows are asked of their owners, which send vectors, sum the gradients that come back and update. Of
pictures no features travel: the owner reads them, runs the trainable extractor, once for all ranks that ask, and sends
the middle vectors. Of a replicated table the owners sum the gradients and send the sums to all, so that every replica
takes the same step.

Letters: W ranks, U distinct rows that this rank names, M distinct rows that are asked of it, D width.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctrkit import state_dict
from ctrkit.data_parallel import DataParallel
from ctrkit.embedding import Table
from ctrkit.models.batch import Batch
from ctrkit.picture_vectors import PictureVectors
from ctrkit.row_exchange import Ask, RowExchange, interleave

WIRES = {"float32": None, "bfloat16": torch.bfloat16}
"""[train] exchange_dtype → the dtype in which picture vectors and their gradients travel; None: as they are."""


@dataclass
class Rows:
    """The rows of a table that one step updates on this rank."""

    local: Tensor
    """[M] rows of this rank's matrix."""
    weight_MD: Tensor
    """A leaf that collects their gradient."""


def gather(tables: Mapping[int, Table], batch: Batch) -> tuple[dict[int, Rows], dict[int, Tensor]]:
    """Return by width (the rows that lie here, [U, D] what the batch looks up). A collective for spread tables."""
    own: dict[int, Rows] = {}
    seen: dict[int, Tensor] = {}
    for width, rows_U in batch.rows.items():
        table = tables[width]
        local = table.local(batch.route[width].rows_M) if table.sharded else rows_U
        own[width] = Rows(local, table.gather(local))
        seen[width] = batch.spread(width, own[width].weight_MD) if table.sharded else own[width].weight_MD
    return own, seen


def rows_read(batch: Batch, name: str) -> npt.NDArray[np.int64]:
    """Return [M]: the rows of features.h5 that are read here for a picture feature of a batch, rising: of the pictures
    that it names, or, where it has a route, of those that the ranks ask of this one."""
    row_M = batch.route[name].rows_M - 1 if name in batch.route else batch.picture_row[name]
    return row_M.numpy()


class FeatureService:
    """What the ranks of a training or prediction look up for each other.

    Parameters
    ----------
    parallel: the ranks.
    tables: width → this rank's table.
    pictures: where the model looks at pictures.
    spread_pictures: whether pictures are extracted where they lie; else each rank reads and extracts what it names.
    exchange_dtype: of picture vectors between ranks, "float32" (or that of the model) or "bfloat16".
    scratch: folder with room for tables as `whole` returns them; default: that of temporary files.
    """

    def __init__(
        self,
        parallel: DataParallel,
        tables: Mapping[int, Table],
        pictures: PictureVectors | None = None,
        *,
        spread_pictures: bool = True,
        exchange_dtype: str = "float32",
        scratch: Path | None = None,
    ) -> None:
        self.scratch = scratch
        self.parallel, self.tables, self.pictures = parallel, tables, pictures
        self.spread_pictures = spread_pictures and pictures is not None
        self.exchange, self.wire = RowExchange(parallel.rows, parallel.ahead), WIRES[exchange_dtype]
        self.worker = ThreadPoolExecutor(1, "prepare", torch.set_num_threads, (1,))
        """The one thread in which `route` is called."""
        ranks = parallel.ranks
        self._lies_here = (ranks.rank - 1) % ranks.count, ranks.count
        if self.spread_pictures and pictures is not None:
            pictures.wanted(share=self._lies_here)
        self.named = self.extracted = 0
        """Distinct pictures of batches: as ranks name them, and as extracted here."""

    def route(self, batch: Batch, *, training: bool) -> Batch:
        """Find out what the ranks ask of each other for a batch, which is on the CPU. A collective of the group
        `parallel.ahead`."""
        asks: dict[int | str, Ask] = {
            width: Ask(rows_U, self.tables[width].n_rows, "table")
            for width, rows_U in batch.rows.items()
            if self.tables[width].sharded or training
        }
        if self.spread_pictures:
            assert self.pictures is not None
            # Row −1, no vector, is somebody's too: its middle vector is what the extractor makes of zeros.
            rows = self.pictures.store.rows + 1
            asks |= {name: Ask(row_N + 1, rows, "picture", self.wire) for name, row_N in batch.picture_row.items()}
        batch.route.update(zip(asks, self.exchange.routes(list(asks.values())), strict=True))
        for name, row_N in batch.picture_row.items() if self.spread_pictures else ():
            self.named += len(row_N)
            self.extracted += len(batch.route[name].rows_M)
        return batch

    def merge(self, batch: Batch, own: Mapping[int, Rows]) -> dict[int, Rows]:
        """Return the rows to be updated here, with the gradients of all ranks: those of spread tables have them
        already; of replicated ones these are the rows that any rank names. A collective."""
        return {w: rows if self.tables[w].sharded else self._replicated(batch, w, rows) for w, rows in own.items()}

    def _replicated(self, batch: Batch, width: int, rows: Rows) -> Rows:
        route = batch.route[width]
        grad_UD = rows.weight_MD.grad
        grad_MD = route.collect(torch.zeros_like(rows.weight_MD) if grad_UD is None else grad_UD)
        rows_A, grad_AD = self.exchange.all_gather(route.rows_M, grad_MD, "table")
        merged = Rows(rows_A, self.tables[width].gather(rows_A))
        merged.weight_MD.grad = grad_AD
        return merged

    def whole(self, width: int, name: str) -> Tensor:
        """Return the whole `weight_VD`, `m_VD` or `v_VD` of a table at rank 0; elsewhere nothing of it, [0, D].

        A collective where the table is spread. Then what rank 0 gets lies in a file, not in its memory.
        """
        table = self.tables[width]
        matrix: Tensor = getattr(table, name)
        if not table.sharded:
            return matrix
        first = self.parallel.ranks.rank == 0
        whole = state_dict.mapped((table.n_rows, width), matrix.dtype, self.scratch) if first else None
        interleave(matrix[1:], table.n_rows, whole, self.parallel.between)
        return matrix[:0] if whole is None else whole

    def fit_pictures(self, count_V: npt.NDArray[np.int64] | None) -> None:
        """Set mean and scale of the picture vectors, each rank from its share of the rows. A collective."""
        assert self.pictures is not None
        self.pictures.fit(count_V, self._lies_here, self._sum)

    def _sum(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = self.parallel.sum(torch.from_numpy(x).to(self.parallel.device)).cpu().numpy()
        return found

    def traffic(self) -> dict[str, int]:
        """Return what this rank has sent to others so far, bytes by kind, and how many pictures were named by the ranks
        and extracted, over all of them. A collective."""
        kinds = [f"{of} {what}" for of in ("table", "picture") for what in ("ids", "vectors", "gradients", "counts")]
        mine = [*(self.exchange.sent[kind] for kind in kinds)]
        mine += [self.named, self.extracted, self.parallel.dense_bytes]
        names = [*(f"bytes of {kind}" for kind in kinds), "pictures named", "pictures extracted"]
        names.append("bytes of dense gradients")
        total = self._sum(np.array(mine, np.float64)).astype(np.int64).tolist()
        return dict(zip(names, total, strict=True))


def told(traffic: Mapping[str, int]) -> str:
    """Say what `FeatureService.traffic` found in a few words."""

    def megabytes(*kinds: str) -> str:
        return f"{sum(traffic[f'bytes of {kind}'] for kind in kinds) / 1e6:,.1f} MB"

    parts = [
        f"{megabytes('table ids', 'picture ids')} of ids",
        f"{megabytes('table vectors', 'table gradients')} of embeddings and their gradients",
        f"{megabytes('picture vectors', 'picture gradients', 'picture counts')} of pictures' vectors and gradients",
        f"and summed {megabytes('dense gradients')} of dense gradients",
    ]
    if traffic["pictures named"]:
        parts.append(
            f"{traffic['pictures extracted']:,} pictures extracted where {traffic['pictures named']:,} were named"
        )
    return ", ".join(parts)
