"""Which raw files a recipe names. Imports nothing heavy, so that Make rules can be written from it."""

import string
from pathlib import Path

from ctrkit.recipe import Feature, Recipe, Source

SOURCES = ("impressions", "clicks", "users", "ads", "goods", "behaviours")
"""The input tables of `[convert]`, by key."""


def is_glob(pattern: str) -> bool:
    """Say whether a file name has wildcards."""
    return any(c in pattern for c in "*?[")


def source_files(source: Source, raw: Path) -> dict[str, Path]:
    """Return a source's files, name below `raw` → path: matches of globs in order of name, and plain names as
    they are, there or not."""
    found: dict[str, Path] = {}
    for pattern in (source.files,) if isinstance(source.files, str) else source.files:
        if is_glob(pattern):
            matches = sorted(p for p in raw.glob(pattern) if p.is_file())
            found.update((p.relative_to(raw).as_posix(), p) for p in matches)
        else:
            found[pattern] = raw / pattern
    return found


def raw_inputs(recipe: Recipe, raw: Path, *sources: str) -> dict[str, Path]:
    """Return the raw files of the named sources (default: all that the recipe has), for provenance.

    Names are "raw/" and the file's path below `raw`. A plain name counts even where no such file is yet.
    """
    found: dict[str, Path] = {}
    for name in sources or SOURCES:
        source: Source | None = getattr(recipe.convert, name)
        if source is not None:
            found.update((f"raw/{inner}", path) for inner, path in source_files(source, raw).items())
    return found


def fields(feature: Feature) -> list[str]:
    """Return the columns that a feature is made from: one, or those of its template, in order."""
    if "{" not in feature.column:
        return [feature.column]
    return [field for _, field, _, _ in string.Formatter().parse(feature.column) if field]
