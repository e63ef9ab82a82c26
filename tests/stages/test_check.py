"""`ctrkit check` on small shops, each with one fault planted."""

import gzip
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from ctrkit.stages.check import command
from PIL import Image

from ctrkit.cli import COMMANDS
from tests.shop import OUTPUTS, RECIPE, at, ctrkit, random_rows, run, write
from tests.test_fuzz import DAMAGED, ENDINGS, TIMES, damage
from tests.test_fuzz import write as write_as

USERS, GOODS, DAYS = 40, 30, 6
# Pictures have tests of their own: they need a network.
WITHOUT_PICTURES = "\n".join(line for line in RECIPE.split("\n") if 'kind = "image"' not in line)
Rows = dict[str, list[str]]


def good_rows(seed: int = 0) -> Rows:
    """Return the rows of a shop without a fault: behaviours begin two days before the impressions."""
    rng = np.random.default_rng(seed)

    def moments(n: int, first: int) -> list[int]:
        return sorted(at(int(rng.integers(first, DAYS)), float(rng.random() * 24)) for _ in range(n))

    shown = [
        f"i{n},{time},u{rng.integers(USERS)},a{rng.integers(GOODS)},{rng.integers(3)}"
        for n, time in enumerate(moments(600, 0))
    ]
    clicks = rng.choice(len(shown), 150, replace=False)
    return {
        "impressions": shown,
        "clicks": [f"i{n},0" for n in clicks],
        "users": [f"u{n},{'fm'[n % 2]}" for n in range(USERS)],
        "ads": [f"a{n},g{(7 * n) % GOODS},{'x|y' if n % 2 else 'z'}" for n in range(GOODS)],
        "goods": [f"g{n},c{n % 5}" for n in range(GOODS)],
        "behaviours": [
            f"u{rng.integers(USERS)},g{rng.integers(GOODS)},{time},{('click', 'cart')[n % 2]},{rng.integers(5, 60)}"
            for n, time in enumerate(moments(1200, -2))
        ],
    }


def check(folder: Path, *sets: str, out: Path | None = None) -> Result:
    """Check the shop of a folder, with keys of the recipe overridden."""
    words: list[object] = ["check", folder / "recipe.toml", "--raw", folder / "raw", "--out", out or folder]
    for text in sets:
        words += ["--set", text]
    result = ctrkit(*words)
    assert result.exit_code in (0, 1), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def told(result: Result, kind: str) -> list[str]:
    """Return the errors or warnings."""
    return [line.removeprefix(f"{kind}: ") for line in result.output.splitlines() if line.startswith(f"{kind}: ")]


def changed(rows: Rows, table: str, change: Callable[[list[str]], Sequence[str]]) -> Rows:
    return {**rows, table: list(change(rows[table]))}


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["check"][1]


def test_a_good_shop_has_no_faults_and_nothing_is_written(tmp_path: Path) -> None:
    write(tmp_path, WITHOUT_PICTURES, **good_rows())
    before = sorted(tmp_path.rglob("*"))
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    assert "check: 0 errors, 0 warnings" in result.output
    assert told(result, "error") == told(result, "warning") == []
    for stage in ("convert", "select-clicks", "group", "train", "predict", "eval"):
        assert f"│ {stage}" in result.output
    assert "│ impressions │     1 │   600 │     600 │    0.00% │" in result.output  # counted, not "about"
    assert sorted(tmp_path.rglob("*")) == before


