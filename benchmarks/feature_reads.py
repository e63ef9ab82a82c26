"""Random reads of picture vectors by FeatureStore, against what the machine can do with the same bytes.

    python benchmarks/feature_reads.py --rows 262144 --batch 4096

Batches of `--batch` distinct rows of `--width` float16 numbers are drawn evenly from a features.h5 and read as float32,
by one thread, in one process:

- from memory: all of the file in the page cache, into a buffer that is used again and again. The reference is the
  conversion of as many rows that lie side by side, from one buffer in memory to another, by torch: the same bytes read
  and written, with nothing to look up. This is the ratio that is printed. Beside it: a fresh result for each read;
  likewise with the most used quarter, half and all of the rows held as training holds them; the rows as float16; and
  numpy's conversion.
- from the disk: the file dropped from the page cache before each batch, wall time. The reference is reading as many
  bytes of the file in order, dropped likewise. Beside it: the same rows one after the other through a mapped file,
  which is what reading without asking ahead costs.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import measure
import numpy as np
import torch
from measure import MIB

from ctrkit.feature_cache import FeatureCache
from ctrkit.features import FeatureStore

GIB = 2**30


def write(path: Path, rows: int, width: int) -> None:
    """Write a features.h5 of random vectors, if it is not there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).normal(size=(min(rows, 4096), width)).astype(np.float16)
    tmp = path.with_suffix(".tmp")
    with h5py.File(tmp, "w") as h5:
        features = h5.create_dataset("features", (rows, width), np.float16)
        for begin in range(0, rows, len(block)):
            features[begin : begin + len(block)] = block[: rows - begin]
        h5.create_dataset("image", data=np.array([], object), dtype=h5py.string_dtype())
        h5.create_dataset("row", data=np.array([], np.int64))
    tmp.rename(path)


def best(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Return the least of several times, in seconds."""
    found = []
    for _ in range(repeats):
        begun = clock()
        work()
        found.append(clock() - begun)
    return min(found)


def in_memory(path: Path, batches: list[np.ndarray], repeats: int) -> dict[str, float]:
    """Return seconds a batch by what is done, everything being in memory, in CPU time."""
    measure.warm([path])
    store = FeatureStore(path)
    rows, width, n = store.rows, store.width, len(batches[0])
    out, half = np.empty((n, width), np.float32), np.empty((n, width), np.float16)

    def time_all(work: Callable[[np.ndarray], object]) -> float:
        def each() -> None:
            for batch in batches:
                work(batch)

        each()  # page faults, and rows that are read for the first time
        return best(each, repeats, time.process_time) / len(batches)

    found = {"read": time_all(lambda batch: store.read(batch, out))}
    found["read into fresh memory"] = time_all(lambda batch: store.read(batch))
    found["read as float16"] = time_all(lambda batch: store.read(batch, half))
    for share in (0.25, 0.5, 1.0):
        held = FeatureCache(store, host_bytes=int(rows * share) * width * 2)
        held.prefetch(batches[0][:0])
        found[f"{share:.0%} held in memory"] = time_all(lambda batch, held=held: held.read(np.sort(batch)))  # type: ignore[misc]
        del held
    copied = half.copy()
    narrow, wide = torch.from_numpy(half), torch.from_numpy(out)
    found["limit: torch converts rows side by side"] = time_all(lambda _: wide.copy_(narrow))
    found["numpy converts rows side by side"] = time_all(lambda _: np.copyto(out, half))
    found["copy of rows side by side, not converted"] = time_all(lambda _: np.copyto(copied, half))
    return found


def from_disk(path: Path, batches: list[np.ndarray], row_bytes: int) -> dict[str, float]:
    """Return seconds a batch by what is done, the file being on disk only, in wall time: the best of all batches."""
    with h5py.File(path) as h5:
        offset, shape = h5["features"].id.get_offset(), h5["features"].shape
    found: dict[str, list[float]] = {"read": [], "limit: in order": [], "one after the other, mapped": []}
    buffer = bytearray(8 * MIB)
    for batch in batches:
        measure.drop(path)
        store = FeatureStore(path)
        begun = time.perf_counter()
        store.read(batch)
        found["read"].append(time.perf_counter() - begun)
        del store
        measure.drop(path)
        begun = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            left = len(batch) * row_bytes
            while left > 0:
                left -= file.readinto(memoryview(buffer)[: min(left, len(buffer))]) or left
        found["limit: in order"].append(time.perf_counter() - begun)
        measure.drop(path)
        begun = time.perf_counter()
        mapped = np.memmap(path, np.float16, "r", offset, shape)
        mapped[batch].astype(np.float32)
        found["one after the other, mapped"].append(time.perf_counter() - begun)
        del mapped
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131_072, help="vectors in the file")
    parser.add_argument("--width", type=int, default=4096, help="numbers of a vector")
    parser.add_argument("--batch", type=int, default=4096, help="distinct rows of a read")
    parser.add_argument("--batches", type=int, default=4, help="different batches")
    parser.add_argument("--repeats", type=int, default=5, help="times each is done; the fastest counts")
    parser.add_argument("--data", type=Path, default=Path("runs/bench"), help="where the file is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.data / f"features-{args.rows}x{args.width}.h5"
    write(path, args.rows, args.width)
    random = np.random.default_rng(1)
    batches = [random.choice(args.rows, args.batch, replace=False) for _ in range(args.batches)]
    row_bytes = args.width * 2
    cold = from_disk(path, batches, row_bytes)
    warm = in_memory(path, batches, args.repeats)
    size = args.batch * row_bytes
    print(f"{args.batch:,} rows of {args.width:,} float16, of {args.rows:,} ({args.rows * row_bytes / GIB:.1f} GiB)")
    for title, times in (("from memory, CPU time", warm), ("from the disk, wall time", cold)):
        lines = [
            [name, f"{seconds / args.batch * 1e6:.2f}", f"{size / seconds / 1e9:.2f}"]
            for name, seconds in times.items()
        ]
        measure.table([title, "µs a row", "GB/s of float16"], lines)
    limit = next(name for name in warm if name.startswith("limit"))
    measure.last_line(
        name="feature-reads",
        ratio=round(warm[limit] / warm["read"], 3),
        ours=round(args.batch / warm["read"]),
        reference=round(args.batch / warm[limit]),
        unit="rows/s",
        width=args.width,
        warm_rows_per_second={name: round(args.batch / seconds) for name, seconds in warm.items()},
        cold_rows_per_second={name: round(args.batch / seconds) for name, seconds in cold.items()},
        cold_ratio=round(cold["limit: in order"] / cold["read"], 3),
        numpy_over_torch=round(warm["numpy converts rows side by side"] / warm[limit], 2),
    )


if __name__ == "__main__":
    main()
