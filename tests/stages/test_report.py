"""`ctrkit report` through the command line."""

import json
import re
import shutil
import tarfile

import polars as pl
import pytest
from click import Context
from click.testing import CliRunner

from ctrkit.cli import COMMANDS, main


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
