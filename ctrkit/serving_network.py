"""A trained network as plain dense layers for serving: what the user alone decides apart from what each ad adds.

The formulas are those of `ctrkit.models`, for one user at a time. BatchNorm is folded into the tower's first layer, the
tower's two outputs into their difference, and each first layer is split by its inputs, so that the user's share of it
is computed once for any number of ads. All of it is exact.

Letters: A ads, L behaviours, N pictures, D width of an embedding or extracted picture, W of a picture vector, H hidden
width, T tiers. A, L, N and the lengths of multi-hot features are 2 at least; `there_L` says which behaviours are real.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ctrkit.errors import UserError
from ctrkit.models.dicm import DICM
from ctrkit.models.din import DIN
from ctrkit.models.layers import BatchNorm, Dice, Discriminator
from ctrkit.models.layers import PReLU as TrainedPReLU
from ctrkit.models.lr import LR
from ctrkit.models.pairs import PairMLP
from ctrkit.models.plan import Plan

NONE = -1e30
"""The logit of a behaviour that is not there."""
Tensors = Mapping[str, Tensor]


class PReLU(nn.Module):
    """DIN eq. 3, [rows, H]."""

    def __init__(self, trained: TrainedPReLU) -> None:
        super().__init__()
        self.slope_H = _fixed(trained.weight)
        self.is_maximum = bool((self.slope_H <= 1.0).all())
        """Then the larger of y and slope·y is the same, which onnxruntime computes in a fraction of PRelu's time."""

    def forward(self, y: Tensor) -> Tensor:
        if self.is_maximum:
            return torch.maximum(y, self.slope_H * y)
        return nn.functional.prelu(y, self.slope_H)


class FixedDice(nn.Module):
    """DIN eqs. 4 and 5 with the running averages, [rows, H]."""

    def __init__(self, trained: Dice) -> None:
        super().__init__()
        mean_H, var_H = (x.double() for x in trained.running())
        self.mean_H, self.a_H = _fixed(mean_H), _fixed(trained.a_H)
        self.per_H = _fixed(1.0 / (var_H.sqrt() + trained.eps))

    def forward(self, y: Tensor) -> Tensor:
        p = torch.sigmoid((y - self.mean_H) * self.per_H)
        return y * (p + self.a_H * (1.0 - p))


