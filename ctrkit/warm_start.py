"""Starting from a trained model: partial warm-up (DICM section VI-A), and a whole model with its ids remapped.

The model has to be of strictly earlier days, so that what is validated and tested later has never been learned from.
"""

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ctrkit import digests, modelfile, state_dict, vocabulary
from ctrkit.batches import Schema
from ctrkit.embedding import Table
from ctrkit.errors import UserError
from ctrkit.modelfile import TrainedModel
from ctrkit.models.plan import Plan, make_plan
from ctrkit.recipe import Train

EXTRACTORS = ("adnet", "usernet")
"""Modules of DICM whose parameters partial warm-up takes over."""
PICTURES = ("backbone", "layer", "weights", "preprocessing")
"""Attributes of features.h5 that decide what a picture's vector means."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A trained model on disk, to start from."""

    folder: Path
    settings: dict[str, Any]
    plan: Plan

    @classmethod
    def read(cls, folder: Path) -> "Source":
        """Read what the model says of itself; its tensors stay on disk."""
        settings, train, schema = modelfile.read_settings(folder)
        return cls(folder, settings, make_plan(train, schema, settings["picture_width"]))

    @property
    def train(self) -> Train:
        """Its `[train]` table."""
        return self.plan.train

    @property
    def schema(self) -> Schema:
        """The schema of its groups."""
        return self.plan.schema

    def state(self) -> dict[str, Tensor]:
        """Return its tensors, mapped into memory."""
        return state_dict.read(self.folder / "model.pt")

    def last_day(self) -> datetime.date | None:
        """Return the last day that it has seen, in training or validation; None if it does not say."""
        try:
            days = [span["last"] for span in self.settings.get("days", {}).values()]
            return max(map(datetime.date.fromisoformat, days), default=None)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.folder / 'settings.json'} does not say in dates which days the model has seen ({e}): train it "
                "again"
            ) from None


