"""Scores a second of an exported model against `ctrkit predict`, on the same samples, and how far they are apart.

Both run in this process, on one thread, from groups on disk to scores in memory, with the models loaded: `predict` in
batches of 4,096 samples, the exported programs user by user as they serve requests. In turns, the best of each counts.
What the exported model does is told apart: users, ads, pictures, and the Python around them. The ratio is that of the
model whose export is slowest against `predict`.

    make bench-export BENCH='--run runs/demo --variant din'
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import last_line

from ctrkit import exporting, modelfile, run_folder, scoring
from ctrkit.batches import Block, GroupedData
from ctrkit.scorer import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run with trained models (make)")
    parser.add_argument("--variant", action="append", help="default: those of the demo that differ most")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx")
    parser.add_argument("--samples", type=int, default=10_000, help="of the test split, the first ones")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if not options.run.is_dir():
        sys.exit(f"{options.run} is not there: `make` makes the demo's; or give --run")
    torch.set_num_threads(1)
    names = options.variant or ["lr", "base", "din", "basic+ad_id+ad_image+user_images"]
    results = {name: measure(options.run, name, options) for name in names}
    rows = [(name, f"{r['predict_per_s']:,.0f}", f"{r['exported_per_s']:,.0f}", r) for name, r in results.items()]
    for name, predict, exported, r in rows:
        parts = ", ".join(f"{part} {share:.0%}" for part, share in r["time"].items())
        print(f"{name}: predict {predict}, exported {exported} samples/s ({parts}); apart by {r['difference']:.1e}")
    slowest = min(results.values(), key=lambda r: r["exported_per_s"] / r["predict_per_s"])
    last_line(
        name="export",
        ratio=round(slowest["exported_per_s"] / slowest["predict_per_s"], 3),
        ours=round(slowest["exported_per_s"], 1),
        reference=round(slowest["predict_per_s"], 1),
        unit="samples/s",
        format=options.format,
        largest_difference=max(r["difference"] for r in results.values()),
        models=results,
    )


def measure(run: Path, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return rates of a variant's model, both ways, and the largest difference of a score."""
    files = run_folder.find(run, variant)
    trained = modelfile.load(files.model, files.groups, files.features, files.convert)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        exporting.export(files.model, files.convert, out, options.format, run_folder.max_behaviours(files.model))
        scorer = Scorer(out, files.features)
    torch.set_num_threads(1)
    row_V = scorer.rows_of(files.convert)
    data = GroupedData(files.groups, "test", trained.plan.features)

    def blocks() -> Iterator[Block]:
        left = options.samples
        for block in data.epoch(4096):
            yield block if block.n_samples <= left else block.samples(0, left)
            left -= block.n_samples
            if left <= 0:
                return

    def predict() -> np.ndarray:
        first = FirstSamples(data, blocks)
        return np.concatenate([score for _, score in scoring.scores(trained, first, 4096)])

    def exported() -> np.ndarray:
        return np.concatenate([scorer.score_block(block, row_V) for block in blocks()])

    took: dict[str, list[float]] = defaultdict(list)
    score = {}
    for _ in range(options.turns + 1):  # the first one warms up
        for name, way in (("predict", predict), ("exported", exported)):
            started = time.perf_counter()
            score[name] = way()
            took[name].append(time.perf_counter() - started)
    n = len(score["predict"])
    return {
        "samples": n,
        "predict_per_s": n / min(took["predict"][1:]),
        "exported_per_s": n / min(took["exported"][1:]),
        "difference": float(np.abs(score["predict"] - score["exported"]).max()),
        "time": shares(scorer, exported),
    }


class FirstSamples:
    """The first samples of a split, as `ctrkit.scoring.scores` reads one."""

    def __init__(self, data: GroupedData, blocks: Any) -> None:
        self.schema, self._blocks = data.schema, blocks

    def shares(self, batch: int, ranks: object) -> Iterator[tuple[Block, int]]:
        return ((block, block.n_samples) for block in self._blocks())


def shares(scorer: Scorer, run: Any) -> dict[str, float]:
    """Return the share of the time that each program takes, and what is left for the rest."""
    spent: dict[str, float] = defaultdict(float)
    inner = scorer.programs.run

    def timed(name: str, given: Any) -> Any:
        started = time.perf_counter()
        found = inner(name, given)
        spent[name] += time.perf_counter() - started
        return found

    scorer.programs.run = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    run()
    whole = time.perf_counter() - started
    scorer.programs.run = inner  # type: ignore[method-assign]
    return {**{name: t / whole for name, t in spent.items()}, "the rest": 1 - sum(spent.values()) / whole}


if __name__ == "__main__":
    main()
