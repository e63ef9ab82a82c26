"""The pipeline through real Make: what is made again, what is not, and what a kill leaves behind."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ctrkit.errors import UsageError
from ctrkit.pipeline import Graph, Setting, find_target, make_rules
from tests import tiny_world
from tests.tiny_world import Run, descendants, kill_group, wait_for

NOTHING = "tiny: nothing to do, the report is runs/tiny/report.html\n"
MODELS = {f"{v}/{out}" for v in ("basic", "pictures", "all-clicks") for out in ("model", "predictions.parquet")}
LOOKING = {name for name in MODELS if not name.startswith("basic/")}
CLICKS = {"behaviours", "groups", "all-clicks/behaviours", "all-clicks/groups"}
END = {"metrics.json", "report.html"}


def test_a_second_make_does_nothing(run: Run) -> None:
    before = run.times()
    assert run.make() == NOTHING
    assert run.ctrkit("run", "tiny.toml") == NOTHING
    assert run.make("train") == "train: nothing to do\n"
    assert run.times() == before
    assert run.leftovers() == []


def test_times_decide_nothing(run: Run) -> None:
    rng = random.Random(5)
    every = sorted(run.folder.rglob("*"))
    rng.shuffle(every)
    now = time.time()
    for path in every:
        moment = now + rng.choice([-1e8, -3600.0, -1.0, 0.0, 3600.0]) + rng.random()
        os.utime(path, (moment, moment))
    # Make itself warns of times in the future.
    lines = [line for line in run.make().splitlines() if "warning:" not in line.lower()]
    assert lines == NOTHING.splitlines()


def test_what_follows_a_change_is_planned_and_nothing_else(run: Run) -> None:
    assert run.plan() == set()
    assert run.plan("SET=train.epochs=2") == MODELS | END
    assert run.plan("SET=train.epochs=2 eval.bootstrap=10") == MODELS | END
    assert run.plan("SET=select-clicks.max_behaviours=3") == CLICKS | MODELS | END
    assert run.plan("SET=eval.bootstrap=10") == END
    assert run.plan("SET=report.title=Title") == {"report.html"}
    assert run.plan("SET=extract-images.seed=1") == {"features.h5"} | LOOKING | END
    assert run.plan("SET=simulate.seed=2") == {"raw", "convert", "features.h5"} | CLICKS | MODELS | END
    assert run.plan() == set()


def test_the_figures_belong_to_the_report(run: Run) -> None:
    before = run.contents()
    assert "report-figures/gauc.csv" in before
    (run.home / "report-figures/gauc.csv").unlink()
    assert run.plan() == {"report.html"}
    run.make()
    assert run.contents() == before
    (run.home / "report-figures/gauc.png").write_text("")
    assert run.plan() == {"report.html"}


def test_what_follows_a_change_of_the_recipe(run: Run) -> None:
    recipe = run.folder / "tiny.toml"
    text = recipe.read_text()
    recipe.write_text("# A comment.\n" + text.replace("epochs = 1", "epochs    = 1  # one"))
    assert run.plan() == set()
    recipe.write_text(text.replace("epochs = 1", "epochs = 2"))
    assert run.plan() == MODELS | END
    recipe.write_text(text + "\n[variants.sum.train]\npooling = 'sum'\n")
    assert run.plan() == {"sum/model", "sum/predictions.parquet", *END}
    recipe.write_text(text.replace("[variants.basic.train]", "[variants.plain.train]"))
    assert run.plan() == {"plain/model", "plain/predictions.parquet", *END}
    recipe.write_text(text)
    assert run.plan() == set()


def test_a_setting_changed_and_set_back(run: Run) -> None:
    before, others = run.contents(), run.times("pictures")
    run.make("predict", "SET=variants.basic.train.learning_rate=0.004")
    there = run.contents()
    assert {name for name in there if there[name] != before[name]} == {
        "basic/model/metrics.jsonl",
        "basic/model/model.pt",
        "basic/model/settings.json",
        "basic/predictions.parquet",
    }
    assert run.times("pictures") == others
    assert "metrics.json is what it would be made again" in run.make()
    assert run.contents() == before
    assert run.make() == NOTHING


def test_nothing_follows_an_output_that_came_out_the_same(run: Run) -> None:
    before = run.times("groups")
    printed = run.make("group", "SET=convert.max_reject_rate=0.5")
    assert "group: runs/tiny/groups is what it would be made again" in printed
    assert "group: runs/tiny/all-clicks/groups is what it would be made again" in printed
    assert json.loads((run.home / "convert.json").read_text())["config"]["convert"]["max_reject_rate"] == 0.5
    assert run.times("groups") == before


def test_outputs_that_were_spoiled_by_hand_are_made_again(run: Run) -> None:
    before = run.contents()
    part = next((run.home / "groups/train").glob("*.parquet"))
    state = part.stat()
    with open(part, "r+b") as f:
        byte = f.read(1)[0]
        f.seek(0)
        f.write(bytes([byte ^ 1]))
    os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns))
    (run.home / "basic/predictions.parquet").unlink()
    (run.home / "metrics.json.json").write_text("{")
    (run.home / "report.html").write_text("")
    printed = run.make()
    assert "runs/tiny/basic/model is what it would be made again" in printed
    assert run.contents() == before
    assert (run.home / "report.html").stat().st_size > 10_000
    (run.home / "features.h5").unlink()
    assert run.plan() == {"features.h5"} | LOOKING | END
    (run.home / "raw/pictures/g0.jpg").unlink()
    assert "raw" in run.plan()


def test_a_stage_that_is_killed_leaves_the_old_output(run: Run) -> None:
    before = run.contents()
    process = run.start("SET=variants.basic.train.epochs=2000", jobs=1)
    stage = wait_for(process, "train")
    time.sleep(0.5)
    os.kill(stage, signal.SIGKILL)
    assert process.wait() != 0
    assert run.contents() == before
    assert run.make() == NOTHING
    assert run.leftovers() == []


def test_an_orphan_is_waited_for(run: Run) -> None:
    """Kill only Make; the stage that it had started still runs when the next Make asks for something else."""
    before = run.contents()
    process = run.start("SET=variants.basic.train.epochs=100", jobs=1)
    orphan = wait_for(process, "train")
    lock = run.home / "basic/.model.lock"
    until = time.monotonic() + 60
    while not lock.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Path(f"/proc/{orphan}").exists()
    assert "waiting for another process that makes model" in run.make()
    assert run.contents() == before
    assert run.leftovers() == []


def test_kills_at_any_moment_change_nothing(built: Run, tmp_path: Path) -> None:
    """Kill everything, Make alone or a stage alone, again and again, until the run comes through, one job at a time."""
    rng = random.Random(2)
    run = Run(tmp_path, built.site)
    (tmp_path / "tiny.toml").write_text(tiny_world.RECIPE)
    for number in range(8):
        process = run.start(jobs=1)
        try:
            process.wait(timeout=rng.uniform(0.3, 3.5))
        except subprocess.TimeoutExpired:
            if number % 3 == 0:
                kill_group(process)
            else:
                victim = process.pid if number % 3 == 1 else [process.pid, *descendants(process.pid)][-1]
                os.kill(victim, signal.SIGKILL)
                process.wait()
        else:
            break
    run.make(jobs=1)
    assert run.make() == NOTHING
    assert run.leftovers() == []
    after, undisturbed = run.contents(), built.contents()
    metrics = after.pop("metrics.json")
    # Of this one variant; the undisturbed run has several.
    after = {name: content for name, content in after.items() if not name.startswith("report-figures/")}
    assert after == {name: undisturbed[name] for name in after}
    predictions = f"pictures={built.home}/pictures/predictions.parquet"
    run.ctrkit("eval", "--recipe", "tiny.toml", "--json", "undisturbed.json", predictions)
    assert (tmp_path / "undisturbed.json").read_bytes() == metrics


def test_make_with_a_bad_recipe_stops_with_its_message(run: Run) -> None:
    printed = run.make("SET=train.epoch=2", fails=True)
    assert "Error: tiny.toml --set train.epoch=2: table [train] has no key 'epoch'; did you mean 'epochs'?" in printed
    assert "Traceback" not in printed
    assert "cannot hold an apostrophe" in run.make("RAW=it's", fails=True)
    assert "cannot work with ' ' in their path" in run.make("OUT=a b", fails=True)
    assert run.make() == NOTHING


def test_raw_data_with_any_name(run: Run) -> None:
    raw = run.folder / "raw, it's $my # data"
    (run.home / "raw").rename(raw)
    assert "convert: nothing to do" in run.ctrkit("run", "tiny.toml", "--raw", str(raw.name), "--target", "convert")
    users = raw / "users.csv"
    users.write_text(users.read_text().replace("18-24", "young"))
    printed = run.ctrkit(
        "run",
        "tiny.toml",
        "--raw",
        raw.name,
        "--set",
        "convert.impressions.where=position >= 0",
        "--target",
        "runs/tiny/convert",
    )
    assert "780 samples" in printed


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_world.RECIPE + tiny_world.MORE_VARIANTS)
    return path


def graph(recipe: Path, raw: Path | None = None) -> Graph:
    return Graph(Setting(str(recipe), raw, None, (), Path("runs")))


def test_variants_share_what_is_the_same(recipe: Path) -> None:
    outputs = [str(step.output) for step in graph(recipe).steps]
    shared = ["raw", "convert", "behaviours", "features.h5", "groups"]
    own = ["pictures/model", "pictures/predictions.parquet", "basic/model", "basic/predictions.parquet"]
    other = [f"all-clicks/{name}" for name in ("behaviours", "groups", "model", "predictions.parquet")]
    assert outputs == [f"runs/tiny/{name}" for name in [*shared, *own, *other, "metrics.json", "report.html"]]
    by_name = {str(step.output): step for step in graph(recipe).steps}
    assert [str(n.output) for n in by_name["runs/tiny/all-clicks/model"].needs] == [
        "runs/tiny/all-clicks/groups",
        "runs/tiny/convert",
        "runs/tiny/features.h5",
    ]
    assert [str(n.output) for n in by_name["runs/tiny/basic/model"].needs] == ["runs/tiny/groups"]


def test_raw_data_take_the_place_of_the_simulation(recipe: Path, tmp_path: Path) -> None:
    steps = graph(recipe, tmp_path / "my raw data").steps
    assert [step.stage for step in steps[:3]] == ["convert", "select-clicks", "extract-images"]
    rules = make_rules(graph(recipe, tmp_path / "my raw data"), "ctrkit")
    assert f"--raw '{tmp_path}/my raw data'" in rules
    assert "simulate: this recipe has no such step" in rules


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[variants.basic.train]", "[variants.groups.train]", "cannot be called 'groups'"),
        ("[variants.basic.train]", "[variants.basic.simulate]\nusers = 9\n[variants.b.train]", "share one world"),
    ],
)
def test_variants_that_cannot_be(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(UsageError, match=message):
        graph(recipe)


def test_a_recipe_without_a_simulation_needs_raw_data() -> None:
    with pytest.raises(UsageError, match="needs raw data: give its folder as RAW"):
        graph(Path("movielens"))


def test_the_name_of_a_target(recipe: Path) -> None:
    steps = graph(recipe)
    assert find_target(steps, "train") == "train"
    assert find_target(steps, "runs/tiny/basic/model") == "runs/tiny/basic/model.json"
    with pytest.raises(UsageError, match="nothing called 'trian' to make; did you mean 'train'"):
        find_target(steps, "trian")


def test_a_day_at_a_time(run: Run) -> None:
    """TODAY converts that day on top of the last one that was, in a folder of its own."""
    days = run.home / "days"

    def counts(day: str) -> dict[str, int]:
        found: dict[str, int] = json.loads((days / day / "convert.json").read_text())["counts"]
        return found

    whole = json.loads((run.home / "convert.json").read_text())["counts"]
    run.make("TODAY=2024-03-03", "convert")
    before = run.times("days/2024-03-03")
    assert counts("2024-03-03")["train days"] == counts("2024-03-03")["test days"] == 1
    printed = run.make("TODAY=2024-03-04")
    assert "the report is runs/tiny/days/2024-03-04/report.html" in printed
    sidecar = json.loads((days / "2024-03-04" / "convert.json").read_text())
    assert "previous" in sidecar["inputs"]
    read = [counts(day)["impressions read"] for day in ("2024-03-03", "2024-03-04")]
    assert read[1] < read[0] < sum(read) == whole["impressions read"]
    assert counts("2024-03-04")["earlier days kept"] == 3
    metrics = json.loads((days / "2024-03-04" / "metrics.json").read_text())
    assert set(metrics["variants"]) == {"pictures", "basic", "all-clicks"}
    assert run.times("days/2024-03-03") == before
    assert run.plan("TODAY=2024-03-04") == run.plan("TODAY=2024-03-03", "convert") == run.plan() == set()
    assert run.leftovers() == []
    printed = run.make("TODAY=yesterday", fails=True)
    assert "'yesterday' does not match the format '%Y-%m-%d'" in printed


def test_exports_of_all_variants(run: Run) -> None:
    """`make export` exports every variant's model, and only then; what is as it would be made again is left alone."""
    exports = {f"{variant}/export" for variant in ("basic", "pictures", "all-clicks")}
    assert run.plan() == set()
    assert run.plan("export") == exports
    printed = run.make("export")
    for name in exports:
        assert f"-> runs/tiny/{name}, scores within" in printed
        assert (run.home / name / "ads.onnx").is_file()
    settings = json.loads((run.home / "pictures/export/settings.json").read_text())
    assert settings["max_behaviours"] == 10
    before = run.times()
    assert run.make("export") == "export: nothing to do\n"
    assert run.ctrkit("run", "tiny.toml", "--target", "export") == "export: nothing to do\n"
    assert run.times() == before
    assert run.make() == NOTHING
    assert (
        run.plan("export", "SET=select-clicks.max_behaviours=3 export.format=pt2")
        == CLICKS | MODELS - {name for name in MODELS if name.endswith("predictions.parquet")} | exports
    )
