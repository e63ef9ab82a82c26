"""Tables kept as a folder a day, and the days of each split."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ctrkit import files


def write_by_day(frame: pl.DataFrame, folder: Path) -> None:
    """Write a frame with a column `day` as `folder/day=YYYY-MM-DD/part-0000.parquet`, rows in the order given."""
    folder.mkdir(parents=True)
    for (day,), rows in frame.partition_by("day", as_dict=True, maintain_order=True, include_key=False).items():
        inner = folder / f"day={day}"
        inner.mkdir()
        rows.write_parquet(inner / "part-0000.parquet", statistics=False)


def read_by_day(folder: Path, wanted: Sequence[datetime.date], selected: Sequence[str] = ()) -> pl.DataFrame | None:
    """Read what `write_by_day` wrote for the days wanted, `day` Date added; None where no such day is there."""
    parts = [part for day in wanted for part in sorted((folder / f"day={day}").glob("part-*.parquet"))]
    if not parts:
        return None
    scan = pl.scan_parquet(parts, hive_partitioning=False, include_file_paths="path")
    if selected:
        scan = scan.select(*selected, "path")
    day = pl.col("path").str.extract(r"day=(\d{4}-\d{2}-\d{2})[/\\][^/\\]*$").str.to_date().alias("day")
    return scan.with_columns(day).drop("path").collect()


def read_split(convert_folder: Path) -> dict[str, list[datetime.date]]:
    """Return the days of `train`, `valid` and `test`."""
    dates = files.read_json(convert_folder / "split.json")
    return {part: [datetime.date.fromisoformat(d) for d in dates[part]] for part in ("train", "valid", "test")}