# What convert stops at must be an error here; a part of the text, and how the recipe or the rows are broken.
STOPPERS: list[tuple[str, tuple[str, ...], Callable[[Rows], Rows]]] = [
    ("did you mean 'goods.csv'", ("convert.goods.files=good.csv",), dict),
    ("has no column 'usr', which [convert.impressions] calls 'user'", ("convert.impressions.columns.user=usr",), dict),
    ("[features.gender] needs a column 'gendre'", ("features.gender.column=gendre",), dict),
    (
        "names a column 'tpe' that is not there; did you mean 'type' or 'time'?",
        ("convert.behaviours.where=tpe = 'click'",),
        dict,
    ),
    ("none of the 1,200 rows of [convert.behaviours] satisfies", ("convert.behaviours.where=type = 'buy'",), dict),
    ("`sampled_negatives`, and has `label` and [convert.clicks]", ("convert.label=position = 1",), dict),
    ("[split] leaves no day to train on", ("split.test=5",), dict),
    ("[split] leaves no day", (), lambda rows: changed(rows, "impressions", lambda some: some[:60])),
    (
        "10 of 610 rows of impressions (1.6%) cannot be used, more than convert.max_reject_rate = 0.01 allows: 7 × no "
        "user; 3 × time is not epoch seconds before 2200 (such as 'noon'); mend",
        (),
        lambda rows: changed(
            rows, "impressions", lambda some: some + [f"x{n},{at(1)},,a1,0" for n in range(7)] + 3 * ["y,noon,u1,a1,0"]
        ),
    ),
    (
        "its times look like epoch milliseconds: --set convert.impressions.time_unit=ms",
        (),
        lambda rows: changed(rows, "impressions", lambda some: [re.sub(r",(\d{10}),", r",\g<1>000,", r) for r in some]),
    ),
    (
        "its times look like ISO-8601 with a zone: --set convert.behaviours.time_unit=iso",
        (),
        lambda rows: changed(
            rows, "behaviours", lambda some: [re.sub(r",\d{10},", ",2024-03-02T10:00:00+08:00,", r) for r in some]
        ),
    ),
]


@pytest.mark.parametrize(("text", "sets", "broken"), STOPPERS, ids=[t[0][:30] for t in STOPPERS])
def test_what_convert_stops_at_is_an_error(
    tmp_path: Path, text: str, sets: tuple[str, ...], broken: Callable[[Rows], Rows]
) -> None:
    write(tmp_path, WITHOUT_PICTURES, **broken(good_rows()))
    result = check(tmp_path, *sets)
    assert result.exit_code == 1
    assert [e for e in told(result, "error") if text in e], result.output
    assert run(tmp_path, "convert", dict(s.split("=", 1) for s in sets)).exit_code in (1, 2)


# Convert would go on, but in vain.
USELESS: list[tuple[str, tuple[str, ...], Callable[[Rows], Rows]]] = [
    (
        "the times of impressions, read as epoch milliseconds, are of about 1970-01-20; as epoch seconds they would "
        "be of our days: --set convert.impressions.time_unit=s",
        ("convert.time_unit=ms",),
        dict,
    ),
    (
        "no click matches an impression: no id of clicks is an id of impressions (such as 'j",
        (),
        lambda rows: changed(rows, "clicks", lambda some: [r.replace("i", "j") for r in some]),
    ),
    (
        "no user of impressions has a row in [convert.users] (such as 'u",
        (),
        lambda rows: changed(rows, "users", lambda some: [r.replace("u", "user-") for r in some]),
    ),
    (
        "no goods of ads of impressions has a row in [convert.goods]",
        ("features.ad_category={of='ad', column='category'}",),
        lambda rows: changed(rows, "goods", lambda some: [r.replace("g", "G") for r in some]),
    ),
    (
        "behaviours begin on 2024-03-06 and samples end on 2024-03-06: no sample has a history",
        (),
        lambda rows: changed(
            rows, "behaviours", lambda some: [re.sub(r",\d{10},", f",{at(DAYS - 1)},", row) for row in some]
        ),
    ),
    (
        "behaviours end on 2024-02-20, more than select-clicks.window_days = 3 days before the first sample",
        (),
        lambda rows: changed(rows, "behaviours", lambda some: [re.sub(r",\d{10},", f",{at(-10)},", r) for r in some]),
    ),
    (
        "no user of the impressions has behaviours (such as 'u",
        (),
        lambda rows: changed(rows, "behaviours", lambda some: [r.replace("u", "v", 1) for r in some]),
    ),
    (
        "select-clicks.types names 'clik', which no behaviour is; did you mean 'click'?",
        ("select-clicks.types=['clik']",),
        dict,
    ),
    ("every behaviour is shorter than select-clicks.min_dwell = 100 seconds", ("select-clicks.min_dwell=100",), dict),
]


