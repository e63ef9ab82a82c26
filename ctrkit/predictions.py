"""Reading predictions, ours or anyone's: a table with a user, a 0/1 label and a score in each row."""

import csv
import gzip
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
EXACT_BELOW = 2**53
"""Integers that are smaller are exact in float64."""
EXACT_DIGITS = 15
"""Decimals of at most so many digits stay different in float64."""


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
            there = _columns(path)
            if (found := _other_separator(path, there)) is not None:
                raise UserError(
                    f"{path} has the one column {there[0]!r}: its columns look separated by {found!r}, and in a "
                    f"{_kind(path)} file that is {SEPARATORS[_kind(path)]!r}. Write it with that, or as Parquet."
                )
            raise UserError(
                f"{path} has no column {column!r}, which should be the {what}; name it with --{what}"
                f"{nearest(column, there)}"
            )
    for name in slices:
        column = name if name in columns else BUILT_IN.get(name, name)
        if column not in columns:
            raise UserError(f"{path} has no column {column!r} for --by {name}{nearest(column, _columns(path))}")


def _other_separator(path: Path, columns: Sequence[str]) -> str | None:
    """Return what seems to separate the columns of a text file that has only one as it should be read."""
    if len(columns) != 1 or _kind(path) == ".parquet":
        return None
    return next((mark for mark in (";", "\t", ",", "|") if mark in columns[0]), None)


def _read(path: Path, wanted: Sequence[str]) -> pl.DataFrame:
    """Read the columns that are wanted or that slices are built from, of those that the file has."""
    known = {*wanted, *BUILT_IN.values()}
    there = _columns(path)
    columns = [c for c in there if c in known]
    if _kind(path) != ".parquet":
        for column in columns:
            if f"{column}_duplicated_0" in there:  # polars' name of the second
                raise UserError(f"{path} has several columns {column!r}; leave one of them, or rename the others.")
    if not columns:  # polars reads a choice of none as all
        return pl.DataFrame()
    try:
        if _kind(path) == ".parquet":
            return pl.read_parquet(path, columns=columns, glob=False)
        # As text: a user "007" stays one, and a bad number can be shown as it stands in the file.
        separator = SEPARATORS[_kind(path)]
        frame = pl.read_csv(path, columns=columns, separator=separator, infer_schema=False, glob=False)
        return frame.head(frame.height - _blank_end(frame, path, separator))
    except (OSError, pl.exceptions.PolarsError) as e:
        raise _unreadable(path, e) from None


def _unreadable(path: Path, fault: Exception) -> UserError:
    """Say in one paragraph why a file cannot be read."""
    kind = _kind(path)
    if "truncate_ragged_lines" in str(fault):
        found = _first_long_row(path, SEPARATORS[kind])
        where = "a row has" if found is None else f"row {found[0]:,} has {found[1]:,} fields,"
        return UserError(
            f"{path} cannot be read as {kind[1:]}: {where} more than the header names. Put text that holds a "
            f"{SEPARATORS[kind]!r} in double quotes, or mend the row."
        )
    why = " ".join(str(fault).split())
    if isinstance(fault, OSError) and path.suffix in COMPRESSED:
        why += ". It may have been cut off: write or copy it again"
    return UserError(f"{path} cannot be read as {kind[1:]}: {why}.")


def _first_long_row(path: Path, separator: str) -> tuple[int, int] | None:
    """Return the first row of more fields than the header (1 is the first row of data) and its fields, if found."""
    if path.suffix == ".zst":
        return None
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            width = len(next(rows))
            return next(((number, len(row)) for number, row in enumerate(rows, 1) if len(row) > width), None)
    except (OSError, EOFError, csv.Error, StopIteration):
        return None


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
    except (OSError, pl.exceptions.PolarsError) as e:
        raise _unreadable(path, e) from None


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
    bad = column.is_null()
    if column.dtype == pl.String:
        may_be_blank = (column < "!") | (column >= "\x80")  # most texts do not start as blank ones do
        if may_be_blank.any():
            bad |= (column.str.strip_chars() == "").fill_null(True)
    if bad.any():
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
    """Return the scores, float32 or float64 [rows], finite. advice: ends the message about what is no score.

    Raises UserError also for integers and decimals that float64 cannot tell apart: they would be ties.
    """
    numbers = _numbers(column, path)
    if not numbers.dtype.is_float():
        numbers = numbers.cast(pl.Float64)
    if (bad := ~(numbers.is_finite().fill_null(False))).any():
        raise UserError(
            _at(path, column, bad, "is not a finite number", first_row) + f" Every impression needs a score{advice}."
        )
    if not column.dtype.is_float() and (bad := _inexact(column, numbers)).any():
        raise UserError(
            _at(path, column, bad, "has more digits than float64, in which scores are compared", first_row)
            + " Scores that differ would tie: give their ranks, or round them to float64 yourself."
        )
    return numbers.cast(pl.Float32).to_numpy() if numbers.dtype == pl.Float16 else numbers.to_numpy()


