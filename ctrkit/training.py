"""The training loop: Adam on the dense layers, row-wise Adam on the ID tables, validation by GAUC, checkpoints.

What a step does depends on parameters, moments and batch alone, and the batch on the seed, the epoch and its number in
the epoch. So a run that goes on from a checkpoint ends, on a CPU, in the same bytes as one that was never stopped.
"""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ctrkit import compiling
from ctrkit.ahead import ahead, yield_cores
from ctrkit.bad_batches import BadBatch
from ctrkit.batches import GroupedData
from ctrkit.checkpoints import Checkpoint, Checkpoints
from ctrkit.collate import Collator
from ctrkit.errors import UserError
from ctrkit.feature_cache import Uses
from ctrkit.feature_service import Rows, gather
from ctrkit.gauc import gauc
from ctrkit.modelfile import Counts, TrainedModel
from ctrkit.models import threads
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.compiled_layers import loops
from ctrkit.models.pairs import counts_repeats
from ctrkit.preparing import prepared
from ctrkit.progress import Meter, say
from ctrkit.ranks import ALONE, ToldByFirst
from ctrkit.scoring import all_scores
from ctrkit.tensorboard import Board
from ctrkit.watching import Watch, nobody

CHECK_STEPS = 50
"""Steps on a GPU between looks at whether loss and gradient were finite, each of which waits for the device."""
VALIDATION_BATCH = 4096
AHEAD = 3
"""Batches whose ids and pictures are looked up while one is trained on, besides those of `ctrkit.preparing`."""


@dataclass
class Mean:
    """A mean over samples, summed up on the model's device."""

    total: Tensor
    """[] float64."""
    samples: int = 0

    @property
    def value(self) -> float:
        """The mean. Waits for the device."""
        return float(self.total) / self.samples

    def add(self, loss: Tensor, samples: int) -> None:
        """Count the mean loss [] of so many samples more."""
        self.total += loss * samples
        self.samples += samples

    def clear(self) -> None:
        """Begin anew."""
        self.total.zero_()
        self.samples = 0


