"""The simulated shop's known answers: what pictures, attention and typical clicks must gain, and what must not.

All through the command line: two worlds are simulated, trained and evaluated; the second has no picture signal.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctrkit.features import FeatureStore
from ctrkit.pipeline import Graph, Setting
from tests.shop import ctrkit

WORLD = Path(__file__).parent / "worlds" / "small-shop.toml"
UNSEEN = "unseen_ad=true"
SEEN = "unseen_ad=false"

Metrics = dict[str, Any]


def make(out: Path) -> Path:
    """Do all steps of the world's run but the report in this process, as Make would call them; return the folder of
    its outputs."""
    graph = Graph(Setting(str(WORLD), None, None, (), out))
    for step in graph.steps:
        if step.stage != "report":
            must(*graph.arguments(step))
    return graph.home


def make_null(out: Path, home: Path, variants: tuple[str, ...]) -> Path:
    """Do the steps of these variants of a world whose pictures, the same, decide nothing; return its folder.

    home: that of the world itself, whose vectors of the pictures serve here too.
    """
    graph = Graph(Setting(str(WORLD), None, None, ("simulate.picture_signal=0",), out))
    for step in graph.steps:
        if step.stage == "extract-images":
            assert contents(graph.home / "raw" / "pictures") == contents(home / "raw" / "pictures")
            shutil.copy(home / "features.h5", step.output)
        elif step.stage not in ("eval", "report") and step.variant in (None, *variants):
            must(*graph.arguments(step))
    shown = pl.read_parquet(graph.home / "convert" / "vocab" / "image.parquet")["value"]
    assert (FeatureStore(home / "features.h5").row_of(shown) >= 0).all()
    return graph.home


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def must(*words: object) -> None:
    result = ctrkit(*words)
    assert result.exit_code == 0, (words, result.output, result.exception)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of the small shop, all variants."""
    return make(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def shop(home: Path) -> Metrics:
    """The metrics of the small shop, all variants."""
    metrics: Metrics = json.loads((home / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="session")
def null_shop(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """The metrics of a shop whose pictures decide nothing."""
    variants = ("whole", "basic+ad_id+user_ids")
    home = make_null(tmp_path_factory.mktemp("null"), home, variants)
    predictions = [f"{variant}={home / variant / 'predictions.parquet'}" for variant in variants]
    must("eval", "--gauc", *predictions, "--compare", ",".join(variants), "--json", home / "null.json")
    metrics: Metrics = json.loads((home / "null.json").read_text())
    return metrics


def gain(metrics: Metrics, better: str, worse: str, part: str = "all") -> dict[str, float]:
    """Return difference, low and high of a paired comparison."""
    found = [c for c in metrics["comparisons"] if (c["better"], c["worse"], c["slice"]) == (better, worse, part)]
    assert len(found) == 1, (better, worse, part)
    return found[0]  # type: ignore[no-any-return]


def gauc(metrics: Metrics, variant: str, part: str) -> float:
    of = metrics["variants"][variant]
    value = (of["all"] if part == "all" else of["slices"][part])["gauc"]
    return float(value)


@pytest.mark.known_answers
def test_pictures_help(shop: Metrics) -> None:
    found = gain(shop, "whole", "basic+ad_id")
    assert found["difference"] >= 0.02
    assert found["low"] > 0


@pytest.mark.known_answers
def test_pictures_help_most_on_ads_never_seen_in_training(shop: Metrics) -> None:
    assert gain(shop, "whole", "basic+ad_id", UNSEEN)["low"] > 0
    on_unseen = gauc(shop, "whole", UNSEEN) - gauc(shop, "basic+ad_id", UNSEEN)
    on_seen = gauc(shop, "whole", SEEN) - gauc(shop, "basic+ad_id", SEEN)
    assert on_unseen > on_seen


@pytest.mark.known_answers
@pytest.mark.parametrize("pooling", ["pooling-sum", "pooling-max"])
def test_attentive_pooling_beats_the_others(shop: Metrics, pooling: str) -> None:
    assert gain(shop, "whole", pooling)["low"] > 0


@pytest.mark.known_answers
def test_local_activation_beats_sum_pooling_on_ids(shop: Metrics) -> None:
    assert gain(shop, "din", "base")["low"] > 0


@pytest.mark.known_answers
def test_typical_clicks_beat_all_clicks(shop: Metrics) -> None:
    assert gain(shop, "whole", "all-clicks")["low"] > 0


@pytest.mark.known_answers
def test_shuffled_pictures_gain_nothing_beyond_an_id(shop: Metrics) -> None:
    assert gain(shop, "shuffled-pictures", "basic+ad_id+user_ids")["high"] < 0.005
    assert gain(shop, "shuffled-pictures", "basic+ad_id+user_ids", UNSEEN)["low"] <= 0


@pytest.mark.known_answers
def test_pictures_gain_nothing_where_looks_decide_nothing(null_shop: Metrics) -> None:
    assert gain(null_shop, "whole", "basic+ad_id+user_ids")["high"] < 0.005
    assert gain(null_shop, "whole", "basic+ad_id+user_ids", UNSEEN)["low"] <= 0


def replay(home: Path, control: str, arm: str) -> Any:
    """Return what a simulated A/B test of two variants finds."""
    reads = ["--raw", home / "raw", "--convert", home / "convert", "--groups", home / "groups"]
    arms = [word for name in (control, arm) for word in ("--arm", f"{name}={home / name / 'model'}")]
    out = home.parent / f"replay of {arm}"
    must("replay", "--recipe", WORLD, *reads, "--features", home / "features.h5", *arms, "--out", out)
    found = json.loads((out / "replay.json").read_text())
    for metric in ("ctr", "ecpm"):
        assert found["a_a"][metric]["low"] < 0 < found["a_a"][metric]["high"]
        assert 0.03 <= found["a_a"][f"{metric}_excludes_zero"] <= 0.075
    return found["comparisons"][0]


@pytest.mark.known_answers
def test_pictures_win_a_simulated_test(home: Path) -> None:
    found = replay(home, "basic+ad_id", "whole")
    for how in ("test", "all_traffic"):
        assert found[how]["ctr"]["low"] > 0
        assert found[how]["ecpm"]["low"] > 0


@pytest.mark.known_answers
def test_shuffled_pictures_win_no_simulated_test(home: Path) -> None:
    found = replay(home, "basic+ad_id+user_ids", "shuffled-pictures")
    assert found["test"]["ctr"]["low"] < 0
    assert found["all_traffic"]["ctr"]["high"] < 0
