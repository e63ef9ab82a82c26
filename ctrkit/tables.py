"""Reading raw tables: CSV, TSV, JSONL and Parquet, plain or compressed, to frames with our column names.

Nothing is guessed about text: a CSV cell stays text until someone asks for a number or a time, so the id "007"
stays "007". Only SQL conditions see numbers, where a column holds numbers.
"""

import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.recipe import Recipe, Source
from ctrkit.sources import source_files

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = (".gz", ".zst")
FILE, ROW, EXTRA, LABEL = "__file", "__row", "__extra", "__label"
"""Columns of our own: number of the file, row in it (from 1, the header not counted), a cell beyond the header's
columns, the value of the label expression."""
SHOWN_REASONS = 3


def format_of(path: Path) -> str:
    """Return "csv", "tsv", "jsonl" or "parquet", by the name's ending."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise UserError(
            f"cannot tell the format of {path}: its name must end in {', '.join(FORMATS)}, each also with "
            f"{' or '.join(COMPRESSIONS)}"
        )
    return kind


@dataclass
class Rejects:
    """Bad rows: where they are and why. `rows` counts the rows read of each source."""

    frames: list[pl.DataFrame] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, source: "RawTable", bad: pl.DataFrame, rows: int) -> None:
        """Take rows with FILE, ROW, `reason` and `cell` (the offending text, or null); once for each source."""
        if source.name in self.rows:
            return
        self.rows[source.name] = rows
        names = pl.DataFrame(
            {FILE: range(len(source.files)), "file": list(source.files)},
            schema={FILE: pl.UInt32, "file": pl.String},
        )
        self.frames.append(
            bad.join(names, on=FILE, how="left", maintain_order="left").select(
                pl.lit(source.name).alias("source"), "file", pl.col(ROW).alias("row"), "reason", "cell"
            )
        )

    def count(self, source: str) -> int:
        """Return how many rows of a source are bad."""
        return sum(f.filter(pl.col("source") == source).height for f in self.frames)

    def frame(self) -> pl.DataFrame:
        """Return all bad rows: `file`, `row`, `reason` (with the offending text)."""
        schema = {"file": pl.String, "row": pl.Int64, "reason": pl.String}
        text = pl.concat_str(pl.col("reason"), pl.lit(": '") + pl.col("cell") + pl.lit("'"), ignore_nulls=True)
        return pl.concat(
            [pl.DataFrame(schema=schema), *(f.select("file", "row", text.alias("reason")) for f in self.frames)]
        )

    def check(self, max_rate: float) -> None:
        """Raise UserError if a source has more bad rows than `max_rate` of its rows."""
        for source, rows in self.rows.items():
            bad = pl.concat([f.filter(pl.col("source") == source) for f in self.frames])
            if bad.height <= max_rate * rows:
                continue
            reasons = (
                bad.group_by("reason", maintain_order=True)
                .agg(pl.len().alias("n"), pl.col("file", "row", "cell").first())
                .sort("n", "reason", descending=[True, False])
            )
            shown = [
                f"{r['n']:,} × {r['reason']} (such as {r['file']} row {r['row']}"
                + (f": {r['cell']!r})" if r["cell"] is not None else ")")
                for r in reasons.head(SHOWN_REASONS).to_dicts()
            ]
            raise UserError(
                f"{bad.height:,} of {rows:,} rows of {source} ({bad.height / rows:.1%}) cannot be used, more than "
                f"convert.max_reject_rate = {max_rate:g} allows: {'; '.join(shown)}. Mend the rows, name the right "
                f"columns in [convert.{source}], or raise convert.max_reject_rate"
            )


class RawTable:
    """A source of the recipe: its files and what its columns are called.

    Raises UserError where a file is missing or unreadable or a column that the recipe names is not in it.
    """

    def __init__(self, name: str, source: Source, raw: Path) -> None:
        self.name, self.source = name, source
        self.files = source_files(source, raw)
        if not raw.is_dir():
            raise UserError(f"the raw folder {raw} is not there; name the right one with --raw")
        if not self.files:
            raise UserError(f"no file matches {source.files!r} ([convert.{name}]) in {raw}{_lying_in(raw, name)}")
        for inner, path in self.files.items():
            if not path.is_file():
                raise UserError(
                    f"{path} is not there; [convert.{name}] names it{_lying_in(raw, inner)} "
                    f"Put the file there, or name another with --set convert.{name}.files=NAME"
                )
        self.headers = {inner: _header(path) for inner, path in self.files.items()}
        self.own = next(iter(self.headers.values()))
        for inner, header in self.headers.items():
            for ours, theirs in source.columns.items():
                if theirs not in header:
                    raise UserError(
                        f"{raw / inner} has no column {theirs!r}, which [convert.{name}] calls "
                        f"{ours!r}{nearest(theirs, header)}"
                    )
        self.names = {c: c for c in self.own} | source.columns
        """Our name of a column → the file's."""

    def require(self, *columns: str) -> None:
        """Raise UserError unless the table has these columns (our names)."""
        for column in columns:
            if column not in self.names:
                raise UserError(
                    f"{', '.join(self.files)} ([convert.{self.name}]) has no column "
                    f"{column!r}{_end(nearest(column, self.names))} If it has another name, say so with "
                    f'--set convert.{self.name}.columns.{column}="ITS NAME"'
                )

    def read(self, columns: Iterable[str], label: str = "") -> tuple[pl.DataFrame, int]:
        """Read the rows for which `where` holds.

        Returns a frame of FILE, ROW, EXTRA, the columns asked for by our names with the types that the files have
        (text, for CSV and TSV), and, if `label` is given, LABEL, its value; and how many rows `where` left out.
        """
        ours = list(dict.fromkeys(columns))
        self.require(*ours)
        where = _expression(self.source.where, f"convert.{self.name}.where", set(self.own))
        wanted = _expression(label, "convert.label", set(self.names))
        roots = where.meta.root_names() if where is not None else []
        asked = wanted.meta.root_names() if wanted is not None else []
        theirs = dict.fromkeys([*(self.names[c] for c in [*ours, *asked]), *roots])
        frames = []
        for i, (inner, path) in enumerate(self.files.items()):
            missing = [c for c in theirs if c not in self.headers[inner]]
            if missing:
                raise UserError(
                    f"{path} has no column {missing[0]!r}, which other files of [convert.{self.name}] "
                    f"have{nearest(missing[0], self.headers[inner])}"
                )
            frames.append(_read(path, list(theirs)).with_columns(pl.lit(i, dtype=pl.UInt32).alias(FILE)))
        frame = _stack(frames)
        if frame.is_empty():
            raise UserError(f"{', '.join(self.files)} ([convert.{self.name}]) has no rows")
        rows = frame.height
        text = all(format_of(p) in ("csv", "tsv") for p in self.files.values())
        if where is not None:
            kept = _evaluate(frame, where, {c: c for c in roots}, text, f"convert.{self.name}.where")
            frame = frame.filter(kept.cast(pl.Boolean, strict=False).fill_null(False))
            if frame.is_empty():
                raise UserError(
                    f"none of the {rows:,} rows of {', '.join(self.files)} satisfies convert.{self.name}.where = "
                    f"{self.source.where!r}"
                )
        named = frame.select(FILE, ROW, EXTRA, *(pl.col(self.names[c]).alias(c) for c in ours))
        if wanted is not None:
            value = _evaluate(frame, wanted, {c: self.names[c] for c in asked}, text, "convert.label")
            named = named.with_columns(value.alias(LABEL))
        return named, rows - frame.height


