"""Which raw files a recipe names. Imports nothing heavy, so that Make rules can be written from it."""

import datetime
import glob
import string
from pathlib import Path

from ctrkit.errors import UserError
from ctrkit.recipe import ExtractImages, Feature, Recipe, Source

SOURCES = ("impressions", "clicks", "users", "ads", "goods", "behaviours")
"""The input tables of `[convert]`, by key."""
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSIONS = (".gz", ".zst")


TODAY = "{today}"
"""In a file's name: the day that is converted."""


def for_day(recipe: Recipe, today: datetime.date | None) -> Recipe:
    """Return the recipe with `{today}` in the names of files replaced: by the day, or by any text if it is None."""
    changed = {}
    for name in SOURCES:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None and any(TODAY in p for p in patterns(source)):
            files = tuple(p.replace(TODAY, str(today) if today else "*") for p in patterns(source))
            changed[name] = source.model_copy(update={"files": files})
    return recipe.model_copy(update={"convert": recipe.convert.model_copy(update=changed)}) if changed else recipe


def is_glob(pattern: str) -> bool:
    """Say whether a file name has wildcards."""
    return any(c in pattern for c in "*?[")


def is_url(name: str) -> bool:
    """Say whether a file name is a URL, which polars reads itself."""
    return "://" in name


def patterns(source: Source) -> tuple[str, ...]:
    """Return a source's names, globs, folders and URLs."""
    return (source.files,) if isinstance(source.files, str) else source.files


def source_files(source: Source, raw: Path) -> dict[str, Path]:
    """Return a source's local files, name below `raw` → path: matches of globs and files of folders in order of name,
    and plain names as they are, there or not."""
    found: dict[str, Path] = {}
    for pattern in patterns(source):
        if is_url(pattern):
            continue
        if is_glob(pattern):
            matches = [p for p in sorted(raw.glob(pattern)) if p.is_file() or p.is_dir()]
        else:
            matches = [raw / pattern]
        for path in matches:
            for file in _data_files(path) if path.is_dir() else [path]:
                found[file.relative_to(raw).as_posix() if file.is_relative_to(raw) else pattern] = file
    return found


def _data_files(folder: Path) -> list[Path]:
    """Return the files of a known format below a folder; names that begin with a dot or underline are not data."""
    inner = (p for p in folder.rglob("*") if p.is_file())
    return sorted(
        p
        for p in inner
        if suffix(p.name)[0] in FORMATS and not any(part[0] in "._" for part in p.relative_to(folder).parts)
    )


def is_data(name: str) -> bool:
    """Say whether a file below a folder is data: of a known format, no part of its name begins with . or _."""
    return suffix(name)[0] in FORMATS and not any(part[:1] in (".", "_") for part in name.split("/"))


def suffix(name: str) -> tuple[str, str]:
    """Return the ending that tells the format, and that of the compression, of a file's name: (".csv", ".gz")."""
    suffixes = [s.lower() for s in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def raw_inputs(recipe: Recipe, raw: Path, *sources: str) -> dict[str, Path]:
    """Return the raw files of the named sources (default: all that the recipe has), for provenance.

    Names are "raw/" and the file's path below `raw`. A plain name counts even where no such file is yet. What lies
    behind a URL is known by its name alone.
    """
    found: dict[str, Path] = {}
    for name in sources or SOURCES:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None:
            found.update((f"raw/{inner}", path) for inner, path in source_files(source, raw).items())
    return found


def picture_inputs(pictures: Path, settings: ExtractImages) -> dict[str, Path]:
    """Return what decides the pictures, for provenance: a folder or file, or the files that a glob matches, and the
    index table. Raises UserError if nothing is there."""
    found = {"pictures": pictures}
    if (paths := picture_paths(pictures)) != [pictures]:
        found = {f"pictures/{path.relative_to(glob_root(pictures))}": path for path in paths}
    if settings.index is not None:
        found["picture index"] = index_path(pictures, settings.index)
    return found


def picture_paths(pictures: Path) -> list[Path]:
    """Return the folder or file that `--pictures` names, or what it matches as a glob. Raises UserError if nothing."""
    if pictures.exists():
        if not (pictures.is_dir() or pictures.is_file()):
            raise UserError(f"--pictures {pictures} is neither a folder nor a file, but a pipe, socket or device")
        return [pictures]
    is_pattern = is_glob(str(pictures))
    found = [Path(name) for name in sorted(glob.glob(str(pictures), recursive=True))] if is_pattern else []
    if not found:
        raise UserError(
            f"--pictures {pictures} is not there: it is not a folder, not a file"
            + (", and matches none as a glob" if is_pattern else "")
        )
    return found


def glob_root(pattern: Path) -> Path:
    """Return the folder above the first wildcard of a pattern."""
    root = pattern
    while is_glob(str(root)):
        root = root.parent
    return root


def index_path(pictures: Path, index: str) -> Path:
    """Return where `extract-images.index` lies: below the pictures folder, or beside the archives."""
    if pictures.exists():
        return (pictures if pictures.is_dir() else pictures.parent) / index
    return glob_root(pictures) / index


def fields(feature: Feature) -> list[str]:
    """Return the columns that a feature is made from: one, or those of its template, in order."""
    if "{" not in feature.column:
        return [feature.column]
    return [field for _, field, _, _ in string.Formatter().parse(feature.column) if field]
