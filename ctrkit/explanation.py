"""One prediction taken apart: what it would be without each of its inputs, and what each behaviour is to it.

Shape letters as in `ctrkit.batches`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ctrkit import vocabulary
from ctrkit.batches import Block, Column, Ragged, Schema
from ctrkit.collate import Collator
from ctrkit.impressions import Impression
from ctrkit.modelfile import TrainedModel
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.dicm import DICM
from ctrkit.models.din import DIN, compared
from ctrkit.models.plan import Plan
from ctrkit.models.simtier import similarities_P
from ctrkit.scoring import look_up, probability
from ctrkit.vocabulary import MISSING, UNKNOWN

Floats = npt.NDArray[np.float64]
AT_ONCE = 64
"""Changed impressions that are scored at once."""


@dataclass(frozen=True)
class Value:
    """What an input holds. `text` is None where `index` is 0 (missing) or 1 (unknown: not in the vocabulary)."""

    index: int
    text: str | None

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        return "missing" if self.index == MISSING else "unknown"


@dataclass(frozen=True)
class Score:
    """A click probability and its log-odds."""

    probability: float
    log_odds: float


@dataclass(frozen=True)
class Input:
    """A group of inputs, and the prediction without it."""

    name: str
    values: dict[str, list[Value]]
    """Feature → what it holds; of behaviours nothing, since they are told one by one."""
    without: str
    """What was put in its place."""
    score: Score
    adds: float
    """The prediction's log-odds less those without the group."""


@dataclass(frozen=True)
class Measure:
    """What a model makes of each behaviour: a weight, say."""

    name: str
    meaning: str
    value_B: list[float | None]


@dataclass(frozen=True)
class Behaviour:
    """A behaviour of the user's history."""

    number: int
    """Its place in the history; 1 is the oldest."""
    values: dict[str, list[Value]]
    """Feature → what it holds, pictures too, whether the model reads it or not."""
    image: str
    """The id of its picture, "" where it has none."""
    measures: dict[str, float | None]
    score: Score
    """The prediction without it, all else being as it is."""
    adds: float
    """The prediction's log-odds less those without it."""


@dataclass(frozen=True)
class Explanation:
    """A prediction taken apart."""

    impression: Impression
    model: str
    """Which model, in words."""
    score: Score
    ad_image: str
    inputs: list[Input]
    behaviours: list[Behaviour]
    """Oldest first."""
    reads: list[str]
    """The behaviours' features that the model reads."""
    measures: dict[str, str]
    """Name → meaning, of the behaviours' `measures`."""
    notes: list[str]


def explain(model: TrainedModel, impression: Impression, convert: Path) -> Explanation:
    """Take the prediction for an impression apart.

    convert: the folder whose vocabularies give indexes their values.
    """
    plan, block = model.plan, impression.block
    schema, texts = plan.schema, Texts(convert, plan.schema)
    groups = input_groups(plan)
    n_behaviours = int(block.behaviour_offsets[-1]) if reads_behaviours(plan) else 0
    changed = [group.change(block) for group in groups] + [without_behaviour(block, b) for b in range(n_behaviours)]
    whole, *others = scores(model, [block, *changed])
    found = measures(model, block) if n_behaviours else []
    behaviours = [
        Behaviour(
            number=b + 1,
            values={name: texts.of(name, column, b) for name, column in block.behaviour.items()},
            image=next((texts.of(name, block.behaviour[name], b)[0].text or "" for name in _images(schema)), ""),
            measures={measure.name: measure.value_B[b] for measure in found},
            score=score,
            adds=whole.log_odds - score.log_odds,
        )
        for b, score in enumerate(others[len(groups) :])
    ]
    inputs = [
        Input(
            name=group.name,
            values={name: texts.of(name, _owner(block, schema, name)[name], 0) for name in group.features},
            without=group.without,
            score=score,
            adds=whole.log_odds - score.log_odds,
        )
        for group, score in zip(groups, others, strict=False)
    ]
    ad_images = schema.names(("ad",), "image")
    return Explanation(
        impression=impression,
        model=in_words(plan),
        score=whole,
        ad_image=(texts.of(ad_images[0], block.sample[ad_images[0]], 0)[0].text or "") if ad_images else "",
        inputs=inputs,
        behaviours=behaviours,
        reads=[*plan.behaviour, *([plan.user_image] if plan.user_image else [])],
        measures={measure.name: measure.meaning for measure in found},
        notes=notes(plan, impression, n_behaviours),
    )


@torch.inference_mode()
def scores(model: TrainedModel, blocks: Sequence[Block]) -> list[Score]:
    """Return the prediction for each block of one sample, as `ctrkit predict` makes it."""
    collate = Collator(model.plan, model.tables, model.pictures)
    model.network.eval()
    out = []
    for start in range(0, len(blocks), AT_ONCE):
        batch = collate(Block.concat(blocks[start : start + AT_ONCE])).to(model.device)
        logit_S = model.network(batch, look_up(model, batch))
        odds_S = logit_S.double() + math.log(model.plan.schema.negative_rate)
        out += [Score(float(p), float(z)) for p, z in zip(probability(model, logit_S), odds_S, strict=True)]
    return out


