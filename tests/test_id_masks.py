"""Which ids are trained as unknown, discarded or filtered: chances, and what a draw depends on."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from ctrkit.id_masks import dropout_mask, most_frequent, replace_unknown, unknown_mask, with_unknown

KEYS = np.arange(10_000, 210_000)


def mask(index: int, count: float, rate: float, seed: tuple[int, ...] = (1, 0)) -> npt.NDArray[np.bool_]:
    ones = np.ones(len(KEYS))
    return unknown_mask(KEYS, seed, (index * ones).astype(np.int64), count * ones, rate)


@pytest.mark.parametrize(
    ("count", "rate", "chance"),
    [(1, 0.01, 0.5), (2, 0.01, 0.255), (10, 0.01, 0.059), (1e9, 0.01, 0.01), (0, 0.01, 0.5), (1, 0.8, 0.8)],
)
def test_rate_of_unknown(count: float, rate: float, chance: float) -> None:
    """rate + (1/2 − rate)/n: within five standard errors of 200,000 draws."""
    found = mask(5, count, rate).mean()
    assert abs(found - chance) < 5 * math.sqrt(chance * (1 - chance) / len(KEYS))


def test_never_unknown() -> None:
    assert not mask(5, 1, 0.0).any()
    assert not mask(0, 1, 0.9).any()  # missing stays missing
    assert not mask(1, 1, 0.9).any()  # and is not drawn again where it is unknown already


def test_the_unknown_row_counts_the_samples_that_will_train_it() -> None:
    count = np.array([0, 3, 1, 10, 100])
    chances = [0.01 + 0.49 / n for n in (1, 10, 100)]
    expected = 3 + sum(n * p for n, p in zip((1, 10, 100), chances, strict=True))
    assert with_unknown(count, 0.01).tolist() == pytest.approx([0, expected, 1, 10, 100])
    assert with_unknown(count, 0.0).tolist() == count.tolist()


def test_the_draw_depends_on_key_id_and_seed_only() -> None:
    rng = np.random.default_rng(0)
    index, count = rng.integers(0, 9, len(KEYS)), rng.integers(1, 50, len(KEYS)).astype(np.float64)
    whole = unknown_mask(KEYS, (1, 2, 3), index, count, 0.1)
    order = rng.permutation(len(KEYS))
    np.testing.assert_array_equal(unknown_mask(KEYS[order], (1, 2, 3), index[order], count[order], 0.1), whole[order])
    cut = [unknown_mask(KEYS[p], (1, 2, 3), index[p], count[p], 0.1) for p in np.array_split(np.arange(len(KEYS)), 7)]
    np.testing.assert_array_equal(np.concatenate(cut), whole)


def test_draws_of_other_seeds_are_independent() -> None:
    first = mask(5, 1, 0.01, (1, 0, 0))
    for other in ((1, 0, 1), (1, 1, 0), (2, 0, 0)):
        both = (first & mask(5, 1, 0.01, other)).mean()
        assert abs(both - 0.25) < 0.01, other
    # Neighbouring keys, too: no run is longer than chance allows.
    runs = np.diff(np.flatnonzero(np.diff(first.astype(int)) != 0))
    assert runs.max() < 40
    assert abs((first[1:] & first[:-1]).mean() - 0.25) < 0.01


def test_neighbours_draw_each_for_itself() -> None:
    """Samples 2k and 2k + 1 with ids 4 and 5: of a half, two independent draws have a quarter in common."""
    even = np.arange(10_000, 210_000, 2)
    count = np.ones(len(even))

    def draw(key: npt.NDArray[np.int64], index: int) -> npt.NDArray[np.bool_]:
        return unknown_mask(key, (1, 0), np.full(len(even), index), count, 0.01)

    for key, index in ((even + 1, 5), (even + 1, 4), (even, 5)):
        assert abs((draw(even, 4) & draw(key, index)).mean() - 0.25) < 0.01, (key[0], index)


# Dropout of behaviours.


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_rate_of_dropout(rate: float) -> None:
    for place in (0, 7):
        kept = dropout_mask(KEYS, np.full(len(KEYS), place), (1, 0), rate).mean()
        assert abs(kept - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / len(KEYS))


def test_a_samples_draws_are_its_own_and_new_each_epoch() -> None:
    """Of a half, each of two independent draws keeps a quarter with the other."""
    place = np.zeros(len(KEYS), np.int64)
    first = dropout_mask(KEYS, place, (1, 0), 0.5)
    for other in (
        dropout_mask(KEYS, place + 1, (1, 0), 0.5),
        dropout_mask(KEYS, place, (1, 1), 0.5),
        dropout_mask(KEYS + 1, place, (1, 0), 0.5),
        ~unknown_mask(KEYS, (1, 0, 0), place + 2, np.ones(len(KEYS)), 0.5),
    ):
        assert abs((first & other).mean() - 0.25) < 0.01
    # Four samples of four behaviours each: 2^16 patterns, of which 12,500 draws find most once.
    grid = dropout_mask(KEYS[:50_000].repeat(4), np.tile(np.arange(4), 50_000), (1, 0), 0.5).reshape(-1, 16)
    assert len(np.unique(grid, axis=0)) > 10_000
    order = np.random.default_rng(0).permutation(len(KEYS))
    np.testing.assert_array_equal(dropout_mask(KEYS[order], place, (1, 0), 0.5), first[order])


# The filter.


def test_the_most_frequent_ids() -> None:
    count = np.array([0, 0, 5, 9, 1, 9, 5, 0])
    kept = {top: (2 + np.flatnonzero(most_frequent(count, top)[2:])).tolist() for top in (1, 2, 3, 5, 6, 99)}
    assert kept == {1: [3], 2: [3, 5], 3: [2, 3, 5], 5: [2, 3, 4, 5, 6], 6: [2, 3, 4, 5, 6, 7], 99: [2, 3, 4, 5, 6, 7]}
    assert most_frequent(count, 1)[:2].all()  # missing stays missing, unknown is trained


@pytest.mark.parametrize("rate", [0.01, 0.6])
def test_the_compiled_loop_draws_the_same(rate: float) -> None:
    pytest.importorskip("numba", exc_type=ImportError)
    rng = np.random.default_rng(0)
    index_n, count_V = rng.integers(0, 9, len(KEYS)), rng.integers(0, 50, 9)
    index_n.flags.writeable = False  # as columns of a frame are
    expected = unknown_mask(KEYS, (1, 2, 3), index_n, count_V[index_n].astype(np.float64), rate)
    found = replace_unknown(KEYS, (1, 2, 3), index_n, count_V, rate)
    np.testing.assert_array_equal(found, np.where(expected, 1, index_n))
    assert expected.any()
