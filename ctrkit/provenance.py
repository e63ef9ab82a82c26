"""What an output was made from: its key, and the sidecar `<output>.json` that records it.

The key of a stage's output is a digest of everything that decides its bytes: the recipe tables that the stage
reads, the content of its inputs, and its own code, followed through the imports. An output is fresh while its
sidecar carries the key that would be computed now and the content it then had. Times decide nothing.

Two variables of the environment, which `pipeline.mk` sets: CTRKIT_DIGESTS names a file that remembers digests, and
with CTRKIT_UNLESS_FRESH a stage whose output is fresh leaves it alone.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from ctrkit import digests, files
from ctrkit.errors import Resumable, UsageError, UserError
from ctrkit.progress import say
from ctrkit.recipe import RANKS, Recipe

# The recipe tables whose change makes a stage's output stale.
TABLES: dict[str, tuple[str, ...]] = {
    "simulate": ("simulate",),
    "convert": ("convert", "split", "features", "daily.window_days", "daily.behaviour_days"),
    "select-clicks": ("features", "select-clicks"),
    "tune-backbone": (
        "tune-backbone",
        "convert.goods",
        "convert.ads",
        "extract-images.template",
        "extract-images.index",
        "extract-images.id_column",
        "extract-images.path_column",
        "extract-images.bytes_column",
    ),
    "extract-images": ("extract-images",),
    "import-features": ("import-features",),
    "group": ("group", "split", "features"),
    "train": ("train", "features"),
    "predict": ("predict",),
    "export": ("export", "select-clicks.max_behaviours"),
    "eval": ("eval",),
    "report": ("report", "name", "about", "simulate", "extract-images", "predict"),
    "tables": ("tables", "curves", "eval", "name", "about"),
    "daily": ("daily", "eval", "name"),
    "replay": ("replay", "simulate", "convert", "features", "predict.batch", "name", "about"),
}
ROUNDING: dict[str, frozenset[str]] = {"train": RANKS, "predict": frozenset(["processes"])}
"""Of these tables, keys that change no more than the last bits of an output, and so do not make it stale."""
FOLDERS = frozenset(
    [
        *("simulate", "convert", "select-clicks", "tune-backbone", "group", "train", "export", "tables", "daily"),
        "replay",
    ]
)
"""Stages whose output is a folder; that of the others is a file."""
MADE_BY = {"convert": "convert", "previous": "convert", "behaviours": "select-clicks", "groups": "group"}
"""Input → the stage that makes such a folder. Where it has a sidecar, it must be as that stage left it."""
MARKS = {"simulate": "truth.parquet", "convert": "split.json", "group": "schema.json", "train": "model.pt"}
"""Stage → a file by which its output is known where there is no sidecar."""
MEANING = (
    "column",
    "kind",
    "vocab",
    "multi_hot",
    "separator",
    "min_count",
    "top",
    "hash_buckets",
    "edges",
    "quantiles",
)
"""Keys of a feature that decide what its indexes stand for."""
Inputs = Mapping[str, Path | None]
Contents = dict[str, list[Any]]
"""File of a folder, or folder in it that has files → how many files, their digest."""


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
    config = recipe.tables(*TABLES[stage]) if recipe else {}
    for table, keys in ROUNDING.items():
        if table in config:
            config[table] = {key: value for key, value in config[table].items() if key not in keys}
    return Provenance(
        stage=stage,
        config=config | dict(options or {}),
        inputs=_digests_of(inputs, known),
        code=code_digest(stage),
    )


def _digests_of(inputs: Inputs, known: digests.Digests) -> dict[str, str]:
    there = {name: path for name, path in sorted(inputs.items()) if path is not None}
    return dict(zip(there, files.side_by_side(known.of, there.values()), strict=True))


def is_fresh(output: Path, key: str, known: digests.Digests, beside: Path | None = None) -> bool:
    """Say whether `output`, and the folder `beside` that is made with it, are what its sidecar describes, and were made
    with `key`."""
    sidecar = read_sidecar(output)
    if not sidecar or sidecar.get("key") != key or sidecar.get("content") != known.of(output):
        return False
    return beside is None or sidecar.get("beside") == known.of(beside)


def read_sidecar(output: Path) -> dict[str, Any]:
    """Return the sidecar of an output; empty if ctrkit wrote none."""
    try:
        sidecar = json.loads(files.sidecar_path(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sidecar if isinstance(sidecar, dict) and "stage" in sidecar and "content" in sidecar else {}


def _check_inputs(inputs: Inputs, made_from: Mapping[str, str], known: digests.Digests) -> None:
    """Refuse a folder that another stage wrote, or that is no longer as its stage left it. One without a sidecar is
    somebody else's, who answers for it."""
    for name, stage in MADE_BY.items():
        path = inputs.get(name)
        if path is None or made_from[name] == digests.MISSING:
            continue
        sidecar = read_sidecar(path)
        marked = [other for other, mark in MARKS.items() if (path / mark).is_file()]
        wrote = sidecar["stage"] if sidecar else next(iter(marked), stage)
        if wrote != stage:
            raise UserError(f"{path} is what ctrkit {wrote} wrote; give the folder that ctrkit {stage} wrote")
        if sidecar and sidecar["content"] != made_from[name]:
            raise UserError(
                f"{path} is not what ctrkit {stage} wrote: {_difference(path, sidecar, known)}; "
                f"run ctrkit {stage} again"
            )


