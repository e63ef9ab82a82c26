"""What pictures are really like: known pixels, torchvision's own preprocessing, and what must be refused. Each picture
is made here."""

import contextlib
import re
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features
from torchvision.transforms._presets import ImageClassification

from ctrkit import pictures
from ctrkit.distinct_pictures import tell_distinct_in_memory
from ctrkit.picture_sources import open_source
from ctrkit.pictures import BadPicture
from ctrkit.recipe import ExtractImages

COLOURS = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 40]]], dtype=np.uint8)
"""[row, column, channel]: red, green; blue, yellow."""


def encoded(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quarters(side: int = 32) -> npt.NDArray[np.uint8]:
    return COLOURS.repeat(side // 2, 0).repeat(side // 2, 1)


def corners(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the middles of the four quarters of [3, side, side], as [row, column, channel]."""
    middles = np.array([pixels.shape[1] // 4, 3 * pixels.shape[1] // 4])
    return pixels[:, middles][:, :, middles].transpose(1, 2, 0).astype(np.int64)


def png(width: int, height: int, depth: int, kind: int, packed: bytes) -> bytes:
    """Return a PNG; `kind` 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha; `packed`: its rows, each after a 0."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def flat_png(depth: int, kind: int, values: Sequence[int], side: int = 32) -> bytes:
    row = struct.pack(f">{len(values)}{'H' if depth == 16 else 'B'}", *values) * side
    return png(side, side, depth, kind, zlib.compress((b"\0" + row) * side))


def resized_header(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG that says it has another size."""
    at = re.search(rb"\xff[\xc0\xc2]\x00[\x0b\x11]\x08", jpeg)
    assert at
    return jpeg[: at.end()] + struct.pack(">HH", height, width) + jpeg[at.end() + 4 :]


def huge_jpeg(side: int) -> bytes:
    """Return a whole baseline JPEG, grey, of side × side pixels; a multiple of 32."""
    small = encoded(Image.new("L", (32, 32), 128), "jpeg")
    scan = small.index(b"\xff\xda")
    header = resized_header(small[: scan + 2 + int.from_bytes(small[scan + 2 : scan + 4], "big")], side, side)
    four_blocks = bytes([0b00101000, 0b10100010, 0b10001010])  # each: no change in grey (00), end of block (1010)
    return header + four_blocks * ((side // 8) ** 2 // 4) + b"\xff\xd9"


def test_without_a_margin_a_picture_of_the_right_size_is_left_alone() -> None:
    picture = noise(64, 64)
    pixels = np.asarray(picture).transpose(2, 0, 1)
    np.testing.assert_array_equal(pictures.decode(encoded(picture), 64, crop=1.0), pixels)
    wide = noise(96, 64)
    np.testing.assert_array_equal(
        pictures.decode(encoded(wide), 64, crop=1.0), np.asarray(wide)[:, 16:80].transpose(2, 0, 1)
    )


SHAPES = [
    (64, 64),
    (224, 224),
    (256, 256),
    (300, 200),
    (201, 317),
    (33, 1000),
    (1000, 33),
    (1, 1),
    (7, 300),
    (999, 640),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_same_as_torchvisions_preprocessing_to_the_bit(shape: tuple[int, int], kind: str) -> None:
    data = encoded(noise(*shape), kind)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with Image.open(BytesIO(data)) as picture:
        theirs = ImageClassification(crop_size=224)(picture).numpy() * std[:, None, None] + mean[:, None, None]
    ours = pictures.decode(data, 224)
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, np.round(theirs * 255))


def test_other_sizes_keep_the_proportion_of_torchvisions_crop() -> None:
    picture = noise(170, 130)
    for size in (32, 64, 100, 299):
        theirs = ImageClassification(crop_size=size, resize_size=round(size * 256 / 224), mean=(0, 0, 0), std=(1, 1, 1))
        np.testing.assert_array_equal(pictures.decode(encoded(picture), size), np.round(theirs(picture).numpy() * 255))


def test_of_a_very_long_picture_only_what_is_kept_is_resized() -> None:
    """So that its memory is bounded; it differs by a step from what is cut out of the whole."""
    picture = noise(2000, 10)
    kept = pictures.decode(encoded(picture), 224).astype(np.int64)
    whole = ImageClassification(crop_size=224, mean=(0, 0, 0), std=(1, 1, 1))(picture).numpy() * 255
    assert pictures.WHOLE_PIXELS < 200 * 256 * 256
    assert np.abs(kept - np.round(whole)).max() <= 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_rotation_is_applied(kind: str) -> None:
    upright = quarters()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # the viewer turns it by 90° clockwise
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif, quality=100)
        np.testing.assert_allclose(corners(pictures.decode(data, 32)), COLOURS, atol=6, err_msg=str(orientation))


def test_broken_exif_says_nothing() -> None:
    data = encoded(Image.fromarray(quarters()), "jpeg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xffgarbage", quality=100)
    with pictures.quiet():
        np.testing.assert_allclose(corners(pictures.decode(data, 32)), COLOURS, atol=6)


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (32, 32), (0, 0, 0, 51)), [204, 204, 204]),
        (Image.new("RGBA", (32, 32), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("LA", (32, 32), (0, 0)), [255, 255, 255]),
        (Image.new("L", (32, 32), 7), [7, 7, 7]),
        (Image.new("1", (32, 32), 1), [255, 255, 255]),
        (Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)), [156, 156, 156]),
        (Image.new("RGB", (32, 32), (1, 2, 3)).quantize(4), [1, 2, 3]),
    ],
)
def test_greyscale_palette_and_alpha(picture: Image.Image, colour: list[int]) -> None:
    assert pictures.decode(encoded(picture), 32)[:, 5, 5].tolist() == colour


def test_palette_with_a_transparent_entry() -> None:
    picture = Image.fromarray(quarters()).quantize(4)
    clear = picture.getpixel((4, 4))
    for kind in ("png", "gif"):
        pixels = corners(pictures.decode(encoded(picture, kind, transparency=clear), 32))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        np.testing.assert_allclose(pixels[1, 1], COLOURS[1, 1], atol=4)


@pytest.mark.parametrize(
    ("kind", "values", "colour"),
    [
        (0, [0x9C40], [156, 156, 156]),
        (2, [0x0AFF, 0x14FF, 0xC800], [10, 20, 200]),
        (4, [0x0000, 0x0000], [255, 255, 255]),
        (6, [0x0AFF, 0x14FF, 0xC800, 0xFFFF], [10, 20, 200]),
        (6, [0x0000, 0x0000, 0x0000, 0x3333], [204, 204, 204]),
    ],
)
def test_sixteen_bits_a_channel(kind: int, values: list[int], colour: list[int]) -> None:
    assert pictures.decode(flat_png(16, kind, values), 32)[:, 5, 5].tolist() == colour


def test_sixteen_bit_tiff() -> None:
    for order in ("<u2", ">u2"):
        data = encoded(Image.fromarray(np.full((32, 32), 40_000, dtype=order)), "tiff")
        assert pictures.decode(data, 32)[:, 5, 5].tolist() == [156, 156, 156]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadPicture, match="floating-point"):
        pictures.decode(encoded(Image.new("F", (32, 32), 0.5), "tiff"), 32)


def cmyk() -> Image.Image:
    """Return the four colours in inks: much cyan is little red."""
    inks = np.concatenate([255 - quarters(), np.zeros((32, 32, 1), dtype=np.uint8)], axis=2)
    return Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(inks[:, :, ink])) for ink in range(4)])


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


def test_cmyk() -> None:
    # Pillow writes Adobe's marker and, as Adobe does, inverted inks.
    adobe = encoded(cmyk(), "jpeg", quality=100)
    np.testing.assert_allclose(corners(pictures.decode(adobe, 32)), COLOURS, atol=6)
    np.testing.assert_allclose(corners(pictures.decode(encoded(cmyk(), "tiff"), 32)), COLOURS, atol=2)


def test_cmyk_jpeg_that_is_not_adobes_is_not_inverted() -> None:
    inverted = Image.merge("CMYK", [band.point(lambda ink: 255 - ink) for band in cmyk().split()])
    plain = without_adobe(encoded(inverted, "jpeg", quality=100))  # inverted twice: inks as they are
    np.testing.assert_allclose(corners(pictures.decode(plain, 32)), COLOURS, atol=6)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animated_picture_is_its_first_frame(kind: str) -> None:
    first, second = Image.fromarray(quarters()), Image.new("RGB", (32, 32), "black")
    data = encoded(first, kind, save_all=True, append_images=[second], duration=50, quality=100, lossless=True)
    np.testing.assert_allclose(corners(pictures.decode(data, 32)), COLOURS, atol=6)


def test_progressive_jpeg() -> None:
    plain, progressive = (encoded(noise(90, 70), "jpeg", progressive=p) for p in (False, True))
    assert plain != progressive
    np.testing.assert_array_equal(pictures.decode(plain, 64), pictures.decode(progressive, 64))


@pytest.mark.parametrize("kind", ["webp", "bmp", "tiff", "jpeg2000", "avif", "ppm"])
def test_other_formats(kind: str) -> None:
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(kind, {})
    data = encoded(Image.fromarray(quarters()), kind, **options)
    np.testing.assert_allclose(corners(pictures.decode(data, 32)), COLOURS, atol=6)


def test_one_pixel() -> None:
    for kind in ("png", "gif", "bmp"):
        pixels = pictures.decode(encoded(Image.new("RGB", (1, 1), (10, 20, 30)), kind), 64)
        assert (pixels == np.array([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize("shape", [(40_000, 2), (2, 40_000), (1, 7_001), (9_973, 1), (3, 5)])
def test_long_picture_needs_little_memory(shape: tuple[int, int]) -> None:
    pixels = pictures.decode(encoded(Image.new("RGB", shape, "green")), 64)
    assert (pixels == np.array([0, 128, 0])[:, None, None]).all()


def test_huge_jpeg_is_decoded_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, 1600, dtype=np.uint8)[None, :, None].repeat(1200, 0).repeat(3, 2)
    data = encoded(Image.fromarray(ramp), "jpeg", quality=95)
    whole = pictures.decode(data, 64).astype(np.int64)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1_000_000)
    reduced = pictures.decode(data, 64)
    assert np.abs(reduced - whole).max() <= 4
    with pytest.raises(BadPicture, match="too many pixels"):
        pictures.decode(data, 1200)  # nothing to reduce
    for refused in (encoded(Image.fromarray(ramp), "jpeg", progressive=True), encoded(Image.fromarray(ramp))):
        with pytest.raises(BadPicture, match="too many pixels"):
            pictures.decode(refused, 64)


def separate_scans() -> bytes:
    """Return a baseline JPEG that sends a colour after the other: three scans of one component each."""
    whole = resized_header(encoded(Image.new("RGB", (32, 32), (128, 128, 128)), "jpeg"), 20_000, 20_000)
    scan = whole.index(b"\xff\xda")
    return whole[:scan] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + whole[scan + 14 :]


MEMORY = """
import sys, time
from ctrkit import pictures

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

pictures.formats()
for path in sys.argv[1:]:
    before = peak()
    try:
        with pictures.quiet():
            found = str(pictures.decode(open(path, "rb").read(), 224).mean(dtype=float))
    except pictures.BadPicture as bad:
        found = str(bad)
    print(peak() - before, found, sep="|")
"""


def test_twenty_thousand_pixels_square_in_bounded_memory(tmp_path: Path) -> None:
    side = 20_000
    progressive = encoded(Image.new("RGB", (32, 32)), "jpeg", progressive=True)
    bomb = zlib.compressobj(1)
    row = bytes(1 + side // 8)
    packed = b"".join([*(bomb.compress(row) for _ in range(side)), bomb.flush()])
    files = {
        "huge.jpg": huge_jpeg(side),
        "bomb.png": png(side, side, 1, 0, packed),
        "progressive.jpg": resized_header(progressive, side, side),
        "scans.jpg": separate_scans(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    told = subprocess.run(
        [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in files)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    found = dict(zip(files, (line.split("|") for line in told.stdout.splitlines()), strict=True))
    assert float(found["huge.jpg"][1]) == 128
    for name in ("bomb.png", "progressive.jpg", "scans.jpg"):
        assert found[name][1].startswith("too many pixels: more than 67,108,864"), found
    assert int(found["huge.jpg"][0]) < 100, found  # MiB; 6.25 million pixels after the reduction
    assert all(int(found[name][0]) < 10 for name in files if name != "huge.jpg"), found


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, lock, square = 0, 0, threading.Lock(), pictures._square

    def watched(opened: Image.Image, size: int, short: int) -> pictures.Pixels:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1
        return square(opened, size, short)

    monkeypatch.setattr(pictures, "_square", watched)
    data = [encoded(noise(40, 40))] * 4
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: pictures.decode(one, 32), data))
        assert most == 4
        monkeypatch.setattr(pictures, "LARGE_PIXELS", 1_000)
        most = 0
        list(pool.map(lambda one: pictures.decode(one, 32), data))
    assert most == 1


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_truncated_picture_is_refused(kind: str) -> None:
    whole = encoded(noise(200, 200), kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadPicture, match=r"broken|not a picture") as bad:
            pictures.decode(whole[: int(len(whole) * share)], 64)
        assert "bytes not processed" not in str(bad.value)  # or every one would have its own reason


def test_unusable_bytes_are_refused_with_a_reason() -> None:
    whole = encoded(noise(200, 200), "jpeg")
    with pytest.raises(BadPicture, match=r"broken: .*truncated"):
        pictures.decode(whole[: len(whole) // 2], 64)
    with pytest.raises(BadPicture, match="not a picture"):
        pictures.decode(b"GET / HTTP/1.1", 64)
    with pytest.raises(BadPicture, match="not a picture"):  # Pillow would run another program
        pictures.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 64)
    with pytest.raises(BadPicture, match="broken"):
        pictures.decode(b"\xff\xd8\xff\xe0", 64)
    broken = encoded(noise(40, 40))
    with pytest.raises(BadPicture, match="broken"):
        pictures.decode(broken[:60] + b"\0" * 40 + broken[100:], 64)


def test_random_damage_is_refused_or_decoded_but_nothing_else_happens() -> None:
    rng = np.random.default_rng(5)
    for kind in ("jpeg", "png", "gif", "webp", "tiff", "bmp"):
        whole = np.frombuffer(encoded(noise(48, 40), kind), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 400), 3)] = rng.integers(0, 256, 3)
            with pictures.quiet(), contextlib.suppress(BadPicture):
                assert pictures.decode(damaged.tobytes(), 32).shape == (3, 32, 32)


def test_distinct_by_content(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 2), ("c", 1)]:
        noise(20, 20, seed).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    images = ["b", "a", "gone", "c", "empty", "../secret", "folder", ""]
    found = tell_distinct_in_memory(open_source(tmp_path, ExtractImages(template="{image}.png")), images)
    assert found.content.tolist() == [0, 1, -1, 1, -1, -1, -1, -1]
    assert [pictures.read(place) for place in found.places] == [(tmp_path / f"{n}.png").read_bytes() for n in "ba"]
    assert found.digests.shape == (2, 16)
    assert list(found.reasons) == [2, 4, 5, 6, 7]
    assert found.reasons[2] == "missing"
    assert found.reasons[4] == "empty file"
    assert "below the pictures folder" in found.reasons[5]
    assert "not a file" in found.reasons[6]


def test_distinct_of_many_and_of_none(tmp_path: Path) -> None:
    source = open_source(tmp_path, ExtractImages())
    assert len(tell_distinct_in_memory(source, []).places) == 0
    assert tell_distinct_in_memory(source, ["a"]).content.tolist() == [-1]
    for number in range(300):
        (tmp_path / f"{number}.jpg").write_bytes(b"%d" % (number % 7))
    found = tell_distinct_in_memory(source, [f"{number}.jpg" for number in range(300)])
    assert found.content.tolist() == [number % 7 for number in range(300)]


def test_a_picture_beyond_any_size_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.jpg", "wb") as f:
        f.truncate(1 << 40)
    found = tell_distinct_in_memory(open_source(tmp_path, ExtractImages()), ["a.jpg"])
    assert found.reasons == {0: "too large: more than 256 MiB"}
