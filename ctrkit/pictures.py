"""Pictures: which are the same, and how one becomes the square that a network sees. Where they lie: picture_sources."""

import functools
import hashlib
import json
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, JpegImagePlugin, UnidentifiedImageError

from ctrkit.progress import Meter

Int = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
THREADS = min(8, os.cpu_count() or 1)
"""Threads that read and decode."""
MAX_BYTES = 1 << 28
"""A larger file is no picture."""
MAX_PIXELS = 1 << 26
"""A picture with more is not decoded at full scale (256 MiB)."""
LARGE_PIXELS = 1 << 24
"""Pictures with more are decoded one at a time in a process."""
WHOLE_PIXELS = 1 << 22
"""A picture that has no more once it is resized is resized whole, as torchvision does, and then cropped (16 MiB)."""
CROP = 224 / 256
"""Of the resized picture's shorter side, what the crop keeps: torchvision's, in proportion at other sizes."""
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names. Its other formats are rare, or run other programs (EPS)."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what sets the picture upright."""
ORIENTATION = 0x0112
DIGEST = 16
"""Bytes of a content's digest."""
AT_ONCE = 64
"""Pictures that a thread reads before it reports."""
_large = threading.Lock()


POSITION = np.dtype([("position", ">i8"), ("picture", ">i8")])
"""A picture, by its number among those asked for, and its position in the source."""
Positions = npt.NDArray[np.void]
"""[n] of POSITION."""


class BadPicture(Exception):
    """A picture that cannot be used; the message is the reason."""


class Place(Protocol):
    """Where a picture's bytes lie. Small and picklable; reading it is safe in any thread and process."""

    def read(self) -> bytes:
        """Return the picture's file. Raises BadPicture."""


class Unnamed(Protocol):
    """Of pictures that no id names: where they are, and why."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yield (where, why)."""


class Source(Protocol):
    """Where pictures come from. See `ctrkit.picture_sources.open_source`."""

    @property
    def unnamed(self) -> Unnamed:
        """Of pictures that no id names. After `find`, all that there are."""

    def find(self) -> Sequence[str]:
        """Return the ids of all pictures, sorted."""

    def has(self, image: str) -> bool:
        """Say whether the picture is there. It may be broken all the same."""

    def place(self, image: str) -> Place:
        """Return where a picture lies. Raises BadPicture if that is known to be nowhere."""

    def where(self, image: str) -> str:
        """Return the place as a text for people."""

    def at(self, position: int, image: str) -> Place:
        """Return where a picture lies, given its position. Raises BadPicture if that is known to be nowhere."""

    def positions(self, images: Sequence[str], begin: int, end: int) -> Iterator[Positions]:
        """Yield pictures `begin` to `end` − 1 of `images`, as arrays of POSITION, in an order in which reading them is
        cheap. A picture's position may mean something to `at` only."""


def preprocessing(size: int, crop: float = CROP) -> str:
    """Return what is done to a picture before the network sees it, as JSON, for the file's attributes."""
    return json.dumps(
        {
            "colour": "EXIF rotation applied, first frame, RGB, transparency over white",
            "resize": f"shorter side to {resized(size, crop)}, bilinear, antialiased",
            "crop": f"centre {size}x{size}",
            "huge": f"a JPEG of more than {MAX_PIXELS} pixels is first reduced to 1/2, 1/4 or 1/8",
            "scale": "to 0..1, minus mean, over std",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        sort_keys=True,
    )


def resized(size: int, crop: float = CROP) -> int:
    """Return the length of the shorter side before the crop: 256 for 224."""
    return round(size / crop)


@functools.cache
def formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def extensions() -> frozenset[str]:
    """Return the endings of pictures' names: ".jpg", ".png", …"""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats())


def check_size(size: int) -> None:
    """Raise BadPicture for a file that is too large to be a picture."""
    if size > MAX_BYTES:
        raise BadPicture(f"too large: more than {MAX_BYTES >> 20} MiB")


def read(place: Place) -> bytes:
    """Return a picture's file. Raises BadPicture if it cannot be read."""
    data = place.read()
    if not data:
        raise BadPicture("empty file")
    return data


def decode(data: bytes, size: int, crop: float = CROP) -> Pixels:
    """Return a picture as [3, size, size] uint8, red, green, blue.

    As torchvision's own preprocessing, to the bit: the shorter side is resized (bilinear, antialiased) to size / crop,
    then the centre is cropped. Two exceptions bound the memory: a JPEG of more than `MAX_PIXELS` is decoded at 1/2,
    1/4 or 1/8 of its scale, and of a picture so long that it would have more than `WHOLE_PIXELS` once resized only the
    part that is kept is resized, which differs by one step in some pixels. Raises BadPicture.
    """
    try:
        with _open(data) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                _reduce(opened, data, resized(size, crop))
            with _large if opened.width * opened.height > LARGE_PIXELS else nullcontext():
                return _square(opened, size, resized(size, crop))
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture(f"too many pixels: more than {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture in any known format") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on broken files
        told = re.sub(r" \(\d+ bytes not processed\)", "", str(e))
        raise BadPicture(f"broken: {type(e).__name__}: {told}") from None


