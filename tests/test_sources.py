import subprocess
import sys
from pathlib import Path

import pytest

from ctrkit.recipe import Feature, Recipe, Source
from ctrkit.sources import fields, raw_inputs, source_files


def recipe_of(**sources: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "x", "convert": sources})


def test_plain_names_count_even_where_no_file_is_yet(tmp_path: Path) -> None:
    recipe = recipe_of(impressions={"files": ["b.csv", "a.csv"]}, goods={"files": "goods.csv"})
    assert raw_inputs(recipe, tmp_path) == {
        "raw/b.csv": tmp_path / "b.csv",
        "raw/a.csv": tmp_path / "a.csv",
        "raw/goods.csv": tmp_path / "goods.csv",
    }


def test_only_the_named_sources_count(tmp_path: Path) -> None:
    recipe = recipe_of(impressions={"files": "a.csv"}, goods={"files": "goods.csv"})
    assert list(raw_inputs(recipe, tmp_path, "behaviours", "goods")) == ["raw/goods.csv"]


def test_globs_give_files_below_the_folder_in_order_of_name(tmp_path: Path) -> None:
    for name in ("day=2/b.csv", "day=1/b.csv", "day=1/c.txt", "day=3/b.csv/inner"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = source_files(Source(files="day=*/*.csv"), tmp_path)
    assert list(found) == ["day=1/b.csv", "day=2/b.csv"]


def test_folders_stand_for_the_data_below_them_and_urls_for_themselves(tmp_path: Path) -> None:
    for name in ("log/day=2/b.csv.gz", "log/day=1/a.parquet", "log/day=1/.c.csv", "log/_tmp/d.csv", "log/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    recipe = recipe_of(impressions={"files": ["s3://bucket/log/*.parquet", "log"]}, goods={"files": "http://x/g.csv"})
    found = raw_inputs(recipe, tmp_path)
    assert found == {f"raw/{name}": tmp_path / name for name in ("log/day=1/a.parquet", "log/day=2/b.csv.gz")}


@pytest.mark.parametrize(
    ("column", "expected"), [("goods", ["goods"]), ("{goods}.jpg", ["goods"]), ("{a}/{b}-{a}", ["a", "b", "a"])]
)
def test_fields_of_a_column_or_template(column: str, expected: list[str]) -> None:
    assert fields(Feature(of="ad", column=column)) == expected


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, ctrkit.sources; print([m for m in ('polars', 'torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
