"""Page views of the demo world with candidate ads for each, in the form in which a model reads impressions.

A page view is one that the shop logged: a user, a time. Its user features and history are those of the user's day in
`groups/`, which end at that day's midnight, so nothing of the test day is in them. The candidates are drawn anew from
the ads that are alive that day, as the shop draws those that it shows. Their features go the way of the logged ones:
the recipe's columns of the raw tables, then the vocabularies of `convert/`, which stay as they are, so that an id that
training never had is unknown.

Letters in names: R requests (page views), N candidates of one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import columns, daily, days, parsing, partitions, vocabulary
from ctrkit.batches import GroupedData, Schema
from ctrkit.blocks import write_blocks
from ctrkit.columns import BETWEEN, Input
from ctrkit.errors import UserError
from ctrkit.recipe import Recipe
from ctrkit.rejects import Rejects
from ctrkit.sources import SOURCES
from ctrkit.tables import open_tables
from ctrkit.world import DAY_SECONDS, World, ad_names, number_of

Ints = npt.NDArray[np.int64]
SPLIT = "test"
GROUPS_AT_ONCE = 256
"""Users' days whose candidates are made, and written as a file, at once."""
OF_REQUEST = ("user", "ad", "position", "clock.hour", "clock.weekday")
"""Columns that a page view and a candidate have: what a feature of an ad or a scene may be made from."""


@dataclass(frozen=True)
class Requests:
    """Page views, in order of user, day and time."""

    frame: pl.DataFrame
    """[R] `user` String, `day` Date (of the recipe's time zone), `time` Int64 epoch milliseconds."""
    ad_RN: Ints
    """[R, N] the candidates, by their number in the world."""

    @property
    def user_R(self) -> Ints:
        """[R] the users, by their number in the world."""
        return number_of(self.frame["user"])


def page_views(recipe: Recipe, raw: Path, groups: Path) -> pl.DataFrame:
    """Return `Requests.frame`: the page views of the test days that the shop logged, those of users in `groups/`."""
    logged = pl.read_csv(raw / "impressions.csv", columns=["time", "user", "position"])
    views = logged.filter(pl.col("position") == 0).select("user", time=1000 * pl.col("time"))
    views = views.with_columns(day=days.day_of("time", recipe.convert.time_zone))
    there = pl.concat(GroupedData(groups, SPLIT, []).frames(["user", "day"])).unique()
    return views.join(there, on=["user", "day"]).select("user", "day", "time").sort("user", "day", "time")


