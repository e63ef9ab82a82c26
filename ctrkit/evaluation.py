"""Metrics of predictions, over all impressions and over slices, with bootstrap intervals and comparisons.

What each number is stands in docs/gauc.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from ctrkit import compat as programs
from ctrkit import large_predictions, predictions
from ctrkit.errors import UserError
from ctrkit.gauc import GAUC, UserAUC, Weight, auc, gauc_of, user_auc, user_codes
from ctrkit.recipe import Eval
from ctrkit.score_runs import ScoreStatistics

ALL = "all"
"""The slice that holds every impression."""
ECE_BINS = 20
SMALLEST = 1e-7
"""Probabilities are clipped to [SMALLEST, 1 − SMALLEST] before a logarithm is taken."""
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap distribution: a 95% interval."""
DRAWS_AT_ONCE = 4_000_000
"""Resampled users held in memory at a time."""
ROWS_IN_MEMORY = 4_000_000
"""Parquet files of more rows are measured through temporary files (ctrkit.large_predictions)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one file over one slice. None: not defined here (docs/gauc.md says when)."""

    impressions: int
    clicks: int
    users_kept: int
    users_dropped: int
    impressions_covered: int
    """Impressions of the kept users."""
    share_covered: float
    gauc: float | None
    gauc_low: float | None = None
    gauc_high: float | None = None
    gain: float | None = None
    """GAUC minus the baseline's."""
    gain_low: float | None = None
    gain_high: float | None = None
    r_gauc: float | None = None
    """Relative to the baseline, as a fraction: 0.1 is +10%."""
    auc: float | None
    log_loss: float | None
    normalised_entropy: float | None
    calibration: float | None
    """Predicted clicks over observed clicks."""
    ece: float | None


