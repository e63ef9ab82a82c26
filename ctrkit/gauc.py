"""GAUC and AUC on arrays: exact, ties averaged, one sort for all users.

GAUC = Σ w_i·AUC_i / Σ w_i over users i, w_i the user's impressions or clicks (DIN eq. 1; DICM section VII-A), or 1.
A user whose impressions are all clicked or all not clicked has no AUC; such users are dropped and counted.

AUC_i is the share of (clicked, not clicked) pairs in which the clicked one scores higher, a tie counting one
half (midranks). The pairs are counted in integers, so the only rounding is one division a user and one sum.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

Weight = Literal["impressions", "clicks", "users"]
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
        """int64 [users]: w_i of DIN eq. 1; 1 for a mean over users."""
        if weight == "users":
            return np.ones_like(self.impressions)
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
    score: [n] finite numbers; any scale, higher means more likely to be clicked.
    weight: what a user counts with; "users" gives each the same.

    Raises ValueError for unequal lengths, labels other than 0/1, scores that are not finite or no numbers, users
    without a value (None, NaN, blank text), unknown weights.
    """
    return gauc_of(user_auc(user_codes(user), label, score), weight)


def gauc_of(users: UserAUC, weight: Weight = "impressions") -> GAUC:
    """Average the users' AUCs (DIN eq. 1). Raises ValueError for an unknown weight."""
    if weight not in get_args(Weight):
        raise ValueError(f"weight is {weight!r}, not one of {get_args(Weight)}")
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


def user_auc(
    user: NDArray[np.integer[Any]], label: ArrayLike, score: ArrayLike, *, side_by_side: bool = True
) -> UserAUC:
    """Compute every user's AUC.

    Parameters
    ----------
    user: [n] codes ≥ 0.
    label: [n] 0/1 or booleans.
    score: [n] finite floats.
    side_by_side: sort with several threads.
    """
    label, score = np.asarray(label), np.asarray(score)
    if not (user.ndim == label.ndim == score.ndim == 1 and len(user) == len(label) == len(score)):
        raise ValueError(f"user, label and score differ in shape: {user.shape}, {label.shape}, {score.shape}")
    if len(user) == 0:
        none = np.zeros(0, np.int64)
        return UserAUC(user=none, impressions=none, clicks=none, auc=np.zeros(0))
    if label.dtype.kind not in "biuf" or score.dtype.kind not in "biuf":
        raise ValueError(f"label and score are numbers, not {label.dtype} and {score.dtype}")
    if not ((label == 0) | (label == 1)).all():
        raise ValueError("labels other than 0 and 1")
    if user.min() < 0:
        raise ValueError("user codes below 0")
    user, rank, bits, names = _packed(user, ordered(score))
    # One sort of packed (user, score, label) keys. From here on everything is in that order.
    key = user.astype(np.uint64)
    key <<= np.uint64(bits)
    key |= rank
    key <<= np.uint64(1)
    key |= label.astype(np.uint64)
    key = pl.Series(key).sort(multithreaded=side_by_side).to_numpy()
    code = key >> np.uint64(bits + 1)
    first = np.flatnonzero(_differs(code))  # first rows of users
    users: Ints = code[first].astype(np.int64)
    impressions = np.diff(first, append=len(key))
    # Only the clicked rows are looked at one by one. In a tie they stand last.
    at = np.flatnonzero(key & np.uint64(1))
    tied = key[at]
    clicks_to = np.searchsorted(at, np.append(first, len(key)))  # clicked rows before each user, and all
    clicks = np.diff(clicks_to)
    pairs = clicks * (impressions - clicks)
    value = np.full(len(first), np.nan)
    if len(at):
        run = np.flatnonzero(_differs(tied))  # first clicked rows of ties
        begin, run_clicks = at[run], np.diff(run, append=len(at))
        same = tied[run] - np.uint64(1)  # the key of an unclicked row in the tie
        others = np.flatnonzero((begin > 0) & (key[begin - 1] == same))
        tie_begin = begin.copy()
        tie_begin[others] = np.searchsorted(key, same[others])
        # Unclicked rows before a row are the rows less the clicked ones before it. First from the whole start, then
        # less those before the user.
        half_wins = run_clicks * (begin + tie_begin - 2 * run)
        sums = np.zeros(len(run) + 1, np.int64)
        np.cumsum(half_wins, out=sums[1:])
        by_user = np.diff(sums[np.searchsorted(run, clicks_to)])
        by_user -= 2 * clicks * (first - clicks_to[:-1])
        np.divide(by_user, 2.0 * pairs, out=value, where=pairs > 0)
    if names is not None:
        users = names[users]
    return UserAUC(user=users, impressions=impressions, clicks=clicks, auc=value)


