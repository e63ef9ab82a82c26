"""The work cut into partitions of users and shared among processes: the same rows, and the same bytes."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit.batches import GroupedData
from ctrkit.facts import read_facts
from ctrkit.grouping import ungroup
from ctrkit.partitions import days_there, read_by_day
from tests.shop import behaviours_of, ctrkit, random_rows, run_all, write

SETS = {"convert.partitions": 3, "group.max_samples": 2, "convert.negative_rate": 0.8}
SHARED = ["gender", "goods", "category", "image"]
OWN = ["ad_id", "ad_goods", "ad_tags", "ad_image", "position", "hour"]
OUTPUTS = ("convert", "behaviours", "groups")


def made(folder: Path, sets: Mapping[str, object]) -> Path:
    write(folder, **random_rows(12, users=40))
    run_all(folder, sets)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("one"), {**SETS, "convert.partitions": 1})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three partitions, two processes."""
    return made(tmp_path_factory.mktemp("three"), {**SETS, "workers": 2})


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every output file."""
    files = [p for name in OUTPUTS for p in sorted((folder / name).rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def table(folder: Path) -> pl.DataFrame:
    frame = read_by_day(folder, days_there(folder))
    assert frame is not None
    return frame


def test_partitions_change_the_order_only(one: Path, three: Path) -> None:
    assert read_facts(three / "convert")["partitions"] == 3
    for path in sorted((one / "convert" / "vocab").iterdir()):
        assert path.read_bytes() == (three / "convert" / "vocab" / path.name).read_bytes()
    goods = [pl.read_parquet(folder / "convert" / "goods.parquet") for folder in (one, three)]
    assert goods[0].equals(goods[1])
    keys = ["day", "user", "time", "ad"]
    samples = [table(folder / "convert" / "samples").drop("sample_id").sort(keys) for folder in (one, three)]
    assert samples[0].height > 300
    assert samples[0].equals(samples[1])
    keys = ["day", "user", "time", "text", "type", "dwell_ms"]
    logs = [behaviours_of(folder / "convert").sort(keys) for folder in (one, three)]
    assert logs[0].height > 500
    assert logs[0].equals(logs[1])
    histories = [table(folder / "behaviours").sort("day", "user") for folder in (one, three)]
    assert histories[0].height > 50
    assert histories[0].equals(histories[1])
    rejects = [pl.read_parquet(folder / "convert" / "rejects.parquet") for folder in (one, three)]
    assert rejects[0].sort(pl.all()).equals(rejects[1].sort(pl.all()))


def test_sample_ids_follow_day_partition_user_and_time(three: Path) -> None:
    following = 0
    parts_of: dict[str, set[str]] = {}
    for day in days_there(three / "convert" / "samples"):
        for path in sorted((three / "convert" / "samples" / f"day={day}").iterdir()):
            part = pl.read_parquet(path)
            assert part["sample_id"].to_list() == list(range(following, following + part.height))
            assert part.select("user", "time").rows() == sorted(part.select("user", "time").rows())
            following += part.height
            parts_of.setdefault(path.name, set()).update(part["user"])
    assert list(parts_of) == [f"part-{p:04}.parquet" for p in range(3)]
    assert sum(map(len, parts_of.values())) == len(set.union(*parts_of.values()))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_groups_hold_the_same(one: Path, three: Path, split: str) -> None:
    flat = []
    for folder in (one, three):
        groups = pl.read_parquet(folder / "groups" / split / "part-*.parquet")
        samples = ungroup(groups, SHARED, OWN).drop("sample_id").sort("day", "user", "time", "ad")
        flat.append(samples)
        pairs = groups.unique("group_id").select("user", "day").rows()
        assert max(Counter(pairs).values()) == 1
    assert flat[0].height > 0
    assert flat[0].equals(flat[1])
    firsts = groups.group_by("group_id").agg(pl.col("sample_id").list.first().min())
    assert firsts["group_id"].sort().equals(firsts["sample_id"].sort())  # so no two splits share an id
    for path in sorted((one / "groups" / "counts").iterdir()):
        assert path.read_bytes() == (three / "groups" / "counts" / path.name).read_bytes()


def test_training_comes_from_all_partitions_all_the_time(three: Path) -> None:
    """The files are of one partition each; an epoch mixes their blocks, and groups within them."""
    part_of: dict[str, int] = {}
    for path in (three / "convert" / "samples").glob("day=*/part-*.parquet"):
        part_of |= dict.fromkeys(pl.read_parquet(path)["user"], int(path.stem[-4:]))
    data = GroupedData(three / "groups", "train", ["gender"])
    frame = pl.concat(list(data.frames(["user", "group_id"]))).unique("group_id", maintain_order=True)
    user_of = dict(frame.select("group_id", "user").iter_rows())
    stored = np.array([part_of[user] for user in frame["user"]])
    assert stored.tolist() == sorted(stored)
    assert len(stored) > 60
    mixed = [int(g) for block in data.epoch(16, (1, 0)) for g in np.asarray(block.group["group_id"])]
    assert set(mixed) == set(user_of)
    order = np.array([part_of[user_of[g]] for g in mixed])
    for part in range(3):
        places = np.flatnonzero(order == part) / len(order)
        assert 0.3 < places.mean() < 0.7
        # Within a partition no day or user comes first.
        own = frame.filter(pl.Series(stored == part))["group_id"].to_numpy()
        assert abs(np.corrcoef(own, np.arange(len(own)))[0, 1]) < 0.5


def test_the_bytes_do_not_depend_on_the_workers(three: Path, tmp_path: Path) -> None:
    again = made(tmp_path, {**SETS, "workers": 1})
    assert contents(again) == contents(three)


def test_size_decides_where_the_recipe_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrkit.convert.PARTITION_BYTES", 4000)
    raw, recipe = write(tmp_path, **random_rows(3))
    logs = sum((raw / f"{name}.csv").stat().st_size for name in ("impressions", "clicks", "behaviours"))
    result = ctrkit("convert", "--recipe", recipe, "--raw", raw, "--out", tmp_path / "convert", "--set", "workers=1")
    assert result.exit_code == 0, result.output
    assert read_facts(tmp_path / "convert")["partitions"] == -(-logs // 4000) > 3


def test_more_partitions_than_users(tmp_path: Path) -> None:
    """Most partitions are empty, and some of the three lack the days of a split."""
    write(tmp_path, **random_rows(2, users=4))
    run_all(tmp_path, {"convert.partitions": 10})
    flat = [pl.read_parquet(tmp_path / "groups" / s / "*.parquet") for s in ("train", "valid", "test")]
    assert sum(frame["sample_id"].list.len().sum() for frame in flat) == 48
