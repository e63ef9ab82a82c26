"""The report: its numbers are metrics.json's, its text is escaped, and it needs no other file."""

import html.parser
import json
import re

import h5py
import numpy as np
import polars as pl
import pytest
from PIL import Image

from ctrkit import story
from ctrkit.contact_sheet import ContactSheet, Neighbour, Query
from ctrkit.curves import read_history
from ctrkit.embedding_map import EmbeddingMap
from ctrkit.errors import UserError
from ctrkit.evaluation import evaluate
from ctrkit.gallery import Activation, Behaviour, Case, Thumbnails
from ctrkit.metric_tables import read_metrics
from ctrkit.recipe import Eval, ExtractImages, Recipe
from ctrkit.report_content import Activations, Content, Errors, Gallery
from ctrkit.report_figures import day_table, history_table, make_figures, slice_table
from ctrkit.report_page import render
from ctrkit.surprises import TOO_HIGH, UNLIKELY

HOSTILE = "<script>alert('x')</script>"
SECTIONS = (
    "results",
    "slices",
    "learning-curves",
    "calibration",
    "attention",
    "activation",
    "embedding-map",
    "neighbours",
    "surprises",
    "data",
    "models",
    "time",
)


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


def page_of(recipe, metrics, **content):
    content.setdefault("thumbnails", Thumbnails(None, ExtractImages()))
    made = Content(metrics=metrics, **content)
    return render(recipe, made, make_figures(made))


def activation():
    shown = tuple(Behaviour(image=image, weight=w, name=HOSTILE) for image, w in (("a", 0.75), ("gone", -0.25)))
    words = {"user": HOSTILE, "ad": HOSTILE, "category": HOSTILE, "ad_image": "b"}
    return Activation(sample_id=3, click=False, score=0.5, behaviours=shown, left_out=4, **words)


def goods():
    n = 10
    table = {
        "ad": [HOSTILE, *(f"a{k}" for k in range(1, n))],
        "image": ["a", "b", "gone", *[""] * (n - 3)],
        "category": [HOSTILE, *["hats"] * (n - 1)],
        "impressions": list(range(n, 0, -1)),
        "x": [k / (n - 1) for k in range(n)],
        "y": [(k % 3) / 2 for k in range(n)],
        "score_0": [k / 100 for k in range(n)],
        "score_1": [(n - k) / 50 for k in range(n)],
    }
    return EmbeddingMap(variant=HOSTILE, users=[HOSTILE, "u2"], ads=pl.DataFrame(table), parts=[HOSTILE])


def errors():
    rows = [{"kind": UNLIKELY, "sample_id": 7, "click": 1, "score": 0.01, "loss": 4.605, "day": "2024-03-01"}]
    ads = [{"kind": TOO_HIGH, "impressions": 1234, "clicks": 1, "predicted": 41.5, "deviations": 6.25}]
    words = {"user": HOSTILE, "ad": HOSTILE, "image": "a", "category": HOSTILE}
    return Errors(variant=HOSTILE, impressions=[r | words for r in rows], ads=[r | words for r in ads])


def full(recipe, metrics, folder):
    days = {
        "day": ["2024-03-01", "2024-03-02"],
        "split": ["train", "test"],
        "impressions": [900, 800],
        "clicks": [99, 90],
    }
    steps = [{"step": s, "epoch": 1, "samples": s, "loss": 0.7 - s / 100} for s in (5, 10, 15)]
    return page_of(
        recipe,
        metrics,
        thumbnails=pictures(folder),
        data=[{"split": "test", "days": 1, "impressions": 800, "clicks": 90, "users": 60, "ads": 7, "unseen": 0.4}],
        days=pl.DataFrame(days),
        rejects=[(HOSTILE, 2)],
        picture_facts=[("Pictures", "3, of these 1 missing"), ("Weights", HOSTILE)],
        models=[
            {"variant": HOSTILE, "model": HOSTILE, "looks_at": HOSTILE, "samples": 1, "steps": 2}
            | {"best_step": 2, "samples_a_second": 1.5, "seconds": 75.0}
        ],
        histories={
            "basic": [
                *steps,
                {"step": 10, "loss": 0.6, "valid_loss": 0.61, "valid_gauc": 0.55},
                {"step": 20, "loss": 0.5, "valid_loss": 0.72, "valid_gauc": 0.54},
            ],
            HOSTILE: [{"step": 10, "loss": 0.5, "valid_gauc": None}],
        },
        attention=Gallery(variant=HOSTILE, cases=[case(1), case(2, (HOSTILE,))], looked_at=12),
        activation=Activations(variant=HOSTILE, cases=[activation()], normalised=False),
        map=goods(),
        errors=errors(),
        stages=[("train " + HOSTILE, 12.34)],
    )


