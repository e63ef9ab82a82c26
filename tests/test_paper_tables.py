"""The papers' tables and figures: what stands in them, what `make tables` makes for them, and what `make` does not."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ctrkit import curves, paper_tables
from ctrkit.errors import UsageError, UserError
from ctrkit.pipeline import Graph, Setting, make_rules
from ctrkit.recipe import PaperCurves, Recipe, load
from tests import tiny_world
from tests.shop import ctrkit
from tests.tiny_world import Run

HOSTILE = "<b>$x_1$|</b>"
TABLES = f"""
[variants.early]
extra = true
train = {{ last_day = 1, validation = false }}
[variants.cold]
extra = true
train = {{ first_day = 2, evaluate_every = 1, patience = 0 }}
[variants.warm]
like = "cold"
train = {{ warm_start = "extractors", warm_from = "early" }}

[tables.one]
title = "Table One"
note = "A note."
baseline = "basic"
compare = [["warm", "cold"], ["cold", "basic"]]
rows = [
    {{ variant = "basic", label = "basic ID", paper_gauc = 0.6, paper_r_gauc = 0.0 }},
    {{ variant = "cold", paper_r_gauc = 17.19 }},
    {{ variant = "warm", label = "{HOSTILE}", paper_gauc = 0.63, paper_r_gauc = 18.39 }},
]

[tables.two]
title = "Table Two"
baseline = "pictures"
r_gauc = false
rows = [{{ variant = "pictures", paper_gauc = 0.5959 }}, {{ variant = "basic", paper_gauc = 0.6031 }}]