@pytest.mark.parametrize(("text", "sets", "broken"), USELESS, ids=[t[0][:30] for t in USELESS])
def test_what_would_be_in_vain_is_an_error(
    tmp_path: Path, text: str, sets: tuple[str, ...], broken: Callable[[Rows], Rows]
) -> None:
    write(tmp_path, WITHOUT_PICTURES, **broken(good_rows()))
    result = check(tmp_path, *sets)
    assert result.exit_code == 1
    assert [e for e in told(result, "error") if text in e], result.output


WARNINGS: list[tuple[str, tuple[str, ...], Callable[[Rows], Rows]]] = [
    (
        "3 of 603 rows of impressions (0.5%) cannot be used and will be dropped: 3 × no user",
        (),
        lambda rows: changed(rows, "impressions", lambda some: some + [f"x{n},{at(1)},,a1,0" for n in range(3)]),
    ),
    (
        "20 of 620 impressions (3.2%) repeat the id of an earlier one and will be dropped",
        (),
        lambda rows: changed(rows, "impressions", lambda some: some + some[:20]),
    ),
    (
        "50 of 200 clicks (25.0%) have no impression and will not count",
        (),
        lambda rows: changed(rows, "clicks", lambda some: some + [f"j{n},0" for n in range(50)]),
    ),
    ("7 of the clicks repeat an earlier one", (), lambda rows: changed(rows, "clicks", lambda some: some + some[:7])),
    (
        "of the rows of impressions name a user without a row in [convert.users] (such as 'u",
        (),
        lambda rows: changed(rows, "users", lambda some: some[:30]),
    ),
    (
        "of the rows of behaviours name a goods without a row in [convert.goods] (such as 'g",
        (),
        lambda rows: changed(rows, "goods", lambda some: some[:20]),
    ),
    (
        "5 of 45 rows of users repeat an earlier user",
        (),
        lambda rows: changed(rows, "users", lambda some: some + some[:5]),
    ),
    (
        "[features.gender] has the same value in all 600 rows of impressions",
        (),
        lambda rows: changed(rows, "users", lambda some: [r[:-1] + "f" for r in some]),
    ),
    (
        "[features.gender] is missing in all 600 rows of impressions",
        (),
        lambda rows: changed(rows, "users", lambda some: [r[:-1] for r in some]),
    ),
    ("is missing or rarer than its min_count in all", ("features.gender.min_count=10000",), dict),
    (
        "behaviours end on 2024-02-29, before the first sample on 2024-03-01: histories fade",
        (),
        lambda rows: changed(rows, "behaviours", lambda some: [re.sub(r",\d{10},", f",{at(-1)},", r) for r in some]),
    ),
    (
        "behaviours begin on 2024-03-02, and samples on 2024-03-01: the first day's samples have no history",
        (),
        lambda rows: changed(rows, "behaviours", lambda some: [re.sub(r",\d{10},", f",{at(1)},", r) for r in some]),
    ),
    (
        "of 40 users of the impressions have behaviours",
        (),
        lambda rows: changed(rows, "behaviours", lambda some: [r for r in some if r.startswith("u1")]),
    ),
    (
        "1 of 601 rows of impressions lie more than a year from all others (they range from 1999-",
        ("split.test=1",),
        lambda rows: changed(rows, "impressions", lambda some: [*some, "x,930000000,u1,a1,0"]),
    ),
    (
        "impressions has times in the future, up to 2199-",
        (),
        lambda rows: changed(rows, "impressions", lambda some: [*some, "x,7250000000,u1,a1,0"]),
    ),
    ("type_weights names 'buy', which no behaviour is", ("select-clicks.type_weights.buy=2",), dict),
    ("types names 'buy', which no behaviour is", ("select-clicks.types=['click', 'buy']",), dict),
    ("leaves no test day", ("split.test=0",), dict),
    ("of the training impressions, as asked", ("convert.negative_rate=0.5",), dict),
]


