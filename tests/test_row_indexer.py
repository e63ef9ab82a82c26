"""Rows side by side, whether indexed together or each by itself, against one value after the other."""

import random
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrkit.raw_values import Indexer
from ctrkit.recipe import Feature
from ctrkit.row_indexer import Counts, RowIndexer

FEATURES = {
    "ad_id": Feature(of="ad", vocab="id"),
    "place": Feature(of="scene", vocab="id"),
    "price": Feature(of="ad", kind="number", edges=(0.5, 1.0), vocab="price"),
    "hashed": Feature(of="scene", hash_buckets=5),
    "tags": Feature(of="ad", multi_hot=True, vocab="id"),
    "moods": Feature(of="scene", multi_hot=True, vocab="id"),
}
VALUES: dict[str, list[Any]] = {
    "ad_id": ["a", "b", "nobody", "", None, 7, 7.0],
    "place": ["a", "c", "nobody", "", None],
    "price": [0.1, "0.7", 3, None, "no number"],
    "hashed": ["a", "b", 7, None, ""],
    "tags": ["a|b", ["a", 7], [], None, "nobody", ""],
    "moods": ["c|nobody", ["b"], [], None],
}
IDS, LISTS = ["ad_id", "place", "price", "hashed"], ["tags", "moods"]


@pytest.fixture(scope="module")
def indexers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Indexer]:
    folder = tmp_path_factory.mktemp("vocab")
    tables = {"id": ["a", "b", "c", "7"], "price": ["x < 0.5", "0.5 <= x < 1.0", "1.0 <= x"]}
    for name, values in tables.items():
        index = pl.Series(range(2, 2 + len(values)), dtype=pl.UInt32)
        pl.DataFrame({"value": values, "index": index, "count": [1] * len(values)}).write_parquet(
            folder / f"{name}.parquet"
        )
    return {name: Indexer(feature, folder) for name, feature in FEATURES.items()}


def row(rng: random.Random, names: list[str]) -> dict[str, Any]:
    return {name: rng.choice(VALUES[name]) for name in rng.sample(names, rng.randrange(len(names) + 1))}


@pytest.mark.parametrize("seed", range(60))
def test_rows_side_by_side(seed: int, indexers: dict[str, Indexer]) -> None:
    rng = random.Random(seed)
    of_scene = [name for name, feature in FEATURES.items() if feature.of == "scene"]
    rows = [row(rng, list(FEATURES)) for _ in range(rng.randrange(6))]
    if seed % 3 == 0:  # all have the same features
        rows = [{name: rng.choice(VALUES[name]) for name in rows[0]} for _ in rows] if rows else rows
    scene = row(rng, of_scene)
    indexer = RowIndexer(FEATURES, IDS, LISTS, "", indexers, None)
    expected: dict[str, list[Any]] = {name: [] for name in FEATURES}
    unknown: Counts = {}
    for name, feature in FEATURES.items():
        for one in rows:
            value = one[name] if name in one else scene.get(name) if feature.of == "scene" else None
            index = indexers[name].many(value) if feature.multi_hot else indexers[name].one([value])[0]
            expected[name].append(index)
            kinds = [*(["missing"] if index in (0, []) else []), *["unknown"] * np.sum(np.equal(index, 1))]
            for kind in kinds:
                unknown.setdefault(name, {}).setdefault(kind, 0)
                unknown[name][kind] += 1
    together, alone = indexer.index(rows), [indexer.index([one]) for one in rows]
    assert together.index_NC.tolist() == [one.index_NC[0].tolist() for one in alone]
    for _ in range(2):  # rows do not change when they are used
        found = indexer.inputs(together, scene)
        assert found.ids_NF.shape == (len(rows), 4)
        assert found.ids_NF.T.tolist() == [expected[name] for name in IDS]
        for name in LISTS:
            assert min(found.lists[name].shape[1], 2) == 2
            assert [[i for i in some if i] for some in found.lists[name].tolist()] == expected[name]
        assert found.unknown == unknown
        found.ids_NF[:] = 99
        for index_NV in found.lists.values():
            index_NV[:] = 99
        together = indexer.index(rows)


def test_rows_of_which_nothing_is_read(indexers: dict[str, Indexer]) -> None:
    indexer = RowIndexer(FEATURES, [], [], "", indexers, None)
    assert not indexer.reads
    assert len(indexer.inputs(indexer.index([{"ad_id": "a"}, {}])).ids_NF) == 2