[curves.figure]
title = "A figure"
reach = [["warm", "cold"]]
rows = [{{ variant = "warm", label = "{HOSTILE}" }}, {{ variant = "cold" }}]
"""


def test_tables_through_make(run: Run) -> None:
    recipe = run.folder / "tiny.toml"
    recipe.write_text(recipe.read_text() + TABLES)
    assert run.plan() == set()  # what only tables need is no part of make
    extra = {f"{v}/{out}" for v in ("cold", "warm") for out in ("model", "predictions.parquet")}
    assert run.plan("tables") == {"early/model", "tables", *extra}
    printed = run.make("tables")
    assert "2 tables and 1 figures -> runs/tiny/tables/tables.html" in printed
    assert "started from 10 tensors of a model that has seen days up to 2024-03-01" in printed
    assert run.make("tables") == "tables: nothing to do, see runs/tiny/tables\n"
    assert run.plan() == set()
    folder = run.home / "tables"
    assert sorted(p.name for p in folder.iterdir()) == [
        "figure.csv",
        "figure.png",
        "tables.html",
        "tables.json",
        "tables.md",
    ]
    found = json.loads((folder / "tables.json").read_text())
    check_table(run, found["tables"]["one"])
    check_figure(run, folder, found["curves"]["figure"])
    html, text = (folder / "tables.html").read_text(), (folder / "tables.md").read_text()
    assert "&lt;b&gt;$x_1$|&lt;/b&gt;" in html
    assert HOSTILE not in html
    assert html.count("data:image/png;base64,") == 1
    assert "| model | GAUC [95%] | gain [95%] | R-GAUC | paper: GAUC | paper: R-GAUC |" in text
    assert "| model | GAUC [95%] | gain [95%] | paper: GAUC | paper: gain |" in text
    assert HOSTILE.replace("|", "\\|") in text
    assert "+0.0072 |" in text  # 0.6031 - 0.5959
    assert "R-GAUC | paper: GAUC | paper: R-GAUC |\n|---|---|---|---|---|---|\n| basic ID |" in text
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "figure.png").unlink()
    run.make("tables")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def check_table(run: Run, table: dict[str, Any]) -> None:
    """Its GAUCs are those of eval, gains and R-GAUC follow from them."""
    metrics = json.loads((run.home / "metrics.json").read_text())["variants"]
    rows = {row["variant"]: row for row in table["rows"]}
    assert list(rows) == ["basic", "cold", "warm"]
    base = rows["basic"]["gauc"]
    assert base == metrics["basic"]["all"]["gauc"]
    assert (rows["basic"]["gauc_low"], rows["basic"]["gauc_high"]) == tuple(
        metrics["basic"]["all"][key] for key in ("gauc_low", "gauc_high")
    )
    for row in rows.values():
        assert row["gain"] == pytest.approx(row["gauc"] - base)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        relative = (row["gauc"] - 0.5) / (base - 0.5) - 1 if base > 0.5 else None
        assert row["r_gauc"] == (None if relative is None else pytest.approx(relative))
    assert rows["warm"]["label"] == HOSTILE
    assert rows["cold"]["label"] == "cold"
    assert rows["warm"]["paper"] == {"gauc": 0.63, "gain": 0.03, "r_gauc": 0.1839}
    assert rows["cold"]["paper"] == {"gauc": None, "gain": None, "r_gauc": 0.1719}
    first, second = table["comparisons"]
    assert first["difference"] == pytest.approx(rows["warm"]["gauc"] - rows["cold"]["gauc"])
    assert first["paper"] == {"gauc": None, "r_gauc": pytest.approx(0.012)}
    assert second["verdict"].startswith("agrees" if second["difference"] > 0 else "differs")


def check_figure(run: Run, folder: Path, figure: dict[str, Any]) -> None:
    """Its points are those of metrics.jsonl, and the steps are the first that reach the value."""
    with open(folder / "figure.csv", newline="") as f:
        points = list(csv.DictReader(f))
    for variant in ("warm", "cold"):
        lines = (run.home / variant / "model" / "metrics.jsonl").read_text().splitlines()
        history = [e for e in map(json.loads, lines) if e.get("valid_gauc") is not None]
        assert len(history) > 2
        own = [p for p in points if p["variant"] == variant]
        assert [(int(p["step"]), float(p["valid_gauc"])) for p in own] == [
            (e["step"], e["valid_gauc"]) for e in history
        ]
        assert figure["best"][variant]["valid_gauc"] == max(e["valid_gauc"] for e in history)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    [said] = figure["reach"]
    assert said["valid_gauc"] == figure["best"]["cold"]["valid_gauc"]
    assert said["steps"]["cold"] == figure["best"]["cold"]["step"]


def test_a_direction() -> None:
    assert paper_tables.verdict(0.01, 0.002, 0.02) == "agrees"
    assert paper_tables.verdict(0.01, -0.002, 0.02) == "agrees (within noise)"
    assert paper_tables.verdict(-0.01, -0.02, -0.002) == "differs"
    assert paper_tables.verdict(-0.01, -0.02, 0.002) == "differs (within noise)"
    assert paper_tables.verdict(0.01, None, None) == "agrees (within noise)"
    assert paper_tables.verdict(0.0, 0.0, 0.0) == "no difference"
    assert paper_tables.verdict(0.0, -0.01, 0.01) == "no difference"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'compare = [["warm", "cold"]',
            'compare = [["cold", "warm"]',
            "tables.one.compare: 'cold' is said to be better than 'warm' in the paper, and their paper_r_gauc are "
            "17.19 and 18.39; name the better one first",
        ),
        ('["cold", "basic"]', '["basic", "warm"]', "their paper_gauc are 0.6 and 0.63"),
        ('["cold", "basic"]', '["cold", "cold"]', "'cold' is compared with itself"),
        (
            '{ variant = "cold", paper',
            '{ variant = "basic" }, { variant = "cold", paper',
            "variant 'basic' has two rows",
        ),
        ('{ variant = "cold" }]', '{ variant = "cold" }, { variant = "cold" }]', "variant 'cold' has two rows"),
        (
            "train = { first_day = 2, evaluate",
            "train = { first_day = 2, validation = false, evaluate",
            "curves.figure: variant 'warm' has train.validation = false, so there is no validation GAUC to draw",
        ),
    ],
)
def test_tables_that_contradict_themselves(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert TABLES.count(old) == 1
    with pytest.raises(UsageError) as caught:
        plan(tmp_path, TABLES.replace(old, new))
    assert said in caught.value.message


def test_a_curve_without_validation_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS + TABLES)
    sets = ("train.validation=false",)
    setting = Setting(str(tmp_path / "tiny.toml"), None, None, sets, tmp_path / "runs", tables=True)
    with pytest.raises(UsageError, match=r"variant 'warm', which \[curves\] draws, has train.validation = false"):
        Graph(setting)
    Graph(dataclasses.replace(setting, tables=False))


def history(*values: float) -> list[dict[str, Any]]:
    return [{"step": 10 * (n + 1), "valid_gauc": value} for n, value in enumerate(values)]


def test_who_gets_there_first() -> None:
    label = {"a": "A", "b": "B"}
    points = {"a": history(0.55, 0.62, 0.61), "b": history(0.5, 0.58, 0.59, 0.6, 0.6)}
    said = curves.reach(points, label, "a", "b")
    assert said["steps"] == {"a": 20, "b": 40}
    assert said["text"] == "A reaches the best of B (0.6000) at step 20, B at step 40: in 0.50 of its steps"
    said = curves.reach(points, label, "b", "a")
    assert said["steps"] == {"b": None, "a": 20}
    assert said["text"] == "B never reaches the best of A (0.6200, at step 20)"


def test_a_model_without_validation_has_no_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "valid_gauc": null}\n')
    figure = PaperCurves.model_validate({"rows": [{"variant": "v"}]})
    with pytest.raises(UserError, match="has no validation GAUC in its history"):
        curves.make_curves("f", figure, {"v": tmp_path}, tmp_path)


def test_what_the_command_needs(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_world.RECIPE)
    result = ctrkit("tables", "--recipe", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has neither [tables.NAME] nor [curves.NAME]" in result.output
    recipe.write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS + TABLES)
    result = ctrkit("tables", "--recipe", recipe, "--predictions", "basic", "--out", tmp_path / "out")
    assert "'basic' is not of the form VARIANT=PATH" in result.output
    result = ctrkit("tables", "--recipe", recipe, "--predictions", "basic=x.parquet", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "need variant 'cold': give --predictions cold=…" in result.output
    result = ctrkit("tables", "--recipe", recipe, "--predictions", "colt=x.parquet", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no variant 'colt'; did you mean 'cold'?" in result.output
    twice = ["--predictions", "cold=x.parquet", "--predictions", "cold=y.parquet"]
    assert "names 'cold' twice" in ctrkit("tables", "--recipe", recipe, *twice, "--out", tmp_path / "out").output


# --- variants --------------------------------------------------------------------------------------------------------


def plan(folder: Path, more: str, *, tables: bool = True) -> Graph:
    (folder / "tiny.toml").write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS + more)
    return Graph(Setting(str(folder / "tiny.toml"), None, None, (), folder / "runs", tables=tables))


def test_a_variant_comes_after_the_one_it_starts_from(tmp_path: Path) -> None:
    graph = plan(tmp_path, TABLES.replace("[variants.early]\nextra = true\ntrain", "[variants.early]\ntrain"))
    trained = [step.variant for step in graph.steps if step.stage == "train"]
    assert trained == ["pictures", "basic", "all-clicks", "early", "cold", "warm"]
    rules = make_rules(graph, "ctrkit").splitlines()
    [rule] = [line for line in rules if line.startswith(str(tmp_path / "runs/tiny/warm/model.json"))]
    assert str(tmp_path / "runs/tiny/early/model.json") in rule
    [all_] = [line for line in rules if line.startswith("all:")]
    assert all_ == f"all: {tmp_path}/runs/tiny/report.html.json"


def test_a_full_start_across_two_conversions_gives_both_vocabularies(tmp_path: Path) -> None:
    more = """
