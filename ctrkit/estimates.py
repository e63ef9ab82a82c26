"""Time and disk that each stage will need: the data stages tried on a sample of the inputs, and carried forward.

convert, select-clicks and group run in earnest on the sample; their times and bytes grow with the rows, the users' days
and the behaviours picked, whose numbers are estimated from how often the sample's windows share them
(`Seen.distinct`). select-clicks and group are tried on a part of the sample too, so that what each file costs is not
carried forward with the rows. The network of extract-images is timed on a few pictures. Training has constants of one
core: what it takes is told to a factor of some.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import numba_loops, partitions, plain_csv
from ctrkit.checking import Inputs, Seen, days_of, local_days
from ctrkit.clicks import select_clicks
from ctrkit.convert import PARTITION_BYTES, SMALL_BYTES, convert, input_bytes
from ctrkit.engine import Engine
from ctrkit.errors import UserError
from ctrkit.grouping import group
from ctrkit.pieces import PIECE_BYTES
from ctrkit.recipe import ExtractImages, Recipe, Split
from ctrkit.scan import Log
from ctrkit.tables import RawTable

PLAIN_SHARE = 0.25
"""Of the time that a sample's rows take to be read and scanned: that of compiled code for plain CSV, which samples do
not go through."""
PAIR_ROWS = 2
"""Rows of a log that cost select-clicks and group as much time as a user and day does."""
LESS = 4
"""The sample by the part of it on which select-clicks and group are tried once more, to tell time that goes with the
rows from time that goes with the files."""
LEAST_SHARE = 0.2
"""Of a trial's time that goes with the rows, whatever the two trials say."""
LOGS = ("impressions", "clicks", "behaviours")
START_SECONDS = 2.0
"""Of a stage and its worker processes."""
EMPTY_BYTES = 4096
"""Of a file without rows."""
ENOUGH = 1000
"""Picked behaviours from which bytes are measured; with fewer, `PICKED_BYTES` a column stand for them."""
PICKED_BYTES = 3.0
INDEX_BYTES, VISIT_BYTES = 4, 16
"""Of a picked behaviour as select-clicks writes it: of each feature, and of visits, dwell and time."""
SAMPLE_SECONDS, AD_PICTURE_SECONDS, BEHAVIOUR_SECONDS, USER_PICTURE_SECONDS = 16e-6, 10e-6, 0.5e-6, 3e-6
"""Training, of a sample; of its ad's picture, 4,096 wide; of each of its behaviours (DIN), and of its picture: on one
core."""
TRAINING_CORES = 2
"""That one training, or several at once, make use of, at most."""
IMPORT_SECONDS = 1e-8
"""import-features, of a number of a vector."""
TIER_SECONDS = 1e-6
"""Of SimTier, a behaviour."""
SCORING_SHARE = 1 / 3
"""Of training's time: there is nothing to go back for."""
EVALUATION_SECONDS = 20e-6
"""Of a sample and variant, with 1000 resamples."""
PREDICTION_BYTES = 24
WIDTH = 4096
MODEL_BYTES = 200_000
"""Of a model without its tables and extractors."""
TIMED_PICTURES = 8
PIECE_MEMORY, PARTITION_MEMORY, PROCESS_BYTES = 10, 3, 150 << 20
"""Peak memory of a worker, in bytes for each of a piece, of a partition's raw text, and at least."""


class Timed(Engine):
    """Runs tasks in this process, without a word, and says how long each phase took."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        super().__init__(folder)
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.logs: dict[str, Log] = {}
        """Those that were scanned, by name."""

    def run(self, phase: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return `function(*task)` of each task, in order."""
        (self.folder / phase).mkdir(exist_ok=True)
        results = []
        for task in tasks:
            name = phase
            if isinstance(task[0], Log):
                name = f"{phase} {task[0].table.name}"
                self.logs[task[0].table.name] = task[0]
            wall, cpu = time.perf_counter(), time.process_time()
            results.append(json.loads(json.dumps(function(*task))))
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        return results

    def of(self, phase: str, workers: int) -> float:
        """Return the time that a phase took: of processors, if there are several workers."""
        return (self.wall if workers == 1 else self.cpu).get(phase, 0.0)

    def seconds(self, growth: Callable[[str], float], workers: int) -> float:
        """Return the time of all phases, each so many times as long, with so many workers."""
        return sum(self.of(name, workers) * growth(name) for name in self.wall) / workers


