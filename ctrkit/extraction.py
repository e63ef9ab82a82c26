"""Pictures → features.h5: each distinct picture through the network once, a batch at a time, and never again.

Batches that are done lie in a hidden folder beside the target, `.NAME.parts-KEY/` (see batch_log.py), and are joined at
the end. KEY is a digest of everything that decides their values: a rerun takes up what is still right and nothing else.
Batches are cut by position alone, never by what was done before or by whom: a picture's vector is the same to the bit
whether the run was killed or not, and however many ranks share the work.

Several ranks (see ranks.py) have a run of neighbouring batches each, of which each writes a shard, an HDF5 file in
`NAME.shards/`; `features` is then a virtual data set over the shards.
"""

import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from ctrkit import bad_pictures, decoding, files, hdf5, pictures, provenance, shards
from ctrkit.backbones import Backbone
from ctrkit.bad_pictures import SHOWN, AllBad, BadPictures, Reasons
from ctrkit.batch_log import BatchLog, Notes
from ctrkit.decoding import Decoded, Decoder
from ctrkit.disk_tables import Table
from ctrkit.disk_texts import Texts
from ctrkit.distinct_pictures import Counts, DistinctPictures, tell_distinct
from ctrkit.errors import UserError
from ctrkit.pictures import Pixels, Source
from ctrkit.progress import Meter, say
from ctrkit.ranks import Ranks
from ctrkit.recipe import ExtractImages

Int = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]
Results = tuple[Tensor, Tensor, Tensor]
"""Of a batch: vectors [n, width] float16, how many values were clipped, whether all were finite."""

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
    counts: Counts | None
    """Of each picture: times seen in training. None: never."""
    whole: bool = False
    """Whether it is every picture of the source, so that those without an id count among the bad ones."""


def read_vocabulary(path: Path, folder: Path | None = None) -> Vocabulary:
    """Read `vocab/image.parquet` (value, index, count) into nameless files in the file system of `folder`."""
    if not path.is_file():
        raise UserError(f"{path} is not there: has the recipe a feature of kind 'image', and is convert done?")
    images, counts = Texts(folder=folder), Table(np.int64, folder)
    try:
        before = -1
        columns = ["value", "index", "count"]
        for batch in pq.ParquetFile(path).iter_batches(SLICE, columns=columns, use_threads=False):
            some = pl.DataFrame(batch).cast({"count": pl.Int64})
            index = some["index"].to_numpy()
            if len(some) and not (np.diff(index, prepend=before).astype(np.int64) > 0).all():
                raise UserError(f"{path} is not in the order of its index, as convert writes it; run convert again")
            before = int(index[-1]) if len(some) else before
            images.extend(some["value"])
            counts.append(some["count"].to_numpy())
    except (pl.exceptions.PolarsError, pa.ArrowException, KeyError, OSError) as e:
        if files.no_room(e):
            raise
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not a vocabulary (value, index, count): {reason}") from None
    return Vocabulary(images, counts)


