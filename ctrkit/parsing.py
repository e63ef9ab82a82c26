"""The rows of the raw tables as parsed columns: ids as text, times in epoch milliseconds, bad rows set aside."""

import contextlib
from collections.abc import Iterable, Sequence

import polars as pl

from ctrkit.errors import UsageError, UserError
from ctrkit.pieces import BAD, EXTRA, ROW
from ctrkit.recipe import Convert
from ctrkit.rejects import Rejects
from ctrkit.tables import LABEL, RawTable, as_id, as_text, as_time

UNITS = {"s": "epoch seconds", "ms": "epoch milliseconds", "iso": "ISO-8601 with a zone"}
KNOWN_DWELL_MS = 1e12
Reason = tuple[pl.Expr, str, str]
"""When a row is bad, why (empty: as BAD says), and the column with the offending text (empty: none)."""


def check_labels(options: Convert, tables: dict[str, RawTable]) -> None:
    """Check that the recipe says which impressions were clicked, in one way, and that the logs that say so have the
    columns that every row needs."""
    if "impressions" not in tables:
        raise UsageError("the recipe has no [convert.impressions], the log to make samples from")
    if bool(options.label) + ("clicks" in tables) + bool(options.sampled_negatives) != 1:
        given = [
            *(["`label`"] if options.label else []),
            *(["[convert.clicks]"] if "clicks" in tables else []),
            *(["`sampled_negatives`"] if options.sampled_negatives else []),
        ]
        raise UsageError(
            "[convert] needs either `label`, an SQL expression that is true for a click, or the table "
            "[convert.clicks], or (where every row is a click) `sampled_negatives`"
            + (f", and has {' and '.join(given)}" if given else "")
        )
    with_id = all("id" in tables[log].names for log in ("impressions", "clicks") if log in tables)
    for log in ("impressions", "clicks"):
        if log in tables:
            tables[log].require(*core(tables[log], with_id=with_id))


def core(table: RawTable, *, with_id: bool) -> list[str]:
    """Return the columns that every row of a log must have."""
    if table.name == "behaviours":
        return ["user", "time", *(c for c in ("goods",) if c in table.names)]
    if table.name == "clicks":
        return ["id"] if with_id else ["user", "ad", "time"]
    return ["user", "ad", "time", *(["id"] if with_id else [])]