@dataclass
class Trial:
    """The data stages on a sample."""

    folder: Path
    counts: dict[str, dict[str, Any]]
    engines: dict[str, Timed]
    encoded: dict[str, pl.DataFrame]
    """`impressions`, `behaviours`: convert's samples and behaviours."""
    images: list[str]
    """Of the vocabulary `image`."""
    smaller: "Trial | None" = None
    """On a part of a sample that is not all there is."""


def attempt(recipe: Recipe, inputs: Inputs, folder: Path) -> Trial:
    """Run the data stages on the samples of the inputs, within `folder`. All days train."""
    for module in ("ctrkit.compiled_windows", "ctrkit.compiled_counts", "ctrkit.compiled_take"):
        numba_loops.load(module)  # so that no phase's time has it
    there = inputs.seen["behaviours"].good if "behaviours" in inputs.seen else pl.DataFrame()
    types = set(there["type"].drop_nulls().unique()) if "type" in there.columns else set()
    options = recipe.select_clicks
    small = recipe.model_copy(
        update={
            "convert": recipe.convert.model_copy(update={"partitions": 1, "max_reject_rate": 1.0}),
            "split": Split(test=0, valid=0),
            "select_clicks": options.model_copy(
                update={
                    "types": tuple(t for t in options.types if t in types),
                    "type_weights": {t: w for t, w in options.type_weights.items() if t in types},
                }
            ),
        }
    )
    tables = {name: one.sample.held() for name, one in inputs.seen.items()}
    trial = _try(small, tables, folder)
    if not all(one.sample.whole for one in inputs.seen.values()):
        few = {
            name: one.sample.held(LESS if name in LOGS and not one.sample.whole else 1)
            for name, one in inputs.seen.items()
        }
        with contextlib.suppress(UserError):  # the part may lack what the sample has
            trial.smaller = _try(small, few, folder / "part")
    return trial


def _try(small: Recipe, tables: Mapping[str, RawTable], folder: Path) -> Trial:
    engines = {stage: Timed(folder / f"{stage}-work") for stage in ("convert", "select-clicks", "group")}
    out = {stage: folder / stage for stage in engines}
    for stage in ("convert", "group"):
        out[stage].mkdir()
    counts = {"convert": convert(small, tables, out["convert"], engines["convert"])}
    encoded = {}
    for log, name in (("impressions", "samples"), ("behaviours", "behaviours")):
        frame = partitions.read_by_day(out["convert"] / name, partitions.days_there(out["convert"] / name))
        if frame is not None:
            encoded[log] = frame
    with_histories = any(f.of == "behaviour" for f in small.features.values())
    if with_histories:
        counts["select-clicks"] = select_clicks(small, out["convert"], out["select-clicks"], engines["select-clicks"])
    histories = out["select-clicks"] if with_histories else None
    counts["group"] = group(small, out["convert"], histories, out["group"], engines["group"])
    vocab = out["convert"] / "vocab" / "image.parquet"
    images = pl.read_parquet(vocab)["value"].to_list() if vocab.is_file() else []
    return Trial(folder, counts, engines, encoded, images)