@pytest.mark.parametrize(("text", "sets", "broken"), WARNINGS, ids=[t[0][:30] for t in WARNINGS])
def test_what_costs_rows_is_a_warning(
    tmp_path: Path, text: str, sets: tuple[str, ...], broken: Callable[[Rows], Rows]
) -> None:
    write(tmp_path, WITHOUT_PICTURES, **broken(good_rows()))
    result = check(tmp_path, *sets)
    assert result.exit_code == 0, result.output
    assert [w for w in told(result, "warning") if text in w], result.output


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, **good_rows())  # with features of pictures, and no folder of them
    result = check(
        tmp_path,
        "convert.impressions.columns.user=usr",
        "convert.impressions.columns.ad=add",
        "convert.goods.files=good.csv",
        "features.gender.column=gendre",
        "select-clicks.types=['buy']",
        "extract-images.weights=nowhere.pth",
    )
    assert result.exit_code == 1
    errors = told(result, "error")
    for text in ("'usr'", "'add'", "good.csv", "'buy'", "folder of pictures", "'nowhere.pth'"):
        assert len([e for e in errors if text in e]) == 1, (text, errors)
    assert "No estimate of time and disk" in result.output


@pytest.mark.parametrize(("label", "text"), [("position >= 0", "always"), ("position > 7", "never")])
def test_a_label_that_is_constant(tmp_path: Path, label: str, text: str) -> None:
    recipe = WITHOUT_PICTURES.replace("[convert.clicks]", "[ignored]").replace(
        'files = "clicks.csv"\ncolumns = { id = "impression" }\n', ""
    )
    recipe = recipe.replace("[ignored]\n", "").replace("[convert]\n", f'[convert]\nlabel = "{label}"\n')
    write(tmp_path, recipe, **good_rows())
    result = check(tmp_path)
    assert result.exit_code == 1
    assert told(result, "error") == [
        f"convert.label = {label!r} is {text} true, in 600 impressions: nothing can be learned"
    ]


def by_time(tmp_path: Path, clicks: list[str]) -> Result:
    """Check a shop whose clicks are joined by user, ad and time."""
    rows = good_rows()
    recipe = WITHOUT_PICTURES.replace('files = "clicks.csv"\ncolumns = { id = "impression" }', 'files = "clicked.csv"')
    raw, _ = write(tmp_path, recipe, **rows)
    (raw / "clicked.csv").write_text("\n".join(["user,ad,time", *clicks]) + "\n")
    return check(tmp_path)


def clicked(rows: Rows, later: int, user: str = "u") -> list[str]:
    found = [row.split(",") for row in rows["impressions"][::4]]
    return [f"{who.replace('u', user)},{ad},{int(time) + later}" for _, time, who, ad, _ in found]


def test_clicks_by_user_ad_and_time(tmp_path: Path) -> None:
    assert by_time(tmp_path, clicked(good_rows(), 60)).exit_code == 0
    result = by_time(tmp_path, clicked(good_rows(), 3600 * 24 * 40))
    assert result.exit_code == 1
    assert "no click is within convert.attribution_window = 3600 seconds after its impression" in result.output
    assert "(impressions from 2024-02-29 " in result.output
    result = by_time(tmp_path, clicked(good_rows(), 60, "v"))
    assert result.exit_code == 1
    assert "no user of clicks is among impressions (such as 'v" in result.output


def test_a_feature_unique_to_each_row(tmp_path: Path) -> None:
    rows = good_rows()
    again = [re.sub(r"^i(\d+)", rf"k{n}-\1", row) for n in range(3) for row in rows["impressions"]]
    recipe = WITHOUT_PICTURES.replace("[features]\n", '[features]\nserial = { of = "scene", column = "id" }\n')
    write(tmp_path, recipe, **{**rows, "impressions": rows["impressions"] + again})
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    assert [w for w in told(result, "warning") if "[features.serial] has a value of its own in nearly each" in w]


