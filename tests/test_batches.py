"""Blocks and epochs: every sample once, groups together, as the files say."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit.batches import Block, GroupedData, Ragged, Schema
from ctrkit.errors import UserError
from tests.small_groups import FEATURES, SCHEMA, Group, alone, random_groups, some_groups, to_block, write_groups

ALL = list(FEATURES)


def equal(a: Block, b: Block) -> None:
    """Check that two blocks hold the same."""
    np.testing.assert_array_equal(a.sample_offsets, b.sample_offsets)
    np.testing.assert_array_equal(a.behaviour_offsets, b.behaviour_offsets)
    for one, other in ((a.group, b.group), (a.sample, b.sample), (a.behaviour, b.behaviour)):
        assert one.keys() == other.keys()
        for name in one:
            x, y = one[name], other[name]
            assert isinstance(x, Ragged) == isinstance(y, Ragged)
            if isinstance(x, Ragged) and isinstance(y, Ragged):
                np.testing.assert_array_equal(x.offsets, y.offsets)
                x, y = x.values, y.values
            np.testing.assert_array_equal(x, y)
            assert isinstance(x, np.ndarray)
            assert x.dtype == np.int64


@pytest.fixture(scope="module")
def many() -> list[Group]:
    rng = np.random.default_rng(3)
    return random_groups(2, rng.integers(1, 6, 33).tolist(), rng.integers(0, 4, 33).tolist())


@pytest.fixture(scope="module")
def folder(many: list[Group], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four part files of at most ten groups, each of Parquet row groups of four, the last ones shorter."""
    return write_groups(tmp_path_factory.mktemp("groups") / "groups", {"train": many, "valid": []})


def ids(block: Block) -> list[int]:
    return np.asarray(block.sample["sample_id"]).tolist()


def test_take_and_concat() -> None:
    groups = some_groups()
    block = to_block(groups)
    for order in ([3, 0, 6, 1], [0], [], [5, 5, 2]):
        equal(block.take(np.array(order, np.int64)), to_block([groups[i] for i in order]))
    equal(Block.concat([to_block(groups[:3]), to_block(groups[3:4]), to_block(groups[4:])]), block)
    assert Block.concat([block]) is block


def test_every_cut_of_samples() -> None:
    """Samples start to stop come with the groups that own them, cut where the batch is cut."""
    groups = some_groups()
    block = to_block(groups)
    whole = [(g, s) for g, group in enumerate(groups) for s in group.samples]
    assert block.n_samples == len(whole)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            cut = []
            for g in sorted({g for g, _ in whole[start:stop]}):
                one = groups[g]
                own = [s for g_, s in whole[start:stop] if g_ == g]
                cut.append(Group(one.user, one.behaviours, own, one.group_id))
            equal(block.samples(start, stop), to_block(cut))


def test_files_are_read_as_written(folder: Path, many: list[Group]) -> None:
    data = GroupedData(folder, "train", ALL)
    assert len(data) == sum(len(g.samples) for g in many)
    blocks = list(data.blocks())
    assert [b.n_groups for b in blocks] == [4, 4, 2] * 3 + [3]
    equal(Block.concat(blocks), to_block(many))
    equal(Block.concat(list(data.blocks([9, 0]))), to_block(many[30:33] + many[:4]))
    frames = pl.concat(list(data.frames(["group_id", "ad"])))
    assert frames["group_id"].to_list() == [g.group_id for g in many]


def test_rows_of_a_split_group_share_what_the_first_carries(many: list[Group], tmp_path: Path) -> None:
    """A row a sample in the files: readers see each with all features, whichever they ask for."""
    rows = alone(many)
    assert len(rows) > 2 * len(many)
    folder = write_groups(tmp_path / "groups", {"train": rows})
    stored = pl.read_parquet(folder / "train" / "part-*.parquet")
    followers = stored.filter(pl.col("common") != pl.int_range(pl.len()) % 10 % 4)
    assert followers.height > len(many)
    assert set(followers["gender"]) == {0}
    assert followers["goods"].list.len().max() == 0
    data = GroupedData(folder, "train", ALL)
    equal(Block.concat(list(data.blocks())), to_block(rows))
    assert len(data) == len(rows)
    for few in (["gender", "goods", "ad_tags"], ["colour", "scene"], ["tags", "image"]):
        some = Block.concat(list(GroupedData(folder, "train", few).blocks()))
        equal(some, to_block(rows, {n: FEATURES[n] for n in few}))
    without = Block.concat(list(GroupedData(folder, "train", ["scene"]).blocks()))
    assert np.asarray(without.sample["scene"]).tolist() == [s["scene"] for g in rows for s in g.samples]
    frame = pl.concat(list(data.frames(["goods", "gender", "user"])))
    assert frame["goods"].to_list() == [[b["goods"] for b in g.behaviours] for g in rows]
    assert frame["gender"].to_list() == [g.user["gender"] for g in rows]
    assert pl.concat(list(data.frames(["group_id"])))["group_id"].to_list() == [g.group_id for g in rows]
    by_id = {s["sample_id"]: (g, s) for g in rows for s in g.samples}
    for block in data.epoch(7, (1, 2)):
        equal(block, to_block([by_id[i][0] for i in ids(block)]))


