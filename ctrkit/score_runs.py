"""What the order of all scores tells: AUC, log loss, calibration and ECE, of files larger than memory.

Each chunk of rows is sorted by score and reduced to one entry a distinct score (its rows, its clicks), which goes to a
temporary file. The entries are then merged range by range of the scores. All sums but those of logarithms and of scores
are of integers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ctrkit.exchange import Scratch
from ctrkit.gauc import ordered

RANGE_ENTRIES = 1_000_000
"""Entries merged at a time, about; of more than a hundred times as many, up to `MOST_TIMES` as many."""
MOST_TIMES = 2
SAMPLE_EVERY = 512
"""One entry in so many is remembered, to cut the scores into ranges of like size."""
Ints = NDArray[np.int64]
Map = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


@dataclass(frozen=True)
class ScoreStatistics:
    """Of all rows; sums are over rows. `log_likelihood` and the bins mean something for probabilities only."""

    impressions: int
    clicks: int
    lowest: float
    highest: float
    auc: float | None
    """Ties averaged; None without both classes."""
    log_likelihood: float
    """Σ log of the probability given to what happened, in nats, probabilities clipped."""
    predicted_of: NDArray[np.float64]
    """Σ scores in each bin of equally many rows; equal scores share a bin. [bins]"""
    clicks_of: Ints
    """Clicks in each bin. [bins]"""
    rows_of: Ints
    """Rows in each bin. [bins]"""


@dataclass(frozen=True)
class _Run:
    """Where a sorted run of entries lies."""

    entries: int
    places: tuple[int, int, int]
    """Offsets of values, rows and clicks."""
    dtypes: tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]]
    sample: NDArray[Any]
    """Every `SAMPLE_EVERY`th value, from the first."""


class ScoreRuns:
    """The scores and labels of one set of rows, in sorted runs."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._runs: dict[tuple[int, ...], _Run] = {}

    def add(self, place: tuple[int, ...], score: NDArray[Any], label: NDArray[np.bool_]) -> None:
        """Add a chunk of finite scores and their labels, both [n]; `place` orders the chunks."""
        if len(score) == 0:
            return
        value, rows, clicks = _reduced(*_sorted(ordered(score), label))
        columns = value, _small(rows), _small(clicks)
        self._runs[place] = _Run(
            len(value),
            tuple(self._scratch.append(c) for c in columns),  # type: ignore[arg-type]
            tuple(c.dtype for c in columns),  # type: ignore[arg-type]
            value[::SAMPLE_EVERY].copy(),
        )

    def statistics(self, bins: int, smallest: float, side_by_side: Map = map) -> ScoreStatistics | None:
        """Merge all runs; None if no row was added. `smallest`: probabilities are clipped to it and to 1 less it."""
        runs = [self._runs[place] for place in sorted(self._runs)]
        if not runs:
            return None
        samples = np.sort(np.concatenate([r.sample for r in runs]))
        entries_of_all = sum(r.entries for r in runs)
        ranges = max(1, entries_of_all // min(max(RANGE_ENTRIES, entries_of_all // 100), MOST_TIMES * RANGE_ENTRIES))
        bounds = np.unique(samples[np.arange(1, ranges) * len(samples) // ranges])
        bounds = bounds[bounds > samples[0]]  # so that no range is empty: each begins with an entry
        cuts = [np.array([0, *(self._position(r, b) for b in bounds), r.entries]) for r in runs]

        def entries(number: int, column: int) -> NDArray[Any]:
            parts = []
            for run, cut in zip(runs, cuts, strict=True):
                out = np.empty(cut[number + 1] - cut[number], run.dtypes[column])
                self._scratch.read_into(out, run.places[column] + int(cut[number]) * out.itemsize)
                parts.append(out if column == 0 else out.astype(np.uint32, copy=False))
            return np.concatenate(parts)

        def total(number: int) -> tuple[int, int]:
            return int(entries(number, 1).sum(dtype=np.int64)), int(entries(number, 2).sum(dtype=np.int64))

        totals = np.array(list(side_by_side(total, range(len(bounds) + 1))), np.int64)
        n, clicks = (int(x) for x in totals.sum(axis=0))
        rows_before = np.cumsum(totals[:, 0]) - totals[:, 0]
        clicks_before = np.cumsum(totals[:, 1]) - totals[:, 1]
        edges = np.arange(1, bins) * n // bins

        def merged(number: int) -> tuple[int, float, NDArray[np.float64], Ints, float, float, Ints]:
            value, rows, clicked = _merged(*(entries(number, column) for column in range(3)))
            others = rows - clicked
            before = np.cumsum(others) - others + int(rows_before[number] - clicks_before[number])
            half_wins = int((clicked * (2 * before + others)).sum())
            score = _scores(value)
            p = np.clip(score, smallest, 1.0 - smallest)
            log_likelihood = float(clicked @ np.log(p) + others @ np.log(1.0 - p))
            # A score is in the bin of the edges that it reaches: those of ranks below the end of its rows.
            ends = np.searchsorted(np.cumsum(rows), edges - int(rows_before[number]), side="right")
            bounds_of = np.array([0, *ends, len(rows)])
            parts = [slice(a, b) for a, b in pairwise(bounds_of)]
            predicted = np.array([score[part] @ rows[part] for part in parts])
            observed = np.array([clicked[part].sum() for part in parts])
            held = np.array([rows[part].sum() for part in parts])
            return half_wins, log_likelihood, predicted, observed, float(score[0]), float(score[-1]), held

        parts = list(side_by_side(merged, range(len(bounds) + 1)))
        pairs = clicks * (n - clicks)
        return ScoreStatistics(
            impressions=n,
            clicks=clicks,
            lowest=parts[0][4],
            highest=parts[-1][5],
            auc=sum(p[0] for p in parts) / (2 * pairs) if pairs else None,
            log_likelihood=sum(p[1] for p in parts),
            predicted_of=np.sum([p[2] for p in parts], axis=0),
            clicks_of=np.sum([p[3] for p in parts], axis=0),
            rows_of=np.sum([p[6] for p in parts], axis=0),
        )

    def _position(self, run: _Run, bound: Any) -> int:
        """Return how many values of a run lie below a bound."""
        block = int(np.searchsorted(run.sample, bound, side="left"))  # the first sampled value that does not
        if block == 0:
            return 0
        begin = (block - 1) * SAMPLE_EVERY
        out = np.empty(min(SAMPLE_EVERY, run.entries - begin), run.dtypes[0])
        self._scratch.read_into(out, run.places[0] + begin * out.itemsize)
        return begin + int(np.searchsorted(out, bound, side="left"))


def _sorted(value: NDArray[Any], label: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Sort scores (as `ordered` has them) with their labels."""
    if value.dtype == np.uint32:
        key = value.astype(np.uint64) << np.uint64(1)
        key |= label
        key = pl.Series(key).sort(multithreaded=False).to_numpy()
        return (key >> np.uint64(1)).astype(np.uint32), (key & np.uint64(1)).astype(np.bool_)
    order = pl.Series(value).arg_sort().to_numpy()
    return value[order], label[order]


def _starts(value: NDArray[Any]) -> NDArray[np.intp]:
    """Return where runs of equal values begin."""
    new = np.empty(len(value), np.bool_)
    new[0] = True
    np.not_equal(value[1:], value[:-1], out=new[1:])
    return np.flatnonzero(new)


def _reduced(value: NDArray[Any], label: NDArray[np.bool_]) -> tuple[NDArray[Any], Ints, Ints]:
    """Return the distinct values of sorted rows, how often each occurs and how often with a click."""
    first = _starts(value)
    clicks = np.zeros(len(value) + 1, np.int64)
    np.cumsum(label, out=clicks[1:])
    return value[first], np.diff(first, append=len(value)), np.diff(clicks[np.append(first, len(value))])


def _merged(value: NDArray[Any], rows: NDArray[Any], clicks: NDArray[Any]) -> tuple[NDArray[Any], Ints, Ints]:
    """Sort entries and add up those of one value."""
    if value.dtype == np.uint32:
        key = value.astype(np.uint64) << np.uint64(32)
        key |= np.arange(len(key), dtype=np.uint64)
        key = pl.Series(key).sort(multithreaded=False).to_numpy()
        order, value = (key & np.uint64(2**32 - 1)).astype(np.int64), (key >> np.uint64(32)).astype(np.uint32)
    else:
        order = pl.Series(value).arg_sort().to_numpy()
        value = value[order]
    first = _starts(value)
    rows, clicks = (np.add.reduceat(x[order], first, dtype=np.int64) for x in (rows, clicks))
    return value[first], rows, clicks


def _small(counts: Ints) -> NDArray[np.unsignedinteger[Any]]:
    return counts.astype(np.min_scalar_type(int(counts.max())))


def _scores(value: NDArray[Any]) -> NDArray[np.float64]:
    """Undo `ctrkit.gauc.ordered`."""
    signed, floating, top = (np.int32, np.float32, 31) if value.dtype == np.uint32 else (np.int64, np.float64, 63)
    signs: NDArray[Any] = ~np.right_shift(value.view(signed), top).view(value.dtype)  # all ones where negative
    signs |= value.dtype.type(1 << top)
    signs ^= value
    score: NDArray[Any] = signs.view(floating)
    return score.astype(np.float64)
