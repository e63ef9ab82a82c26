"""One day added at a time: what `--today` and `--extend` read, keep and number."""

import datetime
import itertools
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from click.testing import Result

from ctrkit.partitions import days_there, read_by_day, read_split
from ctrkit.recipe import Feature, load
from tests.shop import FIRST_DAY, RECIPE, at, behaviours_of, ctrkit, random_rows, write

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
    rows = random_rows(21, goods=60)
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
        for day in DAYS[n - 3 : n - 1]:
            for path in (shop / f"d{n}" / "samples" / f"day={day}").iterdir():
                assert path.read_bytes() == (shop / f"d{n - 1}" / "samples" / f"day={day}" / path.name).read_bytes()
        now, before = (table(shop / f"d{i}", "samples").filter(day=DAYS[n - 1]) for i in (n, n - 1))
        assert now.drop("unseen_ad").equals(before.drop("unseen_ad"))  # what it is for has changed: see below
        window = whole.filter(pl.col("day").is_between(DAYS[n - 3], DAYS[n])).group_by("day").len().sort("day")["len"]
        assert [found[f"{part} samples"] for part in ("train", "valid", "test")] == [sum(window[:2]), *window[2:]]
        assert found["samples taken over"] == sum(window[:3])
        assert "samples on days of no split" not in found


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


def test_unseen_ads_are_those_of_no_training_day(shop: Path) -> None:
    """Of the days held out; a training day that was taken over keeps what it was told when it was tested."""
    again = set()
    for n in (3, 4, 5):
        found, split = table(shop / f"d{n}", "samples"), read_split(shop / f"d{n}")
        training = set(found.filter(pl.col("day").is_in(split["train"]))["ad"])
        held_out = found.filter(pl.col("day").is_in(split["valid"] + split["test"]))
        assert held_out["unseen_ad"].to_list() == [ad not in training for ad in held_out["ad"]]
        of_test = held_out.filter(day=DAYS[n])["unseen_ad"].sum()
        assert counts(shop, f"d{n}")["test samples of unseen ads"] == of_test > 0
        again |= (set(held_out.filter(day=DAYS[n])["ad"]) & set(held_out.filter(day=DAYS[n - 1])["ad"])) - training
    assert again  # a day that validates has not been trained on either
    new = [table(shop / name, "samples").filter(ad="anew")["unseen_ad"].to_list() for name in ("d4", "d5")]
    assert new == [[True], [True]]  # on day 5 it validates, and was still on no training day


def test_a_day_that_trains_at_once_has_seen_its_ads(shop: Path) -> None:
    out = ctrkit(
        *("convert", "--recipe", shop / "recipe.toml", "--raw", shop / "raw", "--today", DAYS[4]),
        *("--extend", shop / "d3", "--out", shop / "all", "--set", "split.valid=0", "--set", "split.test=0"),
    )
    made(out)
    assert not table(shop / "all", "samples").filter(day=DAYS[4])["unseen_ad"].any()
    assert read_split(shop / "all") == {"train": DAYS[1:5], "valid": [], "test": []}


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


def extended(shop: Path, folder: Path, recipe: str, today: datetime.date = DAYS[4], extend: str = "d3") -> Result:
    """Add a day to an earlier one with another recipe; the output is `folder`/out."""
    (folder / "recipe.toml").write_text(recipe)
    words: list[object] = ["--recipe", folder / "recipe.toml", "--raw", shop / "raw", "--today", today]
    return ctrkit("convert", *words, "--extend", shop / extend, "--out", folder / "out")


OF_CLICKS = '[convert.clicks]\nfiles = "clicks.csv"\ncolumns = { id = "impression" }\n'


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"Asia/Shanghai"', '"UTC"', "convert.time_zone is 'UTC' and was 'Asia/Shanghai'"),
        (OF_CLICKS, f'{OF_CLICKS}where = "time = 0"\n', "convert.clicks.where is 'time = 0' and was ''"),
        (
            OF_CLICKS,
            '[convert.clicks]\nfiles = "impressions.csv"\n',
            "convert.clicks is 'joined by user, ad and time' and was 'joined by id'; convert.attribution_window is",
        ),
        ("position = {", 'position = { column = "user",', "position.column is 'impressions.user by user' and was"),
        ("position = {", "position = { hash_buckets = 20,", "features.position.hash_buckets is 20 and was 0"),
        ("position = {", "position = { multi_hot = true,", "features.position.multi_hot is True and was False"),
        ("multi_hot = true", 'multi_hot = true, separator = ","', "features.ad_tags.separator is ',' and was '|'"),
        ("hour = {", 'hour = { kind = "number", edges = [3, 9],', "features.hour.edges is [3.0, 9.0] and was []"),
        ("hour = {", 'hour = { vocab = "position",', "features.hour.vocab is 'position' and was 'hour'"),
        ("position =", 'hour = { of = "scene" }\nposition =', "the features are in another order"),
        ("hour = {", "weekday = {", "[features.weekday] is new; [features.hour] is gone"),
        (OF_CLICKS, "", "convert.sampled_negatives and --extend do not go together"),
        ("[convert]", "[convert]\nnegative_rate = 0.5", "convert.negative_rate and --extend do not go together"),
    ],
)
def test_a_recipe_that_means_something_else_cannot_go_on(
    shop: Path, tmp_path: Path, old: str, new: str, told: str
) -> None:
    recipe = RECIPE_BY_DAY.replace(old, new, 1)
    if "another order" in told:
        recipe = "".join(recipe.rsplit('hour = { of = "scene" }\n', 1))
    if not new:
        recipe = recipe.replace("[convert]", "[convert]\nsampled_negatives = 1")
    result = extended(shop, tmp_path, recipe)
    assert result.exit_code in (1, 2), result.output
    assert told in result.output
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_may_change_from_day_to_day(shop: Path, tmp_path: Path) -> None:
    """How files are written, what new values need for an index, and what other stages read."""
    recipe = RECIPE_BY_DAY.replace('files = "ads.csv"', 'files = ["ads.csv"]\nnull_values = ["-"]')
    recipe = recipe.replace("position = {", "position = { min_count = 2, width = 4,")
    made(
        extended(
            shop, tmp_path, recipe.replace("[convert]", "[convert]\nmax_reject_rate = 0.5\nattribution_window = 9")
        )
    )
    a, b = table(tmp_path / "out", "samples"), table(shop / "d4", "samples")
    assert a.select(b.columns).equals(b)
    words: list[object] = ["--recipe", tmp_path / "recipe.toml", "--convert", tmp_path / "out"]
    made(ctrkit("select-clicks", *words, "--out", tmp_path / "behaviours"))
    made(ctrkit("group", *words, "--behaviours", tmp_path / "behaviours", "--out", tmp_path / "groups"))


