import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit import vocabulary
from ctrkit.errors import UserError
from ctrkit.recipe import Feature

PLAIN = Feature(of="ad")
HASHES = {"a0": 17336016884672388720, "a1": 18151002094784932496, "a2": 11532782514799973195}
"""XXH64 with seed 0."""
Words = list[tuple[str, int, int]]
Counts = Mapping[str | None, int]


def rows(frame: pl.DataFrame) -> Words:
    assert frame.schema == {"value": pl.String, "index": pl.UInt32, "count": pl.UInt64}
    return frame.rows()


def build(
    *counts: Counts, previous: pl.DataFrame | None = None, **keys: object
) -> tuple[pl.DataFrame, list[list[int]]]:
    """Build a vocabulary of features from how often each of their texts is in training; return their indexes too."""
    feature = Feature.model_validate({"of": "scene", **keys})
    values = [pl.Series("x", list(c), dtype=pl.String) for c in counts]
    weights = [np.array(list(c.values()), np.int64) for c in counts]
    make = vocabulary.build_numbers if feature.kind == "number" else vocabulary.build
    words, indexes = make(values, weights, feature, previous)
    assert all(index.dtype == pl.UInt32 for index in indexes)
    return words, [index.to_list() for index in indexes]


def build_lists(lists: Sequence[list[str] | None], weights: list[int]) -> tuple[Words, list[list[int]]]:
    series = pl.Series("x", lists, dtype=pl.List(pl.String))
    words, [index] = vocabulary.build([series], [np.array(weights, np.int64)], Feature(of="ad", multi_hot=True))
    assert index.dtype == pl.List(pl.UInt32)
    return rows(words), index.to_list()


def test_most_frequent_first_ties_by_value_and_rare_ones_left_out() -> None:
    words, indexes = build({"b": 2, "a": 2, "c": 1, None: 7, "d": 1}, {"c": 1, "d": 2, "e": 1}, min_count=2)
    assert rows(words) == [("d", 2, 3), ("a", 3, 2), ("b", 4, 2), ("c", 5, 2)]
    assert indexes == [[4, 3, 5, 0, 2], [5, 2, 1]]
    assert vocabulary.size(words) == 6


def test_texts_that_give_the_same_value_count_together() -> None:
    """Two ads of one category are two texts of one value."""
    values = pl.Series("x", ["shoes", "hats", "shoes", None])
    words, [index] = vocabulary.build([values], [np.array([2, 4, 3, 9])], PLAIN)
    assert rows(words) == [("shoes", 2, 5), ("hats", 3, 4)]
    assert index.to_list() == [2, 3, 2, 0]


def test_what_training_does_not_have_is_unknown() -> None:
    words, indexes = build({"a": 1, "later": -1, "z": -1}, {"z": 2})
    assert rows(words) == [("z", 2, 2), ("a", 3, 1)]
    assert indexes == [[3, 1, 2], [2]]
    nothing, indexes = build({"later": -1, None: -1})
    assert rows(nothing) == []
    assert indexes == [[1, 0]]
    assert build()[1] == []


def test_lists_count_each_element() -> None:
    words, index = build_lists([["a", "b", "a"], [], None, ["b"], ["later", "a"]], [2, 9, 9, 1, -1])
    assert words == [("a", 2, 4), ("b", 3, 3)]
    assert index == [[2, 3, 2], [], [], [3], [1, 2]]
    assert build_lists([[], None], [1, 1]) == ([], [[], []])


def test_only_the_most_frequent() -> None:
    counts = {"a": 1, "b": 5, "c": 3, "d": 3}
    words, indexes = build(counts, top=2)
    assert rows(words) == [("b", 2, 5), ("c", 3, 3)]
    assert indexes == [[1, 2, 3, 1]]
    assert build(counts, top=9)[0].height == 4


def test_pictures_need_not_be_in_training() -> None:
    words, _ = build({"b.jpg": 1, "a.jpg": 0, "nowhere.jpg": -1}, kind="image")
    assert rows(words) == [("b.jpg", 2, 1), ("a.jpg", 3, 0)]


def test_an_earlier_vocabulary_keeps_its_indexes() -> None:
    first, _ = build({"a": 5, "b": 4, "c": 3})
    later, indexes = build({"d": 9, "c": 7, "e": 1, "a": 1, "b": -1}, previous=first, min_count=2)
    assert rows(later) == [("a", 2, 6), ("b", 3, 4), ("c", 4, 10), ("d", 5, 9)]
    assert indexes == [[5, 4, 1, 2, 3]]
    # `top` counts those that were there before.
    some, _ = build({"d": 9, "e": 8}, previous=first, top=4)
    assert [row[:2] for row in rows(some)] == [("a", 2), ("b", 3), ("c", 4), ("d", 5)]
    full, _ = build({"d": 1}, previous=first, top=2)
    assert rows(full) == rows(first)
    assert rows(build(previous=first)[0]) == rows(first)


