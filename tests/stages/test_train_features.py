"""`ctrkit train` with caches of any size for features of pictures: the same model, and counts worked out by hand."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrkit.cli import main
from ctrkit.ranks import Ranks
from tests.ranks import on_ranks
from tests.shop import ctrkit
from tests.small_groups import FEATURES, Group, random_groups, write_features, write_groups, write_pictures_of_sizes
from tests.test_tensorboard import points

WIDTH, EPOCHS = 4, 2
ROW_BYTES = 2 * WIDTH
ADS, BEHAVIOURS = [2, 7, 0, 2, 3], [9, 2, 4, 2]
"""Indexes of pictures, in one batch: rows 0, 5, none, 0, 1 of ads and 7, 0, 2, 0 of behaviours. So a step reads rows
0, 1, 5 and 0, 2, 7."""


def write(folder: Path) -> None:
    groups = random_groups(5, [2, 3], [4, 0])
    for sample, image in zip((s for g in groups for s in g.samples), ADS, strict=True):
        sample |= {"ad_image": image, "click": image % 2}
    for behaviour, image in zip(groups[0].behaviours, BEHAVIOURS, strict=True):
        behaviour["image"] = image
    valid = Group(groups[0].user, [], [{**groups[0].samples[0], "ad_image": 0, "sample_id": 900}], 901)
    write_groups(folder / "groups", {"train": groups, "valid": [valid]})
    write_features(folder / "f.h5", [f"p{i}" for i in range(8)], range(8), np.random.default_rng(2).random((8, WIDTH)))
    write_pictures_of_sizes(folder / "convert")
    lines = ['name = "small"', "[train]", "extractor = [3, 2]", "tower = [4]", "attention = [3]", "batch = 5"]
    lines += [f"epochs = {EPOCHS}", "patience = 0", "[features]"]
    for name, feature in FEATURES.items():
        given = feature.model_dump(include=feature.model_fields_set)
        lines.append(f"{name} = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in given.items())} }}")
    (folder / "recipe.toml").write_text("\n".join(lines))


def words(folder: Path, out: Path, rows_held: float, *more: str) -> list[object]:
    sizes = ["--set", f"train.host_cache_gib={rows_held * ROW_BYTES / 2**30!r}"]
    reads = ["--groups", folder / "groups", "--features", folder / "f.h5", "--convert", folder / "convert"]
    return ["train", "--recipe", folder / "recipe.toml", *reads, "--out", out, *sizes, *more]


def use(held: int, asked: int, found: int) -> dict[str, int]:
    steps = EPOCHS
    counts = {"rows held": held, "rows asked": asked * steps, "rows found": found * steps}
    return counts | {"bytes read": found * steps * ROW_BYTES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write(path)
    return path


def test_the_same_model_whatever_is_held(folder: Path, tmp_path: Path) -> None:
    found: dict[float, Any] = {}
    models = set()
    for rows_held in (0, 1, 3.9, 8, 1000):
        out = tmp_path / f"model-{rows_held}"
        result = ctrkit(*words(folder, out, rows_held))
        assert result.exit_code == 0, result.output
        models |= {(out / "model.pt").read_bytes() + (out / "settings.json").read_bytes()}
        found[rows_held] = json.loads(out.with_name(f"{out.name}.json").read_text())["counts"]["picture features"]
        assert "reading picture features took" in result.output
    assert len(models) == 1
    for counts in found.values():
        assert counts.pop("seconds reading") >= counts.pop("seconds waited") >= 0
        assert counts.pop("device") == use(0, 6, 0)
    assert found == {
        0: {"host": use(0, 6, 0), "disk": use(8, 6, 6)},
        1: {"host": use(1, 6, 2), "disk": use(7, 4, 4)},
        3.9: {"host": use(3, 6, 4), "disk": use(5, 2, 2)},
        8: {"host": use(8, 6, 6), "disk": use(0, 0, 0)},
        1000: {"host": use(8, 6, 6), "disk": use(0, 0, 0)},
    }


def test_the_table_and_the_curves(folder: Path, tmp_path: Path) -> None:
    board = ["--tensorboard", str(tmp_path / "board"), "--set", "train.log_every=1"]
    told = ctrkit(*words(folder, tmp_path / "model", 3, *board)).output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    assert rows == [
        ["host", "3", "12", "66.7%", "0.000"],
        ["disk", "5", "4", "100.0%", "0.000"],
    ]
    assert points(tmp_path / "board", "features/hit_rate") == [(step, pytest.approx(4 / 6)) for step in (1, 2)]
    assert all(seconds >= 0 for _, seconds in points(tmp_path / "board", "features/seconds_waited"))


def test_a_size_below_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    for key in ("host_cache_gib", "device_cache_gib"):
        result = ctrkit(*words(folder, tmp_path / "model", 1, "--set", f"train.{key}=-1"))
        assert result.exit_code == 2
        assert f"train.{key}" in result.output


def test_sizes_make_nothing_stale(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctrkit(*words(folder, tmp_path / "model", 3)).exit_code == 0
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    told = ctrkit(*words(folder, tmp_path / "model", 5, "--set", "train.device_cache_gib=1"))
    assert "is what it would be made again" in told.output


def test_predictions_are_the_same_whatever_is_held(folder: Path, tmp_path: Path) -> None:
    assert ctrkit(*words(folder, tmp_path / "model", 3)).exit_code == 0
    found = set()
    for rows_held in (0, 1, 100):
        told = words(folder, tmp_path / f"p-{rows_held}", rows_held, "--set", "predict.split=train")
        result = ctrkit("predict", *told[1:], "--model", tmp_path / "model")
        assert result.exit_code == 0, result.output
        found.add((tmp_path / f"p-{rows_held}").read_bytes())
    assert len(found) == 1


def by_two(ranks: Ranks, folder: Path) -> str:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words(folder, folder / "two", 2)])
    assert ended.value.code == 0, told.getvalue()
    return told.getvalue()


def test_a_rank_holds_what_it_owns(folder: Path) -> None:
    """Room for two rows in all: rank 1 holds row 0, rank 0 row 1. Of rows 0, 1, 5 and 0, 2, 7 three are held."""
    first, other = on_ranks(by_two, [2], folder, joined=False)[2]
    counts = json.loads((folder / "two.json").read_text())["counts"]["picture features"]
    assert (counts["host"], counts["disk"]) == (use(2, 6, 3), use(6, 3, 3))
    assert "50.0%" in first
    assert other == ""
