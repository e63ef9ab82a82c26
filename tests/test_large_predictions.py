"""Predictions measured through temporary files: the same numbers and errors as in memory, whatever the types."""

import datetime
import math
import random

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from ctrkit import evaluation, large_predictions, score_runs
from ctrkit.errors import UserError
from ctrkit.evaluation import evaluate
from ctrkit.recipe import Eval
from tests.test_full_disk import largest_file

KINDS = {
    "small ints": lambda u: u.astype(np.int64) - 40,
    "int32 with the extremes": lambda u: np.where(u == 0, -(2**31), np.where(u == 1, 2**31 - 1, u)).astype(np.int32),
    "wide ints": lambda u: (u * 0x1234567890123).astype(np.int64) - 2**62,
    "extreme ints": lambda u: np.where(u == 0, -(2**63), np.where(u == 1, 2**63 - 1, u)).astype(np.int64),
    "unsigned": lambda u: (u.astype(np.uint64) * np.uint64(2**57)) + np.uint64(7),
    "whole floats": lambda u: u.astype(np.float64) * 3,
    "text": lambda u: np.array([f"u{i * 7919 % 1000:04}" for i in u]),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Many chunks, partitions and ranges on little data."""
    monkeypatch.setattr(large_predictions, "CHUNK_ROWS", 97)
    monkeypatch.setattr(large_predictions, "PARTITION_ROWS", 300)
    monkeypatch.setattr(score_runs, "RANGE_ENTRIES", 50)
    monkeypatch.setattr(score_runs, "SAMPLE_EVERY", 8)


def table(users="small ints", dtype=np.float32, ties=True, n=3000, seed=0):
    rng = np.random.default_rng(seed)
    score = rng.choice(np.linspace(0, 1, 40), n) if ties else rng.random(n)
    score = score.astype(dtype)
    score[rng.random(n) < 0.1] = -0.0
    score[rng.random(n) < 0.1] = np.nextafter(dtype(0), dtype(1))
    user = rng.integers(0, 120, n) ** 2 // 100
    return pl.DataFrame(
        {
            "user": KINDS[users](user),
            "click": rng.random(n) < 0.1 + 0.4 * score.astype(np.float64),
            "score": score,
            "unseen_ad": rng.random(n) < 0.3,
            "history_length": rng.integers(0, 6, n),
            "day": [datetime.date(2024, 1, 1 + int(d)) for d in rng.integers(0, 3, n)],
            "place": [None if p == 9 else int(p) for p in rng.integers(0, 10, n)],
        }
    )


def both(monkeypatch, paths, settings, **columns):
    """Evaluate in memory and through temporary files."""
    found = []
    for most in (10**9, 0):
        monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", most)
        found.append(evaluate(paths, settings, **columns))
    return found


def assert_like(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_like(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_like(a, b, f"{where}[{i}]")
    elif isinstance(one, float):
        assert math.isclose(one, two, rel_tol=1e-12, abs_tol=1e-13), (where, one, two)
    else:
        assert one == two, where


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("users", KINDS)
def test_all_numbers_are_those_of_memory(tmp_path, monkeypatch, users, dtype):
    path = tmp_path / "p.parquet"
    table(users, dtype, ties=dtype is np.float32 or users == "text").write_parquet(path, row_group_size=450)
    one, two = both(monkeypatch, {"p": path}, Eval(bootstrap=30, compat=("recbole", "torchrec")), slices=["place"])
    assert len(one["variants"]["p"]["slices"]) == 2 + 2 + 3 + 9
    assert_like(one, two)


def test_comparisons_join_users_of_different_types(tmp_path, monkeypatch):
    good = table(ties=False)
    rng = np.random.default_rng(1)
    bad = good.with_columns(score=pl.Series(rng.random(good.height)), user=pl.col("user").cast(pl.String))
    bad = bad.sample(fraction=1.0, shuffle=True, seed=1)
    for name, rows in (("good", good), ("bad", bad)):
        rows.write_parquet(tmp_path / f"{name}.parquet", row_group_size=450)
    paths = {name: tmp_path / f"{name}.parquet" for name in ("good", "bad")}
    one, two = both(monkeypatch, paths, Eval(baseline="bad", compare=(("good", "bad"),), bootstrap=50))
    assert one["comparisons"][0]["significant"]
    assert_like(one, two)
    flipped = bad.with_columns(click=pl.when(pl.int_range(pl.len()) == 5).then(~pl.col("click")).otherwise("click"))
    flipped.write_parquet(paths["bad"])
    with pytest.raises(UserError, match="1 of 95 users differ"):
        evaluate(paths, Eval(baseline="bad"))


def test_scores_that_are_no_probabilities_and_labels_of_one_class(tmp_path, monkeypatch):
    rows = table().with_columns(pl.col("score") * 30 - 10)
    rows.write_parquet(tmp_path / "logits.parquet")
    table().with_columns(click=pl.lit(True)).write_parquet(tmp_path / "clicks.parquet")
    table().with_columns(click=pl.lit(0)).write_parquet(tmp_path / "none.parquet")
    paths = {name: tmp_path / f"{name}.parquet" for name in ("logits", "clicks", "none")}
    one, two = both(monkeypatch, paths, Eval(bootstrap=0))
    assert two["variants"]["logits"]["all"]["log_loss"] is None
    assert two["variants"]["none"]["all"]["gauc"] is None
    assert_like(one, two)


def test_one_row(tmp_path, monkeypatch):
    table().head(1).write_parquet(tmp_path / "row.parquet")
    assert_like(*both(monkeypatch, {"row": tmp_path / "row.parquet"}, Eval(bootstrap=9)))


@pytest.mark.parametrize("users", ["small ints", "extreme ints", "text"])
@pytest.mark.parametrize("alone", [True, False])
def test_users_of_more_rows_than_a_partition(tmp_path, monkeypatch, users, alone):
    """They are measured by merging scores, and no partition is held with all of its rows."""
    path = tmp_path / "p.parquet"
    rows = table(users)
    giant = pl.int_range(pl.len()) % 16
    kept = rows["user"] if alone else pl.col("user")
    giants = pl.when(giant < 16 if alone else giant < 12).then(pl.lit(rows["user"][0], rows.schema["user"]))
    rows.with_columns(
        user=giants.when(giant < 14).then(pl.lit(rows["user"][3], rows.schema["user"])).otherwise(kept)
    ).write_parquet(path)
    most = []
    read = large_predictions.user_auc

    def watched(user, *rest, **more):
        most.append(len(user))
        return read(user, *rest, **more)

    monkeypatch.setattr(large_predictions, "PARTITION_ROWS", 200)
    monkeypatch.setattr(large_predictions, "user_auc", watched)
    one, two = both(monkeypatch, {"p": path}, Eval(bootstrap=20, compat=("recbole", "fuxictr")))
    assert max(most) < 800
    assert_like(one, two)


def test_users_whose_hashes_agree_are_told_apart(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    table("text").write_parquet(path)
    hashed, seeds = large_predictions.text_hash, []

    def weak(users, seed):
        seeds.append(seed)
        words = hashed(users, seed)
        return words & np.uint64(3) if seed == 0 else words

    monkeypatch.setattr(large_predictions, "text_hash", weak)
    one, two = both(monkeypatch, {"p": path}, Eval(bootstrap=0))
    assert {0, 1} <= set(seeds)
    assert_like(one, two)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": float("nan")}, "row 2,001, column 'score'"),
        ({"score": float("inf")}, "row 2,001, column 'score'"),
        ({"score": None}, "row 2,001, column 'score': nothing"),
        ({"click": 2}, "row 2,001, column 'click'"),
        ({"user": None}, "row 2,001 has no user"),
        ({"user": 1.5}, "row 2,001, column 'user': 1.5"),
    ],
)
def test_the_first_bad_row_is_named(tmp_path, monkeypatch, change, says):
    monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)
    (column, value), bad = *change.items(), pl.int_range(pl.len()).is_in([2000, 2950])
    rows = table().with_columns(pl.col("click").cast(pl.Int64))
    if isinstance(value, float):
        rows = rows.with_columns(pl.col(column).cast(pl.Float64))
    path = tmp_path / "p.parquet"
    rows.with_columns(pl.when(bad).then(pl.lit(value)).otherwise(column).alias(column)).write_parquet(
        path, row_group_size=450
    )
    with pytest.raises(UserError) as e:
        evaluate({"p": path}, Eval(bootstrap=0))
    assert says in e.value.message
    assert str(path) in e.value.message


def test_missing_columns_and_too_many_values(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)
    path = tmp_path / "p.parquet"
    table().with_columns(day=pl.int_range(pl.len())).write_parquet(path)
    made = evaluate({"p": path}, Eval(bootstrap=0))
    assert not any(s.startswith("day") for s in made["order"]["slices"])
    with pytest.raises(UserError, match="3,000 distinct values"):
        evaluate({"p": path}, Eval(bootstrap=0), slices=["day"])
    with pytest.raises(UserError, match="no column 'plaice' for --by plaice; did you mean 'place'"):
        evaluate({"p": path}, Eval(bootstrap=0), slices=["plaice"])
    with pytest.raises(UserError, match="--label"):
        evaluate({"p": path}, Eval(bootstrap=0), label="clik")


def test_temporary_files_are_removed_also_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = tmp_path / "p.parquet"
    table().write_parquet(path)
    evaluate({"p": path}, Eval(bootstrap=0))
    table().with_columns(click=pl.lit(3)).write_parquet(path)
    with pytest.raises(UserError):
        evaluate({"p": path}, Eval(bootstrap=0))
    assert list(temporary.iterdir()) == []


def test_no_room_for_temporary_files_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)
    path = tmp_path / "p.parquet"
    table().write_parquet(path)
    with largest_file(10_000), pytest.raises(UserError, match=r"no room for temporary files in .*TMPDIR"):
        evaluate({"p": path}, Eval(bootstrap=0))


def test_a_file_with_a_broken_page_is_no_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "ROWS_IN_MEMORY", 0)
    path = tmp_path / "p.parquet"
    table().write_parquet(path)
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as parquet"):
        evaluate({"p": path}, Eval(bootstrap=0))


def test_files_of_any_writer(tmp_path, monkeypatch):
    """One large row group, row groups without rows, dictionaries: the same numbers."""
    rows = table("text")
    arrow = rows.to_arrow()
    paths = {"one": tmp_path / "one.parquet", "many": tmp_path / "many.parquet", "enum": tmp_path / "enum.parquet"}
    pq.write_table(arrow, paths["one"])
    with pq.ParquetWriter(paths["many"], arrow.schema) as writer:
        begin = 0
        for size in random.Random(0).choices([0, 1, 50, 400], k=40):
            writer.write_table(arrow.slice(begin, size)) if size else writer.write_table(arrow.slice(0, 0))
            begin += size
        writer.write_table(arrow.slice(begin))
    rows.with_columns(pl.col("user").cast(pl.Categorical)).write_parquet(paths["enum"])
    one, two = both(monkeypatch, paths, Eval(bootstrap=0))
    assert_like(one, two)
    assert one["variants"]["one"] == one["variants"]["many"] == one["variants"]["enum"]
