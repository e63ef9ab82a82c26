"""From grouped Parquet files to batches: whole columns, jagged, common features once per group.

Letters in names: G groups (user, day) of a batch, S samples, B behaviours of its groups, P (sample, behaviour)
pairs, U distinct rows of an embedding table, N distinct pictures, F features, D width.
"""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import files
from ctrkit.errors import UserError, nearest
from ctrkit.ranks import ALONE, Ranks
from ctrkit.recipe import Feature

Array = npt.NDArray[np.generic]
Ints = npt.NDArray[np.int64]
META = ("sample_id", "click")
OF_THE_MODEL = {"width", "switch"}
"""Keys of a feature that groups have nothing of."""


@dataclass(frozen=True)
class Schema:
    """What `groups/schema.json` says: the features, the size of each vocabulary and the digest of all."""

    features: dict[str, Feature]
    vocab_sizes: dict[str, int]
    vocab_digest: str
    block_groups: int
    """Rows of a Parquet row group, the shuffle block."""
    negative_rate: float = 1.0
    """Share of the training samples without a click that was kept."""

    @classmethod
    def read(cls, groups: Path) -> "Schema":
        """Read the schema of a groups folder."""
        path = groups / "schema.json"
        if not path.is_file():
            raise UserError(f"{groups} is not a groups folder: it has no schema.json. Make one with `ctrkit group`.")
        return cls.from_json(files.read_json(path))

    @classmethod
    def from_json(cls, data: dict[str, object]) -> "Schema":
        """Make a schema from the JSON object that `to_json` returns."""
        features, sizes, block_groups = data["features"], data["vocab_sizes"], data["block_groups"]
        assert isinstance(features, dict)
        assert isinstance(sizes, dict)
        assert isinstance(block_groups, int)
        order = data.get("order", list(features))
        assert isinstance(order, list)
        return cls(
            {name: Feature(**features[name]) for name in order},
            {name: int(size) for name, size in sizes.items()},
            str(data["vocab_digest"]),
            block_groups,
            float(str(data.get("negative_rate", 1.0))),
        )

    def of_recipe(self, features: Mapping[str, Feature], groups: Path) -> "Schema":
        """Return this schema with the widths and switches of a recipe's `[features]`, in the order of the groups.

        Those decide what a model makes of the indexes. All else decides the indexes: where it differs, UserError.
        """
        again = "run ctrkit group again with this recipe (and what comes before it), or give the groups that it made"
        differ = sorted(set(features) ^ set(self.features))
        if differ:
            fault = "has no feature" if differ[0] in features else "has a feature that the recipe lacks:"
            raise UserError(f"{groups} {fault} {differ[0]!r}: {again}")
        for name, own in self.features.items():
            was, now = own.model_dump(exclude=OF_THE_MODEL), features[name].model_dump(exclude=OF_THE_MODEL)
            for key in was:
                if was[key] != now[key]:
                    raise UserError(
                        f"{groups} was made with features.{name}.{key} = {was[key]!r}, and the recipe says "
                        f"{now[key]!r}: {again}"
                    )
        return dataclasses.replace(self, features={name: features[name] for name in self.features})

    def to_json(self) -> dict[str, object]:
        """Return a JSON object; `order` keeps the features' order in files whose keys are sorted."""
        return {
            "features": {name: feature.model_dump() for name, feature in self.features.items()},
            "order": list(self.features),
            "vocab_sizes": self.vocab_sizes,
            "vocab_digest": self.vocab_digest,
            "block_groups": self.block_groups,
            "negative_rate": self.negative_rate,
        }

    def names(self, of: Sequence[str], kind: str = "id") -> list[str]:
        """Return the names of the features of these owners and this kind, in the recipe's order. A number's bucket is
        an id."""
        return [n for n, f in self.features.items() if f.of in of and (f.kind == "image") == (kind == "image")]


