"""Reading predictions, ours or anyone's: a table with a user, a 0/1 label and a score in each row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ctrkit.errors import UserError, nearest

HISTORY_BUCKETS = ((0, 0), (1, 5), (6, 20), (21, None))
"""Behaviours in the user's history, first and last of each slice."""
BUILT_IN = {"unseen-ad": "unseen_ad", "history-length": "history_length", "day": "day"}
"""Slices that are made where the file has the column."""
MOST_VALUES = 100
"""A column with more distinct values makes no slices."""
FIRST_ROWS = 2_000_000
"""Rows of a file that the report chooses impressions, users and ads from."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One file of predictions. Arrays are [rows], in the file's order."""

    users: pl.Series
    """String [users]: the distinct raw users, ascending."""
    user: NDArray[np.int64]
    """Row → position in `users`."""
    click: NDArray[np.bool_]
    score: NDArray[Any]
    """float32 or float64, finite."""
    slices: dict[str, NDArray[np.bool_]]
    """Name → which rows are in it, such as "unseen_ad=true". Empty ones are left out."""


def read(
    path: Path, *, user: str = "user", label: str = "click", score: str = "score", slices: Sequence[str] = ()
) -> Predictions:
    """Read a Parquet, CSV or TSV file (text also as .gz or .zst).

    Slices are made from the columns `unseen_ad`, `history_length` and `day`, where the file has them, and
    from those named in `slices`. Raises UserError with the file, column and row (1 is the first row of data).
    """
    required = {"user": user, "label": label, "score": score}
    frame = _read(path, [*required.values(), *slices])
    check_columns(path, frame.columns, required, slices)
    if frame.height == 0:
        raise UserError(f"{path} has no rows; there is nothing to evaluate.")
    names, codes = _users(frame[user], path)
    click = labels(frame[label], path)
    made = slicing(path, frame.schema, slices, lambda column: frame[column].unique()).masks(frame)
    return Predictions(
        users=names,
        user=codes,
        click=click,
        score=scores(frame[score], path),
        slices={name: inside for name, inside in made.items() if inside.any()},
    )


def check_columns(path: Path, columns: Sequence[str], required: Mapping[str, str], slices: Sequence[str]) -> None:
    """Raise UserError for a column that is wanted and not there. `required`: option → column."""
    for what, column in required.items():
        if column not in columns:
            raise UserError(
                f"{path} has no column {column!r}, which should be the {what}; name it with --{what}"
                f"{nearest(column, _columns(path))}"
            )
    for name in slices:
        column = name if name in columns else BUILT_IN.get(name, name)
        if column not in columns:
            raise UserError(f"{path} has no column {column!r} for --by {name}{nearest(column, _columns(path))}")


def _read(path: Path, wanted: Sequence[str]) -> pl.DataFrame:
    """Read the columns that are wanted or that slices are built from, of those that the file has."""
    known = {*wanted, *BUILT_IN.values()}
    columns = [c for c in _columns(path) if c in known]
    if not columns:  # polars reads a choice of none as all
        return pl.DataFrame()
    try:
        if _kind(path) == ".parquet":
            return pl.read_parquet(path, columns=columns, glob=False)
        # As text: a user "007" stays one, and a bad number can be shown as it stands in the file.
        separator = SEPARATORS[_kind(path)]
        frame = pl.read_csv(path, columns=columns, separator=separator, infer_schema=False, glob=False)
        return frame.head(frame.height - _blank_end(frame, path, separator))
    except pl.exceptions.PolarsError as e:
        raise UserError(f"{path} cannot be read as {_kind(path)[1:]}: {e}") from None


def _blank_end(frame: pl.DataFrame, path: Path, separator: str) -> int:
    """Return how many blank lines a text file ends with."""
    filled = frame.select(pl.any_horizontal(pl.all().is_not_null())).to_series().arg_true()
    first = int(filled[-1]) + 1 if len(filled) else 0
    if first == frame.height:
        return 0
    every = pl.read_csv(path, separator=separator, infer_schema=False, skip_rows_after_header=first, glob=False)
    blank = every.select(pl.all().is_null().all()).row(0) if every.height else ()
    return frame.height - first if all(blank) else 0