[variants.other]
train = { first_day = 2, warm_start = "full", warm_from = "early" }
convert = { max_reject_rate = 0.5 }
[variants.early]
train = { last_day = 1, validation = false }
"""
    graph = plan(tmp_path, more)
    [model] = [step for step in graph.steps if step.stage == "train" and step.variant == "other"]
    options = dict(zip(model.options[::2], model.options[1::2], strict=True))
    home = tmp_path / "runs/tiny"
    assert options["--warm-start"] == str(home / "early/model")
    assert options["--warm-convert"] == str(home / "convert")
    assert options["--convert"] == str(home / "other/convert")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("[variants.w.train]\nwarm_start = 'full'\n", "'w' has train.warm_start = 'full' and does not say from which"),
        ("[variants.w.train]\nwarm_start = 'full'\nwarm_from = 'basik'\n", "no such variant; did you mean 'basic'?"),
        ("[variants.w.train]\nwarm_from = 'basic'\n", "warm_from needs warm_start"),
        (
            "[variants.v.train]\nwarm_start = 'full'\nwarm_from = 'w'\n"
            "[variants.w.train]\nwarm_start = 'full'\nwarm_from = 'v'\n",
            "start from each other in a circle: 'v' -> 'w' -> 'v'",
        ),
        ("[variants.w]\nlike = 'basik'\n", "variant 'w' is like 'basik', which is none; did you mean 'basic'?"),
        ("[variants.v]\nlike = 'w'\n[variants.w]\nlike = 'v'\n", "variant 'v' is like itself"),
        (
            "[tables.t]\nbaseline = 'basic'\nrows = [{ variant = 'basik' }]\n",
            "tables.t: 'basic' is none of its rows; did you mean 'basik'?",
        ),
        ("[tables.t]\nbaseline = 'b'\nrows = [{ variant = 'b' }]\n", "tables.t: there is no variant 'b'"),
        ("[tables.t]\nbaseline = 'b'\nrows = [{ variant = 'b', paper_r = 1 }]\n", "did you mean 'paper_r_gauc'"),
        ("[curves.t]\nrows = [{ variant = 'b' }]\n", "curves.t: there is no variant 'b'"),
        ("[curves.t]\nrows = [{ variant = 'basic' }]\nreach = [['basic', 'x']]\n", "curves.t: 'x' is none of its rows"),
        ("[variants.tables.train]\nepochs = 2\n", "cannot be called 'tables'"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, more: str, error: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(tmp_path, more)
    assert error in str(caught.value)


def test_a_variant_like_another(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS + TABLES)
    recipe: Recipe = load(path)
    assert [v for v in recipe.variants if recipe.is_extra(v)] == ["early", "cold", "warm"]
    warm = load(path, "warm").train
    assert (warm.first_day, warm.evaluate_every, warm.warm_from) == (2, 1, "early")
    assert load(path, "cold").train.warm_start == ""
    assert load(path, "warm", ["train.first_day=1"]).train.first_day == 1


@pytest.mark.parametrize("name", ["demo", "movielens", "paper-dicm"])
def test_shipped_tables_have_the_rows_of_dicm(name: str) -> None:
    """The eight distinct models of Table I, with the paper's numbers."""
    tables = load(name).paper_tables
    dicm = {row.paper_r_gauc: row.paper_gauc for row in tables["dicm-1"].rows}
    assert dicm == {
        -9.43: 0.5980,
        0.0: 0.6082,
        11.55: 0.6207,
        10.44: 0.6195,
        14.79: 0.6242,
        13.68: 0.6230,
        18.39: 0.6281,
        16.73: 0.6263,
    }
    for r_gauc, gauc in dicm.items():  # the paper's R-GAUC follows from its GAUC, up to rounding
        assert gauc is not None
        assert r_gauc == pytest.approx(100 * ((gauc - 0.5) / (0.6082 - 0.5) - 1), abs=0.06)
    pooling = {row.label: row.paper_r_gauc for row in tables["dicm-pooling"].rows}
    assert pooling["attentive"] == 18.39
    assert (pooling["sum"], pooling["max"]) == (17.01, 15.71)
    warm_up = [row.paper_r_gauc for row in tables["dicm-warm-up"].rows]
    assert warm_up[:3] == [0.0, 17.19, 18.39]


@pytest.mark.parametrize("name", ["demo", "movielens", "paper-din"])
def test_shipped_tables_have_the_rows_of_din(name: str) -> None:
    """The five of Table 3."""
    din = [row.paper_gauc for row in load(name).paper_tables["din-3"].rows if row.paper_gauc is not None]
    assert din == [0.5959, 0.5970, 0.6031, 0.6060, 0.6083]


@pytest.mark.parametrize("name", ["demo", "movielens", "paper-dicm", "paper-din"])
def test_shipped_directions_are_the_papers(name: str) -> None:
    """What is compared as better has the higher number in the paper; what starts from another names one that may be."""
    recipe = load(name)
    Graph(Setting(name, Path("raw"), None, (), Path("runs"), tables=True))
    for table in recipe.paper_tables.values():
        papers = {row.variant: row.paper_gauc or row.paper_r_gauc for row in table.rows}
        for better, worse in table.compare:
            if papers[better] is not None and papers[worse] is not None:
                assert papers[better] > papers[worse], (better, worse)  # type: ignore[operator]
