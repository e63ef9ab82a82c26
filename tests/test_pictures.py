"""Decoding and comparing pictures: known pixels, torchvision's own preprocessing, and what must be refused."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from ctrkit import pictures
from ctrkit.errors import UsageError
from ctrkit.pictures import BadPicture


def encoded(picture: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_picture_of_the_right_size_is_left_alone() -> None:
    picture = noise(64, 64)
    np.testing.assert_array_equal(pictures.decode(encoded(picture), 64), np.asarray(picture).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (201, 317), (33, 1000), (256, 256)])
def test_same_as_torchvisions_preprocessing(shape: tuple[int, int]) -> None:
    picture = noise(*shape)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    theirs = ImageClassification(crop_size=224)(picture).numpy() * std[:, None, None] + mean[:, None, None]
    ours = pictures.decode(encoded(picture), 224)
    assert ours.shape == (3, 224, 224)
    np.testing.assert_allclose(ours, theirs * 255, atol=1.01)


def test_exif_rotation_is_applied() -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.paste("blue", (0, 0, 32, 16))  # blue above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = pictures.decode(encoded(picture, exif=exif), 32)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 31, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (32, 32), (0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (32, 32), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("L", (32, 32), 7), [7, 7, 7]),
        (Image.new("1", (32, 32), 1), [255, 255, 255]),
        (Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)), [156, 156, 156]),
        (Image.new("RGB", (32, 32), (1, 2, 3)).quantize(4), [1, 2, 3]),
    ],
)
def test_any_mode_becomes_rgb(picture: Image.Image, colour: list[int]) -> None:
    assert pictures.decode(encoded(picture), 32)[:, 5, 5].tolist() == colour


def test_cmyk_jpeg() -> None:
    assert pictures.decode(encoded(Image.new("CMYK", (32, 32)), "jpeg"), 32).min() >= 250


def test_very_long_picture_needs_little_memory() -> None:
    assert pictures.decode(encoded(Image.new("RGB", (40_000, 2), "green")), 64).shape == (3, 64, 64)


def test_unusable_bytes_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(noise(200, 200), "jpeg")
    with pytest.raises(BadPicture, match=r"broken: .*truncated"):
        pictures.decode(whole[: len(whole) // 2], 64)
    with pytest.raises(BadPicture, match="not a picture"):
        pictures.decode(b"GET / HTTP/1.1", 64)
    png = encoded(noise(40, 40))
    with pytest.raises(BadPicture, match="broken"):
        pictures.decode(png[:60] + b"\0" * 40 + png[100:], 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)  # Pillow warns from here, refuses from twice this
    with pictures.quiet(), pytest.raises(BadPicture, match="too many pixels"):
        pictures.decode(whole, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadPicture, match="too many pixels"):
        pictures.decode(whole, 64)


def test_distinct_by_content(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 2), ("c", 1)]:
        noise(20, 20, seed).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    images = ["b", "a", "gone", "c", "empty", "../secret", "folder", ""]
    found = pictures.distinct(tmp_path, "{image}.png", images)
    assert found.content.tolist() == [0, 1, -1, 1, -1, -1, -1, -1]
    assert found.paths == [tmp_path / "b.png", tmp_path / "a.png"]
    assert found.reasons[2] == "missing"
    assert found.reasons[4] == "empty file"
    assert "below the pictures folder" in found.reasons[5]
    assert "Is a directory" in found.reasons[6]


def test_find_inverts_the_template(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ["x/b.jpg", "x/a.jpg", "c.jpg", "x/d.png", "x/notes.txt", "x/.hidden.jpg"]:
        (tmp_path / name).touch()
    assert pictures.find(tmp_path, "x/{image}.jpg") == ["a", "b"]
    assert pictures.find(tmp_path, "{image}") == ["c.jpg", "x/a.jpg", "x/b.jpg", "x/d.png"]
    with pytest.raises(UsageError, match="does not contain"):
        pictures.find(tmp_path, "x.jpg")
