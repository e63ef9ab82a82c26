"""Write a trained model as programs that run without ctrkit's training code: ONNX, or torch.export's.

Letters as in `ctrkit.serving_network`.
"""

import contextlib
import io
import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrkit import digests, explanation, files, modelfile, provenance, vocabulary
from ctrkit.errors import UserError
from ctrkit.models.batch import Batch, Lookup
from ctrkit.models.plan import Plan
from ctrkit.picture_vectors import CONTROL_SEED, NORM
from ctrkit.programs import Programs, as_inputs, digest_of, lists_side_by_side, require
from ctrkit.serving_network import Ads, Network, Pictures, User

AXES = {
    "behaviour_ids": "behaviours",
    "behaviour_pictures": "behaviours",
    "behaviour_vectors": "behaviours",
    "attention_keys": "behaviours",
    "picture_keys": "behaviours",
    "id_keys": "behaviours",
    "id_compared": "behaviours",
    "id_values": "behaviours",
    "norms": "behaviours",
    "there": "behaviours",
    "ad_ids": "ads",
    "ad_pictures": "ads",
    "ad_vectors": "ads",
}
"""Input → what its first axis counts, where that is not fixed."""
TOLERANCE = 1e-5
"""How far a score may be from the trained network's."""
QUIET = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export(model: Path, convert: Path, out: Path, format: str, max_behaviours: int) -> dict[str, Any]:
    """Write the export folder of a trained model; return how it was checked.

    Parameters
    ----------
    model: what `ctrkit train` wrote.
    convert: what `ctrkit convert` wrote, whose vocabularies the model was trained with.
    out: a folder that is not there yet.
    format: "onnx" or "pt2".
    max_behaviours: how many behaviours of a request count, the newest.

    The programs are compared with the trained network on random inputs; UserError where they differ.
    """
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "--format onnx needs it")
    plan, network, state = modelfile.read_network(model)
    trained = files.read_json(model / "settings.json")
    vocabulary.require(convert, "--convert", plan.schema.vocab_digest, f"{model} was trained with")
    out.mkdir(parents=True)
    parts = serving_parts(plan, network, state)
    programs = {}
    with torch.no_grad(), _quietly():
        given = _examples(plan, parts)
        for name, module in parts.items():
            file = f"{name}.{format}"
            _write(module, [given[f"{name}/{n}"] for n in module.inputs], name, out / file, format)
            programs[name] = {"file": file, "inputs": list(module.inputs), "outputs": list(module.outputs)}
    _copy_vocabularies(plan, convert, out / "vocab")
    there = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    known = digests.Digests()
    settings = {
        "format": format,
        "model": explanation.in_words(plan),
        "train": trained["train"],
        "schema": plan.schema.to_json(),
        "days": trained.get("days"),
        "negative_rate": plan.schema.negative_rate,
        "max_behaviours": max_behaviours,
        "pictures": trained.get("pictures"),
        "picture_width": plan.picture_width - plan.train.has_picture,
        "shuffle_seed": CONTROL_SEED if plan.train.shuffle_pictures else None,
        "reads": reads(plan),
        "programs": programs,
        "files": {name: known.of(out / name) for name in there},
        "versions": provenance.versions(),
    }
    files.write_json(out / "settings.json", {**settings, "digest": digest_of(settings)})
    difference = check(plan, network, state, Programs(out))
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported programs of {model} do not score as the trained network does: by {difference:.1e} on random "
            f"inputs, more than {TOLERANCE:.0e}. Nothing was written; the other --format may do."
        )
    return {"largest difference": difference, "programs": list(programs)}


