"""Pictures: where they lie, which are the same, and how one becomes the square that a network sees."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ctrkit.errors import UsageError, UserError
from ctrkit.progress import Meter

Pixels = npt.NDArray[np.uint8]
THREADS = min(8, os.cpu_count() or 1)
"""Threads that read and decode."""


class BadPicture(Exception):
    """A picture that cannot be used; the message is the reason."""


def preprocessing(size: int) -> str:
    """Return what is done to a picture before the network sees it, as JSON, for the file's attributes."""
    return json.dumps(
        {
            "colour": "EXIF rotation applied, first frame, RGB, transparency over white",
            "resize": f"shorter side to {_resize(size)}, bilinear, antialiased",
            "crop": f"centre {size}x{size}",
            "except": f"a picture of {size}x{size} is neither resized nor cropped",
            "scale": "to 0..1, minus mean, over std",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        sort_keys=True,
    )


def _resize(size: int) -> int:
    """Return the length of the shorter side before the crop: torchvision's 256 for 224, in proportion."""
    return round(size * 256 / 224)


def picture_path(folder: Path, template: str, image: str) -> Path:
    """Return where picture `image` lies. Raises BadPicture for a name that leads out of the folder."""
    inner = PurePosixPath(template.replace("{image}", image))
    if inner.is_absolute() or ".." in inner.parts or "\0" in image or not image:
        raise BadPicture("the name is not a path below the pictures folder")
    return folder / inner


def find(folder: Path, template: str) -> list[str]:
    """Return the ids of all pictures below `folder` whose paths follow the template, sorted."""
    prefix, suffix = split_template(template)
    known = Image.registered_extensions()
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            inner = Path(base, name).relative_to(folder).as_posix()
            fits = inner.startswith(prefix) and inner.endswith(suffix)
            fits = fits and len(inner) > len(prefix) + len(suffix)
            if fits and not name.startswith(".") and os.path.splitext(name)[1].lower() in known:
                found.append(inner[len(prefix) : len(inner) - len(suffix)])
    for image in found:
        try:
            image.encode()
        except UnicodeEncodeError:
            raise UserError(f"{folder}: the name of picture {image!a} is not UTF-8; rename it") from None
    return sorted(found)


def split_template(template: str) -> tuple[str, str]:
    """Return what stands before and after `{image}` in a template of paths."""
    prefix, mark, suffix = template.partition("{image}")
    if not mark:
        raise UsageError(f"extract-images.template = {template!r} does not contain {{image}}, the id")
    return prefix, suffix


def read(path: Path) -> bytes:
    """Return a picture's file. Raises BadPicture if it cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadPicture("missing") from None
    except OSError as e:
        raise BadPicture(f"cannot be read: {e.strerror}") from None
    if not data:
        raise BadPicture("empty file")
    return data


def decode(data: bytes, size: int) -> Pixels:
    """Return a picture as [3, size, size] uint8, red, green, blue.

    As torchvision's own preprocessing: the shorter side is resized (bilinear, antialiased) to size·256/224,
    then the centre is cropped; a picture that is size × size already is left as it is. Raises BadPicture.
    """
    try:
        with Image.open(BytesIO(data)) as opened:
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or 2**62):
                raise BadPicture("too many pixels")
            opened.load()
            picture = _rgb(ImageOps.exif_transpose(opened))
    except BadPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPicture("too many pixels") from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture in any known format") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on broken files
        raise BadPicture(f"broken: {type(e).__name__}: {e}") from None
    if picture.size != (size, size):
        picture = _resize_and_crop(picture, size)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        grey = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize only what the crop keeps, so that a very long picture needs no more memory than a square one."""
    width, height = picture.size
    short, resized = min(width, height), _resize(size)
    new_width, new_height = int(resized * width / short), int(resized * height / short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
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
class Contents:
    """Which pictures are there, and which are the same."""

    paths: list[Path]
    """Of each distinct content, the file to read, in the order of first appearance."""
    digests: list[str]
    """Of each distinct content."""
    content: npt.NDArray[np.int64]
    """[pictures]: the picture's place in `paths`, or −1 if it cannot be read."""
    reasons: dict[int, str]
    """Picture → why it cannot be read."""


def distinct(folder: Path, template: str, images: Sequence[str]) -> Contents:
    """Read every picture once and tell which have the same bytes."""
    split_template(template)

    def digest(image: str) -> str | BadPicture:
        try:
            return hashlib.blake2b(read(picture_path(folder, template, image)), digest_size=16).hexdigest()
        except BadPicture as bad:
            return bad

    paths: list[Path] = []
    places: dict[str, int] = {}
    content = np.full(len(images), -1, dtype=np.int64)
    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(THREADS) as pool, Meter("compare pictures", len(images), "pictures") as meter:
        for number, found in enumerate(pool.map(digest, images)):
            if isinstance(found, BadPicture):
                reasons[number] = str(found)
            else:
                if found not in places:
                    places[found] = len(paths)
                    paths.append(picture_path(folder, template, images[number]))
                content[number] = places[found]
            meter.add()
    return Contents(paths, list(places), content, reasons)
