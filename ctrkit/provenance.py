"""What an output was made from: its key, and the sidecar `<output>.json` that records it.

The key of a stage's output is a digest of everything that decides its bytes: the recipe tables that the stage
reads, the content of its inputs, and its own code, followed through the imports. An output is fresh while its
sidecar carries the key that would be computed now and the content it then had.
"""

import ast
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctrkit import digests, files
from ctrkit.recipe import Recipe

# The recipe tables whose change makes a stage's output stale.
TABLES: dict[str, tuple[str, ...]] = {
    "simulate": ("simulate",),
    "convert": ("convert", "split", "features"),
    "select-clicks": ("convert", "features", "select-clicks"),
    "extract-images": ("extract-images",),
    "group": ("group", "split", "features"),
    "train": ("train", "features"),
    "predict": ("predict",),
    "eval": ("eval",),
    "report": ("report", "name", "about", "simulate", "extract-images", "predict"),
}
Inputs = Mapping[str, Path | None]


def cache() -> digests.Digests:
    """Return the digest cache named by CTRKIT_DIGESTS (the Makefile sets it), or one without memory."""
    name = os.environ.get("CTRKIT_DIGESTS")
    return digests.Digests(Path(name) if name else None)


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


def provenance(stage: str, recipe: Recipe | None, inputs: Inputs, known: digests.Digests) -> Provenance:
    """Compute the provenance that a stage's output would have now. Inputs that are None do not count."""
    return Provenance(
        stage=stage,
        config=recipe.tables(*TABLES[stage]) if recipe else {},
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
    counts: dict[str, Any] = field(default_factory=dict)
    """Row counts and the like, for the sidecar."""


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
def output(stage: str, recipe: Recipe | None, inputs: Inputs, target: Path) -> Iterator[Work]:
    """Yield a `Work` whose path becomes `target`, with its sidecar, when the block ends without an error."""
    known = cache()
    made_from = provenance(stage, recipe, inputs, known)
    if _checking:
        fresh = is_fresh(target, made_from.key, known)
        known.save()
        raise Checked(fresh)
    started = time.time()
    with files.atomic(target) as tmp:
        work = Work(tmp)
        yield work
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
    known.save()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide bytes."""
    found = {"python": platform.python_version()}
    for package in ("ctrkit", "torch", "torchvision", "polars", "numpy", "h5py", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def code_digest(stage: str) -> str:
    """Return a digest of the stage's source and of every module of ctrkit that it imports, however far."""
    module = "ctrkit.stages." + stage.replace("-", "_")
    sources: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in sources:
            continue
        sources[name] = text = path.read_text(encoding="utf-8")
        waiting += _imports(text)
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


def _imports(source: str) -> list[str]:
    """Return the modules of ctrkit that a source may import, names of packages' members included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.split(".")[0] == "ctrkit"]
