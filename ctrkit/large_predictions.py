"""Predictions larger than memory: one pass over a Parquet file, then user by user and score by score.

The pass reads a chunk of rows at a time. It sends each row to a partition of the users (a hash of the user, through a
temporary file), and each chunk's sorted scores to another (`ctrkit.score_runs`). A partition holds whole users, so
their AUCs are those of `ctrkit.gauc.user_auc`; AUC, log loss and calibration come from the merged scores. Threads share
the work: sorting, gathering, decoding and input leave Python's lock alone. Memory does not grow with the rows, but a
partition holds at least its largest user. The temporary files take about as many bytes as the columns in memory would,
in the folder that TMPDIR names.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars_hash
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ctrkit import compat as other
from ctrkit import predictions
from ctrkit.errors import UserError
from ctrkit.exchange import Exchange, Scratch
from ctrkit.gauc import GAUC, UserAUC, Weight, dense_ranks, user_auc
from ctrkit.progress import Meter, track
from ctrkit.score_runs import ScoreRuns, ScoreStatistics

CHUNK_ROWS = 500_000
PARTITION_ROWS = 1_000_000
MOST_PARTITIONS = 2**16
SPREAD = 0x9E3779B97F4A7C15
"""An odd number: multiplying by it, modulo a power of two, is one to one, and spreads to the upper bits."""
Words = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class LargeSlice:
    """What was measured of one slice."""

    gauc: GAUC
    statistics: ScoreStatistics
    by_user: UserAUC | None
    """Its `user`: positions in `LargeMeasured.users`. None where users were not asked for."""


@dataclass(frozen=True, kw_only=True)
class LargeMeasured:
    """What was measured of one file."""

    users: pl.Series
    """String [users], ascending; empty where users were not asked for."""
    slices: dict[str, LargeSlice]
    """By name, `whole` the first."""
    compat: dict[other.Program, other.Compat]
    """By program, over all rows."""


class _SameHash(Exception):
    """Two users have one hash."""


def rows_of(path: Path) -> int:
    """Return the rows of a Parquet file. Raises UserError where it is none."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read as parquet: {e}") from None


def measure(
    path: Path,
    *,
    user: str,
    label: str,
    score: str,
    slices: Sequence[str],
    whole: str,
    weight: Weight,
    bins: int,
    smallest: float,
    with_users: bool,
    programs: Sequence[other.Program] = (),
) -> LargeMeasured:
    """Measure a Parquet file over all its rows (a slice called `whole`) and over each slice.

    Columns and slices as in `ctrkit.predictions.read`, errors too. `bins` of the calibration error; probabilities are
    clipped to [`smallest`, 1 − `smallest`]; `with_users` keeps each user's AUC, for which memory grows with the users;
    `programs` whose GAUC is computed as well.
    """
    for seed in range(3):
        try:
            with tempfile.TemporaryDirectory(prefix="ctrkit-eval-") as folder, ThreadPoolExecutor(_threads()) as pool:
                run = _Run(path, {"user": user, "label": label, "score": score}, slices, whole, seed, Path(folder))
                try:
                    run.scatter(pool)
                    return run.gather(pool, weight, bins, smallest, with_users, programs)
                finally:
                    pool.shutdown(cancel_futures=True)
                    run.close()
        except _SameHash:
            continue
        except (pa.ArrowException, pl.exceptions.PolarsError) as e:
            raise UserError(f"{path} cannot be read as parquet: {e}") from None
    raise AssertionError("three hashes that each take two users for one")


def _threads() -> int:
    return len(os.sched_getaffinity(0))