def sheet(folder, searched=9, rows=9):
    thumbnails = pictures(folder)
    near = (Neighbour(image="b", similarity=0.71249), Neighbour(image=HOSTILE, similarity=-0.25))
    queries = [Query(image="a", count=1234, neighbours=near), Query(image="b", count=1, neighbours=())]
    made = ContactSheet(queries=queries, searched=searched, rows=rows, thumbnails=thumbnails)
    return {"sheet": made, "thumbnails": thumbnails}


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
    assert HOSTILE not in text
    assert len(page.of("script")) == 2  # the map's numbers and the page's own
    assert page.text.count(HOSTILE) > 30
    told = re.search(r'<script type="application/json" id="map-data">(.*?)</script>', text, re.S)[1]
    assert json.loads(told)["ads"][0] == [HOSTILE, HOSTILE, 10]
    assert all(len(a) < 2 for name, a in page.tags if name == "img" and "src" not in a)


def test_nothing_is_loaded_from_elsewhere(recipe, metrics, tmp_path):
    text = full(recipe, metrics, tmp_path)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_sections_and_their_links(recipe, metrics, tmp_path):
    page = Page(full(recipe, metrics, tmp_path))
    sections = [s["id"] for s in page.of("section")]
    assert sorted(sections) == sorted(SECTIONS)
    assert sorted(a["href"] for a in page.of("a")) == sorted(f"#{s}" for s in SECTIONS)


def test_pictures_are_inlined_and_missing_ones_have_a_place(recipe, metrics, tmp_path):
    page = Page(full(recipe, metrics, tmp_path))
    images = page.of("img")
    # two ads, a and b of the first case; ad and a of the activation; a of the map; two of the errors
    assert len(images) == 4 + 2 + 1 + 2
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert len([s for s in page.of("span") if s.get("class") == "missing"]) == 2 + 1
    for word in (
        "0.500",
        "0.333",
        "0.250",
        "score 0.250",
        "clicked",
        "of 12 impressions",
        "0.75",
        "-0.25",
        "4 earlier",
    ):
        assert word in page.text


def test_slices_of_few_users_are_not_drawn(metrics):
    made = slice_table(metrics)
    slices = metrics["variants"]["basic"]["slices"]
    expected = {name for name, one in slices.items() if one["users_kept"] >= 30}
    assert set(made["slice"]) == expected < set(slices)
    for one in [one for v in metrics["variants"].values() for one in v["slices"].values()]:
        one["users_kept"] = 3
    assert set(slice_table(metrics)["slice"]) == set(slices)


def test_long_trainings_are_thinned(metrics):
    lines = [{"step": n, "epoch": 1, "samples": n, "loss": float(n)} for n in range(1, 1001)]
    lines.insert(500, {"step": 500, "epoch": 1, "samples": 500, "loss": 9.0, "valid_loss": 1.0, "valid_gauc": 0.6})
    content = Content(metrics=metrics, thumbnails=Thumbnails(None, ExtractImages()), histories={"basic": lines})
    made = history_table(content)
    losses = made.filter(pl.col("loss").is_not_null())
    assert losses["loss"].to_list()[:2] == [2.0, 5.0]
    assert losses["step"].to_list()[-2:] == [999, 1000]
    assert made.filter(pl.col("best")).select("step", "valid_gauc").rows() == [(500, 0.6)]
    assert made["step"].is_sorted()


def test_many_days_are_drawn_together():
    split = ["train"] * 180 + ["test"] * 20
    days = {"day": [f"d{k:03}" for k in range(200)], "split": split, "impressions": [10] * 200, "clicks": [1] * 200}
    made = day_table(pl.DataFrame(days))
    assert made.height == 60 + 7
    assert made.row(0) == ("d000", "d002", "train", 30, 3, 0.1)
    assert made.row(-1) == ("d198", "d199", "test", 20, 2, 0.1)
    assert made["impressions"].sum() == 2000
    few = day_table(pl.DataFrame(days).head(5))
    assert few["first_day"].to_list() == few["last_day"].to_list() == days["day"][:5]


def test_overfitting_is_told(recipe, metrics, tmp_path):
    row = next(row for row in Page(full(recipe, metrics, tmp_path)).rows if row[0] == "basic" and row[1] == "10")
    assert row[1:7] == ["10", "20", "0.5500", "0.5400", "0.5500", "0.7200"]
    assert row[7].split()[0] == "+0.1100"


