"""GAUC and AUC on arrays: exact, ties averaged, one sort for all users.

GAUC = Σ w_i·AUC_i / Σ w_i over users i, w_i the user's impressions or clicks (DIN eq. 1; DICM section VII-A).
A user whose impressions are all clicked or all not clicked has no AUC; such users are dropped and counted.

AUC_i is the share of (clicked, not clicked) pairs in which the clicked one scores higher, a tie counting one
half (midranks). The pairs are counted in integers, so the only rounding is one division a user and one sum.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weight = Literal["impressions", "clicks"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class UserAUC:
    """Each user's AUC. All arrays are [users], in the order of `user`."""

    user: Ints
    """Codes, ascending."""
    impressions: Ints
    clicks: Ints
    auc: Floats
    """NaN for a user without both a clicked and an unclicked impression."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """bool [users]: the users that have an AUC."""
        return (self.clicks > 0) & (self.clicks < self.impressions)

    def weights(self, weight: Weight) -> Ints:
        """int64 [users]: w_i of DIN eq. 1."""
        return self.impressions if weight == "impressions" else self.clicks


@dataclass(frozen=True, kw_only=True)
class GAUC:
    """A GAUC and what it was computed over. Ties are averaged."""

    value: float | None
    """None if no user has both a clicked and an unclicked impression."""
    weight: Weight
    users_kept: int
    users_dropped: int
    """Users without both classes."""
    impressions: int
    """Of all users."""
    impressions_covered: int
    """Of the kept users."""


def gauc(user: ArrayLike, label: ArrayLike, score: ArrayLike, weight: Weight = "impressions") -> GAUC:
    """Compute GAUC (DIN eq. 1).

    Parameters
    ----------
    user: [n] integers or text.
    label: [n] 0/1 or booleans.
    score: [n] finite floats; any scale, higher means more likely to be clicked.
    weight: what a user counts with.

    Raises ValueError for unequal lengths, labels other than 0/1, scores that are not finite, unknown weights.
    """
    if weight not in get_args(Weight):
        raise ValueError(f"weight is {weight!r}, not one of {get_args(Weight)}")
    _, codes = np.unique(np.asarray(user), return_inverse=True)
    return gauc_of(user_auc(codes.reshape(-1), label, score), weight)


def gauc_of(users: UserAUC, weight: Weight = "impressions") -> GAUC:
    """Average the users' AUCs (DIN eq. 1)."""
    kept = users.kept
    w = users.weights(weight)[kept]
    return GAUC(
        value=float((w * users.auc[kept]).sum() / w.sum()) if kept.any() else None,
        weight=weight,
        users_kept=int(kept.sum()),
        users_dropped=int((~kept).sum()),
        impressions=int(users.impressions.sum()),
        impressions_covered=int(users.impressions[kept].sum()),
    )


def auc(label: ArrayLike, score: ArrayLike) -> float | None:
    """Compute the AUC over all impressions, ties averaged; None without both classes.

    Takes what `gauc` takes.
    """
    one = user_auc(np.zeros(np.shape(np.asarray(label)), np.int64), label, score)
    return float(one.auc[0]) if one.kept.any() else None


def user_auc(user: NDArray[np.integer[Any]], label: ArrayLike, score: ArrayLike) -> UserAUC:
    """Compute every user's AUC.

    Parameters
    ----------
    user: [n] codes ≥ 0.
    label: [n] 0/1 or booleans.
    score: [n] finite floats.
    """
    label, score = np.asarray(label), np.asarray(score)
    if not (user.ndim == label.ndim == score.ndim == 1 and len(user) == len(label) == len(score)):
        raise ValueError(f"user, label and score differ in shape: {user.shape}, {label.shape}, {score.shape}")
    if len(user) == 0:
        none = np.zeros(0, np.int64)
        return UserAUC(user=none, impressions=none, clicks=none, auc=np.zeros(0))
    if not ((label == 0) | (label == 1)).all():
        raise ValueError("labels other than 0 and 1")
    if user.min() < 0:
        raise ValueError("user codes below 0")
    rank, bits = _ordered(score)
    if int(user.max()).bit_length() + bits + 1 > 64:
        rank, bits = _ranks(score)
    # One sort of packed (user, score, label) keys. From here on everything is in that order.
    key = user.astype(np.uint64)
    key <<= np.uint64(bits)
    key |= rank
    key <<= np.uint64(1)
    key |= label.astype(np.uint64)
    key.sort()
    clicked = (key & np.uint64(1)).astype(np.int64)
    key >>= np.uint64(1)
    tie = np.flatnonzero(np.diff(key, prepend=~key[:1]))  # first rows of runs with equal user and score
    key = key[tie] >> np.uint64(bits)
    tie_rows = np.diff(tie, append=len(clicked))
    tie_clicks = np.add.reduceat(clicked, tie)
    tie_others = tie_rows - tie_clicks
    first = np.flatnonzero(np.diff(key, prepend=~key[:1]))  # first runs of users
    others_before = np.cumsum(tie_others) - tie_others
    user_runs = np.diff(first, append=len(key))
    others_before -= np.repeat(others_before[first], user_runs)
    half_wins = np.add.reduceat(tie_clicks * (2 * others_before + tie_others), first)
    impressions = np.add.reduceat(tie_rows, first)
    clicks = np.add.reduceat(tie_clicks, first)
    pairs = clicks * (impressions - clicks)
    value = np.full(len(first), np.nan)
    np.divide(half_wins, 2.0 * pairs, out=value, where=pairs > 0)
    return UserAUC(user=key[first].astype(np.int64), impressions=impressions, clicks=clicks, auc=value)


def _ordered(score: NDArray[Any]) -> tuple[NDArray[np.uint64], int]:
    """Return uint64 [n] that order and tie as the scores do, and how many bits they use."""
    if not np.isfinite(score).all():
        raise ValueError("scores that are not finite")
    if score.dtype not in (np.float32, np.float16):
        return _ranks(score)
    # IEEE 754 as integers: negative numbers inverted, positive ones above them. Adding 0 turns −0 into 0.
    pattern = (score.astype(np.float32) + np.float32(0)).view(np.uint32)
    sign = np.uint32(1 << 31)
    return np.where(pattern & sign, ~pattern, pattern | sign).astype(np.uint64), 32


def _ranks(score: NDArray[Any]) -> tuple[NDArray[np.uint64], int]:
    """Return the scores' dense ranks, uint64 [n], and how many bits they use."""
    distinct, rank = np.unique(score, return_inverse=True)
    return rank.reshape(-1).astype(np.uint64), max(1, (len(distinct) - 1).bit_length())
