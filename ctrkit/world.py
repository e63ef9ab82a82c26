"""The demo world: a simulated shop whose pictures carry the users' tastes, so that the right answers are known.

Goods and ads have a category and a *look* (hue, shape, texture), and the look is what their picture shows; the
two are independent. A user has a few tastes, each one a category and a look. What the user clicks on depends
on the best match with any one taste, so a model has to activate the part of the history that concerns the ad.
Besides: position, the ad's own appeal (in part its look's), the user's age and gender by category, accidental
short clicks, long-tailed popularity and new ads every day. `picture_signal = 0` takes the look out of it all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from PIL import Image, ImageDraw

from ctrkit.progress import track
from ctrkit.recipe import Simulate

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "stripes", "dots", "checks")
DAY_SECONDS = 86_400
# Of two looks' match: the hue's von Mises concentration, and what is left of it where the shapes differ.
HUE_SHARPNESS = 6.0
OTHER_SHAPE = 0.85
# A match is CATEGORY for the category and up to 1 for the look.
CATEGORY = 0.6
# In logits: how much more often an ad of one of the user's categories is shown; how closely organic clicks follow
# the taste; and of a click on an ad: constant, a whole match, a position further down, the look's general appeal,
# the ad's own quality, age and gender by category (the last two standard deviations).
TARGETING = 1.5
BROWSING = 12.0
INTERCEPT = -3.4
MATCH = 4.0
POSITION = -0.12
APPEAL = 0.4
QUALITY = 0.6
AFFINITY = 0.35


@dataclass(frozen=True)
class Items:
    """Goods or ads: parallel arrays of length n."""

    category: Ints
    shop: Ints
    hue: Floats
    """Radians."""
    shape: Ints
    texture: Ints
    popularity: Floats

    def __len__(self) -> int:
        return len(self.category)


@dataclass(frozen=True)
class Tastes:
    """All users' tastes, parallel arrays of length n; `user` says whose, in rising order."""

    user: Ints
    category: Ints
    hue: Floats
    shape: Ints


def simulate(config: Simulate, out: Path) -> dict[str, int]:
    """Write the raw logs and pictures of a simulated shop into the folder `out`; return the row counts.

    Parts of the world draw from generators of their own, so that a setting changes only what it is about.
    """
    out.mkdir(parents=True)
    streams = _streams(config)
    shop, profile = _shop(streams, config)
    goods, ads, tastes = shop.goods, shop.ads, shop.tastes
    impressions, clicks, truth = _impressions(next(streams), shop, config)
    behaviours = _behaviours(next(streams), goods, tastes, config)
    tables = {
        "users": profile,
        "goods": _item_table("goods", "g", goods),
        "ads": _item_table("ad", "a", ads).with_columns(
            pl.Series("goods", [f"g{g}" for g in _ad_goods(config, len(ads))])
        ),
        "impressions": impressions,
        "clicks": clicks,
        "behaviours": behaviours,
    }
    for name, table in tables.items():
        table.write_csv(out / f"{name}.csv")
    truth.write_parquet(out / "truth.parquet")
    pl.concat([_looks("g", goods), _looks("a", ads)]).write_parquet(out / "looks.parquet")
    pictures = out / "pictures"
    pictures.mkdir()
    rng = next(streams)
    drawn = [("g", goods, i) for i in range(len(goods))] + [("a", ads, i) for i in range(len(ads))]
    for prefix, items, i in track(drawn, "simulate", len(drawn), "pictures"):
        picture = draw(rng, items.hue[i], int(items.shape[i]), int(items.texture[i]), config.picture_size)
        picture.save(pictures / f"{prefix}{i}.jpg", quality=90)
    return {**{name: table.height for name, table in tables.items()}, "pictures": len(drawn)}


@dataclass(frozen=True)
class _Shop:
    """Who and what there is."""

    goods: Items
    ads: Items
    tastes: Tastes
    people: Ints
    """[users] the number of each user's gender and age."""


