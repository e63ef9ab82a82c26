"""Where a feature's values come from: which column of which raw table, joined and made text."""

import string
from collections.abc import Iterable, Mapping

import polars as pl

from ctrkit.errors import UserError, nearest
from ctrkit.recipe import Feature, Recipe
from ctrkit.sources import fields
from ctrkit.tables import RawTable

# Tables in the order in which a feature of each owner looks for its column.
LOOKS_IN = {
    "user": ("users", "impressions"),
    "ad": ("ads", "goods", "impressions"),
    "scene": ("impressions", "clock", "users", "ads", "goods"),
    "behaviour": ("behaviours", "goods"),
}
CLOCK = ("hour", "weekday")
"""Derived from the time: hour 0 to 23, weekday 1 (Monday) to 7."""
ALWAYS = (("impressions", "user"), ("impressions", "ad"))
"""Columns that every log frame has, under their bare names."""
KEYS = {"users": "user", "ads": "ad", "goods": "goods"}

Plan = dict[str, list[tuple[str, str]]]
"""Feature → the (table, column) of each of its fields."""


def plan(recipe: Recipe, tables: Mapping[str, RawTable], owners: Iterable[str]) -> Plan:
    """Find the columns of the features of these owners; UserError for a column that no table has."""
    found: Plan = {}
    for name, feature in recipe.features.items():
        if feature.of in owners:
            found[name] = [_find(name, feature, field, tables) for field in fields(feature)]
    return found


def _find(name: str, feature: Feature, field: str, tables: Mapping[str, RawTable]) -> tuple[str, str]:
    if ("impressions", field) in ALWAYS and feature.of != "behaviour":
        return "impressions", field
    looked: dict[str, Iterable[str]] = {}
    for table in LOOKS_IN[feature.of]:
        if table == "clock":
            looked[table] = CLOCK
        elif table in tables and (table != "goods" or _goods_link(feature.of, tables) is not None):
            looked[table] = tables[table].names
        if field in looked.get(table, ()):
            return table, field
    places = ", ".join(looked)
    raise UserError(
        f"[features.{name}] needs a column {field!r}, which none of the tables of a feature of={feature.of!r} has "
        f"({places or 'the recipe gives no such table'}){nearest(field, {c for cs in looked.values() for c in cs})}"
    )


def _goods_link(owner: str, tables: Mapping[str, RawTable]) -> tuple[str, str] | None:
    """Return the column that says which goods an ad or a behaviour is of."""
    for table in ("behaviours",) if owner == "behaviour" else ("ads", "impressions"):
        if table in tables and "goods" in tables[table].names:
            return table, "goods"
    return None


def needed(plan: Plan, tables: Mapping[str, RawTable], owner: str) -> dict[str, list[str]]:
    """Return the columns to read of each table, those that link tables included."""
    columns: dict[str, list[str]] = {}
    for table, column in (pair for pairs in plan.values() for pair in pairs):
        if (table, column) not in ALWAYS and table != "clock":
            columns.setdefault(table, []).append(column)
    link = _goods_link(owner, tables)
    if "goods" in columns and link is not None:
        columns.setdefault(link[0], []).append(link[1])
    return {table: list(dict.fromkeys(names)) for table, names in columns.items()}


def join_tables(
    log: pl.DataFrame, owner: str, tables: Mapping[str, RawTable], keyed: Mapping[str, pl.DataFrame]
) -> pl.DataFrame:
    """Join users, ads and goods to a log; rows keep their order and number. A row without a match gets nulls."""
    for table in ("users", "ads", "goods"):
        if table not in keyed:
            continue
        link = _goods_link(owner, tables) if table == "goods" else None
        key = f"{link[0]}.{link[1]}" if link else KEYS[table]
        log = log.join(keyed[table], left_on=key, right_on=KEYS[table], how="left", maintain_order="left")
    return log


def values(frame: pl.DataFrame, name: str, feature: Feature, pairs: list[tuple[str, str]]) -> pl.Series:
    """Return a feature's values as text: String, or List(String) if multi-hot; null where there is none."""
    columns = [column if (table, column) in ALWAYS else f"{table}.{column}" for table, column in pairs]
    for column in columns:
        if isinstance(frame.schema[column], pl.List) and not (feature.multi_hot and "{" not in feature.column):
            raise UserError(
                f"[features.{name}]: column {feature.column!r} holds lists"
                + ("; set multi_hot = true" if not feature.multi_hot else " and cannot be part of a template")
            )
    if "{" in feature.column:
        parts: list[pl.Expr] = []
        waiting = iter(columns)
        for literal, field, _, _ in string.Formatter().parse(feature.column):
            parts.append(pl.lit(literal))
            if field:
                parts.append(pl.col(next(waiting)))
        value = pl.concat_str(parts)
    else:
        value = pl.col(columns[0])
    if feature.multi_hot and not isinstance(frame.schema[columns[0]], pl.List):
        split = value.str.split(feature.separator)
        value = split.list.eval(pl.element().filter(pl.element() != ""))
    return frame.select(value.alias(name)).to_series()