@dataclass
class Trainer:
    """Everything that moves while a model is trained.

    Where several ranks train it (`model.service`), all do the same, each on its share of every batch: losses, counts,
    decisions and records are the same on all, rank 0 writes.
    """

    model: TrainedModel
    counts: Counts
    train: GroupedData
    valid: GroupedData | None
    valid_users: np.ndarray[Any, Any] | None
    """The raw user of each validation sample, in order; integers or text. Of several ranks rank 0 needs them."""
    checkpoints: Checkpoints | None = None
    """Where the state is kept. Default: a temporary folder, which goes when training ends."""
    tensorboard: Path | None = None
    """Folder for scalars."""
    bad_batch: Path | None = None
    """Parquet file to be written if loss or gradient are not finite: the batch whose were not."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""
    output: Path | None = None
    """Whose curves they are: those of an earlier training of the same output give way."""
    watch: Watch = nobody
    """Is told each record; of a training that goes on from a checkpoint, the earlier ones too. Rank 0 does it."""

    def __post_init__(self) -> None:
        self.config = self.model.plan.train
        self.service = self.model.service
        self.ranks = self.service.parallel.ranks if self.service else ALONE
        self.collate = Collator(
            self.model.plan,
            self.model.tables,
            self.model.pictures,
            self.counts,
            self.config.unknown_rate,
            rows_only=True,
            distinct=self._counts_repeats,
        )
        self.widths = {n: self.model.plan.width(n) for n in self.model.plan.ids}
        weights = [p for p in self.model.network.parameters() if p.ndim > 1]
        others = [p for p in self.model.network.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.config.weight_decay},
            {"params": others},
        ]
        self.adam = compiling.Adam([g for g in groups if g["params"]], lr=self.config.learning_rate, fused=True)
        self.network: nn.Module = self.model.network
        if self.config.compile:
            self.network = compiling.compiled(self.model.network, self.model.device)
        if self.service is not None:
            self.network = self.service.parallel.wrap(self.network)
        self.steps = self.samples = 0
        self.epoch = self.batch = 0
        """Epochs that are done, and batches of the present one."""
        self.best: tuple[int, float] | None = None
        """Step and validation GAUC of the best model so far."""
        self.waited = 0
        """Validations since."""
        self.check_steps = 1 if self._device.type == "cpu" else CHECK_STEPS
        self._saved = time.monotonic()
        self.overdue = self._zero()
        """Not zero where rank 0 finds that the last checkpoint is too old."""
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self._device)
        """The first step whose loss or gradient was not finite; from then on nothing is updated."""
        self.gradient_norm = self._zero()
        self.loss, self.logged = Mean(self._zero()), Mean(self._zero())
        """Since the last validation, and since the last line of metrics.jsonl that is none."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of the validations."""
        return [record for record in self.records if "valid_gauc" in record]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        return self.epoch >= self.config.epochs or 0 < self.config.patience <= self.waited

    def run(self) -> TrainedModel:
        """Train to the end; return the model with the best validation GAUC (the last without one).

        Raises UserError for a loss or a gradient that is not finite, Resumable where a checkpoint finds no room.
        """
        n_samples = len(self.train)
        batches = -(-n_samples // self.config.batch)
        if not batches:
            raise UserError("the training days have no sample; [split] in the recipe decides which days train")
        with (
            self._somewhere(),
            self._threads(),
            Meter(
                "train", n_samples * self.config.epochs, "samples", done=self.samples, quiet=not self._first
            ) as meter,
            Board(self.tensorboard if self._first else None, self.steps, self.output) as board,
        ):
            self._saved = time.monotonic()
            self._told = self._saved, self.samples
            self._uses = self.model.pictures.cache.uses() if self.model.pictures else Uses()
            for record in self.records:
                self._tell(record)
            while not self.finished:
                for batch in self._batches():
                    self._count(self.step(batch), batch.n_total)
                    meter.add(batch.n_total)
                    ended = self.batch == batches
                    if self.steps % self.check_steps == 0:
                        self._check_finite()
                    if _due(self.steps, self.config.log_every):
                        self._log(board, meter)
                    better = False
                    if ended or _due(self.steps, self.config.evaluate_every):
                        better = self._evaluate(board)
                    if ended:
                        self.epoch, self.batch = self.epoch + 1, 0
                    if ended or better or self._is_overdue():
                        self._save()
                    if self.finished:
                        break
            if self.best is not None and self.best[0] != self.steps:
                self._take_over(self.best[0])
                if self.service is not None:
                    self.ranks.gather(None)  # before rank 0 removes the checkpoint
        return self.model

    def resume(self, last: Checkpoint) -> None:
        """Go on from a checkpoint, bit for bit. Call before `run`."""
        self._take_over(last.step)
        progress = last.progress
        self.steps, self.samples = last.step, progress["samples"]
        self.epoch, self.batch = progress["epoch"], progress["batch"]
        self.best = None if last.best is None else (last.best, progress["best"])
        self.waited, self.records = progress["waited"], progress["records"]
        for mean, (total, samples) in ((self.loss, progress["loss"]), (self.logged, progress["logged"])):
            mean.total.fill_(total)
            mean.samples = samples
        epoch = min(self.epoch + 1, self.config.epochs)
        if not self._first:
            return
        say(f"train: going on after step {self.steps:,}, in epoch {epoch} of {self.config.epochs}")

    def step(self, batch: Batch) -> Tensor:
        """Take one optimiser step on a batch; return its mean loss []. Does not wait for the device."""
        learning_rate = self.config.learning_rate * self.config.decay ** (self.steps // self.config.decay_steps)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        own, rows = gather(self.model.tables, batch)
        logit_S = self._forward_S(batch, rows)
        loss_S = nn.functional.binary_cross_entropy_with_logits(
            logit_S, batch.click_S.to(logit_S.dtype), reduction="none"
        )
        loss = loss_S.sum() / batch.n_total
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.steps += 1
        self.samples += batch.n_total
        loss = loss.detach()
        # The gradient of the data: the regularisers join it later, in the optimisers.
        if self.service is None:
            self.gradient_norm = self._norm([r.weight_MD for r in own.values()])
        else:
            over_ranks = self._over_ranks(loss, own)  # and while they sum that, they merge rows
            own = self.service.merge(batch, own)
            loss, self.gradient_norm = over_ranks(own)
        frozen = self._freeze(loss, self.gradient_norm)
        if self.config.clip_norm:
            with_gradient = [*self.model.network.parameters(), *(r.weight_MD for r in own.values())]
            nn.utils.clip_grads_with_norm_(with_gradient, self.config.clip_norm, self.gradient_norm)
        self.adam.found_inf = frozen.float()  # type: ignore[attr-defined]
        self.adam.step()
        for w, updated in own.items():
            # Row 0 is padding, and stays zero whatever the gradient.
            own_or_none = torch.where(frozen, 0, updated.local)
            how = self.config.regularisation, self.config.regularisation_strength
            self.model.tables[w].update(own_or_none, updated.weight_MD, learning_rate, *how)
        return loss

    def _norm(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the norm [] of the gradient of the dense parameters and of these rows together."""
        leaves = [*self.model.network.parameters(), *rows]
        return nn.utils.get_total_norm([p.grad for p in leaves if p.grad is not None])

    def _over_ranks(
        self, loss: Tensor, own: Mapping[int, Rows]
    ) -> Callable[[Mapping[int, Rows]], tuple[Tensor, Tensor]]:
        """Begin to sum what the ranks have of loss and gradient, and to hear from rank 0 whether a checkpoint is
        overdue: a collective. Return what ends it and, given the rows that are updated here, returns the loss [] over
        all ranks and the norm [] of the gradient, the same on all."""
        assert self.service is not None
        tables = self.model.tables
        spread = [r.weight_MD.grad for w, r in own.items() if tables[w].sharded and r.weight_MD.grad is not None]
        squares = [g.double().square().sum() for g in spread]
        overdue = self._first and self._minutes >= self.config.checkpoint_minutes
        mine = torch.stack([loss.double(), sum(squares, self._zero()), self._zero() + overdue])
        summed = self.service.parallel.begin_sum(mine)

        def ended(updated: Mapping[int, Rows]) -> tuple[Tensor, Tensor]:
            total, square, self.overdue = summed().unbind()
            here = self._norm([r.weight_MD for w, r in updated.items() if not tables[w].sharded]).double()
            return total.to(loss.dtype), (here.square() + square).sqrt().to(loss.dtype)

        return ended

    @property
    def _minutes(self) -> float:
        """Since the last checkpoint."""
        return (time.monotonic() - self._saved) / 60

    def _is_overdue(self) -> bool:
        """Say whether the last checkpoint is too old: the same on all ranks. There it may wait for the device."""
        if self.service is None:
            return self._minutes >= self.config.checkpoint_minutes
        return self.steps % self.check_steps == 0 and bool(self.overdue)

    def _forward_S(self, batch: Batch, rows: Mapping[int, Tensor]) -> Tensor:
        """Return the log-odds [S] of a batch, in training."""
        mixed = self.config.precision == "bfloat16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=mixed):
            logit_S: Tensor = self.network(batch, Lookup(batch, rows, self.widths))
        return logit_S.float() if mixed else logit_S

    def _batches(self) -> Iterator[Batch]:
        """Yield what is left of the epoch, on the model's device."""
        self.model.network.train()
        made = ahead(self._made((self.config.seed, self.epoch), self.batch), AHEAD)
        yield from prepared(self.model, made, training=True)

    def _made(self, seed: tuple[int, int], skip: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, on the CPU, in a thread of their own."""
        torch.set_num_threads(1)  # of this thread: the others are training
        yield_cores()
        for own, samples in self.train.shares(self.config.batch, self.ranks, seed, skip):
            batch = self.collate(own, seed)
            batch.total = samples
            yield batch

    def _count(self, loss: Tensor, samples: int) -> None:
        self.batch += 1
        self.loss.add(loss, samples)
        self.logged.add(loss, samples)

    def _freeze(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Return [] bool, on the device: whether this step or an earlier one had a loss or a gradient that is not
        finite. Nothing may be updated then, so that the bad batch can be looked at as it was seen."""
        bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm))
        self.bad_step = torch.where((self.bad_step < 0) & bad, self.steps, self.bad_step)
        return self.bad_step >= 0

    def _check_finite(self) -> None:
        """Raise UserError if some step's loss or gradient was not finite. Waits for the device."""
        step = int(self.bad_step)
        if step < 0:
            return
        seed = (self.config.seed, self.epoch)
        number = self.batch - 1 - (self.steps - step)  # in the epoch: checked at its end at the latest
        block, samples = next(self.train.shares(self.config.batch, self.ranks, seed, skip=number))
        made = self.collate(block, seed)
        made.total = samples
        [batch] = prepared(self.model, [made], training=True)
        self.model.network.train()
        self.adam.zero_grad()
        own, rows = gather(self.model.tables, batch)
        logit_S = self._forward_S(batch, rows)
        click_S = batch.click_S.to(logit_S.dtype)
        loss_S = nn.functional.binary_cross_entropy_with_logits(logit_S, click_S, reduction="none")
        (loss_S.sum() / batch.n_total).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in self.model.network.named_parameters() if p.grad is not None}
        for w, r in own.items():
            if r.weight_MD.grad is not None:
                gradients[f"the ids of width {w}"] = r.weight_MD.grad
        found = BadBatch(step, self._epoch_number, block, logit_S.detach().cpu(), loss_S.detach().cpu(), gradients)
        if self.service is not None:
            of_ranks = self.ranks.gather_first(found.brief())
            if not self._first:
                raise ToldByFirst
            found = BadBatch.merged(of_ranks)
        raise found.error(self.config, self.bad_batch)

    def _log(self, board: Board, meter: Meter) -> None:
        """Write a line of metrics.jsonl and points of TensorBoard on the training since the last."""
        self._check_finite()
        now, (then, samples_then) = time.monotonic(), self._told
        record = {
            "step": self.steps,
            "epoch": self._epoch_number,
            "samples": self.samples,
            "loss": self.logged.value,
            "learning_rate": self.adam.param_groups[0]["lr"],
        }
        self.records.append(record)
        self._tell(record)
        self.logged.clear()
        meter.add(0, f"loss {record['loss']:.4f}")
        point = {"train/loss": record["loss"], "train/learning_rate": record["learning_rate"]}
        point |= {"train/gradient_norm": float(self.gradient_norm), "train/epoch": record["epoch"]}
        rate = (self.samples - samples_then) / max(now - then, 1e-9)
        board.add(self.steps, {**point, "train/samples_per_second": rate, **self._feature_points()})
        self._told = now, self.samples

    def _tell(self, record: Mapping[str, Any]) -> None:
        if self._first:
            self.watch(record)

    def _feature_points(self) -> dict[str, float | None]:
        """Return points of TensorBoard on how picture features were read since the last ones, here."""
        if self.model.pictures is None:
            return {}
        before, self._uses = self._uses, self.model.pictures.cache.uses()
        rows, from_disk = self._uses.rows - before.rows, self._uses.from_disk - before.from_disk
        waited = self._uses.seconds_waited - before.seconds_waited
        return {"features/hit_rate": 1 - from_disk / rows if rows else None, "features/seconds_waited": waited}

    def _evaluate(self, board: Board) -> bool:
        """Validate; say whether this is the best model so far."""
        self._check_finite()
        record: dict[str, Any] = {
            "step": self.steps,
            "epoch": self._epoch_number,
            "samples": self.samples,
            "loss": self.loss.value,
            "valid_loss": None,
            "valid_gauc": None,
            "learning_rate": self.adam.param_groups[0]["lr"],
        }
        if self.valid is not None:
            record["valid_loss"], record["valid_gauc"] = self._validate(self.valid)
            self.model.network.train()
        self.loss.clear()
        self.records.append(record)
        self._tell(record)
        board.add(self.steps, {"valid/loss": record["valid_loss"], "valid/gauc": record["valid_gauc"]})
        value = record["valid_gauc"]
        if value is None:
            return False
        if self.best is None or value > self.best[1]:
            self.best, self.waited = (self.steps, value), 0
            return True
        self.waited += 1
        return False

    def _validate(self, data: GroupedData) -> tuple[float, float | None]:
        """Return mean log loss and GAUC over a split. Rank 0 holds 9 bytes a sample: its user, click and score."""
        score_S, click_S = all_scores(self.model, data, VALIDATION_BATCH)
        try:
            judged = self._judged(click_S, score_S) if self._first else None
        except UserError:
            self.ranks.tell()
            raise
        if (told := self.ranks.tell(judged)) is None:
            raise ToldByFirst
        loss, value = told
        return loss, value

    def _judged(self, click_S: np.ndarray[Any, Any], score_S: np.ndarray[Any, Any]) -> tuple[float, float | None]:
        """Return mean log loss and GAUC."""
        assert self.valid_users is not None
        if not np.isfinite(score_S).all():
            raise UserError(
                f"some validation scores of step {self.steps} are not finite. Lower [train] learning_rate (now "
                f"{self.config.learning_rate:g}), or look for extreme values in the picture features with "
                "`ctrkit inspect`."
            )
        loss = 0.0
        for begin in range(0, len(score_S), VALIDATION_BATCH):
            part = slice(begin, begin + VALIDATION_BATCH)
            p = np.clip(score_S[part].astype(np.float64), 1e-7, 1 - 1e-7)
            loss -= float(np.where(click_S[part] == 1, np.log(p), np.log1p(-p)).sum())
        return loss / len(score_S), gauc(self.valid_users, click_S, score_S).value

    def _save(self) -> None:
        """Write a checkpoint: all that later steps depend on. Rank 0 does, and each rank its rows of spread tables."""
        self._check_finite()
        assert self.checkpoints is not None
        progress = {
            "samples": self.samples,
            "epoch": self.epoch,
            "batch": self.batch,
            "best": None if self.best is None else self.best[1],
            "waited": self.waited,
            "loss": [float(self.loss.total), self.loss.samples],
            "logged": [float(self.logged.total), self.logged.samples],
            "records": self.records,
        }
        spread = {name: of for name, of in self.model.matrices().items() if of[0].sharded}
        write_tables = functools.partial(_spread_tables().write, self.ranks, spread) if spread else None
        if self._first:
            tensors = {
                **self.model.tensors(spread=False),
                **self.optimiser_state(spread=False),
                **self._random_state(),
            }
            best = None if self.best is None else self.best[0]
            self.checkpoints.save(self.steps, tensors, progress, best, write_tables)
        elif write_tables is not None:
            write_tables()
        self.ranks.tell()  # none goes on, perhaps to read it, before it is there
        self._saved = time.monotonic()

    def optimiser_state(self, *, spread: bool = True) -> dict[str, Tensor]:
        """Return the optimisers' state by name: `adam.PARAMETER.exp_avg`, `.exp_avg_sq`, `.step`, and
        `table.WIDTH.m`, `.v`, `.step`; of spread tables as `TrainedModel.moments`."""
        out = {
            f"adam.{name}.{kind}": tensor
            for name, p in self.model.network.named_parameters()
            for kind, tensor in self.adam.state.get(p, {}).items()
        }
        return out | self.model.moments(spread=spread)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def _take_over(self, step: int) -> None:
        """Set model, optimisers and random state to those of a checkpoint."""
        assert self.checkpoints is not None
        state = self.checkpoints.read(step)
        self.model.load_state(state)
        self.model.load_moments(state)
        if spread := {name: of for name, of in self.model.matrices().items() if name not in state}:
            _spread_tables().read(self.checkpoints.tables(step), spread)
        for name, p in self.model.network.named_parameters():
            kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"adam.{name}.{kind}" in state]
            self.adam.state[p] = {kind: state[f"adam.{name}.{kind}"].clone().to(p.device) for kind in kinds}
        torch.set_rng_state(state["random.cpu"].clone())
        if "random.cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"].clone(), self._device)

    def _threads(self) -> contextlib.AbstractContextManager[None]:
        """Have threads of ours share out the work, where compiled loops do what torch's threads would."""
        return threads.own(self.config.threads) if self._by_loops else contextlib.nullcontext()

    @property
    def _by_loops(self) -> bool:
        """Whether compiled loops do what they can."""
        plain = self.config.compile or self.config.precision == "bfloat16"
        return not plain and loops(next(self.model.network.parameters())) is not None

    @property
    def _counts_repeats(self) -> bool:
        """Whether the model compares ids by a unit that can be told how often each behaviour is there."""
        unit = getattr(self.model.network, "id_unit", None)
        return self._by_loops and unit is not None and counts_repeats(unit)

    @contextlib.contextmanager
    def _somewhere(self) -> Iterator[None]:
        """Have a folder for checkpoints within the block."""
        if self.checkpoints is not None:
            yield
            return
        own = tempfile.TemporaryDirectory(prefix="ctrkit-") if self._first else contextlib.nullcontext()
        with own as folder:
            self.checkpoints = Checkpoints(Path(self.ranks.tell(folder)))
            try:
                yield
            finally:
                self.checkpoints = None

    @property
    def _device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def _first(self) -> bool:
        """Whether this rank writes, and tells what goes on."""
        return self.ranks.rank == 0

    @property
    def _epoch_number(self) -> int:
        return self.epoch + 1

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device)


def _spread_tables() -> ModuleType:
    """Import `ctrkit.spread_tables` where it is needed: it takes two seconds."""
    from ctrkit import spread_tables

    return spread_tables


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def sample_users(data: GroupedData) -> np.ndarray[Any, Any]:
    """Return [S]: an integer for the raw user of each sample, in the order of the groups."""
    frames = [f.select(pl.col("user"), n=pl.col("sample_id").list.len()) for f in data.frames(["user", "sample_id"])]
    table = pl.concat(frames)
    codes = table["user"].rank("dense").to_numpy()
    return np.repeat(codes, table["n"].to_numpy())


def metrics_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """Return `metrics.jsonl`: one JSON object a record."""
    return "".join(json.dumps(record) + "\n" for record in records)
