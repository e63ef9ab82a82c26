import datetime
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from ctrkit.convert import convert
from ctrkit.errors import UsageError, UserError
from ctrkit.partitions import read_by_day, read_split
from ctrkit.recipe import load
from tests.shop import FIRST_DAY, RECIPE, at, random_rows, write

DAYS = [FIRST_DAY + datetime.timedelta(days=n) for n in range(10)]


def converted(folder: Path, *sets: str, recipe: str = RECIPE, **rows: list[str]) -> tuple[Path, dict[str, int]]:
    """Write a shop and convert it; return what was written and the counts."""
    raw, file = write(folder, recipe, **rows)
    out = folder / "convert"
    out.mkdir()
    return out, convert(load(file, sets=sets), raw, out)


def samples_of(out: Path) -> pl.DataFrame:
    frame = read_by_day(out / "samples", DAYS)
    assert frame is not None
    return frame


def vocab(out: Path, name: str) -> dict[str, tuple[int, int]]:
    """Return value → (index, count)."""
    frame = pl.read_parquet(out / "vocab" / f"{name}.parquet")
    return {value: (index, count) for value, index, count in frame.select("value", "index", "count").iter_rows()}


DAYS_OF_U1 = [f"i{n},{at(n)},u1,a1,0" for n in range(3)]


def test_clicks_are_joined_and_everything_odd_is_counted(tmp_path: Path) -> None:
    out, counts = converted(
        tmp_path,
        impressions=[*DAYS_OF_U1, f"i1,{at(1, 13)},u2,a2,1", f"i9,{at(2, 1)},u2,a2,1"],
        clicks=["i1,0", "i1,5", "i9,0", "nosuch,0"],
    )
    samples = samples_of(out)
    assert samples.select("sample_id", "user", "ad", "click").rows() == [
        (0, "u1", "a1", 0),
        (1, "u1", "a1", 1),
        (2, "u2", "a2", 1),
        (3, "u1", "a1", 0),
    ]
    assert counts["impressions read"] == 5
    assert counts["duplicate impressions dropped"] == 1
    assert counts["samples"] == 4
    assert counts["repeated clicks"] == 1
    assert counts["clicks without an impression"] == 1
    assert counts["clicks among samples"] == 2


def test_labels_by_an_expression(tmp_path: Path) -> None:
    recipe = RECIPE.replace('[convert.clicks]\nfiles = "clicks.csv"\ncolumns = { id = "impression" }\n', "")
    recipe = recipe.replace("[convert]\n", '[convert]\nlabel = "position >= 2"\n')
    rows = [f"i{n},{at(n % 3)},u1,a1,{n}" for n in range(6)]
    out, _ = converted(tmp_path, recipe=recipe, impressions=rows)
    assert samples_of(out).sort("time", "sample_id")["click"].to_list() == [0, 1, 0, 1, 1, 1]


def test_both_ways_of_labelling_or_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"either `label`.*not both"):
        converted(tmp_path / "a", 'convert.label="position > 1"', impressions=DAYS_OF_U1, clicks=["i1,0"])