class _Run:
    """One file on its way through the partitions."""

    def __init__(
        self, path: Path, columns: dict[str, str], slices: Sequence[str], whole: str, seed: int, folder: Path
    ) -> None:
        self.path, self.columns, self.seed = path, columns, seed
        schema = pl.read_parquet_schema(path)
        predictions.check_columns(path, list(schema), columns, slices)
        self.slicing = predictions.slicing(path, schema, slices, self._distinct)
        wanted = {*columns.values(), *self.slicing.values, *predictions.BUILT_IN.values()}
        self.wanted = [c for c in schema if c in wanted]
        self.metadata = pq.read_metadata(path)
        if self.metadata.num_rows == 0:
            raise UserError(f"{path} has no rows; there is nothing to evaluate.")
        users = schema[columns["user"]]
        self.hashed = not (users.is_float() or (users.is_integer() and users not in (pl.Int128, pl.UInt128)))
        self.unsigned = users.is_unsigned_integer()
        self.lowest, self.bits = self._range(users)
        wish = (self.metadata.num_rows - 1) // PARTITION_ROWS
        self.partition_bits = min(wish.bit_length(), self.bits, MOST_PARTITIONS.bit_length() - 1)
        empty = pl.DataFrame(schema={c: schema[c] for c in self.wanted})
        self.names = [whole, *self.slicing.masks(empty)]
        score_type = np.float32 if schema[columns["score"]] in (pl.Float16, pl.Float32) else np.float64
        word_type = np.uint32 if self.bits <= 32 else np.uint64
        types = [word_type, score_type, np.bool_, *[np.uint64] * self.hashed]
        self.exchange = Exchange(
            folder / "users", 1 << self.partition_bits, types + [np.uint8] * (-(-(len(self.names) - 1) // 8))
        )
        self.scratch = Scratch(folder / "scores")
        self.runs = {name: ScoreRuns(self.scratch) for name in self.names}

    def close(self) -> None:
        self.exchange.close()
        self.scratch.close()

    def scatter(self, pool: ThreadPoolExecutor) -> None:
        """Read the file once and send its rows to their partitions."""
        with Meter(f"eval: {self.path.name}", self.metadata.num_rows, "rows") as meter:
            for rows in pool.map(self._read, self._tasks()):  # in the file's order, so the first fault in it is told
                meter.add(rows)

    def gather(
        self,
        pool: ThreadPoolExecutor,
        weight: Weight,
        bins: int,
        smallest: float,
        with_users: bool,
        programs: Sequence[other.Program],
    ) -> LargeMeasured:
        """Measure partition by partition, and the scores range by range."""
        count = 1 << self.partition_bits
        made_of = pool.map(lambda p: self._partition(p, with_users, programs), range(count))
        parts = list(track(made_of, "eval: users", count, "partitions"))  # each: by slice
        users, places = self._users(parts) if with_users else (pl.Series("user", [], pl.String), None)
        made = {}
        for number, name in enumerate(self.names):
            statistics = self.runs[name].statistics(bins, smallest, pool.map)
            if statistics is None:
                continue
            sums = [part[number].sums for part in parts]
            by_user = None
            if places is not None:
                by_user = _joined([u for part in parts if (u := part[number].by_user) is not None], places)
            made[name] = LargeSlice(
                gauc=_gauc(sums, weight),
                statistics=statistics,
                by_user=by_user,
            )
        found = {p: other.total(p, [part[0].compat[p] for part in parts]) for p in programs}
        return LargeMeasured(users=users, slices=made, compat=found)

    def _distinct(self, column: str) -> pl.Series:
        return (
            pl.scan_parquet(self.path, glob=False).select(pl.col(column).unique()).collect(engine="streaming")[column]
        )

    def _range(self, dtype: pl.DataType) -> tuple[int, int]:
        """Return the smallest user and how many bits the distance to the largest takes."""
        if self.hashed or not dtype.is_integer():
            return 0, 64
        column = pl.col(self.columns["user"])
        scan = pl.scan_parquet(self.path, glob=False).select(column.min().alias("low"), column.max().alias("high"))
        low, high = scan.collect(engine="streaming").row(0)
        if low is None:  # no user at all, which is told when the rows are read
            return 0, 1
        return int(low), max(1, (int(high) - int(low)).bit_length())

    def _tasks(self) -> Iterator[tuple[int, list[int], int]]:
        """Yield (number, row groups, rows before them), each of about a chunk or of one row group."""
        groups: list[int] = []
        number = begin = rows = 0
        for group in range(self.metadata.num_row_groups):
            groups.append(group)
            rows += self.metadata.row_group(group).num_rows
            if rows >= CHUNK_ROWS or group == self.metadata.num_row_groups - 1:
                yield number, groups, begin
                groups, number, begin, rows = [], number + 1, begin + rows, 0

    def _read(self, task: tuple[int, list[int], int]) -> int:
        """Read the rows of a task and send them off; return how many they are."""
        number, groups, begin = task
        first_row = begin
        with pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False) as file:
            batches = file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=self.wanted, use_threads=False)
            for part, batch in enumerate(batches):
                frame = pl.from_arrow(batch)
                assert isinstance(frame, pl.DataFrame)
                self._chunk((number, part), frame, first_row)
                first_row += frame.height
        return first_row - begin

    def _chunk(self, place: tuple[int, int], frame: pl.DataFrame, first_row: int) -> None:
        score = predictions.scores(frame[self.columns["score"]], self.path, first_row)
        click = predictions.labels(frame[self.columns["label"]], self.path, first_row)
        users = predictions.user_values(frame[self.columns["user"]], self.path, first_row)
        words, checks = self._words(users)
        masks = list(self.slicing.masks(frame).values())
        columns = [words, score, click, *checks]
        if masks:
            columns += list(np.packbits(np.stack(masks), axis=0, bitorder="little"))
        self.exchange.add(place, (self._spread(words) >> self._shift).astype(np.uint16), columns)
        for name, inside in zip(self.names, [None, *masks], strict=True):
            rows = slice(None) if inside is None else inside
            self.runs[name].add(place, score[rows], click[rows])

    def _words(self, users: pl.Series) -> tuple[Words, list[Words]]:
        """Return a number for each user, and where that is a hash, another hash."""
        if not self.hashed:
            return users.to_numpy().astype(np.uint64) - np.uint64(self.lowest % 2**64), []  # modulo 2^64
        users = users.cast(pl.String)
        return text_hash(users, self.seed), [text_hash(users, self.seed + 1000)]

    def _spread(self, words: Words) -> Words:
        """Permute the numbers below 2^bits, so that their upper bits say the partition."""
        return (words * np.uint64(SPREAD)) & np.uint64(2**self.bits - 1)

    @property
    def _shift(self) -> np.uint64:
        return np.uint64(self.bits - self.partition_bits)

    def _partition(self, partition: int, with_users: bool, programs: Sequence[other.Program]) -> "list[_Part]":
        words, score, click, *rest = self.exchange.read(partition)
        names: Words | None = None
        if self.hashed:
            codes, names = _identified(words, rest.pop(0))
        else:
            below = (1 << int(self._shift)) - 1
            codes = self._spread(words.astype(np.uint64)) & np.uint64(below)
        if codes.size and int(codes.max()) >= 2**63:
            codes, distinct = dense_ranks(words)
            names = distinct.astype(np.uint64)
        code = codes.astype(np.int64)
        out = []
        for number in range(len(self.names)):
            rows: Any = slice(None)
            if number:
                byte, bit = divmod(number - 1, 8)
                rows = np.flatnonzero(rest[byte] & np.uint8(1 << bit))
            made = user_auc(code[rows], click[rows], score[rows], side_by_side=False)
            by_user = None
            if with_users:
                word = names[made.user] if names is not None else self._word(made.user, partition)
                by_user = word, made
            found = {p: other.partial(p, made, code, click, score) for p in programs} if number == 0 else {}
            out.append(_Part(_sums(made), by_user, found))
        return out

    def _word(self, codes: NDArray[np.int64], partition: int) -> Words:
        """Undo `_spread` for users of a partition."""
        whole = codes.astype(np.uint64) | np.uint64(partition << int(self._shift))
        return (whole * np.uint64(pow(SPREAD, -1, 2**64))) & np.uint64(2**self.bits - 1)

    def _users(self, parts: "list[list[_Part]]") -> tuple[pl.Series, tuple[Words, NDArray[np.int64]]]:
        """Return all users as text, ascending, and (their numbers ascending, each one's position among the texts)."""
        if self.hashed:
            text = self._distinct(self.columns["user"]).cast(pl.String)
            words = text_hash(text, self.seed)
        else:
            words = np.concatenate([u[0] for part in parts if (u := part[0].by_user) is not None])
            values = words + np.uint64(self.lowest % 2**64)
            text = pl.Series("user", values if self.unsigned else values.view(np.int64)).cast(pl.String)
        order = text.arg_sort().to_numpy()
        words = words[order]
        by_word = np.argsort(words)
        return text[order], (words[by_word], by_word)


