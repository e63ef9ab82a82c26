"""Scores and attention weights of a trained model."""

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ctrkit.batches import Block, Column, GroupedData, Ragged
from ctrkit.collate import Collator
from ctrkit.errors import UserError
from ctrkit.feature_service import gather
from ctrkit.modelfile import TrainedModel, load
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.dicm import DICM
from ctrkit.models.din import DIN
from ctrkit.models.plan import Plan
from ctrkit.preparing import prepared
from ctrkit.progress import Meter
from ctrkit.ranks import ALONE

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def look_up(model: TrainedModel, batch: Batch) -> Lookup:
    """Gather a batch's embedding rows, without a gradient. A collective where several ranks work on the model."""
    if model.service is None:
        rows = {w: model.tables[w].weight_VD.index_select(0, r) for w, r in batch.rows.items()}
    else:
        _, rows = gather(model.tables, batch)
    return Lookup(batch, rows, {n: model.plan.width(n) for n in model.plan.ids})


def probability(model: TrainedModel, logit_S: torch.Tensor) -> torch.Tensor:
    """Return click probabilities. Training that kept a share r of the negatives multiplied the odds of a click by 1/r;
    that is undone: p / (p + (1 - p) / r)."""
    return torch.sigmoid(logit_S + math.log(model.plan.schema.negative_rate))


@torch.inference_mode()
def scores(model: TrainedModel, data: GroupedData, batch: int, label: str = "") -> Iterator[tuple[Block, Floats]]:
    """Yield (samples, click probabilities [S]) in the order of the groups.

    Where several ranks work on the model, each scores a share of every batch, and `all_scores` is what to call.
    """
    service = model.service
    collate = Collator(model.plan, model.tables, model.pictures, rows_only=True)
    model.network.eval()
    blocks: deque[tuple[Block, int]] = deque()
    """Of the batches that are being prepared: this rank's samples, and how many all ranks have."""

    def made() -> Iterator[Batch]:
        for own, samples in data.shares(batch, ALONE if service is None else service.parallel.ranks):
            blocks.append((own, samples))
            yield collate(own)

    quiet = service is not None and service.parallel.ranks.rank > 0
    with Meter(label, len(data), "samples", quiet=quiet) if label else contextlib.nullcontext() as meter:
        for ready in prepared(model, made(), training=False):
            own, samples = blocks.popleft()
            yield own, probability(model, model.network(ready, look_up(model, ready))).cpu().numpy()
            if meter is not None:
                meter.add(samples)


def all_scores(
    model: TrainedModel, data: GroupedData, batch: int, label: str = ""
) -> tuple[Floats, npt.NDArray[np.int8]]:
    """Return ([S] click probabilities, [S] clicks) of a split, in the order of the groups: at rank 0, where several
    ranks work on the model; elsewhere nothing. Holds 5 bytes a sample."""
    found = [(np.asarray(block.sample["click"], np.int8), score) for block, score in scores(model, data, batch, label)]
    if model.service is None:
        return np.concatenate([score for _, score in found]), np.concatenate([click for click, _ in found])
    # Batch by batch, and of each the ranks' shares in their order.
    ranks = model.service.parallel.ranks.gather_first(found)
    pieces = [piece for of_ranks in zip(*ranks, strict=True) for piece in of_ranks]
    if not pieces:
        return np.zeros(0, np.float32), np.zeros(0, np.int8)
    return np.concatenate([score for _, score in pieces]), np.concatenate([click for click, _ in pieces])


def predict(model: TrainedModel, groups: Path, split: str, batch: int) -> pl.DataFrame:
    """Return one row an impression of the split: see `predictions.parquet` in docs/formats.md. Where several ranks work
    on the model, all have to call it, and rank 0 gets the rows."""
    data = GroupedData(groups, split, model.plan.features)
    score_S, _ = all_scores(model, data, batch, "predict")
    if model.service is not None and model.service.parallel.ranks.rank > 0:
        return pl.DataFrame()
    schema = data.schema
    history = schema.names(("behaviour",), "id") + schema.names(("behaviour",), "image")
    length = pl.col(history[0]).list.len() if history else pl.lit(0)
    lists = ["sample_id", "ad", "click", "unseen_ad"]
    frames = [
        frame.select("user", "day", *lists, length.cast(pl.UInt32).alias("history_length")).explode(lists)
        for frame in data.frames(["user", "day", *lists, *history[:1]])
    ]
    table = pl.concat(frames).with_columns(score=pl.Series(score_S, dtype=pl.Float32))
    return table.select("sample_id", "user", "ad", "day", "click", "score", "history_length", "unseen_ad")