class Ids(nn.Module):
    """Middle vectors of the ID features of one owner side by side, in the order `names`.

    Features of one width share a matrix; row 0 of each vocabulary is zero. `one`: features with one value, whose
    indexes lie side by side in an input [..., len(one)]; `many`: multi-hot ones, each an input [..., V] filled up
    with 0.
    """

    def __init__(self, plan: Plan, names: Sequence[str], tables: Tensors) -> None:
        super().__init__()
        features = plan.schema.features
        self.one = [n for n in names if not features[n].multi_hot]
        self.many = [n for n in names if features[n].multi_hot]
        self.names: list[str] = []
        self.tables, self.offsets = nn.ParameterList(), nn.ParameterList()
        self.places = nn.ParameterList()
        """Of each width, which of `one` have it."""
        self._table_of: dict[str, int] = {}
        offset_of: dict[str, int] = {}
        for width in sorted({plan.width(n) for n in names}):
            vocabs = list(dict.fromkeys(features[n].vocab for n in names if plan.width(n) == width))
            end = 0
            for vocab in vocabs:
                offset_of[vocab] = end
                end += len(tables[f"{width}.{vocab}"])
            alike = [n for n in self.one if plan.width(n) == width]
            self._table_of |= {n: len(self.tables) for n in names if plan.width(n) == width}
            self.tables.append(_fixed(torch.cat([tables[f"{width}.{vocab}"] for vocab in vocabs])))
            self.offsets.append(_whole([offset_of[features[n].vocab] for n in alike]))
            self.places.append(_whole([self.one.index(n) for n in alike]))
            self.names += alike
        self._offset_of = {n: offset_of[features[n].vocab] for n in self.many}
        self.names += self.many

    def forward(self, given: Tensors, ids: str, prefix: str) -> Tensor:
        """Return [..., sum of D]. ids: the input of `one`; prefix: before the names of `many`."""
        parts = []
        for table, offset, places in zip(self.tables, self.offsets, self.places, strict=True):
            if len(places):
                index = given[ids] if len(places) == len(self.one) else given[ids].index_select(-1, places)
                parts.append(nn.functional.embedding(index + offset, table).flatten(-2))
        for name in self.many:
            index = given[prefix + name] + self._offset_of[name]
            parts.append(nn.functional.embedding(index, self.tables[self._table_of[name]]).sum(-2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Pictures(nn.Module):
    """Picture vectors as features.h5 has them → what the model makes of each picture alone.

    Inputs `vectors` [N, W], `there` [N] bool: whether there is one. Outputs, of those that the model has: `extracted`
    [N, D], `centred` [N, W] (for SimTier).
    """

    inputs = ("vectors", "there")

    def __init__(self, plan: Plan, state: Tensors, extractor: nn.Module | None) -> None:
        super().__init__()
        self.mean_W, self.scale = _fixed(state["pictures.mean"]), _fixed(state["pictures.scale"])
        self.flag, self.centred = plan.train.has_picture, plan.train.counts_tiers
        self.extractor = None if extractor is None else _layers(list(extractor.children()))
        self.outputs = ["extracted"] * (extractor is not None) + ["centred"] * self.centred

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        vectors_NW, there_N = given
        there_N1 = there_N.unsqueeze(1)
        x_NW = torch.where(there_N1, (vectors_NW - self.mean_W) * self.scale, 0.0)
        out = []
        if self.extractor is not None:
            seen_NW = torch.cat([x_NW, there_N1.to(x_NW.dtype)], 1) if self.flag else x_NW
            out.append(self.extractor(seen_NW))
        return (*out, x_NW) if self.centred else tuple(out)


class Pairs(nn.Module):
    """A trained `PairMLP` on every pair of an ad and a behaviour, its first layer's shares given."""

    def __init__(self, trained: PairMLP) -> None:
        super().__init__()
        self.product_HD = _fixed(trained.weight["p"]) if "p" in trained.parts else None
        self.layers = _layers([trained.act, *trained.rest.children()])

    def forward(self, h_AH: Tensor, h_LH: Tensor, q_AD: Tensor | None, k_LD: Tensor | None) -> Tensor:
        """Return [A, L]. h: each side's share of the first layer, the bias in one of them; q, k: where it has q∘k."""
        h_ALH = h_AH.unsqueeze(1) + h_LH.unsqueeze(0)
        if self.product_HD is not None and q_AD is not None and k_LD is not None:
            h_ALH = h_ALH + nn.functional.linear(q_AD.unsqueeze(1) * k_LD.unsqueeze(0), self.product_HD)
        out_P1: Tensor = self.layers(h_ALH.flatten(0, 1))
        return out_P1.view(h_AH.shape[0], h_LH.shape[0])


class Shares:
    """A trained first layer cut by its inputs: `part(names)` is what some of them are multiplied by, side by side."""

    def __init__(self, weight_HD: Tensor, bias_H: Tensor, widths: Sequence[tuple[str, int]]) -> None:
        blocks = torch.split(weight_HD, [width for _, width in widths], dim=1)
        self._block = dict(zip([name for name, _ in widths], blocks, strict=True))
        self.bias_H = bias_H

    def part(self, names: Sequence[str], *, bias: bool = False) -> nn.Linear:
        """Return the layer on these inputs side by side."""
        weight = torch.cat([self._block[name] for name in names], 1)
        return _linear(weight, self.bias_H if bias else None)


class Network:
    """The parts that `User` and `Ads` are put together from, of one trained model, in float64."""

    def __init__(self, plan: Plan, network: nn.Module, state: Tensors) -> None:
        self.plan, train = plan, plan.train
        self.tables = _tables(plan, state)
        self.user = Ids(plan, plan.user, self.tables) if plan.user else None
        self.behaviour = Ids(plan, plan.behaviour, self.tables) if plan.behaviour else None
        self.sample = Ids(plan, plan.sample, self.tables) if plan.sample else None
        self.adnet = self.usernet = None
        self.attention: PairMLP | None = None
        self.picture_unit = self.id_unit = None
        ids = [(n, plan.width(n)) for n in (*plan.user, *plan.sample)]
        self.context = ids
        """What the attention network sees of user and ad, in the order of training."""
        if isinstance(network, DICM):
            d = train.extractor[-1]
            self.adnet, self.usernet = network.adnet, network.usernet
            self.attention, self.picture_unit, self.id_unit = network.attention, network.picture_unit, network.id_unit
            self.context = [*ids, ("ad picture", d)] if self.adnet is not None else ids
        elif isinstance(network, DIN):
            self.id_unit = network.unit
        inputs = [*self.context, *((f"pooled {n}", plan.width(n)) for n in plan.behaviour)]
        inputs += [("pooled pictures", train.extractor[-1])] * train.pools_pictures
        inputs += [("tiers", train.tiers)] * train.counts_tiers
        first, self.rest = _tower(network, sum(width for _, width in inputs), plan.schema.negative_rate)
        self.tower = Shares(*first, inputs)
        if not (self.sample or self.adnet or train.counts_tiers):
            raise UserError(
                "the model reads nothing of the ad or the scene, so all ads would have the same score: there is "
                "nothing to serve. Train one with a feature of = 'ad', or with ad_image."
            )

    @property
    def partner(self) -> dict[str, str]:
        """Behaviour feature → the ad's that DIN's unit compares it with."""
        return self.plan.partners() if self.id_unit is not None else {}


class User(nn.Module):
    """What depends on the user alone: features and history → the state that `Ads` reads.

    Inputs, of those that the model has: `user_ids` [features] int64, `user.NAME` [V] int64 (a multi-hot feature),
    `behaviour_ids` [L, features] int64, `behaviour_pictures` [L, D] (`extracted`), `behaviour_vectors` [L, W]
    (`centred`), `there` [L] bool. Outputs: `tower` [H], the user's share of the tower's first layer; `attention_keys`,
    `picture_keys` and `id_keys` [L, H], the behaviours' share of the first layer of the net that weighs them (of
    attention the user's share too); `id_compared` and `id_values` [L, D]; and `norms` [L] of the vectors.
    """

    def __init__(self, of: Network) -> None:
        super().__init__()
        plan = of.plan
        train = plan.train
        self.user, self.behaviour = of.user, of.behaviour
        names = [] if of.user is None else of.user.names
        self.of_user = of.tower.part(names) if names else None
        self.of_ids = self.of_pictures = None
        if of.behaviour is not None and of.id_unit is None:
            self.of_ids = of.tower.part([f"pooled {n}" for n in of.behaviour.names])
        self.pooling = train.pooling if of.usernet is not None else ""
        if self.pooling in ("sum", "max"):
            self.of_pictures = of.tower.part(["pooled pictures"])
        self.attention = self.attention_user = self.picture_keys = self.id_keys = None
        if of.attention is not None:
            self.attention = _keys(of.attention)
            if names:
                self.attention_user = Shares(*_queries(of.attention), of.context).part(names)
        if of.picture_unit is not None:
            self.picture_keys = _keys(of.picture_unit)
        if of.id_unit is not None and of.behaviour is not None:
            self.id_keys = _keys(of.id_unit, _columns(plan, list(of.partner), of.behaviour.names))
            self.products = "p" in of.id_unit.parts
            self.compared = _whole(_places(plan, of.behaviour.names, list(of.partner)))
        self.norms = train.counts_tiers
        self.inputs = _named(of.user, "user_ids", "user.") + _named(of.behaviour, "behaviour_ids", "behaviour.")
        self.inputs += ["behaviour_pictures"] * bool(self.pooling) + ["behaviour_vectors"] * self.norms
        self.inputs += ["there"] * (self.of_ids is not None or self.of_pictures is not None)
        summed = (self.of_user, self.of_ids, self.of_pictures)
        self.outputs = ["tower"] * any(part is not None for part in summed)
        self.outputs += ["attention_keys"] * (self.attention is not None)
        self.outputs += ["picture_keys"] * (self.picture_keys is not None)
        if self.id_keys is not None:
            self.outputs += ["id_keys", *["id_compared"] * self.products, "id_values"]
        self.outputs += ["norms"] * self.norms

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(self.inputs, given, strict=True))
        out: dict[str, Tensor] = {}
        share_H: list[Tensor] = []
        user_D = None if self.user is None else self.user(x, "user_ids", "user.")
        if self.of_user is not None and user_D is not None:
            share_H.append(self.of_user(user_D))
        if self.behaviour is not None:
            v_LD = self.behaviour(x, "behaviour_ids", "behaviour.")
            if self.of_ids is not None:
                share_H.append(self.of_ids((v_LD * x["there"].unsqueeze(1)).sum(0)))
            if self.id_keys is not None:
                out["id_keys"] = self.id_keys(v_LD)
                out["id_values"] = v_LD
                if self.products:
                    out["id_compared"] = v_LD.index_select(1, self.compared)
        if self.of_pictures is not None:
            share_H.append(self.of_pictures(self.pool(x["behaviour_pictures"], x["there"].unsqueeze(1))))
        if self.attention is not None:
            keys_LH = self.attention(x["behaviour_pictures"])
            if self.attention_user is not None:
                keys_LH = keys_LH + self.attention_user(user_D)
            out["attention_keys"] = keys_LH
        if self.picture_keys is not None:
            out["picture_keys"] = self.picture_keys(x["behaviour_pictures"])
        if self.norms:
            out["norms"] = torch.linalg.vector_norm(x["behaviour_vectors"], dim=1)
        if share_H:
            out["tower"] = sum(share_H[1:], share_H[0])
        return tuple(out[name] for name in self.outputs)

    def pool(self, k_LD: Tensor, there_L1: Tensor) -> Tensor:
        """Return [D], the sum or the maximum over the behaviours; zero without one."""
        if self.pooling == "sum":
            return (k_LD * there_L1).sum(0)
        return torch.where(there_L1.any(), torch.where(there_L1, k_LD, NONE).amax(0), 0.0)


class Ads(nn.Module):
    """The user's state and any number of ads → click probabilities.

    Inputs, of those that the model has: `ad_ids` [A, features] int64 and `ad.NAME` [A, V] int64, of ad and scene;
    `ad_pictures` [A, D] (`extracted`), `ad_vectors` [A, W] (`centred`); the outputs of `User`; of its inputs
    `behaviour_pictures`, `behaviour_vectors` and `there`. Outputs: `probability` [A], with `negative_rate` undone;
    `attention` [A, L], what weighs the behaviours' pictures, or else their ids, where the model has that.
    """

    def __init__(self, of: Network, state: Sequence[str]) -> None:
        super().__init__()
        plan = of.plan
        self.sample, self.rest = of.sample, of.rest
        names = [] if of.sample is None else of.sample.names
        pictures = ["ad picture"] * (of.adnet is not None)
        self.reads_picture = of.adnet is not None
        self.of_ad = of.tower.part([*names, *pictures], bias=True) if names or pictures else None
        self.bias_H = _fixed(of.tower.bias_H)
        self.attention = self.attention_ad = self.picture_unit = self.picture_queries = None
        self.id_unit = self.id_queries = self.of_pictures = self.of_ids = self.of_tiers = None
        if of.attention is not None:
            queries = Shares(*_queries(of.attention), of.context)
            self.attention = Pairs(of.attention)
            self.attention_ad = queries.part([*names, *pictures], bias=True) if names or pictures else None
            self.attention_bias_H = _fixed(queries.bias_H)
        if of.picture_unit is not None:
            self.picture_unit, self.picture_queries = Pairs(of.picture_unit), _linear(*_queries(of.picture_unit))
            self.picture_softmax, self.picture_scale = of.picture_unit.softmax, of.picture_unit.scale(0.0)
        if of.id_unit is not None and of.behaviour is not None:
            self.id_unit, self.id_queries = Pairs(of.id_unit), _linear(*_queries(of.id_unit))
            self.id_softmax, self.id_scale = of.id_unit.softmax, of.id_unit.scale(0.0)
            self.compared = _whole(_places(plan, names, list(of.partner.values())))
            self.of_ids = of.tower.part([f"pooled {n}" for n in of.behaviour.names])
        if self.attention is not None or self.picture_unit is not None:
            self.of_pictures = of.tower.part(["pooled pictures"])
        self.tiers = plan.train.tiers if plan.train.counts_tiers else 0
        if self.tiers:
            self.of_tiers = of.tower.part(["tiers"])
            self.tier_T = _whole(range(self.tiers))
        self.state = list(state)
        pairs = self.attention is not None or self.picture_unit is not None
        self.inputs = _named(of.sample, "ad_ids", "ad.") + ["ad_pictures"] * (of.adnet is not None)
        self.inputs += ["ad_vectors"] * bool(self.tiers) + self.state + ["behaviour_pictures"] * pairs
        self.inputs += ["behaviour_vectors"] * bool(self.tiers)
        self.inputs += ["there"] * (pairs or bool(self.tiers) or self.id_unit is not None)
        self.outputs = ["probability"] + ["attention"] * (pairs or self.id_unit is not None)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(self.inputs, given, strict=True))
        parts = [] if self.sample is None else [self.sample(x, "ad_ids", "ad.")]
        e_AD = parts[0] if parts else None
        if self.reads_picture:
            parts.append(x["ad_pictures"])
        ad_AD = torch.cat(parts, 1) if parts else None
        h_AH = self.bias_H.unsqueeze(0) if self.of_ad is None or ad_AD is None else self.of_ad(ad_AD)
        if "tower" in x:
            h_AH = h_AH + x["tower"]
        weights: list[Tensor] = []
        if self.id_unit is not None and self.id_queries is not None and self.of_ids is not None and e_AD is not None:
            q_AD = e_AD.index_select(1, self.compared)
            g_AL = self.id_unit(self.id_queries(q_AD), x["id_keys"], q_AD, x.get("id_compared"))
            w_AL = _weights(g_AL * self.id_scale, x["there"], softmax=self.id_softmax)
            h_AH = h_AH + self.of_ids(w_AL @ x["id_values"])
            weights.append(w_AL)
        if self.attention is not None:
            q_AH = self.attention_bias_H.unsqueeze(0) if self.attention_ad is None else self.attention_ad(ad_AD)
            w_AL = _weights(self.attention(q_AH, x["attention_keys"], None, None), x["there"], softmax=True)
            weights.insert(0, w_AL)
        elif self.picture_unit is not None and self.picture_queries is not None:
            q_AD, k_LD = x["ad_pictures"], x["behaviour_pictures"]
            g_AL = self.picture_unit(self.picture_queries(q_AD), x["picture_keys"], q_AD, k_LD)
            w_AL = _weights(g_AL * self.picture_scale, x["there"], softmax=self.picture_softmax)
            weights.insert(0, w_AL)
        if self.of_pictures is not None:
            h_AH = h_AH + self.of_pictures(weights[0] @ x["behaviour_pictures"])
        if self.of_tiers is not None:
            h_AH = h_AH + self.of_tiers(self.counts(x))
        probability_A = torch.sigmoid(self.rest(h_AH).squeeze(1))
        return (probability_A, *weights[:1])

    def counts(self, x: Tensors) -> Tensor:
        """Return [A, T], SimTier's counts (arXiv 2407.19467, section 4)."""
        norms_AL = torch.linalg.vector_norm(x["ad_vectors"], dim=1).unsqueeze(1) * x["norms"]
        there_AL = (norms_AL > 0) & x["there"]
        cosine_AL = x["ad_vectors"] @ x["behaviour_vectors"].t() / torch.where(norms_AL > 0, norms_AL, 1.0)
        tier_AL = ((cosine_AL + 1.0) * (self.tiers / 2)).floor().long().clamp(0, self.tiers - 1)
        counts_AT = ((tier_AL.unsqueeze(2) == self.tier_T) & there_AL.unsqueeze(2)).sum(1)
        out_AT: Tensor = counts_AT.to(x["norms"].dtype)
        return out_AT