@dataclass(frozen=True)
class _Sums:
    """Of one slice of a partition."""

    weighted: dict[Weight, float]
    """Σ w_i·AUC_i by weight."""
    weights: dict[Weight, int]
    users_kept: int
    users_dropped: int
    impressions: int
    impressions_covered: int


@dataclass(frozen=True)
class _Part:
    """One slice of a partition."""

    sums: _Sums
    by_user: tuple[Words, UserAUC] | None
    """Each user's number, and its AUC."""
    compat: dict[other.Program, other.Partial]


def text_hash(users: pl.Series, seed: int) -> Words:
    """Return a 64-bit hash of each text."""
    frame = users.rename("user").to_frame()
    return frame.select(polars_hash.col("user").nchash.xxh3_64(seed=seed)).to_series().to_numpy()


def _identified(words: Words, checks: Words) -> tuple[NDArray[np.uint64], Words]:
    """Return the rows' ranks among the distinct hashes, and these.

    Raises _SameHash if rows of one hash differ in the other, that is, are not of one user.
    """
    rank, distinct = dense_ranks(words)
    of_user = np.empty(len(distinct), np.uint64)
    of_user[rank] = checks
    if not np.array_equal(of_user[rank], checks):
        raise _SameHash
    return rank, distinct


def _sums(users: UserAUC) -> _Sums:
    kept = users.kept
    values = users.auc[kept]
    every: tuple[Weight, ...] = ("impressions", "clicks", "users")
    weights = {w: users.weights(w)[kept] for w in every}
    return _Sums(
        weighted={w: float((x * values).sum()) for w, x in weights.items()},
        weights={w: int(x.sum()) for w, x in weights.items()},
        users_kept=len(values),
        users_dropped=len(kept) - len(values),
        impressions=int(users.impressions.sum()),
        impressions_covered=int(users.impressions[kept].sum()),
    )


def _gauc(sums: Iterable[_Sums], weight: Weight) -> GAUC:
    sums = list(sums)
    below = sum(s.weights[weight] for s in sums)
    return GAUC(
        value=sum(s.weighted[weight] for s in sums) / below if below else None,
        weight=weight,
        users_kept=sum(s.users_kept for s in sums),
        users_dropped=sum(s.users_dropped for s in sums),
        impressions=sum(s.impressions for s in sums),
        impressions_covered=sum(s.impressions_covered for s in sums),
    )


def _joined(parts: list[tuple[Words, UserAUC]], places: tuple[Words, NDArray[np.int64]]) -> UserAUC:
    """Put the users of all partitions in the order of their texts."""
    words, positions = places
    at = positions[np.searchsorted(words, np.concatenate([w for w, _ in parts]))]
    order = np.argsort(at)
    return UserAUC(
        user=at[order],
        impressions=np.concatenate([u.impressions for _, u in parts])[order],
        clicks=np.concatenate([u.clicks for _, u in parts])[order],
        auc=np.concatenate([u.auc for _, u in parts])[order],
    )
