"""The programs of an exported model, loaded from its folder and run on arrays. Needs no torch where they are ONNX.

Letters as in `ctrkit.serving_network`.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit import digests, files
from ctrkit.errors import UserError

Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
FORMATS = ("onnx", "pt2")
KEYS = {
    "programs": dict,
    "files": dict,
    "reads": dict,
    "schema": dict,
    "max_behaviours": int,
    "picture_width": int,
    "digest": str,
}
"""Of the settings, those that are read here and in `ctrkit.scorer`, and what they are."""
PAIRS = 1 << 17
"""(ad, behaviour) pairs that are scored at once: what bounds the memory for long histories."""
LEAST = 2
"""Ads, behaviours, pictures and values of a multi-hot feature that a program gets at least; what is filled up counts
for nothing. (A compiler takes a length of 0 or 1 for something special.)"""


class Programs:
    """An export folder.

    Parameters
    ----------
    folder: what `ctrkit export` wrote.
    threads: CPU threads of each call; with pt2, of all of torch in this process.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder = folder
        self.settings = read_settings(folder)
        self._check_files()
        self._programs = {
            name: _load(folder / one["file"], self.settings["format"], one, threads)
            for name, one in self.settings["programs"].items()
        }

    def _check_files(self) -> None:
        """Refuse a folder in which a file is not what it was."""
        known = digests.Digests()
        for name, digest in self.settings["files"].items():
            path = self.folder / name
            if not path.is_file() or known.of(path) != digest:
                fault = "has changed since it was written" if path.is_file() else "is not there"
                raise _damaged(path, fault)

    def has(self, name: str) -> bool:
        """Say whether the model has a program."""
        return name in self._programs

    def outputs(self, name: str) -> list[str]:
        """Return the names of a program's outputs."""
        return list(self.settings["programs"][name]["outputs"])

    def run(self, name: str, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs of a program by name. given: its inputs, and perhaps others. Threads may share it."""
        return self._programs[name](given)

    def pictures(self, name: str, vectors_NW: Floats, there_N: npt.NDArray[np.bool_]) -> Arrays:
        """Return what `ad_pictures` or `user_pictures` makes of picture vectors as features.h5 has them: `extracted`
        [N, D], `centred` [N, W]."""
        n = len(there_N)
        found = self.run(name, {"vectors": _filled(vectors_NW), "there": _filled(there_N)})
        return {key: value[:n] for key, value in found.items()}

    def user(self, given: Mapping[str, npt.NDArray[Any]], behaviours: int) -> Arrays:
        """Return what `score` needs of a user.

        given: `user_ids` [features], `user.NAME` [values, 2 at least], `behaviour_ids` [L, features],
            `behaviour_pictures` [L, D], `behaviour_vectors` [L, W]: those that the program names.
        behaviours: L.
        """
        length = max(behaviours, LEAST)
        state = {name: _filled(array) if name.startswith("behaviour") else array for name, array in given.items()}
        state["there"] = np.arange(length) < behaviours
        return state | (self.run("user", state) if self.has("user") else {})

    def score(
        self, state: Arrays, given: Mapping[str, npt.NDArray[Any]], ads: int, behaviours: int
    ) -> tuple[Floats, Floats | None]:
        """Return click probabilities [A], and attention weights [A, L] where the model has them.

        state: what `user` returned.
        given: `ad_ids` [A, features], `ad.NAME` [A, values, 2 at least], `ad_pictures` [A, D], `ad_vectors` [A, W].
        """
        scores, weights = [], []
        for begin, end in _parts(ads, behaviours):
            some = {name: _filled(array[begin:end]) for name, array in given.items()}
            found = self.run("ads", state | some)
            scores.append(found["probability"][: end - begin])
            if "attention" in found:
                weights.append(found["attention"][: end - begin, :behaviours])
        if len(scores) == 1:
            return scores[0], weights[0] if weights else None
        return np.concatenate(scores), np.concatenate(weights) if weights else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an export folder."""
    path = folder / "settings.json"
    if not path.is_file():
        fault = "has no settings.json" if folder.is_dir() else "is not there"
        raise UserError(f"{folder} is not an exported model: it {fault}. Make one with `ctrkit export`.")
    settings = files.read_json(path)
    if not isinstance(settings, dict) or settings.get("format") not in FORMATS:
        raise UserError(
            f"{folder} is not an exported model: {path.name} names no format (a model of `ctrkit train`, perhaps). "
            "Make one with `ctrkit export`."
        )
    if lacks := [key for key, kind in KEYS.items() if not isinstance(settings.get(key), kind)]:
        raise of_another_version(folder, f"{lacks[0]} is missing or of another kind")
    if settings.pop("digest") != digest_of(settings):
        raise _damaged(path, "has changed since it was written")
    return settings


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return the digest of an export folder's settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(f"{path} {fault}: the exported model is damaged. Export it again (ctrkit export).")


def of_another_version(folder: Path, why: object) -> UserError:
    """Return the error for settings that cannot be understood."""
    told = (str(why).splitlines() or [""])[0]
    return UserError(
        f"{folder / 'settings.json'} is not what this version of ctrkit writes ({told}). Export the model again."
    )


def as_inputs(found: Mapping[str, npt.NDArray[Any]], program: str) -> Arrays:
    """Return what a program of pictures gave, by the names under which those of users and ads know it."""
    owner = {"ad_pictures": "ad", "user_pictures": "behaviour"}[program]
    names = {"extracted": f"{owner}_pictures", "centred": f"{owner}_vectors"}
    return {names[key]: value for key, value in found.items()}


def lists_side_by_side(lists: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Return [n, values] indexes of a multi-hot feature, filled up with 0."""
    out = np.zeros((len(lists), max([LEAST, *map(len, lists)])), np.int64)
    for row, values in zip(out, lists, strict=True):
        row[: len(values)] = values
    return out


def _filled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array with rows of zeros behind it where it has fewer than `LEAST`."""
    if len(array) >= LEAST:
        return array
    return np.concatenate([array, np.zeros((LEAST - len(array), *array.shape[1:]), array.dtype)])


def _parts(ads: int, behaviours: int) -> Iterator[tuple[int, int]]:
    step = max(LEAST, PAIRS // max(behaviours, 1))
    for begin in range(0, ads, step):
        yield begin, min(begin + step, ads)


def _load(path: Path, format: str, names: Mapping[str, Any], threads: int) -> "_Onnx | _Pt2":
    try:
        return _Onnx(path, names, threads) if format == "onnx" else _Pt2(path, names, threads)
    except UserError:
        raise
    except Exception as e:  # whatever the runtime raises on a file of another version
        raise UserError(
            f"{path} cannot be loaded: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}. Export the model again "
            "with the versions that are installed here (ctrkit export)."
        ) from None


class _Onnx:
    """An ONNX program in onnxruntime, on the CPU."""

    def __init__(self, path: Path, names: Mapping[str, Any], threads: int) -> None:
        runtime = require("onnxruntime", "ONNX programs run in it")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs = names["inputs"], names["outputs"]

    def __call__(self, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        found = self._session.run(self._outputs, {name: given[name] for name in self._inputs})
        return dict(zip(self._outputs, found, strict=True))


class _Pt2:
    """A program of torch.export."""

    def __init__(self, path: Path, names: Mapping[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._module = torch.export.load(path).module()
        self._inputs, self._outputs = names["inputs"], names["outputs"]

    def __call__(self, given: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        torch = self._torch
        with torch.inference_mode():
            found = self._module(*(torch.from_numpy(np.ascontiguousarray(given[name])) for name in self._inputs))
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, found, strict=True)}


def require(package: str, why: str) -> Any:
    """Import a package of `ctrkit[export]`."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        raise UserError(
            f"{e.name or package} is not installed, and {why}: pip install 'ctrkit[export]' (or give --format pt2, "
            "which needs torch only)"
        ) from None
