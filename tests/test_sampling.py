import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard

from ctrkit.errors import UserError
from ctrkit.recipe import Source
from ctrkit.sampling import Sample, distinct_in_all, sample, share_of_visits
from ctrkit.tables import open_table

ROWS = 20_000


def rows_of(n: int = ROWS, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame({"user": [f"u{k}" for k in rng.integers(0, 500, n)], "n": range(n), "x": rng.random(n)})


def taken(raw: Path, files: str, max_rows: int = 3000, **options: object) -> Sample:
    source = Source(files=files, **options)  # type: ignore[arg-type]
    return sample(open_table("behaviours", source, raw), ["user", "n"], max_rows)


def spread(found: Sample) -> None:
    """Check that the sample's rows are whole rows of the table, each once, from its beginning to its end."""
    numbers = found.frame["n"].cast(pl.Int64)
    assert numbers.is_unique().all()
    told = pl.DataFrame({"n": numbers, "user": found.frame["user"]}).sort("n")
    assert told["user"].to_list() == rows_of()["user"].gather(told["n"]).to_list()
    tenths = (numbers * 10 // ROWS).unique().sort().to_list()
    assert tenths == list(range(10))


def test_a_small_table_is_read_whole_and_counted(tmp_path: Path) -> None:
    rows_of(100).write_csv(tmp_path / "a.csv")
    found = taken(tmp_path, "a.csv")
    assert (found.rows, found.rows_in_all, found.counted, found.whole, found.share) == (100, 100, True, True, 1.0)
    assert found.frame["n"].cast(pl.String).to_list() == [str(n) for n in range(100)]


def test_windows_of_a_large_file(tmp_path: Path) -> None:
    rows_of().write_csv(tmp_path / "a.csv")
    found = taken(tmp_path, "a.csv")
    spread(found)
    assert not found.counted
    assert abs(found.rows - 3000) < 300
    assert abs(found.rows_in_all - ROWS) < 0.03 * ROWS
    assert found.frame["__window"].n_unique() == 30


def test_windows_of_json_and_parquet(tmp_path: Path) -> None:
    rows_of().write_ndjson(tmp_path / "a.jsonl")
    found = taken(tmp_path, "a.jsonl")
    spread(found)
    assert abs(found.rows_in_all - ROWS) < 0.03 * ROWS
    rows_of().write_parquet(tmp_path / "a.parquet", row_group_size=1000)
    found = taken(tmp_path, "a.parquet")
    assert found.rows_in_all == ROWS
    assert found.counted
    assert not found.whole
    assert found.frame["n"].max() == ROWS - 1


def test_many_files_are_sampled_evenly(tmp_path: Path) -> None:
    for day in range(40):
        folder = tmp_path / "log" / f"day={day:02}"
        folder.mkdir(parents=True)
        rows_of()[day * 500 : (day + 1) * 500].write_csv(folder / "part.csv")
    source = Source(files="log")
    found = sample(open_table("behaviours", source, tmp_path), ["user", "n", "day"], 3000)
    spread(found)
    assert found.frame["day"].n_unique() == 30
    assert set(found.frame["day"]) >= {"00", "39"}
    assert not found.counted  # ten files were not opened
    assert abs(found.rows_in_all - ROWS) < 0.03 * ROWS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_is_read_from_its_beginning(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending == ".gz" else zstandard.compress
    (tmp_path / f"a.csv{ending}").write_bytes(pack(rows_of().write_csv().encode()))
    found = taken(tmp_path, f"a.csv{ending}")
    assert found.frame["n"].cast(pl.String).to_list() == [str(n) for n in range(3000)]
    assert not found.whole
    assert abs(found.rows_in_all - ROWS) < 0.03 * ROWS
    whole = taken(tmp_path, f"a.csv{ending}", ROWS + 1)
    assert (whole.rows, whole.whole) == (ROWS, True)


def test_cells_with_line_breaks_are_not_cut(tmp_path: Path) -> None:
    frame = rows_of().with_columns(pl.lit('a "b"\nc, d\n').alias("text"))
    frame.write_csv(tmp_path / "a.csv")
    found = sample(open_table("behaviours", Source(files="a.csv"), tmp_path), ["user", "n", "text"], 3000)
    assert set(found.frame["text"]) == {'a "b"\nc, d\n'}
    assert found.frame["n"].cast(pl.String).to_list() == [str(n) for n in range(found.frame.height)]
    assert abs(found.rows_in_all - ROWS) < 0.1 * ROWS


def test_of_a_url_only_the_beginning_is_known(tmp_path: Path) -> None:
    rows_of().write_csv(tmp_path / "a.csv")
    rows_of().write_parquet(tmp_path / "a.parquet")
    found = taken(tmp_path, f"file://{tmp_path}/a.csv")
    assert found.unknown == (f"file://{tmp_path}/a.csv",)
    assert found.rows_in_all == found.rows == 3000
    assert not found.whole
    found = taken(tmp_path, f"file://{tmp_path}/a.parquet")
    assert (found.unknown, found.rows, found.rows_in_all, found.counted) == ((), 3000, ROWS, True)


def test_where_and_a_damaged_file(tmp_path: Path) -> None:
    rows_of().write_csv(tmp_path / "a.csv")
    found = taken(tmp_path, "a.csv", where="n % 2 = 0")
    assert abs(found.rows / found.frame.height - 2) < 0.1
    assert abs(found.read - ROWS / 2) < 0.05 * ROWS
    packed = gzip.compress(rows_of().write_csv().encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"cut\.csv\.gz cannot be .*whole"):
        taken(tmp_path, "cut.csv.gz", ROWS)


def test_stretches_lie_within_a_table_and_hold_as_many_rows(tmp_path: Path) -> None:
    rows_of().write_csv(tmp_path / "a.csv")
    rows_of().write_parquet(tmp_path / "b.parquet")
    for name in ("a.csv", "b.parquet"):
        long = taken(tmp_path, name).stretches
        numbers = long["n"].cast(pl.Int64)
        assert long["__window"].n_unique() == 5
        assert abs(long.height - 3000) < 300
        of_windows = (
            long.with_columns(numbers).group_by("__window").agg(pl.col("n").max() - pl.col("n").min(), pl.len())
        )
        assert (of_windows["n"] == of_windows["len"] - 1).all()  # whole runs of rows
        assert numbers.min() > ROWS // 20
        assert numbers.max() < ROWS - ROWS // 20
    assert taken(tmp_path, "a.csv", 2 * ROWS).stretches.is_empty()


def estimated(values: np.ndarray, windows: int = 30, share: float = 0.1) -> float:  # type: ignore[type-arg]
    """Estimate the distinct values from windows spread evenly over a column."""
    n = len(values)
    length = int(n * share / windows)
    begins = np.linspace(0, n - length, windows).astype(int)
    rows = np.concatenate([np.arange(b, b + length) for b in begins])
    return distinct_in_all(pl.Series(values[rows]), pl.Series(np.repeat(np.arange(windows), length)), share)


def test_distinct_values_of_any_order() -> None:
    rng = np.random.default_rng(1)
    few = rng.integers(0, 300, 100_000)
    assert estimated(few) == pytest.approx(300, rel=0.02)
    many = rng.integers(0, 20_000, 100_000)
    assert estimated(many) == pytest.approx(len(np.unique(many)), rel=0.15)
    in_runs = np.repeat(np.arange(10_000), 10)  # rows in order of user
    assert estimated(in_runs) == pytest.approx(10_000, rel=0.15)
    assert estimated(rng.permutation(100_000)) == pytest.approx(100_000, rel=0.02)  # an id of its own in each row


def test_what_is_read_whole_is_counted() -> None:
    values = pl.Series(["a", "b", None, "a"])
    assert distinct_in_all(values, pl.Series([0, 0, 1, 1]), 1.0) == 2
    assert distinct_in_all(pl.Series(["a", "b"]), pl.Series([0, 0]), 0.5) == 2


def in_all(values: np.ndarray, share: float = 0.02) -> float:  # type: ignore[type-arg]
    """Estimate the distinct values of a column from windows and stretches."""

    def cut(count: int, places: np.ndarray) -> tuple[pl.Series, pl.Series]:  # type: ignore[type-arg]
        length = int(len(values) * share / count)
        begins = (places * (len(values) - length)).astype(int)
        rows = np.concatenate([np.arange(b, b + length) for b in begins])
        return pl.Series(values[rows]), pl.Series(np.repeat(np.arange(count), length))

    windows, stretches = cut(30, np.linspace(0, 1, 30)), cut(5, (np.arange(5) + 0.5) / 5)
    visits = share_of_visits(*windows, *stretches, len(values))
    return distinct_in_all(*windows, max(share, visits))


def test_windows_that_cut_visits_do_not_make_more_of_them() -> None:
    """The rows of a value lie in one neighbourhood, longer than a window: each window sees a little of many."""
    rng = np.random.default_rng(2)
    rows, visits = 1_000_000, 50_000
    begin = rng.random(visits) * rows
    of = rng.integers(0, visits, rows)
    place = begin[of] + rng.random(rows) * 2000  # windows are 666 rows long, stretches 4,000
    in_sessions = of[np.argsort(place)]
    true = len(np.unique(of))
    assert in_all(in_sessions) == pytest.approx(true, rel=0.15)
    windows = np.repeat(np.arange(30), 666)
    cut = np.concatenate([in_sessions[b : b + 666] for b in np.linspace(0, rows - 666, 30).astype(int)])
    assert distinct_in_all(pl.Series(cut), pl.Series(windows), 0.02) > 2 * true
    # What was right before is right still.
    assert in_all(rng.integers(0, 300, 100_000)) == pytest.approx(300, rel=0.02)
    assert in_all(np.repeat(np.arange(100_000), 10)) == pytest.approx(100_000, rel=0.15)
    assert in_all(rng.permutation(100_000)) == pytest.approx(100_000, rel=0.05)