def draw(world: World, views: pl.DataFrame, n: int, seed: int) -> Requests:
    """Draw `n` candidates for each page view, different ones, from the ads that are alive at its time."""
    if n > world.config.ads:
        raise UserError(
            f"replay.candidates = {n} ads are to compete for a page view, and {world.config.ads} are alive on a day "
            "(simulate.ads); give fewer"
        )
    rng = np.random.default_rng([seed, 0])
    user_R, first = number_of(views["user"]), world.config.first_day.toordinal() - 719_163
    day_R = views["time"].to_numpy() // 1000 // DAY_SECONDS - first
    ad_RN = np.empty((views.height, n), np.int64)
    for day in np.unique(day_R):
        for rows in np.array_split(np.flatnonzero(day_R == day), max(1, int((day_R == day).sum()) // 4096)):
            ad_RN[rows] = world.candidates(rng, user_R[rows], int(day), n)
    return Requests(views, ad_RN)


def write_groups(indexer: "Indexer", groups: Path, requests: Requests, out: Path) -> None:
    """Write the candidates as a folder that `ctrkit.batches.GroupedData` reads, with the split "test".

    Samples are in the order of `requests.ad_RN`: a request's candidates one after the other, all at position 0.
    """
    schema = Schema.read(groups)
    shared, own = schema_names(schema, "user", "behaviour"), schema_names(schema, "ad", "scene")
    (out / SPLIT).mkdir(parents=True)
    told = json.loads((groups / "schema.json").read_text(encoding="utf-8"))
    (out / "schema.json").write_text(json.dumps({**told, "block_groups": GROUPS_AT_ONCE}), encoding="utf-8")
    days_of = pl.concat(GroupedData(groups, SPLIT, [*shared]).frames(["user", "day", "group_id", *shared]))
    days_of = days_of.unique("group_id", keep="first").sort("user", "day")
    views = requests.frame.with_row_index("request").group_by("user", "day", maintain_order=True)
    days_of = views.agg("request").join(days_of, on=["user", "day"], how="left", maintain_order="left")
    n = requests.ad_RN.shape[1]
    for i, start in enumerate(range(0, days_of.height, GROUPS_AT_ONCE)):
        some = days_of[start : start + GROUPS_AT_ONCE]
        rows = some["request"].explode().cast(pl.Int64).to_numpy()
        flat = requests.frame[np.repeat(rows, n)].with_columns(
            ad=ad_names(requests.ad_RN[rows].reshape(-1)), position=pl.lit("0")
        )
        ids = (rows[:, None] * n + np.arange(n)).reshape(-1)
        samples = flat.select(
            pl.Series("sample_id", ids, dtype=pl.Int64),
            "time",
            "ad",
            pl.lit(0, dtype=pl.Int8).alias("click"),
            indexer.is_unseen(flat["ad"]).alias("unseen_ad"),
            *(indexer.index(name, flat) for name in own),
        )
        place = np.repeat(np.arange(some.height), n * some["request"].list.len().to_numpy())
        lists = samples.group_by(pl.Series("place", place), maintain_order=True).agg(pl.all()).drop("place")
        common = pl.Series("common", np.arange(some.height), dtype=pl.Int32)
        frame = some.select("user", "day", "group_id", common, *shared).hstack(lists)
        write_blocks(frame.rechunk(), out / SPLIT / f"part-0000-{i:04}.parquet", GROUPS_AT_ONCE)


def schema_names(schema: Schema, *owners: str) -> list[str]:
    """Return the features of these owners, of ids, numbers and pictures."""
    return [name for name, feature in schema.features.items() if feature.of in owners]


class Indexer:
    """Features of ads and scenes as indexes, made from raw values as `ctrkit convert` makes them."""

    def __init__(self, recipe: Recipe, raw: Path, convert: Path) -> None:
        tables = open_tables(recipe, raw, *SOURCES)
        self.recipe, self.convert = recipe, convert
        self.inputs = columns.plan(recipe, tables)
        rejects = Rejects()
        wanted = columns.table_columns(self.inputs, tables).items()
        self.keyed = {name: parsing.keyed(tables[name], columns.KEYS[name], some, rejects)[0] for name, some in wanted}
        self.known = daily.known_sizes(convert)
        trained = partitions.read_by_day(convert / "samples", partitions.read_split(convert)["train"], ["ad"])
        self._trained = trained["ad"].unique() if trained is not None else pl.Series("ad", [], dtype=pl.String)
        self._vocabularies: dict[str, pl.DataFrame] = {}

    def is_unseen(self, ads: pl.Series) -> pl.Series:
        """Say of each ad whether no training day has it."""
        return ~ads.is_in(self._trained.implode())

    def index(self, name: str, rows: pl.DataFrame) -> pl.Series:
        """Return the index of a feature in each row: UInt32, or List(UInt32) if multi-hot.

        rows: `user`, `ad` and `position` String, `time` Int64 epoch milliseconds.
        """
        feature, source = self.recipe.features[name], self.inputs[name]
        texts = pl.DataFrame(self._texts(name, source, rows))
        distinct = texts.unique(maintain_order=True)
        words = distinct.select(pl.concat_str(pl.all().fill_null(""), separator=BETWEEN)).to_series()
        values = columns.values(words, name, feature, source, self.keyed)
        if feature.vocab not in self._vocabularies:
            self._vocabularies[feature.vocab] = vocabulary.read(self.convert / "vocab", feature.vocab)
        found = vocabulary.look_up(values, feature, self._vocabularies[feature.vocab])
        found = self._hide(found, feature.vocab).alias(name)
        return texts.join(
            distinct.with_columns(found.alias("__index")),
            on=texts.columns,
            how="left",
            maintain_order="left",
            nulls_equal=True,
        )["__index"].alias(name)

    def _texts(self, name: str, source: Input, rows: pl.DataFrame) -> Iterable[pl.Series]:
        """Yield the texts of the log's columns that decide a feature, as a log would have them."""
        local = days.local("time", self.recipe.convert.time_zone).dt
        clock = {"clock.hour": local.hour(), "clock.weekday": local.weekday()}
        for key in source.keys:
            if key not in OF_REQUEST:
                raise UserError(
                    f"[features.{name}] is made from the column {key!r} of the impressions, and a page view that is "
                    f"only simulated has none: a replay works with features of the user, of the ad, of the clock and "
                    f"of the position"
                )
            expression = clock[key].cast(pl.String) if key in clock else pl.col(key)
            yield rows.select(expression.alias(key)).to_series()

    def _hide(self, index: pl.Series, vocab: str) -> pl.Series:
        """Make unknown what no training day had, where later days have extended the vocabulary; as group does."""
        size = self.known.get(vocab)
        if size is None:
            return index
        hidden = pl.when(pl.element() < size).then(pl.element()).otherwise(pl.lit(vocabulary.UNKNOWN, dtype=pl.UInt32))
        if index.dtype == pl.List:
            return index.list.eval(hidden)
        return index.to_frame("i").select(
            pl.when(pl.col("i") < size).then("i").otherwise(pl.lit(vocabulary.UNKNOWN, dtype=pl.UInt32))
        )["i"]
