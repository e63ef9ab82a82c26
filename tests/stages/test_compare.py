"""`ctrkit compare` through the command line: the table, the page, and what cannot be compared."""

import json
import re
from html.parser import HTMLParser

import polars as pl
import pytest
from click.testing import CliRunner

from ctrkit.cli import main

TABLE = pl.DataFrame(
    {
        "user": ["a", "a", "a", "b", "b", "c"],
        "click": [1, 0, 0, 1, 0, 0],
        "score": [0.9, 0.1, 0.5, 0.4, 0.4, 0.8],
        "unseen_ad": [True, True, False, True, True, False],
    }
)
WORSE = TABLE.with_columns(score=pl.Series([0.2, 0.1, 0.5, 0.4, 0.4, 0.8]))


def ctrkit(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, words)))


@pytest.fixture
def runs(tmp_path):
    """Two runs: the second's "good" is worse by 0.3."""
    for run, good in (("monday", TABLE), ("tuesday", WORSE)):
        folder = tmp_path / run
        folder.mkdir()
        good.write_parquet(folder / "good.parquet")
        WORSE.write_parquet(folder / "bad.parquet")
        files = [folder / "good.parquet", folder / "bad.parquet"]
        made = ctrkit("eval", *files, "--baseline", "bad", "--json", folder / "metrics.json", "--bootstrap", 9)
        assert made.exit_code == 0, made.output
    return tmp_path


