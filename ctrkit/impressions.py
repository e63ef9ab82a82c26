"""One impression of groups/, found by user, day and ad as the logs name them."""

import datetime
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ctrkit.batches import Block, GroupedData, Schema
from ctrkit.errors import UserError, nearest

SPLITS = ("test", "valid", "train")
"""In the order in which they are searched."""
LOOKED_AT = 1000
"""Names around a wrong one, in order, among which the nearest is looked for."""
LISTS = ("sample_id", "time", "ad", "click", "unseen_ad")


@dataclass(frozen=True, kw_only=True)
class Impression:
    """An impression, or one that was not: an ad that the user did not see that day."""

    user: str
    day: datetime.date
    ad: str
    split: str
    """The split of the user's day."""
    block: Block
    """One sample, with its group's behaviours and every feature that groups/ has."""
    sample_id: int | None
    """None: the user did not see the ad that day."""
    click: int | None
    unseen_ad: bool | None
    """Whether no training day has the ad; None where the user did not see it."""
    time: int
    """Epoch milliseconds of the impression, or of the user's first that day, whose scene is taken."""
    number: int
    repeats: int
    """It is the `number`th (from 1) of so many that the user had of the ad that day."""
    lender: "Lender | None" = None
    """The impression whose ad features are taken, where the user did not see the ad."""


@dataclass(frozen=True, kw_only=True)
class Lender:
    """An impression of an ad, by any user."""

    sample_id: int
    user: str
    day: datetime.date


def find(groups: Path, user: str, day: datetime.date, ad: str, number: int = 1) -> Impression:
    """Return the `number`th impression of an ad that a user had on a day, in order of time.

    Where the user has none of this ad that day, the ad's features are those of an impression of it on the nearest day
    (before rather than after, the day's earliest), and the scene's are those of the user's first impression of the day.
    Raises UserError for users, days and ads that groups/ does not know.
    """
    splits = {split: GroupedData(groups, split, list(Schema.read(groups).features)) for split in _splits(groups)}
    split = _split_of(groups, splits, user, day)
    own = _read(splits[split], (pl.col("user") == user) & (pl.col("day") == day))
    places = [i for i, text in enumerate(own.ads) if text == ad]
    places.sort(key=lambda i: (own.rows["time"][i], own.rows["sample_id"][i]))
    if not places and number > 1:
        raise UserError(f"user {user!r} did not see ad {ad!r} on {day}, so there is no number {number} of it")
    if not places:
        return _what_if(groups, splits, own, user, day, ad, split)
    if number > len(places):
        times = "once" if len(places) == 1 else f"{len(places)} times"
        raise UserError(f"user {user!r} saw ad {ad!r} {times} on {day}, so there is no number {number} of it")
    at = places[number - 1]
    row = own.rows.row(at, named=True)
    return Impression(
        user=user,
        day=day,
        ad=ad,
        split=split,
        block=own.block.samples(at, at + 1),
        sample_id=row["sample_id"],
        click=row["click"],
        unseen_ad=row["unseen_ad"],
        time=row["time"],
        number=number,
        repeats=len(places),
    )


@dataclass(frozen=True)
class _Found:
    """Samples with their raw values: row i of `rows` is sample i of `block`."""

    block: Block
    rows: pl.DataFrame

    @property
    def ads(self) -> list[str]:
        return self.rows["ad"].to_list()


def _splits(groups: Path) -> list[str]:
    return [split for split in SPLITS if next((groups / split).glob("part-*.parquet"), None)]


def _read(data: GroupedData, condition: pl.Expr) -> _Found:
    """Return the groups for which a condition on `user`, `day` and `ad` holds. There must be one."""
    blocks, frames = [], []
    for place in data.find(condition)["block"].unique(maintain_order=True):
        frame = next(data.frames(["user", "day", *LISTS], [place]))
        keep = frame.select(condition).to_series().arg_true()
        blocks.append(next(data.blocks([place])).take(keep.cast(pl.Int64).to_numpy()))
        frames.append(frame[keep].explode(LISTS))
    return _Found(Block.concat(blocks), pl.concat(frames))


def _split_of(groups: Path, splits: dict[str, GroupedData], user: str, day: datetime.date) -> str:
    """Return the split that has a user's day."""
    known: set[datetime.date] = set()
    for split, data in splits.items():
        days = data.find(pl.col("user") == user, ["day"])["day"]
        if day in days:
            return split
        known.update(days)
    if known:
        near = sorted(sorted(known, key=lambda d: abs(d - day))[:5])
        raise UserError(
            f"user {user!r} has no impression on {day} in {groups}, so nothing is known of the scene and the history "
            f"that day; try {'one of ' if len(near) > 1 else ''}{', '.join(map(str, near))}"
        )
    users = pl.concat(data.find(pl.lit(True), ["user"])["user"] for data in splits.values())
    raise UserError(f"{groups} has no user {user!r}{_nearest(user, users)}")


def _what_if(
    groups: Path, splits: dict[str, GroupedData], own: _Found, user: str, day: datetime.date, ad: str, split: str
) -> Impression:
    """Return the user's first impression of the day, with the ad features of another's impression of this ad."""
    shown = pl.col("ad").list.contains(ad)
    days = [
        (abs(shown_on - day), shown_on, name)
        for name, data in splits.items()
        for shown_on in data.find(shown, ["day"])["day"].unique()
    ]
    if not days:
        ads = pl.concat(data.find(pl.lit(True), ["ad"])["ad"].explode().unique() for data in splits.values())
        raise UserError(f"{groups} has no impression of ad {ad!r}, so its features are not known{_nearest(ad, ads)}")
    _, shown_on, name = min(days)
    other = _read(splits[name], shown & (pl.col("day") == shown_on))
    rows = other.rows.with_row_index("place").filter(pl.col("ad") == ad).sort("time", "sample_id")
    lent = other.block.samples(rows["place"][0], rows["place"][0] + 1)
    first = own.rows.with_row_index("place").sort("time", "sample_id").row(0, named=True)
    block = own.block.samples(first["place"], first["place"] + 1)
    schema = splits[split].schema
    of_ad = {feature: lent.sample[feature] for kind in ("id", "image") for feature in schema.names(("ad",), kind)}
    return Impression(
        user=user,
        day=day,
        ad=ad,
        split=split,
        block=replace(block, sample={**block.sample, **of_ad}),
        sample_id=None,
        click=None,
        unseen_ad=None,
        time=first["time"],
        number=1,
        repeats=0,
        lender=Lender(sample_id=rows["sample_id"][0], user=rows["user"][0], day=shown_on),
    )


def _nearest(name: str, known: pl.Series) -> str:
    """Name those nearest to a wrong one, of as many as a log may have: among those beside it in order."""
    names = known.unique().sort()
    at = int(names.search_sorted(name))
    return nearest(name, names[max(0, at - LOOKED_AT) : at + LOOKED_AT])
