"""`ctrkit serve` against the same exported model called through onnxruntime in a loop.

    python benchmarks/serve.py                       # DIN and DICM
    python benchmarks/serve.py --soak 600            # and ten minutes of DIN at 80% of the load that it took

The models are those of `benchmarks/train.py`, with random weights, a million goods: 10 user, 8 scene and 8 ad features,
the ad's goods and category (of DICM: goods and picture), embeddings of 12, tower 200-80-2, attention 80-40. A request
is one user with 32 behaviours (goods and category, or picture) and 100 candidate ads, as JSON with raw values; DICM's
pictures by name from features.h5, 4096 numbers each, of which the service keeps what the extractors make.

Each request has a user, a scene and behaviours of its own, drawn evenly; there are as many as a measurement sends. The
candidates are of a catalogue of 20,000 ads that run, whose popularity is as 1 / rank. The service knows those that it
was asked for lately by their JSON; the share of these is printed. "every ad new" is with ads of one request each, where
that memory is of no use.

ours: answers a second of `ctrkit serve --workers N`, N the number of cores, asked by a client of one thread over
keep-alive connections, each with one request under way. The client runs on the same cores and takes its share of them.
reference: calls a second of the programs of the same export folder through onnxruntime, the user's program and then the
ads', in one loop, onnxruntime with N threads, with the inputs of 512 requests, made before. There is no client, no JSON
and no lookup of values in it. "ratio_of_processes" is against N processes of one thread, each with such a loop: all
that the cores can do, which onnxruntime's threads do not reach with matrices of this size. `--workers 1` compares one
process with one.

Both are measured in turns, so that what the machine does meanwhile meets both. p50 and p99 are of the loaded service,
and of one at 80% of the load, requests at even intervals. The soak sends those for so many seconds and reads the
resident memory of the service's processes after a tenth of it at most, and at the end.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import train_data
from train import PICTURE_WIDTH

BEHAVIOURS, ADS = 32, 100
PICTURES = 5_000
CATALOGUE = 20_000
"""Ads that run."""
IN_LOOP = 512
"""Requests of the reference."""
HERE = Path(__file__).parent


def export(folder: Path, kind: str, goods: int) -> Path:
    """Write an export folder of a model with random weights, and what it is made from; return it."""
    import numpy as np
    import polars as pl

    from ctrkit import exporting, modelfile
    from ctrkit.batches import Schema
    from ctrkit.digests import Digests
    from ctrkit.recipe import Feature, Train

    with_pictures = kind == "dicm"
    (folder / "model").mkdir(parents=True)
    listed = {name: Feature(**f) for name, f in train_data.features(with_pictures).items()}
    sizes = {name: size + train_data.FIRST for name, size in sizes_of_values().items()}
    sizes |= {"goods": goods + train_data.FIRST, "category": train_data.CATEGORIES + train_data.FIRST}
    features = {name: f.model_dump(mode="json") | {"vocab": vocab_of(name, f)} for name, f in listed.items()}
    used = {f["vocab"] for f in features.values()}
    convert = folder / "convert"
    if with_pictures:
        train_data.write_pictures(folder, PICTURES, PICTURE_WIDTH)
        sizes["image"] = PICTURES + train_data.FIRST
    (convert / "vocab").mkdir(parents=True, exist_ok=True)
    for name in used - {"image"}:
        index = np.arange(train_data.FIRST, sizes[name], dtype=np.uint32)
        values = pl.Series("value", index).cast(pl.String)
        count = pl.ones(len(index), dtype=pl.UInt64, eager=True).alias("count")
        path = convert / "vocab" / f"{name}.parquet"
        pl.DataFrame([(name + "-" + values).alias("value"), pl.Series("index", index), count]).write_parquet(path)
    schema = Schema.from_json(
        {
            "features": features,
            "order": list(listed),
            "vocab_sizes": {name: size for name, size in sizes.items() if name in used},
            "vocab_digest": Digests().of(convert / "vocab"),
            "block_groups": 1,
            "negative_rate": 1.0,
        }
    )
    train = Train(model="dicm" if with_pictures else "din")
    pictures = None
    if with_pictures:
        pictures = modelfile.open_pictures(train, folder / "features.h5", convert)
        assert pictures is not None
        pictures.fit()
    counts = {name: np.zeros(size, np.int64) for name, size in schema.vocab_sizes.items()}
    model = modelfile.build(train, schema, counts, pictures)
    modelfile.save(model, folder / "model", {"pictures": {"backbone": "none"}, "days": None})
    exporting.export(folder / "model", convert, folder / "export", "onnx", BEHAVIOURS)
    return folder / "export"


def sizes_of_values() -> dict[str, int]:
    """Return the features of user, ad and scene, and how many values each has."""
    sizes = train_data.SIZES
    return {name: sizes[i % len(sizes)] for names in train_data.ONE_HOT.values() for i, name in enumerate(names)}


def vocab_of(name: str, feature: Any) -> str:
    return "image" if feature.kind == "image" else feature.vocab or name


def requests(kind: str, goods: int, count: int, catalogue: int, seed: int = 1) -> Iterator[str]:
    """Yield requests as JSON, with raw values of known ids.

    catalogue: ads of which each request has `ADS`; 0: each ad is in one request.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    sizes = sizes_of_values() | {"goods": goods, "category": train_data.CATEGORIES}

    def values(vocab: str, n: int) -> list[str]:
        if vocab == "image":
            return [f"{value}.jpg" for value in rng.integers(PICTURES, size=n).tolist()]
        return [f"{vocab}-{value}" for value in rng.integers(sizes[vocab], size=n) + train_data.FIRST]

    def rows(names: dict[str, str], n: int) -> list[str]:
        columns = [values(vocab, n) for vocab in names.values()]
        return [json.dumps(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]

    of = {owner: {name: name for name in names} for owner, names in train_data.ONE_HOT.items()}
    of["ad"] |= {"ad_goods": "goods"} | ({"ad_image": "image"} if kind == "dicm" else {"ad_category": "category"})
    of["behaviour"] = {"image": "image"} if kind == "dicm" else {"goods": "goods", "category": "category"}
    listed = rows(of["ad"], catalogue)
    rank_C = np.arange(1, catalogue + 1)
    for user, scene in zip(rows(of["user"], count), rows(of["scene"], count), strict=True):
        if catalogue:  # by popularity, none twice: the first to come of exponential clocks
            ads = [listed[i] for i in np.argpartition(rng.exponential(size=catalogue) * rank_C, ADS)[:ADS]]
        else:
            ads = rows(of["ad"], ADS)
        behaviours = ", ".join(rows(of["behaviour"], BEHAVIOURS))
        yield f'{{"user": {user}, "scene": {scene}, "behaviours": [{behaviours}], "ads": [{", ".join(ads)}]}}'


class Recorder:
    """Stands between a scorer and its programs, and keeps what they are called with."""

    def __init__(self, programs: Any) -> None:
        self._programs, self._run = programs, programs.run
        self.calls: list[tuple[str, dict[str, Any]]] = []
        programs.run = self._recorded

    def _recorded(self, name: str, given: dict[str, Any]) -> Any:
        wanted = self._programs.settings["programs"][name]["inputs"]
        self.calls.append((name, {key: given[key] for key in wanted}))
        return self._run(name, given)


def direct(folder: Path, features: Path | None, bodies: Path) -> None:
    """Be one process of the reference: for each line of standard input, threads and seconds, print a rate."""
    import onnxruntime

    from ctrkit.scorer import Scorer

    scorer = Scorer(folder, features)
    with bodies.open() as lines:
        made = [scorer.request.model_validate_json(line) for line in itertools.islice(lines, IN_LOOP)]
    for request in made:  # once before, so that pictures are extracted
        scorer.score(request)
    recorder = Recorder(scorer.programs)
    for request in made:
        scorer.score(request)
    calls = [call for call in recorder.calls if not call[0].endswith("pictures")]
    names = sorted({name for name, _ in calls})
    assert len(calls) == len(made) * len(names), "a request is one call of each program"
    print("ready", flush=True)
    for line in sys.stdin:
        threads, seconds = line.split()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        sessions = {name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options) for name in names}
        outputs = {name: [one.name for one in session.get_outputs()] for name, session in sessions.items()}
        ready = [(sessions[name], outputs[name], given) for name, given in calls]
        for session, wanted, given in ready:
            session.run(wanted, given)
        done, begun, end = 0, time.perf_counter(), time.perf_counter() + float(seconds)
        while time.perf_counter() < end:
            for session, wanted, given in ready:
                session.run(wanted, given)
            done += len(made)
        print(done / (time.perf_counter() - begun), flush=True)


