"""`show` on each kind of artefact: the facts that a reader looks for are printed."""

import datetime
import json
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

from ctrkit.errors import UserError
from ctrkit.inspection import show

SIDECAR = {
    "stage": "group",
    "key": "k123",
    "inputs": {"samples": "d456"},
    "counts": {"groups": 3},
    "config": {"group": {"seed": 7}},
    "versions": {"polars": "9.9"},
}


def shown(path: Path) -> str:
    console = Console(width=200, file=StringIO())
    show(path, console)
    return " ".join(console.file.getvalue().split())


def test_parquet_with_the_sidecar_of_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "convert" / "vocab").mkdir(parents=True)
    file = tmp_path / "convert" / "vocab" / "ad.parquet"
    pl.DataFrame({"value": ["x[1]", "y"] * 3, "index": range(6)}).write_parquet(file, row_group_size=4)
    (tmp_path / "convert.json").write_text(json.dumps(SIDECAR))
    text = shown(file)
    for part in ("rows: 6", "row groups: 2", "String", "x[1]", "k123", "samples = d456", "groups = 3", "polars 9.9"):
        assert part in text


def test_days(tmp_path: Path) -> None:
    for day, rows in [("2024-03-01", 2), ("2024-03-02", 1500)]:
        (tmp_path / f"day={day}").mkdir()
        pl.DataFrame({"user": ["u"] * rows}).write_parquet(tmp_path / f"day={day}" / "part-0000.parquet")
    text = shown(tmp_path)
    assert "days: 2; rows: 1,502" in text
    assert "2024-03-02 │ 1 │ 1,500" in text


def test_convert_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "samples" / "day=2024-03-01").mkdir(parents=True)
    pl.DataFrame({"value": ["a"]}).write_parquet(tmp_path / "vocab" / "shop.parquet")
    pl.DataFrame({"click": [1]}).write_parquet(tmp_path / "samples" / "day=2024-03-01" / "part-0000.parquet")
    (tmp_path / "split.json").write_text('{"train": ["2024-03-01"], "test": []}')
    text = shown(tmp_path)
    for part in ("train │ 2024-03-01", "shop.parquet │ 1 │ value", "days: 1; rows: 1"):
        assert part in text


def test_groups(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    pl.DataFrame(
        {
            "user": ["u", "v", "u"],
            "day": [datetime.date(2024, 3, 1)] * 3,
            "goods": [[2, 3, 4], [], [5, 6, 7]],
            "click": [[0, 1], [1], [0, 0, 0]],
        }
    ).write_parquet(tmp_path / "train" / "part-0000.parquet", row_group_size=2)
    features = {"age": {"of": "user", "width": 12}, "goods": {"of": "behaviour", "width": 12}}
    (tmp_path / "schema.json").write_text(json.dumps({"features": features, "vocab": "d789"}))
    text = shown(tmp_path)
    assert "train │ 2 │ 3 │ 6 │ 2 │ 2 │" in text  # row groups, groups, samples, samples and behaviours a group
    assert "goods │ behaviour │ 12" in text
    assert "d789" in text


def test_features(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "features.h5", "w") as h5:
        h5.create_dataset("features", data=np.array([[3, 4], [0, 0]], dtype=np.float16))
        h5.create_dataset("image", data=np.array(["a", "b", "c"], dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=np.array([1, -1, 0]))
        h5.attrs["weights"] = "random, seed 3"
    text = shown(tmp_path / "features.h5")
    for part in ("rows │ 2", "pictures with a row │ 2", "pictures without │ 1", "0, 2.5, 5", "50.0%", "random, seed 3"):
        assert part in text


def test_model(tmp_path: Path) -> None:
    torch.save({"tower.0.weight": torch.zeros(7, 11)}, tmp_path / "model.pt")
    (tmp_path / "settings.json").write_text('{"train": {"model": "din"}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.625}\n')
    text = shown(tmp_path)
    for part in ("tower.0.weight │ [7, 11] │ float32 │ 77", '"model": "din"', "last of 2 records", "0.625"):
        assert part in text
    assert "0.7" not in text
    (tmp_path / "model.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a state dict"):
        shown(tmp_path)


def test_json_and_other_outputs_with_a_sidecar(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"all": {"gauc": 0.75}}')
    (tmp_path / "metrics.json.json").write_text(json.dumps(SIDECAR))
    assert "all.gauc │ 0.75" in shown(tmp_path / "metrics.json")
    assert "seed" in shown(tmp_path / "metrics.json.json")
    (tmp_path / "report.html").write_text("<html>")
    (tmp_path / "report.html.json").write_text(json.dumps(SIDECAR))
    text = shown(tmp_path / "report.html")
    assert "report.html │ 1 │ 6" in text
    assert "k123" in text


@pytest.mark.parametrize("name", ["notes.txt", "other.json", "folder"])
def test_foreign_things_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not there"):
        shown(tmp_path / name)
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="nothing that ctrkit writes"):
        shown(tmp_path / name)


def test_arrow_files(tmp_path: Path) -> None:
    """A folder of behaviours, and one of its files."""
    (tmp_path / "day=2024-03-02").mkdir()
    for part in range(2):
        lists = pl.DataFrame({"user": ["u", "v"], "goods": [[2, 3], [4]]})
        lists.write_ipc(tmp_path / "day=2024-03-02" / f"part-{part:04}.arrow")
    text = shown(tmp_path)
    assert "days: 1; rows: 4" in text
    assert "2024-03-02 │ 2 │ 4" in text
    assert "[2, 3] (2)" in text
    text = shown(tmp_path / "day=2024-03-02" / "part-0001.arrow")
    assert "rows: 2" in text
    assert "goods │ List(Int64)" in text
