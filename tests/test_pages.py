"""The pages in headless Chromium: quiet, whole, on a phone too, and hostile names stay text.

Skipped where there is no Chromium: `apt-get install chromium` has it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from playwright.sync_api import Browser

from tests.browser import DESKTOP, PHONE, Watched, chromium, executable
from tests.stages.test_explain import must as explain
from tests.tiny_run import TinyRun

FILE = """"'><img src=x onerror=hacked=1>"""
HOSTILE = FILE + "</script><script>hacked=1</script>"
UNBROKEN = "W" * 80 + "靴👟"
VARIANT = "<script>hacked()</script>"
"""A variant's name, and a run's."""
PAGES = ("report", "explain", "compare")
PAPER = 703
"""Width of A4 between margins of 12 mm, in pixels of 1/96 inch."""

pytestmark = pytest.mark.skipif(
    executable() is None, reason="NO CHROMIUM HERE: the pages are not looked at; apt-get install chromium"
)


def spoil(raw: Path) -> None:
    """Give every user, ad, goods, category, shop and picture of the tiny shop a hostile name."""
    for name in ("impressions", "behaviours", "users", "ads", "goods"):
        table = pl.read_csv(raw / f"{name}.csv")
        text = [c for c in ("user", "ad", "goods", "category", "shop") if c in table.columns]
        table = table.with_columns(pl.col(text).cast(pl.String) + HOSTILE)
        if "category" in text:
            table = table.with_columns(pl.col("category") + UNBROKEN)
        if "image" in table.columns:
            table = table.with_columns(pl.col("image").str.replace(".jpg", f"{FILE}.jpg", literal=True))
        table.write_csv(raw / f"{name}.csv")
    for picture in list((raw / "pictures").iterdir()):
        picture.rename(picture.with_name(f"{picture.stem}{FILE}.jpg"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, made of a run in which everything has a hostile name."""
    run = TinyRun(tmp_path_factory.mktemp("hostile")).build(spoil)
    folder, reads = run.folder, run.reads()
    variants = {VARIANT: (), "din": ("--variant", "din")}
    options: list[object] = ["--metrics", folder / "metrics.json", "--pictures", folder / "raw" / "pictures"]
    scored = []
    for n, (name, words) in enumerate(variants.items()):
        model, predictions = run.train(folder / str(n) / "model", *words), folder / f"{n}.parquet"
        run.must("predict", *reads, *words, "--model", model, "--out", predictions)
        options += ["--model", f"{name}={model}", "--predictions", f"{name}={predictions}"]
        scored.append(f"{name}={predictions}")
    run.must("eval", "--gauc", *scored, "--set", "eval.bootstrap=20", "--json", folder / "metrics.json")
    run.must("report", *reads, *options, "--out", folder / "report.html")
    row = pl.read_parquet(folder / "0.parquet").sort("history_length", "sample_id").row(-1, named=True)
    whom = ["--user", row["user"], "--day", row["day"], "--ad", row["ad"]]
    explain("--run", folder, "--variant", "0", *whom, "--html", folder / "explain.html")
    compare(f"{VARIANT}={folder / 'metrics.json'}", "--html", folder / "compare.html")
    return folder


def compare(*words: object) -> None:
    from tests.shop import ctrkit

    result = ctrkit("compare", *words)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_fails_and_nothing_leaves_the_page(name: str, width: int, made: Path, browser: Browser) -> None:
    with Watched(browser, made / f"{name}.html", width) as watched:
        page = watched.page
        page.wait_for_load_state("networkidle")
        assert watched.messages == []
        assert watched.broken_pictures() == []
        assert watched.overhang() <= 0
        assert watched.elsewhere() == []
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.locator("img").count() >= {"report": 20, "explain": 2, "compare": 0}[name]


@pytest.mark.parametrize("name", PAGES)
def test_paper_is_wide_enough(name: str, made: Path, browser: Browser) -> None:
    with Watched(browser, made / f"{name}.html", PAPER) as watched:
        watched.page.emulate_media(media="print")
        assert watched.overhang() <= 0


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_printed_on_one_page(name: str, made: Path, browser: Browser) -> None:
    with Watched(browser, made / f"{name}.html", PAPER) as watched:
        watched.page.emulate_media(media="print")
        breaks = "tables => tables.map(t => getComputedStyle(t).breakInside)"
        assert set(watched.page.locator("table").evaluate_all(breaks)) == {"avoid"}


@pytest.mark.parametrize("name", PAGES)
def test_hostile_names_are_text(name: str, made: Path, browser: Browser) -> None:
    with Watched(browser, made / f"{name}.html") as watched:
        page = watched.page
        text = page.locator("body").inner_text()
        assert (VARIANT if name == "compare" else HOSTILE) in text
        assert page.locator("img[onerror], [onload], img[src=x]").count() == 0
        code = page.locator("script:not([type='application/json'])").all_inner_texts()
        assert not any("hacked" in one for one in code)
        for data in page.locator("script[type='application/json']").all_inner_texts():
            json.loads(data)
        assert "<script>" not in page.title().replace(VARIANT, "").replace(HOSTILE, "")


def test_the_gallery_by_category(made: Path, browser: Browser) -> None:
    with Watched(browser, made / "report.html") as watched:
        page = watched.page
        cases = page.locator("#attention .case")
        every = cases.evaluate_all("cs => cs.map(c => c.dataset.category)")
        names = page.locator("#attention-filter option").all_inner_texts()
        assert sorted(set(every)) == sorted(names[1:])
        assert len(names) > 2
        for name in names[1:]:
            page.select_option("#attention-filter", label=name)
            seen = cases.evaluate_all("cs => cs.filter(c => c.checkVisibility()).map(c => c.dataset.category)")
            assert seen == [name] * every.count(name)
        page.select_option("#attention-filter", index=0)
        assert cases.evaluate_all("cs => cs.every(c => c.checkVisibility())")
        assert watched.messages == []


NEAREST = """([x, y]) => {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const far = [...document.querySelectorAll("#map .point")].map(p => {
    const b = p.getBoundingClientRect();
    return Math.hypot(b.left + b.width / 2 - x, b.top + b.height / 2 - y);
  });
  return data.ads.filter((_, n) => far[n] < Math.min(...far) + 1.5).map(ad => ad[0]);
}"""
"""The ads whose marks are nearest to a place on the screen, of those equally near all."""


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_map_tells_what_is_under_the_pointer(width: int, made: Path, browser: Browser) -> None:
    with Watched(browser, made / "report.html", width, has_touch=width == PHONE) as watched:
        page, tip = watched.page, watched.page.locator("#map-tip")
        page.locator("#embedding-map").scroll_into_view_if_needed()
        assert not tip.is_visible()
        told = set()
        marks = page.locator("#map .point").count()
        for n in range(0, marks, marks // 6):
            point = page.locator("#map .point").nth(n)
            point.scroll_into_view_if_needed()
            box = point.bounding_box()
            assert box is not None
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            (page.touchscreen.tap if width == PHONE else page.mouse.move)(x, y)
            assert tip.is_visible()
            first = tip.locator("span").inner_text().split("\n")[0]
            assert first in [f"ad {ad}" for ad in page.evaluate(NEAREST, [x, y])]
            assert tip.locator("img").evaluate("i => i.naturalWidth") > 0
            told.add(first)
        assert len(told) > 3
        assert watched.messages == []
        assert watched.overhang() <= 0


def test_the_map_by_user_and_category(made: Path, browser: Browser) -> None:
    with Watched(browser, made / "report.html") as watched:
        page = watched.page
        points = page.locator("#map .point")

        def fills() -> list[str]:
            found: list[str] = points.evaluate_all("ps => ps.map(p => p.getAttribute('fill'))")
            return found

        users = page.locator("#map-user option").count()
        assert users > 1
        before = fills()
        page.select_option("#map-user", index=users - 1)
        assert fills() != before
        data = json.loads(page.locator("#map-data").inner_text())
        categories = [ad[1] for ad in data["ads"]]
        page.select_option("#map-category", index=1)
        chosen = page.locator("#map-category option").nth(1).inner_text()
        faded = points.evaluate_all("ps => ps.map(p => p.classList.contains('off'))")
        assert faded == [category != chosen for category in categories]
        assert True in faded
        assert False in faded


def test_the_report_without_javascript(made: Path, browser: Browser) -> None:
    """As it is printed, or shown by a mail program: all of it is there."""
    with Watched(browser, made / "report.html", java_script_enabled=False) as watched:
        page = watched.page
        cases = page.locator("#attention .case")
        assert cases.count() > 1
        assert all(case.is_visible() for case in cases.all())
        assert page.locator("#map .point").first.is_visible()
        assert not page.locator("#attention-filter").is_visible()
        assert not page.locator("#map-tip").is_visible()
