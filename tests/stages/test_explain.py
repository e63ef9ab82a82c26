"""`ctrkit explain` through the command line: the scores of predict, what-ifs, and who or what is not known."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from ctrkit.cli import main
from tests.tiny_run import TinyRun

KINDS: dict[str, tuple[str, ...]] = {
    "lr": ("--variant", "lr"),
    "base": ("--variant", "base"),
    "din": ("--variant", "din"),
    "attentive": (),
    "max": ("--set", "train.pooling=max", "--set", "train.has_picture=true"),
    "din pooling": ("--set", "train.pooling=din", "--set", "train.user_ids=din"),
    "simtier": ("--set", "train.user_images=simtier+pooled", "--set", "train.pooling=sum"),
}


def explain(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["explain", *map(str, words)])


def must(*words: object) -> Result:
    result = explain(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def error(*words: object) -> str:
    """Return the error that a call ends with: one paragraph, no traceback."""
    result = explain(*words)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    told = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in told
    return told


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: the tiny one's data, and a model and predictions of each kind."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("groups", "convert", "features.h5", "raw"):
        (folder / name).symlink_to(tiny_run.folder / name)
        (folder / f"{name}.json").symlink_to(tiny_run.folder / f"{name}.json")
    for kind, words in KINDS.items():
        model = tiny_run.train(folder / kind / "model", *words)
        out = ["--model", model, "--out", folder / kind / "predictions.parquet"]
        tiny_run.must("predict", *tiny_run.reads(), *words, *out)
    return folder


def predictions(run: Path, kind: str) -> pl.DataFrame:
    return pl.read_parquet(run / kind / "predictions.parquet").sort("sample_id")


def whom(row: dict[str, Any]) -> list[object]:
    return ["--user", row["user"], "--day", row["day"], "--ad", row["ad"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_predict(kind: str, run: Path, tmp_path: Path) -> None:
    table = predictions(run, kind).unique(["user", "ad"], keep="none", maintain_order=True)
    short, long = table.sort("history_length", "sample_id")[[0, -1]].iter_rows(named=True)
    assert long["history_length"] > 1
    for row in (short, long):
        must("--run", run, "--variant", kind, *whom(row), "--json", tmp_path / "e.json")
        made = json.loads((tmp_path / "e.json").read_text())
        assert made["score"] == pytest.approx(row["score"], abs=1e-6)
        facts = {key: row[key] for key in ("sample_id", "click", "user", "ad", "unseen_ad")}
        assert {key: made[key] for key in facts} == facts
        assert (made["split"], made["day"]) == ("test", str(row["day"]))
        assert len(made["behaviours"]) == (0 if kind == "lr" else row["history_length"])
        for one in [*made["inputs"], *made["behaviours"]]:
            assert one["adds"] == pytest.approx(made["log_odds"] - one["log_odds"], abs=1e-9)
    if kind in ("din", "attentive"):
        assert sum(b["measures"]["weight"] for b in made["behaviours"]) == pytest.approx(1.0, abs=1e-5)


def test_values_are_those_of_the_logs(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    row = predictions(run, "base").filter(pl.col("history_length") > 0).row(0, named=True)
    must("--run", run, "--variant", "attentive", *whom(row), "--json", tmp_path / "e.json")
    made = json.loads((tmp_path / "e.json").read_text())
    raw = tiny_run.folder / "raw"
    user = pl.read_csv(raw / "users.csv").filter(user=row["user"]).row(0, named=True)
    ad = pl.read_csv(raw / "ads.csv", schema_overrides={"category": pl.String}).filter(ad=row["ad"]).row(0, named=True)
    values = {name: some[0]["value"] for one in made["inputs"] for name, some in one["values"].items()}
    assert (values["gender"], values["age"]) == (user["gender"], user["age"])
    assert (values["ad_category"], values["ad_shop"]) == (ad["category"], ad["shop"])
    assert made["ad_image"] == values["ad_image"] == ad["image"]
    image_of = dict(pl.read_csv(raw / "goods.csv").select("goods", "image").iter_rows())
    for behaviour in made["behaviours"]:
        goods = behaviour["values"]["goods"][0]["value"]
        assert behaviour["image"] == (image_of[goods] if goods else behaviour["image"])
    assert made["reads"] == ["image"]


def test_the_paths_in_place_of_a_run(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    row = predictions(run, "attentive").row(0, named=True)
    must("--run", run, "--variant", "attentive", *whom(row), "--json", tmp_path / "a.json")
    must("--model", run / "attentive" / "model", *tiny_run.reads(), *whom(row), "--json", tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    model = ["--model", run / "lr" / "model", "--groups", tiny_run.groups]
    must(*model, "--convert", tiny_run.convert, *whom(row))
    assert error(*model, *whom(row)) == "--convert is missing; or give --run"
    assert "--variant says whose model of a run" in error(*model, "--variant", "lr", *whom(row))


def test_the_terminal_shows_it(run: Path) -> None:
    row = predictions(run, "max").sort("history_length", "sample_id").row(-1, named=True)
    text = must("--run", run, "--variant", "max", *whom(row)).stdout
    assert f"user {row['user']}, {row['day']}, ad {row['ad']}: {row['score']:.4f}" in text
    for words in (
        "no picture (the zero vector, has_picture 0)",
        "dimensions won",
        "ties count for each",
        "no behaviours",
    ):
        assert words in text
    assert f"ad_id {row['ad']}" in text


def test_an_ad_that_the_user_did_not_see(run: Path, tmp_path: Path) -> None:
    """Its features are those of another's impression, the scene that of the user's first of the day."""
    table = predictions(run, "attentive")
    user = table["user"][0]
    seen = set(table.filter(user=user)["ad"])
    ad = next(a for a in table["ad"].unique().sort() if a not in seen)
    day = table["day"][0]
    words = ["--run", run, "--variant", "attentive", "--user", user, "--day", day, "--ad", ad]
    out = ["--json", tmp_path / "e.json", "--html", tmp_path / "e.html"]
    text = must(*words, *out).stdout
    made = json.loads((tmp_path / "e.json").read_text())
    assert (made["sample_id"], made["click"], made["unseen_ad"]) == (None, None, None)
    lender = made["ad_from"]
    assert table.filter(sample_id=lender["sample_id"]).select("user", "ad").row(0) == (lender["user"], ad)
    note = f"User {user} did not see ad {ad} on {day}"
    assert note in text
    assert note in (tmp_path / "e.html").read_text()
    # The user's own first impression, with this ad in its place: the same user, scene and history.
    groups = pl.read_parquet(run / "groups" / "test").filter(user=user)
    own = groups.explode("sample_id", "time", "ad", "position").sort("time", "sample_id").row(0, named=True)
    first = ["--run", run, "--variant", "attentive", *whom({"user": user, "day": day, "ad": own["ad"]})]
    must(*first, "--json", tmp_path / "first.json")
    before = json.loads((tmp_path / "first.json").read_text())
    assert (made["time"], before["time"]) == (own["time"], own["time"])
    for part in ("user features", "scene"):
        assert [i["values"] for i in made["inputs"] if i["name"] == part] == [
            i["values"] for i in before["inputs"] if i["name"] == part
        ]
    assert [b["values"] for b in made["behaviours"]] == [b["values"] for b in before["behaviours"]]
    # With every feature of the ad unknown, whose ad it was is forgotten.
    assert made["score"] != before["score"]
    ids = [[v["value"] for v in i["values"]["ad_id"]] for i in made["inputs"] if i["name"] == "ad id"]
    assert ids == [[ad]]


def test_who_and_what_is_not_known(run: Path, tmp_path: Path) -> None:
    row = predictions(run, "din").row(0, named=True)
    base = ["--run", run, "--variant", "din", "--html", tmp_path / "e.html"]

    def wrong(**changed: object) -> str:
        return error(*base, *whom(row | changed))

    told = wrong(user=row["user"] + "x")
    assert f"has no user '{row['user']}x'; did you mean" in told
    assert f"'{row['user']}'" in told
    assert re.search(r"has no user '\?\?\?'; known: ", wrong(user="???"))
    told = wrong(day="2030-01-01")
    assert f"user '{row['user']}' has no impression on 2030-01-01" in told
    assert str(row["day"]) in told
    told = wrong(ad=row["ad"] + "x")
    assert f"has no impression of ad '{row['ad']}x', so its features are not known; did you mean" in told
    assert "does not match the format" in wrong(day="8 March")
    assert "once on" in error(*base, *whom(row), "--number", 2)
    table = predictions(run, "din")
    unseen = next(a for a in table["ad"].unique().sort() if a not in set(table.filter(user=row["user"])["ad"]))
    told = error(*base, *whom(row | {"ad": unseen}), "--number", 2)
    assert f"did not see ad '{unseen}' on {row['day']}, so there is no number 2 of it" in told
    assert not list(tmp_path.iterdir())


def test_runs_that_are_none(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    row = predictions(run, "din").row(0, named=True)
    assert "say whose with --variant; known: attentive, base" in error("--run", run, *whom(row))
    assert "has no model of a variant 'dim'; did you mean 'din'" in error("--run", run, "--variant", "dim", *whom(row))
    assert "is not the folder of a run: it has no trained model" in error("--run", tmp_path, *whom(row))
    other = tmp_path / "other"
    (other / "din").mkdir(parents=True)
    (other / "din" / "model").symlink_to(run / "din" / "model")
    assert "has no sidecar that says what it was trained on" in error("--run", other, *whom(row))
    (other / "din" / "model.json").symlink_to(run / "din" / "model.json")
    assert "no longer has the groups that" in error("--run", other, *whom(row))
    (other / "groups").symlink_to(tiny_run.groups)
    assert "groups has no sidecar (groups.json) that says whether" in error("--run", other, *whom(row))
    shutil.copytree(run / "lr" / "model", tmp_path / "broken")
    state = tmp_path / "broken" / "model.pt"
    state.write_bytes(state.read_bytes()[:200])
    told = error("--model", tmp_path / "broken", *tiny_run.reads(), *whom(row))
    assert told == f"{state} is damaged: it is not what ctrkit train wrote. Train the model again."


def test_another_runs_vocabulary_is_refused(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    row = predictions(run, "lr").row(0, named=True)
    shutil.copytree(tiny_run.convert / "vocab", tmp_path / "convert" / "vocab")
    (tmp_path / "convert" / "vocab" / "category.parquet").unlink()
    told = error("--run", run, "--variant", "lr", "--convert", tmp_path / "convert", *whom(row))
    assert "(--convert) has another vocabulary than" in told


def test_nothing_of_the_run_is_written_over(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    row = predictions(run, "lr").row(0, named=True)
    common = ["--run", run, "--variant", "lr", *whom(row)]
    scores = run / "lr" / "predictions.parquet"
    kept = (scores, run / "lr" / "model" / "model.pt", run / "lr" / "model.json", tiny_run.features)
    before = [path.read_bytes() for path in kept]
    for path in (*kept, tiny_run.folder / "raw" / "pictures" / "new.json"):
        for option in ("--html", "--json"):
            assert f"{path} ({option}) " in error(*common, option, path)
    assert [path.read_bytes() for path in kept] == before
    assert not (tiny_run.folder / "raw" / "pictures" / "new.json").exists()
    same = error(*common, "--html", tmp_path / "x", "--json", tmp_path / "." / "x")
    assert "--html and --json both name" in same
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # an explanation may be written anew
        must(*common, "--json", tmp_path / "x.json")


def test_a_variant_with_groups_of_its_own(run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The run's groups are other ones; the variant's are beside its model, and so found by their content."""
    behaviours = tmp_path / "behaviours"
    fewer = ["--set", "select-clicks.max_behaviours=2"]
    tiny_run.must("select-clicks", "--convert", tiny_run.convert, "--out", behaviours, *fewer)
    folder = tmp_path / "run"
    own = folder / "short" / "groups"
    tiny_run.must("group", "--convert", tiny_run.convert, "--behaviours", behaviours, "--out", own)
    for name in ("groups", "convert"):
        (folder / name).symlink_to(tiny_run.folder / name)
        (folder / f"{name}.json").symlink_to(tiny_run.folder / f"{name}.json")
    tiny_run.must("train", "--variant", "base", "--groups", own, "--out", folder / "short" / "model")
    row = predictions(run, "base").sort("history_length", "sample_id").row(-1, named=True)
    assert row["history_length"] > 2
    must("--run", folder, *whom(row), "--json", tmp_path / "e.json")
    assert len(json.loads((tmp_path / "e.json").read_text())["behaviours"]) == 2


def test_the_page_has_the_pictures_and_escapes_everything(run: Path, tmp_path: Path) -> None:
    row = predictions(run, "attentive").sort("history_length", "sample_id").row(-1, named=True)
    page = tmp_path / "e.html"
    must("--run", run, "--variant", "attentive", *whom(row), "--html", page)
    text = page.read_text()
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) == row["history_length"] + 1
    assert f"{row['score']:.4f}" in text
    assert "http" not in text
    assert str(run) not in text
    first = page.read_bytes()
    must("--run", run, "--variant", "attentive", *whom(row), "--html", page)
    assert page.read_bytes() == first
    pictures = ["--pictures", tmp_path / "none"]
    result = explain("--run", run, "--variant", "attentive", *whom(row), "--html", page, *pictures)
    assert result.exit_code == 1
    assert "is not there" in result.stderr
