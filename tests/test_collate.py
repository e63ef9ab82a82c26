"""Batches against the groups they were made from, sample by sample."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctrkit.collate import Collator
from ctrkit.modelfile import TrainedModel, build
from ctrkit.models.batch import Batch
from ctrkit.recipe import Train
from tests.models.reference import PictureVectors, pictures
from tests.small_groups import FEATURES, SCHEMA, SIZES, Group, alone, random_groups, some_groups, to_block

ONE_HOT = ["gender", "scene", "ad_id", "ad_goods", "ad_brand"]
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


def per_sample(made: TrainedModel, groups: list[Group], found: dict[str, list[int]]) -> dict[str, list[int]]:
    """Repeat the user features a sample, so that any grouping compares."""
    lengths = [len(g.samples) for g in groups]
    return {
        name: np.repeat(values, lengths).tolist() if FEATURES[name].of == "user" else values
        for name, values in found.items()
        if name in ONE_HOT
    }


def test_unknown_ids_do_not_depend_on_batching_or_grouping(vectors: PictureVectors) -> None:
    made, groups = model(vectors), random_groups(3, [3] * 40, [1] * 40)
    whole = per_sample(made, groups, unknown(made, groups, (1, 0), 0.1))
    apart = alone(groups)
    assert per_sample(made, apart, unknown(made, apart, (1, 0), 0.1)) == whole
    halves = [
        per_sample(made, part, unknown(made, part, (1, 0), 0.1)) for part in (groups[:17], groups[17:])
    ]
    assert {n: halves[0][n] + halves[1][n] for n in whole} == whole
    other_epoch = per_sample(made, groups, unknown(made, groups, (1, 1), 0.1))
    plain = per_sample(made, groups, unknown(made, groups, None, 0.0))
    for name in ONE_HOT:
        assert whole[name] != plain[name]
        assert whole[name] != other_epoch[name]
        changed = [(a, b) for a, b in zip(plain[name], whole[name], strict=True) if a != b]
        assert all(b == 1 and a > 1 for a, b in changed)


def test_nothing_becomes_unknown_without_a_rate_or_outside_training(vectors: PictureVectors) -> None:
    made, groups = model(vectors), some_groups()
    plain = unknown(made, groups, None, 0.0)
    assert unknown(made, groups, (1, 0), 0.0) == plain
    assert unknown(made, groups, None, 0.9) == plain
