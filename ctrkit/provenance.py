"""What an output was made from: its key, and the sidecar `<output>.json` that records it.

The key of a stage's output is a digest of everything that decides its bytes: the recipe tables that the stage
reads, the content of its inputs, and its own code, followed through the imports. An output is fresh while its
sidecar carries the key that would be computed now and the content it then had. Times decide nothing.

Two variables of the environment, which `pipeline.mk` sets: CTRKIT_DIGESTS names a file that remembers digests, and
with CTRKIT_UNLESS_FRESH a stage whose output is fresh leaves it alone.
"""

import ast
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ctrkit import digests, files
from ctrkit.errors import Resumable, UserError
from ctrkit.progress import say
from ctrkit.recipe import Recipe

# The recipe tables whose change makes a stage's output stale.
TABLES: dict[str, tuple[str, ...]] = {
    "simulate": ("simulate",),
    "convert": ("convert", "split", "features", "daily"),
    "select-clicks": ("features", "select-clicks"),
    "extract-images": ("extract-images",),
    "group": ("group", "split", "features"),
    "train": ("train", "features"),
    "predict": ("predict",),
    "eval": ("eval",),
    "report": ("report", "name", "about", "simulate", "extract-images", "predict"),
}
Inputs = Mapping[str, Path | None]


def cache() -> digests.Digests:
    """Return the digest cache named by CTRKIT_DIGESTS, or one without memory."""
    name = os.environ.get("CTRKIT_DIGESTS")
    return _named_cache(name) if name else digests.Digests()


@functools.cache
def _named_cache(name: str) -> digests.Digests:
    return digests.Digests(Path(name))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that decides an output's bytes."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    code: str

    @property
    def key(self) -> str:
        """The digest of all of it."""
        return digests.text(json.dumps([self.stage, self.config, self.inputs, self.code], sort_keys=True))


def provenance(
    stage: str,
    recipe: Recipe | None,
    inputs: Inputs,
    known: digests.Digests,
    options: Mapping[str, str] | None = None,
) -> Provenance:
    """Compute the provenance that a stage's output would have now. Inputs that are None do not count."""
    return Provenance(
        stage=stage,
        config=(recipe.tables(*TABLES[stage]) if recipe else {}) | dict(options or {}),
        inputs={name: known.of(path) for name, path in sorted(inputs.items()) if path is not None},
        code=code_digest(stage),
    )


