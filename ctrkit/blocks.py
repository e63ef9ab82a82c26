"""Training files: Parquet whose row groups are shuffle blocks, small because of how whole numbers are laid out.

Of a column's numbers, those in lists too, the lowest bytes of all stand first, then the next ones, and so on (the
encoding BYTE_STREAM_SPLIT): zstd packs that to a sixth less. polars reads it, but cannot write it.
"""

from pathlib import Path

import polars as pl
import pyarrow.parquet

from ctrkit.spool import whole

SPLIT = (pl.UInt32, pl.Int32, pl.Int64)


def write_blocks(frame: pl.DataFrame, path: Path, rows: int) -> None:
    """Write a Parquet file with `rows` rows in a row group, whole or not at all."""
    split = []
    for name, dtype in frame.schema.items():
        inner = dtype.inner if isinstance(dtype, pl.List) else dtype
        if inner in SPLIT:
            split.append(name if inner is dtype else f"{name}.list.element")
    with whole(path) as tmp:
        pyarrow.parquet.write_table(
            frame.to_arrow(),
            tmp,
            row_group_size=rows,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
            write_statistics=False,
            store_schema=False,
        )