def size_of(folder: Path, part: str = "") -> int:
    """Return the bytes of a folder's files whose path holds `part`."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and part in p.relative_to(folder).as_posix())


@dataclass
class Stage:
    """What a stage will need."""

    name: str
    amount: str
    seconds: float
    size: float
    """Bytes of its output."""
    temporary: float = 0.0
    """Bytes that it needs besides while it runs."""


@dataclass
class Estimate:
    """What all stages will need."""

    stages: list[Stage]
    memory: float
    """Peak memory of the data stages, bytes."""
    workers: int
    partitions: int

    @property
    def disk(self) -> float:
        """Bytes of all outputs, and of the largest of what goes again."""
        return sum(s.size for s in self.stages) + max(s.temporary for s in self.stages)


@dataclass
class Growth:
    """How much larger everything is than in the sample."""

    impressions: float
    behaviours: float
    words: float
    """Distinct values."""
    samples: float
    days: float
    """Users and days with samples."""
    length: float
    """Behaviours picked for each of those."""
    whole: bool
    train: float
    """Share of the samples on training days."""
    test: float
    picked: float = field(init=False)

    def __post_init__(self) -> None:
        self.picked = self.days * self.length

    def of_phase(self, phase: str) -> float:
        """Return how many times as long as on the sample a phase of convert takes."""
        if phase in ("dictionaries", "vocabularies"):
            return self.words
        return self.behaviours if "behaviours" in phase else self.impressions


def growth(recipe: Recipe, inputs: Inputs, trial: Trial) -> Growth:
    """Estimate how much larger everything is than in the sample."""
    shown, done = inputs.seen["impressions"], inputs.seen.get("behaviours")
    counts = trial.counts["convert"]
    impressions = shown.sample.read / max(shown.sample.frame.height, 1)
    behaviours = done.sample.read / max(done.sample.frame.height, 1) if done else 1.0
    day = local_days(recipe, shown.good["time"])

    def user_day(rows: pl.DataFrame) -> pl.Series:
        return rows.select(pl.struct(pl.col("user"), local_days(recipe, rows["time"]).alias("day"))).to_series()

    words = _grown(shown, "ad")
    if done is not None and "goods" in done.good.columns:
        words = max(words, _grown(done, "goods"))
    pairs = shown.distinct(user_day)
    picked = trial.counts.get("select-clicks", {}).get("goods picked", 0)
    whole = shown.sample.whole and (done is None or done.sample.whole)
    length = picked / max(user_day(shown.good).n_unique(), 1)
    if done is not None and not whole and "select-clicks" in trial.counts:
        length = max(length, _history_length(recipe, inputs, trial))
    in_split = {part: float(day.is_in(list(chosen)).mean() or 0) for part, chosen in inputs.split.items()}  # type: ignore[arg-type]
    return Growth(
        impressions,
        behaviours,
        words,
        counts["samples"] * impressions,
        pairs,
        length,
        whole,
        in_split.get("train", 0.8),
        in_split.get("test", 0.1),
    )


def _grown(seen: Seen, column: str) -> float:
    return seen.distinct(lambda rows: rows[column]) / max(seen.good[column].drop_nulls().n_unique(), 1)


def _history_length(recipe: Recipe, inputs: Inputs, trial: Trial) -> float:
    """Return how many behaviours a user's day has, at most, from the mean over users and days.

    In a sample of windows a user's history is thin, so what is picked of it says nothing.
    """
    shown, done = inputs.seen["impressions"], inputs.seen["behaviours"]
    options, counts = recipe.select_clicks, trial.counts["select-clicks"]
    kept = counts.get("behaviours kept", counts["behaviours read"]) / max(counts["behaviours read"], 1)
    users = done.distinct(lambda rows: rows["user"])
    there = days_of(recipe, done)
    span = (there[-1] - there[0]).days + 1
    goods: float = done.sample.read
    if "goods" in done.good.columns:
        goods = done.distinct(lambda rows: rows.select(pl.struct("user", "goods")).to_series())
    daily = goods * kept / max(users, 1.0) / span
    window = options.window_days or span
    served = days_of(recipe, shown)
    earlier = [min(window, max(0, min((d - there[0]).days, span)), 1 << 20) for d in served]
    return float(min(options.max_behaviours, daily * sum(earlier) / len(earlier)))


def estimate(
    recipe: Recipe, variants: Mapping[str, Recipe], inputs: Inputs, trial: Trial, pictures: "Pictures"
) -> Estimate:
    """Estimate what each stage needs."""
    grown = growth(recipe, inputs, trial)
    raw = input_bytes(recipe, inputs.tables)
    parts = recipe.convert.partitions or min(max(math.ceil(raw / PARTITION_BYTES), 1), 4096)
    cores = os.cpu_count() or 1
    workers = recipe.workers or (1 if raw < SMALL_BYTES else cores)
    stages = [_convert(recipe, inputs, trial, grown, workers)]
    later = recipe.workers or (1 if parts == 1 else cores)
    histories = _number(variants, "convert", "split", "features", "select-clicks")
    if "select-clicks" in trial.counts:
        stages.append(_select_clicks(recipe, trial, grown, parts, later, histories))
    stages.append(_group(recipe, trial, grown, parts, later, max(histories, _number(variants, "group"))))
    looking = any(one.train.looks_at_pictures for one in variants.values())
    if trial.images and looking:
        images = len(trial.images) * grown.words
        imported = bool(recipe.import_features.files)
        each = pictures.width * IMPORT_SECONDS if imported else pictures.seconds
        size = images * (2 * pictures.width + 40)
        name = "import-features" if imported else "extract-images"
        stages.append(Stage(name, f"{images:,.0f} pictures", START_SECONDS + images * each, size, size))
    stages += _models(variants, trial, grown, pictures.width)
    piece = min(PIECE_BYTES, raw) * PIECE_MEMORY
    partition = raw / parts * PARTITION_MEMORY
    words = size_of(trial.folder / "convert-work" / "dictionaries") * grown.words
    memory = (workers + 1) * PROCESS_BYTES + workers * (max(piece, partition) + 2 * words)
    return Estimate(stages, memory, workers, parts)


def _number(variants: Mapping[str, Recipe], *tables: str) -> int:
    """Return how many different settings variants have of some tables of the recipe."""
    return len({json.dumps(one.tables(*tables), sort_keys=True) for one in variants.values()})


def _convert(recipe: Recipe, inputs: Inputs, trial: Trial, grown: Growth, workers: int) -> Stage:
    engine, out = trial.engines["convert"], trial.folder / "convert"
    reading = 0.0
    share = {name: PLAIN_SHARE if _is_plain(engine.logs.get(name), inputs) else 1.0 for name in inputs.seen}
    for name, one in inputs.seen.items():
        took = one.sample.seconds if workers == 1 else one.sample.cpu
        reading += took * one.sample.read / max(one.sample.frame.height, 1) * share[name]
    scans = {f"scan {name}": part for name, part in share.items()}
    seconds = reading / workers + engine.seconds(lambda p: grown.of_phase(p) * scans.get(p, 1.0), workers)
    seconds += START_SECONDS if workers > 1 else 0
    size = size_of(out, "samples/") * grown.impressions + size_of(out, "behaviours/") * grown.behaviours
    size += size_of(out, "rejects.parquet") * grown.impressions
    size += (size_of(out, "vocab/") + size_of(out, "goods.parquet")) * grown.words
    behaviours = size_of(engine.folder, "behaviours-")
    temporary = behaviours * grown.behaviours + (size_of(engine.folder) - behaviours) * grown.impressions
    rows = sum(one.sample.rows_in_all for name, one in inputs.seen.items() if name in LOGS)
    return Stage("convert", f"{rows:,} rows of logs, {grown.samples:,.0f} samples", seconds, size, temporary)


def _is_plain(log: Log | None, inputs: Inputs) -> bool:
    """Say whether the files of a log that was scanned are read by compiled code, if no cell of theirs is quoted."""
    if log is None:
        return False
    table = inputs.tables[log.table.name]
    return all(plain_csv.is_plain(table, i, log.texts(), log.needed) for i in range(len(table.files)))


def _carried(
    trial: Trial,
    stage: str,
    phase: str,
    rows: Callable[[Trial], float],
    in_all: float,
    parts: int,
    workers: int,
) -> float:
    """Return the time of a stage's phase that is done for each partition: what goes with the rows, of which there are
    `in_all`, and what goes with the partition's files."""
    took = trial.engines[stage].of(phase, workers)
    each = took / max(rows(trial), 1.0)
    if trial.smaller is not None and rows(trial) > rows(trial.smaller):
        slope = (took - trial.smaller.engines[stage].of(phase, workers)) / (rows(trial) - rows(trial.smaller))
        each = min(max(slope, LEAST_SHARE * each), each)
    files = took - each * rows(trial)
    return (parts * files + each * in_all) / workers + (START_SECONDS if workers > 1 else 0)


