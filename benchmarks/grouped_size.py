"""Bytes of grouped training files against the same samples ungrouped: one row a sample, with its user's features and
behaviours repeated, written with the same codec and as many samples in a row group.

    python benchmarks/grouped_size.py --impressions 1000000

The ungrouped samples are ordinary Parquet, as polars writes it (dictionaries, zstd). How much the repeated values cost
depends on how far apart they lie, since dictionaries and zstd remember. So they are written in three orders: shuffled
(as a trainer needs them, and as the groups are), in order of time (as a log has them), and by user and day (repeated
values side by side, which no trainer can use as it is); and shuffled once more by the writer of the groups, whose
encoding (ctrkit/blocks.py) makes any such file smaller. With two sets of columns: all features of logs.py, and a few
such as the demo has. The ratio is that of all features, shuffled, ordinary; the others are printed and stand beside it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import data_stages
import logs as raw_logs
import measure
import polars as pl
from measure import MIB

from ctrkit.blocks import write_blocks
from ctrkit.grouping import ungroup

FEW = {
    "shared": ["gender", "age_level", "goods", "category", "image"],
    "own": ["ad_goods", "ad_category", "shop", "ad_image", "position"],
}
ORDERS: dict[str, Callable[[pl.DataFrame, int], pl.DataFrame]] = {
    "shuffled": lambda rows, seed: rows.sample(fraction=1.0, shuffle=True, seed=seed),
    "by time": lambda rows, seed: rows.sort("time", "sample_id"),
    "by user and day": lambda rows, seed: rows.sort("day", "user", "time", "sample_id"),
}
SPLIT = "shuffled, as groups"
SAME = 0.02
"""Share by which the groups, written again by this script, may differ in size from the stage's own files."""


def ordinary(frame: pl.DataFrame, rows: int) -> int:
    """Return the bytes of a Parquet file of a frame, with `rows` rows in a row group."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        frame.write_parquet(file.name, compression="zstd", compression_level=1, statistics=False, row_group_size=rows)
        return Path(file.name).stat().st_size


def split(frame: pl.DataFrame, rows: int) -> int:
    """Return the same, written as groups are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "it.parquet")
        write_blocks(frame, path, rows)
        return path.stat().st_size


def sizes(groups_folder: Path, seed: int) -> tuple[dict[str, dict[str, int]], str]:
    """Return bytes by set of columns and form ("grouped" or an order), and what the groups are like."""
    schema = json.loads((groups_folder / "schema.json").read_text(encoding="utf-8"))
    names = {
        "shared": [n for n, f in schema["features"].items() if f["of"] in ("user", "behaviour")],
        "own": [n for n, f in schema["features"].items() if f["of"] in ("ad", "scene")],
    }
    block = schema["block_groups"]
    sets = {f"all {sum(map(len, names.values()))} features": names, f"{sum(map(len, FEW.values()))} features": FEW}
    found = {name: dict.fromkeys(["grouped", *ORDERS, SPLIT], 0) for name in sets}
    files = sorted((groups_folder / "train").glob("*.parquet"))
    if not files:
        sys.exit(f"{groups_folder} has no training groups")
    groups = samples = behaviours = 0
    for file in files:
        frame = pl.read_parquet(file)
        counted = int(frame["click"].list.len().sum())
        groups, samples = groups + frame["group_id"].n_unique(), samples + counted
        behaviours += int(frame["goods"].list.len().sum())
        again, own = split(frame, block), file.stat().st_size
        if abs(again / own - 1) > SAME:
            sys.exit(f"{file} has {own} bytes, but {again} when written here, so no comparison would be fair")
        for name, columns in sets.items():
            left_out = [n for n in [*names["shared"], *names["own"]] if n not in columns["shared"] + columns["own"]]
            found[name]["grouped"] += split(frame.drop(left_out), block)
            rows = ungroup(frame, columns["shared"], columns["own"])
            if rows.height != counted:
                sys.exit(f"{counted} samples of {file} became {rows.height} rows when ungrouped")
            in_block = max(1, block * counted // frame.height)
            for order, arrange in ORDERS.items():
                found[name][order] += ordinary(arrange(rows, seed), in_block)
            found[name][SPLIT] += split(ORDERS["shuffled"](rows, seed), in_block)
    shape = f"{groups:,} training groups of {samples / groups:.2f} impressions and {behaviours / groups:.2f} behaviours"
    return found, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    raw_logs.add_options(parser, 1_000_000)
    args = parser.parse_args()
    logs = raw_logs.ready(raw_logs.Settings(args.impressions, args.seed), args.data)
    work = logs.folder.parent / f"outputs-{logs.folder.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    data_stages.run(logs, work)
    found, shape = sizes(work / "groups", args.seed)
    shutil.rmtree(work)
    print(f"{shape}; MiB, and times the size of the groups")
    rows = []
    for name, by_form in found.items():
        times = [f"{size / MIB:,.1f} ({size / by_form['grouped']:.2f} ×)" for size in by_form.values()]
        rows.append([name, *times])
    measure.table(["", "grouped", *ORDERS, SPLIT], rows)
    (everything, few) = found.values()
    measure.last_line(
        name="group-size",
        ratio=round(everything["shuffled"] / everything["grouped"], 3),
        ours=everything["grouped"],
        reference=everything["shuffled"],
        unit="bytes",
        impressions=args.impressions,
        all_features=everything,
        few_features=few,
    )


if __name__ == "__main__":
    main()
