import datetime
import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctrkit.errors import UsageError, UserError
from ctrkit.pieces import BAD, EXTRA, ROW, UNIT
from ctrkit.recipe import Recipe
from ctrkit.rejects import Rejects
from ctrkit.tables import LABEL, RawTable, as_text, as_time, open_table

ROWS = pl.DataFrame({"uid": ["007", "8", None], "score": ["1", "2.5", "x"], "when": ["10", "20", "30"]})


def table(folder: Path, files: str | list[str], label: str = "", **rest: Any) -> RawTable:
    source = {"files": files, **rest}
    recipe = Recipe.model_validate({"name": "x", "convert": {"impressions": source, "label": label}})
    assert recipe.convert.impressions is not None
    return open_table("impressions", recipe.convert.impressions, folder, recipe)


def read(table: RawTable, columns: list[str]) -> tuple[pl.DataFrame, int]:
    """Return all rows, `file` (its number) added, and how many `where` left out."""
    table.prepare(columns)
    found = [(number, *rows) for number, piece in table.pieces() for rows in table.read(number, piece)]
    text = pl.col(columns).cast(pl.String)
    frames = [frame.with_columns(text, pl.lit(number).alias("file")) for number, frame, _ in found]
    return pl.concat(frames), sum(rows - frame.height for _, frame, rows in found)


def write_csv(folder: Path, text: str, name: str = "a.csv") -> None:
    (folder / name).write_text(text, encoding="utf-8")


def write_in(format: str, path: Path) -> None:
    """Write ROWS in a format."""
    lazy = ROWS.lazy()
    match format:
        case "csv" | "tsv":
            ROWS.write_csv(path, separator="\t" if format == "tsv" else ",")
        case "jsonl":
            ROWS.write_ndjson(path)
        case "parquet":
            ROWS.write_parquet(path)
        case "csv.gz":
            lazy.sink_csv(path, compression="gzip")
        case "csv.zst":
            lazy.sink_csv(path, compression="zstd")
        case "jsonl.gz":
            lazy.sink_ndjson(path, compression="gzip")
        case "jsonl.zst":
            lazy.sink_ndjson(path, compression="zstd")
        case "parquet.gz":
            ROWS.write_parquet(path.with_suffix(""))
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
            path.with_suffix("").unlink()


@pytest.mark.parametrize(
    "format",
    ["csv", "tsv", "jsonl", "parquet", "csv.gz", "csv.zst", "jsonl.gz", "jsonl.zst", "parquet.gz"],
)
def test_every_format_gives_the_same_frame(tmp_path: Path, format: str) -> None:
    write_in(format, tmp_path / f"log.{format}")
    frame, left_out = read(table(tmp_path, f"log.{format}", columns={"user": "uid"}), ["when", "user"])
    nothing = [None] * 3
    expected = pl.DataFrame(
        {ROW: [1, 2, 3], EXTRA: nothing, BAD: nothing, "when": ["10", "20", "30"], "user": ["007", "8", None]},
        schema={ROW: pl.Int64, EXTRA: pl.String, BAD: pl.String, "when": pl.String, "user": pl.String},
    )
    assert frame.drop("file").equals(expected)
    assert left_out == 0


