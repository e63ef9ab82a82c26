"""The data stages against only parsing their input: `ctrkit convert`, `select-clicks` and `group` on the logs of
logs.py, and polars' `read_csv` of the same files, each file whole, all columns, types inferred.

    python benchmarks/convert.py --impressions 1000000

The reference is the time of the `read_csv` calls alone, in a fresh process, without its start and imports. Ours is the
whole wall time of the three commands, starts and imports included. Rounds of reference and ours take turns; files
are read once before, so that both find them in the page cache. Medians over the rounds, peaks over all. Every
round's outputs are checked for completeness: all impressions are samples, and all samples are in groups. For what the
peak memory is, see measure.py.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import data_stages
import logs as raw_logs
import measure
import polars as pl
from data_stages import OUTPUTS, SPLITS
from measure import MIB, Measured

PARSE = """
import sys, time
import polars as pl
started, cpu = time.perf_counter(), time.process_time()
rows = sum(pl.read_csv(name).height for name in sys.argv[1:])
print(time.perf_counter() - started, time.process_time() - cpu, rows)
"""


@dataclass
class Rounds:
    """What the rounds on one size of logs found."""

    logs: raw_logs.Logs
    parsing: list[Measured] = field(default_factory=list)
    """Seconds and CPU seconds of the `read_csv` calls alone, peak of the whole process."""
    stages: dict[str, list[Measured]] = field(default_factory=lambda: {stage: [] for stage in OUTPUTS})
    written: dict[str, int] = field(default_factory=dict)
    sidecars: dict[str, dict[str, Any]] = field(default_factory=dict)
    shape: str = ""

    @property
    def reference(self) -> float:
        return statistics.median(m.seconds for m in self.parsing)

    @property
    def ours(self) -> float:
        return statistics.median(map(sum, zip(*([m.seconds for m in ms] for ms in self.stages.values()), strict=True)))

    @property
    def cpu_ratio(self) -> float:
        ours = sum(statistics.median(m.cpu_seconds for m in ms) for ms in self.stages.values())
        return ours / statistics.median(m.cpu_seconds for m in self.parsing)

    @property
    def peak_bytes(self) -> int:
        return max(m.peak_bytes for ms in self.stages.values() for m in ms)


def benchmark(logs: raw_logs.Logs, rounds: int, sets: Sequence[str]) -> Rounds:
    """Let parsing and the stages take turns on the logs."""
    found = Rounds(logs)
    measure.warm(logs.files)
    work = logs.folder.parent / f"outputs-{logs.folder.name}"
    for _ in range(rounds):
        parse(found)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        run_stages(found, work, sets)
        check(found, work)
    parse(found)  # before and after, so that a drift of the machine's speed meets both sides
    shutil.rmtree(work)
    return found


def parse(found: Rounds) -> None:
    measured = measure.run([sys.executable, "-c", PARSE, *found.logs.files])
    seconds, cpu_seconds, rows = measured.output.split()
    expected = found.logs.settings.impressions + found.logs.settings.behaviours
    if int(rows) != expected:
        sys.exit(f"polars parsed {rows} rows of {found.logs.raw}, which should have {expected}")
    found.parsing.append(dataclasses.replace(measured, seconds=float(seconds), cpu_seconds=float(cpu_seconds)))


def run_stages(found: Rounds, work: Path, sets: Sequence[str]) -> None:
    for stage, measured in data_stages.run(found.logs, work, sets).items():
        output = work / OUTPUTS[stage]
        found.stages[stage].append(measured)
        found.written[stage] = measure.bytes_below(output)
        found.sidecars[stage] = json.loads(output.with_name(f"{output.name}.json").read_text(encoding="utf-8"))


def check(found: Rounds, work: Path) -> None:
    """End the process if a row is lost; say what the groups are like."""
    rows = found.logs.settings.impressions
    samples = pl.scan_parquet(work / "convert/samples/*/*.parquet").select(pl.len()).collect().item()
    if samples != rows:
        sys.exit(f"{rows:,} impressions became {samples:,} samples")
    groups = pl.concat(
        pl.scan_parquet(work / f"groups/{split}/*.parquet").select(
            "group_id", pl.col("click").list.len(), pl.col("goods").list.len().alias("history")
        )
        for split in SPLITS
    )
    n, grouped, history = (
        groups.select(pl.col("group_id").n_unique(), *(pl.col(c).cast(pl.Int64).sum() for c in ("click", "history")))
        .collect()
        .row(0)
    )
    if grouped != rows:
        sys.exit(f"{rows:,} samples became {grouped:,} samples in groups")
    found.shape = f"{n:,} groups of {grouped / n:.2f} impressions and {history / n:.2f} behaviours"


def show(found: Rounds) -> None:
    """Print a line for parsing, each stage and all stages."""
    settings = found.logs.settings
    read = {
        "convert": settings.impressions + settings.behaviours,
        "select-clicks": settings.behaviours,
        "group": settings.impressions,
    }

    def line(name: str, seconds: float, runs: list[Measured], rows: int, written: int) -> list[str]:
        cpu, peak = statistics.median(m.cpu_seconds for m in runs), max(m.peak_bytes for m in runs)
        size = f"{written / MIB:,.0f}" if written else ""
        return [
            name,
            f"{seconds:,.2f}",
            f"{cpu:,.2f}",
            f"{rows:,}",
            f"{rows / seconds:,.0f}",
            f"{peak / MIB:,.0f}",
            size,
        ]

    lines = [line("polars parses", found.reference, found.parsing, read["convert"], 0)]
    for stage, runs in found.stages.items():
        seconds = statistics.median(m.seconds for m in runs)
        lines.append(line(stage, seconds, runs, read[stage], found.written[stage]))
    cpu = sum(statistics.median(m.cpu_seconds for m in runs) for runs in found.stages.values())
    rate = read["convert"] / found.ours
    whole = [f"{found.ours:,.2f}", f"{cpu:,.2f}", f"{read['convert']:,}", f"{rate:,.0f}"]
    bytes_found = [f"{found.peak_bytes / MIB:,.0f}", f"{sum(found.written.values()) / MIB:,.0f}"]
    lines.append(["all stages", *whole, *bytes_found])
    size = raw_logs.sum_bytes(found.logs.files) / MIB
    print(f"{settings.impressions:,} impressions, {settings.behaviours:,} behaviours, {size:,.0f} MiB of CSV")
    print(f"{found.shape}; medians of {len(found.stages['convert'])} rounds, peaks over all")
    measure.table(["", "seconds", "CPU s", "rows", "rows/s", "peak MiB", "written MiB"], lines)
    print(f"all stages / parsing = {found.ours / found.reference:.2f} of wall time, {found.cpu_ratio:.2f} of CPU time")


def growth(found: Rounds, first: Rounds) -> float:
    """Return how many times as much memory one size of logs takes as another."""
    return found.peak_bytes / first.peak_bytes


def show_phases(found: Rounds) -> None:
    """Print where the last round's stages spent their time: the sidecars' counts named "… seconds", and what is
    outside the stage's own work (start, imports, digests of inputs and outputs)."""
    lines = []
    for stage, sidecar in found.sidecars.items():
        wall = found.stages[stage][-1].seconds
        lines.append([stage, f"{wall:,.2f}", ""])
        phases = {k.removesuffix(" seconds"): v for k, v in sidecar["counts"].items() if k.endswith(" seconds")}
        phases["outside the work"] = wall - sidecar["seconds"]
        for phase, seconds in phases.items():
            lines.append([f"  {phase}", f"{seconds:,.2f}", f"{seconds / wall:.0%}"])
    measure.table(["phase", "seconds", "of the stage"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    raw_logs.add_options(parser, 10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--twice",
        action="store_true",
        help="again with twice the rows of the same users, and of twice as many: does the peak grow?",
    )
    parser.add_argument("--profile", action="store_true", help="seconds by phase, as the stages' sidecars tell")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="given to every stage")
    args = parser.parse_args()
    results = []
    n, seed = args.impressions, args.seed
    sizes = [raw_logs.Settings(n, seed)]
    if args.twice:
        sizes += [raw_logs.Settings(2 * n, seed, like=n), raw_logs.Settings(2 * n, seed)]
    for settings in sizes:
        found = benchmark(raw_logs.ready(settings, args.data), args.rounds, args.set)
        show(found)
        if args.profile:
            show_phases(found)
        print()
        results.append(found)
    first = results[0]
    twice = {}
    if args.twice:
        _, rows, everything = results
        lines = [
            [name, f"{one.logs.settings.users:,}", f"{one.peak_bytes / MIB:,.0f}", f"{growth(one, first):.3f}"]
            for name, one in (("these rows", first), ("twice, of as many users", rows), ("twice, of twice", everything))
        ]
        measure.table(["peak memory", "users", "peak MiB", "of the first"], lines)
        twice = {
            "peak_bytes_twice": rows.peak_bytes,
            "peak_growth": round(growth(rows, first), 3),
            "ratio_twice": round(rows.ours / rows.reference, 3),
            "peak_growth_twice_the_users": round(growth(everything, first), 3),
            "ratio_twice_the_users": round(everything.ours / everything.reference, 3),
        }
    measure.last_line(
        name="convert",
        ratio=round(first.ours / first.reference, 3),
        ours=round(first.ours, 3),
        reference=round(first.reference, 3),
        unit="s",
        cpu_ratio=round(first.cpu_ratio, 3),
        peak_bytes=first.peak_bytes,
        impressions=first.logs.settings.impressions,
        behaviours=first.logs.settings.behaviours,
        stages={s: round(statistics.median(m.seconds for m in ms), 3) for s, ms in first.stages.items()},
        rounds=args.rounds,
        **twice,
    )


if __name__ == "__main__":
    main()
