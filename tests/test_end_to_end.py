"""A whole run, from raw logs to report, by the wheel: what comes out fits together."""

import json
import re
import zipfile
from pathlib import Path

import polars as pl
import pytest

from ctrkit import provenance
from ctrkit.digests import Digests
from ctrkit.files import sidecar_path
from ctrkit.pipeline import OUTPUTS
from tests.tiny_world import CHECKOUT, Run, build_wheel

VARIANTS = ("pictures", "basic", "all-clicks")
OPTIONAL = ("tune-backbone", "import-features", "export", "tables", "daily", "replay")
"""Steps that this recipe does without."""


def outputs(run: Run) -> list[Path]:
    """Return every output of the run that has a sidecar."""
    return sorted(p.with_suffix("") for p in run.home.rglob("*.json") if p.with_suffix("").exists())


def test_every_step_has_its_output_and_sidecar(built: Run) -> None:
    shared = [name for stage, name in OUTPUTS.items() if stage not in ("train", "predict", *OPTIONAL)]
    own = [f"{variant}/{OUTPUTS[stage]}" for variant in VARIANTS for stage in ("train", "predict")]
    other = ["all-clicks/behaviours", "all-clicks/groups"]
    assert [str(p.relative_to(built.home)) for p in outputs(built)] == sorted([*shared, *own, *other])
    known = Digests()
    for path in outputs(built):
        sidecar = json.loads(sidecar_path(path).read_text())
        assert sidecar["content"] == known.of(path)
        assert set(sidecar["config"]) == set(provenance.TABLES[sidecar["stage"]])
        assert sidecar["inputs"] or sidecar["stage"] == "simulate"
        assert "missing" not in sidecar["inputs"].values()
    assert built.leftovers() == []


def test_every_impression_is_followed_from_log_to_metrics(built: Run) -> None:
    logged = pl.read_csv(built.home / "raw/impressions.csv")
    clicks = pl.read_csv(built.home / "raw/clicks.csv")
    samples = pl.read_parquet(built.home / "convert/samples/**/*.parquet")
    grouped = {split: pl.read_parquet(built.home / f"groups/{split}/*.parquet") for split in ("train", "valid", "test")}
    assert samples.height == logged.height
    assert samples["click"].sum() == clicks.height
    ids = pl.concat([groups["sample_id"].explode(empty_as_null=False) for groups in grouped.values()])
    assert ids.sort().to_list() == samples["sample_id"].sort().to_list()
    metrics = json.loads((built.home / "metrics.json").read_text())
    for variant in VARIANTS:
        scored = pl.read_parquet(built.home / variant / "predictions.parquet")
        assert scored["sample_id"].sort().to_list() == grouped["test"]["sample_id"].explode().sort().to_list()
        truth = scored.join(samples, on=["sample_id", "user", "ad", "click", "unseen_ad"])
        assert truth.height == scored.height
        assert scored["score"].is_between(0, 1).all()
        assert metrics["variants"][variant]["all"]["impressions"] == scored.height
    assert metrics["order"]["variants"] == list(VARIANTS)


def test_the_report_stands_alone(built: Run) -> None:
    page = (built.home / "report.html").read_text()
    assert "simulated" in page
    for variant in VARIANTS:
        assert variant in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", page) == []
    assert "data:image" in page


@pytest.mark.parametrize("name", ["metrics.json", "report.html", "basic/model/settings.json", "groups/schema.json"])
def test_no_path_of_this_machine_is_in_a_result(built: Run, name: str) -> None:
    text = (built.home / name).read_text()
    assert str(built.folder) not in text
    assert str(CHECKOUT) not in text


def test_every_output_can_be_shown(built: Run) -> None:
    printed = built.ctrkit("inspect", *(str(p.relative_to(built.folder)) for p in outputs(built)))
    for stage in OUTPUTS.keys() - OPTIONAL:
        assert stage in printed


def test_what_the_wheel_carries(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
    package = {f"ctrkit/{p.relative_to(CHECKOUT / 'ctrkit').as_posix()}" for p in (CHECKOUT / "ctrkit").rglob("*.py")}
    stages = {f"ctrkit/stages/{p.name}" for p in (CHECKOUT / "stages").glob("*.py")}
    recipes = {f"ctrkit/recipes/{p.parent.name}/recipe.toml" for p in (CHECKOUT / "data").glob("*/recipe.toml")}
    templates = {f"ctrkit/templates/{p.name}" for p in (CHECKOUT / "ctrkit" / "templates").iterdir()}
    assert package | stages | recipes | templates | {"ctrkit/pipeline.mk", "ctrkit/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_knows_its_recipes(built: Run) -> None:
    assert "Error: no recipe 'dem'" in built.ctrkit("rules", "--recipe", "dem", "--out", "x", fails=True)
    printed = built.ctrkit("simulate", "--recipe", "movielens", "--out", "x", fails=True)
    assert "recipe 'movielens' has no [simulate] table" in printed
