"""Scores and attention weights of a trained model."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ctrkit.batches import Block, GroupedData
from ctrkit.collate import Collator
from ctrkit.data_parallel import share
from ctrkit.errors import UserError
from ctrkit.feature_service import gather
from ctrkit.modelfile import TrainedModel, load
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.dicm import DICM
from ctrkit.models.plan import Plan
from ctrkit.progress import Meter

Floats = npt.NDArray[np.float32]


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
    collate = Collator(model.plan, model.tables, model.pictures, rows_only=service is not None and service.reads)
    model.network.eval()
    quiet = service is not None and service.parallel.ranks.rank > 0
    with Meter(label, len(data), "samples", quiet=quiet) if label else contextlib.nullcontext() as meter:
        for block in data.epoch(batch):
            own = block if service is None else share(block, service.parallel.ranks)
            made = collate(own).to(model.device)
            if service is not None:
                service.prepare(made, training=False)
            yield own, probability(model, model.network(made, look_up(model, made))).cpu().numpy()
            if meter is not None:
                meter.add(block.n_samples)


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
    model: Path, groups: Path, features: Path, convert: Path, split: str, sample_ids: Sequence[int]
) -> pl.DataFrame:
    """Return the attentive weights of a DICM over the users' pictures, for some impressions.

    One row a behaviour, oldest first: `sample_id` Int64, `image` String (the behaviour's picture), `weight` Float32,
    `ad_image` String, `click` Int8, `score` Float32. An impression without a history has no row.
    """
    trained = load(model, groups, features, convert)
    if not has_attention(trained.plan):
        raise UserError(f"{model} does not attend to pictures: it needs user_images and pooling = 'attentive'")
    network, plan, pictures = trained.network, trained.plan, trained.pictures
    assert isinstance(network, DICM)
    assert pictures is not None
    network.eval()
    ad_image = plan.ad_image or next(iter(plan.schema.names(("ad",), "image")), "")
    columns = list(dict.fromkeys([*plan.features, *([ad_image] if ad_image else [])]))
    data = GroupedData(groups, split, columns)
    collate = Collator(plan, trained.tables, pictures)
    wanted = set(sample_ids)
    rows: list[pl.DataFrame] = []
    for block in data.epoch(4096):
        ids = block.sample["sample_id"]
        assert isinstance(ids, np.ndarray)
        if not wanted.intersection(ids.tolist()):
            continue
        batch = collate(block)
        look = look_up(trained, batch)
        weight_P, score_S = (
            network.weights_P(batch, look).numpy(),
            probability(trained, network(batch, look)).numpy(),
        )
        sample_P, behaviour_P = batch.sample_P.numpy(), batch.behaviour_P.numpy()
        keep = np.isin(ids[sample_P], list(wanted))
        s, b = sample_P[keep], behaviour_P[keep]
        user_column, ad_column = (
            block.behaviour[plan.user_image],
            block.sample[ad_image] if ad_image else None,
        )
        assert isinstance(user_column, np.ndarray)
        ad_index = ad_column[s] if isinstance(ad_column, np.ndarray) else np.zeros(len(s), np.int64)
        rows.append(
            pl.DataFrame(
                {
                    "sample_id": ids[s],
                    "image": pictures.names(user_column[b]),
                    "weight": weight_P[keep],
                    "ad_image": pictures.names(ad_index),
                    "click": batch.click_S.numpy()[s].astype(np.int8),
                    "score": score_S[s],
                },
                schema={
                    "sample_id": pl.Int64,
                    "image": pl.String,
                    "weight": pl.Float32,
                    "ad_image": pl.String,
                    "click": pl.Int8,
                    "score": pl.Float32,
                },
            )
        )
    if not rows:
        raise UserError(f"none of the wanted impressions is in the {split} split of {groups}")
    return pl.concat(rows)


def has_attention(plan: Plan) -> bool:
    """Say whether the model attends to the users' pictures."""
    return plan.train.pools_pictures and plan.train.pooling == "attentive"
