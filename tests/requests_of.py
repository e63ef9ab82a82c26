"""Requests of raw values for the samples of a groups folder, as somebody would send them."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from tests.shop import ctrkit
from tests.tiny_run import TinyRun

NOBODY = "a value that nobody has"


def samples(groups: Path, convert: Path, split: str = "test") -> list[tuple[int, dict[str, Any]]]:
    """Return (sample_id, request) of each sample of a split, from the indexes of groups/ and the vocabularies' values;
    what training did not know becomes a value that nobody has."""
    features = json.loads((groups / "schema.json").read_text())["features"]
    texts = {}
    for name, feature in features.items():
        table = pl.read_parquet(convert / "vocab" / f"{feature['vocab']}.parquet")
        texts[name] = {0: None, 1: NOBODY, **dict(zip(table["index"], table["value"], strict=True))}

    def raw(name: str, index: Any) -> Any:
        return [raw(name, i) for i in index] if isinstance(index, list) else texts[name][index]

    def of(owner: str, group: dict[str, Any]) -> dict[str, Any]:
        return {name: raw(name, group[name]) for name, feature in features.items() if feature["of"] == owner}

    out = []
    for group in pl.read_parquet(groups / split / "*.parquet").iter_rows(named=True):
        user, history, scene, ads = (of(owner, group) for owner in ("user", "behaviour", "scene", "ad"))
        behaviours = [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
        for i, sample_id in enumerate(group["sample_id"]):
            ad, here = ({name: values[i] for name, values in some.items()} for some in (ads, scene))
            out.append((sample_id, {"user": user, "scene": here, "behaviours": behaviours, "ads": [ad]}))
    return out


def export(run: TinyRun, model: Path, out: Path, *words: object) -> Path:
    """Export a model of a run, which must succeed; return the folder."""
    result = ctrkit("export", model, "--recipe", run.recipe, "--convert", run.convert, "--out", out, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def sets(settings: dict[str, Any]) -> list[str]:
    """Return the options that set these keys of [train]."""
    return [word for key, value in settings.items() for word in ("--set", f"train.{key}={json.dumps(value)}")]
