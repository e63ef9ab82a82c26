"""One day added at a time: what `--today` and `--extend` read, keep and number."""

import datetime
import itertools
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result

from ctrkit.partitions import days_there, read_by_day, read_split
from ctrkit.recipe import Feature, load
from tests.shop import FIRST_DAY, RECIPE, behaviours_of, ctrkit, random_rows, write

RECIPE_BY_DAY = (
    RECIPE.replace("[convert]\n", "[convert]\npartitions = 2\n") + "\n[daily]\nwindow_days = 4\nbehaviour_days = 5\n"
)
DAYS = [FIRST_DAY + datetime.timedelta(days=n) for n in range(7)]
VOCABS = ["gender", "ad_id", "goods", "tag", "image", "position", "hour", "category"]


def convert(shop: Path, today: int | None, extend: str = "", out: str = "") -> Result:
    """Convert the logs of a shop up to day `today` (0 is the first) into the folder dN."""
    words: list[object] = ["--recipe", shop / "recipe.toml", "--raw", shop / "raw"]
    words += ["--today", DAYS[today]] if today is not None else []
    words += ["--extend", shop / extend] if extend else []
    return ctrkit("convert", *words, "--out", shop / (out or f"d{today}"))


def made(result: Result) -> None:
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A week of logs; day 3 converted as a window, days 4 and 5 added; `whole` is all of it at once."""
    folder = tmp_path_factory.mktemp("daily")
    rows = random_rows(21)
    # Goods and ads that come up on day 4 only.
    rows["ads"] += ["anew,gnew,"]
    rows["goods"] += ["gnew,cnew"]
    noon = int(datetime.datetime.combine(DAYS[4], datetime.time(4), datetime.UTC).timestamp())
    rows["impressions"] += [f"inew,{noon},u1,anew,2"]
    rows["behaviours"] += [f"u1,gnew,{noon},click,9"]
    write(folder, RECIPE_BY_DAY, **rows)
    made(convert(folder, 3))
    made(convert(folder, 4, "d3"))
    made(convert(folder, 5, "d4"))
    made(convert(folder, None, out="whole"))
    return folder


def table(folder: Path, name: str) -> pl.DataFrame:
    frame = read_by_day(folder / name, days_there(folder / name))
    assert frame is not None
    return frame


def counts(shop: Path, name: str) -> dict[str, int]:
    found: dict[str, int] = json.loads((shop / f"{name}.json").read_text())["counts"]
    return found


def decoded(convert_folder: Path, frame: pl.DataFrame, features: dict[str, Feature]) -> pl.DataFrame:
    """Replace indexes by values; 0 stays null, and 1 is "?"."""
    for name, feature in features.items():
        if name in frame.columns and not feature.multi_hot:
            words = pl.read_parquet(convert_folder / "vocab" / f"{feature.vocab}.parquet").select("index", "value")
            words = pl.concat([words, pl.DataFrame({"index": [1], "value": ["?"]}, schema=words.schema)])
            found = frame.select(name).join(words, left_on=name, right_on="index", how="left", maintain_order="left")
            frame = frame.with_columns(found["value"].alias(name))
    return frame


def test_a_window_ends_with_its_day(shop: Path) -> None:
    assert days_there(shop / "d3" / "samples") == DAYS[:4]
    whole = table(shop / "whole", "samples").filter(pl.col("day") <= DAYS[3])
    first = table(shop / "d3", "samples")
    keys = ["sample_id", "time", "user", "ad", "click", "day"]
    assert first.select(keys).equals(whole.select(keys))
    assert read_split(shop / "d3") == {"train": DAYS[:2], "valid": DAYS[2:3], "test": DAYS[3:4]}


def test_only_todays_rows_are_read_and_days_move_on(shop: Path) -> None:
    whole = table(shop / "whole", "samples")
    for n in (4, 5):
        of_day = whole.filter(day=DAYS[n]).height
        found = counts(shop, f"d{n}")
        assert found["impressions read"] == found["samples"] == of_day > 20
        assert (found["earlier days kept"], found["earlier days dropped"]) == (3, 1)
        assert days_there(shop / f"d{n}" / "samples") == DAYS[n - 3 : n + 1]
        assert days_there(shop / f"d{n}" / "behaviours") == DAYS[max(0, n - 4) : n + 1]
        assert read_split(shop / f"d{n}") == {"train": DAYS[n - 3 : n - 1], "valid": [DAYS[n - 1]], "test": [DAYS[n]]}
        for day in DAYS[n - 3 : n]:
            for path in (shop / f"d{n}" / "samples" / f"day={day}").iterdir():
                assert path.read_bytes() == (shop / f"d{n - 1}" / "samples" / f"day={day}" / path.name).read_bytes()


def test_no_index_moves_and_new_values_follow(shop: Path) -> None:
    grown = set()
    for vocab in VOCABS:
        before: pl.DataFrame | None = None
        for n in (3, 4, 5):
            words = pl.read_parquet(shop / f"d{n}" / "vocab" / f"{vocab}.parquet")
            assert words["index"].to_list() == list(range(2, words.height + 2))
            assert not words["value"].is_duplicated().any()
            if before is not None:
                assert words["value"].head(before.height).equals(before["value"])
                assert (words["count"].head(before.height) >= before["count"]).all()
                grown |= {vocab} if words.height > before.height else set()
            before = words
    assert {"ad_id", "goods", "image", "category"} <= grown
    goods = [pl.read_parquet(shop / f"d{n}" / "goods.parquet")["goods"] for n in (3, 4, 5)]
    for before, after in itertools.pairwise(goods):
        assert after.head(before.len()).equals(before)
        assert not after.is_duplicated().any()


def test_samples_are_those_of_all_at_once(shop: Path) -> None:
    """The same values; what one folder calls unknown the other may know, since they learn from different days."""
    features = load(shop / "recipe.toml").features
    whole = table(shop / "whole", "samples").filter(pl.col("day").is_in(DAYS[2:6]))
    found = table(shop / "d5", "samples")
    keys = ["time", "user", "ad", "click", "day"]
    assert found.select(keys).equals(whole.select(keys))
    assert found["sample_id"].is_sorted()
    assert found["sample_id"].n_unique() == found.height
    a, b = decoded(shop / "whole", whole, features), decoded(shop / "d5", found, features)
    for name in ("gender", "ad_id", "ad_goods", "position", "hour"):
        both = (a[name] != "?") & (b[name] != "?")
        assert a[name].is_null().equals(b[name].is_null())
        assert a[name].filter(both).equals(b[name].filter(both))
        today = b.filter(day=DAYS[5])[name]
        assert "?" not in today  # what came today is in the vocabulary
    keys = ["day", "user", "time", "text", "dwell_ms"]
    logs = [behaviours_of(shop / n).filter(pl.col("day").is_in(DAYS[1:6])) for n in ("whole", "d5")]
    assert logs[0].height > 300
    assert logs[0].select(keys).sort(keys).equals(logs[1].select(keys).sort(keys))


def test_unseen_ads_are_those_of_no_earlier_day_of_the_window(shop: Path) -> None:
    found = table(shop / "d5", "samples")
    before = set(found.filter(pl.col("day") < DAYS[5])["ad"])
    today = found.filter(day=DAYS[5])
    assert today["unseen_ad"].to_list() == [ad not in before for ad in today["ad"]]
    new = table(shop / "d4", "samples").filter(ad="anew")
    assert new["unseen_ad"].to_list() == [True]


def grouped(shop: Path, name: str) -> Path:
    """Select and group what a conversion gave; return the groups."""
    behaviours, groups = shop / f"{name}-behaviours", shop / f"{name}-groups"
    words: list[object] = ["--recipe", shop / "recipe.toml", "--convert", shop / name]
    made(ctrkit("select-clicks", *words, "--out", behaviours))
    made(ctrkit("group", *words, "--behaviours", behaviours, "--out", groups))
    return groups


def test_what_training_has_not_seen_is_unknown_in_the_groups(shop: Path) -> None:
    """The vocabulary grew on the test day; the model that is tested on it must not know more than it could."""
    groups = grouped(shop, "d4")
    test = pl.read_parquet(groups / "test" / "*.parquet").filter(user="u1").explode("ad", "ad_id", "ad_goods")
    new = test.filter(ad="anew")
    assert new.select("ad_id", "ad_goods").rows() == [(1, 1)]
    train = pl.read_parquet(groups / "train" / "*.parquet")
    known = set(train.explode("ad_id")["ad_id"])
    for part in ("train", "valid", "test"):
        used = set(pl.read_parquet(groups / part / "*.parquet").explode("ad_id")["ad_id"])
        before = pl.read_parquet(shop / "d3" / "vocab" / "ad_id.parquet").height + 2
        assert max(used) < before
    assert len(known) > 5


def test_histories_are_those_of_all_at_once(shop: Path) -> None:
    """The window of three days lies within the five days of behaviours that are kept."""
    made(ctrkit("select-clicks", "--recipe", shop / "recipe.toml", "--convert", shop / "whole", "--out", shop / "wb"))
    made(ctrkit("select-clicks", "--recipe", shop / "recipe.toml", "--convert", shop / "d5", "--out", shop / "db"))
    columns = ["day", "user", "visits", "dwell", "last_time"]
    found = [table(shop, name).filter(day=DAYS[5]).select(columns).sort("user") for name in ("wb", "db")]
    assert found[0].height > 10
    assert found[0].equals(found[1])


@pytest.mark.parametrize(
    ("today", "extend", "code", "message"),
    [
        (None, "d4", 2, "--extend needs --today"),
        (4, "d4", 1, "has samples up to 2024-03-05, so 2024-03-05 cannot be added"),
        (3, "d4", 1, "has samples up to 2024-03-05, so 2024-03-04 cannot be added"),
        (6, "raw", 1, "run ctrkit convert"),
    ],
)
def test_what_cannot_be_added(shop: Path, today: int | None, extend: str, code: int, message: str) -> None:
    result = convert(shop, today, extend, "never")
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert not (shop / "never").exists()


def test_a_day_without_rows(shop: Path, tmp_path: Path) -> None:
    words = ["--recipe", shop / "recipe.toml", "--raw", shop / "raw", "--extend", shop / "d5", "--out", tmp_path / "x"]
    result = ctrkit("convert", *words, "--today", "2024-04-01")
    assert result.exit_code == 1
    assert "has no rows of 2024-04-01" in result.output


def test_names_of_files_may_say_the_day(tmp_path: Path) -> None:
    """{today} is the day that is added; without --extend it stands for every day."""
    rows = random_rows(3)
    raw, _ = write(tmp_path, RECIPE_BY_DAY.replace('"impressions.csv"', '"{today}/impressions.csv"'), **rows)
    header = (raw / "impressions.csv").read_text().split("\n")[0]
    (raw / "impressions.csv").unlink()
    zone = datetime.timezone(datetime.timedelta(hours=8))
    for day in DAYS:
        own = [
            r for r in rows["impressions"] if datetime.datetime.fromtimestamp(int(r.split(",")[1]), zone).date() == day
        ]
        (raw / str(day)).mkdir()
        (raw / str(day) / "impressions.csv").write_text("\n".join([header, *own]) + "\n")
    made(convert(tmp_path, 3))
    assert days_there(tmp_path / "d3" / "samples") == DAYS[:4]
    for day in DAYS[:4]:
        (raw / str(day) / "impressions.csv").write_text("not read again")
    made(convert(tmp_path, 4, "d3"))
    inputs = json.loads((tmp_path / "d4.json").read_text())["inputs"]
    assert [name for name in inputs if "impressions" in name] == [f"raw/{DAYS[4]}/impressions.csv"]
    assert days_there(tmp_path / "d4" / "samples") == DAYS[1:5]
