"""The A/B test of DICM section VII-E, simulated: page views of the demo world's test days, on which trained models
choose the ads and the world says how likely a click is.

Letters in names: R requests (page views), N candidates of one, K slots, U users.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import candidates, vocabulary
from ctrkit.ab_test import Lift, Ratio, lift, split
from ctrkit.auction import Sold, auction, bids
from ctrkit.batches import Schema
from ctrkit.candidates import Requests
from ctrkit.errors import UsageError, UserError
from ctrkit.recipe import Recipe
from ctrkit.recipe import Replay as Settings
from ctrkit.world import World, ad_names, number_of, world

Floats = npt.NDArray[np.float64]
PAPER = {"ctr": 0.071, "ecpm": 0.044}
"""What DICM section VII-E reports of the images, over 24 hours: relative gains, without an interval."""
WHY = (
    "a replay shows users ads that they were never shown, so it needs the true probability of every click, which only "
    "a simulated world knows; logs of real users tell what was clicked of what was shown. Use a recipe with "
    "[simulate], such as demo, and the raw folder that `ctrkit simulate` made from it"
)
EXACT = 1e-9
"""How near the probabilities of the logged impressions have to come to those of the settings."""
METRICS = ("ctr", "ecpm")


def open_world(recipe: Recipe, raw: Path) -> World:
    """Return the world whose logs lie in a raw folder. Raises UserError unless the recipe's [simulate] made them."""
    if recipe.simulate is None:
        raise UsageError(f"recipe {recipe.name!r} has no [simulate] table: {WHY}")
    truth = raw / "truth.parquet"
    if not truth.is_file():
        raise UserError(f"{raw} is not a simulated world (it has no {truth.name}): {WHY}")
    made = world(recipe.simulate)
    try:
        logged = pl.read_csv(raw / "impressions.csv", columns=["impression", "user", "ad", "position"])
        logged = logged.join(pl.read_parquet(truth), on="impression", maintain_order="left")
        user, ad = number_of(logged["user"]), number_of(logged["ad"])
    except (OSError, pl.exceptions.PolarsError) as e:
        told = str(e).partition("\n")[0]
        raise UserError(f"{raw} is not what `ctrkit simulate` wrote ({told}); run it again") from None
    same = bool((user < recipe.simulate.users).all() and (ad < len(made.ads)).all())
    if same:
        off = made.probability(user, ad, logged["position"].to_numpy()) - logged["probability"].to_numpy()
        same = bool((np.abs(off) < EXACT).all())
    if not same:
        raise UserError(
            f"{raw} was not simulated with the [simulate] table of recipe {recipe.name!r}: its true click "
            "probabilities are others than these settings give. Give the recipe and the --set options that made it, or "
            "run `ctrkit simulate` again"
        )
    return made


@dataclass(frozen=True)
class Shown:
    """What one model would show on every page view, and what the world makes of it."""

    sold: Sold
    ad_RK: npt.NDArray[np.int64]
    p_RK: Floats
    """[R, K] true click probability."""

    def by_user(self, luck_RK: Floats | None, user_R: npt.NDArray[np.int64], users: int) -> dict[str, Ratio]:
        """Return metric → its rate by user, [U]: `ctr` and `ecpm` (money per 1,000 impressions).

        luck_RK: numbers from 0 to 1; a click is drawn where one is below the probability. None: expected clicks.
        """
        clicks_RK = self.p_RK if luck_RK is None else (luck_RK < self.p_RK).astype(np.float64)

        def summed(x_RK: Floats) -> Floats:
            return np.asarray(np.bincount(user_R, weights=x_RK.sum(1), minlength=users), np.float64)

        impressions_U = summed(np.ones_like(self.p_RK))
        return {
            "ctr": Ratio(summed(clicks_RK), impressions_U),
            "ecpm": Ratio(1000.0 * summed(clicks_RK * self.sold.price_RK), impressions_U),
        }


def show(score_RN: npt.NDArray[np.floating], requests: Requests, made: World, settings: Settings) -> Shown:
    """Auction every page view by a model's predicted click probabilities, [R, N]."""
    bid_RN = bids(settings, len(made.ads))[requests.ad_RN]
    sold = auction(score_RN, bid_RN, settings)
    ad_RK = np.take_along_axis(requests.ad_RN, sold.winner_RK, axis=1)
    p_RK = made.probability(requests.user_R[:, None], ad_RK, np.arange(settings.slots))
    return Shown(sold, ad_RK, p_RK)


def score(
    recipe: Recipe,
    models: Mapping[str, Path],
    groups: Path,
    features: Path | None,
    convert: Path,
    candidate_groups: Path,
) -> dict[str, npt.NDArray[np.float32]]:
    """Return name → predicted click probability of each candidate, in the order of the folder `candidate_groups`."""
    import torch

    from ctrkit import devices, modelfile, scoring
    from ctrkit.batches import GroupedData

    device = devices.resolve(recipe.train.device, "train.device")
    torch.set_num_threads(recipe.train.threads)
    # All of them before the first is asked: what is wrong with the last is said at once.
    loaded = {
        folder: modelfile.load(folder, groups, features, convert, recipe=recipe.train) for folder in models.values()
    }
    out: dict[Path, npt.NDArray[np.float32]] = {}
    with devices.lock(device):
        for name, folder in models.items():
            if folder.resolve() in out:
                continue
            trained = loaded.pop(folder).to(device)
            data = GroupedData(candidate_groups, candidates.SPLIT, trained.plan.features)
            out[folder.resolve()], _ = scoring.all_scores(trained, data, recipe.predict.batch, f"replay: {name}")
    return {name: out[folder.resolve()] for name, folder in models.items()}


