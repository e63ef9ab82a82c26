"""The report: its numbers are metrics.json's, its text is escaped, and it needs no other file."""

import html.parser
import json

import h5py
import numpy as np
import polars as pl
import pytest
from PIL import Image

from ctrkit import report
from ctrkit.contact_sheet import ContactSheet, Neighbour, Query
from ctrkit.errors import UserError
from ctrkit.evaluation import evaluate
from ctrkit.gallery import Behaviour, Case, Thumbnails
from ctrkit.recipe import Eval, ExtractImages, Recipe

HOSTILE = "<script>alert('x')</script>"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text of each table row, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def metrics(tmp_path):
    rng = np.random.default_rng(0)
    n = 800
    table = pl.DataFrame(
        {
            "user": rng.integers(0, 60, n),
            "click": rng.integers(0, 2, n),
            "unseen_ad": rng.random(n) < 0.4,
            "history_length": rng.integers(0, 30, n),
        }
    )
    paths = {}
    for name, share in (("basic", 0.1), (HOSTILE, 0.6)):
        paths[name] = tmp_path / f"{len(paths)}.parquet"
        score = pl.Series(rng.random(n)) * (1 - share) + share * table["click"]
        table.with_columns(score=score).write_parquet(paths[name])
    return evaluate(paths, Eval(baseline="basic", compare=((HOSTILE, "basic"),), bootstrap=50))


def case(sample_id=1, images=("a", "b", "gone")):
    shown = tuple(Behaviour(image=image, weight=1 / (k + 2)) for k, image in enumerate(images))
    return Case(
        sample_id=sample_id,
        ad_image="a",
        click=True,
        score=0.25,
        behaviours=len(images),
        highest=shown[:2],
        lowest=shown[2:],
    )


def pictures(folder):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    return Thumbnails(folder, ExtractImages(template="{image}.png", size=64))


def full(recipe, metrics, folder):
    return report.render(
        recipe,
        metrics,
        data=[{"split": "test", "days": 1, "impressions": 800, "clicks": 90, "users": 60, "ads": 7, "unseen": 0.4}],
        rejects=[(HOSTILE, 2)],
        picture_facts=[("Weights", HOSTILE)],
        histories={
            "basic": [{"step": 10, "loss": 0.6, "valid_gauc": 0.55}],
            HOSTILE: [{"step": 10, "loss": 0.5, "valid_gauc": None}],
        },
        shown=report.Gallery(
            variant=HOSTILE, cases=[case(1), case(2, (HOSTILE,))], looked_at=12, thumbnails=pictures(folder)
        ),
        stages=[("train " + HOSTILE, 12.34)],
    )


def sheet(folder, searched=9, rows=9):
    thumbnails = pictures(folder)
    near = (Neighbour(image="b", similarity=0.71249), Neighbour(image=HOSTILE, similarity=-0.25))
    queries = [Query(image="a", count=1234, neighbours=near), Query(image="b", count=1, neighbours=())]
    return ContactSheet(queries=queries, searched=searched, rows=rows, thumbnails=thumbnails)


@pytest.fixture
def recipe():
    return Recipe.model_validate({"name": "r", "about": HOSTILE, "report": {"title": HOSTILE}})


def test_numbers_are_those_of_metrics_json(recipe, metrics, tmp_path):
    page = Page(full(recipe, metrics, tmp_path))
    by_name = {name: [row for row in page.rows if row[0] == name] for name in metrics["order"]["variants"]}
    for name, slice_name in (
        ("basic", None),
        (HOSTILE, None),
        ("basic", "unseen_ad=true"),
        (HOSTILE, "unseen_ad=true"),
    ):
        variant = metrics["variants"][name]
        one = variant["slices"][slice_name] if slice_name else variant["all"]
        row = by_name[name][1 if slice_name else 0]
        assert row[1] == f"{one['gauc']:.4f}"
        assert row[2] == f"[{one['gauc_low']:.4f}, {one['gauc_high']:.4f}]"
        if name == "basic":
            assert row[3].strip() == "baseline"
        else:
            expected = f"{one['gain']:+.4f} [{one['gain_low']:+.4f}, {one['gain_high']:+.4f}]"
            assert row[3].split("\n")[0].strip() == expected
        assert row[4] == f"{one['r_gauc']:+.2%}"
        assert row[5:7] == [f"{one['auc']:.4f}", f"{one['log_loss']:.4f}"]
    slices = [f"{metrics['variants']['basic']['slices'][s]['gauc']:.4f}" for s in metrics["order"]["slices"]]
    shown = [cell.strip() for cell in by_name["basic"][2][1:]]
    assert [cell.strip("()") for cell in shown] == slices
    few = [metrics["variants"]["basic"]["slices"][s]["users_kept"] < 30 for s in metrics["order"]["slices"]]
    assert [cell.startswith("(") for cell in shown] == few
    assert True in few
    c = metrics["comparisons"][0]
    row = next(row for row in page.rows if row[:2] == [HOSTILE, "basic"])
    assert row[2:4] == ["all", f"{c['difference']:+.4f}"]
    assert row[5].strip() == "better"
    one = metrics["variants"]["basic"]["all"]
    assert f"{one['users_kept']} users kept, {one['users_dropped']} dropped" in page.text
    assert "averaged by impressions" in page.text