def test_features_that_are_not_asked_for_are_left(folder: Path, many: list[Group]) -> None:
    few = ["gender", "ad_tags", "colour"]
    block = Block.concat(list(GroupedData(folder, "train", few).blocks()))
    equal(block, to_block(many, {n: FEATURES[n] for n in few}))
    without = Block.concat(list(GroupedData(folder, "train", ["scene"]).blocks()))
    assert not without.behaviour
    assert not without.behaviour_offsets.any()


@pytest.mark.parametrize("batch", [1, 7, 30, 10_000])
@pytest.mark.parametrize("seed", [None, (1, 0), (1, 1)])
def test_an_epoch_has_every_sample_once(
    folder: Path, many: list[Group], batch: int, seed: tuple[int, ...] | None
) -> None:
    batches = list(GroupedData(folder, "train", ALL).epoch(batch, seed))
    n = sum(len(g.samples) for g in many)
    assert [b.n_samples for b in batches] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    whole = [s["sample_id"] for g in many for s in g.samples]
    order = [i for b in batches for i in ids(b)]
    assert sorted(order) == whole
    assert (order == whole) == (seed is None)
    # A group's samples follow one another, in their own order.
    owner = {s["sample_id"]: g.group_id for g in many for s in g.samples}
    starts = [i for i, s in enumerate(order) if i == 0 or owner[order[i - 1]] != owner[s]]
    assert len(starts) == len(many)
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        assert order[start:stop] == sorted(order[start:stop])
    # Each sample still has its own features, its group's and its group's history.
    by_id = {s["sample_id"]: (g, s) for g in many for s in g.samples}
    for block in batches:
        expected: list[Group] = []
        for i in ids(block):
            group, sample = by_id[i]
            if not expected or expected[-1].group_id != group.group_id:
                expected.append(Group(group.user, group.behaviours, [], group.group_id))
            expected[-1].samples.append(sample)
        equal(block, to_block(expected))


def test_shuffles_differ_by_epoch_and_repeat_by_seed(folder: Path) -> None:
    data = GroupedData(folder, "train", ["ad_id"])

    def order(*seed: int) -> list[int]:
        return [i for b in data.epoch(7, seed) for i in ids(b)]

    assert order(1, 0) == order(1, 0)
    different = {tuple(order(*seed)) for seed in ((1, 0), (1, 1), (2, 0), (2, 1))}
    assert len(different) == 4


def test_the_order_does_not_depend_on_the_batch(folder: Path) -> None:
    data = GroupedData(folder, "train", ["ad_id"])
    orders = {tuple(i for b in data.epoch(batch, (3, 2)) for i in ids(b)) for batch in (1, 5, 64, 1000)}
    assert len(orders) == 1


@pytest.mark.parametrize("batch", [1, 7, 30, 10_000])
@pytest.mark.parametrize("seed", [None, (1, 0)])
def test_an_epoch_goes_on_after_any_batch(folder: Path, batch: int, seed: tuple[int, ...] | None) -> None:
    """The rest is the same to the number, and blocks before it are not read."""

    class Watched(GroupedData):
        asked: Sequence[int] | None = None

        def whole_rows(self, order: Sequence[int]) -> Iterator[pl.DataFrame]:
            self.asked = order
            return super().whole_rows(order)

    data = Watched(folder, "train", ALL)
    whole = list(data.epoch(batch, seed))
    order = data.asked
    assert order is not None
    for skip in {*range(0, len(whole), 1 + len(whole) // 9), len(whole) - 1, len(whole)}:
        rest = list(data.epoch(batch, seed, skip=skip))
        assert len(rest) == len(whole) - skip
        for found, expected in zip(rest, whole[skip:], strict=True):
            equal(found, expected)
        sizes = [sum(f["sample_id"].list.len()) for f in data.frames(["sample_id"], order)]
        before = np.cumsum(sizes)
        assert data.asked == list(order)[int((before <= skip * batch).sum()) :]


def test_every_group_can_come_first(folder: Path, many: list[Group]) -> None:
    """Blocks are shuffled, and groups within them: no place in the file is privileged."""
    data = GroupedData(folder, "train", ["ad_id"])
    first = Counter(int(np.asarray(next(data.epoch(1, (seed,))).group["group_id"])[0]) for seed in range(300))
    assert len(first) > 0.9 * len(many)
    assert max(first.values()) < 40


def test_schema_goes_to_json_and_back_in_any_order_of_keys() -> None:
    """The order of the features is the order of a model's inputs: it must live through a file with sorted keys."""
    back = Schema.from_json(json.loads(json.dumps(SCHEMA.to_json(), sort_keys=True)))
    assert back == SCHEMA
    assert list(back.features) == list(FEATURES)
    assert list(FEATURES) != sorted(FEATURES)


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a groups folder: it has no schema.json"):
        Schema.read(tmp_path)
    with pytest.raises(UserError, match=r"has no test split; \[split\] in the recipe decides"):
        GroupedData(folder, "test", ALL)
    with pytest.raises(UserError, match="has no valid split"):
        GroupedData(folder, "valid", ALL)
    with pytest.raises(UserError, match="has no feature 'brands'; did you mean 'brand'"):
        GroupedData(folder, "train", ["brands"])
    (tmp_path / "schema.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Schema.read(tmp_path)
