"""`ctrkit eval` on files that are not as they should be: each is refused in one paragraph that says what and where."""

import decimal
import gzip

import polars as pl
import pytest
from click.testing import CliRunner

from ctrkit import evaluation
from ctrkit.cli import main

TABLE = pl.DataFrame(
    {"user": ["a", "a", "a", "b", "b", "c"], "click": [1, 0, 0, 1, 0, 0], "score": [0.9, 0.1, 0.5, 0.4, 0.4, 0.8]}
)
LARGE = 2**53


def run(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["eval", "--bootstrap", "0", *map(str, words)])


def refused(*words):
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


@pytest.fixture(params=["in memory", "through temporary files"])
def parquet(request, tmp_path, monkeypatch):
    """A function that writes TABLE with other columns; read in both ways that Parquet files are."""
    if request.param != "in memory":
        monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)

    def write(**columns):
        path = tmp_path / "x.parquet"
        TABLE.with_columns(**columns).write_parquet(path)
        return path

    return write


def text(folder, content, name="x.csv"):
    path = folder / name
    path.write_text(content)
    return path


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Float32, pl.Boolean, pl.String])
def test_unseen_ad_of_any_type_makes_its_slices(parquet, dtype):
    unseen = pl.Series([1, 1, 0, None, 0, 0]).cast(pl.Int8).cast(dtype)
    said = run(parquet(unseen_ad=unseen), "--by", "unseen_ad").output
    assert "unseen_ad=true" in said
    assert "unseen_ad=false" in said
    assert "unseen_ad=1" not in said


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("unseen_ad", [1, 0, 2, 0, 0, 0], "row 3, column 'unseen_ad': 2 is neither 0 nor 1"),
        ("unseen_ad", ["yes", "no"] * 3, "row 1, column 'unseen_ad': 'yes' is neither 0 nor 1 (5 more rows"),
        ("unseen_ad", [[1]] * 6, "column 'unseen_ad' is List(Int64)"),
        ("history_length", ["0", "many", "1", "2", "3", "4"], "row 2, column 'history_length': 'many' is not a number"),
        ("history_length", [0, 1, 2, -3, 4, 5], "row 4, column 'history_length': -3 is not a number"),
        ("history_length", [0, 1, 2.5, 3, 4, 5], "row 3, column 'history_length': 2.5 is not a number"),
        ("history_length", [0, 1, float("inf"), 3, 4, 5], "row 3, column 'history_length': inf is not a number"),
    ],
)
def test_columns_of_built_in_slices_are_not_passed_over(parquet, column, values, says):
    said = refused(parquet(**{column: pl.Series(values, strict=False)}))
    assert says in said


def test_slices_of_one_name_are_refused(parquet):
    lengths, own = pl.Series([0, 0, 1, 2, 3, 9]), pl.Series(["0", "0", "x", "x", "x", "x"])
    said = refused(parquet(history_length=lengths, history=own), "--by", "history")
    assert "column 'history' makes a slice called 'history=0'" in said


@pytest.mark.parametrize("blank", ["", "  ", "\t", "\u3000"])
def test_a_blank_user_is_missing(parquet, blank):
    said = refused(parquet(user=pl.Series(["a", "a", blank, "b", blank, "c"])))
    assert "row 3 has no user (column 'user' is empty in 2 of 6 rows)" in said


def test_a_quoted_blank_user_is_missing(tmp_path):
    assert "row 2 has no user" in refused(text(tmp_path, 'user,click,score\na,1,1\n"",0,2\n'))


def test_scores_that_would_tie_as_float64_are_refused(parquet, tmp_path):
    near = [LARGE + 1, LARGE, 3, 4, 5, 6]
    for scores in (
        pl.Series(near),
        pl.Series(near, dtype=pl.UInt64),
        pl.Series([decimal.Decimal(n) for n in near]),
        pl.Series([decimal.Decimal("0.12345678901234567")] * 6),
    ):
        said = refused(parquet(score=scores))
        assert "row 1, column 'score'" in said
        assert "more digits than float64" in said
    csv = text(tmp_path, f"user,click,score\na,1,{LARGE + 1}\na,0,{LARGE}\n")
    assert "row 1, column 'score': '9007199254740993' has more digits" in refused(csv)


def test_scores_that_float64_holds_are_read(parquet, tmp_path):
    for scores in (
        [LARGE * 4, 1, 2, 0, 0, 3],
        [decimal.Decimal(s) for s in ("0.9", "0.1", "0.5", "0.4", "0.4", "0.8")],
    ):
        assert "GAUC 0.8000" in run(parquet(score=pl.Series(scores))).output
    csv = text(tmp_path, "user,click,score\na,1,0.30000000000000004\na,0,0.3\na,0,1e-20\n")
    assert "GAUC 1.0000" in run(csv).output


def test_a_list_makes_no_slices(parquet):
    said = refused(parquet(tags=pl.Series([[1]] * 6)), "--by", "tags")
    assert "column 'tags' is List(Int64)" in said


@pytest.mark.parametrize("size", [30, 3000])
def test_a_file_that_was_cut_off(tmp_path, size):
    rows = "".join(f"u{n % 97},{n % 2},0.{n * 7919 % 9973}\n" for n in range(5000))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(f"user,click,score\n{rows}".encode())[:size])
    said = refused(tmp_path / "x.csv.gz")
    assert "x.csv.gz cannot be read as csv" in said
    assert "cut off" in said


def test_another_separator_is_named(tmp_path):
    said = refused(text(tmp_path, "user;click;score\na;1;0,5\n"))
    assert "one column 'user;click;score': its columns look separated by ';'" in said
    assert "separated by '\\t'" in refused(text(tmp_path, "user\tclick\tscore\na\t1\t2\n"))
    assert "separated by ','" in refused(text(tmp_path, "user,click,score\na,1,2\n", "x.tsv"))


def test_a_row_of_too_many_fields_is_named(tmp_path):
    content = 'user,click,score\na,1,.1\n"b,c",0,.2\na,1,.2,.3\n'
    said = refused(text(tmp_path, content))
    assert "row 3 has 4 fields, more than the header names" in said
    assert "truncate" not in said
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(content.encode()))
    assert "row 3 has 4 fields" in refused(tmp_path / "x.csv.gz")


def test_a_column_that_is_there_twice(tmp_path):
    assert "several columns 'score'" in refused(text(tmp_path, "user,click,score,score\na,1,.1,.2\n"))
    said = run(text(tmp_path, "user,click,score,note,note\na,1,.2,x,y\na,0,.1,x,y\n")).output
    assert "GAUC 1.0000" in said