def _weights(g_AL: Tensor, there_L: Tensor, *, softmax: bool) -> Tensor:
    """Return [A, L], zero for behaviours that are not there."""
    if softmax:
        g_AL = torch.softmax(torch.where(there_L, g_AL, NONE), 1)
    return g_AL * there_L.to(g_AL.dtype)


def _named(ids: Ids | None, one: str, prefix: str) -> list[str]:
    """Return the inputs of an `Ids`."""
    return [] if ids is None else [one] * bool(ids.one) + [prefix + name for name in ids.many]


def _places(plan: Plan, order: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return where the coordinates of features `names` lie in the middle vectors that lie side by side as `order`."""
    begins, end = {}, 0
    for name in order:
        begins[name] = end
        end += plan.width(name)
    return [begins[name] + i for name in names for i in range(plan.width(name))]


def _columns(plan: Plan, names: Sequence[str], order: Sequence[str]) -> Tensor:
    """Return [width of names, width of order]: the matrix that takes out `names` of what lies as `order`."""
    places = _places(plan, order, names)
    out = torch.zeros(len(places), plan.total_width(order), dtype=torch.float64)
    out[range(len(places)), places] = 1.0
    return out


def _queries(unit: PairMLP) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of the query's share of the first layer."""
    weight = unit.weight["q"].double()
    return (weight + unit.weight["d"].double() if "d" in unit.parts else weight), unit.bias.double()


def _keys(unit: PairMLP, columns: Tensor | None = None) -> nn.Linear:
    """Return the key's share of the first layer; columns: which coordinates of what it gets are the key."""
    weight = unit.weight["k"].double()
    weight = weight - unit.weight["d"].double() if "d" in unit.parts else weight
    return _linear(weight if columns is None else weight @ columns)


def _tower(network: nn.Module, width: int, negative_rate: float) -> tuple[tuple[Tensor, Tensor], nn.Sequential]:
    """Return (weight [H, width] and bias [H] of the first layer, the layers after it) of a network's discriminator,
    with the one output whose sigmoid is the click probability."""
    if isinstance(network, LR):
        first = torch.ones(1, width, dtype=torch.float64), network.bias.double().reshape(1) + math.log(negative_rate)
        return first, nn.Sequential()
    assert isinstance(network.discriminator, Discriminator)
    layers, norm = list(network.discriminator.layers), network.discriminator.norm
    weights = [(m.weight.double(), m.bias.double()) for m in layers if isinstance(m, nn.Linear)]
    last = weights[-1]
    weights[-1] = last[0][1:] - last[0][:1], last[1][1:] - last[1][:1] + math.log(negative_rate)
    if isinstance(norm, BatchNorm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        size = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * size
        weights[0] = weights[0][0] * size, weights[0][1] + weights[0][0] @ shift
    rest: list[nn.Module] = []
    for act, (weight, bias) in zip(layers[1::2], weights[1:], strict=True):
        rest += [_activation(act), _linear(weight, bias)]
    return weights[0], nn.Sequential(*rest)


def _layers(trained: Sequence[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(_linear(m.weight, m.bias) if isinstance(m, nn.Linear) else _activation(m) for m in trained))


def _activation(trained: nn.Module) -> nn.Module:
    if isinstance(trained, Dice):
        return FixedDice(trained)
    return PReLU(trained) if isinstance(trained, TrainedPReLU) else nn.Sigmoid()


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    out.weight = _fixed(weight)
    if bias is not None:
        out.bias = _fixed(bias)
    return out


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().float().clone().contiguous(), requires_grad=False)


def _whole(values: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(list(values), dtype=torch.int64), requires_grad=False)


def _tables(plan: Plan, state: Tensors) -> dict[str, Tensor]:
    """Return WIDTH.VOCAB → [size, D]: row 0 is zero; ids that training filtered out have the row of unknown ones."""
    out = {}
    for width, vocabs in plan.vocabularies().items():
        matrix, offset = state[f"table.{width}"], 0
        for vocab in vocabs:
            size = plan.schema.vocab_sizes[vocab]
            table = torch.cat([torch.zeros(1, width), matrix[offset + 1 : offset + size].float()])
            if (kept := state.get(f"frequent.{vocab}")) is not None:
                table[~kept] = table[1].clone()
                table[0] = 0.0
            out[f"{width}.{vocab}"] = table
            offset += size
    return out