def _select_clicks(recipe: Recipe, trial: Trial, grown: Growth, parts: int, workers: int, times: int) -> Stage:
    picked = trial.counts["select-clicks"]["goods picked"]
    read = trial.counts["select-clicks"]["behaviours read"] * grown.behaviours

    def rows(one: Trial) -> float:
        counts = one.counts["select-clicks"]
        pairs = counts["users and days with samples"]
        return float(counts["behaviours read"] + counts["goods picked"] + PAIR_ROWS * pairs)

    in_all = read + grown.picked + PAIR_ROWS * grown.days
    seconds = _carried(trial, "select-clicks", "select", rows, in_all, parts, workers)
    size = size_of(trial.folder / "select-clicks")
    each, of_days = size / max(picked, 1), 0.0
    if not grown.whole:  # what a user and day takes counts for more in the sample, whose histories are thin
        each = sum(f.of == "behaviour" for f in recipe.features.values()) * INDEX_BYTES + VISIT_BYTES
        rows_there = trial.counts["select-clicks"]["of these with a history"]
        of_days = max(size - each * picked, 0.0) / max(rows_there, 1) * grown.days
    amount = f"{grown.days:,.0f} users × days, {grown.picked:,.0f} behaviours picked"
    return Stage("select-clicks", amount + _times(times), seconds * times, (of_days + each * grown.picked) * times)


