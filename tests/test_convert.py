import datetime
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import Result

from ctrkit import pieces
from ctrkit.errors import UsageError
from ctrkit.labelling import draw_distinct
from ctrkit.partitions import days_there, read_by_day, read_split
from ctrkit.recipe import load
from tests.shop import FIRST_DAY, RECIPE, at, ctrkit, random_rows, write

DAYS = [FIRST_DAY + datetime.timedelta(days=n) for n in range(10)]


def convert(folder: Path, *sets: str) -> Result:
    """Convert the shop of a folder."""
    words = ["--recipe", folder / "recipe.toml", "--raw", folder / "raw", "--out", folder / "convert"]
    return ctrkit("convert", *words, *(word for text in sets for word in ("--set", text)))


def converted(folder: Path, *sets: str, recipe: str = RECIPE, **rows: list[str]) -> tuple[Path, dict[str, int]]:
    """Write a shop and convert it, which must succeed; return what was written and the counts."""
    write(folder, recipe, **rows)
    result = convert(folder, *sets)
    assert result.exit_code == 0, result.output
    counts: dict[str, int] = json.loads((folder / "convert.json").read_text())["counts"]
    check_identity(folder / "convert", counts)
    return folder / "convert", counts


def refused(folder: Path, *sets: str, recipe: str = RECIPE, code: int = 1, **rows: list[str]) -> str:
    """Write a shop and convert it, which must fail; return what it says."""
    write(folder, recipe, **rows)
    result = convert(folder, *sets)
    assert result.exit_code == code, result.output
    assert not (folder / "convert").exists()
    return result.output


def check_identity(out: Path, counts: dict[str, int]) -> None:
    """Every row read is a sample or in rejects.parquet; what is counted is what is there."""
    unused = pl.read_parquet(out / "rejects.parquet")
    of_log = unused.filter(pl.col("source") == "impressions").group_by("kind").len()
    kinds = dict(of_log.iter_rows())
    assert kinds.get("reject", 0) == counts["impressions rejected"]
    assert kinds.get("duplicate", 0) == counts["duplicate impressions dropped"]
    assert kinds.get("negative", 0) == counts.get("dropped negatives", 0)
    ends = counts["samples"] + sum(kinds.values())
    assert counts["impressions read"] + counts.get("sampled negatives", 0) == ends
    frame = read_by_day(out / "samples", days_there(out / "samples"))
    assert frame is not None
    assert frame["sample_id"].to_list() == list(range(counts["samples"]))
    assert frame["click"].sum() == counts["clicks among samples"]


def without(table: str) -> str:
    """Return the recipe without one of its raw tables."""
    begin = RECIPE.index(f"[convert.{table}]")
    return RECIPE[:begin] + RECIPE[RECIPE.index("[", begin + 1) :]


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
        (2, "u1", "a1", 0),
        (3, "u2", "a2", 1),
    ]
    assert counts["impressions read"] == 5
    assert counts["duplicate impressions dropped"] == 1
    assert counts["samples"] == 4
    assert counts["repeated clicks"] == 1
    assert counts["clicks without an impression"] == 1
    assert counts["clicks among samples"] == 2
    assert pl.read_parquet(out / "rejects.parquet").rows() == [
        ("impressions", "impressions.csv", 4, "duplicate", "repeats an earlier row"),
        ("clicks", "clicks.csv", 2, "duplicate", "repeats an earlier row"),
        ("clicks", "clicks.csv", 4, "unmatched", "no impression to this click"),
    ]


def test_labels_by_an_expression(tmp_path: Path) -> None:
    rows = [f"i{n},{at(n % 3)},u1,a1,{n}" for n in range(6)]
    out, _ = converted(tmp_path, 'convert.label="position >= 2"', recipe=without("clicks"), impressions=rows)
    assert samples_of(out).sort("time", "sample_id")["click"].to_list() == [0, 1, 0, 1, 1, 1]


BY_TIME = RECIPE.replace('columns = { id = "impression" }', "")


