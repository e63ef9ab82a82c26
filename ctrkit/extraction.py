"""Pictures → features.h5: each distinct picture through the network once, a batch at a time, and never again.

Batches that are done lie in a hidden folder beside the target, `.NAME.parts-KEY/` (see batch_log.py), and are joined at
the end. KEY is a digest of everything that decides their values: a rerun takes up what is still right and nothing else.
Batches are cut by position alone, never by what was done before or by whom: a picture's vector is the same to the bit
whether the run was killed or not, and however many ranks share the work.

Several ranks (see ranks.py) have a run of neighbouring batches each, of which each writes a shard, an HDF5 file in
`NAME.shards/`; `features` is then a virtual data set over the shards.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import xxhash
from torch import Tensor

from ctrkit import decoding, files, hdf5, pictures, provenance, shards
from ctrkit.backbones import Backbone
from ctrkit.batch_log import BatchLog, Notes
from ctrkit.decoding import Decoded, Decoder
from ctrkit.errors import UserError
from ctrkit.picture_ids import PictureIds
from ctrkit.pictures import Contents, Pixels, Source
from ctrkit.progress import Meter, say
from ctrkit.ranks import Ranks
from ctrkit.recipe import ExtractImages

Int = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Results = tuple[Tensor, Tensor, Tensor]
"""Of a batch: vectors [n, width] float16, how many values were clipped, whether all were finite."""

Bad = dict[int, tuple[int, str]]
"""Place in the order of use → the content there, and why it cannot be used."""

LARGEST = float(np.finfo(np.float16).max)
SLICE = 1 << 16
"""Pictures whose ids are written at a time."""
WORTH_SHOWING = 1 << 28
"""Values whose writing takes long enough to be watched."""
NOT_IN_KEY = {"device", "threads", "workers", "folder", "template", "max_bad_rate", "weights", "seed"}
"""Settings that do not decide a vector's value, or do so through what else is in the key."""


@dataclass(frozen=True)
class Vocabulary:
    """The pictures to extract, in the order of their indexes."""

    images: Sequence[str]
    counts: Int
    """[pictures]: times seen in training."""
    whole: bool = False
    """Whether it is every picture of the source, so that those without an id count among the bad ones."""


