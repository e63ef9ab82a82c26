"""ctrkit tune, through the command line, on the tiny shop's run."""

import csv
import importlib.util
import json
import multiprocessing
import random
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctrkit import files
from tests.shop import ctrkit
from tests.tiny_world import Run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ctrkit.training", "ctrkit.stages.train", "ctrkit.trials", "pytest"])
TUNE = """
[tune]
trials = 8
startup_trials = 3
[tune.space]
"train.learning_rate" = { low = 1e-4, high = 1e-1, log = true }
"train.pooling" = ["attentive", "sum"]
"train.tower" = [[16], [8, 4]]
"""
KEYS = ["train.learning_rate", "train.pooling", "train.tower"]


def tuned(run: Run, text: str = TUNE) -> Run:
    """Give the recipe of a run a [tune], and two epochs, so that there is something to prune."""
    recipe = run.folder / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("epochs = 1", "epochs = 2") + text)
    return run


def tune(run: Run, *words: object, code: int = 0) -> str:
    """Tune in this process; return what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.folder)
        result = ctrkit("tune", "tiny.toml", *words)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def apart(folder: Path, words: list[str]) -> None:
    """What a process does: tune in a folder; what it prints goes into a file there."""
    import os

    from ctrkit.cli import main

    os.chdir(folder)
    sys.stdout = sys.stderr = open("told", "a", encoding="utf-8")  # noqa: SIM115
    main(["tune", "tiny.toml", *words])


def start(run: Run, *words: str) -> ForkServerProcess:
    process = FORKS.Process(target=apart, args=(run.folder, list(words)))
    process.start()
    return process


def rows(run: Run, study: str = "tune") -> list[dict[str, str]]:
    with open(run.home / study / "trials.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outcome(run: Run) -> list[tuple[str, ...]]:
    """Return what a study found: state, value, values and best step of each trial that was not interrupted."""
    kept = [row for row in rows(run) if row["state"] != "interrupted"]
    return [tuple(row[key] for key in ("state", "valid_gauc", *KEYS, "best_step", "validations")) for row in kept]


@pytest.fixture(scope="module")
def study(built: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A study of eight trials by one process. Not to be changed."""
    run = Run(Path(shutil.copytree(built.folder, tmp_path_factory.mktemp("study") / "run")), built.site)
    before = run.times()
    tuned(run)
    assert not {"raw", "convert", "behaviours", "features.h5", "groups"} & run.plan()
    printed = tune(run)
    assert "best validation GAUC" in printed
    assert {path: time for path, time in run.times().items() if path in before} == before
    return run


def test_what_is_written(study: Run) -> None:
    found, home = rows(study), study.home / "tune"
    assert len(found) == 8
    assert [row["trial"] for row in found] == list("01234567")
    states = [row["state"] for row in found]
    assert set(states) == {"complete", "pruned"}
    assert "pruned" not in states[:3]
    first = found[0]
    assert (first["recipe"], [row["recipe"] for row in found[1:]]) == ("1", ["0"] * 7)
    assert [first[key] for key in KEYS] == ["0.001", "attentive", "[16]"]
    assert all(1e-4 <= float(row["train.learning_rate"]) <= 1e-1 for row in found)
    assert {row["validations"] for row in found if row["state"] == "pruned"} <= {"1", "2"}
    for name in ("history.png", "importance.png"):
        assert (home / name).read_bytes().startswith(b"\x89PNG\r\n")
    for row in found:
        assert any((home / "trials" / f"{int(row['trial']):04}" / "tensorboard").iterdir())
    assert not list(home.rglob("predictions*"))
    assert not [p for p in home.rglob(".*") if p.name.startswith(".")]


def test_only_the_best_model_is_kept(study: Run) -> None:
    complete = [row for row in rows(study) if row["state"] == "complete"]
    best = max(complete, key=lambda row: float(row["valid_gauc"]))
    trials = study.home / "tune" / "trials"
    [model] = trials.glob("*/model")
    assert model.parent.name == f"{int(best['trial']):04}"
    record = json.loads(files.sidecar_path(model).read_text())["counts"]["best"]
    assert record["valid_gauc"] == float(best["valid_gauc"])
    assert record["step"] == int(best["best_step"])
    for row in complete:
        lines = (trials / f"{int(row['trial']):04}" / "metrics.jsonl").read_text().splitlines()
        assert max(json.loads(line).get("valid_gauc", 0.0) for line in lines) == float(row["valid_gauc"])


