"""How ids name pictures: by a template of their paths, or by a table that gives each one's path."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from ctrkit.disk_index import NOWHERE, DiskIndex
from ctrkit.disk_texts import AT_ONCE, Texts, batched, sorted_texts
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.pictures import BadPicture, extensions
from ctrkit.progress import say
from ctrkit.recipe import ExtractImages

NO_ID = "no id"
NOT_UTF8 = "the name is not UTF-8; rename it"
WITHOUT_PATH = 1 << 60
"""Added to the number of an index's row that gives no path."""
INDEX_ROWS = 1 << 16
"""Rows of an index table that are in memory at a time, at least."""


class Unnamed:
    """Of pictures that have no id: where they are, and why."""

    def __init__(self, folder: Path | None) -> None:
        self._texts = Texts(folder=folder)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._texts) // 2

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield where each is, and why it has no id."""
        texts = iter(self._texts)
        return zip(texts, texts, strict=True)

    def extend(self, where: Iterable[str], reason: str) -> None:
        """Add pictures that have no id for the same reason."""
        self._texts.extend(text for one in where for text in (one, reason))


class Names(Protocol):
    """How ids name pictures."""

    unnamed: Unnamed

    def inner(self, image: str) -> str:
        """Return the path of a picture. Raises BadPicture if there is none."""

    def images(self, inner: Iterable[str], any_ending: bool = False) -> Iterator[str]:
        """Yield the ids of the pictures among these paths; any_ending: of all."""


class Template:
    """Ids are part of the paths, as `extract-images.template` says."""

    def __init__(self, template: str, folder: Path | None) -> None:
        self._prefix, mark, self._suffix = template.partition("{image}")
        if not mark:
            raise UsageError(f"extract-images.template = {template!r} does not contain {{image}}, the id")
        self._template = template
        self.unnamed = Unnamed(folder)

    def inner(self, image: str) -> str:
        """Return the path of a picture."""
        return self._template.replace("{image}", image)

    def images(self, inner: Iterable[str], any_ending: bool = False) -> Iterator[str]:
        """Yield the ids of the pictures among these paths; any_ending: of all."""
        prefix, suffix = self._prefix, self._suffix
        for path in inner:
            fits = path.startswith(prefix) and path.endswith(suffix) and len(path) > len(prefix) + len(suffix)
            if fits and (any_ending or os.path.splitext(path)[1].lower() in extensions()):
                yield path[len(prefix) : len(path) - len(suffix)]


class Index:
    """A table gives each id's path."""

    def __init__(self, path: Path, settings: ExtractImages, folder: Path | None) -> None:
        columns = {"id_column": settings.id_column, "path_column": settings.path_column}
        if path.exists() and not path.is_file():
            raise UserError(f"{path} (extract-images.index) is not a file")
        try:
            if path.suffix.lower() in (".parquet", ".pq"):
                table = pl.scan_parquet(path, glob=False)
            else:
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                table = pl.scan_csv(path, separator=separator, infer_schema=False, glob=False)
            known = table.collect_schema().names()
            for key, column in columns.items():
                if column not in known:
                    raise UsageError(
                        f"{path} (extract-images.index) has no column {column!r}{_end(nearest(column, known))} Name it "
                        f"with extract-images.{key}"
                    )
            id_, path_ = (pl.col(name).cast(pl.String).replace("", None) for name in columns.values())
            rows = table.select(id_.alias("id"), path_.alias("path"))
            self._read(path, rows.collect_batches(chunk_size=INDEX_ROWS, maintain_order=True), folder)
        except (OSError, pl.exceptions.PolarsError) as e:
            raise UserError(f"{path} (extract-images.index) cannot be read: {str(e).splitlines()[0]}") from None

    def _read(self, path: Path, batches: Iterator[pl.DataFrame], folder: Path | None) -> None:
        self.unnamed = Unnamed(folder)
        self._ids = Texts(folder=folder)
        self._paths = Texts(folder=folder)
        """Of each row with an id."""
        self._row = DiskIndex(folder, last=False)
        """Of repeated ids the first row with a path stays; rows without one count after those."""
        before = 0
        for batch in batches:
            rows = batch.with_row_index("row", before + 1)
            nameless = rows.filter(pl.col("id").is_null()).select("row", "path").iter_rows()
            self.unnamed.extend(
                (f"row {row} of {path.name}" + f": {inner}" * (inner is not None) for row, inner in nameless), NO_ID
            )
            named = rows.drop_nulls("id")
            ids = named["id"].to_list()
            number = np.arange(len(self._ids), len(self._ids) + len(ids))
            self._row.add(ids, number + np.where(named["path"].is_null().to_numpy(), WITHOUT_PATH, 0))
            self._ids.extend(ids)
            self._paths.extend(named["path"].fill_null(""))
            before += len(batch)
        repeated = 0

        def count(numbers: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
            nonlocal repeated
            repeated += len(numbers)

        self._row.finish(count)
        say_repeats(path, repeated, "the first")

    def inner(self, image: str) -> str:
        """Return the path of a picture. Raises BadPicture if the table has none."""
        row = self._row.find(image)
        if row == NOWHERE:
            raise BadPicture("not in the index")
        if row >= WITHOUT_PATH:
            raise BadPicture("no path in the index")
        return self._paths[row]

    def images(self, inner: Iterable[str], any_ending: bool = False) -> Iterator[str]:
        """Yield all ids of the table, whatever the paths."""
        return iter(self._ids)


def say_repeats(path: Path, repeated: int, which: str) -> None:
    if repeated:
        say(f"extract-images: {path}: {repeated:,} names of pictures are there before; {which} of each counts")


def in_order(images: Iterable[str], unnamed: Unnamed, folder: Path | None) -> Texts:
    """Return the different ids, sorted; those that are not text are added to the unnamed."""
    found = Texts(folder=folder)
    before = None
    for some in batched(sorted_texts(images, folder), AT_ONCE):
        # Sorted, so that the same are neighbours.
        good: list[str] = []
        bad: list[str] = []
        for image in some:
            if image != before:
                (good if _is_text(image) else bad).append(image)
            before = image
        found.extend(good)
        unnamed.extend((os.fsencode(image).decode("utf-8", "backslashreplace") for image in bad), NOT_UTF8)
    return found


def _is_text(image: str) -> bool:
    try:
        image.encode()
    except UnicodeEncodeError:
        return False
    return True


def _end(hint: str) -> str:
    return hint if hint.endswith("?") else hint + "."


def inner_or_none(names: Names, image: str) -> str:
    """Return the path of a picture; "" if there is none."""
    try:
        return names.inner(image)
    except BadPicture:
        return ""
