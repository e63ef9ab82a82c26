"""Rows through temporary files: every row in its partition, in order, whoever adds chunks when."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ctrkit.exchange import Exchange, Scratch


def test_partitions_hold_their_rows_in_the_order_of_the_chunks(tmp_path):
    rng = np.random.default_rng(0)
    n, chunks = 5000, 23
    part = rng.integers(0, 7, n).astype(np.uint16) * 3  # two of three partitions are empty
    columns = [rng.integers(0, 2**63, n).astype(np.uint64), rng.random(n).astype(np.float32), rng.random(n) < 0.5]
    edges = np.sort(rng.integers(0, n, chunks - 1))
    pieces = list(enumerate(np.split(np.arange(n), edges)))  # some of them empty
    exchange = Exchange(tmp_path / "x", 20, [np.uint64, np.float32, np.bool_])
    rng.shuffle(pieces)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: exchange.add((p[0],), part[p[1]], [c[p[1]] for c in columns]), pieces))
    for p in range(20):
        rows = np.flatnonzero(part == p)
        assert exchange.rows(p) == len(rows)
        for got, column in zip(exchange.read(p), columns, strict=True):
            assert got.dtype == column.dtype
            np.testing.assert_array_equal(got, column[rows])
        parts = list(exchange.pieces(p, 100))
        np.testing.assert_array_equal(np.concatenate([x[0] for x in parts]), columns[0][rows])
        assert len(rows) == 0 or len(parts) > 3
    exchange.close()


def test_a_read_past_the_end_is_an_error(tmp_path):
    scratch = Scratch(tmp_path / "s")
    assert scratch.append(np.arange(3, dtype=np.int64)) == 0
    assert scratch.append(np.zeros(0, np.int8)) == 24
    with pytest.raises(OSError, match="ends too early"):
        scratch.read_into(np.empty(2, np.int64), 16)
    scratch.close()