class Cells(HTMLParser):
    """The rows of the page's table, and the tags of the page."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.tags, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_variants_of_all_runs_side_by_side(runs):
    html = runs / "c.html"
    result = ctrkit("compare", runs / "monday", runs / "tuesday" / "metrics.json", "--html", html)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if "monday" in line or "tuesday" in line]
    assert rows[0][:3] == ["good", "monday", "0.8000"]
    assert rows[1][:2] == ["tuesday", "0.5000"]
    assert "-0.3000" in rows[1]
    assert rows[2][:3] == ["bad", "monday", "0.5000"]
    assert "All runs: 2 users kept, 1 dropped for having only one class; 5 of 6 impressions covered." in result.output
    assert "users count by impressions" in result.output
    cells = Cells(html.read_text())
    assert [row[:2] for row in cells.rows[1:]] == [
        ["good", "monday"],
        ["", "tuesday"],
        ["bad", "monday"],
        ["", "tuesday"],
    ]
    assert cells.rows[0][3] == "difference"
    assert cells.rows[2][2].startswith("0.5000")
    assert cells.rows[2][3] == "-0.3000"
    assert not [a for _, attributes in cells.tags for a in attributes if a in ("src", "href")]


def test_a_slice_and_a_variant(runs):
    result = ctrkit(
        "compare", runs / "monday", f"later={runs / 'tuesday'}", "--slice", "unseen_ad=true", "--variant", "good"
    )
    assert result.exit_code == 0, result.output
    # Of the unseen ads a has one click over one other, b a tie: (2·1 + 2·0.5) / 4; in both runs.
    assert re.search(r"good +monday +0\.7500", result.output)
    assert re.search(r"later +0\.7500 .*\+0\.0000", result.output)
    assert "bad " not in result.output


def test_what_cannot_be_compared_is_said(runs):
    folder = runs / "tuesday"
    made = ctrkit("eval", folder / "bad.parquet", "--weight", "clicks", "--json", folder / "metrics.json")
    assert made.exit_code == 0
    said = ctrkit("compare", runs / "monday", folder).output
    assert (
        "cannot be compared as they are: users count by different things (monday: impressions; tuesday: clicks)" in said
    )
    assert "different baselines (monday: bad; tuesday: none)" in said
    TABLE.head(5).write_parquet(folder / "bad.parquet")
    assert ctrkit("eval", folder / "bad.parquet", "--json", folder / "metrics.json").exit_code == 0
    said = ctrkit("compare", runs / "monday", folder).output
    assert "not all of the same impressions" in said
    assert "tuesday: 2 users kept, 0 dropped" in said


def test_names_from_files_are_text(runs):
    path = runs / "monday" / "metrics.json"
    metrics = json.loads(path.read_text())
    hostile = "<script>[bold]"
    metrics["order"]["variants"] = [hostile]
    metrics["variants"] = {hostile: metrics["variants"]["good"]}
    path.write_text(json.dumps(metrics))
    result = ctrkit("compare", runs / "monday", "--html", runs / "c.html")
    assert result.exit_code == 0, result.output
    assert "[bold]" in result.output
    page = Cells((runs / "c.html").read_text())
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.rows[1][0] == hostile


def test_mistakes(runs):
    (runs / "empty").mkdir()
    (runs / "other.json").write_text("{}")
    for code, says, *words in (
        (1, "is not there", runs / "gone"),
        (1, "no run that has been evaluated", runs / "empty"),
        (1, "is not a metrics.json", runs / "other.json"),
        (2, "no run has the slice 'unseen'; did you mean 'unseen_ad=true'", runs / "monday", "--slice", "unseen"),
        (2, "no run has the variant 'god'; did you mean 'good'", runs / "monday", "--variant", "god"),
        (2, "both called 'monday'", runs / "monday", runs / "monday"),
        (2, "no name", f"={runs / 'monday'}"),
    ):  # fmt: skip
        result = ctrkit("compare", *words)
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)
        assert says in " ".join(result.stderr.split())


def test_an_input_is_not_written_over(runs):
    path = runs / "monday" / "metrics.json"
    before = path.read_bytes()
    for run in (runs / "monday", path):
        result = ctrkit("compare", runs / "tuesday", run, "--html", path)
        assert result.exit_code == 1, result.output
        assert "is an input (monday) and would be written over" in result.stderr
    assert path.read_bytes() == before


def test_a_run_that_lacks_the_slice_is_named(runs):
    folder = runs / "tuesday"
    TABLE.drop("unseen_ad").write_parquet(folder / "good.parquet")
    assert ctrkit("eval", folder / "good.parquet", "--json", folder / "metrics.json").exit_code == 0
    result = ctrkit("compare", runs / "monday", folder, "--slice", "unseen_ad=true")
    assert result.exit_code == 2, result.output
    assert "tuesday has no slice 'unseen_ad=true'" in result.stderr


def test_all_runs_are_those_that_have_the_variant(runs):
    folder = runs / "tuesday"
    assert ctrkit("eval", folder / "good.parquet", "--json", folder / "metrics.json").exit_code == 0
    assert "All runs: 2 users kept" in ctrkit("compare", runs / "monday", folder, "--variant", "good").output
    said = ctrkit("compare", runs / "monday", folder, "--variant", "bad").output
    assert "All runs" not in said
    assert "monday: 2 users kept" in said


def without(holder, key):
    del holder[key]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: without(m["variants"]["good"]["all"], "gauc"), "variants.good.all.gauc is missing"),
        (lambda m: without(m["variants"], "good"), "variants.good is missing"),
        (lambda m: m["variants"]["good"]["all"].update(auc="0.5"), "variants.good.all.auc is '0.5'"),
        (lambda m: m["variants"]["bad"]["all"].update(users_kept=None), "variants.bad.all.users_kept is None"),
        (lambda m: m["variants"]["bad"]["slices"].update({"unseen_ad=true": []}), "slices.unseen_ad=true is []"),
        (lambda m: without(m["settings"], "ties"), "settings.ties is missing"),
        (lambda m: m.update(variants=[]), "variants is []"),
        (lambda m: m["order"].update(variants=[1]), "order holds 1, which is no name"),
    ],
)
def test_a_spoiled_metrics_json_is_one_paragraph(runs, change, says):
    path = runs / "monday" / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))
    result = ctrkit("compare", runs / "monday")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "is not a metrics.json as eval writes it: " in result.stderr
    assert says in result.stderr