@dataclass
class Warmed:
    """What was taken over, for the sidecar and the message."""

    how: str
    until: datetime.date
    """The last day that the model had seen."""
    tensors: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Vocabulary → how many ids were taken over, how many start fresh."""
    optimiser: bool = False

    def counts(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        rows = {v: {"taken over": old, "fresh": fresh} for v, (old, fresh) in self.rows.items()}
        return {"how": self.how, "seen until": str(self.until), "tensors": self.tensors, "ids": rows}

    def __str__(self) -> str:
        text = f"{self.tensors} tensors of a model that has seen days up to {self.until}"
        if self.rows:
            old, fresh = (sum(n[i] for n in self.rows.values()) for i in (0, 1))
            text += f"; {old:,} ids taken over, {fresh:,} start fresh"
        return text + (", with the optimiser's state" if self.optimiser else "")


def check_days(source: Source, first: datetime.date) -> datetime.date:
    """Refuse a model that has seen the first day to train on, or a later one; return the last day that it has seen."""
    last = source.last_day()
    if last is None:
        raise UserError(
            f"{source.folder} does not say on which days it was trained, so it cannot be told whether they are earlier "
            f"than {first}, where this training begins: train it again with this version of ctrkit"
        )
    if last >= first:
        days = source.settings["days"]
        how = "was validated on" if days["train"]["last"] != str(last) else "was trained on"
        more = ", or train it with train.validation = false" if how == "was validated on" else ""
        raise UserError(
            f"{source.folder} {how} days up to {last}, and this training begins with {first}. A model to start from "
            f"must be of strictly earlier days: set train.last_day of that model lower, or train.first_day of this one "
            f"higher{more}"
        )
    return last


def warm_start(
    model: TrainedModel,
    source: Source,
    first: datetime.date,
    backbone: dict[str, Any] | None,
    vocabularies: tuple[Path | None, Path | None] = (None, None),
) -> Warmed:
    """Give a fresh model what `[train] warm_start` takes over of a trained one.

    Parameters
    ----------
    model: fresh, on the CPU; changed in place.
    source: the trained one.
    first: the first day that is trained on.
    backbone: attributes of features.h5, where the model looks at pictures.
    vocabularies: folders of vocabularies (`convert/vocab`) of the source and of the model; needed for "full" where the
        two differ.

    Raises UserError where the source has seen `first` or a later day, or does not fit.
    """
    how = model.plan.train.warm_start
    warmed = Warmed(how, check_days(source, first))
    if backbone is not None:
        _check_backbone(source, backbone)
    if how == "extractors":
        _extractors(model, source, warmed)
    else:
        _full(model, source, warmed, vocabularies)
    return warmed


# --- partial ---------------------------------------------------------------------------------------------------------


def _extractors(model: TrainedModel, source: Source, warmed: Warmed) -> None:
    """Take over Adnet and Usernet, and the mean and scale of the pictures that they were trained on."""
    here, there = model.plan.train, source.train
    state = source.state()
    fresh = model.tensors()
    wanted = [name for name in fresh if name.split(".")[0] == "network" and name.split(".")[1] in EXTRACTORS]
    if not wanted:
        raise UserError(
            'train.warm_start = "extractors" takes over the extractors of pictures, and this model has none: it '
            "looks at no pictures (train.model, train.ad_image, train.user_images)"
        )
    both = set(_of_pictures(here)) & set(_of_pictures(there))
    for key in sorted(both - {"pooling", "attention", "tiers"}):
        now, then = (train.model_dump(mode="json")[key] for train in (here, there))
        if now != then:
            raise UserError(
                f"{source.folder} has train.{key} = {_toml(then)}, and this model {_toml(now)}: its extractors cannot "
                "be taken over"
            )
    lacking = sorted({name.split(".")[1] for name in wanted} - {name.split(".")[1] for name in state if "." in name})
    if lacking:
        switch = {"adnet": "ad_image", "usernet": "user_images"}[lacking[0]]
        raise UserError(
            f"{source.folder} has no extractor of {lacking[0].capitalize()} (train.{switch} was off), which this model "
            f"needs: start from a model with it"
        )
    taken = {name: fresh[name] for name in wanted}
    _check_tensors(taken, state, source, {name.rpartition(".")[0].split(".")[1] for name in wanted})
    for name in wanted:
        _copy(fresh[name], state[name])
    _take_pictures(model, state)
    warmed.tensors = len(wanted)


def _of_pictures(train: Train) -> list[str]:
    """Return the keys of [train] that say what DICM makes of pictures: of the parts that it has."""
    if train.model != "dicm":
        return []
    extracts = train.ad_image or train.pools_pictures
    keys = ["shuffle_pictures"] if train.looks_at_pictures else []
    keys += ["extractor", "extractor_activation", "has_picture"] if extracts else []
    keys += ["share_extractors"] if train.ad_image and train.pools_pictures else []
    keys += ["pooling"] if train.pools_pictures else []
    keys += ["attention"] if train.pools_pictures and train.pooling == "attentive" else []
    return keys + (["tiers"] if train.counts_tiers else [])


def _kind(plan: Plan) -> list[str]:
    """Return the keys of [train] that say what a model is, and what its numbers mean: of the parts that it has."""
    train = plan.train
    dicm = train.model == "dicm"
    keys = ["model"]
    keys += ["ad_id"] if any(f.switch == "ad_id" for f in plan.schema.features.values()) else []
    keys += ["ad_image", "user_ids", "user_images", *_of_pictures(train)] if dicm else []
    unit = train.model == "din" or (dicm and "din" in (train.user_ids, train.pools_pictures and train.pooling))
    keys += ["din"] if unit else []
    keys += ["din_activation"] if unit and train.din == "din-code" else []
    return keys + ([] if train.model == "lr" else ["tower", "activation", "batch_norm"])


# --- whole -----------------------------------------------------------------------------------------------------------


def _full(model: TrainedModel, source: Source, warmed: Warmed, vocabularies: tuple[Path | None, Path | None]) -> None:
    """Take over the network, the pictures' mean and scale, and the rows of ids that both vocabularies have."""
    _check_features(model.plan, source)
    if differing := _differing(model.plan, source):
        raise UserError(
            f"{source.folder} is another kind of model{differing}: a full warm start needs the same; "
            'train.warm_start = "extractors" takes over the extractors of pictures alone'
        )
    state = source.state()
    network = {name: t for name, t in model.tensors().items() if name.startswith("network.")}
    _check_tensors({**network, **_tables(source.plan)}, state, source, {"network", "table"})
    for name, tensor in network.items():
        _copy(tensor, state[name])
    _take_pictures(model, state)
    warmed.tensors = len(network)
    for width, rows in table_rows(model.plan, source, vocabularies).items():
        table = model.tables[width]
        old_R, new_R = rows.pairs(table)
        table.put("weight_VD", new_R, state[f"table.{width}"][old_R])
        warmed.rows |= rows.counts
    if model.plan.train.warm_optimiser:
        warmed.optimiser = True


@dataclass
class TableRows:
    """Which rows of an old table go where in a new one."""

    old: list[Ints]
    new: list[Ints]
    counts: dict[str, list[int]]

    def pairs(self, table: Table) -> tuple[Tensor, Tensor]:
        """Return ([R] rows of the old table, [R] rows of the new one): those that lie here."""
        old, new = (torch.from_numpy(np.concatenate(some)) for some in (self.old, self.new))
        here = table.is_here(new)
        return old[here], new[here]


