"""The raw tables of a recipe: their files, what their columns are called, and their rows a piece at a time.

Nothing is guessed about text: a CSV cell stays text until someone asks for a number or a time, so the id "007"
stays "007". Only SQL conditions see numbers, where a column holds numbers.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from ctrkit import parquet_footer
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.pieces import (
    BAD,
    EXTRA,
    NONE,
    ROW,
    UNIT,
    File,
    Numbers,
    Piece,
    Text,
    csv_frame,
    cut,
    frames,
    head,
    json_frame,
    parquet_source,
    remote_columns,
    remote_files,
)
from ctrkit.progress import say
from ctrkit.recipe import Recipe, Source
from ctrkit.sources import COMPRESSIONS, FORMATS, is_url, patterns, source_files, suffix

LABEL = "__label"
"""The value of the label expression."""
HEAD_BYTES = 2 << 20
"""How much of a file of JSON lines is read to learn its columns."""
CSV_BYTES = 512 << 10
"""How much of a CSV file is read to learn what its columns hold."""
FIRST_ROW_BYTES = 64 << 10
SAMPLE_ROWS = 2_000
ACROSS_ROWS = {"Agg", "Over", "Explode", "Correlation", "Quantile", "Rank", "SubPlan"}
"""Parts of polars' expressions that look at more than a row."""
SHOWN_CHARACTERS = 60
"""Of a column's name in messages."""
LATEST_MS = 7_258_118_400_000
"""The year 2200. A later time has the wrong unit."""


