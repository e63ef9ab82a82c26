"""Pictures a second from JPEG files on disk to HDF5 (`ctrkit extract-images`) against the bare network.

    python benchmarks/extract.py --pictures 128
    python benchmarks/extract.py --device cuda --dtype bfloat16 --batch 256 --pictures 50000
    python benchmarks/extract.py --drift --pictures 64

The JPEG files are simulated, seeded, and kept. The reference is the network alone: the same layers on random tensors
that are in the device's memory already, at the same batch size, dtype and layout (channels last), in this process,
before and after ours. Ours is the function behind the command, from the first look at the files to features.h5 on the
disk; its start, its imports and the loading of weights are outside, since they do not grow with the pictures. Files are
read once before, so that they are in the page cache as far as memory allows.

Decoding alone is measured too, as ours does it. On a GPU the reference is the smaller of the bare network and of what
the cores decode, and both are printed, with the cores that would feed the network. The share of the matrix peak is
that of the bare network: its multiplications and additions over those of one large matrix product here, and over the
chip's published peak where that is known (or given: --peak).

--drift: how far vectors computed in float16 and bfloat16 are from those in float32, on the same pictures.
"""

import argparse
import concurrent.futures
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
from PIL import Image

from ctrkit.recipe import ExtractImages

QUALITY = 88
DETAIL = 14.0
"""Standard deviation of the noise in a picture, of 255: so that a JPEG of 500 × 400 has about 60 kB, as photos have."""
IN_FOLDER = 1000
TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.0}
"""Published peaks of dense matrix products in bfloat16 and float16."""


def name_of(number: int) -> str:
    return f"{number // IN_FOLDER:04}/{number % IN_FOLDER:03}"


def write_pictures(folder: Path, count: int, size: tuple[int, int], seed: int) -> list[str]:
    """Write those of the pictures that are not there yet; return the ids of all."""
    names = [name_of(number) for number in range(count)]
    missing = [number for number in range(count) if not (folder / f"{names[number]}.jpg").exists()]
    for inner in {Path(names[number]).parent for number in missing}:
        (folder / inner).mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: write_picture(folder, number, size, seed), missing))
    return names


