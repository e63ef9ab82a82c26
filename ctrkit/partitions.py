"""Tables kept as a folder a day, and the days of each split."""

import datetime
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet

from ctrkit import files
from ctrkit.errors import UserError
from ctrkit.facts import read_facts
from ctrkit.spool import whole

PARQUET, ARROW = ".parquet", ".arrow"
"""What files end in. Arrow's are written and read in a quarter of the time, and are larger."""


def write_parquet(frame: pl.DataFrame, path: Path, **options: Any) -> None:
    """Write a Parquet file whole or not at all, so that a task may be done twice."""
    with whole(path) as tmp:
        frame.write_parquet(tmp, statistics=False, **options)
    files.write_back(path)


def write_arrow(frame: pl.DataFrame, path: Path) -> None:
    """Write an Arrow IPC file, uncompressed, whole or not at all: for what only the next stage reads."""
    with whole(path) as tmp:
        frame.write_ipc(tmp, compression="uncompressed")
    files.write_back(path)


def write_rows(frame: pl.DataFrame, path: Path, packed: Collection[str]) -> None:
    """Write a Parquet file of plain rows, whole or not at all: values as they are, which writes and reads several times
    faster than dictionaries. Columns `packed`, whose values repeat from row to row, are compressed (LZ4)."""
    fields, table = [], frame.to_arrow()
    for field, column in zip(table.schema, table.columns, strict=True):  # without nulls there is less to write
        fields.append(field.with_nullable(column.null_count > 0 or pyarrow.types.is_nested(field.type)))
    lists = {name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)}
    with whole(path) as tmp:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_arrays(table.columns, schema=pyarrow.schema(fields)),
            tmp,
            compression={f"{n}.list.element" if n in lists else n: _codec(n in packed) for n in frame.columns},
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
        )
    files.write_back(path)


def _codec(packed: bool) -> str:
    return "lz4" if packed else "none"


def write_days(
    frame: pl.DataFrame,
    days: Sequence[str],
    rows: Iterable[int],
    folder: Path,
    part: int,
    write: Callable[[pl.DataFrame, Path], None],
    ending: str = PARQUET,
) -> None:
    """Write a user partition whose rows lie day by day, `folder/day=YYYY-MM-DD/part-PPPP` and the ending.

    rows: how many each day has; write: what writes a file.
    """
    begin = 0
    for day, n in zip(days, rows, strict=True):
        if n:
            write(frame.slice(begin, int(n)), folder / f"day={day}" / f"part-{part:04}{ending}")
            begin += int(n)


def days_there(folder: Path) -> list[datetime.date]:
    """Return the days that a folder has."""
    return sorted(datetime.date.fromisoformat(f.name.removeprefix("day=")) for f in folder.glob("day=*"))


def read_by_day(
    folder: Path, wanted: Sequence[datetime.date], selected: Sequence[str] = (), part: int | None = None
) -> pl.DataFrame | None:
    """Read the days wanted, of all partitions or of one, `day` Date added; None where no such day is there.

    A column of whole numbers gets the widest type that one of its files has.
    """
    name = "part-*" if part is None else f"part-{part:04}.*"
    frames = []
    for day in wanted:
        for path in sorted((folder / f"day={day}").glob(name)):
            some = read(path, selected)
            frames.append(some.with_columns(pl.lit(day, dtype=pl.Date).alias("day")))
    return pl.concat(frames, how="vertical_relaxed", rechunk=False) if frames else None


def read(path: Path, selected: Sequence[str] = ()) -> pl.DataFrame:
    """Read a file of a folder that a stage wrote; one that is not whole is the user's error."""
    try:
        return (pl.read_ipc if path.suffix == ARROW else pl.read_parquet)(path, columns=list(selected) or None)
    except (OSError, pl.exceptions.ComputeError) as e:
        told = str(e).partition("\n")[0]
        raise UserError(f"{path} is damaged ({told}); run the stage again that wrote it") from None


def read_users(convert_folder: Path, part: int) -> pl.Series:
    """Return the users of a partition by their code in `behaviours`."""
    path = convert_folder / "users" / f"part-{part:04}.parquet"
    return read(path)["user"] if path.is_file() else pl.Series("user", [], dtype=pl.String)


def read_split(convert_folder: Path) -> dict[str, list[datetime.date]]:
    """Return the days of `train`, `valid` and `test`."""
    dates = read_facts(convert_folder)
    return {part: [datetime.date.fromisoformat(d) for d in dates[part]] for part in ("train", "valid", "test")}
