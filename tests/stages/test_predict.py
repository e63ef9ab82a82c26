"""ctrkit predict, through the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from ctrkit.stages.predict import command

from ctrkit.cli import COMMANDS
from ctrkit.gauc import gauc
from tests.tiny_run import TinyRun

SETS = ["--set", "train.epochs=3", "--set", "train.learning_rate=0.01", "--set", "train.user_ids=true"]


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("model") / "model", *SETS)


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["predict"][1]


def test_the_same_at_any_batch_in_the_order_of_the_groups(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    tables = []
    for batch in (1, 7, 4096):
        out = tmp_path / f"{batch}.parquet"
        words = [*tiny_run.reads(), "--model", model, *SETS, "--set", f"predict.batch={batch}"]
        tiny_run.must("predict", *words, "--out", out)
        tables.append(pl.read_parquet(out))
    columns = ["sample_id", "user", "ad", "day", "click", "score", "history_length", "unseen_ad"]
    assert tables[0].columns == columns
    groups = pl.read_parquet(tiny_run.groups / "test" / "*.parquet")
    lists = ["sample_id", "ad", "click", "unseen_ad"]
    expected = groups.select("user", "day", *lists, pl.col("goods").list.len().alias("history_length")).explode(lists)
    for table in tables:
        assert table.drop("score").equals(expected.select([c for c in columns if c != "score"]))
        np.testing.assert_allclose(table["score"], tables[0]["score"], atol=1e-6)
    assert tables[0]["score"].is_between(0, 1, closed="none").all()
    assert tables[0]["score"].n_unique() > 100


def test_the_validation_scores_are_those_of_training(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    """A model read back from disk is the model that was validated: the same GAUC, to the last digit."""
    out = tmp_path / "valid.parquet"
    words = [*tiny_run.reads(), "--model", model, *SETS, "--set", "predict.split=valid"]
    result = tiny_run.must("predict", *words, "--out", out)
    table = pl.read_parquet(out)
    best = json.loads(model.with_name("model.json").read_text())["counts"]["best"]
    assert gauc(table["user"].to_numpy(), table["click"], table["score"]).value == best["valid_gauc"]
    assert f"predict: {table.height} impressions -> {out}" in result.output
    assert json.loads((tmp_path / "valid.parquet.json").read_text())["counts"] == {"samples": table.height}


def test_every_kind_of_model(tiny_run: TinyRun, tmp_path: Path) -> None:
    for variant in ("lr", "base", "din", "sum"):
        trained = tiny_run.train(tmp_path / variant, "--variant", variant)
        words = [*tiny_run.reads(), "--model", trained, "--set", "predict.split=valid", "--set", "train.threads=2"]
        tiny_run.must("predict", "--variant", variant, *words, "--out", tmp_path / f"{variant}.parquet")
        table = pl.read_parquet(tmp_path / f"{variant}.parquet")
        best = json.loads((tmp_path / f"{variant}.json").read_text())["counts"]["best"]
        found = gauc(table["user"].to_numpy(), table["click"], table["score"]).value
        assert found == pytest.approx(best["valid_gauc"], abs=1e-9)


@pytest.mark.parametrize("variant", ["pictures", "lr", "din"])
def test_splitting_groups_changes_no_score(tiny_run: TinyRun, model: Path, tmp_path: Path, variant: str) -> None:
    """Rows of one group share its features, so a limit on samples a row changes only how they are stored."""
    words = ["--convert", tiny_run.convert, "--behaviours", tiny_run.folder / "behaviours"]
    tiny_run.must("group", *words, "--set", "group.max_samples=2", "--out", tmp_path / "groups")
    stored = [pl.read_parquet(g / "test" / "*.parquet") for g in (tiny_run.groups, tmp_path / "groups")]
    assert stored[1].height > 2 * stored[0].height
    choose: list[object] = [*SETS]
    if variant != "pictures":
        choose = ["--variant", variant]
        model = tiny_run.train(tmp_path / "model", *choose)
    tables = []
    for groups in (tiny_run.groups, tmp_path / "groups"):
        out = tmp_path / "predictions.parquet"
        reads = ["--groups", groups, *tiny_run.reads()[2:], "--model", model]
        tiny_run.must("predict", *choose, *reads, "--out", out)
        tables.append(pl.read_parquet(out))
    assert tables[0].drop("score").equals(tables[1].drop("score"))
    assert tables[0]["history_length"].max() > 3
    np.testing.assert_allclose(tables[1]["score"], tables[0]["score"], atol=1e-6)


def test_dropped_negatives_are_undone(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Training on a fifth of the negatives: odds five times as high, which predict divides by."""
    shutil.copytree(tiny_run.groups, tmp_path / "groups")
    schema = json.loads((tmp_path / "groups" / "schema.json").read_text())
    assert schema["negative_rate"] == 1.0
    scores = []
    for rate in (1.0, 0.2):
        (tmp_path / "groups" / "schema.json").write_text(json.dumps({**schema, "negative_rate": rate}))
        reads = ["--groups", tmp_path / "groups"]
        model = tmp_path / f"model-{rate}"
        tiny_run.must("train", "--variant", "lr", *reads, "--out", model)
        out = tmp_path / f"{rate}.parquet"
        tiny_run.must("predict", "--variant", "lr", *reads, "--model", model, "--out", out)
        scores.append(pl.read_parquet(out)["score"].to_numpy().astype(np.float64))
    plain, corrected = scores
    np.testing.assert_allclose(corrected, plain / (plain + (1 - plain) / 0.2), atol=1e-6)


