"""The GAUC that other programs would print for the same impressions. docs/gauc.md says how their definitions differ.

- FuxiCTR 2.3.10, `gAUC`: weighted by impressions, ties averaged, users of one class left out.
- TorchEasyRec, `grouped_auc`: the plain mean over users, ties averaged, users of one class left out.
- RecBole 1.2.1, `GAUC`: weighted by clicks, ties averaged, users of one class left out.
- torchrec 1.9.2, `GAUCMetric`: the plain mean over users; an impression wins against all that an unstable sort puts
  before it, so that ties fall as they may; left out are users of one class and users whose scores all equal their
  first or 0; without any user it is 0.5.

FuxiCTR computes in float64. The others compute in float32, from whose rounding these numbers are free.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrkit.gauc import UserAUC, Weight, user_auc, user_codes

Program = Literal["fuxictr", "torcheasyrec", "recbole", "torchrec"]
WEIGHTS: dict[Program, Weight] = {
    "fuxictr": "impressions",
    "torcheasyrec": "users",
    "recbole": "clicks",
    "torchrec": "users",
}
NAMES: dict[Program, str] = {
    "fuxictr": "FuxiCTR 2.3.10 (gAUC)",
    "torcheasyrec": "TorchEasyRec (grouped_auc)",
    "recbole": "RecBole 1.2.1 (GAUC)",
    "torchrec": "torchrec 1.9.2 (GAUCMetric)",
}


@dataclass(frozen=True)
class Compat:
    """What a program would print."""

    value: float | None
    """None where it would print nan, for want of a user. Of torchrec: as if its sort kept the order of equal scores."""
    low: float | None
    """What it prints at least, however its sort orders equal scores; `value` where it averages ties."""
    high: float | None
    """What it prints at most."""


@dataclass(frozen=True)
class Partial:
    """Sums over some users."""

    value: float
    low: float
    high: float
    weights: float


def compat(program: Program, user: ArrayLike, label: ArrayLike, score: ArrayLike) -> Compat:
    """Return the GAUC that a program would print.

    Takes the arrays of `ctrkit.gauc.gauc`; for torchrec in the order in which it would see each user's impressions.
    Raises ValueError as that does, and for an unknown program.
    """
    if program not in NAMES:
        raise ValueError(f"program is {program!r}, not one of {tuple(NAMES)}")
    codes, label, score = user_codes(user), np.asarray(label), np.asarray(score)
    return total(program, [partial(program, user_auc(codes, label, score), codes, label, score)])


def partial(
    program: Program, users: UserAUC, user: NDArray[np.int64], label: NDArray[Any], score: NDArray[Any]
) -> Partial:
    """Return a program's sums over some users with all their rows; `users` is their `user_auc`."""
    if program == "torchrec":
        return _torchrec(user, label.astype(np.bool_), score)
    kept = users.kept
    weights = users.weights(WEIGHTS[program])[kept]
    value = float((weights * users.auc[kept]).sum())
    return Partial(value, value, value, float(weights.sum()))


def total(program: Program, parts: Iterable[Partial]) -> Compat:
    """Return what a program would print for users with these sums."""
    parts = list(parts)
    below = math.fsum(p.weights for p in parts)
    value, low, high = (math.fsum(getattr(p, name) for p in parts) for name in ("value", "low", "high"))
    if program == "torchrec":  # it adds 1e-9 above and 2e-9 below
        return Compat(*((x + 1e-9) / (below + 2e-9) for x in (value, low, high)))
    return Compat(value / below, low / below, high / below) if below else Compat(None, None, None)


def _torchrec(user: NDArray[np.int64], label: NDArray[np.bool_], score: NDArray[Any]) -> Partial:
    if len(user) == 0:
        return Partial(0.0, 0.0, 0.0, 0.0)
    distinct, first, code = np.unique(user, return_index=True, return_inverse=True)
    clicks = np.bincount(code, weights=label)
    others = np.bincount(code, weights=~label)
    varied = np.bincount(code, weights=(score != score[first][code]) & (score != 0)) > 0
    kept = (clicks > 0) & (others > 0) & varied

    def sum_of_aucs(order: NDArray[np.intp]) -> float:
        """Sum the users' AUCs where a click wins against the others that stand before it, ties or not."""
        clicked, of = label[order], code[order]
        before: NDArray[Any] = np.cumsum(~clicked)
        starts = np.flatnonzero(np.diff(of, prepend=-1))
        before -= np.repeat((before - ~clicked)[starts], np.diff(starts, append=len(of)))
        wins = np.bincount(of[clicked], weights=before[clicked], minlength=len(distinct))
        return float((wins[kept] / (clicks * others + 1e-10)[kept]).sum())

    return Partial(
        sum_of_aucs(np.lexsort((score, code))),
        sum_of_aucs(np.lexsort((~label, score, code))),
        sum_of_aucs(np.lexsort((label, score, code))),
        float(kept.sum()),
    )
