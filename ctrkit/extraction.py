"""Pictures → features.h5: each distinct picture through the network once, in parts that survive a kill.

Finished parts lie in a hidden folder beside the target, `.NAME.parts-KEY/`, and are joined at the end. KEY is
a digest of everything that decides their values: a rerun takes up what is still right and nothing else.
Batches are cut by position alone, never by what was done before: a picture's vector is the same to the bit
whether the run was killed or not.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ctrkit import files, pictures, provenance
from ctrkit.backbones import Backbone
from ctrkit.errors import UserError
from ctrkit.pictures import BadPicture, Contents, Pixels
from ctrkit.progress import Meter, say
from ctrkit.recipe import ExtractImages

Int = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]

PART_PICTURES = 512
PART_SECONDS = 30.0
"""A part is closed when it has so many pictures, or has been open so long."""
BATCHES_AHEAD = 2
"""Batches that are decoded while the network works on one."""
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Vocabulary:
    """The pictures to extract, in the order of their indexes."""

    images: list[str]
    counts: Int
    """[pictures]: times seen in training."""


def read_vocabulary(path: Path) -> Vocabulary:
    """Read `vocab/image.parquet` (value, index, count)."""
    if not path.is_file():
        raise UserError(f"{path} is not there: has the recipe a feature of kind 'image', and is convert done?")
    try:
        table = pl.read_parquet(path, columns=["value", "index", "count"]).sort("index")
    except (pl.exceptions.PolarsError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not a vocabulary (value, index, count): {reason}") from None
    return Vocabulary(table["value"].to_list(), table["count"].cast(pl.Int64).to_numpy())


def whole_folder(folder: Path, template: str) -> Vocabulary:
    """Return every picture below a folder, in the order of their names, as a vocabulary without counts."""
    images = pictures.find(folder, template)
    return Vocabulary(images, np.zeros(len(images), dtype=np.int64))


def extract(
    network: Backbone, settings: ExtractImages, folder: Path, vocabulary: Vocabulary, target: Path, out: Path
) -> dict[str, int | str]:
    """Extract every picture of the vocabulary and write features.h5 (see docs/formats.md).

    Parameters
    ----------
    network: the backbone, at its device and dtype.
    settings: the recipe's `[extract-images]`.
    folder: of the pictures.
    target: what the output will be called; parts lie beside it, and `TARGET.rejects.parquet` is written.
    out: where to write features.h5 now.

    Returns the counts for the sidecar. Raises UserError if there are more bad pictures than `max_bad_rate`.
    """
    images = vocabulary.images
    if not images:
        raise UserError(f"there are no pictures to extract: none in the vocabulary, or none in {folder}")
    with pictures.quiet():
        contents = pictures.distinct(folder, settings.template, images)
        bad = _Bad(images, settings.max_bad_rate)
        for number, reason in sorted(contents.reasons.items()):
            bad.add([number], reason)
        bad.check()
        order = _by_use(contents, vocabulary.counts)
        parts = target.with_name(f".{target.name}.parts-{_key(network, settings, contents, order)}")
        clipped = _extract_parts(network, settings, contents, order, bad, parts)
    row_of_content, rows = _join(parts, order, network, settings, out)
    row = np.where(contents.content >= 0, row_of_content[contents.content], -1)
    _write_map(out, images, row)
    rejects = sorted(bad.reasons.items())
    with files.atomic(target.with_name(target.name + ".rejects.parquet")) as tmp:
        pl.DataFrame(
            {
                "image": [images[number] for number, _ in rejects],
                "path": [settings.template.replace("{image}", images[number]) for number, _ in rejects],
                "reason": [reason for _, reason in rejects],
            },
            schema={"image": pl.String, "path": pl.String, "reason": pl.String},
        ).write_parquet(tmp)
    return {
        "pictures": len(images),
        "with a vector": int((row >= 0).sum()),
        "rejected": len(rejects),
        "rows": rows,
        "width": network.width,
        "values clipped": clipped,
        "weights": network.weights,
    }


def remove_parts(target: Path) -> None:
    """Remove the parts of `target`, once it is there."""
    for parts in target.parent.glob(f".{target.name}.parts-*"):
        files.remove(parts)


class _Bad:
    """Unusable pictures and why; too many are an error."""

    def __init__(self, images: Sequence[str], max_rate: float) -> None:
        self.images, self.max_rate = images, max_rate
        self.reasons: dict[int, str] = {}

    def add(self, numbers: Sequence[int], reason: str) -> None:
        """Record that these pictures cannot be used."""
        self.reasons.update(dict.fromkeys(numbers, reason))

    def check(self) -> None:
        """Raise UserError if there are too many."""
        bad, total = len(self.reasons), len(self.images)
        if bad <= self.max_rate * total:
            return
        kinds: dict[str, list[str]] = {}
        for number, reason in sorted(self.reasons.items()):
            kinds.setdefault(reason, []).append(self.images[number])
        common = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))[:3]
        told = "; ".join(f"{len(of):,} {reason} (such as {', '.join(of[:3])})" for reason, of in common)
        raise UserError(
            f"{bad:,} of {total:,} pictures ({bad / total:.1%}) cannot be used, more than "
            f"extract-images.max_bad_rate = {self.max_rate:g} allows: {told}. Check --pictures and "
            "extract-images.template, or raise max_bad_rate."
        )


def _by_use(contents: Contents, counts: Int) -> Int:
    """Return the distinct contents by how often training uses them, most first; ties by first index."""
    usable = contents.content >= 0
    uses = np.zeros(len(contents.paths), dtype=np.int64)
    np.add.at(uses, contents.content[usable], counts[usable])
    return np.argsort(-uses, kind="stable").astype(np.int64)


def _key(network: Backbone, settings: ExtractImages, contents: Contents, order: Int) -> str:
    h = hashlib.blake2b(digest_size=8)
    device = next(network.parameters()).device.type
    config = settings.model_dump(mode="json", include={"backbone", "size", "dtype", "batch"})
    made_by = [provenance.code_digest("extract-images"), provenance.versions()]
    h.update(json.dumps([config, network.weights, device, made_by], sort_keys=True).encode())
    for content in order.tolist():
        h.update(contents.digests[content].encode())
    return h.hexdigest()


def _extract_parts(
    network: Backbone, settings: ExtractImages, contents: Contents, order: Int, bad: _Bad, parts: Path
) -> int:
    """Do what no part holds yet; return how many values were clipped, earlier parts' included."""
    sharing: dict[int, list[int]] = {}
    for number, content in enumerate(contents.content.tolist()):
        sharing.setdefault(content, []).append(number)
    clipped = done = 0
    for path in _part_files(parts):
        with np.load(path) as part:
            done = int(part["end"])
            clipped += int(part["clipped"])
            for place, reason in zip(part["bad"].tolist(), part["reasons"].tolist(), strict=True):
                bad.add(sharing[order[place]], reason)
    bad.check()
    if done:
        say(f"extract-images: {done:,} of {len(order):,} pictures were done before")
    paths = [contents.paths[content] for content in order.tolist()]
    with (
        ThreadPoolExecutor(pictures.THREADS) as pool,
        Meter("extract-images", len(paths) - done, "pictures") as meter,
    ):
        part = _Part(done)
        for batch in _decoded(paths, settings, done, pool):
            part.add(batch, network)
            for place, reason in part.bad.items():
                bad.add(sharing[order[place]], reason)
            bad.check()
            if part.is_full() or part.end == len(paths):
                part.write(parts)
                clipped += part.clipped
                part = _Part(part.end)
            meter.add(len(batch))
    return clipped