def _difference(path: Path, sidecar: Mapping[str, Any], known: digests.Digests) -> str:
    """Say what of a folder is not as its sidecar says."""
    then: Contents = sidecar.get("contents", {})
    now = _contents(known.inside(path)) if then and path.is_dir() else {}
    differ = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if not differ or not now:
        return "its content has changed since"
    name, others = differ[0], len(differ) - 1
    if name not in now:
        told = "is missing"
    elif name not in then:
        told = "was not there"
    elif then[name][0] != now[name][0]:
        told = f"has {now[name][0]:,} instead of {then[name][0]:,} files"
    else:
        told = "has changed"
    return f"{name} {told}" + (f", and so for {others:,} more" if others else "")


def _contents(inside: Mapping[Path, str]) -> Contents:
    """Return the contents of a folder, whose files have these digests."""
    groups: dict[str, dict[Path, str]] = {}
    for path, digest in inside.items():
        groups.setdefault(str(path.parent if path.parent.name else path), {})[path] = digest
    return {name: [len(some), digests.folder(some.items())] for name, some in groups.items()}


def check_features(recipe: Recipe, names: Iterable[str], folder: Path) -> None:
    """Refuse a folder whose sidecar says that these features of the recipe are not in it, or mean something else."""
    sidecar = read_sidecar(folder)
    made = sidecar.get("config", {}).get("features")
    if made is None:
        return
    own = recipe.tables("features")["features"]
    again = f"run ctrkit {sidecar['stage']} again"
    for name in names:
        if name not in made:
            raise UserError(f"{folder} has no feature {name!r}; it is of another recipe: {again}")
        for key in MEANING:
            was, now = made[name].get(key), own[name][key]
            if key in made[name] and was != now:
                raise UserError(
                    f"{folder} was made with features.{name}.{key} = {was!r}, and the recipe says {now!r}: {again}"
                )


@dataclass
class Work:
    """An output in the making."""

    target: Path
    """What is to be made."""
    path: Path
    """Where to write it; it is moved to its name when the block ends well."""
    parts: Path
    """A folder for finished parts of the work. What is there was left by a killed run of the same work; it goes when
    the block ends well."""
    inputs: Mapping[str, str]
    """The digest of each input."""
    beside: Path
    """Where to write the folder that is made with the target, if there is to be one."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Row counts and the like, for the sidecar."""
    _clearing: threading.Thread | None = None

    def begin(self) -> Path:
        """Return a folder among the parts to build the output folder in, perhaps begun by a killed run."""
        if self.target.is_file():
            raise UsageError(f"{self.target} is a file, and a folder is to be written; name another output")
        out = self.parts / "out"
        if not out.is_dir():
            files.remove(self.parts)
            out.mkdir(parents=True)
        return out

    def end(self) -> None:
        """Make what was built in `begin`'s folder the output. The other parts, of no use without it, begin to go."""
        out = self.parts / "out"
        for unfinished in out.rglob(".*"):
            files.remove(unfinished)
        out.rename(self.path)
        self._clearing = threading.Thread(target=files.remove, args=[self.parts])
        self._clearing.start()

    def clear(self) -> None:
        """Remove the parts, or what is left of them."""
        if self._clearing is not None:
            self._clearing.join()
        files.remove(self.parts)


def will_work() -> bool:
    """Say whether a stage that comes to its `output` will make it, whether it is fresh or not."""
    return not _checking and not os.environ.get("CTRKIT_UNLESS_FRESH")


