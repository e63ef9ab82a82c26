"""Row groups read from the footer, against what polars was told to write."""

from pathlib import Path

import polars as pl
import pytest

from ctrkit.errors import UserError
from ctrkit.parquet_footer import row_groups


def test_rows_of_each_row_group(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    for rows in (0, 1, 10):
        frame = pl.DataFrame(
            {"n": range(rows), "text": ["é"] * rows, "list": [[0.5]] * rows}, schema_overrides={"n": pl.Int64}
        )
        frame.write_parquet(file, row_group_size=4)
        groups = row_groups(file)
        assert sum(groups) == rows
        assert max(groups, default=0) <= 4
    assert groups == [4, 4, 2] or len(groups) == 3
    pl.DataFrame({f"c{n}": range(100_000) for n in range(20)}).write_parquet(file, row_group_size=1000)
    assert row_groups(file) == [1000] * 100


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pl.DataFrame({"n": range(10)}).write_parquet(file)
    whole = file.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[:40] + whole[-8:], b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole Parquet file"):
            row_groups(file)