@dataclass(frozen=True)
class Measured:
    """What is kept of one file: users and sums, not impressions."""

    name: str
    users: pl.Series
    """String [users], ascending; the codes in `by_user` are positions in it."""
    metrics: dict[str, Metrics]
    """By slice."""
    by_user: dict[str, UserAUC]
    """By slice. Empty where users were not asked for."""
    compat: dict[programs.Program, programs.Compat] = field(default_factory=dict)
    """By program: the GAUC that it would print for all impressions."""
    bins: "CalibrationBins | None" = None
    """Of all impressions; None if a score lies outside [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CalibrationBins:
    """The bins of the calibration error, scores rising; none is empty. Arrays are [bins]."""

    impressions: NDArray[np.int64]
    predicted: Floats
    """Σ scores."""
    clicks: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """The expected calibration error: Σ_b n_b/n · |mean score − observed rate| over bins b."""
        return float(np.abs(self.predicted - self.clicks).sum() / self.impressions.sum())

    def rows(self) -> list[dict[str, float]]:
        """Return what metrics.json holds of them: impressions, mean score and observed click rate of each."""
        columns = (self.impressions, self.predicted / self.impressions, self.clicks / self.impressions)
        return [
            {"impressions": int(n), "predicted": float(p), "observed": float(o)}
            for n, p, o in zip(*columns, strict=True)
        ]


def r_gauc(gauc: float | None, baseline: float | None) -> float | None:
    """Return the relative GAUC as a fraction (DICM section VII-A); None if the baseline is ≤ 0.5."""
    if gauc is None or baseline is None or baseline <= 0.5:
        return None
    return (gauc - 0.5) / (baseline - 0.5) - 1.0


def log_loss(click: NDArray[np.bool_], score: NDArray[Any]) -> float:
    """Return the mean cross-entropy in nats of probabilities `score` [n], clipped by `SMALLEST`."""
    p = np.clip(score.astype(np.float64), SMALLEST, 1.0 - SMALLEST)
    return float(-np.log(np.where(click, p, 1.0 - p)).mean())


def normalised_entropy(click: NDArray[np.bool_], score: NDArray[Any]) -> float | None:
    """Return the log loss over that of always predicting the observed rate; None if that is 0 or 1."""
    rate = float(click.mean())
    if not 0.0 < rate < 1.0:
        return None
    return log_loss(click, score) / float(-rate * np.log(rate) - (1.0 - rate) * np.log(1.0 - rate))


def calibration(click: NDArray[np.bool_], score: NDArray[Any]) -> float | None:
    """Return predicted clicks over observed clicks; None without a click."""
    return float(score.astype(np.float64).sum() / click.sum()) if click.any() else None


def calibration_bins(click: NDArray[np.bool_], score: NDArray[Any], bins: int = ECE_BINS) -> CalibrationBins:
    """Cut impressions into bins of equally many, as nearly as equal scores, which always share a bin, allow."""
    n = len(score)
    edges = np.unique(np.sort(score)[np.arange(1, bins) * n // bins])
    bin_of = np.searchsorted(edges, score, side="right")
    predicted = np.bincount(bin_of, weights=score)
    observed = np.bincount(bin_of, weights=click)
    return _filled(np.bincount(bin_of), predicted, observed)


def _filled(impressions: NDArray[Any], predicted: NDArray[Any], clicks: NDArray[Any]) -> CalibrationBins:
    there = impressions > 0
    return CalibrationBins(
        impressions=impressions[there].astype(np.int64),
        predicted=predicted[there],
        clicks=clicks[there].astype(np.int64),
    )


def ece(click: NDArray[np.bool_], score: NDArray[Any], bins: int = ECE_BINS) -> float:
    """Return the expected calibration error over `calibration_bins`."""
    return calibration_bins(click, score, bins).ece


def measure(click: NDArray[np.bool_], score: NDArray[Any], gauc: GAUC, auc: float | None) -> Metrics:
    """Compute the metrics of one slice. Those of probabilities are None if a score lies outside [0, 1]."""
    probabilities = bool(score.min() >= 0 and score.max() <= 1)
    return Metrics(
        impressions=len(click),
        clicks=int(click.sum()),
        users_kept=gauc.users_kept,
        users_dropped=gauc.users_dropped,
        impressions_covered=gauc.impressions_covered,
        share_covered=gauc.impressions_covered / gauc.impressions,
        gauc=gauc.value,
        auc=auc,
        log_loss=log_loss(click, score) if probabilities else None,
        normalised_entropy=normalised_entropy(click, score) if probabilities else None,
        calibration=calibration(click, score) if probabilities else None,
        ece=ece(click, score) if probabilities else None,
    )


def evaluate_arrays(user: ArrayLike, label: ArrayLike, score: ArrayLike, weight: Weight = "impressions") -> Metrics:
    """Compute all metrics of arrays, without intervals; they are what `ctrkit.gauc.gauc` takes, and not empty.

    Raises ValueError as that does.
    """
    label, score = np.asarray(label), np.asarray(score)
    users = user_auc(user_codes(user), label, score)
    if len(label) == 0:
        raise ValueError("no impressions")
    click = label.astype(np.bool_)
    return measure(click, score, gauc_of(users, weight), auc(click, score))


def measure_large(
    name: str,
    path: Path,
    settings: Eval,
    *,
    user: str,
    label: str,
    score: str,
    slices: Sequence[str],
    with_users: bool,
) -> Measured:
    """Compute the metrics of a Parquet file that need not fit into memory, as `measure_file` does."""
    made = large_predictions.measure(
        path,
        user=user,
        label=label,
        score=score,
        slices=slices,
        whole=ALL,
        weight=settings.weight,
        bins=ECE_BINS,
        smallest=SMALLEST,
        with_users=with_users,
        programs=settings.compat,
    )
    metrics = {s: _of_statistics(one.statistics, one.gauc) for s, one in made.slices.items()}
    by_user = {s: one.by_user for s, one in made.slices.items() if one.by_user is not None}
    whole = made.slices[ALL].statistics
    bins = _filled(whole.rows_of, whole.predicted_of, whole.clicks_of) if _probabilities(whole) else None
    return Measured(name, made.users, metrics, by_user, made.compat, bins)


def _probabilities(made: ScoreStatistics) -> bool:
    return made.lowest >= 0 and made.highest <= 1


def _of_statistics(made: ScoreStatistics, gauc: GAUC) -> Metrics:
    """Compute the metrics of one slice from what the order of its scores tells."""
    n, clicks = made.impressions, made.clicks
    probabilities = _probabilities(made)
    loss, rate = -made.log_likelihood / n, clicks / n
    entropy = -rate * np.log(rate) - (1.0 - rate) * np.log(1.0 - rate) if 0 < clicks < n else None
    return Metrics(
        impressions=n,
        clicks=clicks,
        users_kept=gauc.users_kept,
        users_dropped=gauc.users_dropped,
        impressions_covered=gauc.impressions_covered,
        share_covered=gauc.impressions_covered / n,
        gauc=gauc.value,
        auc=made.auc,
        log_loss=loss if probabilities else None,
        normalised_entropy=float(loss / entropy) if probabilities and entropy is not None else None,
        calibration=float(made.predicted_of.sum() / clicks) if probabilities and clicks else None,
        ece=float(np.abs(made.predicted_of - made.clicks_of).sum() / n) if probabilities else None,
    )


def measure_file(
    name: str, made: predictions.Predictions, weight: Weight, of_programs: Sequence[programs.Program] = ()
) -> Measured:
    """Compute the metrics of one file over all its impressions and over each of its slices."""
    metrics, by_user = {}, {}
    for slice_name, inside in {ALL: None, **made.slices}.items():
        rows = slice(None) if inside is None else inside
        click, score = made.click[rows], made.score[rows]
        by_user[slice_name] = users = user_auc(made.user[rows], click, score)
        metrics[slice_name] = measure(click, score, gauc_of(users, weight), auc(click, score))
    sums = {p: programs.partial(p, by_user[ALL], made.user, made.click, made.score) for p in of_programs}
    bins = None if metrics[ALL].ece is None else calibration_bins(made.click, made.score)
    return Measured(name, made.users, metrics, by_user, {p: programs.total(p, [s]) for p, s in sums.items()}, bins)


def evaluate(
    paths: Mapping[str, Path],
    settings: Eval,
    *,
    user: str = "user",
    label: str = "click",
    score: str = "score",
    slices: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate files of predictions and return what metrics.json holds (docs/gauc.md, "metrics.json").

    `settings.baseline` and the names in `settings.compare` must be among `paths`. Raises UserError for files
    that cannot be read and for pairs that do not cover the same impressions.
    """
    with_users = bool(settings.bootstrap or settings.baseline or settings.compare)
    files = []
    for name, path in paths.items():  # one file in memory at a time
        if predictions.is_parquet(path) and large_predictions.rows_of(path) > ROWS_IN_MEMORY:
            files.append(
                measure_large(
                    name, path, settings, user=user, label=label, score=score, slices=slices, with_users=with_users
                )
            )
        else:
            made = predictions.read(path, user=user, label=label, score=score, slices=slices)
            files.append(measure_file(name, made, settings.weight, settings.compat))
    pairing = Pairing(files if with_users else [])
    pairs = list(settings.compare)
    if settings.baseline:
        pairs += [(name, settings.baseline) for name in paths if name != settings.baseline]
    for better, worse in pairs:
        pairing.require_same(better, worse)
    resampled = pairing.bootstrap(settings)
    order = list(dict.fromkeys(slice_name for f in files for slice_name in f.metrics))
    variants: dict[str, dict[str, Any]] = {}
    for f in files:
        full = {s: asdict(_with_intervals(f, s, pairing, settings, resampled)) for s in f.metrics}
        variants[f.name] = {ALL: full.pop(ALL), "slices": full}
        variants[f.name]["calibration_bins"] = f.bins.rows() if f.bins else []
        if settings.compat:
            variants[f.name]["compat"] = {program: asdict(c) for program, c in f.compat.items()}
    return {
        "settings": {
            "weight": settings.weight,
            "ties": "averaged (midranks)",
            "baseline": settings.baseline,
            "bootstrap": settings.bootstrap,
            "seed": settings.seed,
            "interval": "95%, percentiles over resamples of users",
            "ece_bins": ECE_BINS,
            "user": user,
            "label": label,
            "score": score,
            **({"compat": list(settings.compat)} if settings.compat else {}),
        },
        "order": {"variants": list(paths), "slices": [s for s in order if s != ALL]},
        "variants": variants,
        "comparisons": [
            comparison
            for better, worse in settings.compare
            for s in order
            if (comparison := _compare(better, worse, s, pairing, resampled)) is not None
        ],
    }


