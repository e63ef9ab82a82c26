import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet
import pytest

from ctrkit import blocks, thrift
from ctrkit.blocks import write_blocks
from ctrkit.parquet_footer import row_groups, thrift_struct

TEXTS = ["", "a", "ü", "twenty letters, or so", "\0"]
VALUES: dict[Any, Callable[[random.Random], Any]] = {
    pl.String: lambda draw: draw.choice(TEXTS),
    pl.Boolean: lambda draw: draw.random() < 0.5,
    pl.Date: lambda draw: datetime.date(1969, 12, 1) + datetime.timedelta(draw.randrange(20_000)),
    **{
        dtype: lambda draw, bits=bits, low=low: draw.randrange(low, low + (1 << draw.choice([1, bits // 2, bits])))
        for dtype, bits, low in (
            (pl.UInt8, 8, 0),
            (pl.UInt16, 16, 0),
            (pl.UInt32, 32, 0),
            (pl.UInt64, 64, 0),
            (pl.Int8, 8, -128),
            (pl.Int16, 16, -(1 << 15)),
            (pl.Int32, 32, -(1 << 31)),
            (pl.Int64, 64, -(1 << 63)),
        )
    },
}


def lists(draw: random.Random, rows: int, empty: float) -> list[int]:
    return [0 if draw.random() < empty else draw.randrange(1, 40) for _ in range(rows)]


def frame_of(rows: int, seed: int, empty: float = 0.3) -> pl.DataFrame:
    """Columns of every type, plain, in lists and in lists of lists; some of the lists have the same lengths."""
    draw = random.Random(seed)
    lengths = lists(draw, rows, empty)
    columns: list[pl.Series] = []
    for dtype, value in VALUES.items():
        own = lists(draw, rows, empty)
        columns += [
            pl.Series(f"{dtype}", [value(draw) for _ in range(rows)], dtype=dtype),
            pl.Series(f"{dtype}s", [[value(draw) for _ in range(n)] for n in lengths], dtype=pl.List(dtype)),
            pl.Series(f"other {dtype}s", [[value(draw) for _ in range(n)] for n in own], dtype=pl.List(dtype)),
            pl.Series(
                f"{dtype}s of each",
                [[[value(draw) for _ in range(draw.randrange(3))] for _ in range(n)] for n in lengths],
                dtype=pl.List(pl.List(dtype)),
            ),
        ]
    return pl.DataFrame(columns)


@pytest.mark.parametrize(("rows", "block"), [(0, 5), (1, 5), (5, 5), (53, 10), (300, 1000)])
@pytest.mark.parametrize("empty", [0.0, 0.3, 1.0])
def test_polars_and_pyarrow_read_what_was_written(tmp_path: Path, rows: int, block: int, empty: float) -> None:
    frame, path = frame_of(rows, rows, empty), tmp_path / "blocks.parquet"
    write_blocks(frame, path, block)
    assert pl.read_parquet(path).equals(frame)
    assert pl.read_parquet(path).schema == frame.schema
    found = pl.from_arrow(pyarrow.parquet.read_table(path))
    assert isinstance(found, pl.DataFrame)
    assert found.equals(frame)
    assert row_groups(path) == [min(block, rows - i) for i in range(0, rows, block)]
    middle = pl.scan_parquet(path).slice(rows // 2, 3).select("UInt32s", "String").collect()
    assert middle.equals(frame.slice(rows // 2, 3).select("UInt32s", "String"))


def test_a_frame_of_several_chunks_or_a_slice_of_one_is_written_as_any_other(tmp_path: Path) -> None:
    frame = frame_of(40, 1)
    write_blocks(frame, tmp_path / "whole", 7)
    write_blocks(pl.concat([frame[:9], frame[9:]], rechunk=False), tmp_path / "chunks", 7)
    write_blocks(pl.concat([frame_of(5, 2), frame, frame])[5:45], tmp_path / "slice", 7)
    assert len({(tmp_path / name).read_bytes() for name in ("whole", "chunks", "slice")}) == 1


def test_levels_are_those_of_pyarrow_and_no_larger(tmp_path: Path) -> None:
    """Files are smaller than those that pyarrow writes with the same encodings."""
    rng = np.random.default_rng(0)
    rows = 2000
    ids = {f"id{i}": [rng.integers(0, 1 << 3 * i, n).tolist() for n in rng.integers(1, 50, rows)] for i in range(1, 6)}
    frame = pl.DataFrame(ids, schema={name: pl.List(pl.UInt32) for name in ids})
    write_blocks(frame, tmp_path / "ours", 500)
    pyarrow.parquet.write_table(
        frame.to_arrow(),
        tmp_path / "pyarrow",
        row_group_size=500,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        column_encoding=dict.fromkeys([f"{name}.list.element" for name in ids], "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        store_schema=False,
    )
    assert (tmp_path / "ours").stat().st_size < (tmp_path / "pyarrow").stat().st_size
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "ours").metadata
    for group in range(metadata.num_row_groups):
        for column, lengths in enumerate(ids.values()):
            chunk = metadata.row_group(group).column(column)
            assert chunk.num_values == sum(map(len, lengths[500 * group : 500 * group + 500]))
            assert chunk.compression == "ZSTD"
            assert set(chunk.encodings) == {"RLE", "BYTE_STREAM_SPLIT"}


def test_levels_of_lists_of_lists_are_those_of_a_walk() -> None:
    """[[1, 2], [], [3]], [], [[]], [[4]]: a value, or a list that is empty, an entry each."""
    rows: list[list[list[int]]] = [[[1, 2], [], [3]], [], [[]], [[4]]]
    expected = []
    for row in rows:
        if not row:
            expected.append((0, 0))
        for i, inner in enumerate(row):
            if not inner:
                expected.append((int(i > 0), 1))
            expected += [(2 if j else int(i > 0), 2) for j in range(len(inner))]
    lengths = [np.array([len(r) for r in rows]), np.array([len(i) for r in rows for i in r])]
    encoded, entries = blocks._levels(len(rows), lengths)
    assert entries == len(expected) == 7
    bits = [format(byte, "08b")[::-1] for byte in encoded]
    # length 3, header of one packed group, then two bits a level, the lowest first
    assert list(encoded[:5]) == [3, 0, 0, 0, 3]
    packed = "".join(bits[5:7])
    assert [int(packed[2 * i : 2 * i + 2][::-1], 2) for i in range(7)] == [repeated for repeated, _ in expected]
    packed = "".join(bits[12:14])
    assert [int(packed[2 * i : 2 * i + 2][::-1], 2) for i in range(7)] == [defined for _, defined in expected]


@pytest.mark.parametrize("column", [[1, None], [[1], None], [[1], [None]], [[[1]], [None]], [[[1]], [[None]]]])
def test_nulls_are_refused_and_leave_no_file(tmp_path: Path, column: list[Any]) -> None:
    with pytest.raises(ValueError, match="null"):
        write_blocks(pl.DataFrame({"a": column}), tmp_path / "blocks.parquet", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1, -1, 63, -64, 64, 300, -300, 1 << 40, -(1 << 62)])
def test_structs_are_read_as_they_were_written(number: int) -> None:
    many = list(range(20))
    inner = thrift.struct((1, thrift.BINARY, b"text" * 50), (9, thrift.I64, number))
    written = thrift.struct(
        (2, thrift.I64, number),
        (3, thrift.LIST, thrift.items(thrift.I32, many)),
        (7, thrift.STRUCT, inner),
        (8, thrift.I32, 5),
    )
    expected = {2: number, 3: many, 7: {1: b"text" * 50, 9: number}, 8: 5}
    assert thrift_struct(written) == (expected, len(written))