def test_calibration_is_of_the_bins_of_ece(recipe, metrics, tmp_path):
    for one in metrics["variants"].values():
        bins = one["calibration_bins"]
        n = sum(b["impressions"] for b in bins)
        ece = sum(b["impressions"] / n * abs(b["predicted"] - b["observed"]) for b in bins)
        assert (n, ece) == (one["all"]["impressions"], pytest.approx(one["all"]["ece"], abs=1e-12))
    text = full(recipe, metrics, tmp_path)
    section = re.search(r'<section id="calibration">(.*?)</section>', text, re.S)[1]
    assert section.count("<circle") == sum(len(v["calibration_bins"]) for v in metrics["variants"].values())


def test_the_contact_sheet(metrics, tmp_path):
    text = page_of(Recipe(name="r"), metrics, **sheet(tmp_path, 20_000, 3_000_000))
    page = Page(text)
    assert len(page.of("img")) == 3  # a, b beside it, b
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.of("img"))
    for word in ("0.712", "-0.250", "seen 1,234 times in training", "seen 1 time in training", HOSTILE):
        assert word in page.text
    assert HOSTILE not in text
    assert "Searched: 20,000 of 3,000,000 distinct pictures, those that training shows most; the mean is" in page.text
    page = Page(page_of(Recipe(name="r"), metrics, **sheet(tmp_path)))
    assert "Searched: all 9 distinct pictures. Of pictures alike to more than 0.9999 one is shown" in page.text
    for none in (None, ContactSheet(queries=[], searched=0, rows=9, thumbnails=pictures(tmp_path))):
        assert "Searched" not in page_of(Recipe(name="r"), metrics, sheet=none)


def test_the_same_twice(recipe, metrics, tmp_path):
    assert full(recipe, metrics, tmp_path) == full(recipe, metrics, tmp_path)


def test_simulated_data_is_said_to_be(metrics):
    simulated = Recipe.model_validate({"name": "r", "simulate": {}})
    assert "Simulated data" in page_of(simulated, metrics)
    assert "imulated" not in page_of(Recipe(name="r"), metrics)


def test_metrics_alone_make_a_report(metrics):
    page = Page(page_of(Recipe(name="r"), metrics))
    assert sorted(s["id"] for s in page.of("section")) == sorted(SECTIONS)
    assert page.text.count("Not shown") == 9
    assert page.of("img") == []


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
    train, test, both = story.data_facts(tmp_path)
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
    assert story.rejects(tmp_path) == [("time", 2), ("user", 1)]


def test_facts_of_the_pictures(tmp_path):
    path = tmp_path / "features.h5"
    with h5py.File(path, "w") as f:
        f["features"] = np.zeros((2, 5), np.float16)
        f["image"] = ["a", "b", "c"]
        f["row"] = np.array([0, 1, -1])
        f.attrs["backbone"], f.attrs["layer"], f.attrs["weights"] = "vgg16", "fc6", "random, seed 0"
    facts = dict(story.picture_facts(path))
    assert facts["Pictures"] == "3, of these 1 missing or unreadable"
    assert facts["Network"] == "vgg16, layer fc6, 5 numbers a picture"
    assert facts["Distinct pictures"] == "2"
    assert facts["Weights"].startswith("random, seed 0: an untrained network")
    (tmp_path / "no.h5").write_text("no")
    with pytest.raises(UserError, match=r"not a features\.h5"):
        story.picture_facts(tmp_path / "no.h5")


def test_histories(tmp_path):
    assert read_history(tmp_path) == []
    lines = ['{"step": 1, "loss": 0.5, "valid_gauc": null}', '{"step": 2, "loss": 0.45}']
    lines += ['{"step": 2, "loss": 0.4, "valid_gauc": 0.6}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [e["loss"] for e in read_history(tmp_path)] == [0.5, 0.4]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1,\n')
    with pytest.raises(UserError, match="not JSON"):
        read_history(tmp_path)


def test_another_json_is_no_metrics_json(tmp_path):
    (tmp_path / "m.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is not a metrics\.json; write one with: ctrkit eval"):
        read_metrics(tmp_path / "m.json")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, "under 0.1 s"),
        (0.42, "0.4 s"),
        (0.5001, "1 s"),
        (42.4, "42 s"),
        (200, "3 min 20 s"),
        (18_600, "5 h 10 min"),
    ],
)
def test_work_takes_time(seconds: float, told: str) -> None:
    assert story.duration(seconds) == told