def test_features_of_every_owner(tmp_path: Path) -> None:
    out, _ = converted(
        tmp_path,
        impressions=[
            f"i0,{at(0, 23.5)},u1,a1,0",
            f"i1,{at(1, 0.25)},u2,a2,",
            f"i2,{at(2)},u3,a3,5",
            f"i3,{at(2)},u1,a9,0",
        ],
        clicks=["i1,0"],
        behaviours=[f"u1,g3,{at(0)},click,9"],
        users=["u1,f"],
    )
    samples = samples_of(out)
    assert samples.schema == {
        "sample_id": pl.Int64,
        "time": pl.Int64,
        "user": pl.String,
        "ad": pl.String,
        "click": pl.Int8,
        "unseen_ad": pl.Boolean,
        "gender": pl.UInt32,
        "ad_id": pl.UInt32,
        "ad_goods": pl.UInt32,
        "ad_tags": pl.List(pl.UInt32),
        "ad_image": pl.UInt32,
        "position": pl.UInt32,
        "hour": pl.UInt32,
        "day": pl.Date,
    }
    assert samples["day"].to_list() == [DAYS[0], DAYS[1], DAYS[2], DAYS[2]]
    # Training is day 0 alone: everything first seen later is unknown (1), what is not there is missing (0).
    tags = vocab(out, "tag")
    assert tags == {"new": (2, 1), "red": (3, 1)}
    assert samples["ad_tags"].to_list() == [[3, 2], [], [1], []]
    assert samples["gender"].to_list() == [2, 0, 0, 2]
    assert samples["ad_id"].to_list() == [2, 1, 1, 1]
    assert samples["ad_goods"].to_list() == [vocab(out, "goods")["g1"][0], 1, 1, 0]
    assert samples["position"].to_list() == [2, 0, 1, 2]
    assert vocab(out, "hour") == {"23": (2, 1)}
    assert samples["unseen_ad"].to_list() == [False, True, True, True]
    pictures = vocab(out, "image")
    assert pictures == {"g1.jpg": (2, 1), "g3.jpg": (3, 1), "g2.jpg": (4, 0), "g9.jpg": (5, 0)}
    assert samples["ad_image"].to_list() == [2, 4, 5, 0]


def test_vocabularies_never_see_later_days(tmp_path: Path) -> None:
    """Counts against a loop over the rows, and nothing changes when valid and test days do."""
    rows = random_rows(3)
    out, _ = converted(tmp_path / "a", **rows)
    split = read_split(out)
    end = at((split["train"][-1] - FIRST_DAY).days + 1, 0)
    ads, goods = {}, Counter[str]()
    for line in rows["ads"]:
        ad, of, _ = line.split(",")
        ads[ad] = of
    for line in rows["impressions"]:
        _, time, _, ad, _ = line.split(",")
        if int(time) < end and ad in ads:
            goods[ads[ad]] += 1
    for line in rows["behaviours"]:
        _, of, time, _, _ = line.split(",")
        if int(time) < end:
            goods[of] += 1
    assert {value: count for value, (_, count) in vocab(out, "goods").items()} == goods

    def later(line: str, column: int) -> bool:
        return int(line.split(",")[column]) >= end

    rows["impressions"] = [x.replace(",a", ",anew") if later(x, 1) else x for x in rows["impressions"]]
    rows["behaviours"] = [x.replace(",g", ",gnew") if later(x, 2) else x for x in rows["behaviours"]]
    rows["ads"] += [x.replace("a", "anew", 1) for x in rows["ads"]]
    changed, _ = converted(tmp_path / "b", **rows)
    for path in sorted((out / "vocab").glob("*.parquet")):
        now = pl.read_parquet(changed / "vocab" / path.name)
        before = pl.read_parquet(path)
        if path.stem == "image":  # keys of all days; what training counts is the same
            now, before = (f.filter(pl.col("count") > 0) for f in (now, before))
        assert now.equals(before), path.stem


def test_min_count_makes_rare_values_unknown(tmp_path: Path) -> None:
    impressions = [*DAYS_OF_U1, f"j0,{at(0, 13)},u1,a2,0", f"j1,{at(0, 14)},u1,a1,0"]
    out, _ = converted(tmp_path, "features.ad_id.min_count=2", impressions=impressions, clicks=["i0,0"])
    assert vocab(out, "ad_id") == {"a1": (2, 2)}
    assert samples_of(out)["ad_id"].to_list() == [2, 1, 2, 2, 2]


def test_bad_rows_go_to_rejects(tmp_path: Path) -> None:
    bad = [f",{at(0)},u1,a1,0", f"b1,{at(0)},,a1,0", f"b2,{at(0)},u1,,0", "b3,noon,u1,a1,0", f"b4,{at(0)},u1,a1,0,9"]
    out, counts = converted(tmp_path, "convert.max_reject_rate=0.7", impressions=[*DAYS_OF_U1, *bad], clicks=["i0,0"])
    assert pl.read_parquet(out / "rejects.parquet").rows() == [
        ("impressions.csv", 4, "no id"),
        ("impressions.csv", 5, "no user"),
        ("impressions.csv", 6, "no ad"),
        ("impressions.csv", 7, "time is not epoch seconds before 2200: 'noon'"),
        ("impressions.csv", 8, "more cells than the header: '9'"),
    ]
    assert counts["impressions read"] == 8 == counts["samples"] + counts["impressions rejected"]


