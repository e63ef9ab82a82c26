"""The models as the papers state them, one sample and one behaviour at a time, in float64."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctrkit.collate import Collator
from ctrkit.embedding import Table
from ctrkit.modelfile import TrainedModel, build
from ctrkit.models.batch import Batch, Lookup
from ctrkit.picture_vectors import PictureVectors
from ctrkit.recipe import Train
from tests.small_groups import FEATURES, SCHEMA, SIZES, Group, to_block, write_features, write_image_vocabulary

Array = npt.NDArray[np.float64]
PICTURE_WIDTH = 5
SMALL = {"extractor": (6, 5, 3), "tower": (7, 5), "attention": (6, 4), "unknown_rate": 0.0}


def pictures(folder: Path, *, has_picture: bool = False) -> tuple[PictureVectors, Array]:
    """Return picture vectors that need no centring and, by index, the same as [image indexes, width]."""
    n = SIZES["image"] - 2
    vectors = np.random.default_rng(5).normal(size=(n, PICTURE_WIDTH)).astype(np.float16)
    row = [*range(n)]
    row[3] = -1  # a picture that could not be read
    write_features(folder / "features.h5", [f"p{i}" for i in range(n)], row, vectors)
    write_image_vocabulary(folder / "convert", [f"p{i}" for i in range(n)], [1] * n)
    by_index = np.zeros((SIZES["image"], PICTURE_WIDTH))
    by_index[2:] = vectors
    by_index[2 + 3] = 0.0
    if has_picture:
        there = [[float(i >= 2 and i != 2 + 3)] for i in range(SIZES["image"])]
        by_index = np.concatenate([by_index, there], axis=1)
    return PictureVectors(folder / "features.h5", folder / "convert", has_picture=has_picture), by_index


def make(train: Mapping[str, Any], vectors: PictureVectors, seed: int = 1) -> TrainedModel:
    """Return a small model in float64 whose every parameter and statistic is random."""
    config = Train(**{**SMALL, **train, "seed": seed})
    counts = {vocab: np.arange(size) for vocab, size in SIZES.items()}
    model = build(config, SCHEMA, counts, vectors if config.looks_at_pictures else None)
    generator = torch.Generator().manual_seed(seed)
    model.network.double()
    with torch.no_grad():
        for name, tensor in model.network.state_dict().items():
            if name.endswith("seen"):
                tensor.fill_(3)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                positive = "var" in name
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(0.2 + noise.abs() if positive else 0.3 * noise)
    for table in model.tables.values():
        table.weight_VD = torch.randn(table.weight_VD.shape, generator=generator, dtype=torch.float64)
        table.weight_VD[0] = 0.0
        for name in ("count_V", "m_VD", "v_VD"):
            setattr(table, name, getattr(table, name).double())
    return model


def collate(model: TrainedModel, groups: Sequence[Group]) -> Batch:
    """Return the groups as a batch in float64."""
    batch = Collator(model.plan, model.tables, model.pictures)(to_block(groups))
    batch.click_S = batch.click_S.double()
    batch.picture_NW = {name: x.double() for name, x in batch.picture_NW.items()}
    return batch


@dataclass
class Run:
    """A forward and backward pass of the real model."""

    logit_S: Array
    loss: float
    gradients: dict[str, Array]
    """Of the mean log loss: by the network's parameter names, and `table VOCAB` [size, D]."""


def run(model: TrainedModel, groups: Sequence[Group], training: bool) -> Run:
    """Run the real model on groups."""
    batch = collate(model, groups)
    rows = {w: model.tables[w].gather(r) for w, r in batch.rows.items()}
    model.network.train(training)
    model.network.zero_grad()
    logit_S = model.network(batch, Lookup(batch, rows, {n: model.plan.width(n) for n in model.plan.ids}))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_S, batch.click_S)
    loss.backward()
    gradients = {n: p.grad.numpy().copy() for n, p in model.network.named_parameters() if p.grad is not None}
    for vocab, table in vocabularies(model).items():
        row_U, grad_UD = batch.rows[table.width].numpy(), rows[table.width].grad
        start, size = table.offsets[vocab], SIZES[vocab]
        gradients[f"table {vocab}"] = out = np.zeros((size, table.width))
        here = (row_U > start) & (row_U < start + size)
        assert grad_UD is not None
        out[row_U[here] - start] = grad_UD.numpy()[here]
    return Run(logit_S.detach().numpy(), float(loss.detach()), gradients)


def vocabularies(model: TrainedModel) -> dict[str, Table]:
    """Return vocabulary → the table it lies in."""
    return {vocab: table for table in model.tables.values() for vocab in table.offsets}


def weights(model: TrainedModel) -> dict[str, Array]:
    """Return a copy of all numbers of a model: the network's by name, and `table VOCAB` [size, D]."""
    out = {name: t.numpy().copy() for name, t in model.network.state_dict().items()}
    for vocab, table in vocabularies(model).items():
        start = table.offsets[vocab]
        matrix = table.weight_VD[start : start + SIZES[vocab]].numpy().copy()
        matrix[0] = 0.0
        out[f"table {vocab}"] = matrix
    return out


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def log_loss(logit_S: Array, groups: Sequence[Group]) -> float:
    clicks = [s["click"] for g in groups for s in g.samples]
    total = 0.0
    for z, y in zip(logit_S, clicks, strict=True):
        p = sigmoid(z)
        total -= y * np.log(p) + (1 - y) * np.log(1 - p)
    return total / len(clicks)


