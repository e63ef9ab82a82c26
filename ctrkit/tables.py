"""The raw tables of a recipe: their files, what their columns are called, and their rows a piece at a time.

Nothing is guessed about text: a CSV cell stays text until someone asks for a number or a time, so the id "007"
stays "007". Only SQL conditions see numbers, where a column holds numbers.
"""

import concurrent.futures
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    csv_frame,
    cut,
    frames,
    head,
    json_frame,
    parquet_source,
    remote_columns,
    remote_files,
)
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

    def require(self, *columns: str) -> None:
        """Raise UserError unless the table has these columns (our names)."""
        for column in columns:
            if column not in self.names:
                files = ", ".join(f.name for f in self.files[:3]) + (", …" if len(self.files) > 3 else "")
                raise UserError(
                    f"{files} ([convert.{self.name}]) has no column "
                    f"{column!r}{_end(nearest(column, self.names))} If it has another name, say so with "
                    f'--set convert.{self.name}.columns.{column}="ITS NAME"{self._separator_hint()}'
                )

    def _separator_hint(self) -> str:
        columns = self.headers[0]
        if self.files[0].format in ("csv", "tsv") and len(columns) == 1:
            for separator in (";", "\t", "|", ","):
                if separator in columns[0]:
                    return (
                        f"; or is {separator!r} the separator? Then: --set convert.{self.name}.separator={separator!r}"
                    )
        return ""

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
                    f"have{nearest(missing[0], header)}"
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

    def read(self, number: int, piece: Piece) -> Iterator[tuple[pl.DataFrame, int]]:
        """Yield the rows of a piece for which `where` holds, some at a time.

        Each with how many rows there were before `where`: a frame of ROW, EXTRA, BAD, the columns of `prepare` by our
        names with the types that the file has (text, for CSV and TSV), and, if there is a label, LABEL, its value.
        """
        file, header = self.files[number], self.headers[number]
        where = _expression(self.source.where, f"convert.{self.name}.where", set(self.headers[0]))
        label = _expression(self.label, "convert.label", set(self.names))
        roots = where.meta.root_names() if where is not None else []
        asked = label.meta.root_names() if label is not None else []
        theirs = dict.fromkeys([*(self.names[c] for c in [*self.wanted, *asked]), *roots])
        asked_names = [self.names[c] for c in asked]
        own = header[: len(header) - len(file.parts)] if file.parts else header
        numbers = self._as_numbers({*asked_names, *roots})
        for frame in frames(file, piece, own, list(theirs), numbers):
            rows = frame.height
            if self.source.null_values:
                text = [c for c in theirs if frame.schema[c] == pl.String]
                null = pl.col(text).is_in(list(self.source.null_values))
                frame = frame.with_columns(pl.when(~null).then(pl.col(text)))
            if where is not None:
                kept = self._evaluate(frame, where, {c: c for c in roots}, f"convert.{self.name}.where")
                keep = kept.cast(pl.Boolean, strict=False).fill_null(False) | frame[BAD].is_not_null()
                frame = frame.filter(keep)
            out = frame.select(ROW, EXTRA, BAD, *(pl.col(self.names[c]).alias(c) for c in self.wanted))
            if label is not None:
                value = self._evaluate(frame, label, {c: self.names[c] for c in asked}, "convert.label")
                out = out.with_columns(value.alias(LABEL))
            yield out, rows

    def _evaluate(self, frame: pl.DataFrame, expression: pl.Expr, names: Mapping[str, str], key: str) -> pl.Series:
        """Evaluate an SQL expression over columns by `names` (the expression's → the frame's)."""
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
    files = [*_local_files(name, source, raw), *_urls(source)]
    headers, numeric, whole = [], frozenset[str](), frozenset[str]()
    for i, file in enumerate(files):
        own, numbers, ints = _header(file, source, types=i == 0)
        file = files[i] = dataclasses.replace(file, parts=tuple(p for p in file.parts if p[0] not in own))
        headers.append([*own, *(part for part, _ in file.parts)])
        numeric, whole = (numbers, ints) if i == 0 else (numeric, whole)
    for file, header in zip(files, headers, strict=True):
        for ours, theirs in source.columns.items():
            if isinstance(theirs, int) and theirs > len(header):
                raise UserError(
                    f"{file.path} has {len(header)} columns, and [convert.{name}] calls number {theirs} {ours!r}"
                )
            if isinstance(theirs, str) and theirs not in header and file.format != "jsonl":
                raise UserError(
                    f"{file.path} has no column {theirs!r}, which [convert.{name}] calls {ours!r}"
                    f"{nearest(theirs, header)}"
                )
    named = {ours: ours if isinstance(theirs, int) else theirs for ours, theirs in source.columns.items()}
    label, unit = "", source.time_unit
    if recipe is not None:
        label = recipe.convert.label if name == "impressions" else ""
        unit = unit or recipe.convert.time_unit
    return RawTable(
        name, source, files, headers, {c: c for c in headers[0]} | named, numeric, whole, label, unit or "s"
    )


def open_tables(recipe: Recipe, raw: Path, *names: str) -> dict[str, RawTable]:
    """Return those of the named tables that the recipe has."""
    tables = {}
    for name in names:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None:
            tables[name] = open_table(name, source, raw, recipe)
    return tables


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


def _header(file: File, source: Source, *, types: bool) -> tuple[list[str], frozenset[str], frozenset[str]]:
    """Return the columns of a file, and (of text files, if `types`) which hold numbers, and whole numbers only."""
    none = frozenset[str]()
    try:
        if file.url and file.format == "parquet":
            return remote_columns(file), none, none
        if file.format == "parquet":
            if not file.compression:
                parquet_footer.row_groups(Path(file.path))
            return list(pl.read_parquet_schema(parquet_source(file))), none, none
        names_only = not types and file.format != "jsonl"
        data, whole = head(file, FIRST_ROW_BYTES if names_only else HEAD_BYTES if file.format == "jsonl" else CSV_BYTES)
        if names_only and not whole and b"\n" not in data:
            data, _ = head(file, HEAD_BYTES)
        if not data.strip():
            raise UserError(f"{file.path} is empty: it has not even a header")
        if file.format == "jsonl":
            sample = json_frame(data)
            return sample.columns, frozenset(c for c in sample.columns if _holds_numbers(sample[c])), none
        names = _named(_csv_names(file, data), file, source)
        if names_only:
            return names, none, none
        sample = csv_frame(file, data, True, names, names).head(SAMPLE_ROWS)
        numbers = frozenset(c for c in names if _holds_numbers(sample[c]))
        return names, numbers, frozenset(c for c in numbers if _holds_whole_numbers(sample[c]))
    except pl.exceptions.NoDataError:
        raise UserError(f"{file.path} is empty: it has not even a header") from None
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
    """Return the cells of the first row."""
    end = data.find(b"\n") + 1 or len(data)
    while file.quoted and data.count(b'"', 0, end) % 2 and end < len(data):
        end = data.find(b"\n", end) + 1 or len(data)
    first = pl.read_csv(
        data[:end],
        has_header=file.header,
        separator=file.separator if len(file.separator) == 1 else UNIT,
        quote_char='"' if file.quoted else None,
        infer_schema=False,
        encoding="utf8-lossy",
    )
    return first.columns


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
    for column in expression.meta.root_names():
        if column not in known:
            raise UsageError(f"{key} = {sql!r} names a column {column!r} that is not there{nearest(column, known)}")
    return expression


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