def test_the_same_command_again_does_nothing(study: Run) -> None:
    before = outcome(study)
    printed = tune(study)
    assert outcome(study) == before
    assert "train:" not in printed
    assert "8 complete" in printed or f"{sum(row[0] == 'complete' for row in before)} complete" in printed


def test_a_study_with_other_questions_is_refused(study: Run) -> None:
    before = (study.home / "tune" / "trials.csv").read_bytes()
    told = tune(study, "--set", 'tune.space."train.pooling"=["sum", "max"]', code=1)
    assert 'tune.space train.pooling was ["attentive", "sum"] and is ["sum", "max"]' in told
    assert "move that folder away" in told
    assert "train.clip_norm was 0.0 and is 2.0" in tune(study, "--set", "train.clip_norm=2", code=1)
    tune(study, "--trials", "8", "--set", "train.log_every=7")  # not what model it is
    assert (study.home / "tune" / "trials.csv").read_bytes() == before


def test_the_test_day_decides_nothing(study: Run, built: Run, tmp_path: Path) -> None:
    """Other clicks, ads and users on the test day: the same study to the bit."""
    run = Run(Path(shutil.copytree(built.folder, tmp_path / "run")), built.site)
    tuned(run)
    raw = Path(shutil.copytree(run.home / "raw", run.folder / "poisoned"))
    rng = random.Random(1)
    shown = pl.read_csv(raw / "impressions.csv", infer_schema=False)
    last = shown["time"].cast(pl.Int64) >= (shown["time"].cast(pl.Int64).max() // 86400) * 86400  # type: ignore[operator]
    day, others = shown.filter(last), shown.filter(~last)
    for column in ("ad", "position", "user"):
        values = day[column].to_list()
        rng.shuffle(values)
        day = day.with_columns(pl.Series(column, values))
    clicks = pl.read_csv(raw / "clicks.csv", infer_schema=False)
    flipped = day.filter(~pl.col("impression").is_in(clicks["impression"].to_list())).select("impression", "time")
    clicks = pl.concat([clicks.filter(~pl.col("impression").is_in(day["impression"].to_list())), flipped])
    pl.concat([others, day]).write_csv(raw / "impressions.csv")
    clicks.write_csv(raw / "clicks.csv")
    tune(run, "--raw", "poisoned", "--trials", "4")

    def samples(of: Run, split: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (of.home / "groups" / split).iterdir()}

    assert samples(run, "test") != samples(study, "test")
    assert samples(run, "train") == samples(study, "train")
    assert samples(run, "valid") == samples(study, "valid")
    assert outcome(run) == outcome(study)[:4]
    assert "the data have changed since" in tune(run, "--trials", "5", code=1)
    assert outcome(run) == outcome(study)[:4]


def test_a_trial_trains_without_the_test_split(study: Run, tmp_path: Path) -> None:
    """The best trial again, from groups in which there is no test split at all: the same model."""
    groups = Path(shutil.copytree(study.home / "groups", tmp_path / "groups"))
    shutil.rmtree(groups / "test")
    home = study.home
    words = ["--recipe", home / "tune" / "best.toml", "--groups", groups, "--convert", home / "convert"]
    result = ctrkit("train", *words, "--features", home / "features.h5", "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    [best] = (home / "tune" / "trials").glob("*/model")
    assert (tmp_path / "model" / "model.pt").read_bytes() == (best / "model.pt").read_bytes()


def test_make_runs_the_best_recipe(study: Run, built: Run, warm: Callable[[], Path], tmp_path: Path) -> None:
    """Both of its variants have the validation GAUC that the study recorded."""
    run = Run(tmp_path, built.site, warm)
    home = tmp_path / "runs" / "tiny-best"
    home.mkdir(parents=True)
    for name in ("raw", "convert", "behaviours", "features.h5", "groups"):  # which are what it would make
        for source in (built.home / name, files.sidecar_path(built.home / name)):
            (shutil.copytree if source.is_dir() else shutil.copy)(source, home / source.name)
    shutil.copy(study.home / "tune" / "best.toml", tmp_path)
    recipe = tomllib.loads((tmp_path / "best.toml").read_text())
    assert recipe["variants"]["untuned"]["train"].keys() == {"learning_rate", "pooling", "tower"}
    assert (recipe["eval"]["baseline"], recipe["eval"]["compare"]) == ("untuned", [["best", "untuned"]])
    printed = run.make("DATA=best.toml", "train")
    assert "convert:" not in printed
    best = max((row for row in rows(study) if row["state"] == "complete"), key=lambda row: float(row["valid_gauc"]))
    first = rows(study)[0]
    for variant, row in (("best", best), ("untuned", first)):
        counts = json.loads((home / variant / "model.json").read_text())["counts"]
        assert counts["best"]["valid_gauc"] == float(row["valid_gauc"])


def test_killed_in_the_middle_of_a_trial(study: Run, run: Run) -> None:
    """The trial is begun anew, and the study ends as the one that was never killed."""
    tuned(run)
    trials = run.home / "tune" / "trials"
    for number in range(2, 7):  # at the next one where a trial ends before the kill comes
        process = start(run)
        until = time.monotonic() + 60
        while not (trials / f"{number:04}").exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        process.kill()
        process.join()
        if any(trials.glob(".*.lock")):
            break
    tune(run)
    states = [row["state"] for row in rows(run)]
    assert states.count("interrupted") == 1, (run.folder / "told").read_text()
    assert outcome(run) == outcome(study)
    assert not [p for p in trials.iterdir() if p.name.startswith(".")]


def test_several_processes_at_once(run: Run) -> None:
    """Two workers of one command and another command beside them, with a data stage in the space."""
    tuned(run, TUNE + '"select-clicks.window_days" = [3, 14]\n')
    other = start(run, "--trials", "6")
    tune(run, "--workers", "2", "--trials", "6")
    other.join()
    assert other.exitcode == 0, (run.folder / "told").read_text()
    found = rows(run)
    assert len(found) == 6
    assert {row["state"] for row in found} <= {"complete", "pruned"}
    assert {row["select-clicks.window_days"] for row in found} == {"3", "14"}
    best = max((row for row in found if row["state"] == "complete"), key=lambda row: float(row["valid_gauc"]))
    [model] = (run.home / "tune" / "trials").glob("*/model")
    assert model.parent.name == f"{int(best['trial']):04}"
    made = sorted(p.name for p in (run.home / "tune" / "data").glob("*/*") if not p.name.endswith(".json"))
    assert made == (["behaviours", "groups"] if best["select-clicks.window_days"] == "3" else [])
    assert run.leftovers() == []


def test_a_trial_that_cannot_be_fails_alone(run: Run) -> None:
    tuned(run, '\n[tune]\ntrials = 3\n[tune.space]\n"train.learning_rate" = [0.001, 1e29]\n')
    printed = tune(run)
    states = {row["train.learning_rate"]: row for row in rows(run)}
    assert states["1e+29"]["state"] == "failed"
    assert "finite" in states["1e+29"]["why"]
    assert states["0.001"]["state"] == "complete"
    assert "failed; best" in printed or "failed, " in printed


def test_a_variant_its_models_kept_and_no_time(run: Run) -> None:
    tuned(run, '\n[tune.space]\n"train.learning_rate" = { low = 1e-4, high = 1e-1, log = true }\n')
    assert "no trial of runs/tiny/basic/tune has come to its end" in tune(
        run, "--variant", "basic", "--timeout", "1e-6", code=1
    )
    tune(run, "--variant", "basic", "--keep-models", "--trials", "3")
    found = rows(run, "basic/tune")
    assert [row["state"] for row in found] == ["complete"] * 3
    models = sorted((run.home / "basic" / "tune" / "trials").glob("*/model"))
    assert [model.parent.name for model in models] == ["0000", "0001", "0002"]
    settings = [json.loads((model / "settings.json").read_text())["train"] for model in models]
    assert [s["learning_rate"] for s in settings] == [float(row["train.learning_rate"]) for row in found]
    assert {s["ad_image"] for s in settings} == {False}
    best = tomllib.loads((run.home / "basic" / "tune" / "best.toml").read_text())
    assert (best["name"], best["train"]["ad_image"]) == ("tiny-basic-best", False)
    assert not (run.home / "tune").exists()


BAD: list[tuple[str, str]] = [
    ('"train.lerning_rate" = { low = 1, high = 2 }', "has no key 'lerning_rate'; did you mean 'learning_rate'"),
    (
        '"train.learning_rate" = { low = -1, high = 2 }',
        "and with -1: train.learning_rate: input should be greater than 0",
    ),
    ('"train.learning_rate" = { low = 2, high = 1 }', "low has to be below high (given: 2 and 1)"),
    ('"train.learning_rate" = { low = 1, hihg = 1 }', "has no key 'hihg'; did you mean 'high'?"),
    ("train.learning_rate = { low = 1, high = 2 }", 'write the whole name in quotes, "train.learning_rate" = …'),
    ('"train.pooling" = ["sum", "avg"]', "with \"avg\": train.pooling: input should be 'attentive'"),
    ('"train.pooling" = ["sum"]', "a list of at least two choices"),
    ('"train.pooling" = ["sum", "sum"]', 'has the choice "sum" twice'),
    ('"train.threads" = [1, 2]', "which does not change the model"),
    ('"train.validation" = [true, false]', "which is the same for all trials"),
    ('"split.valid" = [1, 2]', "compared on the same validation samples"),
    ('"epochs" = [1, 2]', "a key has its table before it: train.epochs"),
]


@pytest.mark.parametrize(("space", "error"), BAD)
def test_a_space_that_cannot_be(tmp_path: Path, space: str, error: str) -> None:
    from tests import tiny_world

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_world.RECIPE + f"\n[tune.space]\n{space}\n")
    result = ctrkit("tune", recipe, "--out", tmp_path / "runs")
    assert result.exit_code == 2, result.output
    assert error in result.output
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import tiny_world

    recipe = tmp_path / "tiny.toml"

    def told(text: str, *words: object) -> str:
        recipe.write_text(tiny_world.RECIPE + text)
        result = ctrkit("tune", recipe, "--out", tmp_path / "runs", *words)
        assert result.exit_code == 2, result.output
        return result.output

    assert "has no [tune.space], so there is nothing to search" in told("")
    assert "leaves no validation GAUC" in told(TUNE, "--set", "train.validation=false")
    assert "leaves no validation GAUC" in told(TUNE, "--set", "split.valid=0")
    warm = ("--set", 'train.warm_start="full"', "--set", 'train.warm_from="pictures"')
    assert "trains each trial from scratch" in told(TUNE, *warm)
    assert "no variant 'none'" in told(TUNE, "--variant", "none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ctrkit[tune]'" in told(TUNE)


def values(space: dict[str, Any], key: str, value: Any) -> Any:
    """Return a value as the study has it."""
    from ctrkit.recipe import Recipe
    from ctrkit.search_space import dimensions

    recipe = Recipe.model_validate({"name": "r", "tune": {"space": space}})
    return {d.key: d for d in dimensions(recipe)}[key].parameter(value)


def test_what_lies_in_a_range() -> None:
    space: dict[str, Any] = {
        "a": {"low": 3, "high": 14, "step": 4},
        "b": {"low": 0.5, "high": 2.0},
        "c": [[1], True, "x"],
    }
    assert [values(space, "a", n) for n in (3, 4, 7, 11, 14, 15, 7.5, "3", None)] == [3, None, 7, 11, *[None] * 5]
    assert [values(space, "b", n) for n in (0.5, 1, 2.0, 2.1, True)] == [0.5, 1.0, 2.0, None, None]
    assert [values(space, "c", n) for n in ([1], True, "x", 1, [2])] == ["[1]", "true", '"x"', None, None]


def test_a_trial_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    from ctrkit.recipe import Recipe
    from ctrkit.search_space import dimensions
    from ctrkit.study import ATTEMPTS, Study

    recipe = Recipe.model_validate({"name": "r", "tune": {"space": {"train.tiers": {"low": 1, "high": 9}}}})
    study = Study(tmp_path, recipe.tune, dimensions(recipe), {}, {"train.tiers": 4})
    for _ in range(ATTEMPTS):
        with study.begin(2) as begun:  # which ends without a word
            assert begun is not None
            assert begun.values == {"train.tiers": 4}
            assert begun.folder.name == "0000"
            assert study.someone_works()
        assert not study.someone_works()
        assert study.unfinished()
    with study.begin(2) as begun:
        assert begun is not None
        study.complete(begun, 0.7)
    assert [row.state for row in study.rows()] == [*["interrupted"] * (ATTEMPTS - 1), "failed", "complete"]
    assert study.rows()[ATTEMPTS - 1].notes["why"] == "its process was killed 3 times"
    with study.begin(2) as begun:
        assert begun is None


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1"])
def test_a_timeout_is_a_number_of_minutes(minutes: str) -> None:
    result = ctrkit("tune", "demo", "--timeout", minutes)
    assert result.exit_code == 2
    assert "Invalid value for '--timeout': " in result.output