def test_types_without_their_column(tmp_path: Path) -> None:
    rows = good_rows()
    raw, _ = write(tmp_path, WITHOUT_PICTURES, **rows)
    frame = pl.read_csv(raw / "behaviours.csv").drop("type")
    frame.write_csv(raw / "behaviours.csv")
    assert check(tmp_path).exit_code == 0
    result = check(tmp_path, "select-clicks.types=['click']")
    assert result.exit_code == 1
    assert "the behaviour log has no column `type`" in result.output


def with_pictures(tmp_path: Path, names: Sequence[str], *sets: str) -> Result:
    raw, _ = write(tmp_path, **good_rows())
    (raw / "pictures").mkdir()
    for name in names:
        Image.new("RGB", (40, 40), (len(name), 9, 9)).save(raw / "pictures" / f"{name}.jpg")
    if "broken" in sets:
        (raw / "pictures" / "g0.jpg").write_bytes(b"no picture")
    own = [s for s in sets if s != "broken"]
    return check(tmp_path, "extract-images.backbone=squeezenet1_1:features.5", "extract-images.size=32", *own)


GOODS_NAMES = [f"g{n}" for n in range(GOODS)]


def test_pictures_are_looked_for_and_decoded(tmp_path: Path) -> None:
    result = with_pictures(tmp_path / "all", GOODS_NAMES)
    assert result.exit_code == 0, result.output
    assert "check: 0 errors, 0 warnings" in result.output
    assert re.search(r"│ extract-images +│ 30 pictures +│", result.output)
    result = with_pictures(tmp_path / "half", GOODS_NAMES[:15])
    assert result.exit_code == 1
    assert "15 of 30 are missing (such as g" in result.output
    assert "50.0%, more than extract-images.max_bad_rate = 0.05 allows" in result.output
    result = with_pictures(tmp_path / "allowed", GOODS_NAMES[:15], "extract-images.max_bad_rate=0.5")
    assert result.exit_code == 0
    assert "these have no vector" in result.output
    result = with_pictures(tmp_path / "broken", GOODS_NAMES[:1], "broken", "extract-images.max_bad_rate=0.97")
    assert result.exit_code == 1
    assert "1 of 1 cannot be decoded (g0.jpg: not a picture in any known format)" in result.output


def test_vectors_from_elsewhere_need_no_pictures(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, **good_rows())
    result = check(tmp_path, "import-features.files=vectors.parquet")
    assert result.exit_code == 1
    assert "vectors.parquet is not there" in result.output
    assert "pictures" not in "".join(told(result, "error"))
    pl.DataFrame({"id": ["g0.jpg"], "vector": [[0.5] * 64]}).write_parquet(raw / "vectors.parquet")
    result = check(tmp_path, "import-features.files=vectors.parquet")
    assert result.exit_code == 0, result.output
    assert "check: 0 errors, 0 warnings" in result.output
    assert re.search(r"│ import-features +│ 30 pictures +│", result.output)
    assert "extract-images" not in result.output


def test_a_wrong_backbone_is_told(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, **good_rows())
    (raw / "pictures").mkdir()
    result = check(tmp_path, "extract-images.backbone=squeezenet1_1:fetures", "extract-images.max_bad_rate=1")
    assert result.exit_code == 1
    assert "squeezenet1_1 has no layer 'fetures'; did you mean 'features'" in result.output


def test_a_disk_without_room(tmp_path: Path) -> None:
    write(tmp_path, WITHOUT_PICTURES, **good_rows())
    result = check(tmp_path, out=Path("/proc/runs"))  # a file system that has no room for anything
    assert result.exit_code == 1
    assert [e for e in told(result, "error") if e.startswith("the disk of /proc has 0 B free, and about ")]


