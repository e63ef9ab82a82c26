"""`ctrkit report` through the command line."""

import json
import math
import re
import shutil
import tarfile
import warnings

import polars as pl
import pyarrow.parquet as pq
import pytest
from click import Context
from click.testing import CliRunner
from PIL import Image

from ctrkit.cli import COMMANDS, main
from tests import shop


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def made(tmp_path):
    """A recipe, a metrics.json, and a model without attention."""
    table = {"user": ["a", "a", "b", "b"], "click": [1, 0, 1, 0], "score": [0.9, 0.1, 0.2, 0.4]}
    pl.DataFrame(table).write_parquet(tmp_path / "lr.parquet")
    assert run("eval", "--gauc", tmp_path / "lr.parquet", "--json", tmp_path / "metrics.json").exit_code == 0
    (tmp_path / "r.toml").write_text('name = "r"\n[report]\ntitle = "Ours"\n')
    model = tmp_path / "model"
    model.mkdir()
    (model / "settings.json").write_text(json.dumps({"train": {"model": "lr"}}))
    (model / "metrics.jsonl").write_text('{"step": 5, "loss": 0.6, "valid_gauc": 0.5}\n')
    (tmp_path / "model.json").write_text(json.dumps({"stage": "train", "seconds": 3.21}))
    return tmp_path


def test_help_is_the_line_of_the_group():
    command = main.get_command(Context(main), "report")
    assert command.get_short_help_str(200) == COMMANDS["report"][1]


def test_writes_one_file_and_its_sidecar(made):
    out = made / "report.html"
    arguments = ["--recipe", made / "r.toml", "--metrics", made / "metrics.json", "--model", f"lr={made / 'model'}"]
    arguments += ["--predictions", f"lr={made / 'lr.parquet'}", "--out", out]
    result = run("report", *arguments)
    assert result.exit_code == 0, result.output
    text = out.read_text()
    for word in ("<title>Ours</title>", "Learning curves", "none of the models given has attention", "train lr", "3.2"):
        assert word in text
    assert str(made) not in text
    sidecar = json.loads((made / "report.html.json").read_text())
    assert sidecar["stage"] == "report"
    assert set(sidecar["inputs"]) == {"metrics", "model lr", "predictions lr"}
    assert run("report", *arguments).exit_code == 0
    assert out.read_text() == text


def test_the_contact_sheet(made, tiny_run):
    """Eight pictures, each with six others, inlined and called by their ids; none that cannot be read."""
    vocabulary = pl.read_parquet(tiny_run.convert / "vocab" / "image.parquet")
    pictures = made / "pictures"
    shutil.copytree(tiny_run.folder / "raw" / "pictures", pictures)
    gone = vocabulary["value"][:3].to_list()
    for image in gone:
        (pictures / image).unlink()
    common = ["report", "--recipe", tiny_run.recipe, "--metrics", made / "metrics.json", "--convert", tiny_run.convert]
    common += ["--features", tiny_run.features, "--pictures", pictures]

    def sections(out, *sets):
        words = [word for text in sets for word in ("--set", text)]
        result = run(*common, *words, "--out", made / out)
        assert result.exit_code == 0, result.output
        text = (made / out).read_text()
        found = re.findall(r'<article class="case">(.*?)</article>', text, re.S)
        return [re.findall(r'<img src="data:image/jpeg[^>]*alt="picture ([^"]*)"', part) for part in found], text

    shown, text = sections("a.html")
    assert "Pictures alike to the network" in text
    assert f"Searched: all {vocabulary.height} distinct pictures" in text
    assert [len(images) for images in shown] == [7] * 8
    used = vocabulary.filter(pl.col("count") > 0)["value"].to_list()
    for images in shown:
        assert len(set(images)) == 7
        assert images[0] in used
        assert set(images) <= set(vocabulary["value"]) - set(gone)
    assert len({images[0] for images in shown}) == 8
    assert sections("b.html") == (shown, text)
    sidecar = json.loads((made / "a.html.json").read_text())
    assert sidecar["inputs"]["pictures"] != "missing"
    other, _ = sections("c.html", "report.sheet_seed=7", "report.sheet_queries=3", "report.sheet_neighbours=2")
    assert [len(images) for images in other] == [3] * 3
    assert [images[0] for images in other] != [images[0] for images in shown[:3]]
    none, text = sections("d.html", "report.sheet_queries=0")
    assert none == []
    assert "report.sheet_queries is 0" in text
    result = run(*common, "--set", "report.sheet_neighbours=0", "--out", made / "e.html")
    assert result.exit_code == 2
    assert "report.sheet_neighbours" in result.output
    assert not (made / "e.html").exists()