def test_buckets_of_hashes() -> None:
    at = {text: 2 + digest % 3 for text, digest in HASHES.items()}
    counts = {"a0": 1, "a1": 2, None: 50, "a2": -1}
    words, indexes = build(counts, hash_buckets=3)
    assert indexes == [[at["a0"], at["a1"], 0, at["a2"]]]
    totals = {i: sum(n for text, n in {"a0": 1, "a1": 2}.items() if at[text] == i) for i in (2, 3, 4)}
    assert rows(words) == [(f"bucket {i - 2}", i, totals[i]) for i in (2, 3, 4)]
    assert vocabulary.size(words) == 5
    again, indexes = build({"a0": 10}, previous=words, hash_buckets=3)
    totals[at["a0"]] += 10
    assert rows(again) == [(f"bucket {i - 2}", i, totals[i]) for i in (2, 3, 4)]
    assert indexes == [[at["a0"]]]


TEXTS = ["-1e9", "0", "0.999", "1", "2.5", "1e300", "x", None, "nan", "inf", "-inf", " 1", ""]


def test_edges_are_bounds_from_below() -> None:
    counts = dict.fromkeys(TEXTS, 1)
    words, indexes = build(counts, kind="number", edges=[0, 1, 2.5])
    assert indexes == [[2, 3, 3, 4, 5, 5, 1, 0, 1, 5, 2, 1, 1]]
    bounds = ["-inf ≤ x < 0.0", "0.0 ≤ x < 1.0", "1.0 ≤ x < 2.5", "2.5 ≤ x < inf"]
    assert rows(words) == [(text, i, n) for i, (text, n) in enumerate(zip(bounds, [2, 2, 1, 3], strict=True), 2)]
    assert vocabulary.size(words) == 6


def test_quantiles_are_those_of_sorted_values() -> None:
    rng = np.random.default_rng(2)
    counts: dict[str | None, int] = {
        f"{x:.3f}": int(n) for x, n in zip(rng.exponential(100, 500), rng.integers(-1, 5, 500), strict=True)
    }
    ranked = sorted(float(f"{float(text):.4g}") for text, n in counts.items() for _ in range(n) if text)
    counts |= {"x": 99, None: 99, "inf": 99}
    for buckets in (2, 4, 10):
        words, indexes = build(counts, kind="number", quantiles=buckets)
        below = {x: bisect.bisect_left(ranked, x) for x in ranked}
        shares = [k * len(ranked) / buckets for k in range(1, buckets)]
        edges = sorted({min(x for x in ranked if below[x] >= share) for share in shares})
        found = [float(text.rpartition("< ")[2]) for text, *_ in rows(words)[:-1]]
        assert found == edges
        for (text, index), n in zip(zip(counts, indexes[0], strict=True), counts.values(), strict=True):
            if text is not None and text not in ("x", "inf"):
                assert index == 2 + sum(float(text) >= edge for edge in edges), (text, n)
        # A bucket has its share of the values, up to what ties move.
        share = words["count"].to_numpy()[:-1] / len(ranked)
        assert abs(share - 1 / buckets).max() < 0.03


def test_quantiles_of_few_values_are_fewer_buckets() -> None:
    def buckets(counts: Counts, quantiles: int) -> int:
        return build(counts, kind="number", quantiles=quantiles)[0].height

    assert buckets({"5": 3}, 4) == 1
    assert buckets({"5": 2, "7": 1}, 9) == 2
    assert buckets({"5": 2, "7": -1}, 9) == 1
    assert buckets({"x": 3}, 2) == 1
    assert buckets({"0": 90, "1": 5, "2": 5}, 10) == 2
    assert buckets({"0": 90, "1": 5, "2": 5}, 20) == 3


def test_an_earlier_vocabulary_of_numbers_keeps_its_edges() -> None:
    counts = {"1": 1, "2": 2, "-5": 3}
    words, _ = build(counts, kind="number", quantiles=2)
    assert rows(words) == [("-inf ≤ x < 1.0", 2, 3), ("1.0 ≤ x < inf", 3, 3)]
    later, indexes = build({"900": 8, "0.5": 1, "x": 5}, previous=words, kind="number", quantiles=2)
    assert rows(later) == [("-inf ≤ x < 1.0", 2, 4), ("1.0 ≤ x < inf", 3, 11)]
    assert indexes == [[3, 2, 1]]


def test_a_vocabulary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run ctrkit convert"):
        vocabulary.read(tmp_path, "goods")