def test_globs_number_files_by_name_and_rows_within_each(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,x\nu3,1\n", "b.csv")
    write_csv(tmp_path, "x,user\n1,u1\n2,u2\n", "a.csv")
    frame, _ = read(table(tmp_path, "*.csv"), ["user"])
    assert frame.select("file", ROW, "user").rows() == [(0, 1, "u1"), (0, 2, "u2"), (1, 1, "u3")]


def test_a_folder_is_all_data_files_below_it_and_paths_give_columns(tmp_path: Path) -> None:
    """A file's own column counts before one of its path; names that begin with a dot or underline are not data."""
    days = tmp_path / "log" / "day=2024-03-01"
    (days / "shop=north").mkdir(parents=True)
    (days / "shop=south").mkdir()
    write_csv(days / "shop=north", "user,day\nu1,mine\n")
    write_csv(days / "shop=south", "day,user\nours,u2\n", "b.csv")
    write_csv(days / "shop=south", "user,day\nno,no\n", ".hidden.csv")
    write_csv(days / "shop=south", "user,day\nno,no\n", "_SUCCESS.csv")
    write_csv(days, "not data", "notes.txt")
    frame, _ = read(table(tmp_path, "log"), ["user", "day", "shop"])
    assert frame.select("user", "day", "shop").rows() == [("u1", "mine", "north"), ("u2", "ours", "south")]
    write_csv(days / "shop=south", "user\nu3\n", "c.csv")
    frame, _ = read(table(tmp_path, "log", where="shop = 'south'"), ["user", "day"])
    assert frame.select("user", "day").rows() == [("u2", "ours"), ("u3", "2024-03-01")]


def test_columns_by_position_without_a_header(tmp_path: Path) -> None:
    write_csv(tmp_path, "u1::a::5::x\nu2::b::3::y\n", "ratings.dat")
    options = {"format": "csv", "header": False, "separator": "::", "columns": {"user": 1, "rating": 3}}
    source = table(tmp_path, "ratings.dat", where="rating >= 4 AND column_4 = 'x'", **options)
    frame, left_out = read(source, ["user", "column_2", "rating"])
    assert frame.select("user", "column_2", "rating").rows() == [("u1", "a", "5")]
    assert left_out == 1
    with pytest.raises(UserError, match=r"has 4 columns, and \[convert.impressions\] calls number 5 'user'"):
        table(tmp_path, "ratings.dat", **{**options, "columns": {"user": 5}})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_texts_that_mean_missing(tmp_path: Path, ending: str) -> None:
    frame = pl.DataFrame({"user": ["u1", "\\N", "NULL", "null"], "n": ["1", "2", "\\N", "4"]})
    getattr(frame, f"write_{ending.replace('jsonl', 'ndjson')}")(tmp_path / f"log.{ending}")
    source = table(tmp_path, f"log.{ending}", null_values=["\\N", "NULL"])
    found, _ = read(source, ["user", "n"])
    assert found.select("user", "n").rows() == [("u1", "1"), (None, "2"), (None, None), ("null", "4")]


def test_where_and_label_see_numbers_and_ids_stay_text(tmp_path: Path) -> None:
    write_csv(tmp_path, "uid,rating,kind\n007,4.5,a\n8,3,a\n9,x,a\n10,5,b\n11,,a\n")
    source = table(tmp_path, "a.csv", "rating >= 4", columns={"user": "uid"}, where="kind = 'a'")
    frame, left_out = read(source, ["user"])
    assert frame["user"].to_list() == ["007", "8", "9", "11"]
    assert frame[LABEL].to_list() == [True, False, None, None]
    assert left_out == 1


def test_a_row_with_more_cells_than_the_header_is_marked(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,ad\nu1,a1\nu2,a2,zzz\nu3\n")
    frame, _ = read(table(tmp_path, "a.csv"), ["user", "ad"])
    assert frame.select("user", "ad", EXTRA).rows() == [("u1", "a1", None), ("u2", "a2", "zzz"), ("u3", None, None)]


def test_no_such_file_names_the_near_ones(tmp_path: Path) -> None:
    write_csv(tmp_path, "user\nu\n", "impressions.csv")
    with pytest.raises(
        UserError, match=r"impresions\.csv is not there; \[convert.impressions\] names it; did you mean 'impr"
    ):
        table(tmp_path, "impresions.csv")
    with pytest.raises(UserError, match=r"no file matches 'imp/"):
        table(tmp_path, "imp/*.csv")
    with pytest.raises(UserError, match=r"the raw folder .* is not there"):
        table(tmp_path / "nowhere", "a.csv")


def test_no_such_column_names_the_near_ones(tmp_path: Path) -> None:
    write_csv(tmp_path, "user_id,item,time\nu,i,1\n")
    with pytest.raises(
        UserError,
        match=r"a\.csv has no column 'userid', which \[convert.impressions\] calls 'user'; did you mean 'user_id'",
    ):
        table(tmp_path, "a.csv", columns={"user": "userid"})
    with pytest.raises(
        UserError, match=r"no column 'user'; did you mean 'user_id'\? If it has another name.*columns.user="
    ):
        table(tmp_path, "a.csv").prepare(["user"])
    write_csv(tmp_path, "user_id,item\nu,i\n", "b.csv")
    with pytest.raises(UserError, match=r"b\.csv has no column 'time', which other files"):
        table(tmp_path, "*.csv").prepare(["time"])
    write_csv(tmp_path, "user;ad;time\nu;a;1\n", "c.csv")
    with pytest.raises(UserError, match=r"is ';' the separator\? Then: --set convert.impressions.separator=';'"):
        table(tmp_path, "c.csv").prepare(["user"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"not parquet"),
        ("a.csv.gz", b"\x1f\x8b\x08not gzip"),
        ("a.parquet.gz", b"not gzip"),
        ("a.csv.zst", b"not zstandard"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdnot a frame"),
        ("a.csv", "user\nu\n".encode("utf-16")),
    ],
)
def test_an_unreadable_file_is_a_users_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{name} (cannot be read as|is not a whole Parquet file|is not text in UTF-8)"
    ):
        read(table(tmp_path, name), ["user"])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"user": "u1"}\nnot json\n[1]\n\n{"user": "u5"}\n', "not a line of JSON"),
        ("a.csv", "user\nu1\né\n".encode("latin-1"), "not text in UTF-8"),
        ("a.csv", b'user,x\nu1,"a"\nu2,"b\nu3,c\n', "a quote without its partner"),
    ],
)
def test_a_line_that_cannot_be_read_is_marked(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    frame, _ = read(table(tmp_path, name), ["user"])
    assert frame["user"][0] == "u1"
    assert frame[BAD].to_list()[:2] == [None, reason]
    assert frame[ROW].to_list() == list(range(1, frame.height + 1))
    if name == "a.jsonl":
        assert frame[BAD].to_list()[2:] == ["not a JSON object", "an empty line", None]
        assert frame["user"][4] == "u5"


def test_an_empty_file(tmp_path: Path) -> None:
    write_csv(tmp_path, "")
    with pytest.raises(UserError, match=r"a\.csv is empty: it has not even a header"):
        table(tmp_path, "a.csv")


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "parquet"])
def test_empty_files_among_others_are_left_out(tmp_path: Path, ending: str) -> None:
    (tmp_path / "log").mkdir()
    write_in(ending, tmp_path / "log" / f"b.{ending}")
    for name in ("a", "c"):
        (tmp_path / "log" / f"{name}.{ending}").write_bytes(b"")
    (tmp_path / "log" / "d.csv.gz").write_bytes(gzip.compress(b"\n"))
    found = table(tmp_path, "log", columns={"user": "uid"})
    assert found.skipped == (f"log/a.{ending}", f"log/c.{ending}", "log/d.csv.gz")
    assert read(found, ["user"])[0]["user"].to_list() == ["007", "8", None]
    (tmp_path / "log" / f"b.{ending}").write_bytes(b"")
    with pytest.raises(UserError, match=rf"a\.{ending} is empty: it has not even a header"):
        table(tmp_path, "log", columns={"user": "uid"})