# --- What "without" means ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputGroup:
    """A group of inputs, and the impression without it."""

    name: str
    features: list[str]
    """None of behaviours."""
    without: str
    change: Callable[[Block], Block]


def input_groups(plan: Plan) -> list[InputGroup]:
    """Return the groups of inputs of a model.

    An id of ad, user or scene is replaced by the unknown one (index 1), a row that training has taught what an id that
    it never saw looks like; a multi-hot feature has no values then. A picture becomes a missing one: the zero vector,
    which is the mean picture, and with `has_picture` the flag 0; SimTier counts nothing then. Ids of behaviours become
    missing ones (index 0, the zero vector), so that what is pooled of them is zero as for a user without a history.
    `history` leaves all behaviours out.
    """
    features = plan.schema.features
    ads = [name for name in plan.sample if features[name].of == "ad"]
    flag = ", has_picture 0" if plan.train.has_picture else ""
    no_picture = f"no picture (the zero vector{flag})"

    def ids(name: str, names: list[str]) -> list[InputGroup]:
        many = [n for n in names if features[n].multi_hot]
        told = ["unknown (index 1)"] * (len(many) < len(names)) + ["no values (multi-hot)"] * bool(many)
        return [InputGroup(name, names, ", ".join(told), lambda block: _unknown(block, names))] if names else []

    found = ids("ad id", [n for n in ads if features[n].switch == "ad_id"])
    if plan.ad_image:
        found.append(InputGroup("ad picture", [plan.ad_image], no_picture, lambda b: _missing(b, [plan.ad_image])))
    found += ids("ad features", [n for n in ads if features[n].switch != "ad_id"])
    found += ids("user features", plan.user)
    found += ids("scene", [n for n in plan.sample if features[n].of == "scene"])
    if plan.behaviour:
        told = "missing (index 0), pooled to zero as without a history"
        found.append(InputGroup("behaviour ids", [], told, lambda b: _missing(b, plan.behaviour)))
    if plan.user_image:
        found.append(InputGroup("behaviour pictures", [], no_picture, lambda b: _missing(b, [plan.user_image])))
    if reads_behaviours(plan):
        found.append(InputGroup("history", [], "no behaviours", without_behaviours))
    return found


def reads_behaviours(plan: Plan) -> bool:
    """Say whether the model looks at the user's behaviours."""
    return bool(plan.behaviour or plan.user_image)


def without_behaviours(block: Block) -> Block:
    """Return a block of one group without its behaviours."""
    none: dict[str, Column] = {name: np.zeros(0, np.int64) for name in block.behaviour}
    return replace(block, behaviour=none, behaviour_offsets=np.zeros(2, np.int64))


def without_behaviour(block: Block, b: int) -> Block:
    """Return a block of one group without one of its behaviours."""
    left: dict[str, Column] = {name: np.delete(_flat(column), b) for name, column in block.behaviour.items()}
    return replace(block, behaviour=left, behaviour_offsets=block.behaviour_offsets - np.array([0, 1]))


def _unknown(block: Block, names: Sequence[str]) -> Block:
    """Return a block of one sample in which these features of user, ad or scene are unknown."""

    def changed(columns: dict[str, Column]) -> dict[str, Column]:
        return {n: _no_value(c) if n in names else c for n, c in columns.items()}

    return replace(block, group=changed(block.group), sample=changed(block.sample))


def _no_value(column: Column) -> Column:
    if isinstance(column, Ragged):
        return Ragged(np.zeros(0, np.int64), np.zeros_like(column.offsets))
    return np.full_like(column, UNKNOWN)


def _missing(block: Block, names: Sequence[str]) -> Block:
    """Return a block in which these features of behaviours, or pictures, are missing."""

    def changed(columns: dict[str, Column]) -> dict[str, Column]:
        return {n: np.full_like(_flat(c), MISSING) if n in names else c for n, c in columns.items()}

    return replace(block, sample=changed(block.sample), behaviour=changed(block.behaviour))


def _flat(column: Column) -> npt.NDArray[np.int64]:
    assert isinstance(column, np.ndarray)  # of pictures and behaviours, none is multi-hot
    return column


# --- What each behaviour is to the model ------------------------------------------------------------------------------