def open_tables(recipe: Recipe, raw: Path, *names: str) -> dict[str, RawTable]:
    """Return those of the named sources that the recipe has."""
    tables = {}
    for name in names:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None:
            tables[name] = RawTable(name, source, raw)
    return tables


def _lying_in(raw: Path, name: str) -> str:
    return _end(nearest(name, [p.name for p in raw.iterdir() if p.is_file() and not p.name.startswith(".")]))


def _end(hint: str) -> str:
    """Return a hint of `nearest` as the end of a sentence."""
    return hint if hint.endswith("?") else hint + "."


def _unreadable(path: Path, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0]
    return UserError(f"{path} cannot be read as {format_of(path).upper()}: {first}. Is it whole, and in UTF-8?")


def _parquet_bytes(path: Path) -> Path | io.BytesIO:
    """Return what polars can read Parquet from; a Parquet file may have been compressed once more."""
    if path.suffix.lower() == ".gz":
        return io.BytesIO(gzip.decompress(path.read_bytes()))
    if path.suffix.lower() == ".zst":
        raise UserError(f"{path} is a Parquet file compressed once more; unpack it first (zstd -d)")
    return path


def _header(path: Path) -> list[str]:
    kind = format_of(path)
    try:
        if kind == "parquet":
            return list(pl.read_parquet_schema(_parquet_bytes(path)))
        if kind == "jsonl":
            return pl.scan_ndjson(path, infer_schema_length=None).collect_schema().names()
        separator = "\t" if kind == "tsv" else ","
        return pl.scan_csv(path, separator=separator, infer_schema=False, glob=False).collect_schema().names()
    except pl.exceptions.NoDataError:
        raise UserError(f"{path} is empty: it has not even a header") from None
    except (pl.exceptions.PolarsError, OSError, EOFError) as e:
        raise _unreadable(path, e) from None