def test_what_columns_hold_is_learned_from_the_first_file_with_rows(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,n\n", "a.csv")
    write_csv(tmp_path, "user,n\nu,5\n", "b.csv")
    frame, left_out = read(table(tmp_path, "*.csv", "n > 2", where="n < 9"), ["user"])
    assert (frame[LABEL].to_list(), left_out) == ([True], 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user,click,ad,click", r"a\.csv has two columns named 'click'; give each a name of its own"),
        ("user,a\x01d", r"a\.csv has a column named 'a\\x01d', and no text has such characters"),
        ('user,5" screen', r"the header of .*a\.csv has a quote without its partner"),
    ],
)
def test_headers_that_cannot_be_right(tmp_path: Path, header: str, message: str) -> None:
    write_csv(tmp_path, f"{header}\nu,1\n")
    with pytest.raises(UserError, match=message):
        table(tmp_path, "a.csv")


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,,,ad\nu,1,2,a\n")
    assert read(table(tmp_path, "a.csv"), ["user", "ad"])[0].select("user", "ad").rows() == [("u", "a")]


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    write_csv(tmp_path, f"{'x' * 5000},ad\n1,2\n")
    with pytest.raises(UserError, match=r"no column 'user'; known: ad, x{60}…\."):
        table(tmp_path, "a.csv").require("user")


