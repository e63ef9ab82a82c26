"""ctrkit export, through the command line: the exported programs score as `ctrkit predict` does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ctrkit.stages.export import command

from ctrkit.cli import COMMANDS
from ctrkit.scorer import Scorer
from tests.shop import ctrkit
from tests.tiny_run import TinyRun

# Settings of [train] → by name. Each combination is trained for one epoch.
MODELS: dict[str, dict[str, Any]] = {
    "lr": {"model": "lr"},
    "base": {"model": "base"},
    "din": {"model": "din"},
    "dicm": {},
}


def requests_of(run: TinyRun, split: str = "test") -> pl.DataFrame:
    """Return a row a sample of a split: `sample_id`, and `request`, the raw values of its features, from the groups'
    indexes and the vocabularies; indexes 1 become a value that nobody has."""
    features = json.loads((run.groups / "schema.json").read_text())["features"]
    texts = {}
    for name, feature in features.items():
        table = pl.read_parquet(run.convert / "vocab" / f"{feature['vocab']}.parquet")
        texts[name] = {0: None, 1: "never seen", **dict(zip(table["index"], table["value"], strict=True))}

    def raw(name: str, index: Any) -> Any:
        return [raw(name, i) for i in index] if isinstance(index, list) else texts[name][index]

    def of(owner: str) -> list[str]:
        return [name for name, feature in features.items() if feature["of"] == owner]

    rows = []
    for group in pl.read_parquet(run.groups / split / "*.parquet").iter_rows(named=True):
        user = {name: raw(name, group[name]) for name in of("user")}
        histories = {name: raw(name, group[name]) for name in of("behaviour")}
        behaviours = [dict(zip(histories, values, strict=True)) for values in zip(*histories.values(), strict=True)]
        for i, sample_id in enumerate(group["sample_id"]):
            scene = {name: raw(name, group[name][i]) for name in of("scene")}
            ad = {name: raw(name, group[name][i]) for name in of("ad")}
            rows.append((sample_id, {"user": user, "scene": scene, "behaviours": behaviours, "ads": [ad]}))
    return pl.DataFrame({"sample_id": [r[0] for r in rows], "request": [json.dumps(r[1]) for r in rows]})


def predicted(run: TinyRun, model: Path, sets: list[str], out: Path) -> pl.DataFrame:
    run.must("predict", *run.reads(), "--model", model, *sets, "--out", out)
    return pl.read_parquet(out).select("sample_id", "score")


def words(settings: Mapping[str, Any]) -> list[str]:
    return [w for key, value in settings.items() for w in ("--set", f"train.{key}={json.dumps(value)}")]


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["export"][1]


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_those_of_predict(name: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """From raw values, sample by sample: to 1e-5 for all samples of the test split."""
    sets = words(MODELS[name])
    model = tiny_run.train(tmp_path / "model", *sets)
    out = tmp_path / "exported"
    result = ctrkit("export", model, "--recipe", tiny_run.recipe, "--convert", tiny_run.convert, "--out", out)
    assert result.exit_code == 0, result.output
    scorer = Scorer(out, tiny_run.features)
    expected = predicted(tiny_run, model, sets, tmp_path / "predictions.parquet")
    asked = requests_of(tiny_run).join(expected, on="sample_id", how="left", maintain_order="left")
    scores = [float(scorer.score(scorer.request.model_validate_json(r)).scores_A[0]) for r in asked["request"]]
    np.testing.assert_allclose(scores, asked["score"], atol=1e-5, rtol=0)
    assert expected.height == asked.height > 200
    assert asked["score"].n_unique() > 50
