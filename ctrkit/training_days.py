"""Which of the training days a model learns from: `[train] first_day` and `last_day`."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.batches import GroupedData, Schema
from ctrkit.errors import UserError
from ctrkit.grouping import count_samples
from ctrkit.recipe import Train

Span = tuple[datetime.date, datetime.date]
"""The first and the last day, both included."""
Counts = dict[str, npt.NDArray[np.int64]]


def days_of(groups: Path, split: str) -> list[datetime.date]:
    """Return the days that a split of a groups folder has, in order."""
    files = sorted((groups / split).glob("part-*.parquet"))
    return pl.scan_parquet(files).select(pl.col("day").unique().sort()).collect()["day"].to_list() if files else []


def choose(train: Train, days: Sequence[datetime.date]) -> Span:
    """Return the first and the last of the training `days` that `first_day` and `last_day` leave.

    Raises UserError where they leave none.
    """
    if not days:
        raise UserError("the groups' folder has no train split; [split] in the recipe decides which days it has")
    first, last = _date(train.first_day, days), _date(train.last_day, days)
    chosen = [d for d in days if (first is None or d >= first) and (last is None or d <= last)]
    if not chosen or first is None or last is None:
        raise UserError(
            f"[train] first_day = {train.first_day} and last_day = {train.last_day} leave no day to train on: the "
            f"groups have {len(days)} training days, {days[0]} to {days[-1]}. A number counts training days from 1, or "
            "from the end with a minus; a date takes itself."
        )
    return chosen[0], chosen[-1]


def _date(day: int | datetime.date, days: Sequence[datetime.date]) -> datetime.date | None:
    """Return the date of a training day; None if there are not so many."""
    if isinstance(day, datetime.date):
        return day
    at = day - 1 if day > 0 else len(days) + day
    return days[at] if 0 <= at < len(days) else None


def read_counts(groups: Path, schema: Schema, span: Span) -> Counts:
    """Return vocabulary → [size] n_i: the training samples of these days that contain each index."""
    counts = {vocab: np.zeros(size, np.int64) for vocab, size in schema.vocab_sizes.items()}
    for frame in GroupedData(groups, "train", [], span).frames(["sample_id", *schema.features]):
        samples = frame["sample_id"].list.len().to_numpy().astype(np.int64)
        for vocab, size in schema.vocab_sizes.items():
            features = {n: f for n, f in schema.features.items() if f.vocab == vocab}
            counts[vocab] += count_samples(frame, samples, features, size).view(np.int64)
    return counts