def parse(
    table: RawTable, frame: pl.DataFrame, needed: Sequence[str], extra: Iterable[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Parse rows of a log.

    Parameters
    ----------
    frame: as `RawTable.read` gives it.
    needed: columns without which a row is bad (see `core`).
    extra: further columns; a `time` among them may be null or, where its type is no moment's, left out.

    Returns the good rows, ROW, `time` Int64, `click` Int8 (if the table has a label), `dwell` Int64 milliseconds (if it
    has that column) and the others String (where empty text is as good as
    null) or Int64; and the bad ones, ROW, `reason` and `cell`, the offending text.
    """
    schema = frame.schema
    texts = [c for c in dict.fromkeys([*needed, *extra]) if c not in ("time", "dwell")]
    reasons: list[Reason] = [
        (pl.col(BAD).is_not_null(), "", ""),
        (pl.col(EXTRA).is_not_null(), "more cells than the header", EXTRA),
    ]
    out = [as_id(schema[c], c) for c in texts if c in needed or schema[c] != pl.String]
    out += [pl.col(c) for c in texts if c not in needed and schema[c] == pl.String]
    for column in needed:
        if isinstance(schema[column], pl.List):
            raise UserError(f"column {column!r} of [convert.{table.name}] holds lists; it must be text or numbers")
        if column == "time":
            why = f"time is not {UNITS[table.time_unit]} before 2200"
            reasons.append((pl.col("time").is_null(), why, "time"))
            out.append(as_time(schema["time"], "time", table.time_unit).alias("time"))
        else:
            reasons.append((pl.col(column).is_null(), f"no {column}", ""))
            if not schema[column].is_integer():
                broken = pl.col(column).str.contains("\n", literal=True)
                reasons.append((broken, f"a line break in {column}", column))
    if "time" in extra and "time" not in needed:
        with contextlib.suppress(UserError):
            out.append(as_time(schema["time"], "time", table.time_unit).alias("time"))
    if "dwell" in extra:
        milliseconds = pl.col("dwell").cast(pl.Float64, strict=False) * 1000
        # Whole milliseconds, so that sums do not depend on the order of addition.
        out.append(
            pl.when(milliseconds.is_between(0, KNOWN_DWELL_MS)).then(milliseconds.round()).cast(pl.Int64).alias("dwell")
        )
    if LABEL in frame.columns:
        out.append(_zero_or_one(schema[LABEL]).alias("click"))
        reasons.append((pl.col("click").is_null(), "label is not 0 or 1", LABEL))
    parsed = frame.select(ROW, EXTRA, BAD, *out)
    wrong = parsed.select(pl.any_horizontal(bad.fill_null(False) for bad, _, _ in reasons)).to_series()
    good = parsed.drop(EXTRA, BAD)
    if not wrong.any():
        return good, pl.DataFrame(schema={ROW: pl.Int64, "reason": pl.String, "cell": pl.String})
    return good.filter(~wrong), _explain(frame.filter(wrong), parsed.filter(wrong), reasons)


def _zero_or_one(dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.Boolean or dtype.is_numeric():
        number = pl.col(LABEL).cast(pl.Float64)
        return pl.when(number.is_in([0.0, 1.0])).then(number).cast(pl.Int8)
    return pl.lit(None, dtype=pl.Int8)


def _explain(raw: pl.DataFrame, parsed: pl.DataFrame, reasons: list[Reason]) -> pl.DataFrame:
    """Return ROW, the first reason that holds and the offending text of rows of which each has one."""
    rows = parsed.with_columns(raw[c].alias(f"raw {c}") for c in {c for _, _, c in reasons if c})
    why: pl.Expr = pl.lit(None, dtype=pl.String)
    cell: pl.Expr = pl.lit(None, dtype=pl.String)
    for bad, reason, column in reversed(reasons):
        text: pl.Expr = pl.lit(None, dtype=pl.String)
        if column and not raw.schema[column].is_nested():
            text = as_text(raw.schema[column], f"raw {column}")
        why = pl.when(bad).then(pl.lit(reason) if reason else pl.col(BAD)).otherwise(why)
        cell = pl.when(bad).then(text).otherwise(cell)
    return rows.select(ROW, why.alias("reason"), cell.alias("cell"))


def keyed(table: RawTable, key: str, columns: Iterable[str], rejects: Rejects) -> tuple[pl.DataFrame, dict[str, int]]:
    """Read a whole table of one row a user, ad or goods: `key` and "TABLE.X" String for the columns asked for.

    Of rows with the same key the first counts. Returns the table, sorted by key, and its counts.
    """
    columns = [c for c in dict.fromkeys(columns) if c != key]
    table.prepare([key, *columns])
    frames, read, left_out, ends = [], 0, 0, [0] * len(table.files)
    bad_rows = []
    for number, piece in table.pieces():
        begin = ends[number]
        for frame, rows in table.read(number, piece):
            good, bad = parse(table, frame, [key], columns)
            good = good.with_columns(pl.col(key, *columns).cast(pl.String))
            place = (pl.col(ROW) + begin, pl.lit(number, dtype=pl.UInt32).alias("file"))
            frames.append(good.with_columns(place))
            bad_rows.append(bad.with_columns(place))
            read, left_out, ends[number] = read + frame.height, left_out + rows - frame.height, ends[number] + rows
    rejects.add(table, pl.concat(bad_rows), read)
    good = pl.concat(frames, how="diagonal_relaxed").rename({c: f"{table.name}.{c}" for c in columns})
    first = good[key].is_first_distinct()
    unique = good.filter(first).drop(ROW, "file").sort(key)
    repeats = good.filter(~first).select(
        ROW, "file", pl.lit(f"repeats an earlier {key}").alias("reason"), pl.col(key).alias("cell")
    )
    rejects.add(table, repeats, 0, "duplicate")
    counts = {f"{table.name} read": read}
    if left_out:
        counts[f"{table.name} left out by where"] = left_out
    if good.height > unique.height:
        counts[f"{table.name} repeated"] = good.height - unique.height
    return unique.with_columns(pl.col(key).alias(f"{table.name}.{key}")), counts
