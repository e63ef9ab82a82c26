"""An A/B test whose unit is the user: the split, rates of an arm, and their relative difference with its interval.

Users are dealt to the arms, so that users, not impressions, are independent of each other: what one does twice, and
that who comes often clicks otherwise than who comes once, is noise of a user. The rate of an arm is a ratio of two sums
over its users (clicks over impressions), and its interval is that of the delta method: of the logarithm of a ratio
Σy/Σn, user u moves y_u/Σy − n_u/Σn, and the variance is the sum of the squares. It needs no resampling, so that a
thousand splits cost no more than a bootstrap of one, and gives the same bytes anywhere.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.spool import hashes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Z = 1.959963984540054
"""The normal distribution's 97.5th percentile: intervals are at 95%."""


@dataclass(frozen=True)
class Lift:
    """How much higher a rate is in one arm than in another, as a fraction: 0.071 is +7.1%."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Ratio:
    """A rate by user, [U] users each: `over` sums what is counted (clicks, money), `under` what it is counted by."""

    over_U: Floats
    under_U: Floats

    @property
    def value(self) -> float:
        """The rate of all users together; NaN without anything to count by."""
        under = float(self.under_U.sum())
        return float(self.over_U.sum()) / under if under else float("nan")

    def of(self, users: npt.NDArray[np.bool_]) -> "Ratio":
        """Return the rate of some of the users."""
        return Ratio(self.over_U[users], self.under_U[users])

    def moves_U(self) -> Floats:
        """Return [U] by how much each user moves the logarithm of the rate, to first order. They sum to 0."""
        return np.asarray(self.over_U / self.over_U.sum() - self.under_U / self.under_U.sum())


def split(users: pl.Series, salt: str, arms: int) -> Ints:
    """Return [U] each user's arm, from 0, by a hash of salt and user (String): parts that are even but for luck."""
    salted = users.to_frame("user").select(pl.concat_str(pl.lit(salt), "user", separator="|")).to_series()
    return np.asarray(hashes(salted).to_numpy() % np.uint64(arms), np.int64)


def lift(treated: Ratio, control: Ratio, *, same_users: bool = False) -> Lift | None:
    """Return by what fraction a rate is higher than the control's, with its interval at 95%.

    The interval is one of the logarithm of the ratio of both, taken back, so that it never reaches below −100%.
    same_users: both are rates of the same users in the same order (only a simulation can show them both), so that each
    user's moves are subtracted before they are squared. None where an arm has too little to tell.
    """
    for one in (treated, control):
        if len(one.over_U) < 2 or not one.over_U.sum() > 0 or not one.under_U.sum() > 0:
            return None
    moves = [treated.moves_U(), control.moves_U()]
    if same_users:
        moves = [moves[0] - moves[1]]
    variance = sum(len(m) / (len(m) - 1) * float(m @ m) for m in moves)
    middle, half = float(np.log(treated.value / control.value)), Z * float(np.sqrt(variance))
    low, value, high = (float(np.expm1(middle + side * half)) for side in (-1, 0, 1))
    return Lift(value, low, high)