@contextlib.contextmanager
def reference(folder: Path, features: Path | None, bodies: Path, processes: int) -> Iterator[Any]:
    """Start the reference's processes; yields a function that has so many of them run for some seconds, each with so
    many threads, and sums their rates."""
    command = [sys.executable, __file__, "--direct", str(folder), str(bodies), *([str(features)] if features else [])]
    begun = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(processes)]

    def rate(count: int, threads: int, seconds: float) -> float:
        for process in begun[:count]:
            assert process.stdin is not None
            print(threads, seconds, file=process.stdin, flush=True)
        return sum(float(process.stdout.readline()) for process in begun[:count] if process.stdout is not None)

    try:
        for process in begun:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield rate
    finally:
        for process in begun:
            process.kill()
            process.communicate()


class Service:
    """A running `ctrkit serve`."""

    def __init__(self, folder: Path, features: Path | None, workers: int) -> None:
        command = [sys.executable, "-m", "ctrkit", "serve", str(folder), "--port", "0", "--workers", str(workers)]
        command += ["--features", str(features)] if features else []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://\S+(?=,)", line)
        if found is None:
            sys.exit(f"{line}{self.process.stderr.read()}")
        self.url = found[0]

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()
        if exc[0] is None and self.process.returncode != 0:
            sys.exit(f"the service ended with exit status {self.process.returncode}")

    def asked(self, bodies: Path, **options: float | int | None) -> dict[str, Any]:
        """Return what `serve_load.py` found."""
        words = [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
        command = [sys.executable, str(HERE / "serve_load.py"), self.url, str(bodies), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        if found["errors"]:
            sys.exit(f"the service failed: {found}")
        return found

    def counted(self) -> tuple[float, float]:
        """Return how many ads it scored, and how many of them it knew."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            text = answer.read().decode()
        ads, known = (re.findall(rf"^ctrkit_{name}_ads_total (\S+)", text, re.M) for name in ("scored", "known"))
        return float(ads[0]), float(known[0])

    def resident_mib(self) -> float:
        """Return the memory of all its processes, pages that they share counted in each."""
        pids = {self.process.pid}
        for name in os.listdir("/proc"):
            if name.isdigit() and measure.parent(int(name)) in pids:
                pids.add(int(name))
        return sum(measure.resident(pid) for pid in pids) / measure.MIB


def compared(kind: str, args: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Measure one model; print it."""
    exported = export(folder / kind, kind, args.goods)
    features = folder / kind / "features.h5" if kind == "dicm" else None
    bodies, new = (folder / f"{kind}-{name}.jsonl" for name in ("catalogue", "new"))
    for path, catalogue in ((bodies, args.catalogue), (new, 0)):
        with path.open("w") as out:
            out.writelines(f"{one}\n" for one in requests(kind, args.goods, args.requests, catalogue))
    ours, of_new, theirs, of_processes, found, found_new = [], [], [], [], {}, {}
    with reference(exported, features, bodies, args.workers) as rate, Service(exported, features, args.workers) as one:
        one.asked(bodies, connections=args.connections, seconds=args.seconds)
        ads_known = 0.0
        for _ in range(args.rounds):
            theirs.append(rate(1, args.workers, args.seconds))
            of_processes.append(rate(args.workers, 1, args.seconds))
            found_new = one.asked(new, connections=args.connections, seconds=args.seconds)
            of_new.append(found_new["per_second"])
            one.asked(bodies, connections=args.connections, seconds=args.seconds)  # which it knew before the new ones
            before = one.counted()
            found = one.asked(bodies, connections=args.connections, seconds=args.seconds)
            ours.append(found["per_second"])
            ads, known = (b - a for a, b in zip(before, one.counted(), strict=True))
            ads_known = known / ads
        best = {"ours": statistics.median(ours), "reference": statistics.median(theirs)}
        best["ratio"] = best["ours"] / best["reference"]
        best["ads_known"] = ads_known
        best["ours_of_new_ads"] = statistics.median(of_new)
        best["ratio_of_new_ads"] = best["ours_of_new_ads"] / best["reference"]
        best["reference_of_processes"] = statistics.median(of_processes)
        best["ratio_of_processes"] = best["ours"] / best["reference_of_processes"]
        at_80 = one.asked(bodies, connections=32, seconds=args.seconds, rate=0.8 * best["ours"])
        served = {
            f"serve, {args.connections} connections, {ads_known:.0%} of the ads known": found,
            "serve, every ad new": found_new,
            "serve at 80% of the load, ads known": at_80,
        }
        rows = [
            [f"onnxruntime, a loop, threads: {args.workers}", f"{best['reference']:,.0f}", "", "", ""],
            [f"onnxruntime, loops of 1 thread: {args.workers}", f"{best['reference_of_processes']:,.0f}", "", "", ""],
            *[
                [name, f"{f['per_second']:,.0f}", f"{f['p50_ms']:.1f}", f"{f['p99_ms']:.1f}", f"{f['cpu_ms']:.3f}"]
                for name, f in served.items()
            ],
        ]
        with bodies.open() as lines:
            print(f"{kind}: {len(lines.readline()) - 1:,} bytes a request")
        of = [f"{name} {best[key]:.2f}" for name, key in (("", "ratio"), ("of new ads", "ratio_of_new_ads"))]
        print("ratio" + ", ".join(of) + f", of processes {best['ratio_of_processes']:.2f}")
        measure.table([kind, "requests/s", "p50 ms", "p99 ms", "client's CPU ms"], rows)
        result[kind] = best | {key: found[key] for key in ("p50_ms", "p99_ms")}
        result[kind] |= {f"{key}_at_80": at_80[key] for key in ("p50_ms", "p99_ms")}
        if args.soak and "soak" not in result:
            result["soak"] = soaked(one, bodies, 0.8 * best["ours"], args.soak)


def soaked(service: Service, bodies: Path, rate: float, seconds: float) -> dict[str, Any]:
    """Ask for so long; return errors, latencies and memory."""
    first = min(seconds / 10, 30)
    service.asked(bodies, connections=32, seconds=first, rate=rate)
    before = service.resident_mib()
    found = service.asked(bodies, connections=32, seconds=seconds - first, rate=rate)
    after = service.resident_mib()
    print(
        f"soak: {found['requests']:,} requests in {seconds - first:.0f} s, {found['errors']} errors, "
        f"p50 {found['p50_ms']:.1f} ms, p99 {found['p99_ms']:.1f} ms, "
        f"longest {found['longest_ms']:.0f} ms; memory {before:.1f} -> {after:.1f} MiB"
    )
    return {**found, "before_mib": before, "after_mib": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["din", "dicm"], help="one of the two; default: both")
    parser.add_argument("--goods", type=int, default=1_000_000)
    parser.add_argument("--catalogue", type=int, default=CATALOGUE, help="ads that run (%(default)s)")
    parser.add_argument("--requests", type=int, default=8192, help="that differ (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--connections", type=int, default=4, help="of the loaded service (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds; 0: none")
    parser.add_argument("--direct", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.direct:
        folder, bodies, *features = args.direct
        direct(folder, features[0] if features else None, bodies)
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [args.only] if args.only else ["din", "dicm"]:
            compared(kind, args, Path(folder), result)
    first = result.get("din") or result["dicm"]
    measure.last_line(
        name="serve",
        ratio=round(first["ratio"], 3),
        ours=round(first["ours"], 1),
        reference=round(first["reference"], 1),
        unit="requests/s",
        **result,
    )


if __name__ == "__main__":
    main()
