"""Write the README's pictures: parts of a run's report and of one explanation, as Chromium shows them.

python -m tests.screenshots runs/demo docs/images
"""

import argparse
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import polars as pl
from PIL import Image
from playwright.sync_api import Locator

from ctrkit import files, gallery
from ctrkit.cli import main as ctrkit
from ctrkit.errors import UserError
from tests.browser import Watched, chromium, executable

WIDTH = 1080
"""Of the window, pixels."""
MARGIN = 16
LARGEST = 300_000
"""Bytes of a picture."""
COLOURS = (256, 128, 64)
"""Tried one after the other, until the file is small enough."""
PARTS = {
    "report": ("header", "#results .columns", 0),
    "attention": ("#attention", "#attention .case", 1),
    "activation": ("#activation", "#activation .case", 1),
    "embedding-map": ("#embedding-map", "#embedding-map", 0),
    "calibration": ("#calibration", "#calibration", 0),
}
"""Picture → the element it begins with, and the element (of those that match, the how manieth) that it ends with."""


def explained(run: Path, page: Path) -> None:
    """Write the explanation of the clicked impression with the highest score, among those with a long history."""
    names = files.read_json(run / "metrics.json")["order"]["variants"]
    variant = next((name for name in names if gallery.attends(run / name / "model")), names[0])
    clicked = pl.read_parquet(run / variant / "predictions.parquet").filter(click=1)
    long = clicked.filter(pl.col("history_length") >= clicked["history_length"].quantile(0.75))
    row = long.sort("score", "sample_id", descending=[True, False]).row(0, named=True)
    whom = ["--user", row["user"], "--day", str(row["day"]), "--ad", row["ad"]]
    words = ["explain", "--run", str(run), "--variant", variant, *whom, "--html", str(page)]
    ctrkit.main(words, standalone_mode=False)


def cut(watched: Watched, first: str, last: str, number: int, hover: Locator | None = None) -> bytes | None:
    """Return the page from one element's top to another's end, PNG; None where the page has them not. The pointer rests
    on `hover`."""
    page = watched.page
    ends = page.locator(last)
    if not page.locator(first).count() or not ends.count():
        return None
    top: float = page.locator(first).first.evaluate("e => e.getBoundingClientRect().top + scrollY")
    end: float = ends.nth(min(number, ends.count() - 1)).evaluate("e => e.getBoundingClientRect().bottom + scrollY")
    top = max(0.0, top - MARGIN)
    page.set_viewport_size({"width": WIDTH, "height": round(end + 4 - top)})
    at: float = page.evaluate("y => { scrollTo({ top: y, behavior: 'instant' }); return scrollY; }", top)
    if hover is not None:
        hover.hover(force=True)
    return page.screenshot(clip={"x": 0, "y": top - at, "width": WIDTH, "height": end + 4 - top})


def write(shot: bytes, path: Path) -> None:
    """Write a picture with as few colours as make it small."""
    image = Image.open(BytesIO(shot)).convert("RGB")
    for colours in COLOURS:
        out = BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        if out.tell() < LARGEST:
            break
    else:
        raise UserError(f"{path.name} takes {out.tell():,} bytes, more than {LARGEST:,}: cut less of the page")
    with files.atomic(path) as temporary:
        temporary.write_bytes(out.getvalue())
    print(f"screenshots: {path}, {image.width} × {image.height}, {out.tell():,} bytes")


def screenshots(run: Path, folder: Path) -> None:
    """Write all pictures of a run into a folder."""
    if executable() is None:
        raise UserError("there is no Chromium on the PATH; Debian has it: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, chromium() as browser:
        with Watched(browser, run / "report.html", WIDTH) as watched:
            marks = watched.page.locator("#map .point")
            for name, (first, last, number) in PARTS.items():
                hover = marks.nth(marks.count() // 2) if name == "embedding-map" and marks.count() else None
                shot = cut(watched, first, last, number, hover)
                if shot is None:
                    print(f"screenshots: the report has no {name}")
                else:
                    write(shot, folder / f"{name}.png")
        page = Path(work) / "explain.html"
        explained(run, page)
        with Watched(browser, page, WIDTH) as watched:
            shot = cut(watched, "header", "#behaviours .card", 0)
            if shot is not None:
                write(shot, folder / "explain.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, with report.html")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    arguments = parser.parse_args()
    try:
        screenshots(arguments.run, arguments.folder)
    except UserError as e:
        sys.exit(f"Error: {e.message}")
