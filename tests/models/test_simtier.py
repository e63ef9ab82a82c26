"""SimTier's counts: known angles, missing pictures, the edges of the tiers, and the cosines against loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrkit.models.batch import Batch
from ctrkit.models.simtier import similarities_P, tier_counts
from tests.models.reference import PICTURE_WIDTH, collate, make, pictures, run
from tests.small_groups import some_groups

NORTH, EAST, SOUTH, NONE = [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [0.0, 0.0]
SOMEWHAT_EAST = [0.6, 0.8]


def batch_of(ads: list[list[float]], histories: list[list[list[float]]], dtype: torch.dtype = torch.float32) -> Batch:
    """Return a batch of a sample a group, each with its ad's vector and its history of vectors."""
    n = [len(h) for h in histories]
    users = [v for h in histories for v in h]
    sample = torch.repeat_interleave(torch.arange(len(ads)), torch.tensor(n))
    return Batch(
        click_S=torch.zeros(len(ads)),
        group_S=torch.arange(len(ads)),
        group_B=sample,
        sample_P=sample,
        behaviour_P=torch.arange(len(users)),
        n_groups=len(ads),
        rows={},
        index={},
        segment={},
        picture_NW={
            "ad": torch.tensor(ads, dtype=dtype),
            "user": torch.tensor(users, dtype=dtype).reshape(-1, len(ads[0])),
        },
        picture_index={"ad": torch.arange(len(ads)), "user": torch.arange(len(users))},
    )


def counts(batch: Batch, tiers: int, width: int = 2) -> list[list[float]]:
    cosine_P, there_P = similarities_P(batch, "ad", "user", width)
    found: list[list[float]] = tier_counts(cosine_P, there_P, batch.sample_P, batch.n_samples, tiers).tolist()
    return found


def test_known_angles() -> None:
    """1 lies in the last tier, −1 in the first, 0 in the first of the upper half; length does not count."""
    history = [NORTH, [0.0, 5.0], EAST, SOUTH, SOMEWHAT_EAST]
    batch = batch_of([NORTH, EAST, SOUTH], [history, history, []])
    assert counts(batch, 4) == [[1, 0, 1, 3], [0, 0, 3, 2], [0, 0, 0, 0]]
    assert counts(batch, 5) == [[1, 0, 1, 0, 3], [0, 0, 3, 0, 2], [0] * 5]
    assert counts(batch, 1) == [[5], [5], [0]]


@pytest.mark.parametrize("tiers", [2, 3, 10, 20, 1000])
def test_equal_and_opposite_pictures_are_in_the_outermost_tiers(tiers: int) -> None:
    """Whatever rounding makes of them: cosines beyond 1 and −1 too."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 37))).float()
    batch = batch_of(x.tolist(), [[v, (-np.array(v) * 3).tolist()] for v in x.tolist()])
    cosine_P, _ = similarities_P(batch, "ad", "user", 37)
    assert (cosine_P.abs() > 1).any()
    assert counts(batch, tiers, 37) == [[1.0, *[0.0] * (tiers - 2), 1.0]] * 300


def test_edges_belong_to_the_tier_above() -> None:
    cosine = torch.tensor([-1.0, -0.5, -0.500001, 0.0, 0.499999, 0.5, 1.0])
    found = tier_counts(cosine, torch.ones(7, dtype=torch.bool), torch.arange(7), 7, 4)
    assert found.argmax(1).tolist() == [0, 1, 0, 2, 2, 3, 3]
    assert found.sum(1).tolist() == [1.0] * 7


def test_missing_pictures_count_in_no_tier() -> None:
    """Neither as cosine 0 nor at all: of the user, and of the ad."""
    batch = batch_of([NORTH, NONE], [[NORTH, NONE, EAST], [NORTH, NONE]])
    assert counts(batch, 4) == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_the_flag_of_a_picture_is_no_part_of_the_angle() -> None:
    """`has_picture`: of opposite pictures, of a picture at the mean and of none."""
    batch = batch_of([[0.0, 1.0, 1.0]], [[[0.0, -1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    assert counts(batch, 4, width=2) == [[1, 0, 0, 0]]


@pytest.mark.parametrize("compiling", [False, True])
def test_cosines_against_loops(compiling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of histories that samples share and that hold a picture twice."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    vectors, by_index = pictures(tmp_path)
    groups = some_groups(4)
    groups[2].behaviours[0]["image"] = groups[2].behaviours[1]["image"] = 4
    model = make({"model": "dicm", "user_images": "simtier"}, vectors)
    batch = collate(model, groups)
    cosine_P, there_P = similarities_P(batch, "ad_image", "image", PICTURE_WIDTH)
    expected = []
    for g in groups:
        for s in g.samples:
            for b in g.behaviours:
                a, u = by_index[s["ad_image"]], by_index[b["image"]]
                norms = np.linalg.norm(a) * np.linalg.norm(u)
                expected.append(a @ u / norms if norms else np.nan)
    there = ~np.isnan(expected)
    assert {True, False} == set(there_P.tolist())
    np.testing.assert_array_equal(there_P, there)
    np.testing.assert_allclose(cosine_P[there_P], np.array(expected)[there], rtol=1e-12)


def test_a_cosine_does_not_depend_on_the_batch() -> None:
    """To the last bit in float32, so that no batch size moves a picture over the edge of a tier."""
    rng = np.random.default_rng(1)
    ads, users = rng.normal(size=(20, 129)), rng.normal(size=(20, 7, 129))

    def cosines(samples: range) -> Tensor:
        batch = batch_of([ads[s].tolist() for s in samples], [users[s].tolist() for s in samples])
        return similarities_P(batch, "ad", "user", 129)[0]

    whole = cosines(range(20))
    assert torch.equal(torch.cat([cosines(range(s, s + 1)) for s in range(20)]), whole)
    assert torch.equal(torch.cat([cosines(range(s, s + 5)) for s in range(0, 20, 5)]), whole)


def test_counts_are_no_part_of_the_gradient(tmp_path: Path) -> None:
    """The picture's vector is fixed; of the network only the discriminator learns from the counts."""
    vectors, _ = pictures(tmp_path)
    model = make({"model": "dicm", "user_images": "simtier", "ad_image": False, "tiers": 5}, vectors)
    names = [name for name, _ in model.network.named_parameters()]
    assert all(name.startswith("discriminator.") for name in names)
    found = run(model, some_groups(4), True)
    assert np.abs(found.gradients["discriminator.norm.weight"][-5:]).max() > 1e-12