def test_too_many_bad_rows_stop_it(tmp_path: Path) -> None:
    rows = [*DAYS_OF_U1, f"i7,{at(0) * 1000},u1,a1,0"]
    with pytest.raises(UserError, match=r"1 of 4 rows of impressions \(25.0%\).*time is not epoch seconds.*row 4: '17"):
        converted(tmp_path, impressions=rows, clicks=["i0,0"])


def test_bad_behaviours_stop_it_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 1 rows of behaviours"):
        converted(tmp_path, impressions=DAYS_OF_U1, clicks=["i0,0"], behaviours=[f"u1,,{at(0)},click,1"])


def test_a_label_that_is_not_0_or_1(tmp_path: Path) -> None:
    recipe = RECIPE.replace('[convert.clicks]\nfiles = "clicks.csv"\ncolumns = { id = "impression" }\n', "")
    rows = [*DAYS_OF_U1, f"i7,{at(0)},u1,a1,2"]
    with pytest.raises(UserError, match=r"label is not 0 or 1 \(such as impressions.csv row 4: '2.0'\)"):
        converted(tmp_path, "convert.label=position", recipe=recipe, impressions=rows)


def test_repeated_keys_do_not_multiply_samples(tmp_path: Path) -> None:
    out, counts = converted(
        tmp_path, impressions=DAYS_OF_U1, clicks=["i0,0"], ads=["a1,g2,x", "a1,g1,y"], users=["u1,f", "u1,m"]
    )
    assert samples_of(out).height == 3
    assert counts["ads repeated"] == 1
    assert "g2" in vocab(out, "goods")
    assert "g1" not in vocab(out, "goods")


def test_a_feature_without_a_column_names_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"\[features.ad_id\] needs a column 'goodz'.*\(ads, goods, impressions\); did you mean 'goods'"
    ):
        converted(tmp_path, "features.ad_id.column=goodz", impressions=DAYS_OF_U1)


def test_lists_need_multi_hot(tmp_path: Path) -> None:
    raw, file = write(tmp_path, impressions=DAYS_OF_U1, clicks=["i0,0"])
    pl.DataFrame({"ad": ["a1"], "goods": ["g1"], "tags": [["x", "y"]]}).write_parquet(raw / "ads.parquet")
    (tmp_path / "out").mkdir()
    sets = ["convert.ads.files=ads.parquet"]
    convert(load(file, sets=sets), raw, tmp_path / "out")
    assert samples_of(tmp_path / "out")["ad_tags"].to_list() == [[2, 3], [2, 3], [2, 3]]
    with pytest.raises(UserError, match="column 'tags' holds lists; set multi_hot = true"):
        convert(load(file, sets=[*sets, "features.ad_tags.multi_hot=false"]), raw, tmp_path / "other")


def test_behaviour_features_need_a_behaviour_log(tmp_path: Path) -> None:
    recipe = RECIPE.replace('[convert.behaviours]\nfiles = "behaviours.csv"\n', "")
    with pytest.raises(UserError, match=r"\[features.goods\] needs a column 'goods'"):
        converted(tmp_path, recipe=recipe, impressions=DAYS_OF_U1, clicks=["i0,0"])


def test_features_that_share_a_vocabulary_must_agree(tmp_path: Path) -> None:
    _, file = write(tmp_path)
    with pytest.raises(
        UsageError, match="'ad_goods' and 'goods' share the vocabulary 'goods' but differ in width: 12 and 8"
    ):
        load(file, sets=["features.goods.width=8"])
    with pytest.raises(UsageError, match="multi_hot is for ids of user, ad or scene"):
        load(file, sets=["features.goods.multi_hot=true"])
    with pytest.raises(UsageError, match="no time zone 'Asia/Shangai'; did you mean 'Asia/Shanghai'"):
        load(file, sets=["convert.time_zone=Asia/Shangai"])