def is_parquet(path: Path) -> bool:
    """Say whether a file that is there is called a Parquet file."""
    return _kind(path) == ".parquet" and path.is_file()


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind == ".parquet" or kind in SEPARATORS:
        return kind
    raise UserError(
        f"{path}: predictions are read from .parquet, .csv and .tsv files (text also as .gz or .zst), "
        f"and the name does not end in one of these. Rename or convert the file."
    )


def _columns(path: Path) -> list[str]:
    kind = _kind(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} is not there")
    try:
        if kind == ".parquet":
            return list(pl.read_parquet_schema(path))
        head = pl.read_csv(path, separator=SEPARATORS[kind], infer_schema=False, n_rows=0, glob=False)
        return head.columns
    except pl.exceptions.NoDataError:
        raise UserError(f"{path} is empty; there is nothing to evaluate.") from None
    except pl.exceptions.PolarsError as e:
        raise UserError(f"{path} cannot be read as {kind[1:]}: {e}") from None


def _row(bad: pl.Series) -> int:
    """Return the number of the first true row, 1 for the first row of data."""
    return int(bad.arg_max() or 0) + 1


def user_values(column: pl.Series, path: Path, first_row: int = 0) -> pl.Series:
    """Return raw users, none missing: integers as they are, floats that are whole as Int64, anything else as text.

    `first_row`: rows of the file before the column's first, for messages.
    """
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        bad = (whole.cast(pl.Float64) != column.cast(pl.Float64)).fill_null(True) & column.is_not_null()
        if bad.any():
            raise UserError(_at(path, column, bad, "is not a user: neither text nor a whole number", first_row))
        column = whole
    if not column.dtype.is_integer():
        try:
            column = column.cast(pl.String)
        except pl.exceptions.PolarsError:
            raise UserError(
                f"{path}: column {column.name!r} is {column.dtype}; users are text or whole numbers"
            ) from None
    if column.null_count():
        bad = column.is_null()
        raise UserError(
            f"{path}: row {first_row + _row(bad):,} has no user (column {column.name!r} is empty in "
            f"{int(bad.sum()):,} of {len(column):,} rows). GAUC is by user: leave these rows out, or give "
            f"each a user of its own."
        )
    return column


def _users(column: pl.Series, path: Path) -> tuple[pl.Series, NDArray[np.int64]]:
    text = user_values(column, path).cast(pl.String)
    distinct = text.unique().sort()
    codes = pl.DataFrame({"user": distinct, "code": np.arange(len(distinct), dtype=np.int64)})
    joined = pl.DataFrame({"user": text}).join(codes, on="user", how="left", maintain_order="left")
    return distinct, joined["code"].to_numpy()


def _numbers(column: pl.Series, path: Path) -> pl.Series:
    """Return the column as numbers; text as Float64, "true" and "false" as 1 and 0, anything else null."""
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        truth = pl.Series(["true", "false"]), pl.Series(["1", "0"])
        return text.str.to_lowercase().replace(*truth).cast(pl.Float64, strict=False)
    if column.dtype == pl.Boolean:
        return column.cast(pl.UInt8)
    if column.dtype.is_decimal():
        return column.cast(pl.Float64)
    if column.dtype.is_numeric():
        return column
    raise UserError(f"{path}: column {column.name!r} is {column.dtype}, not numbers")


def labels(
    column: pl.Series, path: Path, first_row: int = 0, advice: str = " Name the column of the clicks with --label."
) -> NDArray[np.bool_]:
    """Return which rows are clicked, bool [rows]. advice: ends the message about what is no label."""
    numbers = _numbers(column, path)
    if (bad := ~(((numbers == 0) | (numbers == 1)).fill_null(False))).any():
        raise UserError(_at(path, column, bad, "is not a label: 1 is a click, 0 is none", first_row) + advice)
    return (numbers == 1).to_numpy()


