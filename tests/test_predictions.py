"""Reading predictions: the same table in every form, and what must not be read."""

import datetime
import gzip

import numpy as np
import polars as pl
import pytest

from ctrkit.errors import UserError
from ctrkit.predictions import MOST_VALUES, read

TABLE = pl.DataFrame(
    {
        "user": ["b", "a", "b", "c"],
        "click": [1, 0, 0, 1],
        "score": [0.5, 0.25, 0.125, 0.75],
        "history_length": [0, 3, 21, 20],
        "unseen_ad": [True, False, True, False],
        "day": [datetime.date(2024, 3, d) for d in (8, 8, 9, 9)],
    }
)


def written(folder, kind, table=TABLE):
    path = folder / f"p.{kind}"
    if kind == "parquet":
        table.write_parquet(path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(table.write_csv().encode()))
    else:
        table.write_csv(path, separator="\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "csv.gz"])
def test_reads_the_same_from_every_kind(tmp_path, kind):
    made = read(written(tmp_path, kind))
    assert made.users.to_list() == ["a", "b", "c"]
    assert made.user.tolist() == [1, 0, 1, 2]
    assert made.click.tolist() == [True, False, False, True]
    assert made.score.tolist() == [0.5, 0.25, 0.125, 0.75]
    assert {name: np.flatnonzero(rows).tolist() for name, rows in made.slices.items()} == {
        "unseen_ad=true": [0, 2],
        "unseen_ad=false": [1, 3],
        "history=0": [0],
        "history=1-5": [1],
        "history=6-20": [3],
        "history=21+": [2],
        "day=2024-03-08": [0, 1],
        "day=2024-03-09": [2, 3],
    }


@pytest.mark.parametrize(
    "labels",
    [[True, False, False, True], [1.0, 0.0, 0.0, 1.0], ["1", "0", "0", "1"], ["True", "false", "FALSE", " true"]],
)
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_labels_may_be_booleans_floats_or_text(tmp_path, kind, labels):
    made = read(written(tmp_path, kind, TABLE.with_columns(click=pl.Series(labels))))
    assert made.click.tolist() == [True, False, False, True]


def test_users_keep_leading_zeros_and_numbers_equal_their_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("user,click,score\n007,1,.5\n7,0,.5\n")
    assert read(path).users.to_list() == ["007", "7"]
    for dtype in (pl.Int64, pl.Float64, pl.Categorical):
        users = pl.Series(["12", "3", "12", "3"] if dtype == pl.Categorical else [12, 3, 12, 3], dtype=dtype)
        assert read(written(tmp_path, "parquet", TABLE.with_columns(user=users))).users.to_list() == ["12", "3"]


def test_float32_scores_stay_float32(tmp_path):
    path = written(tmp_path, "parquet", TABLE.with_columns(pl.col("score").cast(pl.Float32)))
    assert read(path).score.dtype == np.float32


def test_other_names_and_slices_by_any_column(tmp_path):
    table = TABLE.select(uid="user", y="click", p="score", place=pl.Series([1, 2, 1, None]))
    made = read(written(tmp_path, "csv", table), user="uid", label="y", score="p", slices=["place"])
    assert {name: rows.tolist() for name, rows in made.slices.items()} == {
        "place=1": [True, False, True, False],
        "place=2": [False, True, False, False],
    }


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": [0.5, float("nan"), 0.1, 0.2]}, "row 2, column 'score'"),
        ({"score": [0.5, 0.1, 0.1, float("inf")]}, "row 4, column 'score'"),
        ({"score": [0.5, 0.1, None, 0.1]}, "row 3, column 'score': nothing"),
        ({"score": ["a", "b", "c", "d"]}, "row 1, column 'score': 'a' is not a finite number (3 more rows"),
        ({"click": [0, 1, 2, 0]}, "row 3, column 'click'"),
        ({"click": [0.0, 0.5, 0.0, 1.0]}, "row 2, column 'click'"),
        ({"click": [0, 1, 0, None]}, "row 4, column 'click'"),
        ({"user": ["a", None, "b", None]}, "row 2 has no user (column 'user' is empty in 2 of 4 rows)"),
    ],
)
def test_bad_values_are_named_by_row_and_column(tmp_path, kind, change, says):
    table = TABLE.with_columns(**{k: pl.Series(v, strict=False) for k, v in change.items()})
    with pytest.raises(UserError) as e:
        read(written(tmp_path, kind, table))
    assert says in e.value.message
    assert str(tmp_path) in e.value.message


def test_blank_lines_are_no_rows_at_the_end_only(tmp_path):
    path = written(tmp_path, "csv")
    text = path.read_text()
    path.write_text(text + "\n\n")
    assert read(path).score.tolist() == [0.5, 0.25, 0.125, 0.75]
    head, rest = text.split("\n", 1)
    for rows in (f"\n{rest}", f"{rest},,,3,,\n"):
        path.write_text(f"{head}\n{rows}")
        with pytest.raises(UserError, match="has no user"):
            read(path)


def test_a_user_that_is_a_fraction_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"row 2, column 'user': 1\.5"):
        read(written(tmp_path, "parquet", TABLE.with_columns(user=pl.Series([1.0, 1.5, 2.0, 3.0]))))


def test_missing_columns_name_the_nearest(tmp_path):
    path = written(tmp_path, "csv", TABLE.rename({"click": "clicked"}))
    with pytest.raises(UserError, match=r"no column 'click', which should be the label.*--label.*'clicked'"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'dai' for --by dai.*'day'"):
        read(written(tmp_path, "csv"), slices=["dai"])


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        read(written(tmp_path, "parquet", TABLE.head(0)))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "empty.csv")
    with pytest.raises(UserError, match="is not there"):
        read(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "p.xls").write_text("x")
    (tmp_path / "q.parquet").write_text("no")
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path / "folder.csv")
    with pytest.raises(UserError, match=r"\.parquet, \.csv and \.tsv"):
        read(tmp_path / "p.xls")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "q.parquet")


def test_a_column_of_too_many_values_makes_no_slices(tmp_path):
    n = MOST_VALUES + 1
    table = pl.DataFrame({"user": ["a"] * n, "click": [1] * n, "score": [0.5] * n, "day": list(range(n))})
    path = written(tmp_path, "parquet", table)
    assert read(path).slices == {}
    with pytest.raises(UserError, match="101 distinct values"):
        read(path, slices=["day"])