def write_picture(folder: Path, number: int, size: tuple[int, int], seed: int) -> None:
    """Write a picture: broad patches of colour, and noise."""
    rng = np.random.default_rng([seed, number])
    patches = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, DETAIL, (size[1] // 2, size[0] // 2, 1)).repeat(2, 0).repeat(2, 1)
    pixels = np.asarray(patches).astype(np.float32)
    pixels[: noise.shape[0], : noise.shape[1]] += noise
    path = folder / f"{name_of(number)}.jpg"
    part = path.with_suffix(f".{os.getpid()}")
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(part, "jpeg", quality=QUALITY)
    part.replace(path)


def bare_rate(network: Any, settings: ExtractImages, seconds: float) -> float:
    """Return pictures a second of the layers alone, on tensors that are there."""
    import torch

    device, dtype = network.mean.device, next(network.extractors.parameters()).dtype
    x = torch.randn(settings.batch, 3, settings.size, settings.size, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            for extractor in network.extractors:
                extractor(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        run(1)
        times = max(2, math.ceil(seconds / run(1)))
        return settings.batch * times / run(times)


def decode_rate(settings: ExtractImages, places: list[Any], workers: int) -> tuple[float, int]:
    """Return pictures a second of reading and decoding alone, and the threads or processes that did it."""
    from ctrkit import pictures
    from ctrkit.decoding import Decoder

    batches = [places[begin : begin + settings.batch] for begin in range(0, len(places), settings.batch)]
    with pictures.quiet(), Decoder(settings.size, settings.batch, workers) as decoder:
        for _ in decoder.decode(enumerate(batches[: 2 * decoder.ahead])):  # processes have started
            pass
        started = time.perf_counter()
        done = sum(len(found.pixels) for found in decoder.decode(enumerate(batches)))
        return done / (time.perf_counter() - started), workers or decoder.threads


def flops(network: Any, settings: ExtractImages) -> float:
    """Return multiplications and additions of the layers, for a picture."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = network.mean.device, next(network.extractors.parameters()).dtype
    x = torch.zeros(2, 3, settings.size, settings.size, device=device, dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for extractor in network.extractors:
            extractor(x)
    return counter.get_total_flops() / 2


def matrix_tflops(device: str, dtype: str) -> float:
    """Return 10^12 multiplications and additions a second of a large matrix product."""
    import torch

    cuda = torch.device(device).type == "cuda"
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            a @ b
        if cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / times

    run(2)
    return 2 * side**3 / min(run(20 if cuda else 1) for _ in range(3)) / 1e12


def published_tflops(device: str, dtype: str) -> float:
    """Return the chip's published peak; 0 if it is not known here."""
    import torch

    if torch.device(device).type != "cuda" or dtype == "float32":
        return 0.0
    chip = torch.cuda.get_device_name(device)
    return next((peak for name, peak in TFLOPS.items() if name in chip), 0.0)


def end_to_end(network: Any, settings: ExtractImages, source: Any, names: list[str], work: Path) -> float:
    """Return the seconds that ours takes. Ends the process if a picture is lost."""
    from ctrkit import extraction, files
    from ctrkit.ranks import Ranks

    vocabulary = extraction.Vocabulary(names, None)
    target = work / "features.h5"
    started = time.perf_counter()
    with files.atomic(target) as out:
        counts = extraction.extract(network, settings, source, vocabulary, target, out, Ranks())
    seconds = time.perf_counter() - started
    if counts["with a vector"] != len(names):
        sys.exit(f"{len(names):,} pictures gave vectors of {counts['with a vector']:,}")
    return seconds


def load(settings: ExtractImages, dtype: str, device: str) -> Any:
    from ctrkit import backbones

    given = {"weights": settings.weights, "seed": settings.seed, "size": settings.size}
    return backbones.load(settings.backbone, dtype=dtype, device=device, **given)


def speed(args: argparse.Namespace, settings: ExtractImages, source: Any, names: list[str], device: str) -> None:
    """Measure and print everything but the drift."""
    import torch

    from ctrkit import decoding

    network = load(settings, settings.dtype, device)
    cuda = network.mean.device.type == "cuda"
    if cuda:
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    places = [source.place(name) for name in names]
    size = sum(len(place.read()) for place in places) / len(places)
    decoded, hands = decode_rate(settings, places, settings.workers or (decoding.cores() if cuda else 0))
    before = bare_rate(network, settings, args.seconds)
    with tempfile.TemporaryDirectory(dir=args.data) as work:
        ours = len(names) / end_to_end(network, settings, source, names, Path(work))
    bare = statistics.mean([before, bare_rate(network, settings, args.seconds)])
    reference = min(bare, decoded) if cuda else bare
    operations = flops(network, settings)
    matrix, published = matrix_tflops(device, settings.dtype), args.peak or published_tflops(device, settings.dtype)
    chip = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    print(
        f"{len(names):,} JPEG files of {args.picture_size}, {size / 1000:.0f} kB on average; {settings.backbone} at "
        f"{settings.size} px, batch {settings.batch}, {settings.dtype}, channels last, {device} ({chip})"
    )
    achieved = bare * operations / 1e12
    measure.table(
        ["", "pictures/s", "of the bare network"],
        [
            ["bare network", f"{bare:,.1f}", ""],
            [
                f"decoding alone, by {hands} {'processes' if cuda or settings.workers else 'threads'}",
                f"{decoded:,.1f}",
                f"{decoded / bare:.2f}",
            ],
            ["end to end", f"{ours:,.1f}", f"{ours / bare:.2f}"],
        ],
    )
    feed = math.ceil(bare / (decoded / hands))
    print(
        f"a core decodes {decoded / hands:,.0f} pictures/s, so {feed:,} core(s) feed the network"
        + (" (or a decoder on the card, such as nvJPEG's)" if feed > hands else "")
    )
    print(
        f"bare network: {operations / 1e9:,.1f} GFLOP a picture, {achieved:,.2f} TFLOP/s: "
        f"{achieved / matrix:.0%} of a large matrix product's {matrix:,.2f}"
        + (f", {achieved / published:.0%} of the published peak of {published:,.0f}" if published else "")
    )
    measure.last_line(
        name="extract",
        ratio=round(ours / reference, 3),
        ours=round(ours, 2),
        reference=round(reference, 2),
        unit="pictures/s",
        bare=round(bare, 2),
        decode=round(decoded, 2),
        decoders=hands,
        cores_to_feed=feed,
        share_of_matrix_product=round(achieved / matrix, 3),
        share_of_published_peak=round(achieved / published, 3) if published else None,
        pictures=len(names),
        device=chip,
        **settings.model_dump(include={"backbone", "size", "batch", "dtype"}),
    )


def drift(args: argparse.Namespace, settings: ExtractImages, source: Any, names: list[str], device: str) -> None:
    """Print how far vectors in float16 and bfloat16 are from those in float32."""
    import torch

    from ctrkit import pictures

    with pictures.quiet():
        pixels = [pictures.decode(pictures.read(source.place(name)), settings.size) for name in names]

    def vectors(dtype: str) -> np.ndarray:
        network = load(settings, dtype, device)
        found = []
        with torch.inference_mode():
            for begin in range(0, len(pixels), settings.batch):
                x = torch.from_numpy(np.stack(pixels[begin : begin + settings.batch])).to(device)
                found.append(network(x).cpu().half().double().numpy())
        return np.concatenate(found)

    def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)

    def nearest(x: np.ndarray) -> np.ndarray:
        x = x - exact.mean(0)
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
        alike = x @ x.T
        np.fill_diagonal(alike, -2)
        return alike.argmax(1)

    exact = vectors("float32")
    rows, found = [], {}
    for dtype in ("float16", "bfloat16"):
        other = vectors(dtype)
        far = np.linalg.norm(other - exact, axis=1) / np.maximum(np.linalg.norm(exact, axis=1), 1e-30)
        of_spread = np.linalg.norm(other - exact) / np.linalg.norm(exact - exact.mean(0))
        same = float((nearest(other) == nearest(exact)).mean())
        least = float(cosines(other, exact).min())
        found[dtype] = {"median": float(np.median(far)), "largest": float(far.max()), "of_spread": float(of_spread)}
        found[dtype] |= {"least_cosine": least, "same_neighbour": same}
        rows.append(
            [dtype, f"{np.median(far):.2e}", f"{far.max():.2e}", f"{of_spread:.2e}", f"{least:.6f}", f"{same:.1%}"]
        )
    print(
        f"{len(names):,} pictures, {settings.backbone} at {settings.size} px, weights {settings.weights}, on {device}"
    )
    head = ["against float32", "median |x−y|/|y|", "largest", "of the spread", "least cosine", "same nearest neighbour"]
    measure.table(head, rows)
    measure.last_line(name="extract-drift", pictures=len(names), backbone=settings.backbone, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256, help="how many (%(default)s)")
    parser.add_argument("--picture-size", default="500x400", metavar="WIDTHxHEIGHT", help="of the files (%(default)s)")
    parser.add_argument("--source", type=Path, help="a folder of pictures (any, NAME.jpg) instead of simulated ones")
    parser.add_argument("--backbone", default="vgg16:fc6")
    parser.add_argument("--weights", default="random", help="random, published or a file (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the square the network sees (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of the network on a CPU; 0: all cores")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode; 0: as the command does")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long the bare network runs, twice (%(default)s)"
    )
    parser.add_argument("--peak", type=float, default=0.0, help="the chip's published peak, in TFLOP/s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--drift", action="store_true", help="how far float16 and bfloat16 are from float32")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("BENCH_DATA") or "runs/bench"),
        help="folder to keep pictures in; default: BENCH_DATA, or runs/bench",
    )
    args = parser.parse_args()
    prepare(args, drift if args.drift else speed)


def prepare(args: argparse.Namespace, measurement: Callable[..., None]) -> None:
    """Prepare pictures and settings, and measure."""
    import torch

    from ctrkit import devices
    from ctrkit.picture_sources import open_source

    keys = ("backbone", "weights", "size", "batch", "dtype", "device", "workers", "threads")
    given = {key: getattr(args, key) for key in keys}
    settings = ExtractImages(template="{image}.jpg", **given)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.data.mkdir(parents=True, exist_ok=True)
    width, _, height = args.picture_size.partition("x")
    folder = args.source or args.data / f"pictures-{width}x{height}-{args.seed}"
    if args.source is None:
        names = write_pictures(folder, args.pictures, (int(width), int(height)), args.seed)
    source = open_source(folder, settings)
    if args.source is not None:
        names = source.find()[: args.pictures]
    measurement(args, settings, source, names, devices.resolve(settings.device))


if __name__ == "__main__":
    main()