def scores(
    column: pl.Series, path: Path, first_row: int = 0, advice: str = "; name their column with --score"
) -> NDArray[Any]:
    """Return the scores, float32 or float64 [rows], finite. advice: ends the message about what is no score."""
    numbers = _numbers(column, path)
    if not numbers.dtype.is_float():
        numbers = numbers.cast(pl.Float64)
    if (bad := ~(numbers.is_finite().fill_null(False))).any():
        raise UserError(
            _at(path, column, bad, "is not a finite number", first_row) + f" Every impression needs a score{advice}."
        )
    return numbers.cast(pl.Float32).to_numpy() if numbers.dtype == pl.Float16 else numbers.to_numpy()


def _at(path: Path, column: pl.Series, bad: pl.Series, fault: str, first_row: int = 0) -> str:
    row = _row(bad)
    value = column[row - 1]
    shown = "nothing" if value is None else repr(value)
    more = int(bad.sum()) - 1
    others = f" ({more:,} more row{'s' if more > 1 else ''} like it)" if more else ""
    return f"{path}: row {first_row + row:,}, column {column.name!r}: {shown} {fault}{others}."


@dataclass(frozen=True)
class Slicing:
    """Which slices a file of predictions is cut into."""

    unseen: bool
    history: bool
    values: dict[str, pl.Series]
    """Column → its distinct values, ascending; a slice each."""

    def masks(self, frame: pl.DataFrame) -> dict[str, NDArray[np.bool_]]:
        """Return name → which rows of the frame are inside, also where none is."""
        made: dict[str, NDArray[np.bool_]] = {}
        if self.unseen:
            unseen = _numbers(frame["unseen_ad"], Path())
            for name, value in (("true", 1), ("false", 0)):
                made[f"unseen_ad={name}"] = (unseen == value).fill_null(False).to_numpy()
        if self.history:
            length = frame["history_length"].cast(pl.Float64, strict=False)
            for low, high in HISTORY_BUCKETS:
                inside = (length >= low) & (length <= (high if high is not None else np.inf))
                shown = f"{low}+" if high is None else f"{low}-{high}" if high > low else f"{low}"
                made[f"history={shown}"] = inside.fill_null(False).to_numpy()
        for column, values in self.values.items():
            for v in values:
                shown = str(v).lower() if isinstance(v, bool) else str(v)
                made[f"{column}={shown}"] = (frame[column] == v).fill_null(False).to_numpy()
        return made


def slicing(
    path: Path, schema: Mapping[str, pl.DataType], slices: Sequence[str], distinct: Callable[[str], pl.Series]
) -> Slicing:
    """Say how a file is cut: by ads unseen in training, by history length and by day, as far as it has the columns,
    and by the columns named in `slices`, which it has.

    `distinct` gives a column's distinct values. Raises UserError for a named column of too many.
    """
    values: dict[str, pl.Series] = {}
    asked = [name if name in schema else BUILT_IN[name] for name in slices]
    asked = [column for column, name in zip(asked, slices, strict=True) if name not in BUILT_IN or column == "day"]
    for column in dict.fromkeys(["day", *asked] if "day" in schema else asked):
        found = distinct(column).drop_nulls().sort()
        if len(found) <= MOST_VALUES:
            values[column] = found
        elif column in asked:
            raise UserError(
                f"{path}: column {column!r} has {len(found):,} distinct values; slices are made from at "
                f"most {MOST_VALUES}. Choose a coarser column."
            )
    return Slicing(
        unseen="unseen_ad" in schema and schema["unseen_ad"] in (pl.Boolean, pl.String),
        history="history_length" in schema and not schema["history_length"].is_nested(),
        values=values,
    )


def first_rows(path: Path) -> pl.LazyFrame:
    """Return a lazy frame of a Parquet file of predictions, its first `FIRST_ROWS` at most."""
    return pl.scan_parquet(path, glob=False).head(FIRST_ROWS)