def _tells(picked: int, grown: Growth) -> bool:
    """Say whether the bytes of the sample's picked behaviours can be carried forward."""
    return picked >= (1 if grown.whole else ENOUGH)


def _times(n: int) -> str:
    return f", {n} times (variants)" if n > 1 else ""


def _group(recipe: Recipe, trial: Trial, grown: Growth, parts: int, workers: int, times: int) -> Stage:
    counts = trial.counts["group"]
    groups = pl.concat([pl.read_parquet(p) for p in sorted((trial.folder / "group" / "train").glob("*.parquet"))])
    users = ["user", "day", "group_id", "common", *(n for n, f in recipe.features.items() if f.of == "user")]
    histories = [n for n, f in recipe.features.items() if f.of == "behaviour"]
    picked = counts.get("train behaviours", 0)
    own = _bytes(groups.drop(*users, *histories)) / max(counts["train samples"], 1)
    shared = _bytes(groups.select(users)) / max(groups.height, 1)
    each = _bytes(groups.select(histories)) / picked if _tells(picked, grown) else len(histories) * PICKED_BYTES
    size = own * grown.samples + shared * grown.days + each * grown.picked
    size += size_of(trial.folder / "group", "counts/") * grown.words
    of_history = len(histories) / max(len(recipe.features) - len(histories), 1)  # what of a sample a behaviour costs

    def rows(one: Trial) -> float:
        counts = one.counts["group"]
        behaviours = of_history * counts.get("train behaviours", 0)
        return float(counts["train samples"] + behaviours + PAIR_ROWS * counts["train groups"])

    in_all = grown.samples + of_history * grown.picked + PAIR_ROWS * grown.days
    seconds = _carried(trial, "group", "group", rows, in_all, parts, workers)
    seconds += trial.engines["group"].of("sum counts", workers) * grown.words
    amount = f"{grown.days:,.0f} groups of {grown.samples:,.0f} samples"
    return Stage("group", amount + _times(times), seconds * times, size * times, 1.3 * size)