def _inexact(column: pl.Series, score: pl.Series) -> pl.Series:
    """Return which integers and decimals [rows] float64 may not tell from others. `score`: the column as Float64."""
    if column.dtype.is_decimal():
        digits = column.cast(pl.String).str.replace_all(r"^-?[0.]+|[^0-9]", "").str.strip_chars_end("0")
        return digits.str.len_bytes() > EXACT_DIGITS
    large = score.abs() >= EXACT_BELOW
    if not large.any():
        return large
    if column.dtype == pl.String:
        whole = column.str.strip_chars().cast(pl.Int128, strict=False)
        return large & (whole != score.cast(pl.Int128, strict=False)).fill_null(False)
    return large & (column.cast(pl.Int128, strict=False) != score.cast(pl.Int128, strict=False)).fill_null(True)


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

    path: Path
    unseen: bool
    history: bool
    values: dict[str, pl.Series]
    """Column → its distinct values, ascending; a slice each."""

    def masks(self, frame: pl.DataFrame, first_row: int = 0) -> dict[str, NDArray[np.bool_]]:
        """Return name → which rows of the frame are inside, also where none is.

        `first_row`: rows of the file before the frame's first, for messages. Raises UserError for an `unseen_ad` that
        is not 0 or 1 and a `history_length` that is not a whole number from 0 on, and for two slices of one name.
        """
        made: dict[str, NDArray[np.bool_]] = {}

        def add(name: str, inside: pl.Series, column: str) -> None:
            if name in made:
                raise UserError(
                    f"{self.path}: column {column!r} makes a slice called {name!r}, and there is another of that "
                    f"name, of another column. Give the column another name."
                )
            made[name] = inside.fill_null(False).to_numpy()

        if self.unseen:
            unseen = self._checked(frame["unseen_ad"], lambda n: (n == 0) | (n == 1), "is neither 0 nor 1", first_row)
            for shown, value in (("true", 1), ("false", 0)):
                add(f"unseen_ad={shown}", unseen == value, "unseen_ad")
        if self.history:
            fault = "is not a number of behaviours, which is whole and at least 0"
            is_length = lambda n: n.is_finite() & (n >= 0) & (n == n.floor())  # noqa: E731
            length = self._checked(frame["history_length"], is_length, fault, first_row)
            for low, high in HISTORY_BUCKETS:
                inside = (length >= low) & (length <= (high if high is not None else np.inf))
                shown = f"{low}+" if high is None else f"{low}-{high}" if high > low else f"{low}"
                add(f"history={shown}", inside, "history_length")
        for column, values in self.values.items():
            for v in values:
                add(f"{column}={str(v).lower() if isinstance(v, bool) else v}", frame[column] == v, column)
        return made

    def _checked(
        self, column: pl.Series, is_good: Callable[[pl.Series], pl.Series], fault: str, first_row: int
    ) -> pl.Series:
        """Return a column that built-in slices are made from as Float64, null where it is empty."""
        numbers = _numbers(column, self.path).cast(pl.Float64)
        if (bad := ~is_good(numbers).fill_null(False) & column.is_not_null()).any():
            raise UserError(
                _at(self.path, column, bad, fault, first_row)
                + f" Slices are made of a column called {column.name!r}: mend it, or give it another name."
            )
        return numbers


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
    asked = [column for column in asked if column != "unseen_ad"]  # that is the built-in slice
    for column in dict.fromkeys(["day", *asked] if "day" in schema else asked):
        if schema[column].is_nested():
            raise UserError(
                f"{path}: column {column!r} is {schema[column]}, and slices are made from columns of single values"
            )
        found = distinct(column).drop_nulls().sort()
        if len(found) <= MOST_VALUES:
            values[column] = found
        elif column in asked:
            raise UserError(
                f"{path}: column {column!r} has {len(found):,} distinct values; slices are made from at "
                f"most {MOST_VALUES}. Choose a coarser column."
            )
    return Slicing(path=path, unseen="unseen_ad" in schema, history="history_length" in schema, values=values)


def first_rows(path: Path) -> pl.LazyFrame:
    """Return a lazy frame of a Parquet file of predictions, its first `FIRST_ROWS` at most."""
    return pl.scan_parquet(path, glob=False).head(FIRST_ROWS)