def _streams(config: Simulate) -> Iterator[np.random.Generator]:
    return iter([np.random.default_rng(s) for s in np.random.SeedSequence(config.seed).spawn(8)])


def _shop(streams: Iterator[np.random.Generator], config: Simulate) -> tuple[_Shop, pl.DataFrame]:
    """Return the shop and the users' profiles, by the first three streams."""
    goods = _items(next(streams), config.goods, config)
    ads = _ads(next(streams), goods, config)
    users = next(streams)
    tastes = _tastes(users, config)
    profile = pl.DataFrame(
        {
            "user": _names("u", config.users),
            "gender": users.choice(["f", "m"], config.users),
            "age": users.choice(["18-24", "25-34", "35-44", "45-59", "60+"], config.users),
        }
    )
    people = profile.select(pl.concat_str("gender", "age").rank("dense").cast(pl.Int64) - 1).to_series().to_numpy()
    return _Shop(goods, ads, tastes, people), profile


@dataclass(frozen=True)
class World:
    """What decides a click, which no log tells. Users and ads by their number: user 3 is `u3`, ad 3 `a3`."""

    config: Simulate
    ads: Items
    tastes: Tastes
    first_taste: Ints
    """[users + 1] where each user's tastes begin."""
    people: Ints
    """[users] the number of each user's gender and age."""
    interested: npt.NDArray[np.bool_]
    """[users, categories] whether a taste of the user's is of the category."""
    quality: Floats
    """[ads] in logits, the general appeal of the look included."""
    affinity: Floats
    """[people, categories] in logits."""

    def alive(self, day: int) -> Ints:
        """Return the ads that are shown on a day, 0 being the first."""
        new = self.config.new_ads_per_day
        return np.arange(day * new, self.config.ads + day * new)

    def wanted(self, user_R: Ints, ad_A: Ints) -> Floats:
        """Return [R, A]: the logarithm of how much likelier each ad is to be shown to each user."""
        return np.asarray(
            np.log(self.ads.popularity[ad_A]) + TARGETING * self.interested[user_R][:, self.ads.category[ad_A]]
        )

    def candidates(self, rng: np.random.Generator, user_R: Ints, day: int, n: int) -> Ints:
        """Return [R, n] different ads that are alive on a day, drawn for each user as those that the shop shows are."""
        alive = self.alive(day)
        wanted = self.wanted(user_R, alive)
        return alive[np.argsort(-(wanted + rng.gumbel(size=wanted.shape)), axis=1, kind="stable")[:, :n]]

    def probability(self, user: Ints, ad: Ints, position: Ints) -> Floats:
        """Return the click probability of ads shown to users at positions (0 is the first); the arrays broadcast."""
        user, ad, position = np.broadcast_arrays(user, ad, position)
        match = np.full(user.shape, -np.inf)
        for n in range(self.config.tastes):
            taste = np.minimum(self.first_taste[user] + n, self.first_taste[user + 1] - 1)
            of_taste = _suits(self.tastes, taste, self.ads, ad, self.config)
            np.maximum(match, of_taste, out=match)
        return self.of_match(match, user, ad, position)

    def of_match(self, match: Floats, user: Ints, ad: Ints, position: Ints) -> Floats:
        """Return the click probability, given how well each ad suits the best of the user's tastes."""
        logit = (
            INTERCEPT
            + MATCH * match
            + POSITION * position
            + self.quality[ad]
            + self.affinity[self.people[user], self.ads.category[ad]]
        )
        return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def world(config: Simulate) -> World:
    """Return the world that `simulate` writes the logs of, made again from its settings."""
    streams = _streams(config)
    shop, _ = _shop(streams, config)
    return _truth(next(streams), shop, config)