def test_pictures_of_a_glob_count(made):
    for name in ("one", "two"):
        with tarfile.open(made / f"{name}.tar", "w") as tar:
            tar.add(made / "lr.parquet", f"{name}.jpg")
    common = ["report", "--recipe", made / "r.toml", "--metrics", made / "metrics.json", "--out", made / "x.html"]

    def inputs():
        result = run(*common, "--pictures", made / "*.tar")
        assert result.exit_code == 0, result.output
        return json.loads((made / "x.html.json").read_text())["inputs"]

    first = inputs()
    assert set(first) == {"metrics", "pictures/one.tar", "pictures/two.tar"}
    (made / "two.tar").write_bytes((made / "one.tar").read_bytes())
    assert inputs() == first | {"pictures/two.tar": first["pictures/one.tar"]}
    result = run(*common, "--pictures", made / "*.zip")
    assert result.exit_code == 1
    assert "is not there" in result.output


def test_mistakes_leave_nothing_behind(made):
    common = ["report", "--recipe", made / "r.toml", "--out", made / "x.html"]
    for code, says, arguments in (
        (2, "is not there", ["--metrics", made / "none.json"]),
        (2, "not of the form NAME=PATH", ["--metrics", made / "metrics.json", "--model", "model"]),
        (2, "twice", ["--metrics", made / "metrics.json", "--model", f"a={made}", "--model", f"a={made}"]),
        (1, "is not a metrics.json", ["--metrics", made / "model.json"]),
        (1, "is not JSON", ["--metrics", made / "r.toml"]),
    ):
        result = run(*common, *arguments)
        assert result.exit_code == code, result.output
        assert says in result.stderr
        assert isinstance(result.exception, SystemExit)
    assert not [p for p in made.iterdir() if "x.html" in p.name]


FIGURES = (
    "activation",
    "attention",
    "calibration",
    "calibration-by-ad",
    "days",
    "embedding-map",
    "gauc",
    "gauc-unseen-ads",
    "learning-curves",
    "neighbours",
    "slices",
    "surprises",
    "time",
)


class Whole:
    """A report of two models of the tiny run, with all it can show."""

    def __init__(self, folder, tiny):
        self.folder, self.tiny = folder, tiny
        self.given = []
        for name, sets in (("pictures", []), ("din", ["--variant", "din"])):
            model, predictions = folder / name / "model", folder / name / "predictions.parquet"
            tiny.must("train", *tiny.reads(), "--out", model, *sets)
            tiny.must("predict", *tiny.reads(), "--model", model, "--out", predictions, *sets)
            self.given += ["--model", f"{name}={model}", "--predictions", f"{name}={predictions}"]
        scored = [f"{name}={folder / name / 'predictions.parquet'}" for name in ("pictures", "din")]
        self.metrics = folder / "metrics.json"
        result = run("eval", "--gauc", *scored, "--json", self.metrics, "--bootstrap", 20)
        assert result.exit_code == 0, result.output
        self.pictures = tiny.folder / "raw" / "pictures"
        self.result = self.report("report.html")
        assert self.result.exit_code == 0, self.result.output
        self.page = (folder / "report.html").read_text(encoding="utf-8")

    def report(self, out, *words):
        given = ["--metrics", self.metrics, *self.given, *self.tiny.reads(), "--pictures", self.pictures]
        return run("report", "--recipe", self.tiny.recipe, *given, "--out", self.folder / out, *words)

    def csv(self, name):
        return pl.read_csv(self.folder / "report-figures" / f"{name}.csv")

    def section(self, name):
        return re.search(rf'<section id="{name}">(.*?)</section>', self.page, re.S)[1]

    def predictions(self, name):
        return pl.read_parquet(self.folder / name / "predictions.parquet")


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"), tiny_run)


