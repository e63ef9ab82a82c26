"""Rows known by their JSON: what they say, and how much memory they take."""

import concurrent.futures
import gc
import random
import tracemalloc
from typing import Any, TypedDict

import msgspec
import numpy as np
import pytest

from ctrkit.known_rows import KnownRows, UnsureError
from ctrkit.row_indexer import IndexedRow, Rows


class Ad(TypedDict, total=False):
    id: str
    tags: list[int]


class Counted:
    """Indexes rows, and counts how many."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, rows: Rows) -> list[IndexedRow]:
        self.rows += len(rows)
        return [
            (np.array([len(row.get("id", ""))] * 4).tobytes(), (tuple(row["tags"]) if "tags" in row else None,), None)
            for row in rows
        ]


def ad(i: int) -> bytes:
    return b'{"id":"%s:%d","tags":[%d,2]}' % (b"x" * (i % 50), i, i)


def ask(known: KnownRows, texts: list[bytes]) -> tuple[int, Any, int]:
    return known.read(msgspec.json.decode(b"[%s]" % b", ".join(texts), type=list[msgspec.Raw]))


def test_what_is_known_is_read_once() -> None:
    index = Counted()
    known = KnownRows(Ad, index, 1 << 20)
    texts = [ad(i) for i in range(60)] + [b"{}", b'{"id":null}'.replace(b"null", b'"a"')]
    first, rows, found = ask(known, texts)
    assert first == sum(text.count(b":") for text in texts)
    assert (rows, found) == (index([msgspec.json.decode(text) for text in texts]), 0)
    index.rows = 0
    assert ask(known, texts) == (first, rows, 62)
    assert ask(known, texts[5:7] * 3) == (2 * 3 * 3, rows[5:7] * 3, 6)
    assert index.rows == 0
    assert ask(known, [texts[0], ad(99), texts[1], ad(99)])[2] == 3
    assert index.rows == 1


@pytest.mark.parametrize("text", [b'{"id":"a","id":"a"}', b'{"id":"a:b","of":1}', b'{"nobody":1}'])
def test_what_another_may_understand_otherwise(text: bytes) -> None:
    known = KnownRows(Ad, Counted(), 1 << 20)
    for _ in range(2):
        for texts in ([text], [ad(1), text, ad(2)]):
            with pytest.raises(UnsureError):
                ask(known, texts)


def test_memory_is_bounded_and_who_is_asked_for_stays() -> None:
    index = Counted()
    most = 2 << 20
    known = KnownRows(Ad, index, most)
    favourites = [ad(i) for i in range(-50, 0)]
    ask(known, favourites)
    gc.collect()
    tracemalloc.start()
    largest = 0
    for begin in range(0, 50_000, 100):
        before = index.rows
        ask(known, [*favourites, *(ad(i) for i in range(begin, begin + 100))])
        assert index.rows == before + 100
        if begin % 5000 == 0:
            gc.collect()
            largest = max(largest, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert most / 4 < largest < most * 1.1


def test_threads_share_them() -> None:
    index = Counted()
    known = KnownRows(Ad, index, 20_000)  # of which some 15 rows are in a half
    expected = {ad(i): Counted()([msgspec.json.decode(ad(i))])[0] for i in range(100)}

    def some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            texts = [ad(rng.randrange(100)) for _ in range(rng.randrange(20))]
            assert ask(known, texts)[1] == [expected[text] for text in texts]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