def _truth(rng: np.random.Generator, shop: _Shop, config: Simulate) -> World:
    """Draw what else decides a click, by the stream of the impressions, of which these are the first draws."""
    ads, tastes = shop.ads, shop.tastes
    n_taste = np.bincount(tastes.user, minlength=config.users)
    interested = np.zeros((config.users, config.categories), bool)
    interested[tastes.user, tastes.category] = True
    appeal = config.picture_signal * APPEAL * (np.cos(ads.hue - 1.0) + 0.5 * (ads.texture == 1))
    quality = appeal + rng.normal(0.0, QUALITY, len(ads))
    affinity = rng.normal(0.0, AFFINITY, (shop.people.max() + 1, config.categories))
    first = np.concatenate([[0], np.cumsum(n_taste)])
    return World(config, ads, tastes, first, shop.people, interested, quality, affinity)


def look_match(hue_a: Floats, shape_a: Ints, hue_b: Floats, shape_b: Ints) -> Floats:
    """Return how alike two looks are, in [0, 1]; arguments broadcast. Hue decides, shape refines, texture is noise."""
    hue = np.exp(HUE_SHARPNESS * (np.cos(hue_a - hue_b) - 1.0))
    return np.asarray(hue * np.where(shape_a == shape_b, 1.0, OTHER_SHAPE))


def number_of(names: pl.Series) -> Ints:
    """Return the numbers of users or ads in the world: 3 of `u3`."""
    return np.asarray(names.str.slice(1).cast(pl.Int64).to_numpy())


def ad_names(number: Ints) -> pl.Series:
    """Return the names of ads: `a3` of 3."""
    return pl.Series(number).to_frame("n").select(pl.format("a{}", "n").alias("ad")).to_series()


def _names(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def _item_table(key: str, prefix: str, items: Items) -> pl.DataFrame:
    return pl.DataFrame(
        {
            key: _names(prefix, len(items)),
            "category": [f"c{c}" for c in items.category],
            "shop": [f"s{s}" for s in items.shop],
            "image": [f"{prefix}{i}.jpg" for i in range(len(items))],
        }
    )


def _looks(prefix: str, items: Items) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "image": [f"{prefix}{i}.jpg" for i in range(len(items))],
            "hue": items.hue,
            "shape": items.shape,
            "texture": items.texture,
        }
    )