def test_ids_may_be_whole_numbers_in_one_table_and_texts_in_another(tmp_path: Path) -> None:
    bare = {name: [re.sub(r"\b[iuag](?=\d)", "", line) for line in lines] for name, lines in good_rows().items()}
    # One id that is no number makes its whole column text.
    bare["ads"].append("a-99,99,z")
    bare["users"].append("u-99,f")
    bare["goods"].append("g-99,c1")
    write(tmp_path, WITHOUT_PICTURES, **bare)
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    assert not told(result, "error")
    assert run(tmp_path, "convert").exit_code == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"impression,time,user,ad,position\n", "has no rows"),
        ("impression,time,user,ad\n1,2,3,4\n".encode("utf-16"), "UTF-16"),
        (gzip.compress(b"impression,time\n" * 100, mtime=0)[:-20], "impressions.csv"),
    ],
)
def test_odd_files(tmp_path: Path, content: bytes, text: str) -> None:
    raw, _ = write(tmp_path, WITHOUT_PICTURES, **good_rows())
    (raw / "impressions.csv").write_bytes(content)
    result = check(tmp_path)
    assert result.exit_code == 1
    assert [e for e in told(result, "error") if text in e], result.output


def both(tmp_path: Path, *sets: str) -> tuple[Result, Result]:
    """Return what check and convert say."""
    return check(tmp_path, *sets), run(tmp_path, "convert", dict(s.split("=", 1) for s in sets))


def test_all_rows_bad_whatever_the_rate(tmp_path: Path) -> None:
    rows = good_rows()
    write(tmp_path, WITHOUT_PICTURES, **{**rows, "impressions": [f"i{n},x,u1,a1,0" for n in range(20)]})
    for result in both(tmp_path, "convert.max_reject_rate=1.0"):
        assert result.exit_code == 1
        assert "none of the 20 rows of impressions can be used: 20 × time is not epoch seconds" in result.output
        assert "0.999" not in result.output


@pytest.mark.parametrize("name", ["clicks", "behaviours", "users", "ads", "goods"])
def test_a_table_of_a_header_only(tmp_path: Path, name: str) -> None:
    write(tmp_path, WITHOUT_PICTURES, **{**good_rows(), name: []})
    looked, made = both(tmp_path)
    assert (looked.exit_code, made.exit_code) == (0, 0), looked.output
    assert [w for w in told(looked, "warning") if f"{name}.csv ([convert.{name}]) has no rows: " in w]
    assert "check: what the stages need" in looked.output


def test_impressions_of_a_header_only_with_a_label_that_wants_numbers(tmp_path: Path) -> None:
    recipe = WITHOUT_PICTURES.replace("[convert]\n", '[convert]\nlabel = "position = 1"\n', 1)
    recipe = recipe.replace('[convert.clicks]\nfiles = "clicks.csv"\ncolumns = { id = "impression" }\n', "")
    write(tmp_path, recipe, **{**good_rows(), "impressions": []})
    for result in both(tmp_path):
        assert result.exit_code == 1
        assert "impressions.csv ([convert.impressions]) has no rows" in result.output


def test_the_wrong_separator_is_told_before_the_features(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, WITHOUT_PICTURES, **good_rows())
    path = raw / "impressions.csv"
    path.write_text(path.read_text().replace(",", ";"))
    for result in both(tmp_path):
        first = next(line for line in result.output.split("\n") if line.lower().startswith("error"))
        assert "--set convert.impressions.separator=';'" in first


def test_empty_files_and_columns_of_folders(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, WITHOUT_PICTURES, **good_rows())
    folder = raw / "log" / "position=7"
    folder.mkdir(parents=True)
    (raw / "impressions.csv").rename(folder / "b.csv")
    (folder / "a.csv").write_bytes(b"")
    looked, made = both(tmp_path, "convert.impressions.files=log")
    assert (looked.exit_code, made.exit_code) == (0, 0), looked.output
    empty = "[convert.impressions]: log/position=7/a.csv is empty, without even a header, and left out"
    assert told(looked, "warning")[:2] == [
        empty,
        "log/position=7/b.csv ([convert.impressions]) has a column 'position' of its own, as its folder has: the "
        "file's counts",
    ]
    assert empty in made.output