@pytest.mark.parametrize("content", ['[{"user": "u"}]', '[\n{\n"user": "u"\n}\n]\n', "user,ad\nu,a\n"])
def test_what_is_no_json_lines_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"no column 'user': none of its lines is a JSON object.*format=csv"):
        table(tmp_path, "a.jsonl").require("user")


def test_an_unknown_format(tmp_path: Path) -> None:
    write_csv(tmp_path, "user\nu\n", "a.dat")
    with pytest.raises(UserError, match=r"cannot tell the format of .*a\.dat"):
        table(tmp_path, "a.dat")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tme > 5", "names a column 'tme' that is not there; did you mean 'time'"),
        ("time >", "is not an SQL expression"),
        ("user = 'u'", 'needs double quotes: "user"'),
        ('"user" > 5', "cannot be computed: cannot compare string"),
        ("time > AVG(time)", "looks at more than one row"),
        ("COUNT(*) > 1", "looks at more than one row"),
        ("ROW_NUMBER() OVER () < 5", "looks at more than one row"),
        ("time > SUM(time) OVER (PARTITION BY time)", "looks at more than one row"),
        ("LAG(time) OVER (ORDER BY time) = 1", "looks at more than one row"),
        ("time > MEDIAN(time) OR time IN (1, 2)", "looks at more than one row"),
        ("time > QUANTILE_CONT(time, 0.5)", "looks at more than one row"),
        ("time IN (SELECT 1)", "looks at more than one row"),
        ('"user"', "is String, neither true nor false"),
    ],
)
def test_wrong_sql_is_a_usage_error(tmp_path: Path, where: str, message: str) -> None:
    write_csv(tmp_path, "user,time\nu,1\n")
    with pytest.raises(UsageError, match=message) as caught:
        read(table(tmp_path, "a.csv", where=where), ["user"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "where",
    [
        "\"user\" IN ('u', 'Agg', 'Len') AND \"user\" <> 'Agg'",
        "CASE WHEN time > 0 THEN 1 ELSE 0 END",
        "SUBSTR(\"user\", 1, 1) = 'u'",
        'COALESCE(time, 1) BETWEEN 1 AND 2 OR LENGTH("user") > 1 OR time IS NULL',
        "GREATEST(time, 2) = 2 AND ABS(time) = 1 AND \"user\" LIKE 'u%'",
        "1 = 1",
        "time",
    ],
)
def test_sql_that_looks_at_one_row(tmp_path: Path, where: str) -> None:
    write_csv(tmp_path, "user,time\nu,1\n")
    frame, left_out = read(table(tmp_path, "a.csv", where=where), ["user"])
    assert (frame["user"].to_list(), left_out) == (["u"], 0)


def test_rejects_above_the_rate_say_the_commonest_reasons(tmp_path: Path) -> None:
    write_csv(tmp_path, "user\n" + "u\n" * 10)
    source = table(tmp_path, "a.csv")
    bad = pl.DataFrame(
        {"file": [0, 0, 0], ROW: [2, 5, 6], "reason": ["no ad", "bad time", "bad time"], "cell": [None, "x", "y"]},
        schema={"file": pl.UInt32, ROW: pl.Int64, "reason": pl.String, "cell": pl.String},
    )
    rejects = Rejects()
    rejects.add(source, bad, 10)
    rejects.check(0.3)
    with pytest.raises(UserError) as caught:
        rejects.check(0.29)
    assert "3 of 10 rows of impressions (30%)" in caught.value.message
    assert "2 × bad time (such as a.csv row 5: 'x'); 1 × no ad (such as a.csv row 2)" in caught.value.message
    rejects.check_left("impressions")
    none = Rejects()
    none.add(source, bad, 3)
    none.check(1.0)
    with pytest.raises(UserError, match=r"none of the 3 rows of impressions .*: 2 × bad time .*; mend the rows"):
        none.check_left("impressions")
    rejects.write(tmp_path / "rejects.parquet")
    assert pl.read_parquet(tmp_path / "rejects.parquet").rows() == [
        ("impressions", "a.csv", 2, "reject", "no ad"),
        ("impressions", "a.csv", 5, "reject", "bad time: 'x'"),
        ("impressions", "a.csv", 6, "reject", "bad time: 'y'"),
    ]


def test_text_of_ids() -> None:
    frame = pl.DataFrame(
        {
            "int": [7, None],
            "float": [7.0, 1.5],
            "text": ["", "a"],
            "list": [["a", None, ""], None],
            "ints": [[1, 2], []],
            "struct": [{"a": 1}, {"a": 2}],
        }
    )
    text = frame.select(as_text(dtype, c) for c, dtype in frame.schema.items() if c != "struct")
    assert text.to_dict(as_series=False) == {
        "int": ["7", None],
        "float": ["7", "1.5"],
        "text": [None, "a"],
        "list": [f"{UNIT}a", None],
        "ints": [f"{UNIT}1{UNIT}2", UNIT],
    }
    with pytest.raises(UserError, match="column 'struct' holds Struct"):
        as_text(frame.schema["struct"], "struct")


@pytest.mark.parametrize(
    ("unit", "cells", "expected"),
    [
        (
            "s",
            ["1700000000", "1.5", "x", None, "-1", "1700000000000"],
            [1_700_000_000_000, 1500, None, None, None, None],
        ),
        ("ms", ["1700000000000", "0"], [1_700_000_000_000, 0]),
        (
            "iso",
            ["1970-01-02T08:00:00+08:00", "1970-01-01T00:00:00.5Z", "1970-01-01T00:00:00", "nonsense"],
            [86_400_000, 500, None, None],
        ),
    ],
)
def test_times(unit: str, cells: list[str | None], expected: list[int | None]) -> None:
    frame = pl.DataFrame({"t": cells})
    assert frame.select(as_time(frame.schema["t"], "t", unit)).to_series().to_list() == expected


def test_times_that_parquet_declares_need_no_unit() -> None:
    moment = datetime.datetime(1970, 1, 2)
    frame = pl.DataFrame({"naive": [moment]}).with_columns(zoned=pl.col("naive").dt.replace_time_zone("Asia/Shanghai"))
    times = frame.select(as_time(dtype, name, "s") for name, dtype in frame.schema.items())
    assert times.row(0) == (86_400_000, 57_600_000)


@pytest.mark.parametrize(
    ("cells", "number"),
    [
        (["1", "2", "x"], True),
        (["1", "x"], False),
        (["01234", "02345"], False),
        ([None, "", "-1.5e3"], True),
        ([None], False),
    ],
)
def test_what_looks_like_numbers(tmp_path: Path, cells: list[str | None], number: bool) -> None:
    write_csv(tmp_path, "user,n\n" + "".join(f"u,{cell or ''}\n" for cell in cells))
    assert table(tmp_path, "a.csv").numeric == ({"n"} if number else set())
