"""A tiny shop in the raw format of the demo, for the tests of the data stages."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from click.testing import CliRunner, Result

from ctrkit.cli import main

ZONE = datetime.timezone(datetime.timedelta(hours=8))
FIRST_DAY = datetime.date(2024, 3, 1)

TABLES = """
[convert.impressions]
files = "impressions.csv"
columns = { id = "impression" }
[convert.clicks]
files = "clicks.csv"
columns = { id = "impression" }
[convert.users]
files = "users.csv"
[convert.ads]
files = "ads.csv"
[convert.goods]
files = "goods.csv"
[convert.behaviours]
files = "behaviours.csv"
"""
"""The raw tables of the demo, which `ctrkit simulate` writes too."""

RECIPE = """
[convert]
time_zone = "Asia/Shanghai"
"""
RECIPE += TABLES
RECIPE += """
[features]
gender = { of = "user" }
ad_id = { of = "ad", column = "ad", switch = "ad_id" }
ad_goods = { of = "ad", column = "goods", vocab = "goods" }
ad_tags = { of = "ad", column = "tags", vocab = "tag", multi_hot = true }
ad_image = { of = "ad", kind = "image", column = "{goods}.jpg" }
position = { of = "scene" }
hour = { of = "scene" }
goods = { of = "behaviour" }
category = { of = "behaviour" }
image = { of = "behaviour", kind = "image", column = "{goods}.jpg" }

[select-clicks]
window_days = 3
max_behaviours = 4
min_dwell = 5.0

[group]
block_groups = 8
"""

HEADERS = {
    "impressions": "impression,time,user,ad,position",
    "clicks": "impression,time",
    "users": "user,gender",
    "ads": "ad,goods,tags",
    "goods": "goods,category",
    "behaviours": "user,goods,time,type,dwell",
}
SMALL = {
    "behaviours": ["u1,g3,1709265600,click,9"],
    "users": ["u1,f", "u2,m"],
    "ads": ["a1,g1,red|new", "a2,g2,", "a3,g9,blue"],
    "goods": ["g1,shoes", "g2,hats", "g3,shoes", "g9,bags"],
}


def at(day: int, hour: float = 12.0) -> int:
    """Return the epoch seconds of an hour of day `day` (0 is the first) in the shop's zone."""
    start = datetime.datetime.combine(FIRST_DAY, datetime.time(), ZONE) + datetime.timedelta(days=day)
    return int(start.timestamp() + 3600 * hour)


def write(folder: Path, recipe: str = RECIPE, **rows: Sequence[str]) -> tuple[Path, Path]:
    """Write the raw files (`SMALL` where not given) and the recipe; return the raw folder and the recipe's file."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, header in HEADERS.items():
        lines = [header, *rows.get(name, SMALL.get(name, []))]
        (raw / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return raw, folder / "recipe.toml"


def random_rows(seed: int, users: int = 25, goods: int = 30, days: int = 7) -> dict[str, list[str]]:
    """Return random rows: every user has some impressions and behaviours, some users have neither profile nor goods."""
    rng = np.random.default_rng(seed)

    def moment() -> int:
        return at(int(rng.integers(days)), float(rng.random() * 24))

    impressions = [
        f"i{n},{moment()},u{rng.integers(users)},a{rng.integers(goods)},{rng.integers(3)}" for n in range(12 * users)
    ]
    behaviours = []
    for _ in range(25 * users):
        dwell = "" if rng.random() < 0.2 else f"{rng.exponential(20):.3f}"
        kind = rng.choice(["click", "cart"])
        behaviours.append(f"u{rng.integers(users)},g{rng.integers(goods)},{moment()},{kind},{dwell}")
    return {
        "impressions": impressions,
        "clicks": [f"i{n},0" for n in rng.choice(len(impressions), len(impressions) // 4, replace=False)],
        "users": [f"u{n},{'fm'[n % 2]}" for n in range(users - 2)],
        "ads": [f"a{n},g{(7 * n) % goods},{'|'.join(rng.choice(list('xyz'), n % 3))}" for n in range(goods - 1)],
        "goods": [f"g{n},c{n % 5}" for n in range(goods - 1)],
        "behaviours": behaviours,
    }


def ctrkit(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(w) for w in words])


def run(folder: Path, stage: str, sets: Mapping[str, object] | None = None) -> Result:
    """Run one of the data stages on the shop of `folder`, outputs beside the raw folder."""
    words: list[object] = [stage, "--recipe", folder / "recipe.toml", "--out", folder / OUTPUTS[stage]]
    words += ["--raw", folder / "raw"] if stage == "convert" else ["--convert", folder / "convert"]
    if stage == "group":
        words += ["--behaviours", folder / "behaviours"]
    for key, value in (sets or {}).items():
        words += ["--set", f"{key}={value}"]
    return ctrkit(*words)


OUTPUTS = {"convert": "convert", "select-clicks": "behaviours", "group": "groups"}


def run_all(folder: Path, sets: Mapping[str, object] | None = None) -> None:
    """Run convert, select-clicks and group; all must succeed."""
    for stage in OUTPUTS:
        result = run(folder, stage, sets)
        assert result.exit_code == 0, result.output


def behaviours_of(convert: Path) -> pl.DataFrame:
    """Return the behaviours that convert wrote, with `day`, `user` and the text of the `goods` instead of codes."""
    days, frames = convert / "behaviours", []
    goods = pl.read_parquet(convert / "goods.parquet")["goods"]
    types = pl.read_parquet(convert / "types.parquet")["type"] if (convert / "types.parquet").is_file() else None
    for path in sorted(days.glob("day=*/part-*.arrow")):
        users = pl.read_parquet(convert / "users" / f"{path.stem}.parquet")["user"]
        log = pl.read_ipc(path).with_columns(day=pl.lit(path.parent.name.removeprefix("day=")).str.to_date())
        if types is not None:
            log = log.with_columns(type=types.gather(log.select(_row("type_code")).to_series())).drop("type_code")
        texts = goods.gather(log.select(_row("goods_code")).to_series())
        log = log.with_columns(user=users.gather(log["user_code"]), text=texts)
        frames.append(log.drop("user_code", "goods_code"))
    return pl.concat(frames, how="vertical_relaxed")


def _row(code: str) -> pl.Expr:
    """Return the row that a code from 1 stands for; null for 0."""
    return pl.when(pl.col(code) > 0).then(pl.col(code).cast(pl.UInt32) - 1)