@torch.inference_mode()
def measures(model: TrainedModel, block: Block) -> list[Measure]:
    """Return what the model makes of each behaviour of a block of one sample, where it weighs or picks them."""
    network, plan = model.network.eval(), model.plan
    train = plan.train
    batch = Collator(plan, model.tables, model.pictures)(block).to(model.device)
    look = look_up(model, batch)
    of_unit = "softmax over the history" if train.din == "din-code" else "not normalised"
    out: list[Measure] = []

    def add(name: str, meaning: str, value_B: torch.Tensor) -> None:
        out.append(Measure(name, meaning, [None if math.isnan(v) else v for v in value_B.double().tolist()]))

    if isinstance(network, DIN):
        add("weight", f"DIN's g of the behaviour's ids and the ad's, {of_unit}", network.weights_P(batch, look))
    if not isinstance(network, DICM):
        return out
    if train.pools_pictures and train.pooling == "attentive":
        meaning = "the attention of Usernet to the behaviour's picture, softmax over the history"
        add("weight", meaning, network.weights_P(batch, look))
    if train.pools_pictures and train.pooling == "din":
        meaning = f"DIN's g of the behaviour's picture and the ad's, {of_unit}"
        add("weight", meaning, network.weights_P(batch, look))
    if train.pools_pictures and train.pooling == "max":
        won_B, width = dimensions_won(network, batch)
        meaning = f"of the {width} numbers that max pooling keeps, those that this picture gives; ties count for each"
        add("dimensions won", meaning, won_B)
    if network.id_unit is not None:
        meaning = f"DIN's g of the behaviour's ids and the ad's, {of_unit}"
        add("id weight", meaning, _id_weights(network, batch, look))
    if train.counts_tiers:
        width = plan.picture_width - train.has_picture
        cosine_P, there_P = similarities_P(batch, plan.ad_image, plan.user_image, width)
        meaning = (
            f"cosine of the behaviour's picture vector and the ad's, which SimTier counts in {train.tiers} tiers; none "
            "where one of the two has no picture: the pair is not counted"
        )
        add("cosine", meaning, torch.where(there_P, cosine_P, torch.nan))
    return out


def dimensions_won(network: DICM, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return ([B] in how many dimensions each behaviour's extracted picture is the largest, how many there are)."""
    _, k_BD = network.pictures(batch)
    assert k_BD is not None
    return (k_BD == k_BD.amax(0)).sum(1), k_BD.shape[1]


def _id_weights(network: DICM, batch: Batch, look: Lookup) -> torch.Tensor:
    assert network.id_unit is not None
    return network.id_unit.weights_P(*compared(network.plan, look), batch.id_pairs())


# --- In words ---------------------------------------------------------------------------------------------------------


class Texts:
    """Indexes of features to their values."""

    def __init__(self, convert: Path, schema: Schema) -> None:
        self.folder, self.schema = convert / "vocab", schema
        self._known: dict[str, pl.DataFrame] = {}

    def of(self, name: str, column: Column, row: int) -> list[Value]:
        """Return what a feature holds in a row of its column: one value, or those of a multi-hot one."""
        vocab = self.schema.features[name].vocab
        if vocab not in self._known:
            self._known[vocab] = vocabulary.read(self.folder, vocab).select("index", "value")
        index = column.slice(row, row + 1).values if isinstance(column, Ragged) else column[row : row + 1]
        asked = pl.DataFrame({"index": index}, schema={"index": pl.UInt32})
        texts = asked.join(self._known[vocab], on="index", how="left", maintain_order="left")
        return [Value(int(i), text) for i, text in texts.iter_rows()]


def in_words(plan: Plan) -> str:
    """Say which model it is."""
    train = plan.train
    if train.model != "dicm":
        return {"lr": "LR", "base": "base (behaviours summed)", "din": f"DIN ({train.din})"}[train.model]
    parts = ["ad picture"] * train.ad_image
    if train.user_ids:
        parts.append("behaviour ids, " + ("weighed by DIN's unit" if train.user_ids == "din" else "summed"))
    if train.pools_pictures:
        pooling = {"attentive": "attentive", "sum": "summed", "max": "max pooling", "din": "weighed by DIN's unit"}
        parts.append(f"behaviour pictures, {pooling[train.pooling]}")
    parts += ["SimTier"] * train.counts_tiers
    return "DICM" + (f" ({'; '.join(parts)})" if parts else " (ids only)")


def notes(plan: Plan, impression: Impression, n_behaviours: int) -> list[str]:
    """Return what has to be said of an explanation, in sentences."""
    out = []
    if (lender := impression.lender) is not None:
        out.append(
            f"User {impression.user} did not see ad {impression.ad} on {impression.day}: this is what the score would "
            f"have been. The ad's features are those of impression {lender.sample_id} (user {lender.user}, "
            f"{lender.day}), the scene is that of the user's first impression of the day."
        )
    if impression.repeats > 1:
        out.append(
            f"The user saw the ad {impression.repeats} times that day; this is number {impression.number} (--number)."
        )
    out.append(
        "Each group of inputs is replaced alone, each behaviour left out alone; what they add to the log-odds is the "
        "difference, and these do not sum up to the whole."
    )
    if not reads_behaviours(plan):
        out.append("This model does not look at behaviours.")
    elif not n_behaviours:
        out.append("The user has no history that day.")
    if plan.train.model == "base" or (plan.train.pools_pictures and plan.train.pooling == "sum"):
        out.append("Behaviours are summed, so none has a weight: what each adds is told instead.")
    if plan.train.shuffle_pictures:
        out.append("The model is a control (shuffle_pictures): each picture has the vector of another.")
    return out


def _images(schema: Schema) -> list[str]:
    return schema.names(("behaviour",), "image")


def _owner(block: Block, schema: Schema, name: str) -> dict[str, Column]:
    return block.group if schema.features[name].of == "user" else block.sample
