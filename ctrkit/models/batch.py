"""A batch as tensors, and the lookup of its middle vectors. Shape letters as in `ctrkit.batches`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctrkit.models.layers import gather_rows, segment_sum

if TYPE_CHECKING:
    from ctrkit.row_exchange import Route


@dataclass
class DistinctPairs:
    """A batch's pairs for an attention that compares ids with ids, those that are alike once (`ctrkit.repeats`).

    Letters: Q queries, the samples of a group that are alike in what is compared being one; K keys, the behaviours of a
    group that are alike being one; P the pairs of these.
    """

    index: dict[str, Tensor]
    """Feature → positions in its width's rows: [Q] or [K]."""
    query_S: Tensor
    """The query of each sample."""
    times_K: Tensor
    """How many behaviours each key stands for; float32."""
    query_P: Tensor
    key_P: Tensor
    """Every (query, key of its group) pair, queries rising."""


@dataclass
class Batch:
    """One step's work. Index tensors are int64."""

    click_S: Tensor
    group_S: Tensor
    """The group of each sample."""
    group_B: Tensor
    """The group of each behaviour."""
    sample_P: Tensor
    behaviour_P: Tensor
    """Every (sample, behaviour of its group) pair, samples rising, behaviours oldest first."""
    n_groups: int
    rows: dict[int, Tensor]
    """Embedding width → [U] distinct rows of that width's table."""
    index: dict[str, Tensor]
    """Feature → positions in its width's rows: [G], [S] or [B]; [values] for a multi-hot one."""
    segment: dict[str, Tensor]
    """Multi-hot feature → the group or sample of each of its values."""
    picture_NW: dict[str, Tensor] = field(default_factory=dict)
    """Picture feature → [N, W] its distinct pictures' centred vectors; where pictures are spread over ranks, those of
    the pictures that lie on this rank and any rank names."""
    picture_row: dict[str, Tensor] = field(default_factory=dict)
    """Picture feature → [N] rows of features.h5 of its distinct pictures, rising; −1: no vector."""
    picture_index: dict[str, Tensor] = field(default_factory=dict)
    """Picture feature → [S] or [B] positions in N."""
    kept_P: Tensor | None = None
    """[P] bool: whether the sample sees the ids of the behaviour (`regularisation = "dropout"`). None: it does."""
    dropout_rate: float = 0.0
    """The share of pairs that `kept_P` was drawn to leave out."""
    route: dict[int | str, "Route"] = field(default_factory=dict)
    """Embedding width or picture feature → how its rows travel between the ranks that name them and those on which
    they lie. What is not in it lies here."""
    distinct: DistinctPairs | None = None
    """Where some pairs are alike, and the model can count them."""
    total: int = 0
    """Samples of the global batch, of which these are a share; 0: these are all."""

    def to(self, device: str) -> "Batch":
        """Return the batch with its tensors on a device; itself where they are there already."""
        if device == "cpu":
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: moved(v) for k, v in value.items()}
            if isinstance(value, DistinctPairs):
                return DistinctPairs(**{f.name: moved(getattr(value, f.name)) for f in fields(value)})
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        route = {name: route.to(device) for name, route in self.route.items()}
        return replace(Batch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)}), route=route)

    @property
    def n_samples(self) -> int:
        return len(self.click_S)

    @property
    def n_total(self) -> int:
        """Samples of all ranks."""
        return self.total or self.n_samples

    def spread(self, name: int | str, x_MD: Tensor) -> Tensor:
        """Return [N, D], rows for what this rank names, from those that lie here; of pictures or of a table."""
        return self.route[name].spread(x_MD) if name in self.route else x_MD

    def spread_pictures(self, xs_MD: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return by picture feature what `spread` does, of vectors of one width: by one message."""
        names = [name for name in xs_MD if name in self.route]
        if not names:
            return dict(xs_MD)
        from ctrkit.row_exchange import spread  # where there are several ranks

        found = spread([self.route[name] for name in names], [xs_MD[name] for name in names])
        return {**xs_MD, **dict(zip(names, found, strict=True))}

    def collect(self, name: str, x_N: Tensor) -> Tensor:
        """Return [M], sums over the ranks for the pictures that lie here, from what each has for those it names."""
        return self.route[name].sum(x_N) if name in self.route else x_N

    def id_pairs(self) -> tuple[Tensor, Tensor]:
        """Return (sample, behaviour) of the pairs [P] whose ids the model sees: all, or those that dropout keeps."""
        if self.kept_P is None:
            return self.sample_P, self.behaviour_P
        return self.sample_P[self.kept_P], self.behaviour_P[self.kept_P]


class Lookup:
    """Middle vectors of a batch's ID features: Basicnet, one embedding each, multi-hot ones summed."""

    def __init__(self, batch: Batch, rows: Mapping[int, Tensor], width: Mapping[str, int]) -> None:
        self.batch, self.rows, self.width = batch, rows, width

    def one(self, name: str, n: int) -> Tensor:
        """Return [n, D]: the middle vector of one feature; n is the number of its owners."""
        values = torch.nn.functional.embedding(self.batch.index[name], self.rows[self.width[name]])
        if name in self.batch.segment:
            return segment_sum(values, self.batch.segment[name], n)
        return values

    def side_by_side(self, names: Sequence[str], n: int, index: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return middle vectors that lie side by side as the features do, [n, …] each.

        Neighbours of one width with one value each are looked up together: one gather, and one gradient. With an
        `index`, of features with one value each, of what that names.
        """
        index = self.batch.index if index is None else index
        alike = itertools.groupby(names, lambda name: (self.width[name], name in self.batch.segment))
        out: list[Tensor] = []
        for (width, many), run in alike:
            if many:
                out += [self.one(name, n) for name in run]
                continue
            index_nF = torch.stack([index[name] for name in run], 1)
            out.append(gather_rows(self.rows[width], index_nF.view(-1)).view(n, index_nF.shape[1] * width))
        return out

    def users_G(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Return user features' middle vectors, once a group, and the group of each sample; None without features."""
        if not names:
            return None
        return torch.cat(self.side_by_side(names, self.batch.n_groups), 1), self.batch.group_S

    def users_S(self, names: Sequence[str]) -> list[Tensor]:
        """Return user features' middle vectors, looked up once a group and gathered to the samples."""
        users = self.users_G(names)
        return [] if users is None else [gather_rows(*users)]

    def samples_S(self, names: Sequence[str]) -> list[Tensor]:
        """Return ad and scene features' middle vectors."""
        return self.side_by_side(names, self.batch.n_samples)

    def behaviours_B(self, names: Sequence[str]) -> Tensor:
        """Return [B, sum of D]: behaviour features' embeddings side by side."""
        return torch.cat(self.side_by_side(names, len(self.batch.group_B)), 1)


def sum_of_ids(batch: Batch, v_BD: Tensor) -> Tensor:
    """Return [S, D]: the sum of the behaviours' vectors of each sample; zero without a history.

    Where dropout discards behaviours, those kept count 1 / (1 − rate) times, so that the sum has the same expectation.
    """
    if batch.kept_P is None:
        return segment_sum(v_BD, batch.group_B, batch.n_groups).index_select(0, batch.group_S)
    sample_P, behaviour_P = batch.id_pairs()
    return segment_sum(v_BD.index_select(0, behaviour_P), sample_P, batch.n_samples) / (1.0 - batch.dropout_rate)
