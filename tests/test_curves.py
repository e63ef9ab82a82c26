"""Curves as PNG; the tables' test has their numbers."""

from pathlib import Path

from PIL import Image

from ctrkit.curves import draw


def test_names_of_any_script(tmp_path: Path) -> None:
    """No font here has all of these characters, and a warning would be an error."""
    points = [{"step": step, "valid_gauc": 0.5 + step / 100} for step in range(3)]
    for name, title in (("a.png", "plain"), ("b.png", "靴 👟 \U00013080 \ue000 क्ष")):
        draw([(title, points), ("$x_1$", points[1:])], title, tmp_path / name)
    sizes, pixels = zip(
        *((p.size, p.convert("RGB").tobytes()) for p in map(Image.open, sorted(tmp_path.iterdir()))), strict=True
    )
    assert sizes[0] == sizes[1]
    assert pixels[0] != pixels[1]