def test_every_figure_is_a_picture_and_a_table(whole):
    files = sorted(p.name for p in (whole.folder / "report-figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("csv", "png"))
    for name in FIGURES:
        with Image.open(whole.folder / "report-figures" / f"{name}.png") as image:
            assert len(image.convert("RGB").resize((60, 60)).getcolors(3600)) > 3, name
        assert whole.csv(name).height > 0
    assert "Not shown" not in whole.page
    assert "report-figures" in whole.result.output
    counts = json.loads((whole.folder / "report.html.json").read_text())["counts"]
    assert sorted(counts["figures"]) == sorted(FIGURES)


def test_gauc_slices_and_calibration_are_those_of_metrics_json(whole):
    metrics = json.loads(whole.metrics.read_text())
    for row in whole.csv("gauc").iter_rows(named=True):
        one = metrics["variants"][row["variant"]]["all"]
        assert (row["gauc"], row["gauc_low"], row["gauc_high"]) == (one["gauc"], one["gauc_low"], one["gauc_high"])
        assert f"{one['gauc']:.4f}" in whole.section("results")
    slices = whole.csv("slices")
    assert slices.height >= 4
    for row in slices.iter_rows(named=True):
        one = metrics["variants"][row["variant"]]["slices"][row["slice"]]
        assert (row["gauc"], row["users_kept"]) == (one["gauc"], one["users_kept"])
    assert whole.section("slices").count("<circle") == slices.height
    bins = whole.csv("calibration")
    for name, one in metrics["variants"].items():
        own = bins.filter(pl.col("variant") == name)
        assert own.drop("variant", "bin").to_dicts() == one["calibration_bins"]
        made = whole.predictions(name)
        assert own["impressions"].sum() == made.height
        assert (own["observed"] * own["impressions"]).sum() == pytest.approx(made["click"].sum())
    assert whole.section("calibration").count("<circle") == bins.height


def test_learning_curves_are_those_of_metrics_jsonl(whole):
    table = whole.csv("learning-curves")
    for name in ("pictures", "din"):
        lines = (whole.folder / name / "model" / "metrics.jsonl").read_text().splitlines()
        said = [json.loads(line) for line in lines]
        own = table.filter(pl.col("variant") == name)
        assert own["step"].to_list() == [line["step"] for line in said]
        assert own["valid_loss"].to_list() == [line.get("valid_loss") for line in said]
        best = max(line["valid_gauc"] for line in said if line.get("valid_gauc") is not None)
        assert own.filter(pl.col("best"))["valid_gauc"].to_list() == [best]
        assert f"{best:.4f}" in whole.section("learning-curves")


def test_attention_and_activation_are_the_models(whole):
    """Scores are those of predict; a gallery's rows are the highest and the lowest of weights that add up to 1."""
    for figure, name in (("attention", "pictures"), ("activation", "din")):
        table = whole.csv(figure)
        made = whole.predictions(name).select("sample_id", "user", "ad", "click", "score", "history_length")
        joined = table.join(made, on="sample_id", how="left", suffix="_of_predict")
        for key in ("user", "ad"):
            assert joined[key].to_list() == joined[f"{key}_of_predict"].to_list()
        assert joined["click"].cast(pl.Int64).to_list() == joined["click_of_predict"].to_list()
        assert (joined["score"] - joined["score_of_predict"]).abs().max() < 1e-6
        assert table["case"].n_unique() == table["user"].n_unique() > 1
        for case in joined.partition_by("case"):
            assert case["weight"].sum() == pytest.approx(1, abs=1e-5) or case.height < case["history_length"][0]
    table = whole.csv("attention")
    for case in table.partition_by("case"):
        high, low = (case.filter(pl.col("row") == row)["weight"] for row in ("highest", "lowest"))
        assert high.is_sorted(descending=True)
        assert low.is_empty() or low.max() <= high.min()
    shown = re.findall(r'data-category="([^"]*)"', whole.section("attention"))
    assert shown == table.unique("case", maintain_order=True)["category"].to_list()
    weights = re.findall(r"<figcaption>([\d.]+)</figcaption>", whole.section("attention"))
    assert weights == [f"{w:.3f}" for w in table["weight"]]
    bars = re.findall(r"height: ([\d.]+)px", whole.section("activation"))
    assert len(bars) == whole.csv("activation").height


def test_the_map_predicts_what_predict_does(whole):
    """Where an ad was really shown at the place of the user's first impression of the day, the map says what predict
    does: position is the tiny shop's only feature of the scene."""
    table = whole.csv("embedding-map")
    users = [column for column in table.columns if column.startswith("ctr ")]
    assert len(users) == 3
    assert whole.section("embedding-map").count('class="point"') == table.height
    assert table["ad"].n_unique() == table.height
    samples = pl.read_parquet(whole.tiny.convert / "samples" / "*" / "*.parquet").select("sample_id", "position")
    checked = 0
    for user in users:
        made = (
            whole.predictions("din").filter(pl.col("user") == user.removeprefix("ctr ")).join(samples, on="sample_id")
        )
        made = made.sort("sample_id").filter(pl.col("position") == pl.col("position").first())
        both = table.select("ad", user).join(made, on="ad")
        assert both[user].to_list() == pytest.approx(both["score"].to_list(), abs=1e-6)
        checked += both.height
    assert checked > 3
    assert table.select(users).min_horizontal().n_unique() > 5
    ads = pl.read_csv(whole.tiny.folder / "raw" / "ads.csv").select("ad", "category", "image")
    joined = table.join(ads, on="ad", how="left", suffix="_of_log")
    assert joined["image"].to_list() == joined["image_of_log"].to_list()
    known = joined.filter(pl.col("category") != "unknown")
    assert known["category"].to_list() == known["category_of_log"].to_list()
    assert known.height > 0
    told = json.loads(re.search(r'id="map-data">(.*?)</script>', whole.page, re.S)[1])
    assert [ad[0] for ad in told["ads"]] == table["ad"].to_list()
    assert told["ctr"][0] == pytest.approx(table[users[0]].to_list(), abs=6e-5)


def test_errors_are_the_largest_log_losses_and_the_worst_sums(whole):
    made = whole.predictions("pictures").to_dicts()
    table = whole.csv("surprises")
    for kind, click, sign in (("clicked, thought unlikely", 1, 1), ("not clicked, thought likely", 0, -1)):
        ads, users, expected = set(), set(), []
        for row in sorted(made, key=lambda r: (sign * r["score"], r["sample_id"])):
            if row["click"] != click or row["ad"] in ads or len(expected) == 8:
                continue
            ads.add(row["ad"])
            if row["user"] in users:
                continue
            users.add(row["user"])
            expected.append(row)
        own = table.filter(pl.col("kind") == kind)
        assert own["sample_id"].to_list() == [row["sample_id"] for row in expected]
        p = [row["score"] if click else 1 - row["score"] for row in expected]
        assert own["loss"].to_list() == pytest.approx([-math.log(q) for q in p], abs=1e-5)
    sums = {}
    for row in made:
        n, clicks, predicted, variance = sums.get(row["ad"], (0, 0, 0.0, 0.0))
        p = row["score"]
        sums[row["ad"]] = n + 1, clicks + row["click"], predicted + p, variance + p * (1 - p)
    far = {ad: (s - c) / math.sqrt(v) for ad, (n, c, s, v) in sums.items() if n >= 20}
    table = whole.csv("calibration-by-ad")
    for kind, sign in (("predicted too high", 1), ("predicted too low", -1)):
        expected = sorted((ad for ad in far if far[ad] * sign > 0), key=lambda ad: -sign * far[ad])[:8]
        own = table.filter(pl.col("kind") == kind)
        assert own["ad"].to_list() == expected
        assert own["deviations"].to_list() == pytest.approx([far[ad] for ad in expected])
    assert table.height > 0


def test_days_are_those_of_the_samples(whole):
    table = whole.csv("days")
    split = json.loads((whole.tiny.convert / "split.json").read_text())
    for row in table.iter_rows(named=True):
        assert row["first_day"] == row["last_day"]
        samples = pl.read_parquet(whole.tiny.convert / "samples" / f"day={row['first_day']}" / "*.parquet")
        assert (row["impressions"], row["clicks"]) == (samples.height, samples["click"].sum())
        assert row["first_day"] in split[row["split"]]
    assert table.height == sum(len(split[name]) for name in ("train", "valid", "test"))


def test_the_same_bytes_again_and_only_when_it_must(whole, monkeypatch):
    files = [whole.folder / "report.html", *sorted((whole.folder / "report-figures").iterdir())]
    before = [p.read_bytes() for p in files]
    assert whole.report("report.html").exit_code == 0
    assert [p.read_bytes() for p in files] == before
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    assert "is what it would be made again" in whole.report("report.html").output
    files[1].write_text("changed")
    assert "is what it would be made again" not in whole.report("report.html").output
    assert [p.read_bytes() for p in files] == before


def test_a_strange_folder_is_left_alone(whole):
    mine = whole.folder / "mine-figures" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    result = whole.report("mine.html")
    assert result.exit_code == 1
    assert "mine-figures" in result.stderr
    assert "would be lost" in result.stderr
    assert mine.read_text() == "years of work"
    assert not (whole.folder / "mine.html").exists()


def test_what_is_not_given_is_told(whole):
    recipe, metrics = ["report", "--recipe", whole.tiny.recipe], ["--metrics", whole.metrics]
    for words, told, kept in (
        ([], {"attention", "activation", "embedding-map", "neighbours", "surprises", "data"}, {"gauc", "slices"}),
        (whole.given, {"attention", "activation", "embedding-map", "neighbours", "data"}, {"surprises", "time"}),
        (
            [*whole.given, "--convert", whole.tiny.convert, "--groups", whole.tiny.groups],
            {"attention", "neighbours"},
            {"activation", "embedding-map", "days"},
        ),
    ):
        out = whole.folder / "less.html"
        result = run(*recipe, *metrics, *words, "--out", out)
        assert result.exit_code == 0, result.output
        sections = re.findall(r'<section id="([^"]*)">(.*?)</section>', out.read_text(), re.S)
        absent = {name for name, text in sections if 'class="absent">Not shown: it needs' in text}
        absent |= {name for name, text in sections if 'class="absent">Not shown: no' in text and name != "time"}
        assert told <= absent
        assert kept <= {p.stem for p in (whole.folder / "less-figures").iterdir()}
        assert "<img" not in out.read_text() or "--pictures" in words


def test_a_recipe_without_pictures_and_one_variant(tmp_path):
    recipe = "\n".join(line for line in shop.RECIPE.splitlines() if "image" not in line)
    shop.write(tmp_path, recipe, **shop.random_rows(3))
    shop.run_all(tmp_path, {"workers": 1})
    common = ["--recipe", tmp_path / "recipe.toml", "--set", "train.model=base", "--set", "train.epochs=1"]
    groups, model, scores = tmp_path / "groups", tmp_path / "model", tmp_path / "predictions.parquet"
    given = ["--model", f"base={model}", "--predictions", f"base={scores}", "--convert", tmp_path / "convert"]
    metrics = tmp_path / "metrics.json"
    for words in (
        ["train", *common, "--groups", groups, "--out", model],
        ["predict", *common, "--groups", groups, "--model", model, "--out", scores],
        ["eval", "--gauc", f"base={scores}", "--json", metrics],
        ["report", *common, "--metrics", metrics, "--groups", groups, *given, "--out", tmp_path / "report.html"],
    ):
        result = run(*words)
        assert result.exit_code == 0, (result.output, result.exception)
    page = (tmp_path / "report.html").read_text()
    assert page.count("Not shown: this recipe has no pictures.") == 2  # attention, pictures alike
    assert "none of the models given is a DIN" in page
    assert "<img" not in page
    goods = pl.read_csv(tmp_path / "report-figures" / "embedding-map.csv")
    shown = pl.read_parquet(scores).group_by("ad").len().sort(["len", "ad"], descending=[True, False])
    assert goods["ad"].to_list() == shown["ad"].to_list()
    assert goods["image"].to_list() == [""] * goods.height
    assert 'class="point"' in page


def test_predictions_that_are_text(made):
    pl.read_parquet(made / "lr.parquet").write_csv(made / "lr.csv")
    assert run("eval", "--gauc", made / "lr.csv", "--json", made / "metrics.json").exit_code == 0
    arguments = ["--metrics", made / "metrics.json", "--predictions", f"lr={made / 'lr.csv'}", "--out", made / "x.html"]
    result = run("report", "--recipe", made / "r.toml", *arguments)
    assert result.exit_code == 0, result.output
    assert "the predictions are no Parquet file" in (made / "x.html").read_text()


def test_predictions_of_another_run_are_refused(made):
    """By content where eval has left a sidecar, else by impressions and clicks; models and predictions by name."""
    same = ["report", "--recipe", made / "r.toml", "--metrics", made / "metrics.json", "--out", made / "x.html"]

    def error(*words):
        result = run(*same, *words)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        return result.stderr

    frame = pl.read_parquet(made / "lr.parquet")
    frame.with_columns(score=1 - pl.col("score")).write_parquet(made / "other.parquet")
    told = error("--predictions", f"lr={made / 'other.parquet'}")
    assert f"other.parquet (--predictions lr) is not what {made / 'metrics.json'} was computed from" in told
    assert "has no variant 'lt'; did you mean 'lr'?" in error("--predictions", f"lt={made / 'lr.parquet'}")
    assert "--model lt=…: " in error("--model", f"lt={made / 'model'}")
    (made / "metrics.json.json").unlink()
    frame.head(3).write_parquet(made / "other.parquet")
    told = error("--predictions", f"lr={made / 'other.parquet'}")
    assert "has 3 impressions and 2 clicks, but" in told
    assert "computed from 4 and 2" in told
    score, click = pl.col("score"), pl.col("click")
    for change, says in (
        (pl.when(click == 0).then(score).otherwise(float("nan")).alias("score"), "row 1, column 'score': nan is not"),
        ((click * 2).alias("click"), "row 1, column 'click': 2 is not a label: 1 is a click, 0 is none"),
        (score.cast(pl.String), "column 'score' is String, not numbers"),
    ):
        frame.with_columns(change).write_parquet(made / "other.parquet")
        told = error("--predictions", f"lr={made / 'other.parquet'}")
        assert says in told
        assert "--score" not in told
        assert "--label" not in told
    (made / "other.parquet").write_bytes((made / "lr.parquet").read_bytes()[:-20])
    assert "cannot be read as Parquet (" in error("--predictions", f"lr={made / 'other.parquet'}")
    frame.write_parquet(made / "other.parquet")
    users = pq.read_metadata(made / "other.parquet").row_group(0).column(0)
    spoilt = bytearray((made / "other.parquet").read_bytes())
    start, length = users.dictionary_page_offset or users.data_page_offset, users.total_compressed_size
    spoilt[start : start + length] = b"\xff" * length
    (made / "other.parquet").write_bytes(spoilt)
    assert "cannot be read as Parquet (" in error("--predictions", f"lr={made / 'other.parquet'}")
    assert not (made / "x.html").exists()


def test_another_runs_vocabulary_is_refused(whole, tmp_path):
    shutil.copytree(whole.tiny.convert / "vocab", tmp_path / "convert" / "vocab")
    (tmp_path / "convert" / "vocab" / "category.parquet").unlink()
    given = ["--metrics", whole.metrics, "--convert", tmp_path / "convert", "--groups", whole.tiny.groups]
    result = run("report", "--recipe", whole.tiny.recipe, *given, "--out", tmp_path / "x.html")
    assert result.exit_code == 1
    assert "(--convert) has another vocabulary than" in result.stderr
    assert not (tmp_path / "x.html").exists()


def test_a_model_of_other_groups_is_not_looked_into(whole, tmp_path):
    """A variant may have groups of its own: on these its weights and scores would be others than those predicted."""
    shutil.copytree(whole.folder / "din", tmp_path / "din")
    sidecar = tmp_path / "din" / "model.json"
    told = json.loads(sidecar.read_text())
    told["inputs"]["groups"] = "others"
    sidecar.write_text(json.dumps(told))
    given = ["--metrics", whole.metrics, *whole.tiny.reads(), "--pictures", whole.pictures]
    given += [
        "--model",
        f"din={tmp_path / 'din' / 'model'}",
        "--predictions",
        f"din={tmp_path / 'din'}/predictions.parquet",
    ]
    result = run("report", "--recipe", whole.tiny.recipe, *given, "--out", tmp_path / "x.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "x.html").read_text()
    assert page.count("trained on other groups or features than those given: din.") == 2  # activation, map
    assert "is a DIN" not in page
    figures = {p.stem for p in (tmp_path / "x-figures").iterdir()}
    assert {"activation", "embedding-map"}.isdisjoint(figures)
    assert {"surprises", "learning-curves"} <= figures


def test_a_variant_of_other_groups_is_not_replaced(whole, tmp_path):
    """Of one that the recipe names, the section says why it is not shown, and shows no other in its place."""
    copy = shutil.copytree(whole.folder / "pictures", tmp_path / "pictures")
    sidecar = copy / "model.json"
    told = json.loads(sidecar.read_text())
    told["inputs"]["groups"] = "others"
    sidecar.write_text(json.dumps(told))
    given = [f"{word}".replace(str(whole.folder / "pictures"), str(copy)) for word in whole.given]
    common = ["report", "--recipe", whole.tiny.recipe, "--metrics", whole.metrics, *given, *whole.tiny.reads()]
    for key, title in (("gallery", "attention"), ("map", "embedding-map")):
        out = tmp_path / f"{key}.html"
        result = run(*common, "--set", f"report.{key}_variant=pictures", "--out", out)
        assert result.exit_code == 0, result.output
        section = re.search(rf'<section id="{title}">(.*?)</section>', out.read_text(), re.S)[1]
        assert f"Not shown: report.{key}_variant is &#39;pictures&#39;, which was trained on other groups" in section
        assert "<svg" not in section
        assert 'class="case"' not in section


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"loss": 0.6}', "has no 'step'"),
        ('{"step": 6}', "has no 'loss'"),
        ('{"step": 6, "loss": "0.6"}', """has "0.6" as 'loss'"""),
        ('{"step": 6.5, "valid_gauc": 0.6}', "has 6.5 as 'step'"),
        ("[6]", "is not a JSON object"),
        ("6", "is not a JSON object"),
    ],
)
def test_a_line_that_cannot_be_drawn(made, line, says):
    (made / "model" / "metrics.jsonl").write_text('{"step": 5, "loss": 0.6}\n' + line + "\n")
    given = ["--metrics", made / "metrics.json", "--model", f"lr={made / 'model'}", "--out", made / "x.html"]
    result = run("report", "--recipe", made / "r.toml", *given)
    assert result.exit_code == 1, result.output
    assert f"metrics.jsonl: line 2 {says}: take the line out, or train the model again" in result.stderr
    assert not (made / "x.html").exists()


