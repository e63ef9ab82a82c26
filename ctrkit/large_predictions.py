"""Predictions larger than memory: one pass over a Parquet file, then user by user and score by score.

The pass reads a chunk of rows at a time. It sends each row to a partition of the users (a hash of the user, through a
temporary file), and each chunk's sorted scores to another (`ctrkit.score_runs`). A partition holds whole users, so
their AUCs are those of `ctrkit.gauc.user_auc`; AUC, log loss and calibration come from the merged scores. Threads share
the work: sorting, gathering, decoding and input leave Python's lock alone. Memory does not grow with the rows: a user
of more rows than fit into a partition is measured by merging scores, too. The temporary files take about as many bytes
as the columns in memory would, in the folder that TMPDIR names.
"""

import os
import tempfile
from collections import Counter
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
from ctrkit import files, predictions
from ctrkit.errors import UserError
from ctrkit.exchange import Exchange, Scratch
from ctrkit.gauc import GAUC, UserAUC, Weight, dense_ranks, user_auc
from ctrkit.progress import Meter, track
from ctrkit.score_runs import ScoreRuns, ScoreStatistics

CHUNK_ROWS = 500_000
"""Rows read at a time; of more than a hundred times as many, up to `MOST_TIMES` as many, since chunks × partitions is
how many pieces the temporary files are read in."""
MOST_TIMES = 4
PARTITION_ROWS = 1_000_000
LARGE_PARTITION = 4
"""A partition of so many times its usual rows is searched for users of many rows."""
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
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as e:
            if why := files.no_room(e):
                raise UserError(
                    f"no room for temporary files in {tempfile.gettempdir()}: {why}. Set TMPDIR to a folder with room "
                    f"for some {60 * rows_of(path) / 1e9:.1f} GB."
                ) from None
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
        self.chunk_rows = min(max(CHUNK_ROWS, self.metadata.num_rows // 100), MOST_TIMES * CHUNK_ROWS)
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
            if rows >= self.chunk_rows or group == self.metadata.num_row_groups - 1:
                yield number, groups, begin
                groups, number, begin, rows = [], number + 1, begin + rows, 0

    def _read(self, task: tuple[int, list[int], int]) -> int:
        """Read the rows of a task and send them off; return how many they are."""
        number, groups, begin = task
        first_row = begin
        with pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False) as file:
            batches = file.iter_batches(self.chunk_rows, row_groups=groups, columns=self.wanted, use_threads=False)
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
        masks = list(self.slicing.masks(frame, first_row).values())
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
        heavy: list[int] = []
        # torchrec's number needs a user's rows in their order, all of them at once.
        if self.exchange.rows(partition) > LARGE_PARTITION * PARTITION_ROWS and "torchrec" not in programs:
            heavy = self._heavy(partition)
        columns = self._without(partition, heavy) if heavy else self.exchange.read(partition)
        words, score, click, *rest = columns
        code, names = self._codes(words, rest.pop(0) if self.hashed else None)
        out = []
        for number, rows in enumerate(self._rows_of_slices(rest)):
            users = user_auc(code[rows], click[rows], score[rows], side_by_side=False)
            word = names[users.user] if names is not None else self._word(users.user, partition)
            if heavy:
                word, users = self._with_heavy(partition, heavy, number, word, users)
            found = {p: other.partial(p, users, code, click, score) for p in programs} if number == 0 else {}
            out.append(_Part(_sums(users), (word, users) if with_users else None, found))
        return out

    def _codes(self, words: Words, checks: Words | None) -> tuple[NDArray[np.int64], Words | None]:
        """Return a code for each user of a partition, and the users by code where that is no part of their number."""
        if checks is not None:
            codes, names = _identified(words, checks)
            return codes.astype(np.int64), names
        codes = self._spread(words.astype(np.uint64)) & np.uint64((1 << int(self._shift)) - 1)
        if codes.size and int(codes.max()) >= 2**63:
            codes, distinct = dense_ranks(words)
            return codes.astype(np.int64), distinct.astype(np.uint64)
        return codes.astype(np.int64), None

    def _rows_of_slices(self, packed: Sequence[NDArray[np.uint8]]) -> Iterator[Any]:
        """Yield each slice's rows, the whole first."""
        yield slice(None)
        for number in range(len(self.names) - 1):
            byte, bit = divmod(number, 8)
            yield np.flatnonzero(packed[byte] & np.uint8(1 << bit))

    def _heavy(self, partition: int) -> list[int]:
        """Return the users of so many rows that they are better not held in memory."""
        counts: Counter[int] = Counter()
        for words, *_ in self.exchange.pieces(partition, PARTITION_ROWS):
            distinct, times = np.unique(words, return_counts=True)
            some = times > len(words) // 100
            counts.update(dict(zip(distinct[some].tolist(), times[some].tolist(), strict=True)))
        return sorted(word for word, n in counts.items() if n > PARTITION_ROWS // 2)

    def _without(self, partition: int, heavy: Sequence[int]) -> list[NDArray[Any]]:
        """Return the columns of a partition less some users' rows."""
        pieces = []
        for columns in self.exchange.pieces(partition, PARTITION_ROWS):
            others = np.isin(columns[0], np.array(heavy, columns[0].dtype), invert=True)
            pieces.append([c[others] for c in columns])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _with_heavy(
        self, partition: int, heavy: Sequence[int], number: int, word: Words, users: UserAUC
    ) -> tuple[Words, UserAUC]:
        """Add users of many rows to those of a slice. A user's AUC is that of a file of that user's rows alone."""
        found = []
        for user in heavy:
            runs = ScoreRuns(self.scratch)
            check: set[int] = set()
            for place, (words, score, click, *rest) in enumerate(self.exchange.pieces(partition, PARTITION_ROWS)):
                mine = words == words.dtype.type(user)
                if self.hashed:
                    check |= set(np.unique(rest.pop(0)[mine]).tolist())
                if number:
                    byte, bit = divmod(number - 1, 8)
                    mine &= (rest[byte] & np.uint8(1 << bit)) > 0
                runs.add((place,), score[mine], click[mine])
            if len(check) > 1:
                raise _SameHash
            if (of := runs.statistics(1, 0.5)) is not None:
                found.append((user, of.impressions, of.clicks, np.nan if of.auc is None else of.auc))
        columns = list(zip(*found, strict=True)) if found else [()] * 4
        added = [np.array(c, d) for c, d in zip(columns, (np.uint64, np.int64, np.int64, np.float64), strict=True)]
        old = word, users.impressions, users.clicks, users.auc
        word, impressions, clicks, auc = (np.concatenate(pair) for pair in zip(old, added, strict=True))
        return word, UserAUC(user=np.arange(len(word)), impressions=impressions, clicks=clicks, auc=auc)

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
