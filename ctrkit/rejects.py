"""Rows of the raw tables that became nothing: where they are and why."""

from pathlib import Path

import polars as pl

from ctrkit.errors import UserError
from ctrkit.pieces import ROW
from ctrkit.tables import RawTable

SHOWN_REASONS = 3
SCHEMA = {"source": pl.String, "file": pl.String, "row": pl.Int64, "kind": pl.String, "reason": pl.String}
"""Of rejects.parquet. `kind` is "reject" (a bad row), "duplicate", "unmatched" (a click without an impression) or
"negative" (not drawn)."""


class Rejects:
    """Rows of each table that were set aside, as frames of `SCHEMA` and `cell`; `rows` counts the rows read."""

    def __init__(self) -> None:
        self.frames: list[pl.DataFrame] = []
        self.rows: dict[str, int] = {}

    def add(self, table: RawTable, rows: pl.DataFrame, read: int, kind: str = "reject") -> None:
        """Take rows with `file` (its number), ROW, `reason` and `cell` (the offending text, or null)."""
        self.rows[table.name] = self.rows.get(table.name, 0) + read
        names = pl.DataFrame(
            {"file": range(len(table.files)), "name": [f.name for f in table.files]},
            schema={"file": pl.UInt32, "name": pl.String},
        )
        self.frames.append(
            rows.join(names, on="file", how="left", maintain_order="left").select(
                pl.lit(table.name).alias("source"),
                pl.col("name").alias("file"),
                pl.col(ROW).alias("row"),
                pl.lit(kind).alias("kind"),
                "reason",
                "cell",
            )
        )

    def count(self, source: str) -> int:
        """Return how many rows of a table are bad."""
        return self._bad(source).height

    def _bad(self, source: str) -> pl.DataFrame:
        schema = {**SCHEMA, "cell": pl.String}
        wanted = (pl.col("source") == source) & (pl.col("kind") == "reject")
        return pl.concat([pl.DataFrame(schema=schema), *(f.filter(wanted) for f in self.frames)])

    def write(self, path: Path) -> None:
        """Write all rows, in the order of tables and files; a reason ends with the offending text."""
        text = pl.concat_str(pl.col("reason"), pl.lit(": '") + pl.col("cell") + pl.lit("'"), ignore_nulls=True)
        frames = [f.select("source", "file", "row", "kind", text.alias("reason")) for f in self.frames]
        pl.concat([pl.DataFrame(schema=SCHEMA), *frames]).write_parquet(path)

    def check(self, max_rate: float) -> None:
        """Raise UserError if a table has more bad rows than `max_rate` of its rows."""
        for source, rows in self.rows.items():
            bad = self._bad(source)
            if bad.height > max_rate * rows:
                raise UserError(
                    f"{bad.height:,} of {rows:,} rows of {source} ({100 * bad.height / rows:.3g}%) cannot be used, "
                    f"more than convert.max_reject_rate = {max_rate:g} allows: {_reasons(bad)}. Mend the rows, name "
                    f"the right columns in [convert.{source}], or raise convert.max_reject_rate"
                )

    def check_left(self, source: str) -> None:
        """Raise UserError if a table has rows and all of them are bad, whatever rate is allowed."""
        bad, rows = self._bad(source), self.rows.get(source, 0)
        if rows and bad.height == rows:
            raise UserError(none_left(source, f"{rows:,}", _reasons(bad)))


def none_left(source: str, rows: str, reasons: str, hint: str = "") -> str:
    """Say that all rows of a table are bad: how many, why, and what to do if that is known."""
    return (
        f"none of the {rows} rows of {source} can be used: {reasons}; "
        f"{hint or f'mend the rows, or name the right columns in [convert.{source}]'}"
    )


def _reasons(bad: pl.DataFrame) -> str:
    """Say the commonest reasons of bad rows."""
    reasons = (
        bad.group_by("reason", maintain_order=True)
        .agg(pl.len().alias("n"), pl.col("file", "row", "cell").first())
        .sort("n", "reason", descending=[True, False])
    )
    return "; ".join(
        f"{r['n']:,} × {r['reason']} (such as {r['file']} row {r['row']}"
        + (f": {_short(r['cell'])})" if r["cell"] is not None else ")")
        for r in reasons.head(SHOWN_REASONS).to_dicts()
    )


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else cell[:60] + "…")
