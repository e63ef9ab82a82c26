"""An auction of clicks: candidates are ranked by bid × predicted click probability, as display ads paid by the click
are (DICM section I).

Letters in names: R requests, N candidates of a request, K slots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctrkit.recipe import Replay

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sold:
    """What an auction of R requests gave."""

    winner_RK: Ints
    """[R, K] which of the request's candidates is shown in each slot."""
    price_RK: Floats
    """[R, K] what a click there costs."""


def bids(settings: Replay, ads: int) -> Floats:
    """Draw each ad's bid for a click, [ads], in units of money: log-normal, by `seed`."""
    rng = np.random.default_rng([settings.seed, 1])
    return np.asarray(settings.bid_median * np.exp(settings.bid_sigma * rng.standard_normal(ads)))


def auction(score_RN: npt.NDArray[np.floating], bid_RN: Floats, settings: Replay) -> Sold:
    """Sell the slots of each request.

    Parameters
    ----------
    score_RN: [R, N] predicted click probabilities.
    bid_RN: [R, N] bids for a click.
    settings: `slots` K and `price` count; N > K.

    The K candidates of the highest bid × score win, the highest the first slot; of equal ones the earlier. With
    `price = "second"` a click costs the winner the least that would have kept its slot: the next one's bid × score over
    its own score. That is at most its bid. With `"first"` it costs the bid.
    """
    score = np.asarray(score_RN, np.float64)
    worth = bid_RN * score
    order = np.argsort(-worth, axis=1, kind="stable")[:, : settings.slots + 1]
    winner = order[:, : settings.slots]
    bid = np.take_along_axis(bid_RN, winner, axis=1)
    if settings.price == "first":
        return Sold(winner, bid)
    of_next = np.take_along_axis(worth, order[:, 1:], axis=1)
    own = np.take_along_axis(score, winner, axis=1)
    least = np.divide(of_next, own, out=np.zeros_like(of_next), where=own > 0)
    return Sold(winner, np.minimum(least, bid))