def table_rows(plan: Plan, source: Source, vocabularies: tuple[Path | None, Path | None]) -> dict[int, TableRows]:
    """Return width → which rows of the source's table go where: ids by their values, and the unknown one."""
    same = source.schema.vocab_digest == plan.schema.vocab_digest
    if not same:
        _check_vocabularies(plan, source, vocabularies)
    old_folder, new_folder = vocabularies
    out: dict[int, TableRows] = {}
    for width, vocabs in plan.vocabularies().items():
        rows = out[width] = TableRows([], [], {})
        old_begin = _begins(source.plan, width)
        new_begin = _begins(plan, width)
        for vocab in vocabs:
            if same:
                index = np.arange(vocabulary.FIRST, plan.schema.vocab_sizes[vocab])
                old, new = index, index
            else:
                assert old_folder is not None
                assert new_folder is not None
                old, new = shared_ids(vocabulary.read(old_folder, vocab), vocabulary.read(new_folder, vocab))
            unknown = np.array([vocabulary.UNKNOWN])
            rows.old.append(np.concatenate([unknown, old]) + old_begin[vocab])
            rows.new.append(np.concatenate([unknown, new]) + new_begin[vocab])
            rows.counts[vocab] = [len(new), plan.schema.vocab_sizes[vocab] - vocabulary.FIRST - len(new)]
    return out


def shared_ids(old: pl.DataFrame, new: pl.DataFrame) -> tuple[Ints, Ints]:
    """Return ([n] old index, [n] new index) of the values that two vocabularies (`value`, `index`) share."""
    both = new.select("value", new="index").join(old.select("value", old="index"), on="value", maintain_order="left")
    return both["old"].cast(pl.Int64).to_numpy(), both["new"].cast(pl.Int64).to_numpy()


def _begins(plan: Plan, width: int) -> dict[str, int]:
    """Return vocabulary → its offset in the table of a width, as `ctrkit.embedding.Table` lays it out."""
    sizes = [plan.schema.vocab_sizes[v] for v in plan.vocabularies()[width]]
    return dict(zip(plan.vocabularies()[width], np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))


def _check_features(plan: Plan, source: Source) -> None:
    """Refuse a source whose features are others, in another order, or of other vocabularies."""
    here, there = plan.schema.features, source.schema.features
    if plan.features != source.plan.features:
        raise UserError(
            f"{source.folder} reads the features {', '.join(source.plan.features)}, and this model "
            f"{', '.join(plan.features)}: a full warm start needs the same, in the same order{_differing(plan, source)}"
        )
    for name in plan.features:
        for key in ("of", "kind", "vocab", "multi_hot", "hash_buckets", "width"):
            a, b = getattr(there[name], key), getattr(here[name], key)
            if a != b:
                raise UserError(
                    f"{source.folder} has features.{name}.{key} = {_toml(a)}, and this model {_toml(b)}: a full warm "
                    "start needs the same"
                )


def _check_vocabularies(plan: Plan, source: Source, vocabularies: tuple[Path | None, Path | None]) -> None:
    """Require the two vocabularies, and that they are those of the two models."""
    for folder, option, digest, whose in (
        (vocabularies[0], "--warm-convert", source.schema.vocab_digest, f"{source.folder} was trained"),
        (vocabularies[1], "--convert", plan.schema.vocab_digest, "the groups were made"),
    ):
        if folder is None:
            raise UserError(
                f"{source.folder} has another vocabulary than these groups, so its ids are found by their values: give "
                f"{option}, the folder of `ctrkit convert` with which {whose}"
            )
        if not folder.is_dir():
            fault = "has no vocab/" if folder.parent.exists() else "is not there"
            raise UserError(
                f"{folder.parent} ({option}) {fault}; give the folder of `ctrkit convert` with which {whose}"
            )
        if digests.Digests().of(folder) != digest:
            raise UserError(f"{folder} ({option}) is not the vocabulary with which {whose}: its content is another")


# --- the optimiser ---------------------------------------------------------------------------------------------------


def optimiser_state(
    model: TrainedModel, adam: torch.optim.Adam, source: Source, vocabularies: tuple[Path | None, Path | None]
) -> None:
    """Take over the state of Adam on the dense layers, and of row-wise Adam on the rows that were taken over.

    Rows that start fresh have no moments; the bias correction goes on counting all steps. The learning rate's decay
    begins anew.
    """
    path = source.folder / "optimiser.pt"
    if not path.is_file():
        raise UserError(
            f"{source.folder} has no optimiser.pt, which train.warm_optimiser needs: train it with "
            "train.save_optimiser = true, or leave train.warm_optimiser out"
        )
    state = state_dict.read(path)
    _check_moments(path, state, model, source)
    for name, parameter in model.network.named_parameters():
        saved = {key: state[f"adam.{name}.{key}"] for key in MOMENTS if f"adam.{name}.{key}" in state}
        adam.state[parameter] = {key: t.clone().to(parameter.device) for key, t in saved.items()}
    for width, rows in table_rows(model.plan, source, vocabularies).items():
        table: Table = model.tables[width]
        old_R, new_R = rows.pairs(table)
        for key in ("m", "v"):
            table.put(f"{key}_VD", new_R, state[f"table.{width}.{key}"][old_R])
        table.step = int(state[f"table.{width}.step"])


