"""Samples a second of training, against DeepCTR-Torch and FuxiCTR on the same data, work and threads.

    python benchmarks/train.py             # DIN, three settings, both peers; grouped against not; DICM
    python benchmarks/train.py --only din --peers '' --precision bfloat16
    python benchmarks/train.py --only dicm --device cuda --batch 60000 --pictures 10000000 --precision bfloat16

DIN: 240,000 impressions in 20,000 groups of 12; 10 user, 8 ad and 8 scene features (vocabularies of 3 to 20,000), goods
(Zipf 1.2) and category (5,000); histories Poisson 32.6 capped at 64; embedding 12, unit [q; k; q − k; q∘k] 80-40
with softmax, tower 200-80, BatchNorm, batch 3,000, Adam. Ours is the Trainer of `ctrkit train` on a groups folder:
reading, shuffling, batches, regularisation, unknown ids, checks for finite gradients, all of it. The peers, in a venv
of their own with the same torch, get their batches ready made (`train_peers.py`), histories padded to 64. All run one
after the other, each in a process of its own. The rate is samples over seconds, after --warm steps.

DICM: 27 ID features, the ad's picture and the users' pictures, 4096 numbers of float16 each; its multiplications and
additions by the shapes of the batches, over those of a large matrix product measured here in the same process. With
--held, once for each share of the picture rows asked for that the host's memory is to hold (1, 0.5, 0), as if the
system had no memory to spare: it is told to forget rows once neither of the next two batches needs them. What the disk
gave is counted by the system (read_bytes of /proc/self/io).
"""

import argparse
import contextlib
import itertools
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import measure
import numpy as np
import train_data
from train_data import World

PEERS = {"deepctr": "deepctr-torch==0.3.0", "fuxictr": "fuxictr==2.3.10"}
SETTINGS = {
    "200,000 goods, PReLU": (200_000, "prelu"),
    "200,000 goods, Dice": (200_000, "dice"),
    "10 million goods, PReLU": (10_000_000, "prelu"),
}
TARGET = "10 million goods, PReLU"
WIDTH = 12
PICTURE_WIDTH = 4096


class Enough(Exception):
    """So many steps have been measured."""


def peers_python(folder: Path) -> Path:
    """Return the Python of the peers' venv, made if it is not there. It sees this venv's torch, behind its own."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    wanted = "\n".join(PEERS.values())
    if not done.is_file() or done.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        site = Path(np.__file__).parent.parent
        (next(folder.glob("lib/python*/site-packages")) / "shared.pth").write_text(f"{site}\n")
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS.values()], check=True, stdout=sys.stderr)
        done.write_text(wanted)
    return python


def peer_seconds(peer: str, data: World, act: str, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each step of a peer after the warm-up."""
    config = {
        "one_hot": [n for names in train_data.ONE_HOT.values() for n in names],
        "sizes": {**data.sizes, "goods": len(data.category_V), "category": train_data.CATEGORIES + train_data.FIRST},
        "width": WIDTH,
        "activation": act,
        "batch": args.batch,
        "longest": train_data.LONGEST,
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.npz")
        np.savez(path, **train_data.rows(data, args.batch * (args.peer_warm + args.peer_steps)))
        script = Path(__file__).with_name("train_peers.py")
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        done = subprocess.run(
            [peers_python(args.data / "peers"), script, peer, path, json.dumps(config)],
            capture_output=True,
            text=True,
            env=env,
            cwd=folder,
        )
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stdout}{done.stderr}")
    return list(json.loads(done.stdout.splitlines()[-1]))[args.peer_warm :]


