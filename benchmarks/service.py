"""Several ranks that train DICM: what they send each other, what merging saves, and how fast they are.

    python benchmarks/service.py                       # 2 and 4 processes on this machine, against one
    python benchmarks/service.py --device cuda --ranks 2,4,8 --batch 60000 --pictures 10000000

The data and the model are those of `benchmarks/train.py`: 27 ID features, goods by Zipf 1.2, histories of 32.6, the
ad's picture and the users' pictures, of which all goods that are equal modulo --pictures share one. The ranks are real
processes, joined by gloo (NCCL with --device cuda) through torchrun, and train as `ctrkit train` does.

Bytes: counted as they are handed to the collectives, but not what a rank sends itself; of all-reduces, which send each
byte 2·(W − 1)/W times from each of W ranks, that. In the same steps the ranks also ship what a training without
a feature service would: for each picture that a rank names, its 4096 numbers of float16 from the rank on which they
lie, through the same exchange and counted by the same counters; ids the same, no gradients. A picture that a rank names
both as an ad's and as a behaviour's counts twice in either (its two vectors differ), and under "each once" once among
those shipped. "network" is what left all interfaces of this machine in the steps whose rate is measured, packets' heads
and whatever else sent at that time included.

Rates: samples over seconds between the same steps, after --warm steps, by one process with --threads threads and by
ranks of one thread, in turns, --rounds times, so that what the machine does meanwhile meets all; the share "of one" is
the median over the rounds, and so are the rates. CPU time is that of all ranks, the threads that make batches and send
included.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import train_data
from train import PICTURE_WIDTH, Enough, dicm_flops, matrix_rate

WIRES = ("float32", "bfloat16")


def launched(ranks: int, words: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each of the trainings that `words` describes found, made by so many processes."""
    through = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *through, __file__, "--one", json.dumps(words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else None
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def one(words: dict[str, Any]) -> None:
    """Be one of the ranks: make the trainings, and print, as the first, what they found."""
    from ctrkit.ranks import Ranks

    ranks = Ranks.of_environment()
    with ranks.joined():
        found = [trained(ranks, Path(words["groups"]), **training) for training in words["trainings"]]
        if ranks.rank == 0:
            print(json.dumps(found))


def trained(
    ranks: Any, groups: Path, config: dict[str, Any], warm: int, steps: int, *, ship: bool = False
) -> dict[str, Any]:
    """Train for so many steps after those to warm up; return the rate, and what a step had and sent.

    ship: also ship the features of each batch's pictures, and count that.
    """
    import torch

    from ctrkit import devices, modelfile, training
    from ctrkit.batches import GroupedData, Schema
    from ctrkit.data_parallel import DataParallel
    from ctrkit.feature_service import FeatureService
    from ctrkit.models.batch import Batch
    from ctrkit.placement import spreads_pictures
    from ctrkit.recipe import Train

    settings = Train(**config)
    device = devices.of_rank(settings.device, "train.device", ranks)
    devices.set_up(device, settings.threads)
    schema = Schema.read(groups)
    pictures = modelfile.open_pictures(settings, groups / "features.h5", groups / "convert", ranks)
    assert pictures is not None
    pictures.fit()
    counts = modelfile.read_counts(groups, schema)
    model = modelfile.build(settings, schema, counts, pictures, ranks=ranks).to(device)
    service = None
    if ranks.count > 1:
        spread = spreads_pictures(model.plan, ranks.count)
        parallel = DataParallel(ranks, device)
        wire = settings.exchange_dtype
        service = FeatureService(parallel, model.tables, pictures, spread_pictures=spread, exchange_dtype=wire)
    model.service = service
    trainer = training.Trainer(model, counts, GroupedData(groups, "train", model.plan.features), None, None)
    shipping = Shipping(service) if ship and service is not None else None
    times: list[float] = []
    seen: list[dict[str, float]] = []
    step = trainer.step

    def timed(batch: Batch) -> torch.Tensor:
        if shipping is not None:
            shipping.ship(batch)
        loss = step(batch)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        seen.append(
            {
                "cpu": cpu_seconds(),
                "network": network_bytes(),
                "samples": batch.n_total,
                "pairs": len(batch.sample_P),
                "behaviours": len(batch.group_B),
                "pictures": sum(len(x) for x in batch.picture_NW.values()),
            }
        )
        if len(times) > warm + steps:
            raise Enough
        return loss

    trainer.step = timed  # type: ignore[method-assign]
    with contextlib.suppress(Enough):
        trainer.run()
    measured, seconds = seen[warm + 1 :], times[-1] - times[warm]
    mine = {k: statistics.fmean(s[k] for s in measured) for k in measured[0]}
    mine |= {k: (seen[-1][k] - seen[warm][k]) / len(measured) for k in ("cpu", "network")}
    all_ranks = ranks.gather(mine)
    # These two are of all ranks already, the rest is summed over them.
    found: dict[str, Any] = {k: sum(r[k] for r in all_ranks) for k in mine}
    found |= {k: mine[k] for k in ("samples", "network")}
    found |= {"ranks": ranks.count, "rate": sum(s["samples"] for s in measured) / seconds}
    found["matrix"] = matrix_rate(device, settings.precision)
    if service is not None:
        found["bytes"] = {k: n / len(times) for k, n in service.traffic().items()}
    if shipping is not None:
        found["shipped"] = {k: n / len(times) for k, n in shipping.traffic().items()}
    return found


def cpu_seconds() -> float:
    """Return the CPU time of this process so far."""
    spent = os.times()
    return spent.user + spent.system


def network_bytes() -> float:
    """Return what has left this machine's interfaces so far, the loopback among them; 0 where Linux does not say."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines()[2:] if path.is_file() else []
    return float(sum(int(line.split(":")[1].split()[8]) for line in lines))


class Shipping:
    """Sends the features of pictures, where the feature service sends what was made of them."""

    def __init__(self, service: Any) -> None:
        import torch.distributed as dist

        from ctrkit.row_exchange import RowExchange

        self.service = service
        ahead = dist.new_group(backend="gloo")  # the service's own may be in use, for the batches to come
        self.exchanges = {kind: RowExchange(service.parallel.rows, ahead) for kind in ("each", "once")}
        """For what the service sends too, a picture as an ad's and as a behaviour's; and each picture once."""

    def ship(self, batch: Any) -> None:
        """Ship the features of the pictures that the ranks name in a batch. A collective."""
        import torch

        from ctrkit.row_exchange import Ask

        store = self.service.pictures.store
        named = [rows.cpu() + 1 for rows in batch.picture_row.values()]
        for kind, rows in (("each", named), ("once", [torch.unique(torch.cat(named))])):
            exchange = self.exchanges[kind]
            for route in exchange.routes([Ask(rows_U, store.rows + 1, "picture") for rows_U in rows]):
                read = store.read((route.rows_M - 1).clamp(min=0).cpu().numpy())
                shipped_UW = route.spread(
                    torch.from_numpy(read).half().to(self.service.parallel.device)
                )  # as the file has them
                assert shipped_UW.dtype == torch.float16
                assert shipped_UW.shape == (len(route.ask.rows_U), store.width)

    def traffic(self) -> dict[str, int]:
        """Return the bytes sent, over all ranks. A collective."""
        import numpy as np

        sent = [float(sum(exchange.sent.values())) for exchange in self.exchanges.values()]
        return dict(zip(self.exchanges, map(int, self.service._sum(np.array(sent))), strict=True))


def of_pictures(found: dict[str, Any]) -> float:
    """Return the bytes a step of pictures' ids, vectors, gradients and counts."""
    return float(sum(n for kind, n in found["bytes"].items() if kind.startswith("bytes of picture")))


def traffic_of(found: Sequence[dict[str, Any]], wires: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return what the ranks of one number sent, for each dtype that vectors travelled in."""
    out: dict[str, dict[str, float]] = {}
    for result, wire in zip(found, wires, strict=True):
        sent, shipped, samples = of_pictures(result), result["shipped"], result["samples"]
        of_tables = sum(n for kind, n in result["bytes"].items() if kind.startswith("bytes of table"))
        ranks = result["ranks"]
        named, extracted = result["bytes"]["pictures named"], result["bytes"]["pictures extracted"]
        out[wire] = {
            "ratio": shipped["each"] / sent,
            "ratio once": shipped["once"] / sent,
            "pictures": sent / samples,
            "shipped": shipped["each"] / samples,
            "shipped once": shipped["once"] / samples,
            "tables": of_tables / samples,
            "dense": 2 * (ranks - 1) / ranks * result["bytes"]["bytes of dense gradients"] / samples,
            "named": named,
            "extracted": extracted,
        }
    return out


def median(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the training whose rate is in the middle."""
    return sorted(found, key=lambda one: float(one["rate"]))[len(found) // 2]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", help="numbers of processes (%(default)s)")
    parser.add_argument("--impressions", type=int, default=180_000)
    parser.add_argument("--batch", type=int, default=3000, help="the global batch (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the one process (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure the rate of (%(default)s)")
    parser.add_argument("--warm", type=int, default=10, help="steps before them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often rates are measured (%(default)s)")
    parser.add_argument("--count-steps", type=int, default=5, help="steps to count bytes in (%(default)s)")
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], help="a key of [train], say --set placement=shard")
    args = parser.parse_args()
    counts = [int(n) for n in args.ranks.split(",")]
    base = {"model": "dicm", "batch": args.batch, "device": args.device, "log_every": 0}
    base |= dict(text.split("=", 1) for text in args.set)
    data = train_data.world(args.impressions, max(200_000, args.pictures))
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder, "groups")
        train_data.write_groups(data, groups, pictures=args.pictures)
        train_data.write_pictures(groups, args.pictures, PICTURE_WIDTH)
        del data

        def run(ranks: int, threads: int, counting: bool) -> list[dict[str, Any]]:
            config = {**base, "threads": threads}
            trainings: list[dict[str, Any]] = [{"config": config, "warm": args.warm, "steps": args.steps}]
            if counting:
                counted = {"warm": 0, "steps": args.count_steps, "ship": True}
                trainings += [{"config": {**config, "exchange_dtype": wire}, **counted} for wire in WIRES]
            return launched(ranks, {"groups": str(groups), "trainings": trainings})

        rounds = []
        for number in range(args.rounds):
            (alone,) = run(1, args.threads, False)
            rounds.append((alone, {ranks: run(ranks, 1, number == 0) for ranks in counts}))
    shares = {ranks: [found[ranks][0]["rate"] / alone["rate"] for alone, found in rounds] for ranks in counts}
    alone = median([alone for alone, _ in rounds])
    several = {ranks: [median([r[ranks][0] for _, r in rounds]), *rounds[0][1][ranks][1:]] for ranks in counts}
    flops = dicm_flops(alone, base) / alone["samples"]
    rows = []
    for found in (alone, *(results[0] for results in several.values())):
        cells = [f"{found['ranks']} × {args.threads if found is alone else 1}", f"{found['rate']:,.0f}"]
        share = 1.0 if found is alone else statistics.median(shares[found["ranks"]])
        cells += [f"{share:.2f}", f"{1e6 * found['cpu'] / found['samples']:.1f}"]
        rows.append([*cells, f"{found['network'] / found['samples']:,.0f}"])
    measure.table(["processes × threads", "samples/s", "of one", "µs CPU a sample", "network, bytes a sample"], rows)
    traffic = {ranks: traffic_of(results[1:], WIRES) for ranks, results in several.items()}
    rows = [
        [f"{ranks}, {wire}", *(f"{found[k]:,.0f}" for k in ("pictures", "shipped", "tables", "dense"))]
        + [f"{found[k]:.1f}" for k in ("ratio", "ratio once")]
        + [f"{found['named']:,.0f}", f"{found['extracted']:,.0f}"]
        for ranks, of_wire in traffic.items()
        for wire, found in of_wire.items()
    ]
    head = ["ranks, wire", "pictures", "shipped", "tables", "dense", "ratio", "each once", "named", "extracted"]
    print("\nbytes a sample over all ranks; distinct pictures a batch")
    measure.table(head, rows)
    print(f"\n{flops / 1e6:.2f} MFLOP a sample; a large matrix product: {alone['matrix'] / 1e9:,.0f} GFLOP/s")
    first = counts[0]
    measure.last_line(
        name="service",
        ratio=round(traffic[first]["float32"]["ratio"], 1),
        ours=traffic[first]["float32"]["pictures"],
        reference=traffic[first]["float32"]["shipped"],
        unit="bytes a sample",
        traffic=traffic,
        rates={"one process": alone["rate"], **{n: results[0]["rate"] for n, results in several.items()}},
        speed={n: round(statistics.median(found), 3) for n, found in shares.items()},
        speed_by_round={n: [round(share, 3) for share in found] for n, found in shares.items()},
        cpu={f["ranks"]: f["cpu"] / f["samples"] for f in (alone, *(r[0] for r in several.values()))},
        flops_a_sample=flops,
    )


if __name__ == "__main__":
    main()
