"""`ctrkit inspect` through the command line."""

from pathlib import Path

import polars as pl
from click.testing import CliRunner

from ctrkit.cli import main


def test_several_paths(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pl.DataFrame({f"column_{name}": [1, 2]}).write_parquet(tmp_path / f"{name}.parquet")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    assert result.exit_code == 0, result.output
    assert "column_a" in result.output
    assert "column_b" in result.output
    assert "rows: 2" in result.output


def test_foreign_file_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.txt")])
    assert result.exit_code == 1
    assert "nothing that ctrkit writes" in result.output
    assert CliRunner().invoke(main, ["inspect"]).exit_code == 2