def _bytes(frame: pl.DataFrame) -> int:
    if not frame.width:
        return 0
    written = BytesIO()
    frame.write_parquet(written, statistics=False)
    return written.tell()


def _models(variants: Mapping[str, Recipe], trial: Trial, grown: Growth, width: int) -> list[Stage]:
    """Return train, predict and eval."""
    train, predict = Stage("train", "", 0.0, 0.0), Stage("predict", "", 0.0, 0.0)
    learned, scored = grown.samples * grown.train, grown.samples * grown.test
    vocab = trial.folder / "convert" / "vocab"
    rows = {p.stem: pl.scan_parquet(p).select(pl.len()).collect().item() * grown.words for p in vocab.glob("*.parquet")}
    for one in variants.values():
        options = one.train
        each = SAMPLE_SECONDS
        if options.model == "din" or (options.model == "dicm" and options.user_ids == "din"):
            each += BEHAVIOUR_SECONDS * grown.length
        size = float(MODEL_BYTES)
        for name in dict.fromkeys(f.vocab for f in one.features.values() if f.kind != "image"):
            size += 4 * next(f.width for f in one.features.values() if f.vocab == name) * rows.get(name, 0.0)
        if options.looks_at_pictures:
            each += AD_PICTURE_SECONDS * width / WIDTH if options.ad_image else 0
            each += USER_PICTURE_SECONDS * grown.length * width / WIDTH if options.pools_pictures else 0
            each += TIER_SECONDS * grown.length * width / WIDTH if options.counts_tiers else 0
            extractors = 1 if options.share_extractors else options.ad_image + options.pools_pictures
            size += 4 * extractors * width * (options.extractor[0] if options.extractor else 1)
        train.seconds += START_SECONDS + options.epochs * learned * each
        train.size += size
        predict.seconds += START_SECONDS + scored * each * SCORING_SHARE
        predict.size += EMPTY_BYTES + scored * PREDICTION_BYTES
    cores = min(os.cpu_count() or 1, TRAINING_CORES)
    train.seconds, predict.seconds = train.seconds / cores, predict.seconds / cores
    n = len(variants)
    train.amount = f"{learned:,.0f} samples an epoch, {n} variant{'s' * (n != 1)}"
    predict.amount = f"{scored:,.0f} samples, {n} variant{'s' * (n != 1)}"
    resamples = max(one.eval.bootstrap for one in variants.values()) / 1000
    evaluation = Stage("eval, report", "", 2 * START_SECONDS + scored * n * EVALUATION_SECONDS * resamples, 500_000)
    return [train, predict, evaluation]


@dataclass
class Pictures:
    """What a picture takes."""

    seconds: float = 0.0
    width: int = WIDTH


def time_network(settings: ExtractImages, decoding: float) -> Pictures:
    """Time the network of extract-images on a few pictures, with untrained weights.

    decoding: seconds for a picture.
    """
    import numpy as np
    import torch

    from ctrkit import backbones, devices

    if settings.threads:
        torch.set_num_threads(settings.threads)
    network = backbones.load(
        settings.backbone,
        weights="random",
        seed=0,
        size=settings.size,
        dtype=settings.dtype,
        device=devices.resolve(settings.device, "extract-images.device"),
    )
    noise = np.random.default_rng(0).integers(0, 256, (TIMED_PICTURES, 3, settings.size, settings.size), np.uint8)
    some = torch.from_numpy(noise).to(network.mean.device)
    with torch.inference_mode():
        network(some[:1]).cpu()
        begun = time.perf_counter()
        network(some).cpu()
        seconds = (time.perf_counter() - begun) / TIMED_PICTURES
    return Pictures(max(seconds, decoding), network.width)