def is_fresh(output: Path, key: str, known: digests.Digests) -> bool:
    """Say whether `output` is what its sidecar describes, and was made with `key`."""
    try:
        sidecar = json.loads(files.sidecar_path(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(sidecar.get("key") == key and sidecar.get("content") == known.of(output))


@dataclass
class Work:
    """An output in the making."""

    path: Path
    """Where to write it; it is moved to its name when the block ends well."""
    parts: Path
    """A folder for finished parts of the work. What is there was left by a killed run of the same work; it goes when
    the block ends well."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Row counts and the like, for the sidecar."""

    def begin(self) -> Path:
        """Return a folder among the parts to build the output folder in, perhaps begun by a killed run."""
        out = self.parts / "out"
        if not out.is_dir():
            files.remove(self.parts)
            out.mkdir(parents=True)
        return out

    def end(self) -> None:
        """Make what was built in `begin`'s folder the output."""
        out = self.parts / "out"
        for unfinished in out.rglob(".*"):
            files.remove(unfinished)
        out.rename(self.path)


class Checked(Exception):
    """Ends a stage that was only asked whether its output is fresh."""

    def __init__(self, fresh: bool) -> None:
        super().__init__(fresh)
        self.fresh = fresh


_checking = False


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Within the block, a stage that comes to its `output` raises `Checked` instead of doing its work."""
    global _checking
    _checking = True
    try:
        yield
    finally:
        _checking = False


@contextlib.contextmanager
def output(
    stage: str, recipe: Recipe | None, inputs: Inputs, target: Path, options: Mapping[str, str] | None = None
) -> Iterator[Work]:
    """Yield a `Work` whose path becomes `target`, with its sidecar, when the block ends without an error.

    options: of the command, where they decide the output's bytes.

    One process at a time makes a target; the others wait. Where CTRKIT_UNLESS_FRESH is set and the target is fresh,
    the stage ends here, well.
    """
    known = cache()
    if _checking:
        fresh = not files.is_locked(target) and is_fresh(
            target, provenance(stage, recipe, inputs, known, options).key, known
        )
        known.save()
        raise Checked(fresh)
    _guard(inputs, target)
    with files.locked(target):
        made_from = provenance(stage, recipe, inputs, known, options)
        for old in files.leftovers(target, parts=False):
            files.remove(old)
        if os.environ.get("CTRKIT_UNLESS_FRESH") and is_fresh(target, made_from.key, known):
            known.save()
            say(f"{stage}: {target} is what it would be made again")
            raise click.exceptions.Exit(0)
        started = time.time()
        parts = _parts_folder(target, made_from.key)
        try:
            with files.atomic(target) as tmp:
                work = Work(tmp, parts)
                yield work
        except UserError as e:
            if not isinstance(e, Resumable):  # what has to be mended changes the work
                files.remove(parts)
            raise
        sidecar = {
            "stage": stage,
            "key": made_from.key,
            "content": known.of(target),
            "config": made_from.config,
            "inputs": made_from.inputs,
            "code": made_from.code,
            "counts": work.counts,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
        }
        files.write_json(files.sidecar_path(target), sidecar)
        files.remove(parts)
    known.save()


def _parts_folder(target: Path, key: str) -> Path:
    """Return where the parts of this work lie; remove those of other work, or of before the machine last started
    (parts are not flushed to disk)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text(encoding="ascii") if boot.is_file() else ""
    folder = target.with_name(f".{target.name}.parts-{digests.text(key + started)[:16]}")
    for old in target.parent.glob(f".{target.name}.parts-*"):
        if old != folder and target.suffix != ".h5":
            files.remove(old)
    return folder


def _guard(inputs: Inputs, target: Path) -> None:
    """Refuse to write over an input, or over a folder that is somebody else's. A run's own folder is the run's."""
    for name, path in inputs.items():
        if path is not None and path.exists() and target.exists() and path.samefile(target):
            raise UserError(f"{target} is an input ({name}) and would be written over; name another output")
    if os.environ.get("CTRKIT_UNLESS_FRESH") or not target.is_dir() or not any(target.iterdir()):
        return
    if not files.is_ours(target):
        raise UserError(
            f"{target} is a folder that ctrkit did not write (no {files.sidecar_path(target).name} beside it), and all "
            "in it would be lost; name another output, or remove the folder yourself"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide bytes."""
    found = {"python": platform.python_version()}
    for package in ("ctrkit", "torch", "torchvision", "polars", "numpy", "h5py", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def code_digest(stage: str) -> str:
    """Return a digest of the stage's source, of every module of ctrkit that it imports, however far, and of the
    package's other files that any of these names (a template, say)."""
    sources: dict[str, str] = {}
    waiting = ["ctrkit.stages." + stage.replace("-", "_")]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in sources:
            continue
        source = _read_source(path)
        sources[name] = source.text
        for data in source.data:
            sources[data.name] = data.read_text(encoding="utf-8")
        waiting += source.imports
    return digests.text(json.dumps(sources, sort_keys=True))


def _source(module: str) -> Path | None:
    package = Path(__file__).parent
    parts = module.split(".")[1:]
    homes = [package, package.parent]  # an installed package, a checkout (stages/ beside ctrkit/)
    for home in homes if parts[:1] == ["stages"] else homes[:1]:
        for path in (home.joinpath(*parts).with_suffix(".py"), home.joinpath(*parts, "__init__.py")):
            if parts and path.is_file():
                return path
    return None


@dataclass(frozen=True)
class _Source:
    """A module's text, the modules of ctrkit that it may import, and the other files of ctrkit that it names."""

    text: str
    imports: list[str]
    data: list[Path]


@functools.cache
def _read_source(path: Path) -> _Source:
    text = path.read_text(encoding="utf-8")
    imports: list[str] = []
    data: list[Path] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            data += _data_files(node.value)
    ours = [name for name in imports if name.split(".")[0] == "ctrkit"]
    packages = [name.rpartition(".")[0] for name in ours]
    return _Source(text, sorted({*ours, *packages}), sorted(set(data)))


def _data_files(name: str) -> list[Path]:
    """Return the package's file or files called `name` that are not Python: "templates" gives all templates."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        return []
    path = Path(__file__).parent / name
    found = path.iterdir() if path.is_dir() else [path]
    return [p for p in found if p.is_file() and p.suffix not in (".py", ".pyc")]