def read_vocabulary(path: Path) -> Vocabulary:
    """Read `vocab/image.parquet` (value, index, count)."""
    if not path.is_file():
        raise UserError(f"{path} is not there: has the recipe a feature of kind 'image', and is convert done?")
    try:
        table = pl.read_parquet(path, columns=["value", "index", "count"]).sort("index")
    except (pl.exceptions.PolarsError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not a vocabulary (value, index, count): {reason}") from None
    return Vocabulary(PictureIds(table["value"]), table["count"].cast(pl.Int64).to_numpy())


def whole_source(source: Source) -> Vocabulary:
    """Return every picture there is, in the order of their names, as a vocabulary without counts."""
    images = PictureIds(source.find())
    return Vocabulary(images, np.zeros(len(images), dtype=np.int64), whole=True)


def extract(
    network: Backbone,
    settings: ExtractImages,
    source: Source,
    vocabulary: Vocabulary,
    target: Path,
    out: Path | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Extract every picture of the vocabulary and write features.h5 (see docs/formats.md).

    Parameters
    ----------
    network: the backbone, at its device and dtype.
    settings: the recipe's `[extract-images]`.
    source: of the pictures.
    target: what the output will be called; parts and shards lie beside it, and `TARGET.rejects.parquet` is written.
    out: where to write features.h5 now. None on all ranks but the first.
    ranks: which of several processes this is. All call this function with the same arguments, but for `out`.

    Returns the counts for the sidecar; on other ranks than the first, nothing. Raises UserError if there are more bad
    pictures than `max_bad_rate`.
    """
    images = vocabulary.images
    if not images:
        raise UserError("there are no pictures to extract: none in the vocabulary, or none in --pictures")
    with pictures.quiet():
        contents = _distinct(source, images, ranks)
        bad = _Bad(images, contents, settings.max_bad_rate, source.unnamed if vocabulary.whole else ())
        bad.check()
        order = _by_use(contents, vocabulary.counts)
        key = _key(network, settings, contents, order)
        if any(other != key for other in ranks.gather(key)):
            raise UserError(
                f"rank {ranks.rank} of {ranks.count} sees other pictures, weights, settings or versions than another "
                "one; give all of them the same command, files that all see, and the same installation"
            )
        share = ranks.share(-(-len(order) // settings.batch))
        parts = target.with_name(f".{target.name}.parts-{key}")
        with BatchLog(parts, network.width, share.start, share.stop) as log:
            clipped = _extract_missing(log, network, settings, contents, order, bad, ranks)
            shares = ranks.gather((bad.places, clipped))
            for places, _ in shares:
                bad.add(places)
            bad.check()
            shard = _write_shard(log, network, settings, target, key, ranks) if ranks.count > 1 else None
            written = [of_rank for of_rank in ranks.gather(shard) if of_rank is not None]
            if out is None:
                return {}
            row = _rows(contents, order, bad)
            with hdf5.create(out) as (h5, below):
                if written:
                    _write_virtual(h5, written, network.width)
                else:
                    _write_features(h5, below, log, ranks)
                _write_attributes(h5, network, settings)
                _write_map(h5, below, images, row)
    _write_rejects(bad, source, target)
    return {
        "pictures": len(images),
        "with a vector": int((row >= 0).sum()),
        "rejected": len(bad.reasons) + len(source.unnamed),
        "without an id": len(source.unnamed),
        "rows": len(order) - len(bad.places),
        "width": network.width,
        "values clipped": sum(clipped for _, clipped in shares),
        "weights": network.weights,
        **({"shards": [shard.path for shard in written]} if written else {}),
    }


def remove_parts(target: Path) -> None:
    """Remove the parts of `target`, once it is there, and the shards that are not of it."""
    for parts in target.parent.glob(f".{target.name}.parts-*"):
        files.remove(parts)
    shards.remove_others(target)


class _Bad:
    """Unusable pictures and why; too many are an error."""

    def __init__(
        self, images: Sequence[str], contents: Contents, max_rate: float, unnamed: Sequence[tuple[str, str]]
    ) -> None:
        self.images, self.max_rate, self.unnamed = images, max_rate, unnamed
        self.reasons = contents.reasons
        """Picture → why."""
        self.places: Bad = {}
        """Those that could be read, but not be decoded."""
        self._content = contents.content
        self._by_content: Int | None = None

    def add(self, places: Bad) -> None:
        """Record that contents cannot be used."""
        if places and self._by_content is None:
            self._by_content = np.argsort(self._content, kind="stable")
        for place, (content, reason) in places.items():
            if place not in self.places:
                self.places[place] = (content, reason)
                first, last = np.searchsorted(self._content, [content, content + 1], sorter=self._by_content)
                self.reasons.update(dict.fromkeys(self._by_content[first:last].tolist(), reason))  # type: ignore[index]

    def check(self) -> None:
        """Raise UserError if there are too many."""
        bad, total = len(self.reasons) + len(self.unnamed), len(self.images) + len(self.unnamed)
        if bad <= self.max_rate * total:
            return
        kinds: dict[str, list[str]] = {}
        for number, reason in sorted(self.reasons.items()):
            kinds.setdefault(reason, []).append(self.images[number])
        for where, reason in self.unnamed:
            kinds.setdefault(reason, []).append(where)
        common = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))[:3]
        told = "; ".join(f"{len(of):,} {reason} (such as {', '.join(of[:3])})" for reason, of in common)
        raise UserError(
            f"{bad:,} of {total:,} pictures ({bad / total:.1%}) cannot be used, more than "
            f"extract-images.max_bad_rate = {self.max_rate:g} allows: {told}. Check --pictures and "
            "extract-images.template, or raise max_bad_rate."
        )


def _distinct(source: Source, images: Sequence[str], ranks: Ranks) -> Contents:
    """Tell which pictures are the same; each rank reads its share of them."""
    share = ranks.share(len(images))
    own = pictures.distinct(source, images[share.start : share.stop])
    return own if ranks.count == 1 else _merged(source, images, ranks.gather((own.digests, own.content, own.reasons)))


def _merged(source: Source, images: Sequence[str], found: Sequence[tuple[Pixels, Int, dict[int, str]]]) -> Contents:
    """Put together what ranks found of their shares: digests of contents, content of each picture, reasons."""
    digests = np.concatenate([of_rank for of_rank, _, _ in found])
    _, first, same = np.unique(digests.view(f"S{pictures.DIGEST}"), return_index=True, return_inverse=True)
    appearance = np.argsort(first)
    number = np.append(np.argsort(appearance)[same.ravel()], -1)
    contents: list[Int] = []
    reasons: dict[int, str] = {}
    before = 0
    for of_rank, content, why in found:
        reasons.update({sum(map(len, contents)) + picture: reason for picture, reason in why.items()})
        contents.append(number[np.where(content >= 0, content + before, -1)])
        before += len(of_rank)
    content = np.concatenate(contents)
    numbers, first_pictures = np.unique(content, return_index=True)
    places = pictures.Places(source, images, first_pictures[numbers >= 0])
    return Contents(places, digests[first[appearance]], content, reasons)


def _by_use(contents: Contents, counts: Int) -> Int:
    """Return the distinct contents by how often training uses them, most first; ties by first index."""
    usable = contents.content >= 0
    uses = np.zeros(len(contents.places), dtype=np.int64)
    np.add.at(uses, contents.content[usable], counts[usable])
    return np.argsort(-uses, kind="stable").astype(np.int64)


def _key(network: Backbone, settings: ExtractImages, contents: Contents, order: Int) -> str:
    h = hashlib.blake2b(digest_size=8)
    device = network.mean.device.type
    config = settings.model_dump(mode="json", exclude=NOT_IN_KEY)
    made_by = [provenance.code_digest("extract-images"), provenance.versions()]
    h.update(json.dumps([config, network.weights, device, made_by], sort_keys=True).encode())
    for begin in range(0, len(order), SLICE):
        h.update(contents.digests[order[begin : begin + SLICE]].tobytes())
    return h.hexdigest()


def _extract_missing(
    log: BatchLog,
    network: Backbone,
    settings: ExtractImages,
    contents: Contents,
    order: Int,
    bad: _Bad,
    ranks: Ranks,
) -> int:
    """Do this rank's batches that the log does not hold yet; return how many values were clipped in all of them."""
    batch, missing = settings.batch, log.missing
    places = range(log.begin * batch, min(log.end * batch, len(order)))
    left = sum(min(batch, len(order) - number * batch) for number in missing.tolist())
    clipped = 0

    def note(number: int, notes: Notes) -> None:
        nonlocal clipped
        clipped += notes.get("clipped", 0)
        first = number * batch
        bad.add({first + int(at): (int(order[first + int(at)]), why) for at, why in notes.get("bad", {}).items()})
        bad.check()

    for number, notes in log.notes():
        note(number, notes)
    if left < len(places):
        say(f"extract-images{ranks.name}: {len(places) - left:,} of {len(places):,} pictures were done before")
    if not left:
        return clipped
    work = (
        (number, [contents.places[content] for content in order[number * batch : (number + 1) * batch].tolist()])
        for number in missing.tolist()
    )
    runner = _GpuRunner(network) if network.mean.device.type == "cuda" else _Runner(network)
    running: deque[tuple[Decoded, Callable[[], Results]]] = deque()

    def finish() -> None:
        decoded, results = running.popleft()
        vectors, beyond = _checked(*results())
        notes: Notes = {"clipped": beyond} if beyond else {}
        notes |= {"bad": decoded.bad} if decoded.bad else {}
        log.append(decoded.number, vectors, notes)
        note(decoded.number, notes)
        meter.add(len(vectors) + len(decoded.bad))

    with (
        Decoder(settings.size, batch, _workers(settings, network), settings.crop) as decoder,
        _meter("extract-images", left, ranks) as meter,
    ):
        for decoded in decoder.decode(work):
            running.append((decoded, runner.start(decoded.pixels)))
            if len(running) > runner.ahead:
                finish()
        while running:
            finish()
    return clipped


def _workers(settings: ExtractImages, network: Backbone) -> int:
    """Return how many processes decode; 0: threads do."""
    if settings.workers or network.mean.device.type != "cuda":
        return settings.workers
    return decoding.cores()


class _Silent:
    """A meter that shows nothing, for all ranks but the first."""

    def add(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units done."""


def _meter(label: str, total: int, ranks: Ranks, shown: bool = True) -> AbstractContextManager[Meter | _Silent]:
    shown = shown and ranks.rank == 0
    return Meter(f"{label}{ranks.name}", total, "pictures") if shown else nullcontext(_Silent())


class _Runner:
    """Sends batches through a network on the CPU."""

    ahead = 0
    """Batches that may be started before the one before them has been finished."""

    def __init__(self, network: Backbone) -> None:
        self.network = network

    def start(self, pixels: Pixels) -> Callable[[], Results]:
        """Start a batch [n, 3, size, size]; return what waits for its results. `pixels` may change at once."""
        results = self._send(torch.from_numpy(pixels))
        return lambda: results

    def _send(self, x: Tensor) -> Results:
        if not len(x):
            return torch.empty((0, self.network.width), dtype=torch.float16), torch.tensor(0), torch.tensor(True)
        try:
            with torch.inference_mode():
                vectors = self.network(x)
                beyond = (vectors.abs() > LARGEST).sum()
                return vectors.clamp(-LARGEST, LARGEST).half(), beyond, vectors.isfinite().all()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU's memory does not hold a batch of {len(x)}; give a smaller one (--set extract-images.batch=…)"
            ) from None


class _GpuRunner(_Runner):
    """Sends batches through a network on a GPU: while it works on one, the next is copied there, and the results of
    the one before come back."""

    ahead = 1

    def __init__(self, network: Backbone) -> None:
        super().__init__(network)
        self.device = network.mean.device
        torch.cuda.set_device(self.device)
        # float32 is float32: cuDNN would take TensorFloat-32, which has the 10 bits of float16.
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        self._copying = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._pinned = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._turn = 0

    def start(self, pixels: Pixels) -> Callable[[], Results]:
        """Start a batch [n, 3, size, size]; return what waits for its results. `pixels` may change at once."""
        self._turn ^= 1
        copied = self._copied[self._turn]
        copied.synchronize()
        if len(self._pinned[self._turn]) < len(pixels):
            self._pinned[self._turn] = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        pinned = self._pinned[self._turn][: len(pixels)].copy_(torch.from_numpy(pixels))
        with torch.cuda.stream(self._copying):
            x = pinned.to(self.device, non_blocking=True)
            copied.record()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied)
        x.record_stream(computing)
        there = self._send(x)
        back = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in there)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(computing)

        def wait() -> Results:
            done.synchronize()
            return back  # type: ignore[return-value]

        return wait


def _checked(vectors: Tensor, beyond: Tensor, finite: Tensor) -> tuple[Half, int]:
    """Return vectors [n, width] and how many of their values were clipped. Raises UserError for what is no number."""
    if not finite:
        raise UserError(
            "the network gives values that are not numbers; its weights are broken, or too large for "
            'extract-images.dtype: try dtype = "float32" or other weights'
        )
    return vectors.numpy(), int(beyond)


@dataclass(frozen=True)
class _Shard:
    """What a rank wrote."""

    path: str
    """Relative to the folder of features.h5."""
    rows: int
    digest: str
    """Of the vectors."""


def _write_shard(
    log: BatchLog, network: Backbone, settings: ExtractImages, target: Path, key: str, ranks: Ranks
) -> _Shard:
    """Write this rank's vectors to an HDF5 file of their own."""
    path = shards.folder(target) / f"{key}-{ranks.rank:05}-of-{ranks.count:05}.h5"
    with files.atomic(path) as tmp, hdf5.create(tmp) as (h5, below):
        digest = _write_features(h5, below, log, ranks)
        _write_attributes(h5, network, settings)
    return _Shard(f"{path.parent.name}/{path.name}", log.rows, digest)


def _write_features(h5: Any, below: hdf5.CarefulFile, log: BatchLog, ranks: Ranks) -> str:
    """Write all vectors of a log in order, batch by batch; return their digest."""
    features = h5.create_dataset("features", (log.rows, log.width), dtype=np.float16)
    digest = xxhash.xxh3_128()
    begin = 0
    with _meter("write features.h5", log.rows, ranks, features.size >= WORTH_SHOWING) as meter:
        for number in range(log.begin, log.end):
            vectors, _ = log.read(number)
            features[begin : begin + len(vectors)] = vectors
            below.check()
            digest.update(vectors.data)
            begin += len(vectors)
            meter.add(len(vectors))
    return digest.hexdigest()


def _write_virtual(h5: Any, written: Sequence[_Shard], width: int) -> None:
    """Write `features` as a view of the shards: NaN wherever one is not found."""
    rows = sum(shard.rows for shard in written)
    layout = h5py.VirtualLayout((rows, width), np.float16)
    begin = 0
    for shard in written:
        if shard.rows:
            layout[begin : begin + shard.rows] = h5py.VirtualSource(shard.path, "features", (shard.rows, width))
        begin += shard.rows
    h5.create_virtual_dataset("features", layout, fillvalue=np.nan)
    h5.attrs["shards"] = json.dumps([asdict(shard) for shard in written])


def _write_attributes(h5: Any, network: Backbone, settings: ExtractImages) -> None:
    h5.attrs["backbone"] = "+".join(layer.model for layer in network.layers)
    h5.attrs["layer"] = "+".join(layer.name + ":flat" * layer.flat for layer in network.layers)
    h5.attrs["weights"] = network.weights
    h5.attrs["dtype"] = settings.dtype
    h5.attrs["preprocessing"] = pictures.preprocessing(settings.size, settings.crop)
    h5.attrs["versions"] = json.dumps(provenance.versions(), sort_keys=True)


def _rows(contents: Contents, order: Int, bad: _Bad) -> Int:
    """Return the row of each picture, −1 where it has none."""
    usable = np.ones(len(order), dtype=np.bool_)
    usable[list(bad.places)] = False
    row_of_content = np.full(len(order) + 1, -1, dtype=np.int64)
    row_of_content[order[usable]] = np.arange(usable.sum())
    return row_of_content[contents.content]


def _write_map(h5: Any, below: hdf5.CarefulFile, images: Sequence[str], row: Int) -> None:
    names = h5.create_dataset("image", (len(images),), dtype=h5py.string_dtype("utf-8"))
    for begin in range(0, len(images), SLICE):
        names[begin : begin + SLICE] = np.array(
            [image.replace("\0", "\ufffd") for image in images[begin : begin + SLICE]], dtype=object
        )
        below.check()
    h5.create_dataset("row", data=row)


def _write_rejects(bad: _Bad, source: Source, target: Path) -> None:
    rejects = sorted(bad.reasons.items())
    with files.atomic(target.with_name(target.name + ".rejects.parquet")) as tmp:
        pl.DataFrame(
            {
                "image": [*(bad.images[number] for number, _ in rejects), *(None for _ in source.unnamed)],
                "path": [
                    *(source.where(bad.images[number]) for number, _ in rejects),
                    *(where for where, _ in source.unnamed),
                ],
                "reason": [*(reason for _, reason in rejects), *(reason for _, reason in source.unnamed)],
            },
            schema={"image": pl.String, "path": pl.String, "reason": pl.String},
        ).write_parquet(tmp)