def test_clicks_without_ids_belong_to_the_nearest_impression(tmp_path: Path) -> None:
    """At or before the click and within the window, ends included; each click once, each impression clicked once."""
    seconds = [0, 10, 20, 50, 60]
    shown = [(f"u1,a1,{at(0) + t}", t) for t in seconds] + [(f"u1,a2,{at(0) + 10}", 10), (f"u2,a1,{at(0) + 10}", 10)]
    times = [5, 19.999, 20, 45.001, 45, 50, 55, 1]
    clicked = [f"u1,a1,{at(0) + t}" for t in times] + [f"u3,a1,{at(0)}", f"u1,a1,{at(0) + 5}"]
    raw, _ = write(tmp_path, BY_TIME)
    later = [f"u1,a1,{at(1)}", f"u1,a1,{at(2)}"]
    (raw / "impressions.csv").write_text("\n".join(["user,ad,time", *(row for row, _ in shown), *later]) + "\n")
    (raw / "clicks.csv").write_text("\n".join(["user,ad,time", *clicked]) + "\n")
    result = convert(tmp_path, "convert.attribution_window=25", *WITHOUT_POSITION)
    assert result.exit_code == 0, result.output
    samples = samples_of(tmp_path / "convert").filter(pl.col("day") == DAYS[0])
    start = 1000 * at(0)
    assert samples.select("user", "ad", (pl.col("time") - start) // 1000, "click").rows() == [
        ("u1", "a1", 0, 1),
        ("u1", "a1", 10, 1),
        ("u1", "a2", 10, 0),
        ("u1", "a1", 20, 1),
        ("u1", "a1", 50, 1),
        ("u1", "a1", 60, 0),
        ("u2", "a1", 10, 0),
    ]
    unused = pl.read_parquet(tmp_path / "convert" / "rejects.parquet")
    assert unused.drop("source", "file").rows() == [
        (10, "duplicate", "repeats an earlier row"),
        (4, "unmatched", "no impression to this click"),
        (9, "unmatched", "no impression to this click"),
        (1, "unmatched", "its impression has a click already"),
        (5, "unmatched", "its impression has a click already"),
        (7, "unmatched", "its impression has a click already"),
    ]
    assert set(unused["source"]) == {"clicks"}


WITHOUT_POSITION = ("features.position.column=hour",)


@pytest.mark.parametrize(
    ("drop", "left"), [("", 4), ("convert.drop_repeats=true", 4), ("convert.drop_repeats=false", 6)]
)
def test_repeats_of_user_ad_and_time(tmp_path: Path, drop: str, left: int) -> None:
    raw, _ = write(tmp_path, BY_TIME)
    rows = [f"u1,a1,{at(0)}", f"u1,a1,{at(0)}", f"u2,a1,{at(0)}", f"u1,a1,{at(1)}", f"u1,a1,{at(2)}", f"u1,a1,{at(0)}"]
    (raw / "impressions.csv").write_text("\n".join(["user,ad,time", *rows]) + "\n")
    (raw / "clicks.csv").write_text(f"user,ad,time\nu1,a1,{at(0)}\n")
    result = convert(tmp_path, *WITHOUT_POSITION, *([drop] if drop else []))
    assert result.exit_code == 0, result.output
    samples = samples_of(tmp_path / "convert")
    assert samples.height == left
    # Of impressions at the same time the last has the click.
    assert samples.filter(pl.col("day") == DAYS[0])["click"].to_list() == ([1, 0] if left == 4 else [0, 0, 1, 0])
    unused = pl.read_parquet(tmp_path / "convert" / "rejects.parquet")
    assert unused.select("row", "kind").rows() == ([(2, "duplicate"), (6, "duplicate")] if left == 4 else [])


