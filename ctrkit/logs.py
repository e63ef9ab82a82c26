"""The raw logs as parsed frames: ids as text, times in epoch milliseconds, bad rows set aside.

A column X of a source S that a feature asks for is called "S.X" in every frame here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from ctrkit.columns import KEYS, Plan, join_tables
from ctrkit.columns import needed as needed_columns
from ctrkit.errors import UsageError
from ctrkit.recipe import Recipe
from ctrkit.tables import EXTRA, FILE, LABEL, ROW, RawTable, Rejects, as_text, as_time

Counts = dict[str, Any]
UNITS = {"s": "epoch seconds", "ms": "epoch milliseconds", "iso": "ISO-8601 with a zone"}


def impressions(
    tables: dict[str, RawTable], recipe: Recipe, columns: Iterable[str], rejects: Rejects
) -> tuple[pl.DataFrame, Counts]:
    """Read and label the impressions.

    Returns a frame of `user`, `ad` String, `time` Int64, `click` Int8 and "impressions.X" for the columns asked
    for, in the order of the log; and its counts.
    """
    options = recipe.convert
    if "impressions" not in tables:
        raise UsageError("the recipe has no [convert.impressions], the log to make samples from")
    if bool(options.label) == ("clicks" in tables):
        raise UsageError(
            "[convert] needs either `label`, an SQL expression that is true for a click, or the table "
            "[convert.clicks], joined on the impression `id`" + (", not both" if options.label else "")
        )
    table = tables["impressions"]
    by_id = "clicks" in tables or "id" in table.source.columns
    core = ["user", "ad", "time", *(["id"] if by_id else [])]
    frame, left_out = table.read([*core, *columns], options.label)
    reasons = [
        _reason(pl.col(EXTRA).is_not_null(), "more cells than the header", EXTRA),
        _reason(pl.col("user").is_null(), "no user"),
        _reason(pl.col("ad").is_null(), "no ad"),
        _reason(pl.col("time").is_null(), f"time is not {UNITS[options.time_unit]} before 2200", "time_text"),
    ]
    if by_id:
        reasons.append(_reason(pl.col("id").is_null(), "no id"))
    parsed = frame.select(
        FILE,
        ROW,
        EXTRA,
        *(as_text(frame, c).alias(c) for c in core if c != "time"),
        as_time(frame, "time", options.time_unit).alias("time"),
        pl.col("time").cast(pl.String).alias("time_text"),
        *(as_text(frame, c).alias(f"impressions.{c}") for c in columns),
        *([_zero_or_one(frame).alias("click"), pl.col(LABEL).cast(pl.String)] if options.label else []),
    )
    if options.label:
        reasons.append(_reason(pl.col("click").is_null(), "label is not 0 or 1", LABEL))
    read = parsed.height
    good = _set_aside(table, parsed, reasons, rejects)
    counts: Counts = {
        "impressions in the files": read + left_out,
        "impressions left out by where": left_out,
        "impressions read": read,
        "impressions rejected": read - good.height,
    }
    unique = good.unique("id", keep="first", maintain_order=True) if by_id else good
    counts["duplicate impressions dropped"] = good.height - unique.height
    if not options.label:
        unique, clicked = _join_clicks(unique, tables["clicks"], rejects)
        counts |= clicked
    counts["samples"] = unique.height
    kept = ["user", "ad", "time", "click", *(f"impressions.{c}" for c in columns)]
    return unique.select(kept), counts


def _zero_or_one(frame: pl.DataFrame) -> pl.Expr:
    if frame.schema[LABEL] == pl.Boolean or frame.schema[LABEL].is_numeric():
        number = pl.col(LABEL).cast(pl.Float64)
        return pl.when(number.is_in([0.0, 1.0])).then(number).cast(pl.Int8)
    return pl.lit(None, dtype=pl.Int8)


def _join_clicks(frame: pl.DataFrame, table: RawTable, rejects: Rejects) -> tuple[pl.DataFrame, Counts]:
    rows, left_out = table.read(["id"])
    parsed = rows.select(FILE, ROW, EXTRA, as_text(rows, "id").alias("id"))
    reasons = [
        _reason(pl.col(EXTRA).is_not_null(), "more cells than the header", EXTRA),
        _reason(pl.col("id").is_null(), "no id"),
    ]
    good = _set_aside(table, parsed, reasons, rejects).select("id")
    clicked = good.unique().with_columns(pl.lit(1, dtype=pl.Int8).alias("click"))
    labelled = frame.join(clicked, on="id", how="left", maintain_order="left").with_columns(
        pl.col("click").fill_null(0)
    )
    counts = {
        "clicks read": parsed.height,
        "clicks left out by where": left_out,
        "clicks rejected": parsed.height - good.height,
        "repeated clicks": good.height - clicked.height,
        "clicks without an impression": clicked.height - int(labelled["click"].sum()),
    }
    return labelled, {k: v for k, v in counts.items() if v or k == "clicks read"}


def behaviours(
    table: RawTable, recipe: Recipe, columns: Iterable[str], rejects: Rejects
) -> tuple[pl.DataFrame, Counts]:
    """Read the behaviour log.

    Returns a frame of `user` String, `time` Int64, `dwell` Int64 (milliseconds, null where not known), and, where
    the log has them, `goods` and `type` String; and "behaviours.X" for the columns asked for. In the order of the
    log.
    """
    unit = recipe.convert.time_unit
    known = [c for c in ("goods", "type", "dwell") if c in table.names]
    frame, left_out = table.read(["user", "time", *known, *columns])
    reasons = [
        _reason(pl.col(EXTRA).is_not_null(), "more cells than the header", EXTRA),
        _reason(pl.col("user").is_null(), "no user"),
        _reason(pl.col("time").is_null(), f"time is not {UNITS[unit]} before 2200", "time_text"),
    ]
    if "goods" in known:
        reasons.append(_reason(pl.col("goods").is_null(), "no goods"))
    seconds = pl.col("dwell").cast(pl.Float64, strict=False) if "dwell" in known else pl.lit(None, dtype=pl.Float64)
    parsed = frame.select(
        FILE,
        ROW,
        EXTRA,
        as_text(frame, "user").alias("user"),
        as_time(frame, "time", unit).alias("time"),
        pl.col("time").cast(pl.String).alias("time_text"),
        # Whole milliseconds, so that sums do not depend on the order of addition.
        pl.when(seconds.is_between(0, 1e9)).then(seconds * 1000).round().cast(pl.Int64).alias("dwell"),
        *(as_text(frame, c).alias(c) for c in known if c != "dwell"),
        *(as_text(frame, c).alias(f"behaviours.{c}") for c in columns),
    )
    good = _set_aside(table, parsed, reasons, rejects)
    counts = {
        "behaviours read": parsed.height,
        "behaviours left out by where": left_out,
        "behaviours rejected": parsed.height - good.height,
    }
    return good.drop(FILE, ROW, EXTRA, "time_text"), {k: v for k, v in counts.items() if v or k == "behaviours read"}


def behaviours_with_goods(
    recipe: Recipe, tables: Mapping[str, RawTable], plan: Plan, rejects: Rejects
) -> tuple[pl.DataFrame, Counts]:
    """Return the behaviour log with all columns that behaviour features need (see `behaviours`)."""
    if "behaviours" not in tables:
        raise UsageError(
            f"the recipe has behaviour features ({', '.join(plan)}) but no [convert.behaviours] to take them from"
        )
    needed = needed_columns(plan, tables, "behaviour")
    log, counts = behaviours(tables["behaviours"], recipe, needed.pop("behaviours", []), rejects)
    joined = {name: keyed(tables[name], KEYS[name], cs, rejects)[0] for name, cs in needed.items()}
    log = join_tables(log, "behaviour", tables, joined)
    if "goods" in joined:
        counts["behaviours without a row of goods"] = int(log["goods.goods"].is_null().sum())
    return log, counts


def keyed(table: RawTable, key: str, columns: Iterable[str], rejects: Rejects) -> tuple[pl.DataFrame, Counts]:
    """Read a table of one row a user, ad or goods: `key` and "S.X" for the columns asked for, sorted by key.

    Of rows with the same key the first counts.
    """
    columns = [c for c in dict.fromkeys(columns) if c != key]
    frame, _ = table.read([key, *columns])
    parsed = frame.select(
        FILE,
        ROW,
        EXTRA,
        as_text(frame, key).alias(key),
        *(as_text(frame, c).alias(f"{table.name}.{c}") for c in columns),
    )
    reasons = [
        _reason(pl.col(EXTRA).is_not_null(), "more cells than the header", EXTRA),
        _reason(pl.col(key).is_null(), f"no {key}"),
    ]
    good = _set_aside(table, parsed, reasons, rejects).drop(FILE, ROW, EXTRA)
    unique = good.unique(key, keep="first", maintain_order=True).sort(key)
    repeated = good.height - unique.height
    counts = {f"{table.name} read": parsed.height} | ({f"{table.name} repeated": repeated} if repeated else {})
    return unique.with_columns(pl.col(key).alias(f"{table.name}.{key}")), counts


def _reason(bad: pl.Expr, reason: str, cell: str | None = None) -> tuple[pl.Expr, str, str | None]:
    return bad, reason, cell


def _set_aside(
    table: RawTable, frame: pl.DataFrame, reasons: list[tuple[pl.Expr, str, str | None]], rejects: Rejects
) -> pl.DataFrame:
    """Return the good rows; give the others to `rejects`, each with the first reason that holds."""
    why: pl.Expr = pl.lit(None, dtype=pl.String)
    cell: pl.Expr = pl.lit(None, dtype=pl.String)
    for bad, reason, column in reversed(reasons):
        text = pl.col(column).cast(pl.String) if column else pl.lit(None, dtype=pl.String)
        why, cell = pl.when(bad).then(pl.lit(reason)).otherwise(why), pl.when(bad).then(text).otherwise(cell)
    marked = frame.with_columns(why.alias("reason"), cell.alias("cell"))
    bad_rows = marked.filter(pl.col("reason").is_not_null()).select(FILE, ROW, "reason", "cell")
    rejects.add(table, bad_rows, frame.height)
    return marked.filter(pl.col("reason").is_null()).drop("reason", "cell")