@dataclass(frozen=True)
class Ragged:
    """Lists of unequal length: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def slice(self, start: int, stop: int) -> "Ragged":
        """Return rows start to stop."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: Ints) -> "Ragged":
        """Return these rows in this order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = _offsets(lengths)
        inner = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.values[inner], offsets)


Column = Ints | Ragged


def _offsets(lengths: npt.ArrayLike) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _slice(column: Column, start: int, stop: int) -> Column:
    return column.slice(start, stop) if isinstance(column, Ragged) else column[start:stop]


def _take(column: Column, rows: Ints) -> Column:
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def _concat(columns: Sequence[Column]) -> Column:
    if isinstance(columns[0], Ragged):
        ragged = [c for c in columns if isinstance(c, Ragged)]
        return Ragged(
            np.concatenate([c.values for c in ragged]),
            _offsets(np.concatenate([np.diff(c.offsets) for c in ragged])),
        )
    return np.concatenate([c for c in columns if not isinstance(c, Ragged)])


@dataclass(frozen=True)
class Block:
    """Some groups with their samples and behaviours, as flat columns.

    `group` columns have a row a group, `sample` columns a row a sample, `behaviour` columns a row a behaviour;
    group i owns samples `sample_offsets[i]:sample_offsets[i + 1]`, and behaviours likewise.
    """

    group: dict[str, Column]
    sample: dict[str, Column]
    behaviour: dict[str, Column]
    sample_offsets: Ints
    behaviour_offsets: Ints

    @property
    def n_groups(self) -> int:
        return len(self.sample_offsets) - 1

    @property
    def n_samples(self) -> int:
        return int(self.sample_offsets[-1])

    def take(self, groups: Ints) -> "Block":
        """Return these groups in this order."""
        samples = Ragged(np.arange(self.n_samples), self.sample_offsets).take(groups)
        behaviours = Ragged(np.arange(self.behaviour_offsets[-1]), self.behaviour_offsets).take(groups)
        return Block(
            {n: _take(c, groups) for n, c in self.group.items()},
            {n: _take(c, samples.values) for n, c in self.sample.items()},
            {n: _take(c, behaviours.values) for n, c in self.behaviour.items()},
            samples.offsets,
            behaviours.offsets,
        )

    def samples(self, start: int, stop: int) -> "Block":
        """Return samples start to stop, with the groups that own them."""
        first = int(np.searchsorted(self.sample_offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.sample_offsets, stop, side="left"))
        b0, b1 = self.behaviour_offsets[first], self.behaviour_offsets[last]
        return Block(
            {n: _slice(c, first, last) for n, c in self.group.items()},
            {n: _slice(c, start, stop) for n, c in self.sample.items()},
            {n: _slice(c, b0, b1) for n, c in self.behaviour.items()},
            np.clip(self.sample_offsets[first : last + 1], start, stop) - start,
            self.behaviour_offsets[first : last + 1] - b0,
        )

    @staticmethod
    def concat(blocks: Sequence["Block"]) -> "Block":
        """Return the groups of several blocks, one after the other."""
        if len(blocks) == 1:
            return blocks[0]
        return Block(
            {n: _concat([b.group[n] for b in blocks]) for n in blocks[0].group},
            {n: _concat([b.sample[n] for b in blocks]) for n in blocks[0].sample},
            {n: _concat([b.behaviour[n] for b in blocks]) for n in blocks[0].behaviour},
            _offsets(np.concatenate([np.diff(b.sample_offsets) for b in blocks])),
            _offsets(np.concatenate([np.diff(b.behaviour_offsets) for b in blocks])),
        )


class GroupedData:
    """A split of a groups folder, read a shuffle block (a Parquet row group) at a time.

    Parameters
    ----------
    groups: the folder that `ctrkit group` wrote.
    split: "train", "valid" or "test".
    features: names of the features to read; others are left on disk.
    days: read the groups of these days only, the first and the last; None: of all.
    """

    def __init__(
        self,
        groups: Path,
        split: str,
        features: Sequence[str],
        days: tuple[datetime.date, datetime.date] | None = None,
    ) -> None:
        self.schema = Schema.read(groups)
        self.split = split
        self._in_days = pl.lit(True) if days is None else pl.col("day").is_between(*days)
        self.names = list(features)
        for name in features:
            if name not in self.schema.features:
                raise UserError(
                    f"{groups} has no feature {name!r}{nearest(name, self.schema.features)}. The model was made with "
                    "other [features]: train it again on these groups."
                )
        self._files = sorted((groups / split).glob("part-*.parquet"))
        if not self._files:
            raise UserError(f"{groups} has no {split} split; [split] in the recipe decides which days it has")
        self._blocks = [(f, start, n) for f in self._files for start, n in _row_groups(f, self.schema.block_groups)]

    def __len__(self) -> int:
        """The number of samples."""
        scan = pl.scan_parquet(self._files).filter(self._in_days).select(pl.col("sample_id").list.len().sum())
        return int(scan.collect().item())

    def frames(self, columns: Sequence[str], order: Sequence[int] | None = None) -> Iterator[pl.DataFrame]:
        """Yield these columns of each block, in file order or in the order given."""
        shared = [c for c in columns if c in self.schema.features and self.schema.features[c].of in _SHARED]
        for i in range(len(self._blocks)) if order is None else order:
            frame = self._read(*self._blocks[i], ["common", *columns])
            yield _resolve(frame, shared).filter(self._in_days).select(columns)

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[Block]:
        """Yield the blocks, in file order or in the order given."""
        for frame in self.whole_rows(range(len(self._blocks)) if order is None else order):
            yield self.block(frame)

    def whole_rows(self, order: Sequence[int]) -> Iterator[pl.DataFrame]:
        """Yield the rows of blocks, each with all of its features; no block without rows."""
        by_owner = self._by_owner()
        for i in order:
            frame = self._read(*self._blocks[i], [*META, "group_id", "common", *self.names])
            frame = _resolve(frame, [*by_owner[("user",)], *by_owner[("behaviour",)]])
            if (frame := frame.filter(self._in_days)).height:
                yield frame

    def find(self, condition: pl.Expr, columns: Sequence[str] = ()) -> pl.DataFrame:
        """Return these columns of the rows for which a condition on columns of groups/ holds, in file order, and
        `block`, the place of each in the order of the blocks. Only those columns are read."""
        found: list[pl.DataFrame] = []
        before = 0
        for file in self._files:
            rows = pl.scan_parquet(file, row_index_name=_ROW).filter(condition, self._in_days).select(_ROW, *columns)
            block = before + pl.col(_ROW).cast(pl.Int64) // self.schema.block_groups
            found.append(rows.select(*columns, block=block).collect())
            before += sum(of == file for of, _, _ in self._blocks)
        return pl.concat(found)

    def block(self, frame: pl.DataFrame) -> Block:
        """Return rows as `frames` yields them, with `sample_id`, `click`, `group_id` and the features, as a block."""
        return _block(frame, self._by_owner(), self.schema)

    def _by_owner(self) -> dict[tuple[str, ...], list[str]]:
        return {o: [n for n in self.names if self.schema.features[n].of in o] for o in _OWNERS}

    def _read(self, file: Path, start: int, n: int, columns: list[str]) -> pl.DataFrame:
        """Read rows of a file: these columns, and the day where it decides."""
        wanted = dict.fromkeys([*columns, *self._in_days.meta.root_names()])
        return pl.scan_parquet(file).slice(start, n).select(*wanted).collect()

    def epoch(self, batch: int, seed: Sequence[int] | None = None, skip: int = 0) -> Iterator[Block]:
        """Yield the samples in batches of exactly `batch` (the last one shorter), each with its groups.

        With a seed, blocks are shuffled and then the groups within each; samples of a group stay together. The first
        `skip` batches are left out, and blocks that only they need are not read.
        """
        return (block for block, _ in self.shares(batch, ALONE, seed, skip))

    def shares(
        self, batch: int, ranks: Ranks, seed: Sequence[int] | None = None, skip: int = 0
    ) -> Iterator[tuple[Block, int]]:
        """Yield of each batch of `epoch` (a rank's share, the samples of all).

        A share is neighbouring groups, perhaps none, cut where the samples are most evenly shared. Of the rows that are
        read only those of the share become columns.
        """
        rng = None if seed is None else np.random.default_rng(list(seed))
        order = list(range(len(self._blocks))) if rng is None else rng.permutation(len(self._blocks)).tolist()
        begin, left_out = 0, skip * batch
        while left_out and begin < len(order):
            samples_G = next(self.frames(["sample_id"], order[begin : begin + 1]))["sample_id"].list.len()
            if samples_G.sum() > left_out:
                break
            begin, left_out = begin + 1, left_out - int(samples_G.sum())
            if rng is not None and len(samples_G):
                rng.permutation(len(samples_G))
        waiting = _Waiting(left_out)
        for frame in self.whole_rows(order[begin:]):
            rows = np.arange(frame.height) if rng is None else rng.permutation(frame.height)
            waiting.add(frame, rows)
            yield from self._cut(waiting, waiting.samples // batch * batch, batch, ranks)
        yield from self._cut(waiting, waiting.samples, batch, ranks)

    def _cut(self, waiting: "_Waiting", samples: int, batch: int, ranks: Ranks) -> Iterator[tuple[Block, int]]:
        """Yield this rank's shares of the next `samples`, and take these from what is waiting."""
        if samples <= 0:  # where more was to be skipped than there is
            return
        offsets_G = waiting.offsets_G
        ends = [*range(waiting.given + batch, waiting.given + samples, batch), waiting.given + samples]
        starts = [waiting.given, *ends[:-1]]
        own = [_share(offsets_G, start, end, ranks) for start, end in zip(starts, ends, strict=True)]
        groups = [_groups(offsets_G, *share) for share in own]
        wanted_G = np.zeros(len(offsets_G) - 1, np.bool_)
        for first, last in groups:
            wanted_G[first:last] = True
        by_owner = self._by_owner()
        block = Block.concat([_block(frame[rows], by_owner, self.schema) for frame, rows in waiting.rows(wanted_G)])
        place_G: Ints = np.cumsum(wanted_G) - wanted_G
        for start, end, (begin, stop), (first, last) in zip(starts, ends, own, groups, strict=True):
            at = int(block.sample_offsets[place_G[first]] + begin - offsets_G[first]) if first < last else 0
            yield block.samples(at, at + stop - begin), end - start
        waiting.give(samples)


@dataclass
class _Waiting:
    """Groups that have been read, in the order of the epoch, until a batch is full."""

    given: int
    """Samples of the first groups that belong to earlier batches."""
    frames: list[tuple[pl.DataFrame, Ints, Ints]] = field(default_factory=list)
    """Rows that were read, which of them in which order, and how many samples each of these has."""

    def add(self, frame: pl.DataFrame, rows: Ints) -> None:
        """Take up rows of a frame."""
        self.frames.append((frame, rows, _ints(frame["sample_id"].list.len())[rows]))

    @property
    def offsets_G(self) -> Ints:
        """[G + 1] where each group's samples begin."""
        return _offsets(np.concatenate([np.zeros(0, np.int64), *(lengths for _, _, lengths in self.frames)]))

    @property
    def samples(self) -> int:
        """How many are waiting."""
        return int(self.offsets_G[-1]) - self.given

    def rows(self, wanted_G: npt.NDArray[np.bool_]) -> Iterator[tuple[pl.DataFrame, Ints]]:
        """Yield the wanted rows of each frame that has some; where none is wanted, none of the first."""
        begin = 0
        for i, (frame, rows, _) in enumerate(self.frames):
            wanted = wanted_G[begin : begin + len(rows)]
            begin += len(rows)
            if wanted.any() or (i == 0 and not wanted_G.any()):
                yield frame, rows[wanted]

    def give(self, samples: int) -> None:
        """Take out so many samples."""
        self.given += samples
        while self.frames:
            frame, rows, lengths = self.frames[0]
            offsets_G = _offsets(lengths)
            whole = int(np.searchsorted(offsets_G, self.given, side="right")) - 1
            self.given -= int(offsets_G[whole])
            if whole < len(rows):
                self.frames[0] = frame, rows[whole:], lengths[whole:]
                return
            del self.frames[0]


def _share(offsets_G: Ints, start: int, stop: int, ranks: Ranks) -> tuple[int, int]:
    """Return a rank's part of the samples from start to stop: of neighbouring groups, as evenly as can be."""
    if ranks.count == 1:
        return start, stop
    first, last = _groups(offsets_G, start, stop)
    edges = np.clip(offsets_G[first : last + 1], start, stop)
    targets = start + (stop - start) * np.arange(ranks.count + 1) / ranks.count
    after = np.searchsorted(edges, targets)
    before = np.maximum(after - 1, 0)
    cuts = edges[np.where(targets - edges[before] <= edges[after] - targets, before, after)]
    return int(cuts[ranks.rank]), int(cuts[ranks.rank + 1])


def _groups(offsets_G: Ints, start: int, stop: int) -> tuple[int, int]:
    """Return the first of the groups that have the samples from start to stop, and the one after the last."""
    if start == stop:
        return 0, 0
    return int(np.searchsorted(offsets_G, start, side="right")) - 1, int(np.searchsorted(offsets_G, stop, side="left"))


_ROW = "row of the file"
_SHARED = ("user", "behaviour")
_OWNERS: tuple[tuple[str, ...], ...] = (("user",), ("ad", "scene"), ("behaviour",))


def _row_groups(file: Path, size: int) -> list[tuple[int, int]]:
    """Return (first row, rows) of each row group of a Parquet file whose groups have `size` rows."""
    n = int(pl.scan_parquet(file).select(pl.len()).collect().item())
    return [(start, min(size, n - start)) for start in range(0, n, size)]


def _resolve(frame: pl.DataFrame, shared: list[str]) -> pl.DataFrame:
    """Give every row of a block the features that it shares with the row `common`."""
    common = frame["common"].to_numpy()
    if not shared or (common == np.arange(frame.height)).all():
        return frame
    return frame.with_columns(frame.select(shared)[common])


def _explode(series: pl.Series) -> pl.Series:
    return series.filter(series.list.len() > 0).explode()


def _ints(series: pl.Series) -> Ints:
    return series.cast(pl.Int64).to_numpy()


def _ragged(series: pl.Series) -> Ragged:
    return Ragged(_ints(_explode(series)), _offsets(series.list.len().to_numpy()))


def _block(frame: pl.DataFrame, by_owner: dict[tuple[str, ...], list[str]], schema: Schema) -> Block:
    def column(series: pl.Series, name: str) -> Column:
        return _ragged(series) if schema.features[name].multi_hot else _ints(series)

    user, sample, behaviour = (by_owner[o] for o in _OWNERS)
    samples: dict[str, Column] = {n: _ints(_explode(frame[n])) for n in META}
    samples.update((n, column(_explode(frame[n]), n)) for n in sample)
    histories = frame[behaviour[0]].list.len().to_numpy() if behaviour else np.zeros(frame.height, np.int64)
    users: dict[str, Column] = {"group_id": _ints(frame["group_id"])}
    users.update((n, column(frame[n], n)) for n in user)
    return Block(
        users,
        samples,
        {n: _ints(_explode(frame[n])) for n in behaviour},
        _offsets(frame["sample_id"].list.len().to_numpy()),
        _offsets(histories),
    )
