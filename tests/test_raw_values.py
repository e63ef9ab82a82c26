"""Raw values of requests get the indexes that `ctrkit convert` gave them."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrkit import vocabulary
from ctrkit.raw_values import Indexer, as_text_of
from ctrkit.recipe import Feature, load
from ctrkit.tables import as_text
from tests import shop

FEATURES = """
[features]
gender = { of = "user" }
ad_id = { of = "ad", column = "ad", min_count = 9 }
ad_goods = { of = "ad", column = "goods", vocab = "goods" }
few = { of = "ad", column = "goods", top = 5 }
hashed = { of = "ad", column = "goods", hash_buckets = 7 }
ad_tags = { of = "ad", column = "tags", vocab = "tag", multi_hot = true }
hashed_tags = { of = "ad", column = "tags", multi_hot = true, hash_buckets = 3 }
ad_image = { of = "ad", kind = "image", column = "{goods}.jpg" }
position = { of = "scene" }
place = { of = "scene", column = "position", kind = "number", edges = [0.5, 1.0] }
third = { of = "scene", column = "position", kind = "number", quantiles = 3 }
goods = { of = "behaviour" }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop")
    before, _, rest = shop.RECIPE.partition("[features]")
    recipe = before + FEATURES + rest[rest.index("[select-clicks]") :]
    shop.write(path, recipe, **shop.random_rows(4))
    result = shop.run(path, "convert")
    assert result.exit_code == 0, result.output
    return path


def raw(folder: Path, table: str) -> pl.DataFrame:
    return pl.read_csv(folder / "raw" / f"{table}.csv", infer_schema=False)


def test_all_samples_of_a_conversion(folder: Path) -> None:
    """Every kind of feature: texts of CSV, each sample's own index; and where a number may be a number, so given."""
    samples = pl.read_parquet(folder / "convert" / "samples" / "**" / "*.parquet", hive_partitioning=False)
    logs = raw(folder, "impressions").with_columns(time=pl.col("time").cast(pl.Int64) * 1000)
    logs = logs.unique(["user", "ad", "time"], keep="none")
    rows = samples.join(logs, on=["user", "ad", "time"], suffix=" raw").join(
        raw(folder, "users"), "user", how="left", suffix=" raw"
    )
    rows = rows.join(raw(folder, "ads"), "ad", how="left")
    assert rows.height > 200
    columns = {
        "gender": "gender raw",
        "ad_id": "ad",
        "ad_goods": "goods",
        "few": "goods",
        "hashed": "goods",
        "ad_tags": "tags",
        "hashed_tags": "tags",
        "position": "position raw",
        "place": "position raw",
        "third": "position raw",
    }
    features = load(folder / "recipe.toml").features
    for name, column in columns.items():
        index, values = Indexer(features[name], folder / "convert" / "vocab"), rows[column].to_list()
        expected = rows[name].to_list()
        seen = {i for one in expected for i in (one if isinstance(one, list) else [one])}
        assert len(seen) > 1, name
        if features[name].multi_hot:
            assert [index.many(value) for value in values] == expected
            lists = [None if value is None else [*value.split("|"), None, ""] for value in values]
            assert [index.many(value) for value in lists] == expected
        else:
            assert index.one(values) == expected, name
        if name in ("position", "place", "third"):
            for kind in (int, float):
                assert index.one([None if v is None else kind(v) for v in values]) == expected
    assert (rows["ad_id"] == 1).any()
    assert (rows["few"] == 1).any()
    assert (rows["gender"] == 0).any()


TEXTS: list[Any] = ["", "007", "x", "0", 0, 7, -3, 2**63, 31.0, -0.0, 1.5, 1e-7, 0.00001, 12345678.125, 1e16, 1e300]


@pytest.mark.parametrize("value", [*TEXTS, True, False, None], ids=repr)
def test_a_value_is_the_text_that_convert_would_read(value: Any) -> None:
    """Of a column of that type, such as Parquet or JSON gives."""
    column = pl.Series("x", [value])
    assert as_text_of(value) == column.to_frame().select(as_text(column.dtype, "x")).item()


NUMBERS = ["1e3", " 5", "5 ", "inf", "-inf", "nan", "abc", "0x10", "1_000", "-0", "٣", "+2", ".5", "2.", "0.5", "1e400"]


@pytest.mark.parametrize("text", [*NUMBERS, "9" * 400, "0.49999999999999994", "1,5", None], ids=repr)
def test_a_number_lies_in_the_bucket_that_convert_gives_it(text: str | None, tmp_path: Path) -> None:
    feature = Feature(of="scene", kind="number", edges=(0.5, 1.0, 3.0), vocab="n")
    made, [expected] = vocabulary.build_numbers([pl.Series([text], dtype=pl.String)], [np.ones(1, np.int64)], feature)
    made.write_parquet(tmp_path / "n.parquet")
    assert Indexer(feature, tmp_path).one([text]) == expected.to_list()


def test_a_hash_of_any_text_is_that_of_convert() -> None:
    feature = Feature(of="ad", hash_buckets=1000)
    values = pl.Series(["a", "ä", "日本", "x" * 500, "1", " ", "🙂"])
    _, [expected] = vocabulary.build([values], [np.ones(len(values), np.int64)], feature)
    assert Indexer(feature, Path("none")).one(values.to_list()) == expected.to_list()
