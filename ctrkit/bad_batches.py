"""A batch whose loss or gradient was not finite: kept as a Parquet file, and told as an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ctrkit import files
from ctrkit.batches import Block, Column, Ragged
from ctrkit.errors import UserError
from ctrkit.recipe import Train


@dataclass(frozen=True)
class BadBatch:
    """A batch as the model saw it, before anything was updated."""

    step: int
    epoch: int
    """From 1."""
    block: Block
    logit_S: Tensor
    loss_S: Tensor
    """Cross-entropy of each sample."""
    gradients: Mapping[str, Tensor]
    """By parameter."""

    def brief(self) -> "BadBatch":
        """Return it with one number a gradient, which is as finite as this is."""
        return replace(self, gradients={name: g.detach().sum().cpu() for name, g in self.gradients.items()})

    @classmethod
    def merged(cls, shares: Sequence["BadBatch"]) -> "BadBatch":
        """Return the batch of which several ranks had a share each."""
        gradients: dict[str, Tensor] = {}
        for share in shares:
            for name, g in share.gradients.items():
                gradients[name] = gradients.get(name, torch.zeros_like(g)) + g
        block = Block.concat([share.block for share in shares])
        logit_S, loss_S = (torch.cat([getattr(s, name) for s in shares]) for name in ("logit_S", "loss_S"))
        return cls(shares[0].step, shares[0].epoch, block, logit_S, loss_S, gradients)

    def table(self) -> pl.DataFrame:
        """Return one row a sample: `sample_id` Int64, `click` Int8, `score` and `loss` Float32 (or what the model
        computes in), `group_id` Int64, and the index or the list of indexes of each feature."""
        block = self.block
        group_S = np.repeat(np.arange(block.n_groups), np.diff(block.sample_offsets))
        sample = {name: _series(column) for name, column in block.sample.items()}
        group = {name: _series(column)[group_S] for name, column in block.group.items()}
        history = {
            name: _series(Ragged(np.asarray(column), block.behaviour_offsets))[group_S]
            for name, column in block.behaviour.items()
        }
        numbers = {"score": torch.sigmoid(self.logit_S).numpy(), "loss": self.loss_S.numpy()}
        table = pl.DataFrame({**sample, **numbers, **group, **history})
        first = ["sample_id", "click", "score", "loss", "group_id"]
        return table.select(*first, pl.exclude(first)).with_columns(pl.col("click").cast(pl.Int8))

    def what(self) -> str:
        """Say what is not finite."""
        loss = float(self.loss_S.mean())
        if not np.isfinite(loss):
            n = int((~torch.isfinite(self.loss_S)).sum())
            return f"the loss is {loss} (not finite for {n:,} of {len(self.loss_S):,} samples)"
        wrong = [name for name, gradient in self.gradients.items() if not torch.isfinite(gradient).all()]
        if wrong:
            more = f" and of {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
            return f"the gradient of {wrong[0]}{more} is not finite"
        return "the norm of the gradient is too large for a float"

    def error(self, config: Train, path: Path | None) -> UserError:
        """Return the user's error, after writing the batch to `path`."""
        kept = ""
        if path is not None:
            try:
                with files.atomic(path) as tmp:
                    self.table().write_parquet(tmp)
            except OSError as e:
                return files.cannot_write(path, e)
            kept = f" {path} has the batch: samples, labels, scores, ids (`ctrkit inspect` shows it)."
        return UserError(
            f"training stopped at step {self.step:,}, in epoch {self.epoch}: {self.what()}. The model was left as "
            f"before it.{kept} Lower [train] learning_rate (now {config.learning_rate:g}), set clip_norm, or look for "
            "extreme values in the picture features with `ctrkit inspect`."
        )


def _series(column: Column) -> pl.Series:
    if not isinstance(column, Ragged):
        return pl.Series(column)
    lists: list[Any] = [
        column.values[a:b].tolist() for a, b in zip(column.offsets[:-1], column.offsets[1:], strict=True)
    ]
    return pl.Series(lists, dtype=pl.List(pl.Int64))
