"""Vectors made elsewhere → features.h5, in memory that holds the ids but never the vectors.

The ids are read first, and each gets its row: most used first. Then the vectors are read in the order of their files,
and each is written to its row. Where some turn out to be unusable, it is done once more without them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import files, hdf5, provenance
from ctrkit.errors import UserError
from ctrkit.progress import Meter, say
from ctrkit.recipe import ImportFeatures
from ctrkit.vector_files import Batch, VectorFile

Int = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]

LARGEST = float(np.finfo(np.float16).max)
AGAIN = "the id is there before"
SHOWN = 3
"""Reasons, and examples of each, in an error."""


def read_wanted(path: Path) -> pl.DataFrame:
    """Return the pictures of `vocab/image.parquet`: `image` String and `place` Int64, in order of use, most first."""
    if not path.is_file():
        raise UserError(f"{path} is not there: has the recipe a feature of kind 'image', and is convert done?")
    try:
        table = pl.read_parquet(path, columns=["value", "index", "count"])
    except (pl.exceptions.PolarsError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not a vocabulary (value, index, count): {reason}") from None
    by_use = table.sort("count", "index", descending=[True, False])
    return by_use.select(pl.col("value").alias("image")).with_row_index("place").cast({"place": pl.Int64})


def import_vectors(
    sources: Sequence[VectorFile],
    settings: ImportFeatures,
    wanted: pl.DataFrame | None,
    target: Path,
    out: Path,
    attributes: Mapping[str, str],
) -> dict[str, Any]:
    """Write features.h5 (see docs/formats.md) of vectors that were made elsewhere.

    Parameters
    ----------
    sources: of the vectors; of an id that is there several times the first usable one counts.
    wanted: what `read_wanted` returns; None for every vector, in the order in which they come.
    target: what the output will be called; `TARGET.rejects.parquet` is written beside it.
    out: where to write features.h5 now.
    attributes: of the file, besides the usual ones.

    Returns the counts for the sidecar. Raises UserError if more is missing or bad than `max_bad_rate`.
    """
    width = _width(sources)
    found = _Found(sources, settings, wanted)
    bad = pl.DataFrame(schema=_BAD)
    while True:
        chosen = found.choose(bad)
        if found.too_many(chosen, bad):
            bad = _all_bad(found, sources, bad)  # so that the error is of all
            raise found.refusal(found.choose(bad), bad)
        images = (wanted if wanted is not None else chosen).select("image")
        row = images.join(chosen.select("image", "to"), on="image", how="left", maintain_order="left")["to"]
        _write_frame(out, images["image"], row.fill_null(-1).to_numpy(), (chosen.height, width), attributes)
        clipped, worse = _write_vectors(sources, chosen, out, width)
        if worse.is_empty():
            break
        say(f"import-features: {worse.height:,} vectors cannot be used; once more without them")
        bad = pl.concat([bad, worse])
    rejects = found.rejects(chosen, bad)
    with files.atomic(target.with_name(target.name + ".rejects.parquet")) as tmp:
        rejects.write_parquet(tmp)
    return {
        "vectors": sum(source.rows for source in sources),
        "pictures": images.height,
        "with a vector": chosen.height,
        "rejected": rejects.height,
        "without an id": found.nameless.height,
        "ids again": found.known.height - bad.height - chosen.height,
        "ids that are not in the vocabulary": found.strangers,
        "rows": chosen.height,
        "width": width,
        "values clipped": clipped,
    }


def _width(sources: Sequence[VectorFile]) -> int:
    """Return the width of all vectors."""
    with_some = [source for source in sources if source.rows and source.width]
    if not with_some:
        raise UserError(f"{', '.join(str(s.path) for s in sources)}: there is no vector in it")
    first = with_some[0]
    for other in with_some:
        if other.width != first.width:
            raise UserError(
                f"{first.path} has vectors of {first.width:,} numbers, and {other.path} of {other.width:,}; one "
                "features.h5 holds vectors of one width, so import them into two files"
            )
    return first.width


_BAD = {"file": pl.Int64, "from": pl.Int64, "reason": pl.String}


class _Found:
    """The vectors that are there, by their ids.

    Attributes
    ----------
    known: `image`, `file` and `from` (row in it, from 0) of every vector that is wanted, in the order of the files.
    nameless: `file` and `from` of those without an id.
    strangers: how many have an id that the vocabulary does not know.
    """

    def __init__(self, sources: Sequence[VectorFile], settings: ImportFeatures, wanted: pl.DataFrame | None) -> None:
        self.sources, self.settings, self.wanted = sources, settings, wanted
        before, _, after = settings.template.partition("{id}")
        known, nameless = [], []
        self.strangers, self.stranger = 0, ""
        for number, source in enumerate(sources):
            at = 0
            for ids in source.ids():
                batch = pl.DataFrame({"id": ids}).select(
                    (pl.lit(before) + pl.col("id") + pl.lit(after)).alias("image"),
                    pl.lit(number, pl.Int64).alias("file"),
                    pl.int_range(at, at + pl.len(), dtype=pl.Int64).alias("from"),
                )
                at += ids.len()
                batch = batch.with_columns(pl.when(~pl.col("image").str.contains("\0", literal=True)).then("image"))
                nameless.append(batch.filter(pl.col("image").is_null()).drop("image"))
                batch = batch.drop_nulls("image")
                if wanted is not None:
                    strangers = batch.join(wanted, on="image", how="anti", maintain_order="left")
                    self.strangers += strangers.height
                    self.stranger = self.stranger or (strangers["image"][0] if strangers.height else "")
                    batch = batch.join(wanted, on="image", how="semi", maintain_order="left")
                known.append(batch)
        self.known, self.nameless = pl.concat(known, rechunk=True), pl.concat(nameless, rechunk=True)
        if wanted is not None and wanted.height and self.strangers and not self.known.height:
            raise UserError(
                f"no vector is of a picture of the vocabulary: the {self.strangers:,} vectors have ids such as "
                f"{self.stranger!r}, the vocabulary {wanted['image'][0]!r}. import-features.template "
                f"({settings.template!r} now) makes the one of the other: --set 'import-features.template={{id}}.jpg'"
            )

    def choose(self, bad: pl.DataFrame) -> pl.DataFrame:
        """Return the vectors to take, with `to`, the row that each gets: the first of each id that is not bad."""
        usable = self.known.join(bad, on=["file", "from"], how="anti", maintain_order="left")
        first = usable.filter(pl.col("image").is_first_distinct())
        if self.wanted is not None:
            first = first.join(self.wanted, on="image", how="inner").sort("place").drop("place")
        return first.with_row_index("to").cast({"to": pl.Int64})

    def rejects(self, chosen: pl.DataFrame, bad: pl.DataFrame) -> pl.DataFrame:
        """Return what became nothing: vectors in the order of the files, then pictures without one.

        Columns `image`, `path`, `row` (in the file, from 1), `reason`."""
        keys = ["file", "from"]
        again = self.known.join(bad, on=keys, how="anti").join(chosen, on=keys, how="anti")
        again = again.join(chosen.select("image", first="file", first_row=pl.col("from") + 1), on="image")
        where = pl.format(AGAIN + ", in row {} of {}", "first_row", self._paths.gather(again["first"]))
        vectors = pl.concat(
            [
                self.nameless.select(_none("image", pl.String), *keys, reason=pl.lit("no id")),
                bad.join(self.known, on=keys).select("image", *keys, "reason"),
                again.select("image", *keys, reason=where),
            ]
        ).sort(keys)
        missing = self._missing(chosen).join(vectors.drop_nulls("image"), on="image", how="anti", maintain_order="left")
        return pl.concat(
            [
                vectors.select(
                    "image", self._paths.gather(vectors["file"]).alias("path"), row=pl.col("from") + 1, reason="reason"
                ),
                missing.select(
                    "image", _none("path", pl.String), _none("row", pl.Int64), reason=pl.lit("no vector of this id")
                ),
            ]
        )

    @property
    def _paths(self) -> pl.Series:
        return pl.Series("path", [source.path.name for source in self.sources], pl.String)

    def _missing(self, chosen: pl.DataFrame) -> pl.DataFrame:
        """Return the pictures of the vocabulary, `image`, that get no vector."""
        if self.wanted is None:
            return chosen.select("image").clear()
        return self.wanted.select("image").join(chosen, on="image", how="anti", maintain_order="left")

    def _rate(self, chosen: pl.DataFrame, bad: pl.DataFrame) -> tuple[int, int]:
        """Return how many pictures of the vocabulary have no vector, or vectors cannot be used, of how many."""
        if self.wanted is not None:
            return self._missing(chosen).height, self.wanted.height
        return bad.height + self.nameless.height, self.known.height + self.nameless.height

    def too_many(self, chosen: pl.DataFrame, bad: pl.DataFrame) -> bool:
        """Say whether too many are bad. Raises UserError if there is nothing at all."""
        number, total = self._rate(chosen, bad)
        if not total:
            raise UserError("there is nothing to import: no picture in the vocabulary, or no vector in the files")
        return number > self.settings.max_bad_rate * total or not chosen.height

    def refusal(self, chosen: pl.DataFrame, bad: pl.DataFrame) -> UserError:
        """Return the error for too many bad ones. bad: all of them."""
        number, total = self._rate(chosen, bad)
        missing = self._missing(chosen)
        what = "vectors cannot be used" if self.wanted is None else "pictures of the vocabulary have no usable vector"
        all_rejects = self.rejects(chosen, bad)
        is_again = pl.col("reason").str.starts_with(AGAIN)
        rejects = all_rejects.filter(~is_again)
        repeated = all_rejects.height - rejects.height if self.wanted is None else 0
        again = f" Besides, {repeated:,} have an id that is there before." * bool(repeated)
        if self.wanted is not None:
            rejects = rejects.join(missing, on="image", how="semi", maintain_order="left")
            rejects = rejects.unique("image", keep="first", maintain_order=True)
        kinds = rejects.group_by("reason", maintain_order=True).agg(pl.len().alias("n"), "image", "path", "row")
        told = "; ".join(
            f"{kind['n']:,} × {kind['reason']} (such as {_examples(kind)})"
            for kind in kinds.sort("n", descending=True, maintain_order=True).head(SHOWN).to_dicts()
        )
        strangers = f" {self.strangers:,} vectors have ids that it does not know, such as {self.stranger!r}."
        return UserError(
            f"{number:,} of {total:,} {what} ({number / total:.1%}), more than import-features.max_bad_rate = "
            f"{self.settings.max_bad_rate:g} allows: {told}.{again}{strangers * bool(self.strangers)} Check the "
            "files and import-features.template, or raise max_bad_rate."
        )


def _none(name: str, kind: type[pl.DataType]) -> pl.Expr:
    return pl.lit(None, kind).alias(name)


def _examples(kind: Mapping[str, Any]) -> str:
    """Name the first few of a kind of rejects."""
    named = [
        image or f"row {row} of {path}"
        for image, path, row in zip(kind["image"], kind["path"], kind["row"], strict=True)
    ]
    return ", ".join(named[:SHOWN])


def _write_frame(out: Path, images: pl.Series, row: Int, shape: tuple[int, int], attributes: Mapping[str, str]) -> None:
    """Write a features.h5 that is complete but for the numbers of its vectors, for which there is room."""
    texts = int(images.str.len_bytes().sum()) + 16 * images.len()  # and where HDF5 finds each
    with hdf5.create(out) as (h5, below):
        below.reserve(max(1, shape[0] * shape[1] * 2 + texts + row.nbytes))
        try:
            _write_all_but_vectors(h5, images, row, shape, attributes)
        except (OSError, RuntimeError):
            below.check()  # HDF5 stumbles over what could not be written
            raise
        below.check()


def _write_all_but_vectors(
    h5: Any, images: pl.Series, row: Int, shape: tuple[int, int], attributes: Mapping[str, str]
) -> None:
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    early.set_obj_track_times(False)  # the same bytes again tomorrow
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(h5.id, b"features", h5py.h5t.IEEE_F16LE, space, early)
    data = h5.create_dataset("image", images.len(), h5py.string_dtype("utf-8"))
    for begin in range(0, images.len(), 1 << 18):
        some = images.slice(begin, 1 << 18).str.replace_all("\0", "\ufffd", literal=True)  # no NUL in HDF5's texts
        data[begin : begin + some.len()] = np.array(some.to_list(), dtype=object)
    h5.create_dataset("row", data=row)
    for name, value in attributes.items():
        h5.attrs[name] = value
    h5.attrs["versions"] = json.dumps(provenance.versions(), sort_keys=True)


def _write_vectors(
    sources: Sequence[VectorFile], chosen: pl.DataFrame, out: Path, width: int
) -> tuple[int, pl.DataFrame]:
    """Write each chosen vector to its row. Return how many values were clipped, and which vectors are bad."""
    with h5py.File(out, "r") as h5:
        offset = h5["features"].id.get_offset()
    clipped, bad = 0, []
    with open(out, "rb+", buffering=0) as file, Meter("import-features", chosen.height, "vectors") as meter:
        if chosen.height:
            os.posix_fallocate(file.fileno(), offset, chosen.height * width * 2)  # a full disk shows now
        for to, batch, worse in _read(sources, chosen):
            bad += list(worse.values())
            fine = np.ones(len(batch.vectors), np.bool_)
            fine[list(worse)] = False
            half, beyond = _halve(batch.vectors[fine])
            clipped += beyond
            _write_rows(file.fileno(), offset, to[fine], half)
            meter.add(len(batch.vectors))
    return clipped, pl.DataFrame(bad, schema=_BAD, orient="row")


def _read(
    sources: Sequence[VectorFile], chosen: pl.DataFrame
) -> Iterator[tuple[Int, Batch, dict[int, tuple[int, int, str]]]]:
    """Yield the chosen vectors in batches: the row that each gets, the vectors, and the bad ones by their place."""
    for (number,), part in chosen.sort("file", "from").group_by("file", maintain_order=True):
        to, rows = part["to"].to_numpy(), part["from"].to_numpy()
        for batch in sources[int(str(number))].read(rows):
            here = slice(batch.begin, batch.begin + len(batch.vectors))
            finite = np.isfinite(batch.vectors).all(axis=1)
            reasons = dict.fromkeys(np.flatnonzero(~finite).tolist(), "numbers that are missing, infinite or NaN")
            reasons |= batch.faults
            bad = {place: (int(str(number)), int(rows[here][place]), why) for place, why in sorted(reasons.items())}
            yield to[here], batch, bad


def _all_bad(found: "_Found", sources: Sequence[VectorFile], bad: pl.DataFrame) -> pl.DataFrame:
    """Return all vectors that cannot be used, those in `bad` first, without writing any."""
    while True:
        chosen, worse = found.choose(bad), []
        with Meter("import-features: look at vectors", chosen.height, "vectors") as meter:
            for _, batch, some in _read(sources, chosen):
                worse += list(some.values())
                meter.add(len(batch.vectors))
        if not worse:
            return bad
        bad = pl.concat([bad, pl.DataFrame(worse, schema=_BAD, orient="row")])


def _halve(vectors: npt.NDArray[Any]) -> tuple[Half, int]:
    """Return numbers as float16, clipped to its range, and how many were beyond it."""
    beyond = int(np.count_nonzero((vectors > LARGEST) | (vectors < -LARGEST)))
    if beyond:
        vectors = vectors.clip(-LARGEST, LARGEST)
    return vectors.astype("<f2"), beyond


def _write_rows(fd: int, offset: int, rows: Int, vectors: Half) -> None:
    """Write vectors to their rows of a file, neighbours together."""
    order = np.argsort(rows)
    rows, vectors = rows[order], vectors[order]
    for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            data = vectors[run[0] : run[-1] + 1].tobytes()
            at = offset + int(rows[run[0]]) * vectors.shape[1] * 2
            while data:
                written = os.pwrite(fd, data, at)
                data, at = data[written:], at + written