def ours(groups: Path, config: dict[str, Any], args: argparse.Namespace, *, forget: bool = False) -> dict[str, Any]:
    """Return what `train.py --one` finds in a process of its own: samples a second, and about the batches."""
    words = {"groups": str(groups), "config": config, "warm": args.warm, "steps": args.steps, "forget": forget}
    command = [sys.executable, __file__, "--one", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def one(words: dict[str, Any]) -> None:
    """Train on a groups folder for so many steps, as `ctrkit train` does; print the rate."""
    import torch

    from ctrkit import devices, modelfile, training
    from ctrkit.batches import GroupedData, Schema
    from ctrkit.models.batch import Batch
    from ctrkit.recipe import Train

    groups = Path(words["groups"])
    config = Train(**words["config"])
    device = devices.resolve(config.device, "train.device")
    devices.set_up(device, config.threads)
    schema = Schema.read(groups)
    has_pictures = config.looks_at_pictures
    pictures = modelfile.open_pictures(config, groups / "features.h5", groups / "convert") if has_pictures else None
    if pictures is not None:  # from pictures that are hardly asked for, so that the others stay on the disk
        pictures.fit((np.arange(len(pictures.row_V)) >= len(pictures.row_V) - 4096).astype(np.int64))
    counts = modelfile.read_counts(groups, schema)
    model = modelfile.build(config, schema, counts, pictures).to(device)
    if words["forget"]:
        forget(pictures)
    trainer = training.Trainer(model, counts, GroupedData(groups, "train", model.plan.features), None, None)
    times: list[float] = []
    seen: list[dict[str, float]] = []
    step = trainer.step

    def timed(batch: Batch) -> torch.Tensor:
        loss = step(batch)
        if len(times) in (words["warm"], words["warm"] + words["steps"]) and device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        seen.append(
            {
                "samples": batch.n_samples,
                "pairs": len(batch.sample_P),
                "distinct": len(batch.sample_P if batch.distinct is None else batch.distinct.query_P),
                "behaviours": len(batch.group_B),
                "pictures": sum(len(x) for x in batch.picture_NW.values()),
                "rows": sum(len(r) for r in batch.rows.values()),
                "disk_bytes": disk_bytes(),
                "waited": pictures.cache.uses().seconds_waited if pictures else 0.0,
                "hit_rate": hit_rate(pictures),
            }
        )
        if len(times) > words["warm"] + words["steps"]:
            raise Enough
        return loss

    trainer.step = timed  # type: ignore[method-assign]
    before, begun = os.times(), time.perf_counter()
    with contextlib.suppress(Enough):
        trainer.run()
    cpu = os.times().user + os.times().system - before.user - before.system
    measured = seen[words["warm"] + 1 :]
    seconds = times[-1] - times[words["warm"]]
    found = {k: statistics.fmean(s[k] for s in measured) for k in measured[0]}
    for total in ("disk_bytes", "waited"):
        found[total] = (measured[-1][total] - seen[words["warm"]][total]) / len(measured)
    found |= {"rate": sum(s["samples"] for s in measured) / seconds, "steps": len(measured)}
    # What the first steps took beyond as many later ones: reading begins, and the compiler works.
    found["start"] = times[words["warm"]] - begun - (words["warm"] + 1) * seconds / len(measured)
    found |= {"cores": cpu / (times[-1] - times[0]), "matrix": matrix_rate(device, config.precision)}
    print(json.dumps(found))


def forget(pictures: Any) -> None:
    """Have the system keep of the features no row that no batch at hand needs, as where memory is full."""
    store, cache = pictures.store, pictures.cache
    vars(store)["_been_read"] = None
    (piece,) = store._pieces
    row_bytes = store.width * store.dtype.itemsize
    asked: list[np.ndarray] = []
    prefetch = cache.prefetch

    def forgetting(row_N: np.ndarray) -> None:
        asked.append(row_N)
        if len(asked) > 4:  # two picture features a batch: that of the batch before the last one has been read
            for row in np.setdiff1d(asked.pop(0), np.concatenate(asked)).tolist():
                offset = piece.offset + row * row_bytes
                begin, end = offset // mmap.PAGESIZE * mmap.PAGESIZE, offset + row_bytes
                if row >= 0:
                    piece.data.base.base.obj.madvise(mmap.MADV_DONTNEED, begin, end - begin)
                    os.posix_fadvise(piece.file, offset, row_bytes, os.POSIX_FADV_DONTNEED)
        prefetch(row_N)

    cache.prefetch = forgetting


def disk_bytes() -> int:
    """Return the bytes that the system has fetched from disks for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def hit_rate(pictures: Any) -> float:
    """Return the share of the rows asked for so far that did not lie on the disk."""
    uses = pictures.cache.uses() if pictures else None
    return 1 - uses.from_disk / uses.rows if uses and uses.rows else 1.0


def matrix_rate(device: str, precision: str) -> float:
    """Return the multiplications and additions a second of a large matrix product."""
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[precision]
    n = 16384 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def dicm_flops(found: dict[str, float], config: dict[str, Any]) -> float:
    """Return multiplications and additions of a step of DICM: layers forward, for their input and for their weights;
    not for the input where that is a picture."""
    extractor = config.get("extractor", (256, 64, 12))
    inner = sum(a * b for a, b in itertools.pairwise(extractor))
    context = 27 * WIDTH + extractor[-1]
    tower = (context + extractor[-1]) * 200 + 200 * 80 + 80 * 2
    first = found["samples"] * context * 80 + found["behaviours"] * extractor[-1] * 80
    pairs = found["pairs"] * (80 * 40 + 40)
    rest = 3 * (found["pictures"] * inner + found["samples"] * tower + first + pairs)
    return 2 * (2 * found["pictures"] * PICTURE_WIDTH * extractor[0] + rest)


def din(args: argparse.Namespace, base: dict[str, Any], result: dict[str, Any]) -> None:
    """Measure DIN in all settings, ours and the peers; and ungrouped."""
    lines = []
    for name, (goods, act) in SETTINGS.items():
        if args.settings and args.settings not in name:
            continue
        data = train_data.world(args.impressions, goods)
        config = base | {"model": "din", "din": "din-code", "din_activation": act, "activation": act}
        with tempfile.TemporaryDirectory() as folder:
            train_data.write_groups(data, Path(folder, "groups"))
            found = ours(Path(folder, "groups"), config, args)
            rates = {"ours": found["rate"]} | {key: found[key] for key in ("cores", "matrix", "start")}
            if args.ungrouped and act == "prelu" and goods == 200_000:
                train_data.write_groups(data, Path(folder, "alone"), ungrouped=True)
                rates["ungrouped"] = ours(Path(folder, "alone"), config, args)["rate"]
        for peer in args.peers:
            rates[peer] = args.batch / statistics.median(peer_seconds(peer, data, act, args))
        result["din"][name] = rates
        best = max((rates[p] for p in args.peers), default=0.0)
        cells = [name, f"{rates['ours']:,.0f}", *(f"{rates[p]:,.0f}" for p in args.peers)]
        lines.append([*cells, f"{rates['ours'] / best:.1f} ×" if best else "–", f"{rates['cores']:.2f}"])
        print(
            f"  {', '.join(cells)}; {found['pairs']:,.0f} pairs, of which {found['distinct']:,.0f} "
            f"distinct, {found['rows']:,.0f} rows a batch; {found['start']:.1f} s to start",
            flush=True,
        )
    measure.table(["samples a second", "ours", *args.peers, "against the faster", "cores used"], lines)
    for name, rates in result["din"].items():
        if "ungrouped" in rates:
            times = rates["ours"] / rates["ungrouped"]
            print(f"{name}: grouped {times:.2f} times as fast as ungrouped ({rates['ungrouped']:,.0f} samples/s)")


def dicm(args: argparse.Namespace, base: dict[str, Any], result: dict[str, Any]) -> None:
    """Measure DICM whole."""
    data = train_data.world(args.impressions, max(200_000, args.pictures))
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder, "groups")
        train_data.write_groups(data, groups, pictures=args.pictures)
        train_data.write_pictures(groups, args.pictures, PICTURE_WIDTH)
        config = base | {"model": "dicm"}
        found = ours(groups, config, args)
    flops = dicm_flops(found, config) / found["samples"]
    share = found["rate"] * flops / found["matrix"]
    result["dicm"] = {
        "rate": found["rate"],
        "start": found["start"],
        "flops_a_sample": flops,
        "matrix": found["matrix"],
        "share": share,
    }
    print(
        f"DICM whole: {found['rate']:,.0f} samples/s, {flops / 1e6:.2f} MFLOP a sample ({found['pictures']:,.0f} "
        f"distinct pictures a batch of {found['samples']:,.0f}), {share:.0%} of the matrix rate of "
        f"{found['matrix'] / 1e9:,.0f} GFLOP/s; {found['start']:.1f} s to start",
        flush=True,
    )


def rows_for(share: float, pictures: int, ads: int, behaviours: int) -> int:
    """Return how many of the first rows are this share of what a batch of so many ads and behaviours asks for."""
    if share >= 1:
        return pictures
    p_V = np.arange(1, pictures + 1, dtype=np.float64) ** -1.2
    p_V /= p_V.sum()
    asked_V = sum(-np.expm1(n * np.log1p(-p_V)) for n in (ads, behaviours))
    return int(np.searchsorted(np.cumsum(asked_V) / asked_V.sum(), share))


def dicm_held(args: argparse.Namespace, base: dict[str, Any], result: dict[str, Any]) -> None:
    """Measure DICM whole with some of the features held in memory."""
    data = train_data.world(args.impressions, args.pictures)
    lines = []
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        groups = Path(folder, "groups")
        train_data.write_groups(data, groups, pictures=args.pictures)
        train_data.write_pictures(groups, args.pictures, PICTURE_WIDTH)
        for share in args.held:
            behaviours = int(args.batch / train_data.GROUP * train_data.MEAN)
            rows = rows_for(share, args.pictures, args.batch, behaviours)
            measure.drop(groups / "features.h5")
            config = base | {"model": "dicm", "host_cache_gib": rows * PICTURE_WIDTH * 2 / 2**30}
            found = ours(groups, config, args, forget=True)
            result["dicm"][str(share)] = found
            cells = [f"{rows:,}", f"{found['hit_rate']:.0%}", f"{found['disk_bytes'] / 1e6:.1f}"]
            rate, waited = found["rate"], found["waited"] * 1e3
            lines.append([f"{share:.0%}", *cells, f"{rate:,.0f}", f"{waited:.1f}", f"{found['cores']:.2f}"])
    head = ["share asked for", "rows held", "found", "MB of disk a batch", "samples/s", "ms waited a batch", "cores"]
    measure.table(head, lines)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["din", "dicm"], help="one of the two; default: both")
    parser.add_argument("--settings", default="", help="part of the names of DIN's settings; default: all")
    parser.add_argument("--peers", default=",".join(PEERS), help="peers to measure; '' for none (%(default)s)")
    parser.add_argument("--ungrouped", action=argparse.BooleanOptionalAction, default=True, help="ungrouped too")
    parser.add_argument("--impressions", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="steps to measure (%(default)s)")
    parser.add_argument("--warm", type=int, default=10, help="steps before them (%(default)s)")
    parser.add_argument("--peer-steps", type=int, default=6, help="of the peers (%(default)s); their median counts")
    parser.add_argument("--peer-warm", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=50_000, help="DICM's (%(default)s)")
    parser.add_argument("--held", default="", help="DICM only: shares of the rows asked for to hold, say 1,0.5,0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--set", action="append", default=[], help="a key of [train], say --set regularisation=none")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BENCH_DATA") or "runs/bench"))
    args = parser.parse_args()
    args.data = args.data.absolute()
    args.held = [float(share) for share in args.held.split(",") if share]
    args.peers = [p for p in args.peers.split(",") if p]
    base = {"batch": args.batch, "threads": args.threads, "device": args.device, "precision": args.precision}
    base |= {"compile": args.compile, "log_every": 0} | dict(text.split("=", 1) for text in args.set)
    result: dict[str, Any] = {"din": {}}
    if args.only != "dicm" and not args.held:
        din(args, base, result)
    if args.held:
        args.data.mkdir(parents=True, exist_ok=True)
        result["dicm"] = {}
        dicm_held(args, base, result)
    elif args.only != "din":
        dicm(args, base, result)
    target = result["din"].get(TARGET) or next(iter(result["din"].values()), {})
    ours_rate = target.get("ours", result.get("dicm", {}).get("rate"))
    reference = max((target[p] for p in args.peers if p in target), default=None)
    measure.last_line(
        name="train",
        ratio=round(ours_rate / reference, 3) if reference else None,
        ours=ours_rate,
        reference=reference,
        unit="samples/s",
        **result,
    )


if __name__ == "__main__":
    main()
