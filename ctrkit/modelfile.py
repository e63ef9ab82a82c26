"""A trained model on disk: `settings.json` and `model.pt`, tensors only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import nn

from ctrkit import files, state_dict, vocabulary
from ctrkit.batches import Schema
from ctrkit.embedding import Table
from ctrkit.errors import UserError
from ctrkit.feature_cache import GIB
from ctrkit.features import check_made_alike
from ctrkit.id_masks import most_frequent, with_unknown
from ctrkit.models import make_model
from ctrkit.models.plan import Plan, make_plan
from ctrkit.picture_vectors import PictureVectors
from ctrkit.placement import is_spread
from ctrkit.ranks import ALONE, Ranks
from ctrkit.recipe import CACHES, NOT_THE_MODEL, RANKS, Train

if TYPE_CHECKING:
    from ctrkit.feature_service import FeatureService

Counts = dict[str, npt.NDArray[np.int64]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""[train] precision → the dtype of parameters, tables and picture vectors."""


@dataclass
class TrainedModel:
    """A network with its tables and its pictures."""

    plan: Plan
    network: nn.Module
    tables: dict[int, Table]
    pictures: PictureVectors | None
    device: str = "cpu"
    service: "FeatureService | None" = None
    """Where several ranks work on one model."""

    def to(self, device: str) -> "TrainedModel":
        """Move network and tables to a device, where picture vectors are wanted from now on."""
        self.network.to(device)
        for table in self.tables.values():
            table.to(device)
        if self.pictures is not None:
            self.pictures.wanted(device=device)
        self.device = device
        return self

    def tensors(self, *, spread: bool = True) -> dict[str, torch.Tensor]:
        """Return every tensor that predicting needs, by name.

        Of a table that is spread over ranks rank 0 gets all rows, and the others none: all have to call it.

        spread: whether tables that are spread are among them.
        """
        out = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        out |= {f"table.{w}": self._whole(w, "weight_VD") for w, t in self.tables.items() if spread or not t.sharded}
        for table in self.tables.values():
            out |= {f"frequent.{vocab}": torch.from_numpy(known_V) for vocab, known_V in table.frequent.items()}
        if self.pictures is not None:
            out |= {"pictures.mean": self.pictures.mean_W, "pictures.scale": self.pictures.scale}
        return out

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of `tensors`, on the CPU."""
        return {k: v.detach().clone().cpu() for k, v in self.tensors().items()}

    def moments(self, *, spread: bool = True) -> dict[str, torch.Tensor]:
        """Return the state of the tables' Adam, by name: `table.WIDTH.m` and `.v` [rows, width], `.step` []. All ranks
        have to call it, as `tensors`. spread: whether `.m` and `.v` of tables that are spread are among them."""
        out: dict[str, torch.Tensor] = {}
        for width, table in self.tables.items():
            if spread or not table.sharded:
                out |= {f"table.{width}.{kind}": self._whole(width, f"{kind}_VD") for kind in ("m", "v")}
            out[f"table.{width}.step"] = torch.tensor(table.step)
        return out

    def matrices(self) -> dict[str, tuple[Table, str]]:
        """Return the names of the tables' weights and moments → the table, and which of its matrices."""
        named = {"": "weight_VD", ".m": "m_VD", ".v": "v_VD"}
        return {f"table.{w}{end}": (table, matrix) for w, table in self.tables.items() for end, matrix in named.items()}

    def _whole(self, width: int, name: str) -> torch.Tensor:
        matrix: torch.Tensor = getattr(self.tables[width], name)
        return matrix if self.service is None else self.service.whole(width, name)

    def load_moments(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `moments` returned."""
        for width, table in self.tables.items():
            for kind in ("m", "v"):
                if (name := f"table.{width}.{kind}") in state:
                    table.take_over(f"{kind}_VD", state[name])
            table.step = int(state[f"table.{width}.step"])

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the tensors that `tensors` returned."""
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        for width, table in self.tables.items():
            if (name := f"table.{width}") in state:
                table.take_over("weight_VD", state[name])
            table.frequent = {vocab: state[f"frequent.{vocab}"].clone().numpy() for vocab in table.frequent}
        if self.pictures is not None:
            dtype = self.pictures.mean_W.dtype
            self.pictures.mean_W = state["pictures.mean"].to(dtype, copy=True)
            self.pictures.scale = state["pictures.scale"].to(dtype, copy=True)


def read_counts(groups: Path, schema: Schema) -> Counts:
    """Return vocabulary → [size] n_i, the training samples that contain each index."""
    counts = {}
    for name, size in schema.vocab_sizes.items():
        path = groups / "counts" / f"{name}.parquet"
        out = np.zeros(size, np.int64)
        if path.is_file():
            frame = pl.read_parquet(path)
            out[frame["index"].to_numpy()] = frame["count"].to_numpy()
        counts[name] = out
    return counts


def build(
    train: Train,
    schema: Schema,
    counts: Counts,
    pictures: PictureVectors | None,
    dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
) -> TrainedModel:
    """Return a model with fresh parameters, drawn from `[train] seed`.

    dtype: of network, tables and pictures; default: that of `[train] precision`. All start from the same numbers, drawn
    in float32.
    ranks: over which large tables are spread (`[train] placement`); of these this rank's rows are there.
    """
    dtype = dtype or DTYPES[train.precision]
    plan = make_plan(train, schema, pictures.width if pictures else 0)
    torch.manual_seed(train.seed)
    network = make_model(plan)
    if dtype != torch.float32:
        network.to(dtype)
    if pictures is not None:
        pictures.to(dtype)
    generator = torch.Generator().manual_seed(train.seed)
    expected = {name: with_unknown(n_V, train.unknown_rate) for name, n_V in counts.items()}
    filtered = {schema.features[n].vocab for n in schema.names(("behaviour",)) if train.regularisation == "filter"}
    frequent = {
        name: most_frequent(n_V, train.filter_top)
        for name, n_V in counts.items()
        if name in filtered and len(n_V) - 2 > train.filter_top
    }
    tables = {
        width: Table(
            {v: schema.vocab_sizes[v] for v in vocabs},
            width,
            expected,
            generator,
            dtype=dtype,
            frequent={v: frequent[v] for v in vocabs if v in frequent},
            share=(ranks.rank, ranks.count) if is_spread(plan, width, ranks.count) else (0, 1),
        )
        for width, vocabs in plan.vocabularies().items()
    }
    if train.model == "lr":
        tables[1].weight_VD.zero_()
    return TrainedModel(plan, network, tables, pictures)


def open_pictures(
    train: Train, features: Path | None, convert: Path | None, ranks: Ranks = ALONE
) -> PictureVectors | None:
    """Return the picture vectors that the model needs, or None. The ranks of a machine share the host's memory."""
    if not train.looks_at_pictures:
        return None
    if features is None or convert is None:
        raise UserError("this model looks at pictures: give --features (made by `ctrkit extract-images`) and --convert")
    return PictureVectors(
        features,
        convert,
        shuffle=train.shuffle_pictures,
        has_picture=train.has_picture,
        host_bytes=int(train.host_cache_gib * GIB) // ranks.local_count,
        device_bytes=int(train.device_cache_gib * GIB),
    )


def save(model: TrainedModel, folder: Path, extra: dict[str, object]) -> None:
    """Write `settings.json` and `model.pt` into a folder. Raises OSError where there is no room."""
    train = model.plan.train
    later = set() if train.has_picture else {"has_picture"}  # left out where off, as before there was the switch
    settings = {
        "train": train.model_dump(mode="json", exclude=later | {"checkpoint_minutes"} | RANKS),
        "schema": model.plan.schema.to_json(),
        **extra,
    }
    settings["picture_width"] = model.plan.picture_width
    files.write_json(folder / "settings.json", settings)
    state_dict.write(folder / "model.pt", state_dict.plain(model.tensors()))


def save_optimiser(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `optimiser.pt` into a model folder: `adam.PARAMETER.exp_avg`, `.exp_avg_sq` and `.step` of the network's
    parameters, `table.WIDTH.m`, `.v` and `.step` of the ID tables."""
    state_dict.write(folder / "optimiser.pt", state_dict.plain(state))


def check_recipe(folder: Path, recipe: Train) -> None:
    """Refuse a model that was trained with another `[train]` table than the recipe's, another variant's say."""
    path = folder / "settings.json"
    if not path.is_file():
        return  # `load` says what is wrong with the folder
    _, trained, _ = read_settings(folder)
    was, now = (t.model_dump(mode="json", exclude=set(NOT_THE_MODEL)) for t in (trained, recipe))
    differ = [
        f"train.{key} = {json.dumps(was[key])}, not {json.dumps(now[key])}" for key in was if was[key] != now[key]
    ]
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise UserError(
            f"{folder} was not trained as the recipe says: with {'; '.join(differ[:3])}{more}. Give the --variant and "
            "the --set options that it was trained with, or the model of this variant."
        )


def load(
    folder: Path,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    ranks: Ranks = ALONE,
    recipe: Train | None = None,
) -> TrainedModel:
    """Read a model for use with these groups; a model trained with another vocabulary is an error.

    recipe: whose sizes of caches count; default: those of `[train]`.
    """
    settings, train, schema = read_settings(folder)
    train = train.model_copy(update=recipe.model_dump(include=set(CACHES)) if recipe else {})
    here = Schema.read(groups)
    if schema.vocab_digest != here.vocab_digest:
        raise UserError(
            f"{folder} was trained with another vocabulary than {groups} was made with (digests "
            f"{schema.vocab_digest[:8]} and {here.vocab_digest[:8]}): its ids would mean other things. Train it again "
            "on these groups, or make the groups with the vocabulary it was trained with."
        )
    vocabulary.require_of_groups(convert, here.vocab_digest, groups)
    pictures = open_pictures(train, features, convert, ranks)
    if pictures is not None:
        width = settings["picture_width"] - pictures.has_picture
        check_made_alike(pictures.store, settings["pictures"], width, folder)
    nothing = {v: np.zeros(n, np.int64) for v, n in schema.vocab_sizes.items()}
    model = build(train, schema, nothing, pictures, ranks=ranks)
    state, expected = _read_tensors(folder / "model.pt"), model.tensors()
    # Of a table that is spread over ranks only a share is here.
    expected |= {f"table.{w}": torch.empty(t.n_rows, w, device="meta") for w, t in model.tables.items() if t.sharded}
    _check_shapes(folder, state, expected)
    model.load_state(state)
    return model


def read_network(folder: Path) -> tuple[Plan, nn.Module, dict[str, torch.Tensor]]:
    """Return a model's inputs, its network in evaluation, and all its tensors by name: without groups or pictures."""
    settings, train, schema = read_settings(folder)
    plan = make_plan(train, schema, int(settings["picture_width"]))
    network = make_model(plan).to(DTYPES[train.precision]).eval()
    state = _read_tensors(folder / "model.pt")
    expected = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for width, vocabs in plan.vocabularies().items():
        expected[f"table.{width}"] = torch.empty(1 + sum(schema.vocab_sizes[v] for v in vocabs), width, device="meta")
    if train.looks_at_pictures:
        raw_width = plan.picture_width - train.has_picture
        expected |= {"pictures.mean": torch.empty(raw_width, device="meta"), "pictures.scale": torch.empty(())}
    for name in state.keys() - expected.keys():
        if name.startswith("frequent.") and (vocab := name.removeprefix("frequent.")) in schema.vocab_sizes:
            expected[name] = torch.empty(schema.vocab_sizes[vocab], device="meta")
    _check_shapes(folder, state, expected)
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    return plan, network, state


def _check_shapes(folder: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that are not those that the settings ask for."""
    wrong = sorted(k for k in expected.keys() | state.keys() if _shape(state, k) != _shape(expected, k))
    if wrong:
        raise UserError(
            f"{folder / 'model.pt'} does not fit {folder / 'settings.json'}: {wrong[0]!r} is "
            f"{_shape(state, wrong[0])}, not {_shape(expected, wrong[0])}. Train the model again."
        )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return state_dict.read(path)
    except UserError:
        fault = "is damaged: it is not what ctrkit train wrote" if path.is_file() else "is not there"
        raise UserError(f"{path} {fault}. Train the model again.") from None


def read_settings(folder: Path) -> tuple[dict[str, Any], Train, Schema]:
    """Return all settings of a model folder, and of them the `[train]` table and the schema that `save` wrote."""
    path = folder / "settings.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no settings.json. Make one with `ctrkit train`.")
    settings = files.read_json(path)
    try:
        int(settings["picture_width"])
        return settings, Train(**settings["train"]), Schema.from_json(settings["schema"])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as e:
        raise UserError(
            f"{path} is not the settings of a model of this version of ctrkit ({str(e).splitlines()[0]}). Train the "
            "model again."
        ) from None


def _shape(tensors: dict[str, torch.Tensor], name: str) -> str:
    return f"of shape {list(tensors[name].shape)}" if name in tensors else "missing"
