"""Seeded raw logs of any size: daily CSV files of impressions and behaviours, and the recipe that reads them.

    python benchmarks/logs.py --impressions 200000

Impressions have a label, an id and 27 features of 2 to a million values, most of them rare. A user sees about
`GROUP` impressions on a day on which there are any. There are three times as many behaviours; under the recipe's
window and `MAX_BEHAVIOURS` a user and day has a history of about 32.6 goods. No more than one day's users and times
are held in memory. The logs are kept in BENCH_DATA (runs/bench) and made again only when this file or a setting
changes.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import polars as pl

FIRST_DAY = datetime.date(2024, 3, 1)
DAYS = 8
WINDOW_DAYS = 14
"""Behaviours begin so many days before the first impression."""
GROUP = 12
"""Impressions of a user on a day with any, on average."""
BEHAVIOURS = 3
"""Behaviours for each impression."""
USERS = 0.0366
"""Users for each impression; so many that histories are 32.6 goods long."""
MAX_BEHAVIOURS = 50
MIN_DWELL = 2.0
REVISITED = 0.3
"""Share of behaviours that go back to one of a user's few favourite goods."""
FAVOURITES = 6
CLICK_RATE = 0.05
ADS, GOODS = 500_000, 1_000_000
TYPES, TYPE_SHARES = ("click", "cart", "favourite", "purchase"), (0.92, 0.04, 0.03, 0.01)
TAIL = 4
"""A value's rank is its cardinality times u**TAIL for uniform u: frequency falls as rank**(1/TAIL - 1)."""
CHUNK_ROWS = 250_000

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """A feature's column of the impressions. Its value follows from the user, the ad, the ad's goods, or chance."""

    name: str
    of: str
    values: int
    decided_by: str
    prefix: str = ""
    """Written before the number, so that the value is text."""
    missing: float = 0.0
    """Share of empty cells."""
    vocab: str = ""


COLUMNS = (
    Column("gender", "user", 2, "user", "sex_", 0.03),
    Column("age_level", "user", 8, "user", missing=0.05),
    Column("occupation", "user", 20, "user"),
    Column("city", "user", 400, "user"),
    Column("member_level", "user", 6, "user", missing=0.3),
    Column("phone", "user", 3_000, "user", "model-"),
    Column("segment", "user", 5_000, "user"),
    Column("goods", "ad", GOODS, "ad", vocab="goods"),
    Column("category", "ad", 10_000, "goods", vocab="category"),
    Column("brand", "ad", 100_000, "goods", missing=0.1),
    Column("shop", "ad", 200_000, "goods"),
    Column("price_level", "ad", 50, "goods"),
    Column("campaign", "ad", 100_000, "ad"),
    Column("advertiser", "ad", 30_000, "ad"),
    Column("creative", "ad", 300_000, "ad", "cr"),
    Column("size", "ad", 12, "ad", "s"),
    Column("landing", "ad", 4, "ad"),
    Column("position", "scene", 20, "chance"),
    Column("page", "scene", 500, "chance"),
    Column("channel", "scene", 40, "chance", "ch_"),
    Column("network", "scene", 5, "chance", "net-", 0.02),
    Column("app_version", "scene", 80, "chance", "v"),
    Column("experiment", "scene", 100, "chance"),
    Column("referrer", "scene", 20_000, "chance", missing=0.2),
    Column("area", "scene", 100_000, "chance"),
    Column("screen", "scene", 60, "chance"),
    Column("query", "scene", 1_000_000, "chance", "q"),
)


@dataclass(frozen=True)
class Settings:
    """What decides the logs' bytes, beside this file."""

    impressions: int
    seed: int = 1
    like: int = 0
    """As many users as logs of so many impressions have; 0: as many as go with `impressions`."""

    @property
    def behaviours(self) -> int:
        return BEHAVIOURS * self.impressions

    @property
    def users(self) -> int:
        return max(2 * GROUP, round(USERS * (self.like or self.impressions)))