@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
def test_times_without_a_zone_are_told(tmp_path: Path, zone: str | None) -> None:
    raw, _ = write(tmp_path, WITHOUT_PICTURES, **good_rows())
    times = pl.from_epoch("time").dt.replace_time_zone(zone)
    pl.read_csv(raw / "impressions.csv").with_columns(times).write_parquet(raw / "impressions.parquet")
    result = check(tmp_path, "convert.impressions.files=impressions.parquet")
    assert result.exit_code == 0, result.output
    told_so = [w for w in told(result, "warning") if "the times of impressions have no zone and are read as UTC" in w]
    assert len(told_so) == (zone is None)


def test_a_stray_quote_forges_no_row(tmp_path: Path) -> None:
    rows = good_rows()
    forged = f'i-1,{at(1)},u1,a1,"two\ni-2,{at(1)},uFORGED,a99,1\nlines"'
    stray = f'i-3,{at(1)},u1,a1,5" screen'
    for n, lines in enumerate(([forged, stray], [stray, forged])):
        write(tmp_path / str(n), WITHOUT_PICTURES, **{**rows, "impressions": [*rows["impressions"], *lines]})
        looked, made = both(tmp_path / str(n))
        assert (looked.exit_code, made.exit_code) == (0, 0), looked.output
        assert "1 of 602 rows of impressions (0.2%) cannot be used and will be dropped: 1 × a quote" in looked.output
        out = tmp_path / str(n) / "convert"
        bad = pl.read_parquet(out / "rejects.parquet").filter(source="impressions", kind="reject")
        assert bad.select("row", "reason").rows() == [(602 - n, "a quote without its partner")]
        samples = pl.read_parquet(out / "samples" / "day=*" / "part-*.parquet")
        assert samples.height == 601
        assert "uFORGED" not in samples["user"]


def test_variants_and_overrides(tmp_path: Path) -> None:
    recipe = WITHOUT_PICTURES + '\n[variants.a.train]\nmodel = "lr"\n[variants.b.select-clicks]\nmin_dwell = 0.0\n'
    recipe += "[variants.only-in-tables]\nextra = true\n[variants.only-in-tables.train]\nepochs = 9\n"
    write(tmp_path, recipe, **good_rows())
    result = check(tmp_path)
    assert "2 variants" in result.output  # what a run makes
    assert "2 times (variants)" in result.output
    one = ctrkit("check", tmp_path / "recipe.toml", "--raw", tmp_path / "raw", "--variant", "a")
    assert one.exit_code == 0
    assert "1 variant " in one.output
    assert ctrkit("check", tmp_path / "recipe.toml", "--raw", tmp_path / "raw", "--variant", "c").exit_code == 2
    assert ctrkit("check", tmp_path / "recipe.toml", "--raw", tmp_path / "no").exit_code == 1


# --- estimates ---------------------------------------------------------------------------------------------------

LARGE = """
[convert]
label = "click = 1"
[convert.impressions]
files = "impressions.csv"
[convert.behaviours]
files = "behaviours"
[convert.users]
files = "users.csv"

[features]
age = { of = "user" }
ad_id = { of = "ad", column = "ad" }
slot = { of = "scene" }
query = { of = "scene" }
hour = { of = "scene" }
goods = { of = "behaviour" }
category = { of = "behaviour" }

[select-clicks]
window_days = 7
max_behaviours = 20
"""


