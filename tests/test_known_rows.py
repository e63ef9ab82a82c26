"""Rows known by their JSON: what they say, and how much memory they take."""

import concurrent.futures
import random
import tracemalloc
from typing import Any, TypedDict

import msgspec
import numpy as np
import pytest

from ctrkit.known_rows import KnownRows, UnsureError
from ctrkit.programs import lists_side_by_side
from ctrkit.row_indexer import IndexedRows, Rows


class Ad(TypedDict, total=False):
    id: str
    tags: list[int]


class Indexer:
    """Stands in the place of a RowIndexer: the length of an ad's id, two of its letters, and its tags. Counts rows."""

    columns, lists = 3, 1
    rows = 0

    def index(self, rows: Rows) -> IndexedRows:
        self.rows += len(rows)
        ids = [row.get("id", "--") for row in rows]
        index_NC = np.array([[len(i), ord(i[0]), ord(i[-1])] for i in ids], np.int64).reshape(-1, 3)
        return IndexedRows(index_NC, [lists_side_by_side([row.get("tags", [-1]) for row in rows])])


def ad(i: int, tags: int = 2) -> bytes:
    return b'{"id":"%s:%d","tags":%s}' % (b"x" * (i % 50), i, str([i + k for k in range(1, tags + 1)]).encode())


def known_rows(most_bytes: int = 1 << 20) -> tuple[KnownRows, Indexer]:
    indexer: Any = Indexer()
    return KnownRows(Ad, indexer, most_bytes), indexer


def ask(known: KnownRows, texts: list[bytes]) -> tuple[int, list[list[int]], list[list[int]], int]:
    """Return the number of colons, indexes, tags, and how many were known."""
    raw = msgspec.json.decode(b"[%s]" % b", ".join(texts), type=list[msgspec.Raw])
    colons, rows, found = known.read(raw)
    (tags_NV,) = rows.lists
    return colons, rows.index_NC.tolist(), [[i for i in some if i] for some in tags_NV.tolist()], found


def expected(texts: list[bytes]) -> tuple[int, list[list[int]], list[list[int]]]:
    rows = [msgspec.json.decode(text) for text in texts]
    index = [Indexer().index([row]) for row in rows]
    tags = [[i for i in one.lists[0][0].tolist() if i] for one in index]
    return sum(text.count(b":") for text in texts), [one.index_NC[0].tolist() for one in index], tags


def test_what_is_known_is_read_once() -> None:
    known, indexer = known_rows()
    texts = [*(ad(i, i % 7) for i in range(60)), b"{}", b'{"id":"a"}']
    assert ask(known, texts) == (*expected(texts), 0)
    assert ask(known, texts) == (*expected(texts), 62)
    assert ask(known, texts[5:7] * 3) == (*expected(texts[5:7] * 3), 6)
    assert indexer.rows == 62
    mixed = [texts[0], ad(99), texts[1], ad(99, 5), texts[61]]
    assert ask(known, mixed) == (*expected(mixed), 3)
    assert ask(known, mixed) == (*expected(mixed), 5)
    assert indexer.rows == 64


def test_rows_that_are_read_each_time() -> None:
    """Those with more values or larger indexes than there is room for."""
    known, _ = known_rows()
    texts = [ad(1), ad(2, 16), ad(3, 17), ad(4, 1000), ad(5), ad(2**31 - 3), ad(2**31 - 2)]
    for found in (0, 4, 4):
        assert ask(known, texts) == (*expected(texts), found)


@pytest.mark.parametrize("text", [b'{"id":"a","id":"a"}', b'{"id":"a:b","of":1}', b'{"nobody":1}'])
def test_what_another_may_understand_otherwise(text: bytes) -> None:
    known, _ = known_rows()
    for _ in range(2):
        for texts in ([text], [ad(1), text, ad(2)]):
            with pytest.raises(UnsureError):
                ask(known, texts)


def test_memory_is_bounded_and_who_is_asked_for_often_stays() -> None:
    """However many ads there are: 50,000 in the memory of some 13,000."""
    tracemalloc.start()
    known, _ = known_rows(2 << 20)
    favourites = [ad(i) for i in range(-50, 0)]
    seen = 0
    for begin in range(0, 50_000, 100):
        seen += ask(known, [*favourites, *(ad(i) for i in range(begin, begin + 100))])[3]
    assert 1 << 20 < tracemalloc.get_traced_memory()[0] < 2.1 * (1 << 20)
    tracemalloc.stop()
    assert seen > 0.9 * 50 * 500


def test_threads_share_them() -> None:
    known, _ = known_rows(5000)  # some 30 rows
    of = {ad(i): expected([ad(i)])[1][0] for i in range(100)}

    def some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            texts = [ad(rng.randrange(100)) for _ in range(rng.randrange(1, 20))]
            assert ask(known, texts)[1] == [of[text] for text in texts]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