def test_negatives_are_drawn_on_training_days_only(tmp_path: Path) -> None:
    rows = random_rows(5, users=60)
    rate = "convert.negative_rate=0.3"
    _, everything = converted(tmp_path / "all", **rows)
    out, counts = converted(tmp_path / "some", rate, **rows)
    whole, some = samples_of(tmp_path / "all" / "convert"), samples_of(out)
    train = read_split(out)["train"]
    keys = ["user", "ad", "time", "click"]
    training, held_out = pl.col("day").is_in(train), ~pl.col("day").is_in(train)
    assert some.filter(held_out).select(keys).equals(whole.filter(held_out).select(keys))
    clicked = training & (pl.col("click") == 1)
    assert some.filter(clicked).select(keys).equals(whole.filter(clicked).select(keys))
    negatives = whole.filter(training & (pl.col("click") == 0)).height
    kept = some.filter(training & (pl.col("click") == 0)).height
    assert abs(kept - 0.3 * negatives) < 4 * (0.21 * negatives) ** 0.5
    assert counts["dropped negatives"] == negatives - kept == everything["samples"] - counts["samples"]
    assert json.loads((out / "split.json").read_text())["negative_rate"] == 0.3
    # The same ones from a log in another order and other partitions; others with another seed.
    rows["impressions"].reverse()
    again, _ = converted(tmp_path / "again", rate, "convert.partitions=4", **rows)
    other, _ = converted(tmp_path / "other", rate, "convert.seed=9", **rows)
    order = ["time", "user", "ad"]
    assert samples_of(again).select(keys).sort(order).equals(some.select(keys).sort(order))
    assert not samples_of(other).select(keys).sort(order).equals(some.select(keys).sort(order))
    # What training counts is what is kept.
    ads = some.filter(training)["ad"].value_counts()
    assert {ad: n for ad, (_, n) in vocab(out, "ad_id").items()} == dict(ads.iter_rows())


def test_negatives_are_sampled_for_logs_of_positives(tmp_path: Path) -> None:
    """For each row other ads that the user never had, none twice, as many as were shown by then to anybody."""
    rows = random_rows(6, goods=60)
    out, counts = converted(tmp_path, "convert.sampled_negatives=5", recipe=without("clicks"), **rows)
    samples = samples_of(out)
    shown, sampled = samples.filter(click=1), samples.filter(click=0)
    assert shown.height == counts["impressions read"]
    assert not set(shown.select("user", "ad").rows()) & set(sampled.select("user", "ad").rows())
    first = dict(shown.group_by("ad").agg(pl.col("day").min()).rows())
    assert all(first[ad] <= day for ad, day in sampled.select("ad", "day").rows())
    moments = Counter(shown.select("user", "time").rows())
    assert Counter(sampled.select("user", "time").rows()) == {k: 5 * n for k, n in moments.items()}
    assert set(moments.values()) == {1}
    assert not sampled.select("user", "time", "ad").is_duplicated().any()
    assert counts["sampled negatives"] == sampled.height == 5 * shown.height
    assert counts["negatives that no ad was left for"] == 0
    assert sampled.join(shown, on=["ad", "day"], how="anti").height > 100  # of earlier days too


def test_ads_of_later_days_are_no_negatives(tmp_path: Path) -> None:
    """What could not be drawn is counted, also for a user who has every ad."""
    rows = [f"i{n},{at(n)},u1,a{n},0" for n in range(4)] + [f"j{n},{at(n, 9)},u2,a{3 * n},0" for n in range(2)]
    rows += [f"k{n},{at(n, 3)},u3,a{n},0" for n in range(4)]
    out, counts = converted(tmp_path, "convert.sampled_negatives=2", recipe=without("clicks"), impressions=rows)
    negatives = samples_of(out).filter(click=0).select("user", "day", "ad").sort("user", "day", "ad")
    # a0 is shown on day 0, a1 and a3 (to u2) on day 1, a2 on day 2; u1 and u3 have all, u2 has a0 and a3.
    assert negatives.rows() == [("u2", DAYS[1], "a1")]
    assert counts["sampled negatives"] == 1
    assert counts["negatives that no ad was left for"] == 2 * 10 - 1
    assert counts["test samples of unseen ads"] == 0  # a3, first shown on day 1
    unseen = samples_of(out).filter("unseen_ad").select("day", "ad").rows()
    assert unseen == [(DAYS[2], "a2"), (DAYS[2], "a2")]


