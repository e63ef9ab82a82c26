import datetime
import gzip
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctrkit.errors import UsageError, UserError
from ctrkit.recipe import Source
from ctrkit.tables import EXTRA, FILE, LABEL, ROW, RawTable, Rejects, as_number_if_numbers, as_text, as_time

ROWS = pl.DataFrame({"uid": ["007", "8", None], "score": ["1", "2.5", "x"], "when": ["10", "20", "30"]})


def table(folder: Path, files: str | list[str], **rest: Any) -> RawTable:
    return RawTable("impressions", Source.model_validate({"files": files, **rest}), folder)


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
    frame, left_out = table(tmp_path, f"log.{format}", columns={"user": "uid"}).read(["when", "user"])
    expected = pl.DataFrame(
        {FILE: [0] * 3, ROW: [1, 2, 3], EXTRA: [None] * 3, "when": ["10", "20", "30"], "user": ["007", "8", None]},
        schema={FILE: pl.UInt32, ROW: pl.Int64, EXTRA: pl.String, "when": pl.String, "user": pl.String},
    )
    assert frame.equals(expected)
    assert left_out == 0


def test_globs_number_files_by_name_and_rows_within_each(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,x\nu3,1\n", "b.csv")
    write_csv(tmp_path, "x,user\n1,u1\n2,u2\n", "a.csv")
    frame, _ = table(tmp_path, "*.csv").read(["user"])
    assert frame.select(FILE, ROW, "user").rows() == [(0, 1, "u1"), (0, 2, "u2"), (1, 1, "u3")]


def test_types_that_differ_between_files_become_text(tmp_path: Path) -> None:
    write_csv(tmp_path, '{"user": 7}\n', "a.jsonl")
    write_csv(tmp_path, '{"user": "u8"}\n', "b.jsonl")
    frame, _ = table(tmp_path, "*.jsonl").read(["user"])
    assert frame["user"].to_list() == ["7", "u8"]


def test_where_and_label_see_numbers_and_ids_stay_text(tmp_path: Path) -> None:
    write_csv(tmp_path, "uid,rating,kind\n007,4.5,a\n8,3,a\n9,x,a\n10,5,b\n11,,a\n")
    source = table(tmp_path, "a.csv", columns={"user": "uid"}, where="kind = 'a'")
    frame, left_out = source.read(["user"], "rating >= 4")
    assert frame["user"].to_list() == ["007", "8", "9", "11"]
    assert frame[LABEL].to_list() == [True, False, None, None]
    assert left_out == 1


def test_a_row_with_more_cells_than_the_header_is_marked(tmp_path: Path) -> None:
    write_csv(tmp_path, "user,ad\nu1,a1\nu2,a2,zzz\nu3\n")
    frame, _ = table(tmp_path, "a.csv").read(["user", "ad"])
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
        table(tmp_path, "a.csv").read(["user"])
    write_csv(tmp_path, "user_id,item\nu,i\n", "b.csv")
    with pytest.raises(UserError, match=r"b\.csv has no column 'time', which other files"):
        table(tmp_path, "*.csv").read(["time"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"not parquet"),
        ("a.csv.gz", b"\x1f\x8b\x08not gzip"),
        ("a.parquet.gz", b"not gzip"),
        ("a.jsonl", b"not json\n"),
        ("a.csv", "user\né\n".encode("latin-1")),
    ],
)
def test_an_unreadable_file_is_a_users_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as"):
        table(tmp_path, name).read(["user"])


def test_an_empty_log_and_an_empty_file(tmp_path: Path) -> None:
    write_csv(tmp_path, "")
    with pytest.raises(UserError, match=r"a\.csv is empty: it has not even a header"):
        table(tmp_path, "a.csv")
    write_csv(tmp_path, "user,time\n")
    with pytest.raises(UserError, match=r"a\.csv \(\[convert.impressions\]\) has no rows"):
        table(tmp_path, "a.csv").read(["user"])
    write_csv(tmp_path, "user,time\nu,1\n")
    with pytest.raises(UserError, match=r"none of the 1 rows of a\.csv satisfies"):
        table(tmp_path, "a.csv", where="time > 5").read(["user"])


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
    ],
)
def test_wrong_sql_is_a_usage_error(tmp_path: Path, where: str, message: str) -> None:
    write_csv(tmp_path, "user,time\nu,1\n")
    with pytest.raises(UsageError, match=message) as caught:
        table(tmp_path, "a.csv", where=where).read(["user"])
    assert caught.value.exit_code == 2


def test_rejects_above_the_rate_say_the_commonest_reasons(tmp_path: Path) -> None:
    write_csv(tmp_path, "user\n" + "u\n" * 10)
    source = table(tmp_path, "a.csv")
    bad = pl.DataFrame(
        {FILE: [0, 0, 0], ROW: [2, 5, 6], "reason": ["no ad", "bad time", "bad time"], "cell": [None, "x", "y"]},
        schema={FILE: pl.UInt32, ROW: pl.Int64, "reason": pl.String, "cell": pl.String},
    )
    rejects = Rejects()
    rejects.add(source, bad, 10)
    rejects.check(0.3)
    with pytest.raises(UserError) as caught:
        rejects.check(0.29)
    assert "3 of 10 rows of impressions (30.0%)" in caught.value.message
    assert "2 × bad time (such as a.csv row 5: 'x'); 1 × no ad (such as a.csv row 2)" in caught.value.message
    assert rejects.frame().rows() == [
        ("a.csv", 2, "no ad"),
        ("a.csv", 5, "bad time: 'x'"),
        ("a.csv", 6, "bad time: 'y'"),
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
    text = frame.select(as_text(frame, c) for c in frame.columns if c != "struct")
    assert text.to_dict(as_series=False) == {
        "int": ["7", None],
        "float": ["7", "1.5"],
        "text": [None, "a"],
        "list": [["a"], None],
        "ints": [["1", "2"], []],
    }
    with pytest.raises(UserError, match="column 'struct' holds Struct"):
        as_text(frame, "struct")


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
    assert frame.select(as_time(frame, "t", unit)).to_series().to_list() == expected


def test_times_that_parquet_declares_need_no_unit() -> None:
    moment = datetime.datetime(1970, 1, 2)
    frame = pl.DataFrame({"naive": [moment]}).with_columns(zoned=pl.col("naive").dt.replace_time_zone("Asia/Shanghai"))
    assert frame.select(as_time(frame, "naive", "s"), as_time(frame, "zoned", "s")).row(0) == (86_400_000, 57_600_000)


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
def test_what_looks_like_numbers(cells: list[str | None], number: bool) -> None:
    found = as_number_if_numbers(pl.Series(cells, dtype=pl.String))
    assert (found.dtype == pl.Float64) == number
