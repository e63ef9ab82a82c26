from collections import Counter, defaultdict
from pathlib import Path

import polars as pl
import pytest

from ctrkit import grouping
from ctrkit.batches import Schema
from ctrkit.errors import UserError
from ctrkit.grouping import SAMPLE_COLUMNS, count_samples, group, ungroup
from ctrkit.partitions import read_by_day, read_split
from ctrkit.recipe import Recipe, load
from tests.shop import random_rows, run_all, write

SHARED = ["gender", "goods", "category", "image"]
OWN = ["ad_id", "ad_goods", "ad_tags", "ad_image", "position", "hour"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write(folder, **random_rows(11))
    run_all(folder)
    return folder


def recipe_of(shop: Path, *sets: str) -> Recipe:
    return load(shop / "recipe.toml", sets=sets)


def groups_of(shop: Path, split: str) -> pl.DataFrame:
    return pl.read_parquet(shop / "groups" / split / "part-*.parquet")


def test_ungrouping_gives_back_exactly_the_samples(shop: Path) -> None:
    split = read_split(shop / "convert")
    for part in ("train", "valid", "test"):
        groups = groups_of(shop, part)
        samples = read_by_day(shop / "convert" / "samples", split[part])
        histories = read_by_day(shop / "behaviours", split[part])
        assert samples is not None
        assert histories is not None
        expected = samples.join(histories, on=["day", "user"], how="left").sort("sample_id")
        expected = expected.with_columns(
            pl.col("goods", "category", "image").fill_null(pl.lit([], dtype=pl.List(pl.UInt32)))
        )
        got = ungroup(groups, SHARED, OWN)
        assert got.height == samples.height > 0
        assert got.equals(expected.select(got.columns))


def test_groups_are_one_a_user_and_day_with_ids_of_their_own(shop: Path) -> None:
    parts = {part: groups_of(shop, part) for part in ("train", "valid", "test")}
    everything = pl.concat(parts.values())
    assert everything["group_id"].n_unique() == everything.height
    assert not everything.select("user", "day").is_duplicated().any()
    assert everything.null_count().sum_horizontal().item() == 0
    for part in ("valid", "test"):
        assert parts[part].equals(parts[part].sort("day", "user"))
    assert not parts["train"].equals(parts["train"].sort("day", "user"))


def test_the_seed_decides_the_shuffle(shop: Path, tmp_path: Path) -> None:
    orders = []
    for n, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(n)
        group(recipe_of(shop, f"group.seed={seed}"), shop / "convert", shop / "behaviours", out)
        orders.append(pl.read_parquet(out / "train" / "part-*.parquet"))
        counts = [pl.read_parquet(p) for p in sorted((out / "counts").glob("*.parquet"))]
        orders.append(pl.concat(counts))
    assert orders[0].equals(orders[2])
    assert not orders[0].equals(orders[4])
    assert orders[0].sort("group_id").equals(orders[4].sort("group_id"))
    assert orders[1].equals(orders[5])


def test_some_groups_have_no_history_and_empty_lists(shop: Path, tmp_path: Path) -> None:
    train = groups_of(shop, "train")
    empty = train.filter(pl.col("goods").list.len() == 0)
    assert 0 < empty.height < train.height
    (tmp_path / "none").mkdir()
    group(recipe_of(shop), shop / "convert", tmp_path / "none", tmp_path / "groups")
    all_empty = pl.read_parquet(tmp_path / "groups" / "train" / "part-*.parquet")
    assert all_empty["goods"].to_list() == [[]] * train.height
    assert all_empty.schema == train.schema


def test_counts_are_samples_that_contain_the_id(shop: Path) -> None:
    """Against a loop over samples: any feature of the vocabulary, behaviours of the sample's group, once each."""
    train = ungroup(groups_of(shop, "train"), SHARED, OWN).to_dicts()
    vocabularies = defaultdict(list)
    for name, feature in recipe_of(shop).features.items():
        vocabularies[feature.vocab].append(name)
    assert sorted(p.stem for p in (shop / "groups" / "counts").iterdir()) == sorted(vocabularies)
    for vocab, names in vocabularies.items():
        expected = Counter[int]()
        for sample in train:
            ids = set()
            for name in names:
                value = sample[name]
                ids.update(value if isinstance(value, list) else [value])
            expected.update(ids - {0})
        frame = pl.read_parquet(shop / "groups" / "counts" / f"{vocab}.parquet")
        assert frame.schema == {"index": pl.UInt32, "count": pl.UInt64}
        assert {i: n for i, n in frame.iter_rows() if n} == dict(expected), vocab


def test_an_id_that_a_sample_has_twice_counts_once() -> None:
    groups = pl.DataFrame(
        {
            "group_id": [0, 1],
            "sample_id": [[1, 2], [3]],
            "ad": pl.Series([[5, 6], [5]], dtype=pl.List(pl.UInt32)),
            "tags": pl.Series([[[5, 5], []], [[7]]], dtype=pl.List(pl.List(pl.UInt32))),
            "goods": pl.Series([[5, 5, 8], []], dtype=pl.List(pl.UInt32)),
        }
    )
    counted = count_samples(groups, ["goods"], ["ad", "tags"])
    assert counted.rows() == [(5, 3), (6, 1), (7, 1), (8, 2)]


def test_schema_is_what_readers_expect(shop: Path) -> None:
    schema = Schema.read(shop / "groups")
    assert list(schema.features) == list(recipe_of(shop).features)
    assert schema.features == recipe_of(shop).features
    assert schema.block_groups == 8
    for vocab, size in schema.vocab_sizes.items():
        largest = pl.read_parquet(shop / "convert" / "vocab" / f"{vocab}.parquet")["index"].max()
        assert size == largest + 1 if largest is not None else 2


def test_parts_hold_whole_blocks(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "BLOCKS_A_PART", 2)
    group(recipe_of(shop), shop / "convert", shop / "behaviours", tmp_path / "groups")
    parts = sorted((tmp_path / "groups" / "train").glob("part-*.parquet"))
    rows = [pl.scan_parquet(p).select(pl.len()).collect().item() for p in parts]
    assert rows[:-1] == [16] * (len(rows) - 1)
    assert len(rows) > 3
    assert pl.concat(map(pl.read_parquet, parts)).equals(groups_of(shop, "train"))


def test_a_user_feature_that_varies_within_a_day_is_an_error(shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    text = (shop / "recipe.toml").read_text()
    file.write_text(text.replace('position = { of = "scene" }', 'position = { of = "user" }'))
    with pytest.raises(
        UserError, match=r"\[features.position\] is of = \"user\" but has more than one value within a day"
    ):
        group(load(file), shop / "convert", shop / "behaviours", tmp_path / "groups")


def test_samples_or_behaviours_of_another_recipe(shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    text = (shop / "recipe.toml").read_text()
    file.write_text(text.replace("[select-clicks]", 'extra = { of = "scene", vocab = "hour" }\n[select-clicks]'))
    with pytest.raises(UserError, match="the samples have no feature 'extra'"):
        group(load(file), shop / "convert", shop / "behaviours", tmp_path / "groups")
    file.write_text(text.replace("[select-clicks]", 'extra = { of = "behaviour", vocab = "goods" }\n[select-clicks]'))
    with pytest.raises(UserError, match="the behaviours have no feature 'extra'"):
        group(load(file), shop / "convert", shop / "behaviours", tmp_path / "other")
    with pytest.raises(UserError, match="give the folder"):
        group(recipe_of(shop), shop / "convert", None, tmp_path / "third")


def test_sample_columns_are_those_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SAMPLE_COLUMNS)