def _items(rng: np.random.Generator, n: int, config: Simulate) -> Items:
    category = rng.integers(config.categories, size=n)
    per_category = max(1, config.shops // config.categories)
    return Items(
        category=category,
        shop=category * per_category + rng.integers(per_category, size=n),
        hue=rng.uniform(0, 2 * np.pi, n),
        shape=rng.integers(len(SHAPES), size=n),
        texture=rng.integers(len(TEXTURES), size=n),
        popularity=np.exp(rng.normal(0.0, 1.0, n)),
    )


def _ad_goods(config: Simulate, n: int) -> Ints:
    return np.random.default_rng([config.seed, 99]).integers(config.goods, size=n)


def _ads(rng: np.random.Generator, goods: Items, config: Simulate) -> Items:
    """Ads sell goods, whose category and shop they share, but each shows a creative picture of its own."""
    n = config.ads + config.new_ads_per_day * (config.days - 1)
    creative = _items(rng, n, config)
    sold = _ad_goods(config, n)
    return Items(
        category=goods.category[sold],
        shop=goods.shop[sold],
        hue=creative.hue,
        shape=creative.shape,
        texture=creative.texture,
        popularity=creative.popularity,
    )


def _tastes(rng: np.random.Generator, config: Simulate) -> Tastes:
    user = np.repeat(np.arange(config.users), rng.integers(1, config.tastes + 1, config.users))
    n = len(user)
    return Tastes(
        user=user,
        category=rng.integers(config.categories, size=n),
        hue=rng.uniform(0, 2 * np.pi, n),
        shape=rng.integers(len(SHAPES), size=n),
    )


def _match(tastes: Tastes, rows: Ints, items: Items, config: Simulate) -> Floats:
    """Return [len(rows), n]: how well each item suits each of the given tastes."""
    return _suits(tastes, rows[:, None], items, np.arange(len(items)), config)


def _suits(tastes: Tastes, taste: Ints, items: Items, item: Ints, config: Simulate) -> Floats:
    """Return how well items suit tastes, both by number; the arrays broadcast."""
    category = tastes.category[taste] == items.category[item]
    look = look_match(tastes.hue[taste], tastes.shape[taste], items.hue[item], items.shape[item])
    return np.asarray(CATEGORY * config.category_signal * category + config.picture_signal * look)


def _impressions(
    rng: np.random.Generator, shop: "_Shop", config: Simulate
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    ads, tastes = shop.ads, shop.tastes
    world = _truth(rng, shop, config)
    midnight = _epoch(config)
    columns: dict[str, list[npt.NDArray[np.generic]]] = {
        k: [] for k in ("time", "user", "ad", "position", "p", "click")
    }
    for day in range(config.days):
        alive = world.alive(day)
        shown = Items(**{f: getattr(ads, f)[alive] for f in Items.__dataclass_fields__})
        active = np.flatnonzero(rng.random(config.users) < config.active_share)
        match = _match(tastes, np.arange(len(tastes.user)), shown, config)
        best = np.maximum.reduceat(match, world.first_taste[:-1], axis=0)[active]
        wanted = world.wanted(active, alive)
        order = np.argsort(-(wanted + rng.gumbel(size=wanted.shape)), axis=1, kind="stable")
        length = np.minimum(1 + rng.poisson(config.impressions_per_user_day - 1.0, len(active)), len(alive))
        who = np.repeat(np.arange(len(active)), length)
        place = np.concatenate([np.arange(k) for k in length]) if len(active) else np.zeros(0, np.int64)
        ad = order[who, place]
        position = place % 6
        p = world.of_match(best[who, ad], active[who], alive[ad], position)
        start = midnight + day * DAY_SECONDS + rng.integers(0, DAY_SECONDS - 1800, len(active))
        columns["time"].append(start[who] + 20 * place // 6)
        columns["user"].append(active[who])
        columns["ad"].append(alive[ad])
        columns["position"].append(position)
        columns["p"].append(p)
        columns["click"].append(rng.random(len(p)) < p)
    flat = {k: np.concatenate(v) for k, v in columns.items()}
    table = pl.DataFrame(
        {
            "time": flat["time"],
            "user": [f"u{u}" for u in flat["user"]],
            "ad": [f"a{a}" for a in flat["ad"]],
            "position": flat["position"],
            "p": flat["p"],
            "click": flat["click"],
            "delay": rng.integers(1, 15, len(flat["p"])),
        }
    )
    table = table.sort("time", "user", "position", maintain_order=True).with_row_index("row")
    table = table.with_columns(impression=pl.format("i{}", "row"))
    return (
        table.select("impression", "time", "user", "ad", "position"),
        table.filter("click").select("impression", time=pl.col("time") + pl.col("delay")),
        table.select("impression", probability="p"),
    )


def _behaviours(rng: np.random.Generator, goods: Items, tastes: Tastes, config: Simulate) -> pl.DataFrame:
    """Draw organic clicks on goods: by taste with a long dwell, by accident with a short one."""
    days = config.history_days + config.days
    user = np.repeat(np.arange(config.users), rng.poisson(config.clicks_per_user_day * days, config.users))
    n = len(user)
    first = np.searchsorted(tastes.user, np.arange(config.users + 1))
    taste = first[user] + (rng.random(n) * (first[user + 1] - first[user])).astype(np.int64)
    by_accident = rng.random(n) < config.accidental_share
    liking = BROWSING * _match(tastes, np.arange(len(tastes.user)), goods, config)
    share = np.cumsum(goods.popularity * np.exp(liking - liking.max(axis=1, keepdims=True)), axis=1)
    popular = np.cumsum(goods.popularity)
    luck = rng.random(n)
    chosen = np.searchsorted(popular, luck * popular[-1])
    for part in np.array_split(np.flatnonzero(~by_accident), max(1, n // 4000)):
        row = share[taste[part]]
        chosen[part] = (row < (luck[part] * row[:, -1])[:, None]).sum(axis=1)
    seconds = np.where(by_accident, rng.lognormal(np.log(4.0), 0.6, n), rng.lognormal(np.log(40.0), 0.6, n))
    start = _epoch(config) - config.history_days * DAY_SECONDS
    return pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "goods": [f"g{g}" for g in chosen],
            "time": start + rng.integers(0, days * DAY_SECONDS, n),
            "type": ["click"] * n,
            "dwell": np.round(seconds, 1),
        }
    ).sort("time", "user", "goods", maintain_order=True)


def _epoch(config: Simulate) -> int:
    return (config.first_day.toordinal() - 719_163) * DAY_SECONDS


def draw(rng: np.random.Generator, hue: float, shape: int, texture: int, size: int) -> Image.Image:
    """Draw a look: one shape in its hue and texture, jittered in place, size and light, on a pale ground."""
    big = 2 * size
    ground = int(rng.uniform(215, 245))
    image = Image.new("RGB", (big, big), (ground, ground, ground))
    level, depth = rng.uniform(0.8, 1.0), rng.uniform(0.75, 1.0)
    bright = tuple(int(255 * level * (1 - depth * (0.5 - 0.5 * math.cos(hue - k * 2 * math.pi / 3)))) for k in range(3))
    dark = tuple(c // 2 for c in bright)
    fill = Image.new("RGB", (big, big), bright)
    pen = ImageDraw.Draw(fill)
    step = big // 8
    name = TEXTURES[texture]
    if name == "stripes":
        for x in range(0, big, step):
            pen.rectangle((x, 0, x + step // 2, big), fill=dark)
    elif name == "dots":
        for x in range(0, big, step):
            for y in range(0, big, step):
                pen.ellipse((x, y, x + step // 2, y + step // 2), fill=dark)
    elif name == "checks":
        for x in range(0, big, step):
            for y in range((x // step % 2) * step, big, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=dark)
    mask = Image.new("L", (big, big), 0)
    radius = big * rng.uniform(0.36, 0.46)
    cx, cy = big / 2 + rng.uniform(-0.06, 0.06, 2) * big
    _shape(ImageDraw.Draw(mask), SHAPES[shape], cx, cy, radius)
    image.paste(fill, (0, 0), mask)
    return image.resize((size, size), Image.Resampling.BOX)


def _shape(pen: ImageDraw.ImageDraw, name: str, cx: float, cy: float, r: float) -> None:
    box = (cx - r, cy - r, cx + r, cy + r)
    if name == "circle":
        pen.ellipse(box, fill=255)
    elif name == "square":
        pen.rectangle((cx - 0.85 * r, cy - 0.85 * r, cx + 0.85 * r, cy + 0.85 * r), fill=255)
    elif name == "triangle":
        pen.polygon([(cx, cy - r), (cx - r, cy + 0.8 * r), (cx + r, cy + 0.8 * r)], fill=255)
    elif name == "diamond":
        pen.polygon([(cx, cy - r), (cx - 0.8 * r, cy), (cx, cy + r), (cx + 0.8 * r, cy)], fill=255)
    elif name == "ring":
        pen.ellipse(box, fill=255)
        pen.ellipse((cx - r / 2, cy - r / 2, cx + r / 2, cy + r / 2), fill=0)
    else:
        pen.rectangle((cx - r, cy - r / 3, cx + r, cy + r / 3), fill=255)
        pen.rectangle((cx - r / 3, cy - r, cx + r / 3, cy + r), fill=255)
