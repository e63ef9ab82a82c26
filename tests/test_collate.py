"""Batches against the groups they were made from, sample by sample."""

from typing import Any

import numpy as np
import pytest
import torch

from ctrkit.collate import Collator
from ctrkit.modelfile import TrainedModel, build
from ctrkit.models.batch import Batch
from ctrkit.recipe import Train
from tests.models.reference import PictureVectors, pictures
from tests.small_groups import FEATURES, SCHEMA, SIZES, Group, alone, random_groups, some_groups, to_block

COUNTS = {vocab: np.full(size, 3, np.int64) for vocab, size in SIZES.items()}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> PictureVectors:
    return pictures(tmp_path_factory.mktemp("pictures"))[0]


def model(vectors: PictureVectors) -> TrainedModel:
    return build(Train(model="dicm", user_ids=True, extractor=(3,)), SCHEMA, COUNTS, vectors)


def index_of(made: TrainedModel, batch: Batch, name: str) -> list[int]:
    """Return the vocabulary indexes that a batch's positions stand for."""
    width = FEATURES[name].width
    rows = batch.rows[width][batch.index[name]].numpy()
    start = made.tables[width].offsets[FEATURES[name].vocab]
    return [int(row - start) if row else 0 for row in rows]


def test_a_batch_names_what_the_groups_hold(vectors: PictureVectors) -> None:
    made, groups = model(vectors), some_groups()
    batch = Collator(made.plan, made.tables, made.pictures)(to_block(groups))
    samples = [(g, s) for g, group in enumerate(groups) for s in group.samples]
    behaviours = [(g, b) for g, group in enumerate(groups) for b in group.behaviours]
    assert batch.n_groups == len(groups)
    assert batch.n_samples == len(samples)
    assert batch.click_S.tolist() == [s["click"] for _, s in samples]
    assert batch.click_S.dtype == torch.float32
    assert batch.group_S.tolist() == [g for g, _ in samples]
    assert batch.group_B.tolist() == [g for g, _ in behaviours]
    pairs = [(s, b) for s, (g, _) in enumerate(samples) for b, (h, _) in enumerate(behaviours) if g == h]
    assert list(zip(batch.sample_P.tolist(), batch.behaviour_P.tolist(), strict=True)) == pairs
    owners = {"user": [g.user for g in groups], "behaviour": [b for _, b in behaviours]}
    for name in made.plan.ids:
        rows = owners.get(FEATURES[name].of, [s for _, s in samples])
        if FEATURES[name].multi_hot:
            assert index_of(made, batch, name) == [v for row in rows for v in row[name]]
            assert batch.segment[name].tolist() == [i for i, row in enumerate(rows) for _ in row[name]]
        else:
            assert index_of(made, batch, name) == [row[name] for row in rows]
    for rows_U in batch.rows.values():
        assert rows_U.tolist() == sorted(set(rows_U.tolist()))
    for name, rows in (("ad_image", [s for _, s in samples]), ("image", owners["behaviour"])):
        found = batch.picture_NW[name][batch.picture_index[name]]
        for row, vector in zip(rows, found, strict=True):
            alone_NW, position = vectors.gather(np.array([row[name]]))
            assert torch.equal(vector, alone_NW[position[0]])


def unknown(made: TrainedModel, groups: list[Group], seed: tuple[int, ...] | None, rate: float) -> dict[str, list[int]]:
    collate = Collator(made.plan, made.tables, made.pictures, COUNTS, rate)
    batch = collate(to_block(groups), seed)
    return {name: index_of(made, batch, name) for name in made.plan.ids}