def write_large(folder: Path) -> None:
    """Write 200,000 impressions in sessions of ten, and 300,000 behaviours in a file a day, both in order of time."""
    rng = np.random.default_rng(3)
    users, day = 5000, 86_400
    begin = 1_709_251_200
    sessions = np.sort(rng.integers(0, 8 * day, 20_000))
    times = np.repeat(sessions, 10) + np.tile(np.arange(10) * 7, 20_000)
    rows = len(times)
    frame = pl.DataFrame(
        {
            "user": np.char.add("user-", np.repeat(rng.integers(0, users, 20_000), 10).astype(str)),
            "ad": rng.zipf(1.3, rows).clip(0, 20_000),
            "time": begin + times,
            "click": (rng.random(rows) < 0.1).astype(int),
            "slot": rng.integers(0, 5, rows),
            "query": rng.zipf(1.5, rows).clip(0, 100_000),
        }
    ).sort("time", maintain_order=True)
    (folder / "behaviours").mkdir(parents=True)
    frame.write_csv(folder / "impressions.csv")
    pl.DataFrame({"user": [f"user-{n}" for n in range(users)], "age": rng.integers(0, 8, users)}).write_csv(
        folder / "users.csv"
    )
    for n in range(-6, 8):
        rows = 300_000 // 14
        pl.DataFrame(
            {
                "user": np.char.add("user-", rng.integers(0, users, rows).astype(str)),
                "goods": rng.zipf(1.2, rows).clip(0, 50_000),
                "category": rng.integers(0, 40, rows),
                "time": begin + n * day + np.sort(rng.integers(0, day, rows)),
            }
        ).write_parquet(folder / "behaviours" / f"day{n + 6:02}.parquet")


def number(text: str, unit: str) -> float:
    return float(text.replace(",", "")) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_estimates_are_within_a_factor_of_two_of_what_is_written(tmp_path: Path) -> None:
    write_large(tmp_path / "raw")
    (tmp_path / "recipe.toml").write_text(LARGE)
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    sampled = re.search(r"│ impressions │ +1 │ about ([\d,]+) │ +([\d,]+) │", result.output)
    assert sampled
    assert 195_000 < int(sampled[1].replace(",", "")) < 205_000
    assert int(sampled[2].replace(",", "")) < 105_000  # so the figures are carried forward, not counted
    expected = {}
    for stage in OUTPUTS:
        found = re.search(rf"│ {stage} +│ (.*?) │[^│]*│ +([\d.]+) (B|kB|MB) │", result.output)
        assert found, result.output
        expected[stage] = (found[1], number(found[2], found[3]))
        done = run(tmp_path, stage)
        assert done.exit_code == 0, done.output
        written = sum(p.stat().st_size for p in (tmp_path / OUTPUTS[stage]).rglob("*") if p.is_file())
        assert written / 2 < expected[stage][1] < 2 * written, (stage, written, expected[stage])
    amounts = [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", " ".join(e[0] for e in expected.values()))]
    logs, samples, pairs, picked, groups, again = amounts
    assert abs(logs - 500_000) < 5_000
    assert samples == again
    assert abs(samples - 200_000) < 2_000
    made = pl.read_ipc(tmp_path / OUTPUTS["select-clicks"] / "**/*.arrow")
    true_pairs = sum(pl.read_parquet(p).height for p in (tmp_path / "groups").glob("t*/*.parquet"))
    true_pairs += sum(pl.read_parquet(p).height for p in (tmp_path / "groups" / "valid").glob("*.parquet"))
    assert groups == pairs
    assert true_pairs / 2 < pairs < 2 * true_pairs
    true_picked = int(made["goods"].list.len().sum())
    assert true_picked / 2 < picked < 2 * true_picked


# --- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_of_damaged_files_it_says_what_convert_will_say(tmp_path: Path, ending: str) -> None:
    """No traceback; and an error wherever convert stops. The shop is read whole, so check misses nothing."""
    recipe = WITHOUT_PICTURES.replace('.csv"', f'.{ending}"').replace(
        "[convert]\n", "[convert]\nmax_reject_rate = 0.5\n"
    )
    stopped = 0
    for seed in range(DAMAGED // 3 * TIMES):
        r = random.Random(f"check {ending} {seed}")
        folder = tmp_path / str(seed)
        raw, _ = write(folder, recipe, **random_rows(17, users=8, goods=6, days=4))
        for path in sorted(raw.glob("*.csv")):
            frame = pl.read_csv(path, infer_schema=False)
            path.unlink()
            write_as(frame, raw / f"{path.stem}.{ending}")
        how = f"seed {seed}, {damage(r.choice(sorted(raw.iterdir())), r)}"
        result = check(folder)
        code = run(folder, "convert").exit_code
        stopped += code != 0
        assert not code or result.exit_code == 1, (how, result.output)
    assert stopped
