"""Checkpoints of training: each there whole or not at all, proved by digests when it is read, the best one marked.

A checkpoint is two files in `.NAME.checkpoints-KEY/` beside the target: `step-N.pt`, named tensors, and then
`step-N.json`: the progress (plain values), size and digest of the tensors, which checkpoint has the best model so far,
and a digest of all this. KEY is a digest of everything that decides the result. Both files are written as temporary
neighbours, flushed and renamed, so a kill at any moment leaves the checkpoints before it as they were; so does a full
disk. They outlive the machine's restarts.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from ctrkit import digests, files, state_dict
from ctrkit.progress import say

_STEP = re.compile(r"step-(\d{10})\.json")
KEPT = 3
"""The last ones; the best one of each of them is kept besides."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says, without its tensors."""

    step: int
    best: int | None
    """The step whose checkpoint has the best model so far."""
    progress: dict[str, Any]
    """What was given to `save`."""
    size: int
    """Bytes of the tensors' file."""
    digest: str
    """Of the tensors' file."""


class Checkpoints:
    """The checkpoints in a folder, which is made when the first one is saved."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        """others: folders of other work on the same output, which go when a checkpoint of this one is there."""
        self.folder, self._others = folder, tuple(others)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Write a checkpoint; then remove those that are neither among the last nor the best of one of these.

        progress: values that JSON keeps: text, integers, finite floats, None, lists and objects of such.
        best: the step whose checkpoint has the best model, perhaps this one.

        Raises Resumable where there is no room; what was there before is left.
        """
        path = self._tensors(step)
        try:
            with files.atomic(path) as tmp:
                digest = state_dict.write(tmp, state_dict.plain(tensors))
                size = tmp.stat().st_size
        except OSError as e:
            raise files.cannot_write(path, e) from None
        value = {"step": step, "best": best, "progress": dict(progress), "size": size, "digest": digest}
        value |= {"of": self._work}
        # Keys stay in their order, since lines of metrics.jsonl are among the values.
        files.write_text(self._record(step), json.dumps({**value, "check": _check(value)}, allow_nan=False))
        self._prune()
        for other in self._others:
            say(f"train: {other} had checkpoints of other settings, data or versions, and is removed")
            files.remove(other)
        self._others = ()

    def latest(self) -> Checkpoint | None:
        """Return the last checkpoint that is whole, and whose best one is; None if there is none.

        One that is damaged is told, and removed, as is what is left of one that was never finished.
        """
        found = self.steps()
        finished = {self._tensors(step) for step in found}
        for path in (*self.folder.glob("step-*.pt"), *self.folder.glob(".step-*")):
            if path not in finished:
                files.remove(path)
        for path in self.folder.glob("step-*.json"):
            if not _STEP.fullmatch(path.name):
                say(f"train: {path} is no checkpoint, and is removed")
                files.remove(path)
        for step in reversed(found):
            last = self._whole(step)
            if last is not None and (last.best in (None, step) or self._whole(last.best) is not None):
                return last
            self._remove(step)
            what = f"{self._tensors(step)} is damaged" if last is None else f"the best model of step {step} is damaged"
            rest = "the one before it" if step != found[0] else "the beginning, for there is no other checkpoint"
            say(f"train: {what}; going on from {rest}")
        return None

    def read(self, step: int) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, mapped into memory: only what is used is read."""
        return state_dict.read(self._tensors(step))

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, whole or not, rising."""
        named = map(_STEP.fullmatch, (path.name for path in self.folder.glob("step-*.json")))
        return sorted(int(name[1]) for name in named if name)

    def describe(self, step: int) -> Checkpoint | None:
        """Return what a checkpoint says of itself, or None if that is damaged. Its tensors are not read."""
        try:
            value = json.loads(self._record(step).read_text(encoding="utf-8"))
            whole = value.pop("check") == _check(value) and value.pop("of") == self._work and value["step"] == step
            return Checkpoint(**value) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _whole(self, step: int | None) -> Checkpoint | None:
        """Return a checkpoint if all of it is as it was written."""
        found = None if step is None else self.describe(step)
        if found is None:
            return None
        path = self._tensors(found.step)
        try:
            if path.stat().st_size != found.size:
                return None
            with open(path, "rb") as f:
                digest = hashlib.file_digest(f, xxhash.xxh3_128).hexdigest()
        except OSError:
            return None
        return found if digest == found.digest else None

    def _prune(self) -> None:
        steps = self.steps()
        last = steps[-KEPT:]
        wanted = {*last, *(found.best for found in map(self.describe, last) if found is not None)}
        for step in steps:
            if step not in wanted:
                self._remove(step)

    def _remove(self, step: int) -> None:
        for path in (self._record(step), self._tensors(step)):  # never tensors' description without the tensors
            files.remove(path)

    @property
    def _work(self) -> str:
        """What the checkpoints are of: the folder's KEY."""
        return self.folder.name.rpartition("-")[2]

    def _tensors(self, step: int) -> Path:
        return self.folder / f"step-{step:010}.pt"

    def _record(self, step: int) -> Path:
        return self.folder / f"step-{step:010}.json"


def _check(value: Mapping[str, Any]) -> str:
    return digests.text(json.dumps(value))


def of_output(target: Path, decides: Any) -> Checkpoints:
    """Return the checkpoints of an output; those of other work on it stay until one of these is there.

    decides: JSON values: all that decides the output's bytes.
    """
    key = digests.text(json.dumps(decides, sort_keys=True))[:16]
    own = target.with_name(f".{target.name}.checkpoints-{key}")
    others = [old for old in sorted(target.parent.glob(f".{target.name}.checkpoints-*")) if old != own]
    for old in others:
        say(
            f"train: {old} has checkpoints of other settings, data or versions, so training begins anew; they stay "
            "until it has its first"
        )
    return Checkpoints(own, others)


def remove(target: Path) -> None:
    """Remove the checkpoints of an output, once it is there."""
    for old in target.parent.glob(f".{target.name}.checkpoints-*"):
        files.remove(old)
