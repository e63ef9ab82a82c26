"""Blocks of columns to a model's batch: distinct embedding rows, distinct pictures, (sample, behaviour) pairs."""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ctrkit import numba_loops
from ctrkit.batches import Block, Column, Ragged
from ctrkit.embedding import Table
from ctrkit.id_masks import dropout_mask, replace_unknown
from ctrkit.models.batch import Batch, DistinctPairs
from ctrkit.models.plan import Plan
from ctrkit.picture_vectors import PictureVectors
from ctrkit.repeats import all_pairs, distinct_pairs

Ints = npt.NDArray[np.int64]


class Collator:
    """Makes batches for one model.

    Parameters
    ----------
    plan: the model's inputs.
    tables: width → embedding table.
    pictures: the picture vectors, if the model looks at any.
    unknown_rate: see `ctrkit.id_masks.unknown_mask`; 0 outside training.
    rows_only: name the rows of pictures and do not read their vectors, for somebody else does.
    distinct: find pairs that are alike (`ctrkit.repeats`), for a model that counts them.
    """

    def __init__(
        self,
        plan: Plan,
        tables: Mapping[int, Table],
        pictures: PictureVectors | None,
        counts: Mapping[str, npt.NDArray[np.int64]] | None = None,
        unknown_rate: float = 0.0,
        *,
        rows_only: bool = False,
        distinct: bool = False,
    ) -> None:
        self.plan, self.tables, self.pictures = plan, tables, pictures
        self.counts, self.unknown_rate, self.rows_only = counts or {}, unknown_rate, rows_only
        many = any(plan.schema.features[name].multi_hot for name in plan.behaviour)
        self._distinct_pairs = distinct and not many and plan.train.regularisation != "dropout"
        self._place_V: dict[int, npt.NDArray[np.int32]] = {}
        self._lock = threading.Lock()

    def __call__(self, block: Block, seed: Sequence[int] | None = None) -> Batch:
        """Return the batch of a block's samples, for training where there is a seed.

        `seed` (say, seed and epoch) decides which ids become unknown and which behaviours dropout discards.
        """
        n = np.diff(block.sample_offsets)
        histories = np.diff(block.behaviour_offsets)
        group_S = np.repeat(np.arange(block.n_groups), n)
        group_B = np.repeat(np.arange(block.n_groups), histories)
        sample_P, behaviour_P = all_pairs(group_S, block.behaviour_offsets)
        clicks, sample_id_S = block.sample["click"], block.sample["sample_id"]
        assert isinstance(clicks, np.ndarray)
        assert isinstance(sample_id_S, np.ndarray)
        batch = Batch(
            click_S=torch.from_numpy(clicks.astype(np.float32)),
            group_S=torch.from_numpy(group_S),
            group_B=torch.from_numpy(group_B),
            sample_P=torch.from_numpy(sample_P),
            behaviour_P=torch.from_numpy(behaviour_P),
            n_groups=block.n_groups,
            rows={},
            index={},
            segment={},
        )
        self._ids(block, batch, seed)
        train = self.plan.train
        if seed is not None and train.regularisation == "dropout" and self.plan.behaviour:
            place_P = behaviour_P - block.behaviour_offsets[:-1][group_S[sample_P]]
            keep_P = dropout_mask(sample_id_S[sample_P], place_P, seed, train.dropout_rate)
            batch.kept_P, batch.dropout_rate = torch.from_numpy(keep_P), train.dropout_rate
        if self._distinct_pairs:
            batch.distinct = self._distinct_of(batch)
        for name in (self.plan.ad_image, self.plan.user_image):
            if name and self.pictures is not None:
                column = (block.sample if name == self.plan.ad_image else block.behaviour)[name]
                assert isinstance(column, np.ndarray)
                batch.picture_row[name], batch.picture_index[name] = self.pictures.distinct(column)
                if not self.rows_only:
                    batch.picture_NW[name] = self.pictures.vectors(batch.picture_row[name].numpy())
        return batch

    def _ids(self, block: Block, batch: Batch, seed: Sequence[int] | None) -> None:
        """Look up all ID features: per width, one `unique` over everything the batch names."""
        index = self._indexes(block, batch)
        if seed is not None and self.unknown_rate:
            self._make_unknown(block, index, seed)
        named: dict[int, list[tuple[str, Ints]]] = {}
        for name in self.plan.ids:
            width, vocab = self.plan.width(name), self.plan.schema.features[name].vocab
            named.setdefault(width, []).append((name, self.tables[width].rows(vocab, index[name])))
        for width, parts in named.items():
            distinct_U, place = self._distinct_rows(width, np.concatenate([rows for _, rows in parts]))
            batch.rows[width] = torch.from_numpy(distinct_U)
            ends = np.cumsum([len(rows) for _, rows in parts])[:-1]
            for (name, _), places in zip(parts, np.split(place, ends), strict=True):
                batch.index[name] = torch.from_numpy(places)

    def _distinct_of(self, batch: Batch) -> DistinctPairs | None:
        asked, had = (
            {name: batch.index[name].numpy() for name in names}
            for names in (self.plan.partners().values(), self.plan.behaviour)
        )
        groups = batch.group_S.numpy(), batch.group_B.numpy()
        return distinct_pairs(groups[0], asked, groups[1], had, batch.n_groups, len(batch.sample_P))

    def _indexes(self, block: Block, batch: Batch) -> dict[str, Ints]:
        """Return the vocabulary indexes of each feature, and note in the batch whose those of a list are."""
        out: dict[str, Ints] = {}
        for name in self.plan.ids:
            column = self._owner(block, name)[name]
            if isinstance(column, Ragged):
                batch.segment[name] = torch.from_numpy(np.repeat(np.arange(len(column)), np.diff(column.offsets)))
                out[name] = column.values
            else:
                out[name] = column
        return out

    def _owner(self, block: Block, name: str) -> dict[str, Column]:
        owners = {"user": block.group, "behaviour": block.behaviour}
        return owners.get(self.plan.schema.features[name].of, block.sample)

    def _make_unknown(self, block: Block, index: dict[str, Ints], seed: Sequence[int]) -> None:
        """Replace ids that are trained as unknown."""
        sample, group = block.sample["sample_id"], block.group["group_id"]
        assert isinstance(sample, np.ndarray)
        assert isinstance(group, np.ndarray)
        keys = {"sample": sample, "group": group, "behaviour": np.repeat(group, np.diff(block.behaviour_offsets))}
        for position, name in enumerate(self.plan.ids):
            owner, vocab = self._owner(block, name), self.plan.schema.features[name].vocab
            kind = "sample" if owner is block.sample else "behaviour" if owner is block.behaviour else "group"
            key, column = keys[kind], owner[name]
            if isinstance(column, Ragged):
                key = np.repeat(key, np.diff(column.offsets))
            index[name] = replace_unknown(key, [*seed, position], index[name], self.counts[vocab], self.unknown_rate)

    def _distinct_rows(self, width: int, rows: Ints) -> tuple[Ints, Ints]:
        """Return the distinct rows, rising, and the place of each row in them: `np.unique` with an inverse, in a third
        of its time (a tenth with compiled loops), by a table that has room for a place of each row of the embedding
        table."""
        code = numba_loops.load("ctrkit.compiled_rows")
        with self._lock:
            if width not in self._place_V:
                self._place_V[width] = np.full(self.tables[width].n_rows, -1, np.int32)
            place_V = self._place_V[width]
            if code is not None:
                distinct_U, place = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
                distinct_U = np.sort(distinct_U[: code.note(rows, place_V, distinct_U)])
                code.places(rows, place_V, distinct_U, place)
                return distinct_U, place
            ordered = np.sort(rows.astype(np.int32 if len(place_V) < 1 << 31 else np.int64))
            first = np.ones(len(ordered), np.bool_)
            np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
            distinct_U = ordered[first].astype(np.int64)
            place_V[distinct_U] = np.arange(len(distinct_U), dtype=np.int32)
            return distinct_U, place_V[rows].astype(np.int64)
