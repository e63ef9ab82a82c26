"""The training loop: Adam on the dense layers, row-wise Adam on the ID tables, validation by GAUC."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ctrkit.batches import GroupedData
from ctrkit.collate import Collator
from ctrkit.errors import UserError
from ctrkit.gauc import gauc
from ctrkit.modelfile import Counts, TrainedModel
from ctrkit.models.batch import Batch, Lookup
from ctrkit.progress import Meter
from ctrkit.scoring import scores


@dataclass
class Trainer:
    """Everything that moves while a model is trained."""

    model: TrainedModel
    counts: Counts
    train: GroupedData
    valid: GroupedData | None
    valid_users: np.ndarray[Any, Any] | None
    """The raw user of each validation sample, in order; integers or text."""
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.model.plan.train
        self.collate = Collator(
            self.model.plan, self.model.tables, self.model.pictures, self.counts, self.config.unknown_rate
        )
        self.widths = {n: self.model.plan.width(n) for n in self.model.plan.ids}
        weights = [p for p in self.model.network.parameters() if p.ndim > 1]
        others = [p for p in self.model.network.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": others},
        ]
        self.adam = torch.optim.Adam([g for g in groups if g["params"]], lr=self.config.learning_rate, fused=True)
        self.steps = self.samples = 0

    def run(self) -> TrainedModel:
        """Train for the recipe's epochs; return the model with the best validation GAUC (the last without one)."""
        best: tuple[float, dict[str, Tensor]] | None = None
        waited = 0
        total = len(self.train) * self.config.epochs
        with Meter("train", total, "samples") as meter:
            for loss in self._losses(meter):
                record = self._evaluate(loss)
                value = record["valid_gauc"]
                if value is None:
                    continue
                if best is None or value > best[0]:
                    best, waited = (value, self.model.state()), 0
                else:
                    waited += 1
                    if self.config.patience and waited >= self.config.patience:
                        break
        if best is not None:
            self.model.load_state(best[1])
        return self.model

    def _losses(self, meter: Meter) -> Iterator[float]:
        """Train, and yield the mean loss since the last time whenever an evaluation is due."""
        total_loss, n_samples = self._nothing(), 0
        self.model.network.train()
        for epoch in range(self.config.epochs):
            self.epoch = epoch
            for block in self.train.epoch(self.config.batch, seed=(self.config.seed, epoch)):
                batch = self.collate(block, seed=(self.config.seed, epoch)).to(self.model.device)
                total_loss += self.step(batch) * batch.n_samples
                n_samples += batch.n_samples
                meter.add(batch.n_samples)
                every = self.config.evaluate_every
                if every and self.steps % every == 0:
                    yield self._mean(total_loss, n_samples)
                    total_loss, n_samples = self._nothing(), 0
                    self.model.network.train()
            if n_samples:
                yield self._mean(total_loss, n_samples)
                total_loss, n_samples = self._nothing(), 0
                self.model.network.train()

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.model.device)

    def _mean(self, total: Tensor, n: int) -> float:
        loss = float(total) / n
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss is not finite by step {self.steps}. Lower [train] learning_rate, or look for "
                "extreme values in the picture features with `ctrkit inspect`."
            )
        return loss

    def step(self, batch: Batch) -> Tensor:
        """Take one optimiser step on a batch; return its mean loss."""
        learning_rate = self.config.learning_rate * self.config.decay ** (self.steps // self.config.decay_steps)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        tables = self.model.tables
        rows = {w: tables[w].gather(r) for w, r in batch.rows.items()}
        logit_S = self.model.network(batch, Lookup(batch, rows, self.widths))
        loss = nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S)
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        for w, r in batch.rows.items():
            tables[w].update(r, rows[w], learning_rate, self.config.regularisation, self.config.regularisation_strength)
        self.steps += 1
        self.samples += batch.n_samples
        return loss.detach()

    def _evaluate(self, loss: float) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": self.steps,
            "epoch": self.epoch + 1,
            "samples": self.samples,
            "loss": loss,
            "valid_loss": None,
            "valid_gauc": None,
            "learning_rate": self.adam.param_groups[0]["lr"],
        }
        if self.valid is not None and self.valid_users is not None:
            parts = list(scores(self.model, self.valid, 4096))
            click = np.concatenate([np.asarray(b.sample["click"]) for b, _ in parts])
            score = np.concatenate([s for _, s in parts])
            p = np.clip(score.astype(np.float64), 1e-7, 1 - 1e-7)
            record["valid_loss"] = float(-np.mean(np.where(click == 1, np.log(p), np.log1p(-p))))
            record["valid_gauc"] = gauc(self.valid_users, click, score).value
        self.history.append(record)
        return record


def sample_users(data: GroupedData) -> np.ndarray[Any, Any]:
    """Return [S]: an integer for the raw user of each sample, in the order of the groups."""
    frames = [f.select(pl.col("user"), n=pl.col("sample_id").list.len()) for f in data.frames(["user", "sample_id"])]
    table = pl.concat(frames)
    codes = table["user"].rank("dense").to_numpy()
    return np.repeat(codes, table["n"].to_numpy())


def history_lines(history: list[dict[str, Any]]) -> str:
    """Return `history.jsonl`: one JSON object an evaluation."""
    return "".join(json.dumps(record) + "\n" for record in history)


def write_tensorboard(history: list[dict[str, Any]], folder: Path) -> None:
    """Write the history as TensorBoard scalars."""
    from torch.utils.tensorboard.writer import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(log_dir=str(folder)) as writer:
        for record in copy.deepcopy(history):
            step = record.pop("step")
            for name, value in record.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