def _part_files(parts: Path) -> list[Path]:
    return sorted(parts.glob("part-*.npz"))


def _decoded(
    paths: Sequence[Path], settings: ExtractImages, start: int, pool: ThreadPoolExecutor
) -> Iterator[list[Pixels | BadPicture]]:
    """Yield the pictures from `start` on in batches, decoding ahead."""

    def decode(path: Path) -> Pixels | BadPicture:
        try:
            return pictures.decode(pictures.read(path), settings.size)
        except BadPicture as bad:
            return bad

    ahead: deque[list[Future[Pixels | BadPicture]]] = deque()
    for begin in range(start, len(paths), settings.batch):
        ahead.append([pool.submit(decode, path) for path in paths[begin : begin + settings.batch]])
        if len(ahead) > BATCHES_AHEAD:
            yield [future.result() for future in ahead.popleft()]
    while ahead:
        yield [future.result() for future in ahead.popleft()]


class _Part:
    """Vectors of consecutive places in the order of use, and which of those places hold no usable picture."""

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self.clipped = 0
        self.bad: dict[int, str] = {}
        self._vectors: list[Half] = []
        self._opened = time.monotonic()

    def add(self, batch: Sequence[Pixels | BadPicture], network: Backbone) -> None:
        """Send a batch through the network."""
        good = [picture for picture in batch if not isinstance(picture, BadPicture)]
        self.bad.update({self.end + n: str(p) for n, p in enumerate(batch) if isinstance(p, BadPicture)})
        if good:
            x = torch.from_numpy(np.stack(good)).to(network.mean.device)
            with torch.inference_mode():
                vectors = network(x).cpu().numpy()
            if not np.isfinite(vectors).all():
                raise UserError(
                    "the network gives values that are not numbers; its weights are broken, or too large for "
                    'extract-images.dtype: try dtype = "float32" or other weights'
                )
            self.clipped += int((np.abs(vectors) > LARGEST).sum())
            self._vectors.append(vectors.clip(-LARGEST, LARGEST).astype(np.float16))
        else:
            self._vectors.append(np.empty((0, network.width), dtype=np.float16))
        self.end += len(batch)

    def is_full(self) -> bool:
        """Say whether it is time to close the part."""
        return self.end - self.begin >= PART_PICTURES or time.monotonic() - self._opened >= PART_SECONDS

    def write(self, parts: Path) -> None:
        """Write the part under its final name, whole or not at all."""
        with files.atomic(parts / f"part-{self.begin:012d}.npz") as tmp, open(tmp, "wb") as f:
            np.savez(
                f,
                end=np.int64(self.end),
                clipped=np.int64(self.clipped),
                features=np.concatenate(self._vectors),
                bad=np.array(sorted(self.bad), dtype=np.int64),
                reasons=np.array([self.bad[place] for place in sorted(self.bad)], dtype=np.str_),
            )


