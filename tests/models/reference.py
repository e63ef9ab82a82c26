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
from tests.small_groups import FEATURES, SCHEMA, SIZES, Group, to_block, write_features, write_pictures_of_sizes

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
    write_pictures_of_sizes(folder / "convert")
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
    model = build(config, SCHEMA, counts, vectors if config.looks_at_pictures else None, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
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
    return model


def collate(model: TrainedModel, groups: Sequence[Group], seed: Sequence[int] | None = None) -> Batch:
    """Return the groups as a batch in float64, for training where there is a seed."""
    batch = Collator(model.plan, model.tables, model.pictures)(to_block(groups), seed)
    batch.click_S = batch.click_S.double()
    return batch


@dataclass
class Run:
    """A forward and backward pass of the real model."""

    logit_S: Array
    loss: float
    gradients: dict[str, Array]
    """Of the mean log loss: by the network's parameter names, and `table VOCAB` [size, D]."""
    kept: list[list[bool]]
    """For each sample, which behaviours' ids it sees."""


def run(model: TrainedModel, groups: Sequence[Group], training: bool, seed: Sequence[int] | None = None) -> Run:
    """Run the real model on groups."""
    batch = collate(model, groups, seed)
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
    left = iter([True] * len(batch.sample_P) if batch.kept_P is None else batch.kept_P.tolist())
    kept = [[next(left) for _ in g.behaviours] for g in groups for _ in g.samples]
    return Run(logit_S.detach().numpy(), float(loss.detach()), gradients, kept)


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
    """A model of `[train]` over `tests.small_groups.FEATURES`, with the numbers of `weights`.

    `kept` says for each sample which behaviours' ids it sees; all of them without it.
    """

    def __init__(
        self,
        train: Train,
        weight: dict[str, Array],
        picture: Array,
        training: bool,
        kept: list[list[bool]] | None = None,
    ) -> None:
        self.train, self.w, self.picture, self.training = train, weight, picture, training
        self.kept = kept
        self.ad_vector: dict[int, Array] = {}
        self.user_vector: dict[int, Array] = {}

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
        on = {"": True, "ad_id": self.train.ad_id, "user_ids": bool(self.train.user_ids) if dicm else not lr}
        return [n for n, f in FEATURES.items() if f.of in owners and f.kind == "id" and on[f.switch]]

    def extract(self, groups: Sequence[Group]) -> None:
        """The trainable part of the extractors: on the ad's picture of every sample, on each it has in its history."""
        if self.train.model != "dicm":
            return
        ads = [s["ad_image"] for _, s in self.pairs(groups)] * self.train.ad_image
        users = [b["image"] for g, _ in self.pairs(groups) for b in g.behaviours] * self.train.pools_pictures

        def net(prefix: str, rows: list[int]) -> list[Array]:
            return [*self.mlp(self.picture[rows], prefix, len(self.train.extractor), self.train.extractor_activation)]

        if self.train.share_extractors and self.train.ad_image and self.train.pools_pictures:
            found = net("adnet", ads + users)
        else:
            found = (net("adnet", ads) if ads else []) + (net("usernet", users) if users else [])
        self.ad_vector = dict(zip(ads, found[: len(ads)], strict=True))
        self.user_vector = dict(zip(users, found[len(ads) :], strict=True))

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

    def unit(self, q_S: list[Array], k_SB: list[list[Array]], prefix: str) -> list[Array]:
        """DIN's g: each sample's weights of its behaviours."""
        if self.train.din == "din-v1":
            return self.scores(q_S, k_SB, prefix, "qkd", self.train.activation)
        scores = self.scores(q_S, k_SB, prefix, "qkdp", "sigmoid")
        return [self.softmax(z / np.sqrt(len(q_S[0]))) for z in scores]

    def id_weights(self, groups: Sequence[Group], prefix: str) -> list[Array]:
        """Each sample's weights of its behaviours' ids, by DIN's unit; those that dropout discards weigh nothing."""
        pairs, partner = list(self.pairs(groups)), {"goods": "ad_goods", "brand": "ad_brand"}
        q_S = [np.concatenate([self.vector(a, s[a]) for a in partner.values()]) for _, s in pairs]
        kept = self.kept or [[True] * len(g.behaviours) for g, _ in pairs]
        seen = [
            [b for b, keep in zip(g.behaviours, k, strict=True) if keep] for (g, _), k in zip(pairs, kept, strict=True)
        ]
        k_SB = [[np.concatenate([self.vector(n, b[n]) for n in partner]) for b in bs] for bs in seen]
        out = []
        for found, k in zip(self.unit(q_S, k_SB, prefix), kept, strict=True):
            left = iter(found if self.train.din == "din-code" else found / self.kept_share())
            out.append(np.array([next(left) if keep else 0.0 for keep in k]))
        return out

    def kept_share(self) -> float:
        return 1.0 if self.kept is None else 1.0 - self.train.dropout_rate

    def attention(self, groups: Sequence[Group]) -> list[Array]:
        """Each sample's weights of its behaviours: DIN's, or of DICM's pictures."""
        if self.train.model == "din":
            return self.id_weights(groups, "unit")
        self.extract(groups)
        pairs = list(self.pairs(groups))
        k_SB = [[self.user_vector[b["image"]] for b in g.behaviours] for g, _ in pairs]
        if self.train.pooling == "din":
            return self.unit([self.ad_vector[s["ad_image"]] for _, s in pairs], k_SB, "picture_unit")
        q_S = [np.concatenate(self.dicm_context(g, s)) for g, s in pairs]
        return [self.softmax(z) for z in self.scores(q_S, k_SB, "attention", "qk", self.train.activation)]

    def dicm_context(self, group: Group, sample: dict[str, Any]) -> list[Array]:
        picture = [self.ad_vector[sample["ad_image"]]] if self.train.ad_image else []
        return self.context(group, sample) + picture

    def pooled(self, group: Group, weights: Array | list[float]) -> Array:
        """The weighted sum of the behaviours' ids side by side."""
        names = self.names("behaviour")
        total = np.zeros(sum(FEATURES[n].width for n in names))
        for b, w in zip(group.behaviours, weights, strict=True):
            total = total + w * np.concatenate([self.vector(n, b[n]) for n in names])
        return total

    def tiers(self, group: Group, sample: dict[str, Any]) -> Array:
        """SimTier: the ad's picture against each of the history, by the angle between them."""
        n = self.train.tiers
        counts = np.zeros(n)
        a = self.picture[sample["ad_image"], :PICTURE_WIDTH]
        for b in group.behaviours:
            u = self.picture[b["image"], :PICTURE_WIDTH]
            if not a.any() or not u.any():
                continue
            cosine = sum(x * y for x, y in zip(a, u, strict=True)) / np.sqrt(sum(a * a)) / np.sqrt(sum(u * u))
            for tier in range(n):
                low, high = -1 + 2 * tier / n, -1 + 2 * (tier + 1) / n
                if low <= cosine < high or (tier == n - 1 and cosine >= high) or (tier == 0 and cosine < low):
                    counts[tier] += 1
        return counts

    def inputs(self, groups: Sequence[Group]) -> Array:
        """The concatenation that the discriminator gets, [S, width]."""
        rows = []
        train = self.train
        self.extract(groups)
        pairs = list(self.pairs(groups))
        attends = train.pools_pictures and train.pooling in ("attentive", "din")
        attention = self.attention(groups) if attends else []
        if train.model == "din" or train.user_ids == "din":
            of_ids = self.id_weights(groups, "unit" if train.model == "din" else "id_unit")
        else:
            kept = self.kept or [[True] * len(g.behaviours) for g, _ in pairs]
            of_ids = [np.array([keep / self.kept_share() for keep in k]) for k in kept]
        for s, (group, sample) in enumerate(pairs):
            if train.model in ("base", "din"):
                parts = [*self.context(group, sample), self.pooled(group, of_ids[s])]
            else:
                parts = self.dicm_context(group, sample)
                if train.user_ids:
                    parts.append(self.pooled(group, of_ids[s]))
                if train.pools_pictures:
                    found = [self.user_vector[b["image"]] for b in group.behaviours]
                    d = train.extractor[-1]
                    if attends:
                        parts.append(sum((w * v for w, v in zip(attention[s], found, strict=True)), np.zeros(d)))
                    elif train.pooling == "sum":
                        parts.append(sum(found, np.zeros(d)))
                    else:
                        parts.append(np.array([max(v[j] for v in found) if found else 0.0 for j in range(d)]))
                if train.counts_tiers:
                    parts.append(self.tiers(group, sample))
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