def test_which_negatives_are_sampled_depends_on_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(8, goods=60)
    samples = []
    for name, size in (("a", 32 << 20), ("b", 900)):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        sets = ("convert.sampled_negatives=2", "convert.partitions=3")
        samples.append(samples_of(converted(tmp_path / name, *sets, recipe=without("clicks"), **rows)[0]))
    assert samples[0].equals(samples[1])


def test_numbers_are_drawn_evenly_and_none_twice() -> None:
    """Every set of three of five numbers is as likely as any other; of two numbers both are drawn."""
    drawn = draw_distinct(np.random.default_rng(1), np.repeat([5, 2, 0], [20_000, 50, 50]), 3)
    sets = Counter(tuple(sorted(row)) for row in drawn[:20_000].tolist())
    assert len(sets) == 10
    assert all(0 <= low < high < 5 for one in sets for low, high in itertools.pairwise(one))
    assert sum((n - 2000) ** 2 / 2000 for n in sets.values()) < 9 + 5 * 18**0.5
    assert {tuple(sorted(row)) for row in drawn[20_000:20_050].tolist()} == {(-1, 0, 1)}
    assert (drawn[20_050:] == -1).all()


def test_both_ways_of_labelling_or_none_are_errors(tmp_path: Path) -> None:
    told = refused(tmp_path, 'convert.label="position > 1"', code=2, impressions=DAYS_OF_U1, clicks=["i1,0"])
    assert "and has `label` and [convert.clicks]" in told
    told = refused(tmp_path, recipe=without("clicks"), code=2, impressions=DAYS_OF_U1)
    assert "[convert] needs either `label`" in told


