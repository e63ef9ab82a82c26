"""How ids name pictures: by a template of their paths, or by a table that gives each one's path."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import polars as pl

from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.pictures import BadPicture, extensions
from ctrkit.progress import say
from ctrkit.recipe import ExtractImages

Unnamed = list[tuple[str, str]]
"""Of pictures that have no id: where they are, and why."""
NO_ID = "no id"


class Names(Protocol):
    """How ids name pictures."""

    unnamed: "Unnamed"

    def inner(self, image: str) -> str:
        """Return the path of a picture. Raises BadPicture if there is none."""

    def images(self, inner: Iterable[str], any_ending: bool = False) -> list[str]:
        """Return the ids of the pictures among these paths; any_ending: of all."""


class Template:
    """Ids are part of the paths, as `extract-images.template` says."""

    def __init__(self, template: str) -> None:
        self._prefix, mark, self._suffix = template.partition("{image}")
        if not mark:
            raise UsageError(f"extract-images.template = {template!r} does not contain {{image}}, the id")
        self._template = template
        self.unnamed: Unnamed = []

    def inner(self, image: str) -> str:
        """Return the path of a picture."""
        return self._template.replace("{image}", image)

    def images(self, inner: Iterable[str], any_ending: bool = False) -> list[str]:
        """Return the ids of the pictures among these paths; any_ending: of all."""
        prefix, suffix = self._prefix, self._suffix
        found = []
        for path in inner:
            fits = path.startswith(prefix) and path.endswith(suffix) and len(path) > len(prefix) + len(suffix)
            if fits and (any_ending or os.path.splitext(path)[1].lower() in extensions()):
                found.append(path[len(prefix) : len(path) - len(suffix)])
        return found


class Index:
    """A table gives each id's path."""

    def __init__(self, path: Path, settings: ExtractImages) -> None:
        columns = {"id_column": settings.id_column, "path_column": settings.path_column}
        if path.exists() and not path.is_file():
            raise UserError(f"{path} (extract-images.index) is not a file")
        try:
            if path.suffix.lower() in (".parquet", ".pq"):
                known = list(pl.read_parquet_schema(path))
            else:
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                known = pl.read_csv(path, separator=separator, n_rows=0, infer_schema=False).columns
            for key, column in columns.items():
                if column not in known:
                    raise UsageError(
                        f"{path} (extract-images.index) has no column {column!r}{_end(nearest(column, known))} Name it "
                        f"with extract-images.{key}"
                    )
            wanted = list(columns.values())
            if path.suffix.lower() in (".parquet", ".pq"):
                table = pl.read_parquet(path, columns=wanted)
            else:
                table = pl.read_csv(path, separator=separator, columns=wanted, infer_schema=False)
            id_, path_ = (pl.col(name).cast(pl.String).replace("", None) for name in wanted)
            table = table.select(id_.alias("id"), path_.alias("path"))
        except (OSError, pl.exceptions.PolarsError) as e:
            raise UserError(f"{path} (extract-images.index) cannot be read: {str(e).splitlines()[0]}") from None
        nameless = table.with_row_index("row", 1).filter(pl.col("id").is_null()).select("row", "path").iter_rows()
        self.unnamed: Unnamed = [
            (f"row {row} of {path.name}" + f": {inner}" * (inner is not None), NO_ID) for row, inner in nameless
        ]
        table = table.drop_nulls("id")
        say_repeats(path, table.height - table["id"].n_unique(), "the first")
        # Of repeated ids the first row with a path stays.
        table = pl.concat([table.filter(pl.col("path").is_null()), table.drop_nulls("path").reverse()])
        self._paths: dict[str, str | None] = dict(zip(table["id"], table["path"], strict=True))

    def inner(self, image: str) -> str:
        """Return the path of a picture. Raises BadPicture if the table has none."""
        if image not in self._paths:
            raise BadPicture("not in the index")
        inner = self._paths[image]
        if inner is None:
            raise BadPicture("no path in the index")
        return inner

    def images(self, inner: Iterable[str], any_ending: bool = False) -> list[str]:
        """Return all ids of the table, whatever the paths."""
        return list(self._paths)


def say_repeats(path: Path, repeated: int, which: str) -> None:
    if repeated:
        say(f"extract-images: {path}: {repeated:,} names of pictures are there before; {which} of each counts")


def in_order(images: list[str]) -> tuple[list[str], Unnamed]:
    """Return the ids sorted, and apart from them those that are not text."""
    good, bad = [], []
    for image in images:
        try:
            image.encode()
            good.append(image)
        except UnicodeEncodeError:
            bad.append((os.fsencode(image).decode("utf-8", "backslashreplace"), "the name is not UTF-8; rename it"))
    return sorted(good), sorted(bad)


def _end(hint: str) -> str:
    return hint if hint.endswith("?") else hint + "."


def inner_or_none(names: Names, image: str) -> str:
    """Return the path of a picture; "" if there is none."""
    try:
        return names.inner(image)
    except BadPicture:
        return ""