Resampled = dict[tuple[str, str], Floats]
"""(file, slice) → GAUC of each resample, [resamples]; NaN where it holds no kept user of the slice."""


class Pairing:
    """Several files over one list of users, so that all of them can be resampled alike."""

    def __init__(self, files: Sequence[Measured]) -> None:
        self.files = {f.name: f for f in files}
        self.users = (
            pl.concat([pl.Series("user", [], pl.String), *(f.users.alias("user") for f in files)]).unique().sort()
        )
        codes = pl.DataFrame({"user": self.users, "code": np.arange(len(self.users), dtype=np.int64)})
        self._code = {
            f.name: pl.DataFrame({"user": f.users})
            .join(codes, on="user", how="left", maintain_order="left")["code"]
            .to_numpy()
            for f in files
        }

    def codes(self, name: str, slice_name: str) -> NDArray[np.int64]:
        """int64 [users of the slice]: their positions in `users`, ascending."""
        code: NDArray[np.int64] = self._code[name][self.files[name].by_user[slice_name].user]
        return code

    def same(self, a: str, b: str, slice_name: str) -> bool:
        """Say whether two files have the slice, and in it the same users with the same numbers of labels."""
        if not (slice_name in self.files[a].by_user and slice_name in self.files[b].by_user):
            return False
        one, two = self.files[a].by_user[slice_name], self.files[b].by_user[slice_name]
        return (
            np.array_equal(self.codes(a, slice_name), self.codes(b, slice_name))
            and np.array_equal(one.impressions, two.impressions)
            and np.array_equal(one.clicks, two.clicks)
        )

    def require_same(self, a: str, b: str) -> None:
        """Raise UserError, with the first difference, unless two files cover the same impressions."""
        if self.same(a, b, ALL):
            return
        one, two = (self._labels(name) for name in (a, b))
        differs = (one != two).any(axis=0)
        at = int(np.argmax(differs))
        first = f"{self.users[at]!r} with {one[0, at]:,} ({one[1, at]:,}) against {two[0, at]:,} ({two[1, at]:,})"
        raise UserError(
            f"{a} and {b} do not cover the same impressions, so they cannot be compared: "
            f"{one[0].sum():,} impressions ({one[1].sum():,} clicked) against {two[0].sum():,} "
            f"({two[1].sum():,}); {int(differs.sum()):,} of {len(self.users):,} users differ, the "
            f"first is {first}. "
            f"Predict the same impressions with both, or leave out the comparison and the baseline."
        )

    def _labels(self, name: str) -> NDArray[np.int64]:
        """int64 [2, users]: impressions and clicks by user."""
        counts = np.zeros((2, len(self.users)), np.int64)
        by_user = self.files[name].by_user[ALL]
        counts[:, self.codes(name, ALL)] = by_user.impressions, by_user.clicks
        return counts

    def bootstrap(self, settings: Eval) -> Resampled:
        """Compute every file's GAUC, over every slice, on `settings.bootstrap` resamples of the users.

        A resample draws, with replacement, as many users as have an AUC in some file, from these. All files
        and slices see the same resamples, so differences of their GAUCs are paired.
        """
        kept = np.zeros(len(self.users), np.bool_)
        for name, f in self.files.items():
            kept[self.codes(name, ALL)[f.by_user[ALL].kept]] = True
        place = np.cumsum(kept) - 1
        n_users = int(kept.sum())
        cells: dict[tuple[str, str], tuple[NDArray[np.int64], Floats, Floats]] = {}
        out: Resampled = {}
        for name, f in self.files.items():
            for s, by_user in f.by_user.items():
                inside = by_user.kept
                if inside.sum() < 2:  # nothing can be said of the spread between users
                    continue
                w = by_user.weights(settings.weight)[inside].astype(np.float64)
                cells[name, s] = place[self.codes(name, s)[inside]], w * by_user.auc[inside], w
                out[name, s] = np.full(settings.bootstrap, np.nan)
        if not cells:
            return {}
        rng = np.random.default_rng(settings.seed)
        at_once = max(1, DRAWS_AT_ONCE // n_users)
        for begin in range(0, settings.bootstrap, at_once):
            n = min(at_once, settings.bootstrap - begin)
            drawn = rng.integers(0, n_users, (n, n_users))
            drawn += np.arange(n)[:, None] * n_users
            times = np.bincount(drawn.reshape(-1), minlength=n * n_users).reshape(n, n_users)
            for cell, (users, weighted, w) in cells.items():
                chosen = times[:, users]
                above, below = (np.einsum("bu,u->b", chosen, x) for x in (weighted, w))
                np.divide(above, below, out=out[cell][begin : begin + n], where=below > 0)
        return out


def _interval(values: Floats | None) -> tuple[float | None, float | None]:
    finite = values[np.isfinite(values)] if values is not None else np.zeros(0)
    if len(finite) == 0:
        return None, None
    low, high = np.percentile(finite, INTERVAL)
    return float(low), float(high)


def _difference(a: tuple[str, str], b: tuple[str, str], resampled: Resampled) -> Floats | None:
    return resampled[a] - resampled[b] if a in resampled and b in resampled else None


def _with_intervals(f: Measured, slice_name: str, pairing: Pairing, settings: Eval, resampled: Resampled) -> Metrics:
    """Fill in the interval of GAUC and, where the baseline covers the same impressions, gain and R-GAUC."""
    metrics = f.metrics[slice_name]
    low, high = _interval(resampled.get((f.name, slice_name)))
    metrics = replace(metrics, gauc_low=low, gauc_high=high)
    if not settings.baseline or not pairing.same(f.name, settings.baseline, slice_name):
        return metrics
    base = pairing.files[settings.baseline].metrics[slice_name].gauc
    if base is None or metrics.gauc is None:
        return metrics
    low, high = _interval(_difference((f.name, slice_name), (settings.baseline, slice_name), resampled))
    return replace(metrics, gain=metrics.gauc - base, gain_low=low, gain_high=high, r_gauc=r_gauc(metrics.gauc, base))


def _compare(better: str, worse: str, slice_name: str, pairing: Pairing, resampled: Resampled) -> dict[str, Any] | None:
    """Compare two files over one slice; None where they do not cover it with the same impressions."""
    if not pairing.same(better, worse, slice_name):
        return None
    one, two = (pairing.files[name].metrics[slice_name].gauc for name in (better, worse))
    if one is None or two is None:
        return None
    low, high = _interval(_difference((better, slice_name), (worse, slice_name), resampled))
    return {
        "better": better,
        "worse": worse,
        "slice": slice_name,
        "difference": one - two,
        "low": low,
        "high": high,
        "significant": None if low is None or high is None else low > 0 or high < 0,
    }
