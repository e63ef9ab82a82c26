"""Checkpoints of training: each there whole or not at all, proved by digests when it is read, the best one marked.

A checkpoint is two files in `.NAME.checkpoints-KEY/` beside the target: `step-N.pt`, named tensors, and then
`step-N.json`: the progress (plain values), sizes and digests of the files with tensors, which checkpoint has the best
model so far, and a digest of all this. Where tables are spread over ranks they are no part of `step-N.pt`, but of a
folder before it, `step-N.tables/` (`ctrkit.spread_tables`). KEY is a digest of everything that decides the result. All
are written as temporary neighbours, flushed and renamed, so a kill at any moment leaves the checkpoints before it as
they were; so does a full disk. They outlive the machine's restarts.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from ctrkit import digests, files, state_dict
from ctrkit.progress import say

WriteTables = Callable[[Path], dict[str, tuple[int, str]]]
"""Writes into a folder, which is there; returns file → (bytes, digest)."""
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
    files: dict[str, tuple[int, str]]
    """Of the files with tensors, bytes and digest."""

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(size for size, _ in self.files.values())


class Checkpoints:
    """The checkpoints in a folder, which is made when the first one is saved."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        """others: folders of other work on the same output, which go when a checkpoint of this one is there."""
        self.folder, self._others = folder, tuple(others)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        best: int | None = None,
        write_tables: WriteTables | None = None,
    ) -> None:
        """Write a checkpoint; then remove those that are neither among the last nor the best of one of these.

        progress: values that JSON keeps: text, integers, finite floats, None, lists and objects of such.
        best: the step whose checkpoint has the best model, perhaps this one.
        write_tables: writes the tables that are spread over ranks.

        Raises Resumable where there is no room; what was there before is left.
        """
        path, folder = self._tensors(step), self.tables(step)
        written: dict[str, tuple[int, str]] = {}
        if write_tables is not None:
            with _told(folder), files.atomic(folder) as tmp:
                tmp.mkdir()
                written |= {f"{folder.name}/{name}": found for name, found in write_tables(tmp).items()}
        with _told(path), files.atomic(path) as tmp:
            digest = state_dict.write(tmp, state_dict.plain(tensors))
            written[path.name] = tmp.stat().st_size, digest
        value = {"step": step, "best": best, "progress": dict(progress), "files": written, "of": self._work}
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
        finished = {path for step in found for path in (self._tensors(step), self.tables(step))}
        for path in (p for form in ("step-*.pt", "step-*.tables", ".step-*") for p in self.folder.glob(form)):
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
        """Return the tensors of a checkpoint, mapped into memory: only what is used is read. Those of tables that were
        spread over ranks are in `tables(step)`."""
        return state_dict.read(self._tensors(step))

    def tables(self, step: int) -> Path:
        """Return the folder of a checkpoint's spread tables, which is there where some table was spread."""
        return self.folder / f"step-{step:010}.tables"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, whole or not, rising."""
        named = map(_STEP.fullmatch, (path.name for path in self.folder.glob("step-*.json")))
        return sorted(int(name[1]) for name in named if name)

    def describe(self, step: int) -> Checkpoint | None:
        """Return what a checkpoint says of itself, or None if that is damaged. Its tensors are not read."""
        try:
            value = json.loads(self._record(step).read_text(encoding="utf-8"))
            whole = value.pop("check") == _check(value) and value.pop("of") == self._work and value["step"] == step
            value["files"] = {name: (size, digest) for name, (size, digest) in value["files"].items()}
            return Checkpoint(**value) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _whole(self, step: int | None) -> Checkpoint | None:
        """Return a checkpoint if all of it is as it was written."""
        found = None if step is None else self.describe(step)
        if found is None:
            return None
        for name, (size, digest) in found.files.items():
            try:
                if (self.folder / name).stat().st_size != size:
                    return None
                with open(self.folder / name, "rb") as f:
                    if hashlib.file_digest(f, xxhash.xxh3_128).hexdigest() != digest:
                        return None
            except OSError:
                return None
        return found

    def _prune(self) -> None:
        steps = self.steps()
        last = steps[-KEPT:]
        wanted = {*last, *(found.best for found in map(self.describe, last) if found is not None)}
        for step in steps:
            if step not in wanted:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Never the description of tensors without the tensors.
        for path in (self._record(step), self._tensors(step), self.tables(step)):
            files.remove(path)

    @property
    def _work(self) -> str:
        """What the checkpoints are of: the folder's KEY."""
        return self.folder.name.rpartition("-")[2]

    def _tensors(self, step: int) -> Path:
        return self.folder / f"step-{step:010}.pt"

    def _record(self, step: int) -> Path:
        return self.folder / f"step-{step:010}.json"


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell which file or folder the system cannot write."""
    try:
        yield
    except OSError as e:
        raise files.cannot_write(path, e) from None


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