def test_a_line_that_is_no_json(made):
    (made / "model" / "metrics.jsonl").write_text('{"step": 5, "loss": 0.6}\n\n{"step": 6, "lo\n')
    given = ["--metrics", made / "metrics.json", "--model", f"lr={made / 'model'}", "--out", made / "x.html"]
    result = run("report", "--recipe", made / "r.toml", *given)
    assert result.exit_code == 1
    assert "metrics.jsonl: line 3 is not JSON" in result.stderr
    assert "train the model again" in result.stderr
    (made / "model" / "metrics.jsonl").unlink()
    result = run("report", "--recipe", made / "r.toml", "--set", "report.gallery_variant=gone", *given)
    assert result.exit_code == 2
    assert "report.gallery_variant 'gone' is none of the models; known: lr" in result.stderr


def test_names_of_any_script_and_length(tmp_path):
    """No warning of a missing glyph, the axis' names cut, and a sort of slices without a chart is named."""
    words = ["靴" * 60, "👟 sneaker"]
    rows = [(f"u{n}", k % 2, (k * 7 + n) % 5 / 5, words[k // 2 % 2], "all") for n in range(40) for k in range(8)]
    table = pl.DataFrame(rows, schema=["user", "click", "score", "kind", "one"], orient="row")
    table.write_parquet(tmp_path / "p.parquet")
    (tmp_path / "r.toml").write_text('name = "r"\n')
    metrics, out = tmp_path / "metrics.json", tmp_path / "x.html"
    scored = f"靴👟={tmp_path / 'p.parquet'}"
    assert run("eval", scored, "--by", "kind", "--by", "one", "--json", metrics).exit_code == 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert run("report", "--recipe", tmp_path / "r.toml", "--metrics", metrics, "--out", out).exit_code == 0
    assert not [w for w in told if "Glyph" in str(w.message)]
    page = out.read_text(encoding="utf-8")
    shown = re.findall(r'text-anchor="middle"><title>([^<]*)</title>([^<]*)</text>', page)
    assert [name for name, _ in shown] == words
    assert shown[1][1] == words[1]
    assert re.fullmatch("靴{12,16}…", shown[0][1])
    assert "Not drawn: one, of a single slice" in page


def test_a_setting_that_names_nothing(whole):
    for key, says in (("category", "'ad_categry' is no id feature of ads"), ("map_variant", "none of the models")):
        result = whole.report("x.html", "--set", f"report.{key}=ad_categry")
        assert result.exit_code == 2, result.output
        assert says in result.stderr
    assert not (whole.folder / "x.html").exists()