def serving_parts(plan: Plan, network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the programs of a model as modules, by name, in the order in which they run."""
    whole = Network(plan, network, state)
    user = User(whole).eval()
    parts: dict[str, Any] = {}
    if plan.ad_image:
        parts["ad_pictures"] = Pictures(plan, state, whole.adnet).eval()
    if plan.user_image:
        parts["user_pictures"] = Pictures(plan, state, whole.usernet).eval()
    if user.outputs:
        parts["user"] = user
    parts["ads"] = Ads(whole, user.outputs).eval()
    return parts


def reads(plan: Plan) -> dict[str, Any]:
    """Return which features each input holds, in its order."""
    features = plan.schema.features

    def one(names: Sequence[str]) -> list[str]:
        return [n for n in names if not features[n].multi_hot]

    def many(names: Sequence[str]) -> list[str]:
        return [n for n in names if features[n].multi_hot]

    return {
        "user_ids": one(plan.user),
        "user": many(plan.user),
        "behaviour_ids": plan.behaviour,
        "ad_ids": one(plan.sample),
        "ad": many(plan.sample),
        "ad_pictures": plan.ad_image,
        "user_pictures": plan.user_image,
    }


def _examples(plan: Plan, parts: Mapping[str, Any], ads: int = 4, behaviours: int = 3) -> dict[str, Tensor]:
    """Return PROGRAM/INPUT → a tensor of the right kind, to trace the programs with."""
    n = reads(plan)
    raw_width = plan.picture_width - plan.train.has_picture
    d = plan.train.extractor[-1]
    ones: dict[str, Tensor] = {
        "vectors": torch.zeros(behaviours, raw_width),
        "user_ids": torch.ones(len(n["user_ids"]), dtype=torch.int64),
        "behaviour_ids": torch.ones(behaviours, len(n["behaviour_ids"]), dtype=torch.int64),
        "behaviour_pictures": torch.zeros(behaviours, d),
        "behaviour_vectors": torch.zeros(behaviours, raw_width),
        "there": torch.tensor([True] * (behaviours - 1) + [False]),
        "ad_ids": torch.ones(ads, len(n["ad_ids"]), dtype=torch.int64),
        "ad_pictures": torch.zeros(ads, d),
        "ad_vectors": torch.zeros(ads, raw_width),
    }
    # Lengths that differ, so that no axis is taken for another.
    ones |= {f"user.{name}": torch.ones(5 + i, dtype=torch.int64) for i, name in enumerate(n["user"])}
    ones |= {f"ad.{name}": torch.ones(ads, 5 + i, dtype=torch.int64) for i, name in enumerate(n["ad"])}
    out: dict[str, Tensor] = {}
    for program, module in parts.items():
        out |= {f"{program}/{name}": ones[name] for name in module.inputs}
        if program == "user":
            ones |= dict(zip(module.outputs, module(*(ones[name] for name in module.inputs)), strict=True))
    return out


def _axes(name: str, program: str, dims: dict[str, Any]) -> dict[int, Any] | None:
    """Return the axes of an input that may have any length from 2 on."""
    if program.endswith("pictures"):
        return {0: dims.setdefault("pictures", torch.export.Dim("pictures", min=2))}
    out: dict[int, Any] = {}
    if name in AXES or name.startswith("ad."):
        axis = AXES.get(name, "ads")
        out[0] = dims.setdefault(axis, torch.export.Dim(axis, min=2))
    if name.startswith(("user.", "ad.")):
        axis = f"values_{len(dims)}"
        out[len(out)] = dims.setdefault(axis, torch.export.Dim(axis, min=2))
    return out or None


def _write(module: Any, given: Sequence[Tensor], name: str, path: Path, format: str) -> None:
    """Trace a module and write it. Neither format holds anything of this machine."""
    dims: dict[str, Any] = {}
    axes = tuple(_axes(n, name, dims) for n in module.inputs)
    traced = torch.export.export(module, tuple(given), dynamic_shapes=(axes,))
    for node in traced.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    if format == "pt2":
        torch.export.save(traced, path)
        return
    program = torch.onnx.export(
        traced, input_names=list(module.inputs), output_names=list(module.outputs), dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props.clear()
    for node in program.model.graph:
        node.metadata_props.clear()
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        value.metadata_props.clear()
    program.save(path, external_data=_bytes(module) > EXTERNAL)


EXTERNAL = 64 << 20
"""Bytes of tables and weights from which on they lie in a file beside the ONNX program, which may have 2 GiB."""


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's notes on its own work from the user."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _copy_vocabularies(plan: Plan, convert: Path, out: Path) -> None:
    """Copy the vocabularies that the model's ids are looked up in."""
    out.mkdir()
    for name in plan.ids:
        feature = plan.schema.features[name]
        path = out / f"{feature.vocab}.parquet"
        if not feature.hash_buckets and not path.exists():
            shutil.copyfile(convert / "vocab" / path.name, path)


USERS = ((0, 1), (1, 2), (2, 1), (3, 3), (7, 9), (40, 4))
"""Behaviours and ads of the users that programs are checked on."""


def check(
    plan: Plan,
    network: nn.Module,
    state: Mapping[str, Tensor],
    programs: Programs,
    users: Sequence[tuple[int, int]] = USERS,
) -> float:
    """Return the largest difference between the scores of the trained network and of the programs, on random users
    with so many behaviours and ads; infinite where one is no number."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for behaviours, ads in users:
        one = _Random(plan, state, rng, behaviours, ads)
        with torch.inference_mode():
            expected_A = one.trained(network, state)
        found_A = one.exported(programs)
        worst = max(worst, float(np.abs(found_A - expected_A).max()))
        if not np.isfinite(found_A).all():
            return float("inf")
    return worst


class _Random:
    """A user with random features, history and ads, as indexes and picture vectors."""

    def __init__(
        self, plan: Plan, state: Mapping[str, Tensor], rng: np.random.Generator, behaviours: int, ads: int
    ) -> None:
        self.plan, self.behaviours, self.ads = plan, behaviours, ads
        owners = {name: self._rows(name) for name in plan.ids}
        self.index: dict[str, npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]] = {}
        for name, n in owners.items():
            size = plan.schema.vocab_sizes[plan.schema.features[name].vocab]
            if plan.schema.features[name].multi_hot:
                self.index[name] = [rng.integers(1, size, rng.integers(4)) for _ in range(n)]
            else:
                self.index[name] = rng.integers(0, size, n)
        width = plan.picture_width - plan.train.has_picture
        self.vectors: dict[str, npt.NDArray[np.float32]] = {}
        """[n, W] as features.h5 has them, about as far from the mean as pictures are."""
        for name, n in self._images():
            scale = float(state["pictures.scale"]) * math.sqrt(width) / NORM
            x = rng.normal(size=(n, width)) / scale + state["pictures.mean"].double().numpy()
            self.vectors[name] = x.astype(np.float32)
        self.there = {name: rng.random(n) < 0.8 for name, n in self._images()}

    def _rows(self, name: str) -> int:
        return {"user": 1, "behaviour": self.behaviours}.get(self.plan.schema.features[name].of, self.ads)

    def _images(self) -> list[tuple[str, int]]:
        pairs = ((self.plan.ad_image, self.ads), (self.plan.user_image, self.behaviours))
        return [(name, n) for name, n in pairs if name]

    def trained(self, network: nn.Module, state: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        """Return [A], what the trained network makes of them."""
        plan, n, b = self.plan, self.ads, self.behaviours
        group_S, group_B = torch.zeros(n, dtype=torch.int64), torch.zeros(b, dtype=torch.int64)
        sample_P = torch.arange(n).repeat_interleave(b)
        dtype = state[f"table.{min(plan.vocabularies())}"].dtype
        batch = Batch(torch.zeros(n, dtype=dtype), group_S, group_B, sample_P, torch.arange(b).repeat(n), 1, {}, {}, {})
        for width, vocabs in plan.vocabularies().items():
            offset = 0
            for vocab in vocabs:
                for name in (m for m in plan.ids if plan.schema.features[m].vocab == vocab and plan.width(m) == width):
                    self._look_up(batch, name, state.get(f"frequent.{vocab}"), offset)
                offset += plan.schema.vocab_sizes[vocab]
        for name, there in self.there.items():
            x = (torch.from_numpy(self.vectors[name]).to(dtype) - state["pictures.mean"]) * state["pictures.scale"]
            x = torch.where(torch.from_numpy(there).unsqueeze(1), x, 0.0)
            if plan.train.has_picture:
                x = torch.cat([x, torch.from_numpy(there).to(dtype).unsqueeze(1)], 1)
            batch.picture_NW[name], batch.picture_index[name] = x, torch.arange(len(there))
        rows = {width: state[f"table.{width}"] for width in plan.vocabularies()}
        logit_S = network(batch, Lookup(batch, rows, {m: plan.width(m) for m in plan.ids}))
        return torch.sigmoid(logit_S.double() + math.log(plan.schema.negative_rate)).numpy()

    def _look_up(self, batch: Batch, name: str, kept: Tensor | None, offset: int) -> None:
        index = self.index[name]
        if isinstance(index, list):
            owner = np.repeat(np.arange(len(index)), [len(values) for values in index])
            batch.segment[name] = torch.from_numpy(owner)
            index = np.concatenate([*index, np.zeros(0, np.int64)])
        if kept is not None:
            index = np.where(kept.numpy()[index], index, 1)
        batch.index[name] = torch.from_numpy(np.where(index == 0, 0, index + offset))

    def exported(self, programs: Programs) -> npt.NDArray[np.float32]:
        """Return [A], what the programs make of them."""
        names = reads(self.plan)
        given: dict[str, npt.NDArray[Any]] = {}
        for key in ("user_ids", "behaviour_ids", "ad_ids"):
            if names[key]:
                columns = np.stack([np.asarray(self.index[name]) for name in names[key]], 1)
                given[key] = columns[0] if key == "user_ids" else columns
        for owner in ("user", "ad"):
            for name in names[owner]:
                lists = lists_side_by_side([list(values) for values in self.index[name]])
                given[f"{owner}.{name}"] = lists[0] if owner == "user" else lists
        for program in ("ad_pictures", "user_pictures"):
            if name := names[program]:
                found = programs.pictures(program, self.vectors[name], self.there[name])
                given |= as_inputs(found, program)
        state = programs.user({k: x for k, x in given.items() if not k.startswith("ad")}, self.behaviours)
        ads = {k: x for k, x in given.items() if k.startswith("ad")}
        return programs.score(state, ads, self.ads, self.behaviours)[0]