def _check_moments(path: Path, state: dict[str, Tensor], model: TrainedModel, source: Source) -> None:
    """Require the moments of all parameters and tables, of their shapes and finite."""
    shapes: dict[str, torch.Size] = {}
    for name, p in model.network.named_parameters():
        if any(f"adam.{name}.{key}" in state for key in MOMENTS):  # one without a gradient has none
            shapes |= {f"adam.{name}.step": torch.Size()} | {f"adam.{name}.{key}": p.shape for key in MOMENTS[1:]}
    for name, table in _tables(source.plan).items():
        shapes |= {f"{name}.step": torch.Size(), f"{name}.m": table.shape, f"{name}.v": table.shape}
    for name in sorted(shapes.keys() | state.keys()):
        there = state.get(name)
        if there is None or name not in shapes or there.shape != shapes[name]:
            fault = f"{name!r} is missing" if there is None else f"{name!r} is of shape {list(there.shape)}"
            more = f", not {list(shapes[name])}" if there is not None and name in shapes else ""
            raise UserError(
                f"{path} does not fit {source.folder / 'model.pt'}: {fault}{more}. Train that model again with "
                "train.save_optimiser = true, or leave train.warm_optimiser out"
            )
        if not state_dict.is_finite(there):
            raise UserError(f"{path} has numbers in {name!r} that are not finite; leave train.warm_optimiser out")


# --- what both need --------------------------------------------------------------------------------------------------


def _check_backbone(source: Source, now: dict[str, Any]) -> None:
    """Refuse a model that knows pictures by other vectors."""
    then = source.settings.get("pictures") or {}
    for key in PICTURES:
        if then and then.get(key) != now.get(key):
            raise UserError(
                f"{source.folder} was trained on picture vectors with {key} = {then.get(key)}, and these have {key} = "
                f"{now.get(key)}: its extractors would see other numbers. Train it on the same features."
            )


def _check_tensors(wanted: dict[str, Tensor], state: dict[str, Tensor], source: Source, parts: set[str]) -> None:
    """Require these tensors, of these shapes and finite, and no others of the same parts of a model (of the network, by
    the name after "network.")."""
    path = source.folder / "model.pt"
    more = {n: t for n, t in state.items() if parts & set(n.split(".")[:2])}
    for name in sorted(wanted.keys() | more.keys()):
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape:
            there, here = (f"of shape {list(t[name].shape)}" if name in t else "missing" for t in (state, wanted))
            raise UserError(
                f"{path} does not fit this model: {name!r} is {there} there, and {here} here. It is of other features "
                "or picture vectors, or damaged: start from a model that was trained as this one is"
            )
    pictures = {name: t for name, t in state.items() if name.startswith("pictures.")}
    for name, tensor in {**{name: state[name] for name in wanted}, **pictures}.items():
        if tensor.is_floating_point() and not state_dict.is_finite(tensor):
            raise UserError(
                f"{path} has numbers in {name!r} that are not finite, so nothing can start from it: train it again, "
                "with a lower learning rate"
            )


def _tables(plan: Plan) -> dict[str, Tensor]:
    """Return empty tensors of the names and shapes that the tables of a model have."""
    rows = {w: sum(plan.schema.vocab_sizes[v] for v in vocabs) + 1 for w, vocabs in plan.vocabularies().items()}
    return {f"table.{width}": torch.empty(n, width, device="meta") for width, n in rows.items()}


def _differing(plan: Plan, source: Source) -> str:
    """Name the keys of [train] that say what either model is and differ; "" if none does."""
    here, there = plan.train.model_dump(mode="json"), source.train.model_dump(mode="json")
    kind = dict.fromkeys([*_kind(source.plan), *_kind(plan)])
    keys = [k for k in kind if here.get(k) != there.get(k)]
    told = [f"train.{k} = {_toml(there[k])} there and {_toml(here[k])} here" for k in keys]
    return f" ({'; '.join(told)})" if told else ""


def _take_pictures(model: TrainedModel, state: dict[str, Tensor]) -> None:
    if model.pictures is not None:
        dtype = model.pictures.scale.dtype
        model.pictures.mean_W = state["pictures.mean"].clone().to(dtype)
        model.pictures.scale = state["pictures.scale"].clone().to(dtype)


def _copy(to: Tensor, of: Tensor) -> None:
    with torch.no_grad():
        to.copy_(of)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