def dice(y_RH: Array, a_H: Array, mean_H: Array, var_H: Array) -> Array:
    """DIN eqs. 4 and 5."""
    out = np.zeros_like(y_RH)
    for r in range(y_RH.shape[0]):
        for h in range(y_RH.shape[1]):
            p = 1.0 / (1.0 + np.exp(-(y_RH[r, h] - mean_H[h]) / (np.sqrt(var_H[h]) + 1e-4)))
            out[r, h] = a_H[h] * (1.0 - p) * y_RH[r, h] + p * y_RH[r, h]
    return out


class Reference:
    """A model of `[train]` over `tests.small_groups.FEATURES`, with the numbers of `weights`."""

    def __init__(self, train: Train, weight: dict[str, Array], picture: Array, training: bool) -> None:
        self.train, self.w, self.picture, self.training = train, weight, picture, training

    def activate(self, x_RH: Array, name: str, prefix: str) -> Array:
        if name == "sigmoid":
            return np.asarray(sigmoid(x_RH))
        if name == "prelu":  # DIN eq. 3
            a_H = self.w[f"{prefix}.weight"]
            return np.array([[x if x > 0 else a_H[h] * x for h, x in enumerate(row)] for row in x_RH])
        if self.training and len(x_RH):
            mean_H, var_H = x_RH.mean(0), ((x_RH - x_RH.mean(0)) ** 2).mean(0)
        else:
            correction = 1.0 - 0.99 ** float(self.w[f"{prefix}.seen"])
            mean_H, var_H = self.w[f"{prefix}.mean_H"] / correction, self.w[f"{prefix}.var_H"] / correction
        return dice(x_RH, self.w[f"{prefix}.a_H"], mean_H, var_H)

    def mlp(self, x_RD: Array, prefix: str, n_layers: int, act: str) -> Array:
        for layer in range(n_layers):
            weight, bias = self.w[f"{prefix}.{2 * layer}.weight"], self.w[f"{prefix}.{2 * layer}.bias"]
            x_RD = np.array([weight @ x + bias for x in x_RD]).reshape(len(x_RD), len(bias))
            if layer < n_layers - 1:
                x_RD = self.activate(x_RD, act, f"{prefix}.{2 * layer + 1}")
        return x_RD

    def vector(self, name: str, value: Any) -> Array:
        """Basicnet: an id's embedding, the sum for a multi-hot feature."""
        table = self.w[f"table {FEATURES[name].vocab}"]
        if isinstance(value, list):
            return np.asarray(sum((table[v] for v in value), np.zeros(table.shape[1])))
        return np.asarray(table[value] if value else np.zeros(table.shape[1]))

    def names(self, *owners: str) -> list[str]:
        """The names of the ID features that the model looks at."""
        dicm, lr = self.train.model == "dicm", self.train.model == "lr"
        on = {"": True, "ad_id": self.train.ad_id, "user_ids": self.train.user_ids if dicm else not lr}
        return [n for n, f in FEATURES.items() if f.of in owners and f.kind == "id" and on[f.switch]]

    def extract(self, index: int, net: str) -> Array:
        """The trainable part of the extractor on one picture."""
        if self.train.share_extractors and self.train.ad_image and self.train.user_images:
            net = "adnet"
        return self.mlp(self.picture[[index]], net, len(self.train.extractor), "prelu")[0]

    def pairs(self, groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Any]]]:
        for group in groups:
            for sample in group.samples:
                yield group, sample

    def first_layer(self, q: Array, k: Array, prefix: str, parts: str) -> Array:
        """W[q; k; q − k; q∘k] + b with W put together from its parts."""
        inputs = {"q": q, "k": k, "d": q - k if "d" in parts else q, "p": q * k if "p" in parts else q}
        whole = np.concatenate([self.w[f"{prefix}.weight.{p}"] for p in parts], axis=1)
        return np.asarray(whole @ np.concatenate([inputs[p] for p in parts]) + self.w[f"{prefix}.bias"])

    def scores(self, q_S: list[Array], k_SB: list[list[Array]], prefix: str, parts: str, act: str) -> list[Array]:
        """The attention network on every (sample, behaviour) pair: a score each, before any softmax."""
        n_layers = sum(name.startswith(f"{prefix}.rest.") and name.endswith(".bias") for name in self.w)
        width = len(self.w[f"{prefix}.bias"])
        rows = [self.first_layer(q, k, prefix, parts) for q, ks in zip(q_S, k_SB, strict=True) for k in ks]
        h_PH = self.activate(np.array(rows).reshape(len(rows), width), act, f"{prefix}.act")
        out = iter(self.mlp(h_PH, f"{prefix}.rest", n_layers, act)[:, 0])
        return [np.array([next(out) for _ in ks]) for ks in k_SB]

    @staticmethod
    def softmax(z: Array) -> Array:
        return np.array([1.0 / sum(np.exp(other - one) for other in z) for one in z])

    def context(self, group: Group, sample: dict[str, Any]) -> list[Array]:
        """The middle vectors of user, ad and scene ids."""
        ids = [self.vector(n, group.user[n]) for n in self.names("user")]
        return ids + [self.vector(n, sample[n]) for n in self.names("ad", "scene")]

    def attention(self, groups: Sequence[Group]) -> list[Array]:
        """Each sample's weights of its behaviours."""
        pairs = list(self.pairs(groups))
        if self.train.model == "din":
            partner = {"goods": "ad_goods", "brand": "ad_brand"}
            q_S = [np.concatenate([self.vector(a, s[a]) for a in partner.values()]) for _, s in pairs]
            k_SB = [[np.concatenate([self.vector(n, b[n]) for n in partner]) for b in g.behaviours] for g, _ in pairs]
            if self.train.din == "din-v1":
                return self.scores(q_S, k_SB, "unit", "qkd", self.train.activation)
            scores = self.scores(q_S, k_SB, "unit", "qkdp", "sigmoid")
            return [self.softmax(z / np.sqrt(len(q_S[0]))) for z in scores]
        q_S = [np.concatenate(self.dicm_context(g, s)) for g, s in pairs]
        k_SB = [[self.extract(b["image"], "usernet") for b in g.behaviours] for g, _ in pairs]
        return [self.softmax(z) for z in self.scores(q_S, k_SB, "attention", "qk", self.train.activation)]

    def dicm_context(self, group: Group, sample: dict[str, Any]) -> list[Array]:
        picture = [self.extract(sample["ad_image"], "adnet")] if self.train.ad_image else []
        return self.context(group, sample) + picture

    def pooled(self, group: Group, weights: Array | None) -> Array:
        """The sum (weighted if so) of the behaviours' ids side by side."""
        names = self.names("behaviour")
        total = np.zeros(sum(FEATURES[n].width for n in names))
        for i, b in enumerate(group.behaviours):
            one = np.concatenate([self.vector(n, b[n]) for n in names])
            total = total + (one if weights is None else weights[i] * one)
        return total

    def inputs(self, groups: Sequence[Group]) -> Array:
        """The concatenation that the discriminator gets, [S, width]."""
        rows = []
        model, pooling = self.train.model, self.train.pooling
        attends = model == "din" or (model == "dicm" and self.train.user_images and pooling == "attentive")
        attention = self.attention(groups) if attends else []
        for s, (group, sample) in enumerate(self.pairs(groups)):
            if model == "base":
                parts = [*self.context(group, sample), self.pooled(group, None)]
            elif model == "din":
                parts = [*self.context(group, sample), self.pooled(group, attention[s])]
            else:
                parts = self.dicm_context(group, sample)
                if self.train.user_ids:
                    parts.append(self.pooled(group, None))
                if self.train.user_images:
                    found = [self.extract(b["image"], "usernet") for b in group.behaviours]
                    d = self.train.extractor[-1]
                    if pooling == "attentive":
                        parts.append(sum((w * v for w, v in zip(attention[s], found, strict=True)), np.zeros(d)))
                    elif pooling == "sum":
                        parts.append(sum(found, np.zeros(d)))
                    else:
                        parts.append(np.array([max(v[j] for v in found) if found else 0.0 for j in range(d)]))
            rows.append(np.concatenate(parts))
        return np.array(rows)

    def log_odds(self, groups: Sequence[Group]) -> Array:
        """The model's log-odds, [S]."""
        if self.train.model == "lr":
            return np.array([np.concatenate(self.context(g, s)).sum() + self.w["bias"] for g, s in self.pairs(groups)])
        x_SD = self.inputs(groups)
        if self.train.batch_norm:
            w = {n: self.w[f"discriminator.norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")}
            mean, var = w["running_mean"], w["running_var"]
            if self.training and len(x_SD) > 1:
                mean = sum(x_SD) / len(x_SD)
                var = sum((x - mean) ** 2 for x in x_SD) / len(x_SD)
            x_SD = np.array([(x - mean) / np.sqrt(var + 1e-5) * w["weight"] + w["bias"] for x in x_SD])
        out = self.mlp(x_SD, "discriminator.layers", len(self.train.tower) + 1, self.train.activation)
        # Log-odds of the second class of a softmax over the two outputs.
        p = [np.exp(b) / (np.exp(a) + np.exp(b)) for a, b in out]
        return np.log(p) - np.log1p(-np.array(p))


def random_direction(weight: dict[str, Array], trained: Sequence[str]) -> dict[str, Array]:
    """Return a random direction in the space of the trained numbers; index 0 of a table does not move."""
    rng = np.random.default_rng(0)
    out = {name: rng.normal(size=weight[name].shape) for name in trained}
    for name in out:
        if name.startswith("table "):
            out[name][0] = 0.0
    return out
