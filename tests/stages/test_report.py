"""`ctrkit report` through the command line."""

import json

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
    (model / "history.jsonl").write_text('{"step": 5, "loss": 0.6, "valid_gauc": 0.5}\n')
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
    for word in ("<title>Ours</title>", "Learning curves", "No gallery", "train lr", "3.2"):
        assert word in text
    assert str(made) not in text
    sidecar = json.loads((made / "report.html.json").read_text())
    assert sidecar["stage"] == "report"
    assert set(sidecar["inputs"]) == {"metrics", "model lr", "predictions lr"}
    assert run("report", *arguments).exit_code == 0
    assert out.read_text() == text


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