def test_features_of_every_owner(tmp_path: Path) -> None:
    out, _ = converted(
        tmp_path,
        impressions=[
            f"i0,{at(0, 23.5)},u1,a1,0",
            f"i1,{at(1, 0.25)},u2,a2,",
            f"i2,{at(2)},u3,a9,0",
            f"i3,{at(2)},u1,a3,5",
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
    assert samples["gender"].to_list() == [2, 0, 2, 0]
    assert samples["ad_id"].to_list() == [2, 1, 1, 1]
    assert samples["ad_goods"].to_list() == [vocab(out, "goods")["g1"][0], 1, 1, 0]
    assert samples["position"].to_list() == [2, 0, 1, 2]
    assert samples["user"].to_list() == ["u1", "u2", "u1", "u3"]
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


HASHES = {
    "a0": 17336016884672388720,
    "a1": 18151002094784932496,
    "a2": 11532782514799973195,
    "a3": 5365028930055712217,
    "a9": 17429767152375991605,
}
"""XXH64 with seed 0 of the UTF-8 text, as its reference implementation gives it."""


def test_numbers_buckets_and_the_most_frequent(tmp_path: Path) -> None:
    """Position 3, 7.5, x, (none), nan in training; later ones only where they fall."""
    recipe = RECIPE.replace(
        "[select-clicks]",
        """
by_edges = { of = "scene", column = "position", kind = "number", edges = [3, 5] }
by_quantiles = { of = "scene", column = "position", kind = "number", quantiles = 2 }
hashed = { of = "ad", column = "ad", hash_buckets = 5 }
[select-clicks]""",
    )
    texts = ["3", "7.5", "x", "", "nan", "-1"]
    rows = [f"i{n},{at(0, n + 1)},u1,a{n // 2},{text}" for n, text in enumerate(texts)]
    rows += [f"j{n},{at(1, n + 1)},u1,a{n},{text}" for n, text in enumerate(["2.999", "4.99", "5", "1e9"])]
    rows += [f"k,{at(2)},u1,a9,"]
    sets = ["features.ad_id.top=1", "convert.max_reject_rate=0.0"]
    out, _ = converted(tmp_path, *sets, recipe=recipe, impressions=rows, clicks=["i0,0"])
    samples = samples_of(out)
    assert samples["by_edges"].to_list() == [3, 4, 1, 0, 1, 2, 2, 3, 4, 4, 0]
    assert vocab(out, "by_edges") == {"-inf ≤ x < 3.0": (2, 1), "3.0 ≤ x < 5.0": (3, 1), "5.0 ≤ x < inf": (4, 1)}
    # The upper bucket begins where at least half of -1, 3 and 7.5 lie below.
    assert samples["by_quantiles"].to_list() == [2, 3, 1, 0, 1, 2, 2, 2, 2, 3, 0]
    assert vocab(out, "by_quantiles") == {"-inf ≤ x < 7.5": (2, 2), "7.5 ≤ x < inf": (3, 1)}
    bucket = [HASHES[ad] % 5 + 2 for ad in samples["ad"]]
    assert samples["hashed"].to_list() == bucket
    assert list(vocab(out, "hashed")) == [f"bucket {i}" for i in range(5)]
    counts = Counter(bucket[:6])
    assert dict(vocab(out, "hashed").values()) == {i: counts.get(i, 0) for i in range(2, 7)}
    # a0, a1 and a2 are twice in training each: the first by its text is kept.
    assert vocab(out, "ad_id") == {"a0": (2, 2)}
    assert samples["unseen_ad"].to_list() == [False] * 9 + [True, True]


def test_min_count_makes_rare_values_unknown(tmp_path: Path) -> None:
    impressions = [*DAYS_OF_U1, f"j0,{at(0, 13)},u1,a2,0", f"j1,{at(0, 14)},u1,a1,0"]
    out, _ = converted(tmp_path, "features.ad_id.min_count=2", impressions=impressions, clicks=["i0,0"])
    assert vocab(out, "ad_id") == {"a1": (2, 2)}
    assert samples_of(out)["ad_id"].to_list() == [2, 1, 2, 2, 2]


def test_bad_rows_go_to_rejects(tmp_path: Path) -> None:
    bad = [f",{at(0)},u1,a1,0", f"b1,{at(0)},,a1,0", f"b2,{at(0)},u1,,0", "b3,noon,u1,a1,0", f"b4,{at(0)},u1,a1,0,9"]
    out, counts = converted(tmp_path, "convert.max_reject_rate=0.7", impressions=[*DAYS_OF_U1, *bad], clicks=["i0,0"])
    why = [
        "no id",
        "no user",
        "no ad",
        "time is not epoch seconds before 2200: 'noon'",
        "more cells than the header: '9'",
    ]
    assert pl.read_parquet(out / "rejects.parquet").rows() == [
        ("impressions", "impressions.csv", row, "reject", reason) for row, reason in enumerate(why, 4)
    ]
    assert counts["impressions read"] == 8 == counts["samples"] + counts["impressions rejected"]


def test_too_many_bad_rows_stop_it(tmp_path: Path) -> None:
    rows = [*DAYS_OF_U1, f"i7,{at(0) * 1000},u1,a1,0"]
    told = refused(tmp_path, impressions=rows, clicks=["i0,0"])
    assert "1 of 4 rows of impressions (25%)" in told
    assert "1 × time is not epoch seconds before 2200 (such as impressions.csv row 4: '17" in told


def test_bad_behaviours_stop_it_too(tmp_path: Path) -> None:
    rows = {"impressions": DAYS_OF_U1, "clicks": ["i0,0"], "behaviours": [f"u1,,{at(0)},click,1"]}
    assert "1 of 1 rows of behaviours" in refused(tmp_path, **rows)
    converted(tmp_path, "convert.max_reject_rate=1.0", **rows)


def test_a_label_that_is_not_0_or_1(tmp_path: Path) -> None:
    rows = [*DAYS_OF_U1, f"i7,{at(0)},u1,a1,2"]
    told = refused(tmp_path, "convert.label=position", recipe=without("clicks"), impressions=rows)
    assert "label is not 0 or 1 (such as impressions.csv row 4: '2')" in told


def test_repeated_keys_do_not_multiply_samples(tmp_path: Path) -> None:
    out, counts = converted(
        tmp_path, impressions=DAYS_OF_U1, clicks=["i0,0"], ads=["a1,g2,x", "a1,g1,y"], users=["u1,f", "u1,m"]
    )
    assert samples_of(out).height == 3
    assert counts["ads repeated"] == 1
    assert "g2" in vocab(out, "goods")
    assert "g1" not in vocab(out, "goods")


def test_a_feature_without_a_column_names_the_near_ones(tmp_path: Path) -> None:
    told = refused(tmp_path, "features.ad_id.column=goodz", impressions=DAYS_OF_U1)
    assert "[features.ad_id] needs a column 'goodz'" in told
    assert "(ads, goods, impressions); did you mean 'goods'" in told


def test_lists_need_multi_hot(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, impressions=DAYS_OF_U1, clicks=["i0,0"])
    pl.DataFrame({"ad": ["a1"], "goods": ["g1"], "tags": [["x", "y"]]}).write_parquet(raw / "ads.parquet")
    assert convert(tmp_path, "convert.ads.files=ads.parquet").exit_code == 0
    assert samples_of(tmp_path / "convert")["ad_tags"].to_list() == [[2, 3], [2, 3], [2, 3]]
    result = convert(tmp_path, "convert.ads.files=ads.parquet", "features.ad_tags.multi_hot=false")
    assert result.exit_code == 1
    assert "column 'tags' holds lists; set multi_hot = true" in result.output


def with_columns(folder: Path, **columns: pl.Series) -> Result:
    """Convert a Parquet log of three impressions, some of its columns given."""
    raw, file = write(folder, without("clicks").replace("impressions.csv", "impressions.parquet"))
    file.write_text(file.read_text().replace('columns = { id = "impression" }', ""))
    log = {"user": ["u1"] * 3, "ad": ["a1"] * 3, "time": [at(n) for n in range(3)], "position": [0, 1, 2]}
    pl.DataFrame({**log, "shown": [0, 1, 0], **columns}).write_parquet(raw / "impressions.parquet")
    return convert(folder, "convert.label=shown")


DAY_LONG = pl.Series([datetime.timedelta(days=1)] * 3)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("time", pl.Series([b"1709265600"] * 3)),
        ("time", pl.Series(["1709265600"] * 3, dtype=pl.Categorical)),
        ("time", pl.Series([FIRST_DAY] * 3)),
        ("time", pl.Series([[1709265600]] * 3)),
        ("time", pl.Series([{"s": 1709265600}] * 3)),
        ("time", DAY_LONG),
        ("user", pl.Series([b"u1"] * 3)),
        ("user", pl.Series([["u1"]] * 3)),
        ("user", DAY_LONG),
        ("ad", pl.Series([["a1"]] * 3)),
        ("position", pl.Series([{"x": 1}] * 3)),
        ("position", DAY_LONG),
        ("shown", pl.Series([[1]] * 3)),
        ("shown", pl.Series([{"x": 1}] * 3)),
    ],
)
def test_types_that_cannot_be_read_are_explained(tmp_path: Path, name: str, column: pl.Series) -> None:
    result = with_columns(tmp_path, **{name: column})
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert "label" in result.output if name == "shown" else name in result.output


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("time", pl.Series([at(n) for n in range(3)], dtype=pl.UInt64)),
        ("time", pl.Series([datetime.datetime.fromtimestamp(at(n), datetime.UTC) for n in range(3)])),
        ("user", pl.Series(["u1"] * 3, dtype=pl.Categorical)),
        ("user", pl.Series(["u1"] * 3, dtype=pl.Enum(["u1"]))),
        ("shown", pl.Series([False, True, False])),
        ("shown", pl.Series([0.0, 1.0, 0.0])),
    ],
)
def test_types_that_say_the_same(tmp_path: Path, name: str, column: pl.Series) -> None:
    result = with_columns(tmp_path, **{name: column})
    assert result.exit_code == 0, result.output
    samples = samples_of(tmp_path / "convert").select("time", "user", "ad", "click")
    assert samples.rows() == [(1000 * at(n), "u1", "a1", n % 2) for n in range(3)]


def test_behaviour_features_need_a_behaviour_log(tmp_path: Path) -> None:
    told = refused(tmp_path, recipe=without("behaviours"), impressions=DAYS_OF_U1, clicks=["i0,0"])
    assert "[features.goods] needs a column 'goods'" in told


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