def is_checking() -> bool:
    """Say whether a stage is asked only whether its output is fresh."""
    return _checking


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
    stage: str,
    recipe: Recipe | None,
    inputs: Inputs,
    target: Path,
    options: Mapping[str, str] | None = None,
    *,
    resumes: bool = True,
    beside: Path | None = None,
) -> Iterator[Work]:
    """Yield a `Work` whose path becomes `target`, with its sidecar, when the block ends without an error.

    options: of the command, where they decide the output's bytes.
    resumes: whether the stage goes on from what was done when there was no room; False: it starts again.
    beside: a folder that is made with the target, which must be a file; it is in place before the target is, and the
        target is not fresh unless the folder is what it was.

    One process at a time makes a target; the others wait. Where CTRKIT_UNLESS_FRESH is set and the target is fresh,
    the stage ends here, well.
    """
    known = cache()
    if target.name in ("", ".."):
        raise UsageError(f"the output {str(target)!r} has no name of its own, and a sidecar goes beside it; name it")
    if _checking:
        fresh = not files.is_locked(target) and is_fresh(
            target, provenance(stage, recipe, inputs, known, options).key, known, beside
        )
        known.save()
        raise Checked(fresh)
    _guard(stage, inputs, target)
    if beside is not None:
        _guard_beside(target, beside)
    with files.locked(target):
        made_from = provenance(stage, recipe, inputs, known, options)
        _check_inputs(inputs, made_from.inputs, known)
        for old in files.leftovers(target, parts=False):
            files.remove(old)
        if os.environ.get("CTRKIT_UNLESS_FRESH") and is_fresh(target, made_from.key, known, beside):
            known.save()
            say(f"{stage}: {target} is what it would be made again")
            raise click.exceptions.Exit(0)
        started = time.time()
        parts = _parts_folder(target, made_from.key)
        try:
            with files.atomic(target) as tmp, files.atomic(beside) if beside else contextlib.nullcontext(tmp) as other:
                work = Work(target, tmp, parts, made_from.inputs, other)
                yield work
        except UserError as e:
            if not isinstance(e, Resumable):  # what has to be mended changes the work
                files.remove(parts)
            raise
        except KeyboardInterrupt:
            if files.leftovers(target, parts=True):
                say(f"{stage}: stopped; run the same command again, and it goes on from what was done")
            raise
        except Exception as e:
            if files.no_room(e):
                again = {"then": "it starts again, and what was there before is still there"} if not resumes else {}
                raise files.cannot_write(target, e, **again) from None
            raise
        inside = known.inside(target) if target.is_dir() else {}
        sidecar = {
            "stage": stage,
            "key": made_from.key,
            "content": digests.folder(inside.items()) if target.is_dir() else known.of(target),
            **({"contents": _contents(inside)} if target.is_dir() else {}),
            **({"beside": known.of(beside)} if beside else {}),
            "config": made_from.config,
            "inputs": made_from.inputs,
            "code": made_from.code,
            "counts": work.counts,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
        }
        files.write_json(files.sidecar_path(target), sidecar)
        work.clear()
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


def _guard(stage: str, inputs: Inputs, target: Path) -> None:
    """Refuse to write over an input or into one, over what is of another kind than the output, or over a folder that is
    somebody else's. A run's own folder is the run's."""
    for name, path in inputs.items():
        if path is not None and path.exists() and target.exists() and path.samefile(target):
            raise UserError(f"{target} is an input ({name}) and would be written over; name another output")
        if path is not None and stage in FOLDERS and files.is_inside(target, path):
            raise UserError(f"{target} lies in an input ({name}: {path}), which it would change; name another output")
    runs = bool(os.environ.get("CTRKIT_UNLESS_FRESH"))
    if not runs and target.is_dir() and any(target.iterdir()) and not files.is_ours(target):
        raise UserError(
            f"{target} is a folder that ctrkit did not write (no {files.sidecar_path(target).name} beside it), and all "
            "in it would be lost; name another output, or remove the folder yourself"
        )
    there = "a folder" if target.is_dir() else "a file" if target.is_file() else "neither a file nor a folder"
    wanted = "a folder" if stage in FOLDERS else "a file"
    if target.exists() and there != wanted and read_sidecar(target).get("stage") != stage:
        raise UsageError(f"{target} is {there}, and {wanted} is to be written; name another output")


