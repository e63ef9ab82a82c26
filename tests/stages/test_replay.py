"""ctrkit replay, through the command line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ctrkit.stages.replay import command

from ctrkit.cli import COMMANDS
from ctrkit.errors import UsageError
from ctrkit.pipeline import Graph, Setting
from tests.shop import ctrkit
from tests.tiny_run import TinyRun

SETS = ["--set", "replay.candidates=12", "--set", "replay.splits=200"]
LONGER = ["--set", "train.epochs=3", "--set", "train.learning_rate=0.01"]
FILES = ("replay.json", "replay.md", "replay.html", "lift.png")


@pytest.fixture(scope="module")
def models(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "lr": tiny_run.train(folder / "lr", "--variant", "lr", *LONGER),
        "dicm": tiny_run.train(folder / "dicm", *LONGER),
    }


def words(tiny_run: TinyRun, models: dict[str, Path], *arms: str) -> list[object]:
    given = [part for arm in arms or tuple(models) for part in ("--arm", f"{arm}={models.get(arm, arm)}")]
    return ["--raw", tiny_run.folder / "raw", *tiny_run.reads(), *SETS, *given]


def read(out: Path) -> Any:
    return json.loads((out / "replay.json").read_text(encoding="utf-8"))


def flat(text: str) -> str:
    return " ".join(text.split())


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["replay"][1]


def test_a_test_of_two_models(tiny_run: TinyRun, models: dict[str, Path], tmp_path: Path) -> None:
    result = tiny_run.must("replay", *words(tiny_run, models), "--out", tmp_path / "one")
    found = read(tmp_path / "one")
    assert found["simulated"] is True
    assert found["control"] == "lr"
    assert found["order"] == ["lr", "dicm"]
    assert sorted(found["arms"]) == ["dicm", "lr"]
    assert sum(arm["test"]["users"] for arm in found["arms"].values()) == found["users"]
    assert sum(arm["test"]["impressions"] for arm in found["arms"].values()) == found["page_views"]
    for arm in found["arms"].values():
        test = arm["test"]
        assert test["ctr"] == test["clicks"] / test["impressions"]
        # Nobody ranks for clicks better than what the truth of each page view allows; a coin would get the mean.
        assert 0 < arm["all_traffic"]["ecpm"] <= found["by_the_truth"]["ecpm"] * 1.2
        assert arm["all_traffic"]["ctr"] < found["by_the_truth"]["ctr"]
    [one] = found["comparisons"]
    assert (one["arm"], one["control"]) == ("dicm", "lr")
    rates = {name: found["arms"][name]["all_traffic"]["ctr"] for name in models}
    assert one["all_traffic"]["ctr"]["value"] == pytest.approx(rates["dicm"] / rates["lr"] - 1)
    assert found["paper"] == {"ctr": 0.071, "ecpm": 0.044}
    assert 0 <= found["a_a"]["ctr_excludes_zero"] <= 0.12
    # What people read says the same, and that it is simulated.
    shown = f"{one['test']['ctr']['value']:+.1%}"
    page = (tmp_path / "one" / "replay.html").read_text(encoding="utf-8")
    text = (tmp_path / "one" / "replay.md").read_text(encoding="utf-8")
    for said in (page, text, result.output):
        assert shown in said
        assert "+7.1%" in said
        assert "Everything here is simulated" in flat(said)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    tiny_run.must("replay", *words(tiny_run, models), "--out", tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*parts*"))
    assert json.loads((tmp_path / "one.json").read_text())["counts"]["page views"] == found["page_views"]


def test_other_settings(tiny_run: TinyRun, models: dict[str, Path], tmp_path: Path) -> None:
    sets = ["--set", "replay.slots=3", "--set", "replay.price=first", "--set", "replay.splits=0"]
    sets += ["--set", "replay.bid_sigma=0", "--set", "replay.bid_median=2", "--set", "replay.seed=4"]
    hostile = {"<b>$x_1$|": models["lr"], "dicm": models["dicm"]}
    tiny_run.must("replay", *words(tiny_run, hostile), *sets, "--out", tmp_path / "out")
    found = read(tmp_path / "out")
    page, text = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("replay.html", "replay.md"))
    assert "&lt;b&gt;$x_1$|" in page
    assert "<b>" not in page
    assert "<b>$x_1$\\|" in text
    assert found["settings"]["slots"] == 3
    assert sum(arm["test"]["impressions"] for arm in found["arms"].values()) == 3 * found["page_views"]
    assert found["a_a"]["ctr_excludes_zero"] is None
    for arm in found["arms"].values():  # each click is worth 2
        assert arm["test"]["ecpm"] == pytest.approx(2000 * arm["test"]["ctr"])
    by_the_truth = found["by_the_truth"]
    assert by_the_truth["ctr"] >= max(arm["all_traffic"]["ctr"] for arm in found["arms"].values())


def test_a_model_against_itself_shows_nothing(tiny_run: TinyRun, models: dict[str, Path], tmp_path: Path) -> None:
    twice = {"a": models["dicm"], "b": models["dicm"], "c": models["lr"]}
    tiny_run.must("replay", *words(tiny_run, twice), "--out", tmp_path / "out")
    found = read(tmp_path / "out")
    itself, other = found["comparisons"]
    assert itself["all_traffic"]["ctr"] == itself["all_traffic"]["ecpm"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert itself["test"]["ctr"]["low"] < 0 < itself["test"]["ctr"]["high"]
    assert other["all_traffic"]["ctr"]["value"] != 0
    assert sum(arm["test"]["users"] for arm in found["arms"].values()) == found["users"]


def fails(result: Any, code: int, *told: str) -> None:
    assert result.exit_code == code, result.output
    for words in told:
        assert words in flat(result.output), result.output
    assert "Traceback" not in result.output


def test_what_cannot_be_replayed(tiny_run: TinyRun, models: dict[str, Path], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    good = words(tiny_run, models)
    fails(tiny_run.call("replay", *words(tiny_run, models, "lr"), *out), 2, "needs two arms")
    fails(tiny_run.call("replay", *words(tiny_run, models, "lr", "lr"), *out), 2, "names 'lr' twice")
    fails(tiny_run.call("replay", *good, "--arm", "new", *out), 2, "'new' is not of the form NAME=DIR")
    fails(tiny_run.call("replay", *good, "--arm", f"new={models['lr'].parent}", *out), 1, "is not a model folder")
    too_many = ["--set", "replay.candidates=31"]
    fails(tiny_run.call("replay", *good, *too_many, *out), 1, "replay.candidates = 31", "30 are alive")
    fails(tiny_run.call("replay", *good, "--set", "replay.slots=12", *out), 2, "slots")
    none_lose = ["--set", "replay.candidates=3", "--set", "replay.slots=3"]
    fails(tiny_run.call("replay", *good, *none_lose, *out), 2, "candidates has to be more than slots")
    fails(tiny_run.call("replay", *good, "--set", "simulate.seed=2", *out), 1, "was not simulated with the [simulate]")
    fails(
        tiny_run.call("replay", *good, "--set", "simulate.users=50", *out), 1, "was not simulated with the [simulate]"
    )
    other = ["--set", "features.ad_id.min_count=5"]
    fails(tiny_run.call("replay", *good, *other, *out), 1, "was made with features.ad_id.min_count = 1")
    no_pictures = [word for word in good if word not in ("--features", tiny_run.features)]
    fails(tiny_run.call("replay", *no_pictures, *out), 1, "this model looks at pictures: give --features")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*candidates*"))


def test_real_logs_have_no_true_probabilities(tiny_run: TinyRun, models: dict[str, Path], tmp_path: Path) -> None:
    raw = Path(shutil.copytree(tiny_run.folder / "raw", tmp_path / "raw"))
    (raw / "truth.parquet").unlink()
    given = [raw if word == tiny_run.folder / "raw" else word for word in words(tiny_run, models)]
    result = tiny_run.call("replay", *given, "--out", tmp_path / "out")
    fails(result, 1, "is not a simulated world", "true probability of every click", "[simulate]")
    recipe = tmp_path / "logs.toml"
    text = tiny_run.recipe.read_text(encoding="utf-8")
    recipe.write_text(re.sub(r"\[simulate\]\n(?:\w.*\n)+", "", text), encoding="utf-8")
    result = ctrkit("replay", "--recipe", recipe, *words(tiny_run, models), "--out", tmp_path / "out")
    fails(result, 2, "has no [simulate] table", "true probability of every click")


def test_the_graph_has_the_arms_of_the_recipe(tmp_path: Path) -> None:
    def graph(*sets: str) -> Graph:
        return Graph(Setting("demo", None, None, sets, tmp_path))

    [step] = [step for step in graph().steps if step.stage == "replay"]
    assert step.output == tmp_path / "demo" / "replay"
    arms = [word for option, word in zip(step.options, step.options[1:], strict=False) if option == "--arm"]
    home = tmp_path / "demo"
    assert arms == [f"{name}={home / name / 'model'}" for name in ("basic+ad_id", "basic+ad_id+ad_image+user_images")]
    assert {need.stage for need in step.needs} == {"simulate", "convert", "group", "extract-images", "train"}
    assert not any(step.stage == "replay" for step in graph("replay.arms=[]").steps)
    with pytest.raises(UsageError, match=r"'all-clicks' has groups of its own"):
        graph('replay.arms=["basic", "all-clicks"]')
    with pytest.raises(UsageError, match="there is no variant 'basics'"):
        graph('replay.arms=["basic", "basics"]')
    with pytest.raises(UsageError, match="at least two"):
        graph('replay.arms=["basic"]')