@dataclass
class RawTable:
    """A table of the recipe. Plain data, so that it can be sent to other processes. See `open_table`."""

    name: str
    source: Source
    files: list[File]
    headers: list[list[str]]
    """The columns of each file, those that its path gives included."""
    names: dict[str, str]
    """Our name of a column → the file's."""
    numeric: frozenset[str]
    """Columns of text files (their names) that hold numbers."""
    whole: frozenset[str] = frozenset()
    """Columns of CSV and TSV files that seem to hold whole numbers only, written as usual."""
    label: str = ""
    """SQL expression of `convert.label`, for impressions."""
    time_unit: str = "s"
    wanted: list[str] = field(default_factory=list)
    skipped: tuple[str, ...] = ()
    """Names of empty files, which are not among `files`."""
    in_files: ClassVar[bool] = True
    """Whether its rows are still where `files` says."""

    def require(self, *columns: str) -> None:
        """Raise UserError unless the table has these columns (our names)."""
        for column in columns:
            if column not in self.names:
                files = ", ".join(f.name for f in self.files[:3]) + (", …" if len(self.files) > 3 else "")
                lacks = f"{files} ([convert.{self.name}]) has no column {column!r}"
                if self.files[0].format == "jsonl" and len(self.headers[0]) == len(self.files[0].parts):
                    raise UserError(
                        f"{lacks}: none of its lines is a JSON object. JSON lines are an object a line, not an array "
                        f"or objects of several lines; `jq -c '.[]'` makes them of an array. Of another format, say so "
                        f"with --set convert.{self.name}.format=csv"
                    )
                hint = _separator_hint(self.name, self.files[0], self.headers[0])
                raise UserError(
                    f"{lacks}{_end(_nearest(column, self.names))} If it has another name, say so with "
                    f'--set convert.{self.name}.columns.{column}="ITS NAME"{hint}'
                )

    def prepare(self, columns: Iterable[str]) -> None:
        """Say which columns (our names) `read` shall give; check that every file has them and what SQL needs."""
        self.wanted = list(dict.fromkeys(columns))
        self.require(*self.wanted)
        needed = dict.fromkeys([*(self.names[c] for c in self.wanted), *self._sql_columns()])
        for file, header in zip(self.files, self.headers, strict=True):
            missing = [c for c in needed if c not in header]
            if missing and file.format != "jsonl":
                raise UserError(
                    f"{file.path} has no column {missing[0]!r}, which other files of [convert.{self.name}] "
                    f"have{_nearest(missing[0], header)}"
                )

    def _sql_columns(self) -> list[str]:
        where = _expression(self.source.where, f"convert.{self.name}.where", set(self.headers[0]))
        label = _expression(self.label, "convert.label", set(self.names))
        roots = where.meta.root_names() if where is not None else []
        return [*roots, *(self.names[c] for c in (label.meta.root_names() if label is not None else []))]

    def _as_numbers(self, in_sql: Collection[str]) -> Numbers:
        """Return the columns that can be read as numbers without a difference to anybody."""
        if self.source.null_values:
            return NONE
        measures = ["dwell", *(["time"] if self.time_unit != "iso" else [])]
        measured = {self.names[c] for c in measures if c in self.wanted}
        others = {self.names[c] for c in self.wanted if c not in measures}
        return Numbers(
            frozenset(measured & self.numeric - others - set(in_sql)), frozenset(self.whole & others - set(in_sql))
        )

    def pieces(self) -> list[tuple[int, Piece]]:
        """Return the pieces of all files: number of the file, piece."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return [(i, piece) for i, pieces in enumerate(pool.map(cut, self.files)) for piece in pieces]

    def label_columns(self) -> list[str]:
        """Return the columns (our names) that the label expression looks at."""
        label = _expression(self.label, "convert.label", set(self.names))
        return label.meta.root_names() if label is not None else []

    def label_of(self, frame: pl.DataFrame) -> pl.Series:
        """Return the value of the label expression for each row of a frame with the file's columns."""
        label = _expression(self.label, "convert.label", set(self.names))
        assert label is not None
        return self._evaluate(frame, label, {c: self.names[c] for c in self.label_columns()}, "convert.label")

    def read(
        self, number: int, piece: Piece, text: Text | None = None, begin: int = 1
    ) -> Iterator[tuple[pl.DataFrame, int]]:
        """Yield the rows of a piece for which `where` holds, some at a time.

        Each with how many rows there were before `where`: a frame of ROW, EXTRA, BAD, the columns of `prepare` by our
        names with the types that the file has (text, for CSV and TSV), and, if there is a label, LABEL, its value.

        text: one of `pieces.texts`, whose rows alone are wanted; `begin` is the number of the first.
        """
        file, header = self.files[number], self.headers[number]
        where = _expression(self.source.where, f"convert.{self.name}.where", set(self.headers[0]))
        roots = where.meta.root_names() if where is not None else []
        asked = [self.names[c] for c in self.label_columns()]
        theirs = dict.fromkeys([*(self.names[c] for c in self.wanted), *asked, *roots])
        own = header[: len(header) - len(file.parts)] if file.parts else header
        numbers = self._as_numbers({*asked, *roots})
        for frame in frames(file, piece, own, list(theirs), numbers, text, begin):
            rows = frame.height
            if self.source.null_values:
                strings = [c for c in theirs if frame.schema[c] == pl.String]
                null = pl.col(strings).is_in(list(self.source.null_values))
                frame = frame.with_columns(pl.when(~null).then(pl.col(strings)))
            if where is not None:
                kept = self._evaluate(frame, where, {c: c for c in roots}, f"convert.{self.name}.where")
                if not (kept.dtype in (pl.Boolean, pl.Null) or kept.dtype.is_numeric()):
                    raise UsageError(
                        f"convert.{self.name}.where = {self.source.where!r} is {kept.dtype}, neither true nor false; "
                        f"give a condition, such as column = 'value'"
                    )
                keep = kept.cast(pl.Boolean, strict=False).fill_null(False) | frame[BAD].is_not_null()
                frame = frame.filter(keep)
            yield self.by_our_names(frame), rows

    def by_our_names(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ROW, EXTRA, BAD, the columns of `prepare` by our names, and LABEL if there is one."""
        out = frame.select(ROW, EXTRA, BAD, *(pl.col(self.names[c]).alias(c) for c in self.wanted))
        return out.with_columns(self.label_of(frame).alias(LABEL)) if self.label else out

    def _evaluate(self, frame: pl.DataFrame, expression: pl.Expr, names: Mapping[str, str], key: str) -> pl.Series:
        """Evaluate an SQL expression over columns by `names` (the expression's → the frame's)."""
        if not frame.height:
            return pl.Series(dtype=pl.Boolean)
        seen = frame.select(
            (pl.col(theirs).cast(pl.Float64, strict=False) if theirs in self.numeric else pl.col(theirs)).alias(name)
            for name, theirs in names.items()
        )
        try:
            value = seen.select(expression.alias("value")).to_series()
        except pl.exceptions.PolarsError as e:
            raise UsageError(f"{key} cannot be computed: {_first_line(e)}") from None
        return value if value.len() == frame.height else pl.repeat(value[0], frame.height, eager=True)


def open_table(name: str, source: Source, raw: Path, recipe: Recipe | None = None) -> RawTable:
    """Find a table's files and learn their columns from their first rows.

    Raises UserError where a file is missing or unreadable or a column that the recipe names is not in it.
    """
    files, headers, skipped = [], [], []
    numeric: frozenset[str] | None = None
    whole = frozenset[str]()
    for file in [*_local_files(name, source, raw), *_urls(source)]:
        try:
            own, kinds = _header(file, source, types=numeric is None)
        except _EmptyError as e:
            skipped.append(e)
            continue
        file = dataclasses.replace(file, parts=tuple(p for p in file.parts if p[0] not in own))
        files.append(file)
        headers.append([*own, *(part for part, _ in file.parts)])
        numeric, whole = kinds if numeric is None and kinds is not None else (numeric, whole)
    if not files:
        raise skipped[0]
    for file, header in zip(files, headers, strict=True):
        for ours, theirs in source.columns.items():
            if isinstance(theirs, int) and theirs > len(header):
                raise UserError(
                    f"{file.path} has {len(header)} columns, and [convert.{name}] calls number {theirs} {ours!r}"
                )
            if isinstance(theirs, str) and theirs not in header and file.format != "jsonl":
                raise UserError(
                    f"{file.path} has no column {theirs!r}, which [convert.{name}] calls {ours!r}"
                    f"{_nearest(theirs, header)}{_separator_hint(name, file, header)}"
                )
    named = {ours: ours if isinstance(theirs, int) else theirs for ours, theirs in source.columns.items()}
    label, unit = "", source.time_unit
    if recipe is not None:
        label = recipe.convert.label if name == "impressions" else ""
        unit = unit or recipe.convert.time_unit
    return RawTable(
        name,
        source,
        files,
        headers,
        {c: c for c in headers[0]} | named,
        numeric or frozenset(),
        whole,
        label,
        unit or "s",
        skipped=tuple(e.name for e in skipped),
    )


def _separator_hint(table: str, file: File, header: Sequence[str]) -> str:
    """Return the likely separator as the end of a sentence, where a file seems to have one column only."""
    if file.format in ("csv", "tsv") and len(header) == 1:
        for separator in (";", "\t", "|", ","):
            if separator in header[0]:
                return f"; or is {separator!r} the separator? Then: --set convert.{table}.separator={separator!r}"
    return ""


def open_tables(recipe: Recipe, raw: Path, *names: str) -> dict[str, RawTable]:
    """Return those of the named tables that the recipe has."""
    tables = {}
    for name in names:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None:
            tables[name] = open_table(name, source, raw, recipe)
            if tables[name].skipped:
                say(f"[convert.{name}]: {say_skipped(tables[name])}")
    return tables


def say_skipped(table: RawTable) -> str:
    """Say which files of a table are empty."""
    names = table.skipped
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'} empty, without even a header, and left out"


def _local_files(name: str, source: Source, raw: Path) -> list[File]:
    local = [p for p in patterns(source) if not is_url(p)]
    if not local:
        return []
    if not raw.is_dir():
        raise UserError(f"the raw folder {raw} is not there; name the right one with --raw")
    found = source_files(source, raw)
    if not found:
        raise UserError(f"no file matches {source.files!r} ([convert.{name}]) in {raw}{_lying_in(raw, name)}")
    files = []
    for inner, path in found.items():
        if not path.is_file():
            raise UserError(
                f"{path} is not there; [convert.{name}] names it{_lying_in(raw, inner)} "
                f"Put the file there, or name another with --set convert.{name}.files=NAME"
            )
        files.append(_file(inner, str(path), source, path_parts(inner)))
    return files


def path_parts(name: str) -> list[tuple[str, str]]:
    """Return the columns that the folders of a file's name give, such as ("day", "2024-03-01") for day=2024-03-01."""
    pairs = [folder.partition("=") for folder in name.split("/")[:-1]]
    return [(key, value) for key, sign, value in pairs if key and sign]


def _urls(source: Source) -> list[File]:
    urls = [url for pattern in patterns(source) if is_url(pattern) for url in remote_files(pattern)]
    return [_file(url, url, source, path_parts(url)) for url in urls]


def _file(name: str, path: str, source: Source, parts: Sequence[tuple[str, str]]) -> File:
    ending, compression = suffix(name)
    kind = source.format or FORMATS.get(ending, "")
    if not kind:
        raise UserError(
            f"cannot tell the format of {path}: its name must end in {', '.join(FORMATS)}, each also with "
            f"{' or '.join(COMPRESSIONS)}; or the table must say which it is (format = 'csv')"
        )
    url = is_url(path)
    separator = source.separator or ("\t" if kind == "tsv" else ",")
    if url and kind != "parquet" and source.encoding.lower() not in ("utf-8", "utf8"):
        raise UsageError(f"{path}: an encoding other than UTF-8 works for local files only")
    return File(name, path, kind, compression, url, source.header, separator, source.encoding, tuple(parts))


class _EmptyError(UserError):
    """A file has nothing in it."""

    def __init__(self, file: File) -> None:
        super().__init__(f"{file.path} is empty: it has not even a header")
        self.name = file.name


Kinds = tuple[frozenset[str], frozenset[str]]
"""Columns of a text file that hold numbers, and those that hold whole numbers only."""


def _header(file: File, source: Source, *, types: bool) -> tuple[list[str], Kinds | None]:
    """Return the columns of a file, and which hold numbers; None if not to be learned from it (or not `types`)."""
    none: Kinds = frozenset(), frozenset()
    try:
        if file.url and file.format == "parquet":
            return remote_columns(file), none
        if file.format == "parquet":
            if not Path(file.path).stat().st_size:
                raise _EmptyError(file)
            if not file.compression:
                parquet_footer.row_groups(Path(file.path))
            return list(pl.read_parquet_schema(parquet_source(file))), none
        names_only = not types and file.format != "jsonl"
        data, whole = head(file, FIRST_ROW_BYTES if names_only else HEAD_BYTES if file.format == "jsonl" else CSV_BYTES)
        if names_only and not whole and b"\n" not in data:
            data, _ = head(file, HEAD_BYTES)
        if not data.strip():
            raise _EmptyError(file)
        if file.format == "jsonl":
            sample = json_frame(data)
            sample = sample.select(c for c in sample.columns if c != EXTRA)
            return sample.columns, (frozenset(c for c in sample.columns if _holds_numbers(sample[c])), frozenset())
        names = _named(_csv_names(file, data), file, source)
        if names_only:
            return names, None
        sample = csv_frame(file, data, True, names, names).head(SAMPLE_ROWS)
        if not sample.height:
            return names, None
        numbers = frozenset(c for c in names if _holds_numbers(sample[c]))
        return names, (numbers, frozenset(c for c in numbers if _holds_whole_numbers(sample[c])))
    except pl.exceptions.NoDataError:
        raise _EmptyError(file) from None
    except (pl.exceptions.PolarsError, OSError) as e:
        raise UserError(
            f"{file.path} cannot be read as {file.format.upper()}: {_first_line(e)}. Is it whole, and in UTF-8?"
        ) from None


def _named(names: list[str], file: File, source: Source) -> list[str]:
    """Return the columns' names; where there is no header, those that the recipe gives, else column_1, column_2, …."""
    if file.header or file.format not in ("csv", "tsv"):
        return names
    given = {position: ours for ours, position in source.columns.items()}
    return [given.get(i, f"column_{i}") for i in range(1, len(names) + 1)]


def _csv_names(file: File, data: bytes) -> list[str]:
    """Return the cells of the first row, or column_1, column_2, … if that is no header."""
    end = data.find(b"\n") + 1 or len(data)
    separator = file.separator if len(file.separator) == 1 else UNIT
    if file.quoted:
        row = file.rows.first(np.frombuffer(data, np.uint8))
        end = row.end
        if row.kind == "bad" and file.header:
            raise UserError(f"the header of {file.path} has a quote without its partner")
        if row.kind == "bad":
            return [f"column_{i + 1}" for i in range(data.count(separator.encode(), 0, end) + 1)]
    first = pl.read_csv(
        data[:end],
        has_header=False,
        separator=separator,
        quote_char='"' if file.quoted else None,
        infer_schema=False,
        encoding="utf8-lossy",
    )
    return _distinct(file, [name or "" for name in first.row(0)]) if file.header else first.columns


def _distinct(file: File, names: list[str]) -> list[str]:
    """Return the names of a header, those without one made distinct; raise UserError where others are the same."""
    for i, name in enumerate(names):
        if name and name in names[:i]:
            raise UserError(f"{file.path} has two columns named {_short(name)}; give each a name of its own")
        if any(ord(c) < 32 and c not in "\n\t" for c in name):
            raise UserError(
                f"{file.path} has a column named {_short(name)}, and no text has such characters. Is it of another "
                f"format, or compressed? If one of them separates its cells, say so with `separator`"
            )
    unnamed = (f"_unnamed_{i}" for i in range(len(names)))
    return [name or next(unnamed) for name in names]


def _short(name: str) -> str:
    return repr(name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "…")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names nearest to `name`, as `errors.nearest`, long ones cut."""
    return nearest(name, [c if len(c) <= SHOWN_CHARACTERS else c[:SHOWN_CHARACTERS] + "…" for c in known])


def _holds_numbers(column: pl.Series) -> bool:
    """Say whether more than half of a text column's cells are plain numbers.

    A number with a leading zero, such as the zip code 01234, is no plain number.
    """
    if column.dtype != pl.String:
        return False
    plain = column.str.contains(r"^-?(0|[1-9]\d*)?(\.\d+)?([eE][-+]?\d+)?$") & (column != "")
    some = int((column.is_not_null() & (column != "")).sum())
    return 2 * int(plain.sum()) > some


def _holds_whole_numbers(column: pl.Series) -> bool:
    return bool(column.str.contains(r"^(0|-?[1-9]\d{0,17})?$").fill_null(True).all())


def _lying_in(raw: Path, name: str) -> str:
    return _end(nearest(name, [p.name for p in raw.iterdir() if p.is_file() and not p.name.startswith(".")]))


def _end(hint: str) -> str:
    """Return a hint of `nearest` as the end of a sentence."""
    return hint if hint.endswith("?") else hint + "."


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
    if _across_rows(json.loads(expression.meta.serialize(format="json"))):
        raise UsageError(
            f"{key} = {sql!r} looks at more than one row. Logs are read in pieces, so no AVG, COUNT, ROW_NUMBER and "
            f"the like: a condition says of each row by itself whether it holds"
        )
    for column in expression.meta.root_names():
        if column not in known:
            raise UsageError(f"{key} = {sql!r} names a column {column!r} that is not there{_nearest(column, known)}")
    return expression


def _across_rows(tree: object) -> bool:
    """Say whether an expression, as JSON, looks at other rows than the one it is for."""
    if isinstance(tree, dict):
        return any(
            part in ACROSS_ROWS or (part not in ("Literal", "Column") and _across_rows(inner))
            for part, inner in tree.items()
        )
    return any(map(_across_rows, tree)) if isinstance(tree, list) else tree == "Len"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def as_id(dtype: pl.DataType, column: str) -> pl.Expr:
    """Return the expression of a column as ids: Int64 for whole numbers, else as `as_text`."""
    if dtype.is_integer():
        return pl.col(column).cast(pl.Int64, strict=False) if dtype != pl.UInt64 else as_text(dtype, column)
    return as_text(dtype, column)


def as_text(dtype: pl.DataType, column: str) -> pl.Expr:
    """Return the expression of a column as text: String, a list's values each after a UNIT. Empty text is null."""
    return _text_of(pl.col(column), dtype, column).alias(column)


def _text_of(value: pl.Expr, dtype: pl.DataType, column: str) -> pl.Expr:
    if isinstance(dtype, pl.List):
        inner = _text_of(pl.element(), dtype.inner, column)  # type: ignore[arg-type]
        return pl.lit(UNIT) + value.list.eval(inner).list.drop_nulls().list.join(UNIT)
    if dtype.is_nested() or dtype in (pl.Binary, pl.Duration):
        raise UserError(f"column {column!r} holds {dtype}, from which no id can be made; it must be text or numbers")
    if dtype.is_float():  # such as whole numbers with gaps, written by pandas
        whole = value.cast(pl.Int64, strict=False)
        return pl.when(whole == value).then(whole.cast(pl.String)).otherwise(value.cast(pl.String))
    text = value if dtype == pl.String else value.cast(pl.String)
    return pl.when(text != "").then(text)


def as_time(dtype: pl.DataType, column: str, unit: str) -> pl.Expr:
    """Return the expression of a time column as Int64 epoch milliseconds; null where it cannot be read.

    Columns that Parquet declares as times need no unit; without a zone they are UTC.
    """
    value = pl.col(column)
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Null, pl.Datetime)):
        raise UserError(
            f"column {column!r} holds {dtype}, which is no moment; it must be a time with its hours, epoch seconds or "
            "milliseconds, or ISO-8601 text"
        )
    if isinstance(dtype, pl.Datetime):
        return value.dt.epoch("ms").cast(pl.Int64)
    if unit == "iso":
        parsed = (
            value.cast(pl.String).str.strip_chars().str.to_datetime("%+", time_unit="ms", time_zone="UTC", strict=False)
        )
        return parsed.dt.epoch("ms").cast(pl.Int64)
    number = value.cast(pl.Float64, strict=False) * (1000 if unit == "s" else 1)
    return pl.when(number.is_between(0, LATEST_MS)).then(number.round()).cast(pl.Int64)