@dataclass(frozen=True)
class Logs:
    """Logs on disk."""

    folder: Path
    settings: Settings

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    @property
    def recipe(self) -> Path:
        return self.folder / "bench.toml"

    @property
    def files(self) -> list[Path]:
        return sorted(self.raw.glob("*.csv"))


def ready(settings: Settings, cache: Path) -> Logs:
    """Return the logs with these settings below the folder `cache`; write them if they are not there."""
    digest = hashlib.sha256(json.dumps(asdict(settings)).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / f"logs-{settings.impressions}-{digest}"
    if not folder.is_dir():
        work = cache / f".{folder.name}.tmp-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        write(Logs(work, settings))
        work.rename(folder)
    return Logs(folder, settings)


def write(logs: Logs) -> None:
    """Write a CSV file a day of impressions and of behaviours, and the recipe."""
    logs.raw.mkdir(parents=True)
    logs.recipe.write_text(recipe(), encoding="utf-8")
    activity = np.random.default_rng([logs.settings.seed, 0]).gamma(2.0, size=logs.settings.users).cumsum()
    for day in range(DAYS):
        with (logs.raw / f"impressions-{FIRST_DAY + datetime.timedelta(days=day)}.csv").open("wb") as file:
            write_impressions(logs.settings, day, file)
    for day in range(-WINDOW_DAYS, DAYS):
        with (logs.raw / f"behaviours-{FIRST_DAY + datetime.timedelta(days=day)}.csv").open("wb") as file:
            write_behaviours(logs.settings, day, activity / activity[-1], file)


def write_impressions(settings: Settings, day: int, file: IO[bytes]) -> None:
    """Write the impressions of a day in order of time."""
    rng = np.random.default_rng([settings.seed, 1, day])
    first, last = settings.impressions * day // DAYS, settings.impressions * (day + 1) // DAYS
    users = max(1, (last - first) // GROUP)
    active = rng.choice(settings.users, users, replace=False)
    # One impression each, and the others by how long each stays.
    stay = rng.exponential(size=users).cumsum()
    who = np.concatenate([np.arange(users), np.searchsorted(stay / stay[-1], rng.random(last - first - users))])
    begin = rng.integers(86_400 - 3_600, size=users)
    second = begin[who] + np.minimum(rng.exponential(300.0, who.size), 3_599).astype(np.int64)
    order = np.argsort(second, kind="stable")
    user, second = active[who[order]].astype(np.int64), second[order]
    for rows in chunks(user.size):
        n = rows.stop - rows.start
        keys = {"user": user[rows], "ad": long_tailed(rng.random(n), ADS)}
        keys["goods"] = long_tailed(hashed(keys["ad"], salt("goods")), GOODS)
        frame = {
            "impression": first + np.arange(rows.start, rows.stop),
            "time": midnight(day) + second[rows],
            "user": keys["user"],
            "ad": keys["ad"],
            "click": (rng.random(n) < CLICK_RATE).astype(np.int8),
        }
        cells = {c.name: column(c, keys, rng, n) for c in COLUMNS}
        append(pl.DataFrame(frame | cells), file, header=rows.start == 0)


def column(c: Column, keys: dict[str, Ints], rng: np.random.Generator, n: int) -> pl.Series:
    """Return n cells of a column."""
    if c.name == "goods":
        numbers = keys["goods"]
    elif c.decided_by == "chance":
        numbers = long_tailed(rng.random(n), c.values)
    else:
        numbers = long_tailed(hashed(keys[c.decided_by], salt(c.name)), c.values)
    cells = pl.Series(c.name, numbers)
    if c.prefix:
        cells = (c.prefix + cells.cast(pl.String)).alias(c.name)
    if c.missing:
        # What follows from a user or an ad is missing always or never.
        u = rng.random(n) if c.decided_by == "chance" else hashed(keys[c.decided_by], salt(c.name) + 1)
        cells = cells.set(pl.Series(u < c.missing), None)
    return cells


def write_behaviours(settings: Settings, day: int, activity: Floats, file: IO[bytes]) -> None:
    """Write the behaviours of a day in order of time. `activity` is the users' cumulative share of behaviours."""
    rng = np.random.default_rng([settings.seed, 2, WINDOW_DAYS + day])
    days = WINDOW_DAYS + DAYS
    first, last = (settings.behaviours * (WINDOW_DAYS + d) // days for d in (day, day + 1))
    second = np.sort(rng.integers(86_400, size=last - first))
    for rows in chunks(second.size):
        n = rows.stop - rows.start
        user = np.searchsorted(activity, rng.random(n), side="right").astype(np.int64)
        favourite = hashed(user * FAVOURITES + rng.integers(FAVOURITES, size=n), salt("favourite"))
        goods = long_tailed(np.where(rng.random(n) < REVISITED, favourite, rng.random(n)), GOODS)
        dwell = pl.Series(rng.exponential(30.0, n).round(1)).set(pl.Series(rng.random(n) < 0.05), None)
        kinds = pl.Series(TYPES)[rng.choice(len(TYPES), n, p=TYPE_SHARES)]
        frame = {
            "user": user,
            "goods": goods,
            "category": long_tailed(hashed(goods, salt("category")), 10_000),
            "time": midnight(day) + second[rows],
            "dwell": dwell,
            "type": kinds,
        }
        append(pl.DataFrame(frame), file, header=rows.start == 0)


def append(frame: pl.DataFrame, file: IO[bytes], *, header: bool) -> None:
    frame.write_csv(file, include_header=header)


def chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(rows, start + CHUNK_ROWS))


def midnight(day: int) -> int:
    """Return the epoch seconds of the midnight, UTC, before a day by number."""
    start = datetime.datetime.combine(FIRST_DAY, datetime.time(), datetime.UTC) + datetime.timedelta(days=day)
    return int(start.timestamp())


def long_tailed(u: Floats, values: int) -> Ints:
    """Turn uniform numbers into 0 … values − 1, small ones far more often than large ones."""
    return (values * u**TAIL).astype(np.int64)


def hashed(key: Ints, salted: int) -> Floats:
    """Return a uniform number in [0, 1) that follows from a key (the finaliser of SplitMix64)."""
    x = key.astype(np.uint64) + np.uint64(salted)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def salt(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def recipe() -> str:
    """Return the recipe of the logs: the 27 columns, the ad's picture, and goods, category and picture behaviours."""
    features = []
    for c in COLUMNS:
        name = f"ad_{c.name}" if c.vocab else c.name
        vocab = f', vocab = "{c.vocab}"' if c.vocab else ""
        features.append(f'{name} = {{ of = "{c.of}", column = "{c.name}"{vocab} }}')
    listed = "\n".join(features)
    return f"""about = "Logs of no meaning, to measure the data stages with."

[convert]
label = "click = 1"
time_unit = "s"
[convert.impressions]
files = "impressions-*.csv"
columns = {{ id = "impression" }}
[convert.behaviours]
files = "behaviours-*.csv"

[split]
valid = 1
test = 1

[features]
{listed}
ad_image = {{ of = "ad", kind = "image", column = "{{goods}}.jpg" }}
goods = {{ of = "behaviour" }}
category = {{ of = "behaviour" }}
image = {{ of = "behaviour", kind = "image", column = "{{goods}}.jpg" }}

[select-clicks]
window_days = {WINDOW_DAYS}
max_behaviours = {MAX_BEHAVIOURS}
min_dwell = {MIN_DWELL}
"""


def add_options(parser: argparse.ArgumentParser, impressions: int) -> None:
    """Add the options that say which logs to use."""
    parser.add_argument("--impressions", type=int, default=impressions, help="rows of the impression log (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("BENCH_DATA") or "runs/bench"),
        help="folder to keep logs in; default: BENCH_DATA, or runs/bench",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, 10_000_000)
    args = parser.parse_args()
    logs = ready(Settings(args.impressions, args.seed), args.data)
    print(json.dumps({"recipe": str(logs.recipe), "raw": str(logs.raw), "bytes": sum_bytes(logs.files)}))


def sum_bytes(files: list[Path]) -> int:
    return sum(f.stat().st_size for f in files)


if __name__ == "__main__":
    main()
