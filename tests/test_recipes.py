"""The shipped recipes, and that of docs/your-own-logs.md, on small files in exactly the formats that they are for."""

import datetime
import gzip
import json
import re
import subprocess
import sys
import zoneinfo
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from ctrkit.pipeline import Graph, Setting
from ctrkit.recipe import load
from tests.shop import ctrkit
from tests.tiny_world import CHECKOUT

SHANGHAI = zoneinfo.ZoneInfo("Asia/Shanghai")
SPLITS = ("train", "valid", "test")
OUTPUTS = {"convert": "convert", "select-clicks": "behaviours", "group": "groups"}


@dataclass
class Data:
    """A raw folder, the recipe that reads it, and what the data stages made of it."""

    folder: Path
    recipe: str
    sets: dict[str, object] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    def write(self, name: str, lines: Iterable[str], encoding: str = "utf-8") -> None:
        """Write a text file, compressed if its name ends in .gz."""
        self.raw.mkdir(parents=True, exist_ok=True)
        content = "".join(line + "\n" for line in lines).encode(encoding)
        (self.raw / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    def command(self, stage: str, *options: object) -> str:
        """Run one command with the recipe and the overrides; return what it printed."""
        words: list[object] = [stage, "--recipe", self.recipe, *options]
        for key, value in self.sets.items():
            words += ["--set", f"{key}={value}"]
        result = ctrkit(*words)
        assert result.exit_code == 0, result.output
        return result.output

    def prepare(self) -> "Data":
        """Run convert, select-clicks and group."""
        at = {stage: self.folder / name for stage, name in OUTPUTS.items()}
        self.printed["convert"] = self.command("convert", "--raw", self.raw, "--out", at["convert"])
        self.printed["select-clicks"] = self.command(
            "select-clicks", "--convert", at["convert"], "--out", at["select-clicks"]
        )
        self.printed["group"] = self.command(
            "group", "--convert", at["convert"], "--behaviours", at["select-clicks"], "--out", at["group"]
        )
        return self

    def samples(self) -> pl.DataFrame:
        """Return all samples in order of their id, with `day` and each feature's text by its name."""
        frame = pl.read_parquet(self.folder / "convert/samples", hive_partitioning=True).sort("sample_id")
        return self._decode(frame, ("user", "ad", "scene"))

    def histories(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return (user, day) → the lists of the behaviours, with texts."""
        frame = pl.scan_ipc(self.folder / "behaviours/**/*.arrow", hive_partitioning=True).collect()
        rows = self._decode(frame, ("behaviour",)).to_dicts()
        return {(row["user"], str(row["day"])): row for row in rows}

    def groups(self) -> pl.DataFrame:
        """Return the rows of all splits."""
        return pl.concat(pl.read_parquet(self.folder / f"groups/{s}/*.parquet") for s in SPLITS if self.days(s))

    def days(self, split: str) -> list[str]:
        days: list[str] = json.loads((self.folder / "convert/split.json").read_text())[split]
        return days

    def rejects(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "convert/rejects.parquet")

    def _decode(self, frame: pl.DataFrame, owners: Sequence[str]) -> pl.DataFrame:
        """Replace indexes by texts: null for missing, "?" for unknown. Numbers stay indexes."""
        for name, feature in load(self.recipe).features.items():
            if feature.of not in owners or feature.kind == "number":
                continue
            words = pl.read_parquet(self.folder / f"convert/vocab/{feature.vocab}.parquet")
            texts = {0: None, 1: "?"} | dict(zip(words["index"], words["value"], strict=True))
            column = frame[name].to_list()
            lists = [[texts[i] for i in cell] if isinstance(cell, list) else texts[cell] for cell in column]
            frame = frame.with_columns(pl.Series(name, lists, strict=False))
        return frame

    def check_identity(self, impressions: int, sampled: int = 0) -> pl.DataFrame:
        """Check that every impression row of the files is accounted for, on disk and in print; return the samples."""
        samples = self.samples()
        kinds = self.rejects().filter(pl.col("source") == "impressions")["kind"].to_list()
        ends = [samples.height, *(kinds.count(kind) for kind in ("reject", "duplicate", "negative"))]
        assert impressions + sampled == sum(ends)
        assert len(kinds) == sum(ends[1:])
        (line,) = (text for text in self.printed["convert"].splitlines() if "impressions read" in text)
        printed = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]
        assert printed == [impressions, *([sampled] if sampled else []), *ends]
        assert samples["sample_id"].to_list() == list(range(samples.height))
        assert self.groups()["sample_id"].explode().sort().to_list() == samples["sample_id"].to_list()
        return samples

    def train(self, variant: str, *options: object) -> pl.DataFrame:
        """Train a variant and return its predictions of the test days."""
        model, scores = self.folder / variant / "model", self.folder / variant / "predictions.parquet"
        groups = ["--variant", variant, "--groups", self.folder / "groups", *options]
        self.command("train", *groups, "--out", model)
        self.command("predict", *groups, "--model", model, "--out", scores)
        return pl.read_parquet(scores)


def at(day: int, hour: float, first: datetime.date, zone: datetime.tzinfo = datetime.UTC) -> int:
    """Return the epoch seconds of an hour of the day that is `day` days after the first."""
    midnight = datetime.datetime.combine(first, datetime.time(), zone) + datetime.timedelta(days=day)
    return int(midnight.timestamp()) + round(hour * 3600)


def gauc(folder: Path, name: str) -> float:
    """Return what `eval` says of a predictions file."""
    out = folder / f"{name}.json"
    result = ctrkit("eval", "--gauc", folder / name / "predictions.parquet", "--json", out)
    assert result.exit_code == 0, result.output
    (metrics,) = json.loads(out.read_text())["variants"].values()
    found: float = metrics["all"]["gauc"]
    return found


def posters(folder: Path, names: Iterable[object]) -> None:
    """Write a small picture of its own colour for each name."""
    folder.mkdir(parents=True)
    for n, name in enumerate(names):
        Image.new("RGB", (32, 48), (20 * n % 256, 90, 255 - 20 * n % 256)).save(folder / f"{name}.jpg")


# taobao-ad

MAY_6 = datetime.date(2017, 5, 6)
RAW_SAMPLE = "user,time_stamp,adgroup_id,pid,nonclk,clk"
AD_FEATURE = "adgroup_id,cate_id,campaign_id,customer,brand,price"
USER_PROFILE = (
    "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
    "new_user_class_level "
)
BEHAVIOR_LOG = "user,time_stamp,btag,cate,brand"
KINDS_OF_BEHAVIOUR = ("pv", "cart", "fav", "buy")
ADS = ["1,6406,83237,1,95471,170.0", "2,6406,83237,1,NULL,9.9", "3,7211,392038,2,20,1999.0", "4,620,368326,3,4,5.0"]


def may(day: int, hour: float) -> int:
    """Return the epoch seconds of an hour in Shanghai; day 0 is the 6th of May 2017."""
    return at(day, hour, MAY_6, SHANGHAI)


def taobao_files(data: Data, ads: Sequence[str] = ADS, encoding: str = "utf-8") -> None:
    """Write the four files. User 777 has no profile; ad 4 is shown on the last day only."""
    rows = [RAW_SAMPLE]
    for day in range(8):
        for user in (234, 523, 777):
            for n, hour in enumerate((0.05, 12, 23.95)):
                ad = 4 if (day, n) == (7, 2) else n + 1
                click = int(ad == 1 and day % 2 == 0)
                rows.append(f"{user},{may(day, hour)},{ad},430548_1007,{1 - click},{click}")
    data.write("raw_sample.csv", rows)
    data.write("ad_feature.csv", [AD_FEATURE, *ads], encoding)
    data.write("user_profile.csv", [USER_PROFILE, "234,0,5,2,5,,3,0,3", "523,5,2,1,2,1,3,1,2"])
    behaviours = [
        (234, -2134949234, "pv", 1, 1),
        (234, 2122867355, "pv", 1, 1),  # of the year 2037
        (234, may(-14, 12), "pv", 620, 20),  # in the window of the first day only
        (234, may(-2, 10), "pv", 6406, 95471),
        (234, may(-2, 11), "pv", 6406, 95471),
        (234, may(-1, 9), "buy", 7211, 20),
        (234, may(-1, 10), "pv", 6406, 20),
        (234, may(0, 0.01), "pv", 9000, 77),  # before the impressions of that day, but of that day
        (523, may(7, 1), "fav", 6406, 20),  # of the last day
        (999, may(0, 1), "cart", 6406, 20),  # a user without impressions
    ]
    data.write("behavior_log.csv", [BEHAVIOR_LOG, *(",".join(map(str, row)) for row in behaviours)])


@pytest.fixture(scope="module")
def taobao(tmp_path_factory: pytest.TempPathFactory) -> Data:
    data = Data(tmp_path_factory.mktemp("taobao"), "taobao-ad")
    taobao_files(data)
    return data.prepare()


def test_taobao_samples(taobao: Data) -> None:
    samples = taobao.check_identity(72)
    assert taobao.rejects().filter(pl.col("kind") != "unmatched").is_empty()
    by_day = samples.group_by("day").agg(pl.len(), pl.col("click").sum()).sort("day")
    assert by_day["day"].cast(pl.String).to_list() == [f"2017-05-{d:02}" for d in range(6, 14)]
    assert by_day["len"].to_list() == [9] * 8
    assert by_day["click"].to_list() == [3, 0, 3, 0, 3, 0, 3, 0]
    assert (taobao.days("train"), taobao.days("valid")) == ([f"2017-05-{d:02}" for d in range(6, 13)], [])
    assert taobao.days("test") == ["2017-05-13"]
    by_ad = {row["ad"]: row for row in samples.to_dicts()}
    assert [by_ad[ad]["ad_id"] for ad in "1234"] == ["1", "2", "3", "?"]
    assert [by_ad[ad]["unseen_ad"] for ad in "1234"] == [False, False, False, True]
    assert [by_ad[ad]["ad_category"] for ad in "1234"] == ["6406", "6406", "7211", "620"]
    assert [by_ad[ad]["ad_brand"] for ad in "1234"] == ["95471", None, "20", "?"]
    assert [by_ad[ad]["campaign"] for ad in "1234"] == ["83237", "83237", "392038", "?"]
    assert by_ad["2"]["price"] < by_ad["1"]["price"] < by_ad["3"]["price"]
    assert min(by_ad[ad]["price"] for ad in "1234") > 1
    assert by_ad["1"]["pid"] == "430548_1007"
    assert sorted(samples["hour"].unique()) == ["0", "12", "23"]
    by_user = {row["user"]: row for row in samples.to_dicts()}
    profile = ("segment", "segment_group", "gender", "age_level", "pvalue_level", "shopping_level", "occupation")
    assert [by_user["234"][name] for name in (*profile, "city_level")] == ["0", "5", "2", "5", None, "3", "0", "3"]
    assert [by_user["523"][name] for name in (*profile, "city_level")] == ["5", "2", "1", "2", "1", "3", "1", "2"]
    assert {by_user["777"][name] for name in (*profile, "city_level")} == {None}


def test_taobao_histories_are_categories_and_brands_without_goods(taobao: Data) -> None:
    histories = taobao.histories()
    assert sorted(histories) == [("234", f"2017-05-{d:02}") for d in range(6, 14)]
    first, second = histories["234", "2017-05-06"], histories["234", "2017-05-07"]
    assert "goods" not in first
    assert first["category"] == ["620", "6406", "7211", "6406"]
    assert first["brand"] == ["20", "95471", "20", "20"]
    assert first["visits"] == [1, 2, 1, 1]
    times = [may(-14, 12), may(-2, 11), may(-1, 9), may(-1, 10)]
    assert first["last_time"] == [1000 * time for time in times]
    assert second["category"] == ["6406", "7211", "6406", "9000"]
    assert second["brand"] == ["95471", "20", "20", "?"]
    # The ad and the behaviours have one vocabulary, so the same category has the same index.
    schema = json.loads((taobao.folder / "groups/schema.json").read_text())["features"]
    assert (schema["category"]["vocab"], schema["brand"]["vocab"]) == ("category", "brand")
    assert (schema["ad_category"]["vocab"], schema["ad_brand"]["vocab"]) == ("category", "brand")


def test_taobao_a_purchase_counts_for_three_views(taobao: Data) -> None:
    out = taobao.folder / "two"
    options = ("--convert", taobao.folder / "convert", "--set", "select-clicks.max_behaviours=2")
    taobao.command("select-clicks", *options, "--out", out)
    chosen = pl.read_ipc(out / "day=2017-05-06" / "part-0000.arrow").row(0, named=True)
    assert chosen["last_time"] == [1000 * may(-2, 11), 1000 * may(-1, 9)]
    taobao.command("select-clicks", *options, "--set", "select-clicks.type_weights.buy=1.0", "--out", out)
    chosen = pl.read_ipc(out / "day=2017-05-06" / "part-0000.arrow").row(0, named=True)
    assert chosen["last_time"] == [1000 * may(-2, 11), 1000 * may(-1, 10)]


def test_taobao_in_gbk(tmp_path: Path) -> None:
    data = Data(tmp_path, "taobao-ad", sets={"convert.ads.encoding": "gbk"})
    taobao_files(data, ["1,6406,83237,1,耐克,170.0", *ADS[1:]], "gbk")
    assert "耐克".encode("gbk") in (data.raw / "ad_feature.csv").read_bytes()
    data.prepare()
    samples = data.check_identity(72)
    assert set(samples.filter(pl.col("ad") == "1")["ad_brand"]) == {"耐克"}


@pytest.fixture(scope="module")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Users who click just the ads of the one category that they behaved in; nothing else tells users apart."""
    data = Data(tmp_path_factory.mktemp("tastes"), "taobao-ad")
    rng = np.random.default_rng(7)
    rows, behaviours = [RAW_SAMPLE], [BEHAVIOR_LOG]
    for user in range(120):
        taste = user % 4
        behaviours += [f"{user},{may(-1, 8 + n)},{KINDS_OF_BEHAVIOUR[n]},{taste},{taste}" for n in range(4)]
        for day in range(8):
            for n, ad in enumerate(rng.permutation(4)):
                rows.append(f"{user},{may(day, 9 + n)},{ad},430539_1007,{int(ad != taste)},{int(ad == taste)}")
    data.write("raw_sample.csv", rows)
    data.write("ad_feature.csv", [AD_FEATURE, *(f"{n},{n},1,1,{n},10.0" for n in range(4))])
    data.write("user_profile.csv", [USER_PROFILE, *(f"{n},0,5,2,5,1,3,0,3" for n in range(120))])
    data.write("behavior_log.csv", behaviours)
    return data.prepare()


@pytest.mark.parametrize("variant", ["basic+ad_id", "basic+ad_id+user_ids", "din"])
def test_taobao_sequences_of_category_and_brand_reach_the_models(tastes: Data, variant: str) -> None:
    tastes.sets = {"train.batch": 96, "train.learning_rate": 0.01, "train.epochs": 3}
    scores = tastes.train(variant)
    assert scores.height == 480
    assert (scores["history_length"] == 1).all()
    found = gauc(tastes.folder, variant)
    if variant == "basic+ad_id":  # without the sequences all users are alike
        assert found < 0.6
    else:
        assert found > 0.95


# movielens-1m and movielens-100k

FILMS = [
    ("1", "Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
    ("2", "Jumanji (1995)", ["Adventure", "Children's", "Fantasy"]),
    ("3", 'Léon: "The Professional", a.k.a. Léon (1994)', ["Crime", "Drama", "Romance", "Thriller"]),
    ("4", '"Quoted" at the Beginning (1999)', ["Comedy"]),
    ("5", "Misérables, Les (1995)", ["Drama", "Musical"]),
    ("6", "Seven Samurai (Shichinin no samurai) (1954)", ["Action", "Drama"]),
]
AGES = ["1", "18", "25", "35", "45", "56"]


def ratings(first: datetime.date, seed: int) -> list[tuple[str, str, int, int]]:
    """Return (user, film, rating, time): each of six users rates each film once, over a hundred days."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(1, 7):
        for film, _, _ in FILMS:
            time = at(int(rng.integers(100)), 24 * rng.random(), first)
            found.append((str(user), film, int(rng.integers(1, 6)), time))
    found += [("1", "1", 5, at(100, 1, first)), ("2", "2", 1, at(100, 2, first)), ("6", "6", 4, at(100, 3, first))]
    return found


def check_films(data: Data, logged: list[tuple[str, str, int, int]]) -> pl.DataFrame:
    """Check samples and histories against the ratings; return the samples."""
    samples = data.check_identity(len(logged))
    assert data.rejects().is_empty()
    expected = sorted((time * 1000, user, film, int(rating >= 4)) for user, film, rating, time in logged)
    assert sorted(samples.select("time", "user", "ad", "click").rows()) == expected
    histories = data.histories()
    for user, day in samples.select("user", pl.col("day").cast(pl.String)).unique().rows():
        midnight = datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
        earlier = [(f, t) for u, f, rating, t in logged if u == user and rating >= 4 and t < midnight]
        last = sorted((max(t for g, t in earlier if g == f), f) for f in {f for f, _ in earlier})
        found = histories.pop((user, day), {"last_time": [], "liked": [], "liked_poster": []})
        assert found["last_time"] == [t * 1000 for t, _ in last]
        assert found["liked_poster"] == [f"{f}.jpg" for _, f in last]
        assert all(text in (f, "?") for text, (_, f) in zip(found["liked"], last, strict=True))
    assert histories == {}
    return samples


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Data:
    data = Data(tmp_path_factory.mktemp("million"), "movielens-1m")
    data.write("ratings.dat", ["::".join(map(str, row)) for row in ratings(datetime.date(2000, 4, 25), 1)])
    films = ["::".join((film, title, "|".join(genres))) for film, title, genres in FILMS]
    data.write("movies.dat", films, "latin-1")
    data.write("users.dat", [f"{n}::{'MF'[n % 2]}::{AGES[n - 1]}::{n + 9}::5511{n}" for n in range(1, 7)])
    posters(data.raw / "posters", [film for film, _, _ in FILMS])
    return data.prepare()


def test_movielens_1m(million: Data) -> None:
    samples = check_films(million, ratings(datetime.date(2000, 4, 25), 1))
    genres = {film: names for film, _, names in FILMS}
    for row in samples.to_dicts():
        n = int(row["user"])
        assert (row["gender"], row["age"], row["occupation"]) == ("MF"[n % 2], AGES[n - 1], str(n + 9))
        assert row["genres"] == genres[row["ad"]]
        assert row["poster"] == f"{row['ad']}.jpg"


def test_movielens_1m_trains_with_posters(million: Data) -> None:
    million.sets = {"extract-images.weights": "random", "extract-images.size": 64, "train.batch": 16, "train.epochs": 1}
    features, convert = million.folder / "features.h5", million.folder / "convert"
    million.command("extract-images", "--pictures", million.raw / "posters", "--convert", convert, "--out", features)
    scores = million.train("basic+ad_id+ad_image+user_images", "--features", features, "--convert", convert)
    tested = million.samples().filter(pl.col("day").cast(pl.String).is_in(million.days("test")))
    assert scores["sample_id"].sort().to_list() == tested["sample_id"].to_list()
    assert scores["score"].is_between(0, 1, closed="none").all()


NAMES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
)
GENRES = NAMES.split()


def test_movielens_100k(tmp_path: Path) -> None:
    data = Data(tmp_path, "movielens-100k")
    logged = ratings(datetime.date(1997, 9, 20), 2)
    data.write("u.data", ["\t".join(map(str, row)) for row in logged])
    lines = []
    for film, title, genres in FILMS:
        flags = [str(int(genre in genres)) for genre in GENRES]
        released = "" if film == "4" else "01-Jan-1995"
        lines.append(
            "|".join([film, title.replace('"', "'"), released, "", f"http://us.imdb.com/M/title-exact?{film}", *flags])
        )
    data.write("u.item", lines, "latin-1")
    people = {1: 17, 2: 18, 3: 24, 4: 25, 5: 55, 6: 56}
    data.write("u.user", [f"{n}|{age}|{'MF'[n % 2]}|student|8571{n}" for n, age in people.items()])
    samples = check_films(data.prepare(), logged)
    for row in samples.to_dicts():
        genres = FILMS[int(row["ad"]) - 1][2]
        flags = [f"{name.lower().replace(chr(39), '').replace('-', '_')}{int(name in genres)}" for name in GENRES]
        assert row["genres"] == flags
        assert row["released"] == (None if row["ad"] == "4" else "01-Jan-1995")
        assert row["occupation"] == "student"
    bucket = {int(row["user"]): row["age"] for row in samples.to_dicts()}
    order = [bucket[n] for n in people]
    assert order[0] < order[1] == order[2] < order[3] < order[4] < order[5]
    assert order[0] > 1


def test_movielens_latest(tmp_path: Path) -> None:
    data = Data(tmp_path, "movielens")
    logged = ratings(datetime.date(2018, 1, 1), 3)
    data.write("ratings.csv", ["userId,movieId,rating,timestamp", *(f"{u},{f},{r:.1f},{t}" for u, f, r, t in logged)])
    lines = ["movieId,title,genres"]
    for film, title, genres in FILMS:
        quoted = '"' + title.replace('"', '""') + '"' if {",", '"'} & set(title) else title
        lines.append(f"{film},{quoted},{'|'.join(genres) if film != '5' else '(no genres listed)'}")
    data.write("movies.csv", lines)
    samples = check_films(data.prepare(), logged)
    for row in samples.to_dicts():
        expected = FILMS[int(row["ad"]) - 1][2] if row["ad"] != "5" else ["(no genres listed)"]
        assert row["genres"] == expected
        assert row["poster"] == f"{row['ad']}.jpg"


# amazon

CLOTHES = "Clothing_Shoes_and_Jewelry"
JULY_1 = datetime.date(2014, 7, 1)
PRODUCTS = [f"B00{n:07}" for n in range(12)]
PATH = ["Clothing, Shoes & Jewelry", "Girls", "Clothing"]
KINDS = ["Active", "Dresses", "Women's Boots"]


def reviews() -> list[dict[str, Any]]:
    """Return reviews as published: fifteen users, each with seven of twelve products, of about a year."""
    rng = np.random.default_rng(3)
    found = []
    for n in range(15):
        for product in rng.permutation(12)[:7]:
            time = at(int(rng.integers(-300, 23)), 0, JULY_1)
            found.append(
                {
                    "reviewerID": f"A{n}KKZ86H",
                    "asin": PRODUCTS[product],
                    "reviewerName": 'J. "Mc" D\u00f6nald',
                    "helpful": [0, n],
                    "reviewText": "Nice {tutu},\twell made.\nWould buy again",
                    "overall": float(1 + n % 5),
                    "summary": "Heavenly",
                    "unixReviewTime": time,
                    "reviewTime": f"{datetime.datetime.fromtimestamp(time, datetime.UTC):%m %d, %Y}",
                }
            )
    return found


def goods(year: int) -> list[str]:
    """Return the metadata's lines as the edition publishes them; product 11 has only its number."""
    lines = []
    for n, asin in enumerate(PRODUCTS):
        kind, url = KINDS[n % 3], f"http://ecx.images-amazon.com/images/I/{n}._SY300_.jpg"
        row: dict[str, Any] = {"asin": asin}
        if year == 2014 and n < 11:
            row |= {"title": 'Girl\'s Ballet "Tutu"', "price": 3.5 + n, "imUrl": url, "brand": "Coxlures"}
            row |= {"related": {"also_bought": [PRODUCTS[0]]}, "salesRank": {"Toys & Games": 211836}}
            row |= {"categories": [[*PATH, kind], ["Sports & Outdoors", "Dance"]]}
        elif n < 11:
            row |= {"title": 'Girl\'s Ballet "Tutu"', "price": f"${3.5 + n:.2f}", "brand": "Coxlures", "also_buy": []}
            row |= {"category": [*PATH, kind], "imageURL": [url], "imageURLHighRes": [url], "feature": ["Tutu"]}
            row |= {"rank": "211,836inClothing", "date": "5 star5 star (0%)", "main_cat": "<img src='a.jpg'/>"}
        lines.append(repr(row) if year == 2014 else json.dumps(row))
    return lines


@pytest.fixture(scope="module", params=[2014, 2018])
def amazon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Data:
    data = Data(tmp_path_factory.mktemp(f"amazon{request.param}"), "amazon")
    logged = reviews()
    if request.param == 2018:
        for row in logged:
            del row["helpful"]
            row |= {"verified": True, "style": {"Size:": " Large"}} if row["overall"] > 2 else {"vote": "1,002"}
    logged.append(logged[0])  # the 2018 edition repeats some
    name = f"{'reviews_' if request.param == 2014 else ''}{CLOTHES}_5.json.gz"
    data.write(name, [json.dumps(row) for row in logged])
    data.write(f"meta_{CLOTHES}.json.gz", goods(request.param))
    # The program at the head of the recipe, as it says to run it.
    recipe = (CHECKOUT / "data/amazon/recipe.toml").read_text(encoding="utf-8").splitlines()
    assert "#   sed -n 's/^#     //p' data/amazon/recipe.toml > goods.py" in recipe
    program = data.folder / "goods.py"
    program.write_text("".join(f"{line[6:]}\n" for line in recipe if line.startswith("#     ")), encoding="utf-8")
    meta = data.raw / f"meta_{CLOTHES}.json.gz"
    made = subprocess.run([sys.executable, program, meta], capture_output=True, check=True)
    (data.raw / "goods.jsonl").write_bytes(made.stdout)
    return data.prepare()


def test_amazon_goods(amazon: Data) -> None:
    rows = [json.loads(line) for line in (amazon.raw / "goods.jsonl").read_text().splitlines()]
    assert [row["asin"] for row in rows] == PRODUCTS
    assert [row["category"] for row in rows] == [KINDS[n % 3] for n in range(11)] + [None]
    assert [row["price"] for row in rows] == [3.5 + n for n in range(11)] + [None]
    assert [row["brand"] for row in rows] == ["Coxlures"] * 11 + [None]
    assert rows[4]["url"] == "http://ecx.images-amazon.com/images/I/4._SY300_.jpg"


def test_amazon_a_negative_for_each_review(amazon: Data) -> None:
    logged = reviews()
    day = {id(r): r["unixReviewTime"] // 86400 for r in logged}
    own = {r["reviewerID"]: {o["asin"] for o in logged if o["reviewerID"] == r["reviewerID"]} for r in logged}
    # In the first days there is no product yet that a user did not review.
    served = [r for r in logged if {o["asin"] for o in logged if day[id(o)] <= day[id(r)]} - own[r["reviewerID"]]]
    assert len(logged) - 10 < len(served) < len(logged)
    samples = amazon.check_identity(len(logged) + 1, sampled=len(served))
    lost = amazon.rejects()
    assert lost.select("source", "row", "kind").rows() == [("impressions", len(logged) + 1, "duplicate")]
    clicked, drawn = (samples.filter(pl.col("click") == c) for c in (1, 0))
    assert sorted(clicked.select("user", "ad", "time").rows()) == sorted(
        (r["reviewerID"], r["asin"], 1000 * r["unixReviewTime"]) for r in logged
    )
    moments = sorted((r["reviewerID"], 1000 * r["unixReviewTime"]) for r in served)
    assert sorted(drawn.select("user", "time").rows()) == moments
    reviewed = set(clicked.select("user", "ad").rows())
    assert not reviewed & set(drawn.select("user", "ad").rows())
    assert set(drawn["ad"]) <= set(PRODUCTS)
    assert drawn["ad"].n_unique() > 6
    # What is known of a product is its own, drawn or not.
    for row in samples.to_dicts():
        n = PRODUCTS.index(row["ad"])
        assert row["ad_category"] in ((None,) if n == 11 else (KINDS[n % 3], "?"))
        assert row["ad_brand"] == (None if n == 11 else "Coxlures")
        assert row["ad_image"] == f"{row['ad']}.jpg"
        assert (row["price"] == 0) == (n == 11)
    cheap = samples.filter(pl.col("price") > 0).select("ad", "price").unique().sort("ad")["price"]
    assert cheap.is_sorted()
    assert cheap[0] < cheap[-1]
    assert [len(amazon.days(s)) for s in ("valid", "test")] == [30, 30]


def test_amazon_histories(amazon: Data) -> None:
    histories = amazon.histories()
    samples = amazon.samples()
    logged = reviews()
    for user, day in samples.select("user", pl.col("day").cast(pl.String)).unique().rows():
        midnight = datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()
        mine = [r for r in logged if r["reviewerID"] == user and r["unixReviewTime"] < midnight]
        earlier = [asin for _, asin in sorted((r["unixReviewTime"], r["asin"]) for r in mine)]
        found = histories.pop((user, day), {"image": [], "category": []})
        assert found["image"] == [f"{asin}.jpg" for asin in earlier]
        kinds = [None if asin == PRODUCTS[11] else KINDS[PRODUCTS.index(asin) % 3] for asin in earlier]
        assert found["category"] == kinds
    assert histories == {}


# paper-din and paper-dicm

PAPERS = {"paper-din": 15, "paper-dicm": 19}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_on_folders_of_parquet_by_day(tmp_path: Path, name: str) -> None:
    data, first, days = Data(tmp_path, name), datetime.date(2017, 7, 1), PAPERS[name]

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        (data.raw / name).parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows).write_parquet(data.raw / name)

    for day in range(days):
        shown = [
            {"user": 7 + n % 2, "ad": n, "time": at(day, 4 * n + 1, first, SHANGHAI), "click": n % 3 == day % 3}
            | {"pid": f"p{n % 2}", "position": n}
            for n in range(6)
        ]
        seen = [{"user": 7, "goods": day, "time": at(day, 23, first, SHANGHAI), "dwell": 4.0 + day}]
        save(f"impressions/day={first + datetime.timedelta(day)}/part-0.parquet", shown)
        save(f"behaviours/day={first + datetime.timedelta(day)}/part-0.parquet", seen)
    save("users/all.parquet", [{"user": 7, "gender": "f", "age_level": 3}])
    save("ads/all.parquet", [{"ad": n, "goods": n + 1, "campaign": n % 2, "customer": 5} for n in range(6)])
    described = [{"goods": n, "shop": n % 3, "category": n % 2, "image": f"{n}.jpg"} for n in range(days)]
    save("goods/all.parquet", described)
    samples = data.prepare().check_identity(6 * days)
    assert [len(data.days(s)) for s in SPLITS] == [days - 1, 0, 1]
    for row in samples.to_dicts():
        n = int(row["ad"])
        assert (row["ad_shop"], row["ad_category"], row["pid"]) == (str((n + 1) % 3), str((n + 1) % 2), f"p{n % 2}")
        assert row["gender"] == ("f" if row["user"] == "7" else None)
    if name == "paper-din":
        buckets = {int(row["ad"]): row["time_of_day"] for row in samples.to_dicts()}
        assert [buckets[n] - buckets[0] for n in range(6)] == [0, 2, 3, 5, 7, 8]  # 1, 5, 9, 13, 17 and 21 o'clock
    histories = data.histories()
    for day in range(1, days):
        # Goods `d` is seen at the end of day `d`, 4 + d seconds long; paper-dicm's shortest visit is of 5 seconds.
        seen = range(max(day - 14, int(name == "paper-dicm")), day)
        found = histories.get(("7", str(first + datetime.timedelta(day))), {"goods": []})
        assert found["goods"] == [str(n) for n in seen]
        if seen:
            assert found["shop"] == [str(n % 3) for n in seen]
    assert {user for user, _ in histories} == {"7"}


def test_the_tuned_network_of_table_ii(tmp_path: Path) -> None:
    """A run of paper-dicm tunes VGG16 on the goods, and one variant reads what that network makes of the pictures."""
    graph = Graph(Setting("paper-dicm", tmp_path, None, (), tmp_path / "runs"))
    made = {(step.stage, step.variant): step for step in graph.steps}
    tune, extract = made["tune-backbone", "vgg16-tuning"], made["extract-images", "vgg16-tuning"]
    assert tune in extract.needs
    assert extract.options[extract.options.index("--weights") + 1] == str(tune.output)
    assert extract in made["train", "vgg16-tuning"].needs
    assert made["extract-images", None] in made["train", "basic+ad_image"].needs
    assert [variant for stage, variant in made if stage == "tune-backbone"] == ["vgg16-tuning"]


# docs/your-own-logs.md


def test_your_own_logs(tmp_path: Path) -> None:
    page = (CHECKOUT / "docs/your-own-logs.md").read_text(encoding="utf-8")
    (tmp_path / "shop.toml").write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    data = Data(tmp_path, str(tmp_path / "shop.toml"))
    shown = [
        "2024-03-01T10:00:00+01:00,v1,p1,0",
        "2024-03-01T10:00:00+01:00,v1,p1,0",  # the same again
        "2024-03-01T10:10:00+01:00,v1,p1,1",  # the nearest before three clicks
        "2024-03-01T12:00:00+01:00,v2,p2,0",  # clicked after exactly half an hour
        "2024-03-01T13:00:00+01:00,v2,p3,0",  # clicked a second later than that
        "2024-03-01T15:00:00+01:00,v1,p2,0",  # clicked a second before
        "2024-03-01T23:30:00,v1,p2,0",  # when?
        "2024-03-01T23:30:00Z,v1,p3,2",  # past midnight in Berlin
        "2024-03-03T10:00:00+01:00,v1,p4,0",
    ]
    clicked = [
        "2024-03-01T10:20:00+01:00,v1,p1,9.5",
        "2024-03-01T10:25:00+01:00,v1,p1,1.5",
        "2024-03-01T10:40:00+01:00,v1,p1,",
        "2024-03-01T12:30:00+01:00,v2,p2,60",
        "2024-03-01T13:30:01+01:00,v2,p3,60",
        "2024-03-01T14:59:59+01:00,v1,p2,4.9",
        "2024-03-01T14:59:59+01:00,v1,p2,4.9",
        "2024-03-01T09:00:00+01:00,v1,p4,20",
        "2024-03-02T00:15:00+01:00,v1,p4,20",
    ]
    data.write("shown.csv", ["shown_at,visitor,item,slot", *shown])
    data.write("clicked.csv", ["clicked_at,visitor,item,seconds", *clicked])
    data.write("items.csv", ["item,category,shop,price", *(f"p{n},c{n % 2},s1,{n}.50" for n in range(1, 5))])
    data.sets = {"convert.max_reject_rate": 0.2}
    samples = data.prepare().check_identity(9)
    lost = data.rejects()
    assert lost.select("source", "row", "kind").sort("source", "row").rows() == [
        *(("clicks", row, "unmatched") for row in (2, 3, 5, 6)),
        ("clicks", 7, "duplicate"),
        *(("clicks", row, "unmatched") for row in (8, 9)),
        ("impressions", 2, "duplicate"),
        ("impressions", 7, "reject"),
    ]
    hours = samples.select("user", "ad", pl.from_epoch("time", "ms").dt.strftime("%d %H:%M"), "click")
    assert hours.rows() == [
        ("v1", "p1", "01 09:00", 0),
        ("v1", "p1", "01 09:10", 1),
        ("v1", "p2", "01 14:00", 0),
        ("v2", "p2", "01 11:00", 1),
        ("v2", "p3", "01 12:00", 0),
        ("v1", "p3", "01 23:30", 0),
        ("v1", "p4", "03 09:00", 0),
    ]
    assert [data.days(s) for s in SPLITS] == [["2024-03-01"], ["2024-03-02"], ["2024-03-03"]]
    histories = data.histories()
    assert sorted(histories) == [("v1", "2024-03-02"), ("v1", "2024-03-03")]
    first, second = histories["v1", "2024-03-02"], histories["v1", "2024-03-03"]
    assert (first["item"], first["visits"], first["dwell"]) == (["p4", "p1"], [1, 2], [20.0, 9.5])
    assert (second["photo"], second["visits"], second["dwell"]) == (["p1.jpg", "p4.jpg"], [2, 2], [9.5, 40.0])