def test_hostile_text_stays_text(recipe, metrics, tmp_path):
    text = full(recipe, metrics, tmp_path)
    page = Page(text)
    assert "<script" not in text
    assert page.of("script") == []
    assert page.text.count(HOSTILE) > 8


def test_nothing_is_loaded_from_elsewhere(recipe, metrics, tmp_path):
    text = full(recipe, metrics, tmp_path)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_pictures_are_inlined_and_missing_ones_have_a_place(recipe, metrics, tmp_path):
    page = Page(full(recipe, metrics, tmp_path))
    images = page.of("img")
    assert len(images) == 4  # two ads, a and b of the first case
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert len([s for s in page.of("span") if s.get("class") == "missing"]) == 2
    for word in ("0.500", "0.333", "0.250", "score 0.250", "clicked", "of 12 impressions"):
        assert word in page.text


def test_the_contact_sheet(metrics, tmp_path):
    text = report.render(Recipe(name="r"), metrics, sheet=sheet(tmp_path, 20_000, 3_000_000))
    page = Page(text)
    assert len(page.of("img")) == 3  # a, b beside it, b
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    for word in ("0.712", "-0.250", "seen 1,234 times in training", "seen 1 time in training", HOSTILE):
        assert word in page.text
    assert "<script" not in text
    assert "Searched: 20,000 of 3,000,000 distinct pictures, those that training shows most; the mean is" in page.text
    page = Page(report.render(Recipe(name="r"), metrics, sheet=sheet(tmp_path)))
    assert "Searched: all 9 distinct pictures. Of pictures alike to more than 0.9999 one is shown" in page.text
    for none in (None, ContactSheet(queries=[], searched=0, rows=9, thumbnails=pictures(tmp_path))):
        assert "alike to the network" not in report.render(Recipe(name="r"), metrics, sheet=none)


def test_the_same_twice(recipe, metrics, tmp_path):
    assert full(recipe, metrics, tmp_path) == full(recipe, metrics, tmp_path)


def test_simulated_data_is_said_to_be(metrics):
    simulated = Recipe.model_validate({"name": "r", "simulate": {}})
    assert "Simulated data" in report.render(simulated, metrics)
    assert "imulated" not in report.render(Recipe(name="r"), metrics)


def test_metrics_alone_make_a_report(metrics):
    page = Page(report.render(Recipe(name="r"), metrics))
    assert "No gallery" in page.text
    assert "Learning curves" not in page.text


def test_facts_of_the_data(tmp_path):
    days = {"train": ["2024-03-01", "2024-03-02"], "valid": [], "test": ["2024-03-03"]}
    for k, day in enumerate(["2024-03-01", "2024-03-02", "2024-03-03", "2024-03-04"]):
        folder = tmp_path / "samples" / f"day={day}"
        folder.mkdir(parents=True)
        table = {"user": ["a", f"u{k}"], "ad": ["x", "y"], "click": [1, 0], "unseen_ad": [k == 2, False]}
        pl.DataFrame(table, schema_overrides={"click": pl.Int8}).write_parquet(folder / "part-0000.parquet")
    (tmp_path / "split.json").write_text(json.dumps(days))
    rejected = pl.DataFrame({"file": ["f"] * 3, "row": [1, 2, 3], "reason": ["time", "user", "time"]})
    rejected.write_parquet(tmp_path / "rejects.parquet")
    train, test, both = report.data_facts(tmp_path)
    assert train == {
        "split": "train",
        "days": 2,
        "impressions": 4,
        "clicks": 2,
        "users": 3,
        "ads": 2,
        "unseen": 0.0,
    }
    assert (test["split"], test["impressions"], test["unseen"]) == ("test", 2, 0.5)
    assert (both["split"], both["days"], both["impressions"], both["users"]) == ("all", 3, 6, 4)
    assert report.rejects(tmp_path) == [("time", 2), ("user", 1)]


def test_facts_of_the_pictures(tmp_path):
    path = tmp_path / "features.h5"
    with h5py.File(path, "w") as f:
        f["features"] = np.zeros((2, 5), np.float16)
        f["image"] = ["a", "b", "c"]
        f["row"] = np.array([0, 1, -1])
        f.attrs["backbone"], f.attrs["layer"], f.attrs["weights"] = "vgg16", "fc6", "random, seed 0"
    facts = dict(report.picture_facts(path))
    assert facts["Pictures"] == "3, of these 1 missing or unreadable"
    assert facts["Network"] == "vgg16, layer fc6, 5 numbers a picture"
    assert facts["Distinct pictures"] == "2"
    assert facts["Weights"].startswith("random, seed 0: an untrained network")
    (tmp_path / "no.h5").write_text("no")
    with pytest.raises(UserError, match=r"not a features\.h5"):
        report.picture_facts(tmp_path / "no.h5")


def test_histories(tmp_path):
    assert report.read_history(tmp_path) == []
    lines = ['{"step": 1, "loss": 0.5, "valid_gauc": null}', '{"step": 2, "loss": 0.45}']
    lines += ['{"step": 2, "loss": 0.4, "valid_gauc": 0.6}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [e["loss"] for e in report.read_history(tmp_path)] == [0.5, 0.4]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1,\n')
    with pytest.raises(UserError, match="not JSON"):
        report.read_history(tmp_path)


def test_another_json_is_no_metrics_json(tmp_path):
    (tmp_path / "m.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is not a metrics\.json; write one with: ctrkit eval"):
        report.read_metrics(tmp_path / "m.json")