def test_an_older_conversion_cannot_be_extended(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "d3", tmp_path / "d3")
    facts = json.loads((tmp_path / "d3" / "split.json").read_text())
    del facts["recipe"]
    (tmp_path / "d3" / "split.json").write_text(json.dumps(facts))
    (tmp_path / "raw").symlink_to(shop / "raw")
    result = extended(tmp_path, tmp_path, RECIPE_BY_DAY)
    assert result.exit_code == 1
    assert "does not say what recipe it was made with" in result.output


def test_days_that_were_skipped_are_told(shop: Path, tmp_path: Path) -> None:
    result = extended(shop, tmp_path, RECIPE_BY_DAY.replace("window_days = 4", "window_days = 7"), DAYS[6])
    made(result)
    assert f"d3 ends with {DAYS[3]}, so 2 days before {DAYS[6]} are in no sample and no history" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["counts"]["days skipped"] == 2
    assert "days skipped" not in counts(shop, "d5")


@pytest.mark.parametrize(
    ("kept", "window", "short"), [(7, "3", False), (6, "3", True), (6, "2", False), (30, '"all"', True)]
)
def test_histories_cut_short_are_told(shop: Path, tmp_path: Path, kept: int, window: str, short: bool) -> None:
    """Of four days of samples the first needs a history as long as that of the last, and begins three days earlier."""
    recipe = RECIPE_BY_DAY.replace("behaviour_days = 5", f"behaviour_days = {kept}")
    result = extended(shop, tmp_path, recipe.replace("window_days = 3", f"window_days = {window}"))
    made(result)
    assert ("the earliest days' histories are shorter" in result.output) == short


def test_clicks_of_other_days_are_not_listed(shop: Path, tmp_path: Path) -> None:
    """By id: of the clicks without an impression today, those of today alone."""
    rows = {"impressions": [f"i{n},{at(n)},u1,a1,0" for n in range(5)]}
    clicks = [f"i{n},{at(n) + 60}" for n in range(5)] + [f"i2,{at(2)}", f"x1,{at(1)}", f"x4,{at(4)}", f"x4,{at(4)}"]
    clicks += [f"i4,{at(0)}", "x0,no time"]
    write(tmp_path, RECIPE_BY_DAY, clicks=clicks, **rows)
    made(convert(tmp_path, 3))
    made(convert(tmp_path, 4, "d3"))
    for name, of_others, repeated, rows_ in (
        ("d3", 3, 1, [(6, "duplicate"), (7, "unmatched"), (10, "unmatched"), (11, "unmatched")]),
        ("d4", 6, 2, [(9, "duplicate"), (10, "duplicate"), (8, "unmatched"), (11, "unmatched")]),
    ):
        found = counts(tmp_path, name)
        assert (found["clicks of other days"], found["repeated clicks"]) == (of_others, repeated)
        listed = pl.read_parquet(tmp_path / name / "rejects.parquet").filter(source="clicks")
        assert listed.select("row", "kind").rows() == rows_
        assert table(tmp_path / name, "samples")["click"].to_list() == [1] * 4
    untimed = RECIPE_BY_DAY.replace('"clicks.csv"', '"untimed.csv"')
    (tmp_path / "raw" / "untimed.csv").write_text("\n".join(["impression", *(c.split(",")[0] for c in clicks)]) + "\n")
    made(extended(tmp_path, tmp_path, untimed))
    found = counts(tmp_path, "out")
    assert found["clicks of other days or without an impression"] == 9
    assert not {"clicks of other days", "clicks without an impression"} & set(found)
    assert found["repeated clicks"] == 1


def test_ids_are_compared_within_the_day(tmp_path: Path) -> None:
    """As the docs say: an impression with the id of an earlier day's is a sample of its own."""
    write(tmp_path, RECIPE_BY_DAY, impressions=[f"i{min(n, 3)},{at(n)},u1,a1,0" for n in range(5)], clicks=["i3,0"])
    made(convert(tmp_path, 3))
    result = convert(tmp_path, 4, "d3")
    made(result)
    assert "found among the rows of the day alone" in result.output
    assert table(tmp_path / "d4", "samples")["click"].to_list() == [0, 0, 1, 1]
    made(convert(tmp_path, 4, out="window"))
    assert counts(tmp_path, "window")["duplicate impressions dropped"] == 1


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