def per_sample(groups: list[Group], found: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Return for each sample what it sees of every feature, a history expanded to the samples of its group."""
    left = {name: iter(values) for name, values in found.items()}

    def take(name: str, owner: dict[str, Any]) -> list[int]:
        n = len(owner[name]) if FEATURES[name].multi_hot else 1
        return [next(left[name]) for _ in range(n)]

    out = []
    for group in groups:
        of_group = {n: take(n, group.user) for n in found if FEATURES[n].of == "user"}
        histories = [n for n in found if FEATURES[n].of == "behaviour"]
        of_group |= {n: [v for b in group.behaviours for v in take(n, b)] for n in histories}
        for sample in group.samples:
            out.append(of_group | {n: take(n, sample) for n in found if n not in of_group})
    assert all(next(values, None) is None for values in left.values())
    return out


def test_unknown_ids_do_not_depend_on_batching_or_grouping(vectors: PictureVectors) -> None:
    made, groups = model(vectors), random_groups(3, [3] * 40, [2] * 40)
    whole = per_sample(groups, unknown(made, groups, (1, 0), 0.3))
    apart = alone(groups)
    assert per_sample(apart, unknown(made, apart, (1, 0), 0.3)) == whole
    halves = [per_sample(part, unknown(made, part, (1, 0), 0.3)) for part in (groups[:17], groups[17:])]
    assert halves[0] + halves[1] == whole
    other_epoch = per_sample(groups, unknown(made, groups, (1, 1), 0.3))
    plain = per_sample(groups, unknown(made, groups, None, 0.0))
    for name in made.plan.ids:
        assert [s[name] for s in whole] != [s[name] for s in other_epoch]
        pairs = [p for s, t in zip(plain, whole, strict=True) for p in zip(s[name], t[name], strict=True)]
        changed = [(before, after) for before, after in pairs if before != after]
        assert changed
        assert all(before > 1 and after == 1 for before, after in changed)


def test_an_id_twice_in_a_list_is_unknown_twice_or_not_at_all(vectors: PictureVectors) -> None:
    made, groups = model(vectors), random_groups(3, [2] * 60, [4] * 60)
    for group in groups:
        for behaviour in group.behaviours:
            behaviour["goods"] = group.behaviours[0]["goods"]
    goods = np.array(unknown(made, groups, (1, 0), 0.3)["goods"]).reshape(60, 4)
    assert (goods == goods[:, :1]).all()
    assert 5 < (goods[:, 0] == 1).sum() < 55


def test_rare_ids_become_unknown_more_often(vectors: PictureVectors) -> None:
    """Each id by its own count: here the brand 2 was seen once, the others a million times."""
    made, groups = model(vectors), random_groups(4, [20] * 100, [0] * 100)
    counts = COUNTS | {"brand": np.array([0, 0, 1, 10**6, 10**6])}
    collate = Collator(made.plan, made.tables, made.pictures, counts, 0.01)
    after = np.array(index_of(made, collate(to_block(groups), (1, 0)), "ad_brand"))
    before = np.array([s["ad_brand"] for g in groups for s in g.samples])
    assert abs((after[before == 2] == 1).mean() - 0.5) < 0.12
    assert (after[before > 2] == 1).mean() < 0.04


def test_nothing_becomes_unknown_without_a_rate_or_outside_training(vectors: PictureVectors) -> None:
    made, groups = model(vectors), some_groups()
    plain = unknown(made, groups, None, 0.0)
    assert unknown(made, groups, (1, 0), 0.0) == plain
    assert unknown(made, groups, None, 0.9) == plain


def kept(made: TrainedModel, groups: list[Group], seed: tuple[int, ...] | None) -> list[tuple[bool, ...]]:
    """Return for each sample which behaviours of its history it sees."""
    batch = Collator(made.plan, made.tables, made.pictures)(to_block(groups), seed)
    if batch.kept_P is None:
        return [tuple([True] * len(g.behaviours)) for g in groups for _ in g.samples]
    found = list(zip(batch.sample_P.tolist(), batch.kept_P.tolist(), strict=True))
    ids, _ = batch.id_pairs()
    assert ids.tolist() == [s for s, keep in found if keep]
    return [tuple(k for s, k in found if s == sample) for sample in range(batch.n_samples)]


def test_dropout_does_not_depend_on_batching_or_grouping() -> None:
    train = Train(model="din", regularisation="dropout", dropout_rate=0.3)
    made, groups = build(train, SCHEMA, COUNTS, None), random_groups(3, [3, 0, 2] * 20, [4, 1, 0] * 20)
    whole = kept(made, groups, (1, 0))
    assert kept(made, alone(groups), (1, 0)) == whole
    assert kept(made, groups[:17], (1, 0)) + kept(made, groups[17:], (1, 0)) == whole
    assert kept(made, groups[::-1], (1, 0)) != whole
    assert kept(made, groups, (1, 1)) != whole
    draws = [k for sample in whole for k in sample]
    assert abs(np.mean(draws) - 0.7) < 0.1
    assert len(set(whole[:3])) > 1  # samples that share a history draw for themselves
    assert all(all(sample) for sample in kept(made, groups, None))  # outside training nothing is discarded
    plain = build(Train(model="din"), SCHEMA, COUNTS, None)
    assert all(all(sample) for sample in kept(plain, groups, (1, 0)))


def test_only_the_most_frequent_ids_of_behaviours_are_kept() -> None:
    """Of every vocabulary that behaviours have, also where ads use it; in training and after."""
    counts = COUNTS | {"goods": np.array([0, 9, 1, 5, 2, 7, 0, 5, 1]), "brand": np.array([0, 0, 1, 2, 3])}
    made = build(Train(model="din", regularisation="filter", filter_top=3), SCHEMA, counts, None)
    groups = random_groups(5, [3] * 20, [4] * 20)
    batch = Collator(made.plan, made.tables, made.pictures, counts)(to_block(groups))
    owners = {"ad": [s for g in groups for s in g.samples], "behaviour": [b for g in groups for b in g.behaviours]}
    for name in ("goods", "ad_goods", "brand", "ad_brand", "ad_id"):
        known = {"goods": {0, 1, 5, 3, 7}, "brand": {0, 1, 2, 3, 4}}.get(FEATURES[name].vocab, set(range(99)))
        before = [row[name] for row in owners[FEATURES[name].of]]
        assert index_of(made, batch, name) == [i if i in known else 1 for i in before]
    assert [n for n in made.tensors() if n.startswith("frequent")] == ["frequent.goods"]
