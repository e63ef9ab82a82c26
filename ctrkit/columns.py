"""Where a feature's values come from, and how texts of the logs become its values.

Work is done on dictionaries, not on rows: a log's rows carry only the columns that decide a feature (an ad's category
is decided by the ad), and each distinct text of those is joined, formatted and split once.
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from ctrkit.errors import UserError, nearest
from ctrkit.pieces import UNIT
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
ALWAYS = ("user", "ad")
"""Columns that every impression log has."""
KEYS = {"users": "user", "ads": "ad", "goods": "goods"}
BETWEEN = "\x1e"
"""Joins the texts of several columns into one."""


@dataclass(frozen=True)
class Input:
    """What a feature is made from."""

    pairs: tuple[tuple[str, str], ...]
    """The (table, column) of each of its fields."""
    log: str
    """impressions or behaviours."""
    keys: tuple[str, ...]
    """The log's columns that decide its value."""

    @property
    def dictionary(self) -> str:
        """The name of the dictionary of its keys' texts."""
        return dictionary(self.log, self.keys)


def dictionary(log: str, keys: Sequence[str]) -> str:
    """Return the name of the dictionary of some columns of a log. Ads have one for all logs."""
    return "ad" if list(keys) == ["ad"] else f"{log}.{'+'.join(keys)}"


def plan(recipe: Recipe, tables: Mapping[str, RawTable]) -> dict[str, Input]:
    """Find the columns of every feature; UserError for one that no table has."""
    found = {}
    for name, feature in recipe.features.items():
        pairs = tuple(_find(name, feature, field, tables) for field in fields(feature))
        log = "behaviours" if feature.of == "behaviour" else "impressions"
        keys = dict.fromkeys(_key(pair, feature.of, tables) for pair in pairs)
        found[name] = Input(pairs, log, tuple(keys))
    return found


def _find(name: str, feature: Feature, field: str, tables: Mapping[str, RawTable]) -> tuple[str, str]:
    if field in ALWAYS and feature.of != "behaviour":
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


def _goods_link(owner: str, tables: Mapping[str, RawTable]) -> str | None:
    """Return the table whose column `goods` says which goods an ad or a behaviour is of."""
    for table in ("behaviours",) if owner == "behaviour" else ("ads", "impressions"):
        if table in tables and "goods" in tables[table].names:
            return table
    return None


def _key(pair: tuple[str, str], owner: str, tables: Mapping[str, RawTable]) -> str:
    """Return the log's column that decides a column of a table."""
    table, column = pair
    if table == "clock":
        return f"clock.{column}"
    if table == "users":
        return "user"
    if table == "ads" or (table == "goods" and _goods_link(owner, tables) == "ads"):
        return "ad"
    return "goods" if table == "goods" else column


def is_key(source: Input) -> bool:
    """Say whether a feature's values are the texts of its dictionary, each there once."""
    return len(source.keys) == 1 and [_column(*pair) for pair in source.pairs] == list(source.keys)


def table_columns(inputs: Mapping[str, Input], tables: Mapping[str, RawTable]) -> dict[str, list[str]]:
    """Return the columns to read of the tables of users, ads and goods, those that link tables included."""
    columns: dict[str, list[str]] = {}
    for one in inputs.values():
        for table, column in one.pairs:
            if table in KEYS:
                columns.setdefault(table, []).append(column)
                if table == "goods" and one.keys == ("ad",):
                    columns.setdefault("ads", []).append("goods")
    return {table: list(dict.fromkeys(names)) for table, names in columns.items()}


def values(
    words: pl.Series, name: str, feature: Feature, source: Input, keyed: Mapping[str, pl.DataFrame]
) -> pl.Series:
    """Return a feature's value for each text of its dictionary: String, or List(String) if multi-hot; null: none.

    keyed: the tables of users, ads and goods, as `parsing.keyed` gives them.
    """
    frame = _split_keys(words, source.keys)
    if "goods" in keyed and any(table == "goods" for table, _ in source.pairs):
        link = "ads.goods" if "goods" not in source.keys else "goods"
        if link == "ads.goods":
            frame = _join(frame, keyed["ads"], "ad")
        frame = frame.join(keyed["goods"], left_on=link, right_on="goods", how="left", maintain_order="left")
    for table in ("users", "ads"):
        if f"{table}.{KEYS[table]}" not in frame.columns and any(t == table for t, _ in source.pairs):
            frame = _join(frame, keyed[table], KEYS[table])
    columns = [_column(table, column) for table, column in source.pairs]
    for column in columns:
        lists = bool(frame[column].str.starts_with(UNIT).any())
        if lists and (not feature.multi_hot or "{" in feature.column):
            raise UserError(
                f"[features.{name}]: column {feature.column!r} holds lists"
                + ("; set multi_hot = true" if not feature.multi_hot else " and cannot be part of a template")
            )
    value = _template(feature.column, columns) if "{" in feature.column else pl.col(columns[0])
    if feature.multi_hot:
        value = (
            pl.when(value.str.starts_with(UNIT))
            .then(value.str.slice(1).str.split(UNIT))
            .otherwise(value.str.split(feature.separator))
            .list.eval(pl.element().filter(pl.element() != ""))
        )
    return frame.select(value.alias(name)).to_series()


def _column(table: str, column: str) -> str:
    if table == "clock":
        return f"clock.{column}"
    return f"{table}.{column}" if table in KEYS else column


def _split_keys(words: pl.Series, keys: Sequence[str]) -> pl.DataFrame:
    if len(keys) == 1:
        parts = words.alias(keys[0]).to_frame()
    else:
        parts = words.str.split_exact(BETWEEN, len(keys) - 1).struct.rename_fields(list(keys)).struct.unnest()
    return parts.with_columns(pl.when(pl.all() != "").then(pl.all()))


def _join(frame: pl.DataFrame, table: pl.DataFrame, key: str) -> pl.DataFrame:
    return frame.join(table, on=key, how="left", maintain_order="left")


def _template(template: str, columns: Sequence[str]) -> pl.Expr:
    parts: list[pl.Expr] = []
    waiting = iter(columns)
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(pl.lit(literal))
        if field:
            parts.append(pl.col(next(waiting)))
    return pl.concat_str(parts)
