"""`ctrkit eval` through the command line."""

import json

import polars as pl
import pytest
from click import Context
from click.testing import CliRunner

from ctrkit.cli import COMMANDS, main

# a: AUC 1 over 3 impressions; b: a tie, AUC 0.5 over 2; c: no click. GAUC (3·1 + 2·0.5) / 5 = 0.8.
TABLE = pl.DataFrame(
    {"user": ["a", "a", "a", "b", "b", "c"], "click": [1, 0, 0, 1, 0, 0], "score": [0.9, 0.1, 0.5, 0.4, 0.4, 0.8]}
)
WORSE = TABLE.with_columns(score=pl.Series([0.2, 0.1, 0.5, 0.4, 0.4, 0.8]))


def run(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def refused(code, *arguments):
    """Run what must fail, and return its one paragraph."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stderr


def test_help_is_the_line_of_the_group():
    command = main.get_command(Context(main), "eval")
    assert command.get_short_help_str(200) == COMMANDS["eval"][1]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_any_table_with_other_names(tmp_path, kind):
    table = TABLE.rename({"user": "uid", "click": "y", "score": "p"})
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        table.write_parquet(path)
    else:
        table.write_csv(path, separator="\t" if kind == "tsv" else ",")
    out = tmp_path / "m.json"
    result = run("--gauc", path, "--user", "uid", "--label", "y", "--score", "p", "--json", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads(out.read_text())
    one = metrics["variants"]["x"]["all"]
    assert one["gauc"] == pytest.approx(0.8, abs=1e-15)
    assert (one["users_kept"], one["users_dropped"], one["impressions_covered"]) == (2, 1, 5)
    assert "x: GAUC 0.8000" in result.output
    for word in ("weighted by impressions", "2 users kept, 1 dropped", "83.3% of 6", "ties averaged (midranks)"):
        assert word in result.output
    sidecar = json.loads((tmp_path / "m.json.json").read_text())
    assert sidecar["stage"] == "eval"
    assert sidecar["counts"] == {"x": 6}


def test_the_flag_changes_nothing_and_no_json_writes_nothing(tmp_path):
    TABLE.write_csv(tmp_path / "x.csv")
    assert run(tmp_path / "x.csv").output == run("--gauc", tmp_path / "x.csv").output
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_what_several_files_share_is_said_once(tmp_path):
    TABLE.write_parquet(tmp_path / "good.parquet")
    WORSE.write_parquet(tmp_path / "bad.parquet")
    said = run(tmp_path / "good.parquet", tmp_path / "bad.parquet").output
    assert said.count("weighted by impressions; 2 users kept, 1 dropped") == 1
    assert "GAUC of 2 files: weighted" in said
    TABLE.filter(pl.col("user") != "b").write_parquet(tmp_path / "part.parquet")
    said = run(tmp_path / "good.parquet", tmp_path / "part.parquet").output
    assert said.count("weighted by impressions") == 2
    assert "good: GAUC 0.8000" in said
    assert "part: GAUC 1.0000" in said


def test_weight_by_clicks(tmp_path):
    TABLE.write_csv(tmp_path / "x.csv")
    assert "x: GAUC 0.7500" in run("--gauc", tmp_path / "x.csv", "--weight", "clicks").output


def test_weight_by_users(tmp_path):
    TABLE.vstack(TABLE.head(3)).write_csv(tmp_path / "x.csv")
    said = run("--gauc", tmp_path / "x.csv", "--weight", "users", "--bootstrap", "0").output
    assert "x: GAUC 0.7500; weighted by users; 2 users kept" in said
    assert "averaged with equal weights over users" in said


def test_a_baseline_may_be_a_file(tmp_path):
    TABLE.write_csv(tmp_path / "good.csv")
    WORSE.write_csv(tmp_path / "bad.csv")
    out = tmp_path / "m.json"
    for baseline in (tmp_path / "bad.csv", f"base={tmp_path / 'bad.csv'}"):
        assert run(tmp_path / "good.csv", "--baseline", baseline, "--json", out).exit_code == 0
        made = json.loads(out.read_text())
        assert made["settings"]["baseline"] == made["order"]["variants"][1]
        # bad: a's click beats one of two, so 0.5; b's is a tie. Gain 0.8 - 0.5; the baseline is at 0.5.
        assert made["variants"]["good"]["all"]["gain"] == pytest.approx(0.3)
        assert made["variants"]["good"]["all"]["r_gauc"] is None
    both = run(tmp_path / "good.csv", tmp_path / "bad.csv", "--baseline", tmp_path / "bad.csv", "--json", out)
    assert both.exit_code == 0
    assert json.loads(out.read_text())["order"]["variants"] == ["good", "bad"]
    assert "significant" in both.output


def test_any_number_of_files_is_compared(tmp_path):
    for name, score in (("a", 0.9), ("b", 0.2), ("c", 0.4), ("d", 0.05)):
        TABLE.with_columns(score=pl.Series([score, 0.1, 0.5, 0.4, 0.4, 0.8])).write_csv(tmp_path / f"{name}.csv")
    files = [tmp_path / f"{name}.csv" for name in "abcd"]
    out = tmp_path / "m.json"

    def pairs(*options):
        result = run(*files, *options, "--bootstrap", "20", "--json", out)
        assert result.exit_code == 0, result.output
        return [c["better"] + c["worse"] for c in json.loads(out.read_text())["comparisons"]]

    assert pairs("--compare", "all") == ["ab", "ac", "ad", "bc", "bd", "cd"]
    assert pairs("--compare", "c,a,d") == ["ca", "cd", "ad"]
    assert pairs("--compare", "a,b", "--compare", "d,b", "--compare", "a,b") == ["ab", "db"]
    assert pairs() == []


def test_slices_by_columns_and_built_in_ones(tmp_path):
    table = TABLE.with_columns(
        unseen_ad=pl.Series([True, True, False, True, True, False]), shop=pl.Series(list("xxyxxy"))
    )
    table.write_parquet(tmp_path / "x.parquet")
    out = tmp_path / "m.json"
    for option in ("--by", "--slice"):
        assert run(tmp_path / "x.parquet", option, "shop", "--by", "unseen-ad", "--json", out).exit_code == 0
        made = json.loads(out.read_text())
        slices = made["variants"]["x"]["slices"]
        assert made["order"]["slices"] == ["unseen_ad=true", "unseen_ad=false", "shop=x", "shop=y"]
        assert slices["shop=x"] == slices["unseen_ad=true"]


def test_slices_that_are_asked_for_are_shown_and_compared(tmp_path):
    day = pl.Series(["2024-01-01", "2024-01-01", "2024-01-02", "2024-01-01", "2024-01-01", "2024-01-02"]).str.to_date()
    for name, rows in (("good", TABLE), ("bad", WORSE)):
        rows.with_columns(day=day).write_parquet(tmp_path / f"{name}.parquet")
    files = [tmp_path / "good.parquet", tmp_path / "bad.parquet", "--compare", "good,bad", "--bootstrap", "9"]
    assert "day=2024-01-01" not in run(*files).output
    said = run(*files, "--by", "day").output
    assert "GAUC by slice" in said
    assert (
        len([line for line in said.splitlines() if "good" in line and "bad" in line and "day=2024-01-01" in line]) == 1
    )


def test_many_slices_stand_in_rows(tmp_path):
    n = 40
    table = pl.DataFrame({"user": [i // 2 for i in range(2 * n)], "click": [1, 0] * n, "score": [1.0, 0.0] * n})
    table = table.with_columns(country=pl.format("land-{}", pl.col("user")))
    names = [f"a-variant-of-a-long-name-{i}" for i in range(9)]
    for name in names:
        table.write_parquet(tmp_path / f"{name}.parquet")
    paths = [tmp_path / f"{name}.parquet" for name in names]
    one = run(paths[0], "--by", "country", "--bootstrap", 0).output.splitlines()
    for i in range(n):
        assert [f"country=land-{i}", "(1.0000)"] in [line.split() for line in one]
    many = run(*paths, "--by", "country", "--bootstrap", 0).output.splitlines()
    rows = [line.count("(1.0000)") for line in many if "(1.0000)" in line]
    assert rows == [8] * n + [1] * n


def test_one_user_is_one_user(tmp_path):
    TABLE.head(3).write_csv(tmp_path / "one.csv")
    assert "; 1 user kept, 0 dropped" in run(tmp_path / "one.csv").output


def test_what_other_programs_would_print(tmp_path):
    TABLE.write_csv(tmp_path / "x.csv")
    out = tmp_path / "m.json"
    programs = ("fuxictr", "torcheasyrec", "recbole", "torchrec")
    result = run(tmp_path / "x.csv", *(w for p in programs for w in ("--compat", p)), "--json", out)
    assert result.exit_code == 0, result.output
    made = json.loads(out.read_text())
    assert made["settings"]["compat"] == list(programs)
    found = {p: c["value"] for p, c in made["variants"]["x"]["compat"].items()}
    # b's two scores are equal, so torchrec leaves b out: a's AUC of 1 remains.
    assert found == pytest.approx({"fuxictr": 0.8, "torcheasyrec": 0.75, "recbole": 0.75, "torchrec": 1.0})
    assert "RecBole 1.2.1 (GAUC)" in " ".join(result.output.split())


def test_names_are_stems_folders_or_given(tmp_path):
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "predictions.parquet")
        TABLE.write_parquet(paths[-1])
    TABLE.write_csv(tmp_path / "three.csv")
    out = tmp_path / "m.json"
    assert run(*paths, tmp_path / "three.csv", f"four={paths[0]}", "--json", out).exit_code == 0
    assert json.loads(out.read_text())["order"]["variants"] == ["one", "two", "three", "four"]
    (tmp_path / "other").mkdir()
    TABLE.write_csv(tmp_path / "other" / "three.csv")
    said = refused(2, tmp_path / "three.csv", tmp_path / "other" / "three.csv")
    assert "both called 'three'" in said
    assert "NAME=" in said


def test_same_predictions_same_bytes_wherever_they_lie(tmp_path):
    outs = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        TABLE.write_parquet(tmp_path / folder / "good.parquet")
        WORSE.write_parquet(tmp_path / folder / "bad.parquet")
        out = tmp_path / folder / "metrics.json"
        files = [tmp_path / folder / "good.parquet", tmp_path / folder / "bad.parquet"]
        assert run("--gauc", *files, "--baseline", "bad", "--compare", "good,bad", "--json", out).exit_code == 0
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    assert str(tmp_path).encode() not in outs[0]


def test_the_recipe_decides_and_options_override(tmp_path):
    TABLE.write_parquet(tmp_path / "good.parquet")
    WORSE.write_parquet(tmp_path / "bad.parquet")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[eval]\nbaseline = "bad"\nweight = "clicks"\nbootstrap = 20\ncompare = [["good", "bad"], ["good", "gone"]]\n'
        "[variants.good]\n[variants.bad]\n[variants.gone]\n"
    )
    files = [tmp_path / "good.parquet", tmp_path / "bad.parquet", "--json", tmp_path / "m.json"]
    result = run("--recipe", recipe, *files)
    assert result.exit_code == 0, result.output
    assert "no file of variant 'gone'" in result.stderr
    made = json.loads((tmp_path / "m.json").read_text())
    settings = made["settings"]
    assert (settings["weight"], settings["baseline"], settings["bootstrap"]) == ("clicks", "bad", 20)
    assert {(c["better"], c["worse"]) for c in made["comparisons"]} == {("good", "bad")}
    assert run("--recipe", recipe, "--set", "eval.seed=4", "--weight", "impressions", *files).exit_code == 0
    settings = json.loads((tmp_path / "m.json").read_text())["settings"]
    assert (settings["weight"], settings["bootstrap"], settings["seed"]) == ("impressions", 20, 4)
    sidecar = json.loads((tmp_path / "m.json.json").read_text())
    assert sidecar["config"]["eval"]["weight"] == "impressions"


def test_no_user_with_both_classes_is_said(tmp_path):
    TABLE.filter(pl.col("click") == 1).write_csv(tmp_path / "x.csv")
    result = run("--gauc", tmp_path / "x.csv", "--json", tmp_path / "m.json")
    assert result.exit_code == 0
    assert "GAUC n/a (no user has both" in result.output
    assert json.loads((tmp_path / "m.json").read_text())["variants"]["x"]["all"]["gauc"] is None


def test_names_from_the_data_are_not_markup(tmp_path):
    TABLE.write_csv(tmp_path / "x.csv")
    result = run("--gauc", f"[bold]v[/bold]={tmp_path / 'x.csv'}")
    assert result.exit_code == 0
    assert "[bold]v[/bold]: GAUC" in result.output


def test_mistakes(tmp_path):
    good = tmp_path / "good.csv"
    TABLE.write_csv(good)
    out = tmp_path / "m.json"
    TABLE.with_columns(score=pl.Series([1.0, 0.1, float("nan"), 0.2, 0.1, 0.1])).write_csv(tmp_path / "nan.csv")
    assert "row 3, column 'score'" in refused(1, tmp_path / "nan.csv", "--json", out)
    assert "did you mean 'click'" in refused(1, good, "--label", "clik", "--json", out)
    assert "is not there" in refused(1, tmp_path / "gone.csv", "--json", out)
    assert "baseline 'god' is none of the files; did you mean 'good'" in refused(2, good, "--baseline", "god")
    assert "compare 'x' is none of the files" in refused(2, good, "--compare", "good,x")
    assert "compare 'good' with itself" in refused(2, good, "--compare", "good,good")
    assert "no such file; did you mean 'good'" in refused(2, good, "--baseline", "good.parquet")
    assert "'--seed'" in refused(2, good, "--seed", "-1")
    assert "at least 2" in refused(2, good, "--bootstrap", "1")
    assert "not of the form BETTER,WORSE" in refused(2, good, "--compare", "good")
    assert "Missing argument" in refused(2, "--gauc")
    assert "'--weight'" in refused(2, good, "--weight", "rows")
    assert "'--compat'" in refused(2, good, "--compat", "fuxi")
    assert "two files" in refused(2, good, "--compare", "all")
    assert "no column 'unseen_ad' for --by unseen-ad" in refused(1, good, "--by", "unseen-ad")
    assert "baseline" in refused(2, good, "--baseline", tmp_path / "gone.csv")
    (tmp_path / "other").mkdir()
    TABLE.write_csv(tmp_path / "other" / "good.csv")
    assert "both called 'good'" in refused(2, good, "--baseline", tmp_path / "other" / "good.csv")
    assert "--recipe" in refused(2, good, "--set", "eval.seed=1")
    TABLE.head(5).write_csv(tmp_path / "short.csv")
    said = refused(1, good, tmp_path / "short.csv", "--baseline", "short", "--json", out)
    assert "do not cover the same impressions" in said
    assert not [p for p in tmp_path.iterdir() if "m.json" in p.name]
