"""GAUC of predictions: ours against FuxiCTR's gAUC, a day as large as the DICM paper's, and scikit-learn's AUCs.

    python benchmarks/gauc.py --rows 20000000 --day 219000000

1. 20 million rows of 1.3 million users. The ratio is that of two functions which make a GAUC of the same kind of arrays
   (integer users, labels, float32 scores): rows a second of `ctrkit.gauc.gauc` over those of FuxiCTR 2.3.10's
   evaluate_metrics. FuxiCTR gets as many rows, of whole users, as it can do in some seconds, and must find the same
   GAUC of them. Beside it: the whole command `ctrkit eval --bootstrap 0` on a Parquet file, which computes all
   metrics, also with float64 scores and with users as text.
2. Heavy ties: 2,000 random users' AUCs against scikit-learn's roc_auc_score of each.
3. The day: the command on 219 million rows, integer users, float32 scores (`--day 0` leaves it out; `--day-types all`
   does it with float64 scores and text users, too).

FuxiCTR is installed, without its dependencies, into the benchmark's own folder. A few users have many rows, most have
few. Files are removed at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import measure
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from measure import MIB

from ctrkit.gauc import gauc
from ctrkit.large_predictions import measure as measure_large

PEER = "fuxictr==2.3.10"
ROW_GROUP = 1_000_000
ROWS_PER_USER = 20 / 1.3
TYPES = {
    "integer users, float32": (pa.int64(), pa.float32()),
    "integer users, float64": (pa.int64(), pa.float64()),
    "text users, float32": (pa.string(), pa.float32()),
    "text users, float64": (pa.string(), pa.float64()),
}
PLAIN = "integer users, float32"
RUN_PEER = """
import sys, time, numpy as np
from fuxictr.metrics import evaluate_metrics
a = np.load(sys.argv[1])
began = time.perf_counter()
found = evaluate_metrics(a["click"], a["score"], ["gAUC"], group_id=a["user"])
print(time.perf_counter() - began, repr(float(found["gAUC"])))
"""


def rows(n: int, users: int, seed: int, group: int) -> dict[str, np.ndarray]:
    """Draw the rows of a row group: user numbers below 2^31, clicks, scores (float64)."""
    rng = np.random.default_rng([seed, group])
    # Rows by rank fall as rank to the power of -0.3.
    rank = (users * rng.random(n) ** (1 / 0.7)).astype(np.int64)
    user = 1_000_000 + rank * 131 % 2**31
    score = 1 / (1 + np.exp(3.0 - rng.standard_normal(n)))
    return {"user": user, "click": rng.random(n) < score, "score": score}


def write(path: Path, n: int, seed: int, kind: str) -> None:
    """Write predictions as Parquet, with a column of scores that often tie."""
    user_type, score_type = TYPES[kind]
    fields = [("user", user_type), ("click", pa.int8()), ("score", score_type), ("tied", pa.float32())]
    fields = fields[: 3 + (n <= 50_000_000)]
    with pq.ParquetWriter(path, pa.schema(fields), compression="zstd", use_dictionary=["tied"]) as writer:
        for group, begin in enumerate(range(0, n, ROW_GROUP)):
            made = rows(min(ROW_GROUP, n - begin), int(n / ROWS_PER_USER), seed, group)
            user = pl.Series(made["user"])
            columns = {
                "user": (user.cast(pl.String) + "@shop" if user_type == pa.string() else user).to_arrow(),
                "click": made["click"].astype(np.int8),
                "score": made["score"].astype(score_type.to_pandas_dtype()),
                "tied": np.round(made["score"] * 8).astype(np.float32) / 8,
            }
            arrays = [pa.array(columns[name]).cast(kind) for name, kind in fields]
            writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema))


def evaluated(path: Path, *options: str) -> tuple[measure.Measured, dict[str, float]]:
    """Run `ctrkit eval` without resamples; return what it took and what it found."""
    out = path.with_suffix(".metrics.json")
    took = measure.ctrkit("eval", "--gauc", f"it={path}", "--bootstrap", "0", "--json", out, *options)
    return took, json.loads(out.read_text(encoding="utf-8"))["variants"]["it"]["all"]


def peer(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the seconds that FuxiCTR's gAUC takes of arrays, and its value."""
    home = folder / "fuxictr"
    if not (home / "fuxictr").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        measure.run([*install, "--target", home, PEER])
    at = folder / "part.npz"
    np.savez(at, **arrays)
    env = os.environ | {"PYTHONPATH": str(home)}
    done = subprocess.run([sys.executable, "-c", RUN_PEER, at], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, value = map(float, done.stdout.split())
    at.unlink()
    return seconds, value


def largest_difference(path: Path, wanted: int, seed: int) -> float:
    """Return the largest difference of a user's AUC from scikit-learn's, of so many random users with tied scores."""
    from sklearn.metrics import roc_auc_score

    made = measure_large(
        path,
        user="user",
        label="click",
        score="tied",
        slices=(),
        whole="all",
        weight="impressions",
        bins=20,
        smallest=1e-7,
        with_users=True,
    )
    by_user = made.slices["all"].by_user
    assert by_user is not None
    kept = np.flatnonzero(by_user.kept)
    some = np.sort(np.random.default_rng(seed).choice(kept, min(wanted, len(kept)), replace=False))
    names = made.users.gather(by_user.user[some]).cast(pl.Int64)
    auc = dict(zip(names.to_list(), by_user.auc[some].tolist(), strict=True))
    frame = pl.scan_parquet(path).filter(pl.col("user").is_in(names.implode())).collect()
    return max(
        abs(auc[user] - roc_auc_score(one["click"].to_numpy(), one["tied"].to_numpy()))
        for (user,), one in frame.group_by("user")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--day", type=int, default=219_000_000)
    parser.add_argument("--day-types", choices=["plain", "all"], default="plain")
    parser.add_argument("--peer-rows", type=int, default=150_000, help="FuxiCTR's; 0: without it, and no ratio")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    folder = args.data / "gauc"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.parquet"
    lines, seconds, peer_seconds = [], {}, 0.0
    for kind in TYPES:
        write(path, args.rows, args.seed, kind)
        took, found = evaluated(path)
        seconds[kind] = took.seconds
        lines.append([kind, f"{args.rows:,}", f"{took.seconds:.1f}", f"{args.rows / took.seconds / 1e6:.2f}",
                      f"{took.peak_bytes / MIB:,.0f}"])  # fmt: skip
        if kind != PLAIN:
            continue
        frame = pl.read_parquet(path, columns=["user", "click", "score"])
        arrays = {name: frame[name].to_numpy() for name in frame.columns}
        began = time.perf_counter()
        value = gauc(arrays["user"], arrays["click"], arrays["score"]).value or 0.0
        in_arrays = time.perf_counter() - began
        if abs(value - found["gauc"]) > 1e-12:
            sys.exit(f"ctrkit eval found a GAUC of {found['gauc']!r}, and gauc() {value!r}")
        some = frame.filter(pl.col("user").hash(seed=1) < int(min(1.0, args.peer_rows / args.rows) * (2**64 - 1)))
        part = {name: some[name].to_numpy() for name in some.columns}
        del frame, arrays
        if args.peer_rows:
            peer_seconds, theirs = peer(folder, part)
            ours = gauc(part["user"], part["click"], part["score"]).value
            if ours is None or abs(ours - theirs) > 1e-12:
                sys.exit(f"FuxiCTR found a GAUC of {theirs!r} where ctrkit found {ours!r}")
        difference = largest_difference(path, 2_000, args.seed)
        if difference > 1e-12:
            sys.exit(f"a user's AUC differs from scikit-learn's by {difference}")
    reference = len(part["user"]) / peer_seconds if args.peer_rows else None
    lines.append(["gauc(), arrays in memory", f"{args.rows:,}", f"{in_arrays:.1f}",
                  f"{args.rows / in_arrays / 1e6:.2f}", ""])  # fmt: skip
    if reference is not None:
        lines.append([f"FuxiCTR 2.3.10 gAUC ({os.cpu_count()} cores)", f"{len(part['user']):,}",
                      f"{peer_seconds:.1f}", f"{reference / 1e6:.4f}", ""])  # fmt: skip
    path.unlink()
    day: dict[str, object] = {}
    for kind in TYPES if args.day_types == "all" else [PLAIN]:
        if not args.day:
            break
        write(path, args.day, args.seed + 1, kind)
        took, found = evaluated(path)
        lines.append([f"the day: {kind}", f"{args.day:,}", f"{took.seconds:.1f}",
                      f"{args.day / took.seconds / 1e6:.2f}", f"{took.peak_bytes / MIB:,.0f}"])  # fmt: skip
        day[kind] = {"seconds": round(took.seconds, 1), "peak_mib": round(took.peak_bytes / MIB)}
        path.unlink()
    for left in folder.glob("predictions.metrics.json*"):
        left.unlink()
    measure.table(["", "rows", "seconds", "million rows/s", "peak MiB"], lines)
    print(f"largest difference from scikit-learn's AUC of a user, of 2,000 with ties: {difference:.1e}")
    measure.last_line(
        name="gauc",
        ratio=round(args.rows / in_arrays / reference, 1) if reference is not None else None,
        ours=round(args.rows / in_arrays),
        reference=round(reference) if reference is not None else None,
        unit="rows/s",
        rows=args.rows,
        seconds={kind: round(s, 2) for kind, s in seconds.items()},
        day_rows=args.day,
        day=day,
        largest_difference=difference,
    )


if __name__ == "__main__":
    main()