def _read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Return the columns, ROW and EXTRA of one file."""
    kind = format_of(path)
    none = pl.lit(None, dtype=pl.String).alias(EXTRA)
    try:
        if kind == "parquet":
            frame = pl.read_parquet(_parquet_bytes(path), columns=list(columns), hive_partitioning=False)
            return frame.with_row_index(ROW, offset=1).with_columns(none, pl.col(ROW).cast(pl.Int64))
        if kind == "jsonl":
            lines = pl.scan_ndjson(path, infer_schema_length=None, row_index_name=ROW, row_index_offset=1)
            return lines.select(*columns, pl.col(ROW).cast(pl.Int64), none).collect()
        rows = pl.scan_csv(
            path,
            separator="\t" if kind == "tsv" else ",",
            schema=dict.fromkeys([*_header(path), EXTRA], pl.String),
            missing_columns="insert",
            truncate_ragged_lines=True,
            row_index_name=ROW,
            row_index_offset=1,
            glob=False,
        )
        return rows.select(*columns, pl.col(ROW).cast(pl.Int64), EXTRA).collect()
    except (pl.exceptions.PolarsError, OSError, EOFError) as e:
        raise _unreadable(path, e) from None


def _stack(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Join the frames of a source's files. A column whose type differs between files becomes text."""
    mixed = [c for c in frames[0].columns if len({f.schema[c] for f in frames if f.height}) > 1]
    out = [f.with_columns(as_text(f, c) for c in mixed) for f in frames if f.height]
    return pl.concat(out) if out else frames[0]


def _expression(sql: str, key: str, known: set[str]) -> pl.Expr | None:
    if not sql:
        return None
    try:
        expression = pl.sql_expr(sql)
    except pl.exceptions.PolarsError as e:
        raise UsageError(
            f"{key} = {sql!r} is not an SQL expression: {_first_line(e)}. A column whose name is a word of SQL, such "
            f'as user, needs double quotes: "user"'
        ) from None
    for column in expression.meta.root_names():
        if column not in known:
            raise UsageError(f"{key} = {sql!r} names a column {column!r} that is not there{nearest(column, known)}")
    return expression


def _evaluate(frame: pl.DataFrame, expression: pl.Expr, names: Mapping[str, str], text: bool, key: str) -> pl.Series:
    """Evaluate an SQL expression over columns by `names` (the expression's → the frame's)."""
    seen = frame.select(pl.col(theirs).alias(name) for name, theirs in names.items())
    if text:
        seen = seen.with_columns(as_number_if_numbers(seen[c]) for c in seen.columns)
    try:
        value = seen.select(expression.alias("value")).to_series()
    except pl.exceptions.PolarsError as e:
        raise UsageError(f"{key} cannot be computed: {_first_line(e)}") from None
    return value if value.len() == frame.height else pl.repeat(value[0], frame.height, eager=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def as_number_if_numbers(column: pl.Series) -> pl.Series:
    """Return a text column as Float64 if more than half of its cells are plain numbers, else as it is.

    A number with a leading zero, such as the zip code 01234, is no plain number.
    """
    plain = column.str.contains(r"^-?(0|[1-9]\d*)?(\.\d+)?([eE][-+]?\d+)?$") & (column != "")
    some = int((column.is_not_null() & (column != "")).sum())
    if 2 * int(plain.sum()) <= some:
        return column
    return column.cast(pl.Float64, strict=False)


def as_text(frame: pl.DataFrame, column: str) -> pl.Expr:
    """Return the expression of a column as text ids: String, or List(String) for lists. Empty text is null."""
    return _text_of(pl.col(column), frame.schema[column], column).alias(column)


def _text_of(value: pl.Expr, dtype: pl.DataType, column: str) -> pl.Expr:
    if isinstance(dtype, pl.List):
        inner = _text_of(pl.element(), dtype.inner, column)  # type: ignore[arg-type]
        return value.list.eval(inner).list.drop_nulls()
    if dtype.is_nested() or dtype == pl.Binary:
        raise UserError(f"column {column!r} holds {dtype}, from which no id can be made; it must be text or numbers")
    if dtype.is_float():  # such as whole numbers with gaps, written by pandas
        whole = value.cast(pl.Int64, strict=False)
        return pl.when(whole == value).then(whole.cast(pl.String)).otherwise(value.cast(pl.String))
    text = value.cast(pl.String)
    return pl.when(text != "").then(text)


def as_time(frame: pl.DataFrame, column: str, unit: str) -> pl.Expr:
    """Return the expression of a time column as Int64 epoch milliseconds; null where it cannot be read.

    Columns that Parquet declares as times need no unit; without a zone they are UTC.
    """
    dtype, value = frame.schema[column], pl.col(column)
    if isinstance(dtype, pl.Datetime):
        return value.dt.epoch("ms").cast(pl.Int64)
    if unit == "iso":
        parsed = (
            value.cast(pl.String).str.strip_chars().str.to_datetime("%+", time_unit="ms", time_zone="UTC", strict=False)
        )
        return parsed.dt.epoch("ms").cast(pl.Int64)
    number = value.cast(pl.Float64, strict=False) * (1000 if unit == "s" else 1)
    return pl.when(number.is_between(0, LATEST_MS)).then(number.round()).cast(pl.Int64)


LATEST_MS = 7_258_118_400_000
"""The year 2200. A later time has the wrong unit."""