def whole_source(source: Source) -> Vocabulary:
    """Return every picture there is, in the order of their names, as a vocabulary without counts."""
    return Vocabulary(source.find(), None, whole=True)


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
    images, folder = vocabulary.images, target.parent
    if not images:
        raise UserError("there are no pictures to extract: none in the vocabulary, or none in --pictures")
    share = functools.partial(_share, target, ranks)
    with pictures.quiet():
        unnamed = source.unnamed if vocabulary.whole else None
        bad = BadPictures(folder)

        def check(found: Sequence[Reasons]) -> None:
            bad_pictures.check(found, images, settings.max_bad_rate, unnamed)

        distinct = tell_distinct(source, images, vocabulary.counts, bad, ranks, share, folder)
        check(ranks.gather(bad.reasons))
        key = _key(network, settings, distinct)
        if any(other != key for other in ranks.gather(key)):
            raise UserError(
                f"rank {ranks.rank} of {ranks.count} sees other pictures, weights, settings or versions than another "
                "one; give all of them the same command, files that all see, and the same installation"
            )
        batches = ranks.share(-(-len(distinct) // settings.batch))
        parts = target.with_name(f".{target.name}.parts-{key}")
        with BatchLog(parts, network.width, batches.start, batches.stop) as log:
            clipped = sum(
                ranks.gather(
                    _extract_missing(log, network, settings, distinct, bad, lambda: check([bad.reasons]), ranks)
                )
            )
            reasons = ranks.gather(bad.reasons)
            check(reasons)
            all_bad = AllBad(share(bad.unreadable, "unreadable"), share(bad.places, "places"), reasons, folder)
            shard = _write_shard(log, network, settings, target, key, ranks) if ranks.count > 1 else None
            written = [of_rank for of_rank in ranks.gather(shard) if of_rank is not None]
            if out is None:
                return {}
            with hdf5.create(out) as (h5, below):
                if written:
                    _write_virtual(h5, written, network.width)
                else:
                    _write_features(h5, below, log, ranks)
                _write_attributes(h5, network, settings)
                with_vector = _write_map(h5, below, images, distinct.pictures_by_row(all_bad.places()))
    with files.atomic(target.with_name(target.name + ".rejects.parquet")) as tmp:
        bad_pictures.write_rejects(tmp, all_bad.pictures(distinct.of), images, source)
    return {
        "pictures": len(images),
        "with a vector": with_vector,
        "rejected": len(images) - with_vector + len(source.unnamed),
        "without an id": len(source.unnamed),
        "rows": len(distinct) - len(all_bad),
        "width": network.width,
        "values clipped": clipped,
        "weights": network.weights,
        **({"shards": [shard.path for shard in written]} if written else {}),
    }


def _share(target: Path, ranks: Ranks, table: Table, name: str) -> list[Table]:
    """Give a table to the other ranks, through a file beside the target; return that of each. All have to call it."""
    if ranks.count == 1:
        return [table]
    path = target.with_name(f".{target.name}.tmp-{name}-{ranks.rank:05}-of-{ranks.count:05}")
    try:
        table.copy_to(path)
        paths = [target.with_name(other) for other in ranks.gather(path.name)]
        found = [Table.open(table.dtype, other) for other in paths]
        ranks.gather(None)  # all have opened it, and it stays until they close it
    finally:
        path.unlink(missing_ok=True)
    return found


def remove_parts(target: Path) -> None:
    """Remove the parts of `target`, once it is there, and the shards that are not of it."""
    for pattern in (f".{target.name}.parts-*", f".{target.name}.tmp-*-of-*"):
        for parts in target.parent.glob(pattern):
            files.remove(parts)
    shards.remove_others(target)


def _key(network: Backbone, settings: ExtractImages, distinct: DistinctPictures) -> str:
    h = hashlib.blake2b(digest_size=8)
    device = network.mean.device.type
    config = settings.model_dump(mode="json", exclude=NOT_IN_KEY)
    made_by = [provenance.code_digest("extract-images"), provenance.versions()]
    h.update(json.dumps([config, network.weights, device, made_by], sort_keys=True).encode())
    for some in distinct.digests():
        h.update(some)
    return h.hexdigest()


def _extract_missing(
    log: BatchLog,
    network: Backbone,
    settings: ExtractImages,
    distinct: DistinctPictures,
    bad: BadPictures,
    check: Callable[[], None],
    ranks: Ranks,
) -> int:
    """Do this rank's batches that the log does not hold yet; return how many values were clipped in all of them."""
    batch = settings.batch
    places = range(log.begin * batch, min(log.end * batch, len(distinct)))
    left = sum(min(batch, len(distinct) - number * batch) for number in log.missing())
    clipped = 0

    def note(number: int, notes: Notes) -> None:
        nonlocal clipped
        clipped += notes.get("clipped", 0)
        for at, why in notes.get("bad", {}).items():
            place = number * batch + int(at)
            times, of = distinct.of(place)
            bad.add_place(place, why, next(of)[:SHOWN], times)
        check()

    for number, notes in log.notes():
        note(number, notes)
    if left < len(places):
        say(f"extract-images{ranks.name}: {len(places) - left:,} of {len(places):,} pictures were done before")
    if not left:
        return clipped
    work = ((number, distinct.places(number * batch, (number + 1) * batch)) for number in log.missing())
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


def _write_map(h5: Any, below: hdf5.CarefulFile, images: Sequence[str], rows: Iterator[tuple[Int, Int]]) -> int:
    """Write the ids, and each picture's row, −1 where it has none; return how many have one.

    rows: pictures that have one, ascending, and the row of each; some at a time."""
    names = h5.create_dataset("image", (len(images),), dtype=h5py.string_dtype("utf-8"))
    row_of = h5.create_dataset("row", (len(images),), dtype=np.int64)
    with_row, picture, row = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    for begin in range(0, len(images), SLICE):
        some = [image.replace("\0", "\ufffd") for image in images[begin : begin + SLICE]]
        names[begin : begin + SLICE] = np.array(some, dtype=object)
        end = begin + len(some)
        while len(picture) == 0 or picture[-1] < end:
            if (more := next(rows, None)) is None:
                break
            picture, row = np.concatenate([picture, more[0]]), np.concatenate([row, more[1]])
        here = int(np.searchsorted(picture, end))
        found = np.full(len(some), -1, np.int64)
        found[picture[:here] - begin] = row[:here]
        row_of[begin:end] = found
        with_row, picture, row = with_row + here, picture[here:], row[here:]
        below.check()
    return with_row
