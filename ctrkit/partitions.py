"""Tables kept as a folder a day, and the days of each split."""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import files
from ctrkit.errors import UserError
from ctrkit.spool import whole


def write_parquet(frame: pl.DataFrame, path: Path, **options: Any) -> None:
    """Write a Parquet file whole or not at all, so that a task may be done twice."""
    with whole(path) as tmp:
        frame.write_parquet(tmp, statistics=False, **options)


def write_days(frame: pl.DataFrame, days: Sequence[str], rows: Iterable[int], folder: Path, part: int) -> None:
    """Write a user partition whose rows lie day by day, `folder/day=YYYY-MM-DD/part-PPPP.parquet`.

    rows: how many each day has.
    """
    begin = 0
    for day, n in zip(days, rows, strict=True):
        if n:
            some = frame.slice(begin, int(n))
            write_parquet(some, folder / f"day={day}" / f"part-{part:04}.parquet", compression="lz4")
            begin += int(n)


def days_there(folder: Path) -> list[datetime.date]:
    """Return the days that a folder has."""
    return sorted(datetime.date.fromisoformat(f.name.removeprefix("day=")) for f in folder.glob("day=*"))


def read_by_day(
    folder: Path, wanted: Sequence[datetime.date], selected: Sequence[str] = (), part: int | None = None
) -> pl.DataFrame | None:
    """Read the days wanted, of all partitions or of one, `day` Date added; None where no such day is there."""
    name = "part-*.parquet" if part is None else f"part-{part:04}.parquet"
    parts = [path for day in wanted for path in sorted((folder / f"day={day}").glob(name))]
    if not parts:
        return None
    scan = pl.scan_parquet(parts, hive_partitioning=False, include_file_paths="path")
    if selected:
        scan = scan.select(*selected, "path")
    day = pl.col("path").str.extract(r"day=(\d{4}-\d{2}-\d{2})[/\\][^/\\]*$").str.to_date().alias("day")
    return scan.with_columns(day).drop("path").collect()


def read_users(convert_folder: Path, part: int) -> pl.Series:
    """Return the users of a partition by their code in `behaviours`."""
    path = convert_folder / "users" / f"part-{part:04}.parquet"
    return pl.read_parquet(path)["user"] if path.is_file() else pl.Series("user", [], dtype=pl.String)


def read_split(convert_folder: Path) -> dict[str, list[datetime.date]]:
    """Return the days of `train`, `valid` and `test`."""
    dates = read_facts(convert_folder)
    return {part: [datetime.date.fromisoformat(d) for d in dates[part]] for part in ("train", "valid", "test")}


def read_facts(convert_folder: Path) -> dict[str, Any]:
    """Return what `split.json` says: days, number of partitions, rate of negatives."""
    if not (convert_folder / "split.json").is_file():
        raise UserError(f"{convert_folder} has no samples; run ctrkit convert with this recipe first")
    facts = files.read_json(convert_folder / "split.json")
    assert isinstance(facts, dict)
    return facts