def _join(parts: Path, order: Int, network: Backbone, settings: ExtractImages, out: Path) -> tuple[Int, int]:
    """Write all parts into one HDF5 file; return each content's row (−1: none) and the number of rows."""
    usable = np.ones(len(order), dtype=np.bool_)
    for path in _part_files(parts):
        with np.load(path) as part:
            usable[part["bad"]] = False
    rows = int(usable.sum())
    row_of_content = np.full(len(order), -1, dtype=np.int64)
    row_of_content[order[usable]] = np.arange(rows)
    with h5py.File(out, "w") as h5:
        features = h5.create_dataset("features", (rows, network.width), dtype=np.float16)
        begin = 0
        for path in _part_files(parts):
            with np.load(path) as part:
                vectors = part["features"]
            features[begin : begin + len(vectors)] = vectors
            begin += len(vectors)
        h5.attrs["backbone"] = "+".join(layer.model for layer in network.layers)
        h5.attrs["layer"] = "+".join(layer.name + ":flat" * layer.flat for layer in network.layers)
        h5.attrs["weights"] = network.weights
        h5.attrs["dtype"] = settings.dtype
        h5.attrs["preprocessing"] = pictures.preprocessing(settings.size)
        h5.attrs["versions"] = json.dumps(provenance.versions(), sort_keys=True)
    return row_of_content, rows


def _write_map(out: Path, images: Sequence[str], row: Int) -> None:
    with h5py.File(out, "a") as h5:
        h5.create_dataset("image", data=np.array(images, dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=row)