@torch.inference_mode()
def attention_weights(
    model: Path,
    groups: Path,
    features: Path | None,
    convert: Path,
    split: str,
    sample_ids: Sequence[int],
    also: Sequence[str] = (),
) -> pl.DataFrame:
    """Return the weights that a model gives to the behaviours of some impressions: DICM's attention over the user's
    pictures (section IV), or DIN's activation unit over the behaviours (section 4.2, eq. 2).

    One row a behaviour, oldest first: `sample_id` Int64, `image` String (the behaviour's picture, "" without one),
    `weight` Float32, `ad_image` String, `click` Int8, `score` Float32, and for each feature in `also`, of ad or
    behaviour, `index of NAME` Int64 (of a multi-hot one the first; 0 without one). An impression without a history has
    no row.
    Reads the split up to the last of the impressions.
    """
    trained = load(model, groups, features, convert)
    network, plan = trained.network, trained.plan
    if not has_attention(plan) and not isinstance(network, DIN):
        raise UserError(
            f"{model} does not attend to behaviours: it needs model = 'din', or user_images and pooling = 'attentive'"
        )
    assert isinstance(network, DICM | DIN)
    network.eval()
    pictures = [next(iter(plan.schema.names((of,), "image")), "") for of in ("ad", "behaviour")]
    ad_image, user_image = plan.ad_image or pictures[0], plan.user_image or pictures[1]
    columns = list(dict.fromkeys([*plan.features, *(n for n in (ad_image, user_image) if n), *also]))
    data = GroupedData(groups, split, columns)
    collate = Collator(plan, trained.tables, trained.pictures)
    waiting = set(sample_ids)
    rows: list[pl.DataFrame] = []
    for block in data.epoch(4096):
        ids = block.sample["sample_id"]
        assert isinstance(ids, np.ndarray)
        here = waiting.intersection(ids.tolist())
        if not here:
            continue
        batch = collate(block)
        look = look_up(trained, batch)
        weight_P, score_S = network.weights_P(batch, look).numpy(), probability(trained, network(batch, look)).numpy()
        sample_P, behaviour_P = batch.sample_P.numpy(), batch.behaviour_P.numpy()
        keep = np.isin(ids[sample_P], list(here))
        s, b = sample_P[keep], behaviour_P[keep]
        ads = {f"index of {name}": _first(block.sample[name], s) for name in also if name in block.sample}
        found = {f"index of {name}": _first(block.behaviour[name], b) for name in also if name in block.behaviour}
        image, ad = (
            _first(column[name], place) if name else np.zeros(len(place), np.int64)
            for name, column, place in ((user_image, block.behaviour, b), (ad_image, block.sample, s))
        )
        columns_of = {
            "sample_id": ids[s],
            "image": image,
            "weight": weight_P[keep],
            "ad_image": ad,
            "click": batch.click_S.numpy()[s].astype(np.int8),
            "score": score_S[s],
            **ads,
            **found,
        }
        rows.append(pl.DataFrame(columns_of).cast({"weight": pl.Float32, "score": pl.Float32}))
        waiting -= here
        if not waiting:
            break
    if not rows:
        raise UserError(f"none of the wanted impressions is in the {split} split of {groups}")
    table = pl.concat(rows)
    return table.with_columns(
        values_of(convert, "image", table[name], "").alias(name) for name in ("image", "ad_image")
    )


def _first(column: Column, place: Ints) -> Ints:
    """Return the values at these places; of a multi-hot feature each one's first, or 0."""
    if not isinstance(column, Ragged):
        return column[place]
    start, stop = column.offsets[place], column.offsets[place + 1]
    filled = np.append(column.values, 0)
    return filled[np.where(start < stop, start, len(column.values))]


def values_of(convert: Path, vocab: str, index: pl.Series, unknown: str = "unknown") -> pl.Series:
    """Return the raw values of indexes of a vocabulary, String; `unknown` for 1, "" for 0 and what it does not hold."""
    wanted = pl.DataFrame({"index": index.cast(pl.Int64)})
    path = convert / "vocab" / f"{vocab}.parquet"
    if not path.is_file():
        return pl.Series([""] * len(index), dtype=pl.String)
    known = pl.scan_parquet(path, glob=False).select(pl.col("index").cast(pl.Int64), "value")
    known = known.filter(pl.col("index").is_in(wanted["index"].unique().implode()))
    found = wanted.join(known.collect(), on="index", how="left", maintain_order="left")
    text = pl.when(pl.col("index") == 1).then(pl.lit(unknown)).otherwise(pl.col("value").fill_null(""))
    return found.select(text.alias("value")).to_series()


def has_attention(plan: Plan) -> bool:
    """Say whether the model attends to the users' pictures."""
    return plan.train.pools_pictures and plan.train.pooling == "attentive"