def replay(
    recipe: Recipe,
    raw: Path,
    convert: Path,
    groups: Path,
    features: Path | None,
    models: Mapping[str, Path],
    scratch: Path,
) -> dict[str, Any]:
    """Run the simulated A/B test; return what `replay.json` holds (docs/formats.md).

    models: name → model folder, the control first. scratch: a folder that may be written, and is not there yet.
    """
    settings = recipe.replay
    made = open_world(recipe, raw)
    schema = Schema.read(groups).of_recipe(recipe.features, groups)
    vocabulary.require_of_groups(convert, schema.vocab_digest, groups)
    views = candidates.page_views(recipe, raw, groups)
    if not views.height:
        raise UserError(f"{raw} has no page view on the test days of {groups}; were they made from other logs?")
    requests = candidates.draw(made, views, settings.candidates, settings.seed)
    indexer = candidates.Indexer(recipe, raw, convert)
    candidates.write_groups(indexer, groups, requests, scratch)
    scores = score(recipe, models, groups, features, convert, scratch)
    shape = requests.ad_RN.shape
    shown = {name: show(score_S.reshape(shape), requests, made, settings) for name, score_S in scores.items()}
    truth_RN = made.probability(requests.user_R[:, None], requests.ad_RN, np.zeros(1, np.int64))
    unseen = {
        name: float(np.mean(indexer.is_unseen(ad_names(one.ad_RK.reshape(-1))).to_numpy()))
        for name, one in shown.items()
    }
    return {
        "simulated": True,
        "recipe": recipe.name,
        "settings": settings.model_dump(mode="json", exclude={"arms"}),
        "days": [str(day) for day in views["day"].unique().sort()],
        "users": views["user"].n_unique(),
        "page_views": views.height,
        "order": list(models),
        "control": next(iter(models)),
        **measure(shown, show(truth_RN, requests, made, settings), requests, settings),
        "paper": PAPER,
        "unseen_ads": unseen,
    }


def measure(shown: Mapping[str, Shown], best: Shown, requests: Requests, settings: Settings) -> dict[str, Any]:
    """Return the rates of the arms and their differences from the first, as JSON values.

    shown: arm → what it would show on every page view, the control first. best: the same of the true probabilities.
    """
    users, user_R = _users(requests)
    luck_RK = np.random.default_rng([settings.seed, 2]).random((len(user_R), settings.slots))
    arm_U = split(users, f"replay {settings.seed}", len(shown))
    control = next(iter(shown))
    expected = {name: one.by_user(None, user_R, len(users)) for name, one in shown.items()}
    drawn = {name: one.by_user(luck_RK, user_R, len(users)) for name, one in shown.items()}
    rates: dict[str, Any] = {}
    comparisons = []
    tested, without_luck = {}, {}
    for number, name in enumerate(shown):
        inside = arm_U == number
        tested[name] = {m: drawn[name][m].of(inside) for m in METRICS}
        without_luck[name] = {m: expected[name][m].of(inside) for m in METRICS}
        rates[name] = {
            "test": {
                "users": int(inside.sum()),
                "impressions": int(tested[name]["ctr"].under_U.sum()),
                "clicks": int(tested[name]["ctr"].over_U.sum()),
                **_rates(tested[name]),
            },
            "expected": _rates(without_luck[name]),
            "all_traffic": _rates(expected[name]),
        }
        if name != control:
            pairs = {
                "test": (tested, False),
                "expected": (without_luck, False),
                "all_traffic": (expected, True),
            }
            comparisons.append(
                {"arm": name, "control": control}
                | {
                    what: {m: _json(lift(of[name][m], of[control][m], same_users=same)) for m in METRICS}
                    for what, (of, same) in pairs.items()
                }
            )
    return {
        "arms": rates,
        "by_the_truth": _rates(best.by_user(None, user_R, len(users))),
        "comparisons": comparisons,
        "a_a": same_against_same(shown[control], users, user_R, settings),
    }


def same_against_same(
    shown: Shown, users: pl.Series, user_R: npt.NDArray[np.int64], settings: Settings
) -> dict[str, Any]:
    """Test a model against itself: on the split of the test, and on `splits` others, each with clicks drawn anew.

    Returns `ctr` and `ecpm` on the test's split, and `splits`: how many, and the shares whose interval excludes zero.
    """
    rng = np.random.default_rng([settings.seed, 3])
    found: dict[str, list[bool]] = {m: [] for m in METRICS}
    first: dict[str, Any] = {}
    for number in range(settings.splits + 1):
        by_user = shown.by_user(rng.random(shown.p_RK.shape), user_R, len(users))
        salt = f"replay {settings.seed}" + (f" {number}" if number else "")
        in_second = split(users, salt, 2) == 1
        for m in METRICS:
            one = lift(by_user[m].of(in_second), by_user[m].of(~in_second))
            if number == 0:
                first[m] = _json(one)
            elif one is not None:
                found[m].append(one.excludes_zero)
    shares = {f"{m}_excludes_zero": float(np.mean(found[m])) if found[m] else None for m in METRICS}
    return first | {"splits": settings.splits, **shares}


def _users(requests: Requests) -> tuple[pl.Series, npt.NDArray[np.int64]]:
    """Return the users, each once, and [R] the place there of each request's."""
    users = requests.frame["user"].unique().sort()
    codes = pl.DataFrame({"user": users, "code": np.arange(len(users))})
    return users, requests.frame.join(codes, on="user", how="left", maintain_order="left")["code"].to_numpy()


def _rates(by_user: Mapping[str, Ratio]) -> dict[str, float | None]:
    return {m: one.value if one.under_U.sum() else None for m, one in by_user.items()}


def _json(one: Lift | None) -> dict[str, float] | None:
    return None if one is None else asdict(one)