def guard_plain(inputs: Inputs, targets: Mapping[str, Path | None]) -> None:
    """Refuse to write plain files, which get no sidecar, over inputs or into them, over what ctrkit wrote (or over the
    sidecar of that), or two into one. targets: option → file; None: not asked for."""
    asked = {option: path for option, path in targets.items() if path is not None}
    resolved: dict[Path, str] = {}
    for option, path in asked.items():
        for name, source in inputs.items():
            if source is not None and source.exists():
                if path.exists() and path.samefile(source):
                    raise UserError(f"{path} ({option}) is an input ({name}) and would be written over; name another")
                if files.is_inside(path, source):
                    raise UserError(f"{path} ({option}) lies in an input ({name}: {source}); name another")
        made = [p for p in (path, *path.resolve().parents) if p.exists() and read_sidecar(p)]
        made += [p for p in [path.with_suffix("")] if path == files.sidecar_path(p) and read_sidecar(p)]
        if made:
            raise UserError(
                f"{path} ({option}) is of what ctrkit {read_sidecar(made[0])['stage']} wrote ({made[0]}), which would "
                "change; name another"
            )
        if path.is_dir():
            raise UsageError(f"{path} ({option}) is a folder, and a file is to be written; name another")
        if (other := resolved.setdefault(path.resolve(), option)) != option:
            raise UsageError(f"{other} and {option} both name {path}; give each a file of its own")


def _guard_beside(target: Path, beside: Path) -> None:
    """Refuse to write a folder over one that was not made with the target, nor left by a killed maker of it."""
    sidecar = read_sidecar(target)
    ours = "beside" in sidecar or (not sidecar and files.is_ours(target))
    if beside.is_file() or (beside.is_dir() and any(beside.iterdir()) and not ours):
        raise UserError(
            f"{beside} is to be written with {target} and was not made with it (no {files.sidecar_path(target).name} "
            "that says so): all in it would be lost; name another output, or move it away yourself"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide bytes."""
    found = {"python": platform.python_version()}
    packages = "ctrkit torch torchvision polars numpy numba h5py pillow matplotlib scikit-learn"
    for package in packages.split():
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
        if name in sources or (path := _source(name)) is None:
            continue
        source = _read_source(path)
        sources[name] = source.text
        for data in source.data:
            sources[data.name] = data.read_text(encoding="utf-8")
        waiting += source.imports
    return digests.text(json.dumps(sources, sort_keys=True))


def _source(module: str) -> Path | None:
    return _source_in(Path(__file__).parent, module)


@functools.cache
def _source_in(package: Path, module: str) -> Path | None:
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
    imports, words = _names(text)
    data = {file for word in words for file in _data_files(word)}
    return _Source(text, imports, sorted(data))


@functools.cache
def _names(text: str) -> tuple[list[str], list[str]]:
    """Return the modules of ctrkit that a module's text may import, and its texts that may be the name of a file.

    Read by pattern, which takes a twentieth of the time of a syntax tree; what comments and docstrings name counts too.
    """
    imports: list[str] = []
    for module, names, modules in _IMPORT.findall(text):
        listed = _NOT_NAMES.sub(" ", names or modules).split()
        imports += [module, *(f"{module}.{name}" for name in listed)] if module else listed
    words = {word for _, word in _WORD.findall(text)}
    imports += [word for word in words if re.fullmatch(r"ctrkit(\.\w+)+", word)]  # imported where it is needed
    ours = [name for name in imports if name.split(".")[0] == "ctrkit"]
    packages = [name.rpartition(".")[0] for name in ours]
    return sorted({*ours, *packages}), sorted(words)


_IMPORT = re.compile(r"^[ \t]*(?:from ([\w.]+) import (\([^)]*\)|.*)|import (.*))", re.MULTILINE)
_NOT_NAMES = re.compile(r"#.*|\bas \w+|[(),]")
_WORD = re.compile(r"""(["'])([A-Za-z0-9_-][A-Za-z0-9_.-]*)\1""")


def _data_files(name: str) -> list[Path]:
    """Return the package's file called `name`, or the files of its folder called so, that are not Python."""
    return _data_files_in(Path(__file__).parent, name)


@functools.cache
def _data_files_in(package: Path, name: str) -> list[Path]:
    path = package / name
    found = path.iterdir() if path.is_dir() else [path]
    return [p for p in found if p.is_file() and p.suffix not in (".py", ".pyc")]