def refused(tiny_run: TinyRun, out: Path, *words: object) -> str:
    result = tiny_run.call("predict", *words, "--out", out)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert not out.exists()
    error = result.output[result.output.index("Error: ") :].strip()
    assert "\n" not in error
    return error


def test_what_does_not_fit(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    reads = [*tiny_run.reads(), *SETS]
    groups = ["--groups", tiny_run.groups, *SETS]
    assert "give --features" in refused(tiny_run, out, "--model", model, *groups)
    assert "it has no settings.json" in refused(tiny_run, out, "--model", tmp_path / "none", *reads)
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    whole = (damaged / "model.pt").read_bytes()
    (damaged / "model.pt").write_bytes(whole[: len(whole) // 2])
    assert "model.pt is damaged: it is not what ctrkit" in refused(tiny_run, out, "--model", damaged, *reads)
    other = tmp_path / "groups"
    shutil.copytree(tiny_run.groups, other)
    schema = json.loads((other / "schema.json").read_text())
    (other / "schema.json").write_text(json.dumps({**schema, "vocab_digest": "f" * 32}))
    words = ["--model", model, "--groups", other, *reads[2:]]
    assert "was trained with another vocabulary" in refused(tiny_run, out, *words)
    shutil.rmtree(other / "test")
    (other / "schema.json").write_text(json.dumps(schema))
    assert "has no test split" in refused(tiny_run, out, *words)


def test_a_model_of_another_variant(tiny_run: TinyRun, model: Path, tmp_path: Path) -> None:
    """Whatever decides what model it is has to be as the recipe, the variant and --set say; where it runs does not."""
    out = tmp_path / "predictions.parquet"
    error = refused(tiny_run, out, "--variant", "sum", *SETS, *tiny_run.reads(), "--model", model)
    assert f'{model} was not trained as the recipe says: with train.pooling = "attentive", not "sum".' in error
    assert "Give the --variant and the --set options that it was trained with" in error
    error = refused(tiny_run, out, "--variant", "lr", *tiny_run.reads(), "--model", model)
    assert (
        'with train.model = "dicm", not "lr"; train.user_ids = true, not false; train.epochs = 3, not 1 (and 1' in error
    )
    where = ["--set", "train.threads=2", "--set", "train.log_every=7", "--set", "train.checkpoint_minutes=1"]
    tiny_run.must("predict", *SETS, *where, *tiny_run.reads(), "--model", model, "--out", out)