def _open(data: bytes) -> Image.Image:
    if data.startswith(b"\xff\xd8\xff"):  # Image.open would refuse a huge one before it can be reduced
        return JpegImagePlugin.JpegImageFile(BytesIO(data))
    return Image.open(BytesIO(data), formats=formats())


def _reduce(opened: Image.Image, data: bytes, short: int) -> None:
    """Make a huge JPEG be decoded at the smallest scale that leaves enough for the resize. Raises BadPicture."""
    if not isinstance(opened, JpegImagePlugin.JpegImageFile):
        raise BadPicture(f"too many pixels: more than {MAX_PIXELS:,}")
    if not _in_one_scan(data):
        raise BadPicture(f"too many pixels: more than {MAX_PIXELS:,} in a JPEG of several scans (progressive)")
    opened.draft(None, (short, short))
    if opened.width * opened.height > MAX_PIXELS:
        raise BadPicture(f"too many pixels: more than {MAX_PIXELS:,} even at 1/8 of the scale")


def _in_one_scan(data: bytes) -> bool:
    """Say whether a JPEG is decoded row by row. One that comes in several scans is held whole, at any scale."""
    at, components = 2, 0
    while at + 10 <= len(data):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (b"\xff\xc0", b"\xff\xc1"):
            components = data[at + 9]
        elif marker == b"\xff\xda":
            return data[at + 4] == components
        elif marker[0] != 0xFF or marker == b"\xff\xc2":
            return False
        at += 1 if marker == b"\xff\xff" else 2 + length
    return False


def _square(opened: Image.Image, size: int, short: int) -> Pixels:
    opened.load()
    picture = _upright(opened)
    if opened.mode == "CMYK" and opened.format == "JPEG" and "adobe" not in opened.info:
        picture = ImageChops.invert(picture)  # only Adobe's are inverted, but Pillow takes every one for Adobe's
    picture = _resize_and_crop(_rgb(picture), size, short)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # as many kinds as there are ways to break EXIF, which then says nothing
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadPicture("floating-point pixels")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        grey = np.asarray(picture).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _resize_and_crop(picture: Image.Image, size: int, short: int) -> Image.Image:
    """Resize to a shorter side of `short`, and cut out the centre."""
    width, height = picture.size
    new_width, new_height = (int(short * side / min(width, height)) for side in (width, height))
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if new_width * new_height <= WHOLE_PIXELS:
        whole = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + size, top + size))
    across, down = width / new_width, height / new_height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


@contextmanager
def quiet() -> Iterator[None]:
    """Make Pillow's warning of huge pictures an error and hide its remarks on odd files, in all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@dataclass(frozen=True)
class Digests:
    """Digests of some pictures' contents."""

    pictures: Positions
    """[n]: which."""
    digests: npt.NDArray[np.uint8]
    """[n, 16]; anything where a picture cannot be read."""
    reasons: dict[int, str]
    """Place among these → why it cannot be read."""


def digests(source: Source, images: Sequence[str], begin: int, end: int, label: str = "") -> Iterator[Digests]:
    """Read pictures `begin` to `end` − 1 of `images` once each, and yield digests of their bytes, some at a time.

    label: of the progress that is shown; "": none is.
    """

    def digest(some: Positions) -> Digests:
        found = Digests(some, np.zeros((len(some), DIGEST), dtype=np.uint8), {})
        for at, (position, number) in enumerate(some.tolist()):
            try:
                image = images[number]
                if "\0" in image:
                    raise BadPicture("the id has a NUL character, which features.h5 cannot hold")
                data = read(source.at(position, image))
                found.digests[at] = np.frombuffer(hashlib.blake2b(data, digest_size=DIGEST).digest(), dtype=np.uint8)
            except BadPicture as bad:
                found.reasons[at] = str(bad)
        return found

    waiting: deque[Future[Digests]] = deque()
    shown = Meter(label, end - begin, "pictures") if label else nullcontext()
    with ThreadPoolExecutor(THREADS) as pool, shown as meter:

        def finish() -> Digests:
            found = waiting.popleft().result()
            if meter is not None:
                meter.add(len(found.pictures))
            return found

        for located in source.positions(images, begin, end):
            for first in range(0, len(located), AT_ONCE):
                waiting.append(pool.submit(digest, located[first : first + AT_ONCE]))
                if len(waiting) > 2 * THREADS:
                    yield finish()
        while waiting:
            yield finish()