def _differs(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of some values are the first or differ from the one before; bool [n], n > 0."""
    new = np.empty(len(values), np.bool_)
    new[0] = True
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


def user_codes(user: ArrayLike) -> Ints:
    """Return int64 [n] ≥ 0, equal where the users are. Raises ValueError for a user that is no value (None, NaN, blank
    text), and where users are no list.
    """
    user = np.asarray(user)
    if user.ndim != 1:
        raise ValueError(f"users are a list or an array of one dimension, not of {user.ndim}")
    if user.dtype.kind in "iu" and len(user):
        low, high = int(user.min()), int(user.max())
        if low >= 0 and high < 2**63:
            return user.astype(np.int64)
        if low >= -(2**63) and high < 2**63 and high - low < 2**63:
            return user.astype(np.int64) - low
    if user.dtype.kind == "f" and not np.isfinite(user).all():
        raise ValueError("users without a value")
    if user.dtype.kind in "UO":
        try:
            text = pl.Series("user", user, dtype=pl.String, strict=True)
        except (TypeError, pl.exceptions.PolarsError):
            text = None  # not text: numpy compares whatever it is
        if text is not None:
            if text.null_count():
                raise ValueError("users without a value")
            distinct = text.unique().sort()
            if (distinct.str.strip_chars() == "").any():
                raise ValueError("users without a value: blank text")
            codes = distinct.to_frame().with_row_index("code")
            joined = text.to_frame().join(codes, on="user", how="left", maintain_order="left")
            return joined["code"].cast(pl.Int64).to_numpy()
    try:
        values, inverse = np.unique(user, return_inverse=True)
    except TypeError:
        raise ValueError("users of several types, or without a value: give whole numbers or text") from None
    if user.dtype.kind == "O" and any(value is None or value != value for value in values):
        raise ValueError("users without a value")
    return inverse.reshape(-1).astype(np.int64)


def ordered(score: NDArray[Any]) -> NDArray[Any]:
    """Return unsigned integers [n] that order and tie as the finite scores do: uint32 for float32, else uint64.

    Raises ValueError for scores that are not finite.
    """
    if score.dtype.kind in "iub":
        if score.dtype.kind == "i":
            return score.astype(np.int64).view(np.uint64) ^ np.uint64(1 << 63)
        return score.astype(np.uint64)
    if not np.isfinite(score).all():
        raise ValueError("scores that are not finite")
    if score.dtype == np.float16:
        score = score.astype(np.float32)
    if score.dtype not in (np.float32, np.float64):
        return np.unique(score, return_inverse=True)[1].reshape(-1).astype(np.uint64)
    # IEEE 754 as integers: negative numbers inverted, positive ones above them. Adding 0 turns −0 into 0.
    signed, unsigned, top = (np.int32, np.uint32, 31) if score.dtype == np.float32 else (np.int64, np.uint64, 63)
    pattern: NDArray[Any] = (score + score.dtype.type(0)).view(unsigned)
    signs: NDArray[Any] = np.right_shift(pattern.view(signed), top).view(unsigned)  # all ones where negative
    signs |= unsigned(1 << top)
    signs ^= pattern
    return signs


def dense_ranks(values: NDArray[np.integer[Any]]) -> tuple[NDArray[np.uint64], NDArray[Any]]:
    """Return the values' ranks among the distinct ones, uint64 [n], and these, ascending."""
    order = pl.Series(values).arg_sort().to_numpy()
    arranged = values[order]
    if len(values) == 0:
        return np.zeros(0, np.uint64), values
    new = _differs(arranged)
    rank = np.empty(len(values), np.uint64)
    rank[order] = np.cumsum(new) - 1
    return rank, arranged[new]


def _packed(user: NDArray[np.integer[Any]], score: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], int, Ints | None]:
    """Make user and score fit into 63 bits, by ranks where they have to be.

    Returns users, scores, the scores' bits, and the users by rank where they were replaced by it.
    """
    bits = score.dtype.itemsize * 8
    if _bits(user) + bits > 63:
        score, distinct = dense_ranks(score)
        bits = max(1, (len(distinct) - 1).bit_length())
    if _bits(user) + bits > 63:
        rank, distinct = dense_ranks(user)
        return rank, score, bits, distinct.astype(np.int64)
    return user, score, bits, None


def _bits(codes: NDArray[np.integer[Any]]) -> int:
    return int(codes.max()).bit_length()
