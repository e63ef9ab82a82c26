"""Codes, radix order, partitions and spool files, each against plain Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrkit import dictionaries, numba_loops, spool

TEXTS = ["b", "a", None, "b", "", "ü", "a", None, "c"]


def check(texts: Sequence[str | None]) -> tuple[spool.Ints, list[str]]:
    """Code texts and check that each code says its text, and each text has one code; return both."""
    codes, words = spool.code(pl.Series("x", texts, dtype=pl.String))
    assert words.dtype == pl.String
    assert words.len() == len({text for text in texts if text is not None}) == words.n_unique()
    assert words.null_count() == 0
    lookup = [None, *words.to_list()]
    assert [lookup[c] for c in codes.tolist()] == list(texts)
    return codes, words.to_list()


@pytest.mark.parametrize("texts", [[], [None, None], ["a"], TEXTS, [None, "a", None, "a"], ["a", "a", None]])
def test_codes_say_texts(texts: list[str | None]) -> None:
    assert check(texts)[0].dtype == np.uint8


@pytest.mark.parametrize("distinct", [3, 400, 600, 3000])
@pytest.mark.parametrize("nulls", [0.0, 0.1])
def test_codes_of_few_and_of_many_texts(distinct: int, nulls: float) -> None:
    rng = np.random.default_rng(distinct)
    numbers = rng.integers(0, distinct, 5000)
    check([None if hide else f"text {n}" for n, hide in zip(numbers, rng.random(5000) < nulls, strict=True)])


@pytest.mark.parametrize(
    ("distinct", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_codes_take_the_smallest_type_that_holds_them(distinct: int, dtype: type) -> None:
    assert check([f"{i}" for i in range(distinct)])[0].dtype == dtype


@pytest.mark.parametrize("shift", [0, 10, 16, 32, 48, 60])
def test_texts_whose_hashes_are_alike_keep_codes_of_their_own(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """Equal in all bits but some, or (the last) now and then in all, as happens among millions of texts."""
    order = np.random.default_rng(6).permutation(np.tile(np.arange(700), 4))
    texts = [f"{i}" for i in order]
    monkeypatch.setattr(
        pl.Series, "hash", lambda s: pl.Series([(int(t) << shift) % (1 << 64) for t in s], dtype=pl.UInt64)
    )
    check(texts)


@pytest.mark.parametrize(
    "bounds", [(1,), (5,), (70_000,), (3, 70_000, 2), (1 << 16, 7), (1 << 33,), (1 << 15, 1 << 20, 1 << 27)]
)
def test_radix_order_is_that_of_sorted(bounds: Sequence[int]) -> None:
    rng = np.random.default_rng(len(bounds))
    n = 2000
    keys = [(rng.integers(0, bound, n), bound) for bound in bounds]
    keys = [(np.where(rng.random(n) < 0.3, bound - 1, key), bound) for key, bound in keys]  # many ties, the largest too
    rows = sorted(range(n), key=lambda i: [int(key[i]) for key, _ in keys])
    assert spool.order_by(keys, n).tolist() == rows


def test_order_of_no_keys_and_no_rows() -> None:
    assert spool.order_by([], 3).tolist() == [0, 1, 2]
    assert spool.order_by([(np.empty(0, np.uint32), 5)], 0).tolist() == []


def test_hashes_are_xxh64() -> None:
    """Known digests with seed 0, so that a partition or bucket is the same in every version."""
    texts = pl.Series("x", ["", "a0", "a9"])
    assert spool.hashes(texts).to_list() == [17241709254077376921, 17336016884672388720, 17429767152375991605]
    assert spool.partition_of(texts, 5).tolist() == [1, 0, 0]
    assert spool.partition_of(texts, 4096).tolist() == [17241709254077376921 % 4096, 17336016884672388720 % 4096, 3381]
    assert spool.partition_of(texts, 1).tolist() == [0, 0, 0]


def test_partitions_are_about_equal() -> None:
    parts = spool.partition_of(pl.Series("x", [f"user {i}" for i in range(8000)]), 8)
    assert parts.dtype == np.uint16
    counts = np.bincount(parts, minlength=8)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_offsets() -> None:
    assert spool.offsets(np.array([0, 0, 2, 2, 2], np.uint16), 4) == [0, 2, 2, 5, 5]
    assert spool.offsets(np.empty(0, np.uint16), 2) == [0, 0, 0]


def test_columns_are_read_back_slice_by_slice(tmp_path: Path) -> None:
    columns = {
        "a": np.arange(10, dtype=np.uint8),
        "b": np.arange(10, dtype=np.int64) << 40,
        "c": np.arange(20, dtype=np.uint16)[::2],
    }
    layout = spool.write(tmp_path / "new" / "x.rows", columns)
    for name, column in columns.items():
        for begin, end in ((0, 10), (3, 7), (4, 4), (10, 10)):
            found = spool.Columns(tmp_path / "new" / "x.rows", layout, begin, end)[name]
            assert found.dtype == column.dtype
            assert found.tolist() == column[begin:end].tolist()


@pytest.mark.parametrize("in_order", [False, True])
def test_one_dictionary_for_all_chunks(tmp_path: Path, in_order: bool) -> None:
    """Translated codes of every chunk mean the texts that they meant in the chunk."""
    chunks, own = [], []
    for i, texts in enumerate((["z", "b", None, "a"], [None], ["b", "c", "c", "z", ""])):
        codes, words = spool.code(pl.Series("x", texts, dtype=pl.String))
        others = pl.Series("value", ["not", "of", "this"])
        both = pl.concat([others.to_frame(), words.alias("value").to_frame()])
        both.write_ipc(tmp_path / f"{i}.words", compression="uncompressed")
        chunks.append({"stem": str(tmp_path / f"{i}"), "words": {"x": (".words", 3, 3 + words.len(), False)}})
        own.append((codes, texts))
    found = dictionaries.unify(["x"], chunks, tmp_path / "all", ["x"] if in_order else [])["x"]
    words = dictionaries.words(tmp_path / "all", "x").to_list()
    assert (words if in_order else sorted(words)) == ["", "a", "b", "c", "z"]
    assert found["size"] == 6
    maps = dictionaries.Maps(tmp_path / "all", {"x": found}, {"x": [c["stem"] for c in chunks]})
    for chunk, (codes, texts) in zip(chunks, own, strict=True):
        translated = maps.of("x", str(chunk["stem"]))[codes]
        assert [[None, *words][c] for c in translated] == texts


@pytest.mark.parametrize("texts", [list("zyxwvutsrqponmlkjihgfedcba"), [f"word {i * 7919 % 500}" for i in range(500)]])
def test_dictionaries_are_the_same_however_many_words_are_looked_up_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    rng = np.random.default_rng(1)
    chunks: list[dict[str, Any]] = []
    for i in range(9):
        words = pl.Series("value", rng.permutation(texts)[: rng.integers(0, len(texts))].tolist(), dtype=pl.String)
        words.to_frame().write_ipc(tmp_path / f"{i}.words", compression="uncompressed")
        chunks.append({"stem": str(tmp_path / f"{i}"), "words": {"x": (".words", 0, words.len(), False)}})
    found = {}
    for at_once in (1, 40, 700, 10**6):
        monkeypatch.setattr(dictionaries, "AT_ONCE", at_once)
        folder = tmp_path / f"all-{at_once}"
        found[at_once] = (
            dictionaries.unify(["x"], chunks, folder, []),
            dictionaries.words(folder, "x").to_list(),
            (folder / "x.map").read_bytes(),
        )
        assert found[at_once] == found[1]


def test_texts_are_ordered_by_their_bytes() -> None:
    texts = ["b", "", "a", "a\0", "abcdefgh", "abcdefgha", "abcdefghZ", "abcdefgh\0", "ü", "z", "日本", "10", "9", "-1"]
    texts += [f"picture {i}.jpg" for i in range(40)]
    order = spool.text_order(pl.Series("x", texts))
    assert [texts[i] for i in order] == sorted(texts, key=str.encode)
    assert spool.text_order(pl.Series("x", [], dtype=pl.String)).tolist() == []


@pytest.mark.parametrize("rows", [0, 100, 20_000])
@pytest.mark.parametrize("loops", [True, False])
def test_values_are_taken_from_their_places(monkeypatch: pytest.MonkeyPatch, rows: int, loops: bool) -> None:
    if not loops:
        monkeypatch.setattr(numba_loops, "load", lambda module: None)
    rng = np.random.default_rng(rows)
    for dtype in (np.uint8, np.uint16, np.uint32, np.int64, np.int8):
        for places_dtype in (np.uint8, np.uint16, np.uint32, np.int64, np.uint64):
            values = rng.integers(0, 120, 200).astype(dtype)
            places = rng.integers(0, 100, rows).astype(places_dtype)
            values.flags.writeable = places.flags.writeable = False  # as those of mapped files
            for some, where in ((values, places), (values[::2], places), (values, places[::2])):
                found = spool.take(some, where)
                assert found.dtype == dtype
                assert found.tolist() == [int(some[place]) for place in where]
                assert found.flags.writeable


@pytest.mark.parametrize("parts", [[[]], [[], [7]], [[3, -2], [], [9, 3]], [[5], [5 + 2 * spool.RANGE]]])
def test_numbers_in_parts_are_coded_as_those_of_all(parts: list[list[int]]) -> None:
    series = [pl.Series("value", part, dtype=pl.Int64) for part in parts]
    found = spool.code_ranges(series)
    flat = [number for part in parts for number in part]
    if not flat or max(flat) - min(flat) >= spool.RANGE:
        assert found is None
        return
    assert found is not None
    codes, words = list(found[0]), found[1]
    expected = spool.code(pl.concat(series))
    assert np.concatenate(codes).tolist() == expected[0].tolist()
    assert [len(some) for some in codes] == [len(part) for part in parts]
    assert words.equals(expected[1])
