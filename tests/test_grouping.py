from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import Result

from ctrkit import grouping, numba_loops
from ctrkit.batches import Block, Column, GroupedData, Ragged, Schema
from ctrkit.grouping import SAMPLE_COLUMNS, count_samples, ungroup
from ctrkit.partitions import read_by_day, read_split
from ctrkit.recipe import Feature, Recipe, load
from tests.shop import ctrkit, random_rows, run_all, write

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


def group(shop: Path, out: Path, *sets: str, recipe: Path | None = None, behaviours: Path | None = None) -> Result:
    """Group the shop's samples into another folder."""
    words = ["--convert", shop / "convert", "--behaviours", behaviours or shop / "behaviours", "--out", out]
    sets_ = [word for text in sets for word in ("--set", text)]
    return ctrkit("group", "--recipe", recipe or shop / "recipe.toml", *words, *sets_)


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
        assert group(shop, out, f"group.seed={seed}").exit_code == 0
        orders.append(pl.read_parquet(out / "train" / "part-*.parquet"))
        counts = [pl.read_parquet(p) for p in sorted((out / "counts").glob("*.parquet"))]
        orders.append(pl.concat(counts))
    assert orders[0].equals(orders[2])
    assert not orders[0].equals(orders[4])
    same = [orders[i].drop("common").sort("group_id") for i in (0, 4)]
    assert same[0].equals(same[1])
    assert orders[1].equals(orders[5])


def test_some_groups_have_no_history_and_empty_lists(shop: Path, tmp_path: Path) -> None:
    train = groups_of(shop, "train")
    empty = train.filter(pl.col("goods").list.len() == 0)
    assert 0 < empty.height < train.height
    (tmp_path / "none").mkdir()
    assert group(shop, tmp_path / "groups", behaviours=tmp_path / "none").exit_code == 0
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
            "ad": pl.Series([[5, 6], [5]], dtype=pl.List(pl.UInt32)),
            "tags": pl.Series([[[5, 5], []], [[7]]], dtype=pl.List(pl.List(pl.UInt32))),
            "goods": pl.Series([[5, 5, 8, 0], []], dtype=pl.List(pl.UInt32)),
            "gender": pl.Series([8, 2], dtype=pl.UInt32),
        }
    )
    of = {"ad": "ad", "tags": "ad", "goods": "behaviour", "gender": "user"}
    features = {name: Feature.model_validate({"of": owner}) for name, owner in of.items()}
    counted = count_samples(groups, np.array([2, 1]), features, 10)
    assert counted.dtype == np.uint64
    assert dict(enumerate(counted.tolist())) == {**dict.fromkeys(range(10), 0), 5: 3, 6: 1, 7: 1, 8: 2, 2: 1}


@pytest.mark.parametrize("of", ["ad", "behaviour"])
def test_as_many_values_as_rows_are_not_one_a_row(of: str) -> None:
    """Two values of the first row, none of the second."""
    lists = [[[5, 5]], [[]]] if of == "ad" else [[5, 5], []]
    inner = pl.List(pl.UInt32)
    groups = pl.DataFrame({"x": pl.Series(lists, dtype=pl.List(inner) if of == "ad" else inner)})
    features = {"x": Feature.model_validate({"of": of, "multi_hot": of == "ad"})}
    assert count_samples(groups, np.array([1, 1]), features, 7).tolist() == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(("cells", "compiled"), [(1, False), (40, False), (1 << 18, False), (1 << 18, True)])
def test_counts_of_random_groups_are_those_of_a_loop(
    cells: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few ids are sorted at once: some rows are far wider than others, many have none."""
    monkeypatch.setattr(grouping, "CELLS", cells)
    if compiled:
        pytest.importorskip("numba", exc_type=ImportError)
    else:
        monkeypatch.setattr(numba_loops, "load", lambda module: None)
    draw, size, ids = np.random.default_rng(cells), 60, pl.List(pl.UInt32)
    of = {"gender": "user", "goods": "behaviour", "tags": "user", "ad": "ad", "ad_tags": "ad", "position": "scene"}
    lists = {"goods", "tags", "ad_tags"}

    def value(name: str) -> int | list[int]:
        longest = 50 if draw.random() < 0.02 else 3
        return draw.integers(0, size, draw.integers(0, longest + 1)).tolist() if name in lists else draw.integers(size)

    samples = draw.integers(1, 5, 300)
    rows = {n: [value(n) for _ in samples] for n, o in of.items() if o in ("user", "behaviour")}
    own = {n: [[value(n) for _ in range(k)] for k in samples] for n, o in of.items() if o in ("ad", "scene")}
    groups = pl.DataFrame(
        {n: pl.Series(v, dtype=ids if n in lists else pl.UInt32) for n, v in rows.items()}
        | {n: pl.Series(v, dtype=pl.List(ids) if n in lists else ids) for n, v in own.items()}
    )
    for names in (["goods"], ["goods", "ad"], ["tags", "gender", "ad_tags", "position"], ["ad_tags"], list(of)):
        expected = np.zeros(size, np.uint64)
        for g, k in enumerate(samples):
            for s in range(k):
                there = [rows[n][g] if n in rows else own[n][g][s] for n in names]
                expected[list({int(i) for one in there for i in np.atleast_1d(one)} - {0})] += np.uint64(1)
        features = {n: Feature.model_validate({"of": of[n], "multi_hot": n in ("tags", "ad_tags")}) for n in names}
        assert count_samples(groups, samples, features, size).tolist() == expected.tolist()


def test_schema_is_what_readers_expect(shop: Path) -> None:
    schema = Schema.read(shop / "groups")
    assert list(schema.features) == list(recipe_of(shop).features)
    assert schema.features == recipe_of(shop).features
    assert schema.block_groups == 8
    for vocab, size in schema.vocab_sizes.items():
        largest = pl.read_parquet(shop / "convert" / "vocab" / f"{vocab}.parquet")["index"].max()
        assert size == largest + 1 if largest is not None else 2


def test_parts_hold_whole_blocks(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "BLOCKS_A_FILE", 2)
    assert group(shop, tmp_path / "groups").exit_code == 0
    parts = sorted((tmp_path / "groups" / "train").glob("part-*.parquet"))
    rows = [pl.scan_parquet(p).select(pl.len()).collect().item() for p in parts]
    assert rows[:-1] == [16] * (len(rows) - 1)
    assert len(rows) > 3
    assert pl.concat(map(pl.read_parquet, parts)).equals(groups_of(shop, "train"))


def test_a_user_feature_that_varies_within_a_day_is_an_error(shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    text = (shop / "recipe.toml").read_text()
    file.write_text(text.replace('position = { of = "scene" }', 'position = { of = "user" }'))
    result = group(shop, tmp_path / "groups", recipe=file)
    assert result.exit_code == 1
    assert '[features.position] is of = "user" but has more than one value within a day' in result.output
    assert not (tmp_path / "groups").exists()


def test_samples_or_behaviours_of_another_recipe(shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    text = (shop / "recipe.toml").read_text()
    file.write_text(text.replace("[select-clicks]", 'extra = { of = "scene", vocab = "hour" }\n[select-clicks]'))
    result = group(shop, tmp_path / "groups", recipe=file)
    assert (result.exit_code, "convert has no feature 'extra'" in result.output) == (1, True)
    file.write_text(text.replace("[select-clicks]", 'extra = { of = "behaviour", vocab = "goods" }\n[select-clicks]'))
    result = group(shop, tmp_path / "groups", recipe=file)
    assert (result.exit_code, "behaviours has no feature 'extra'" in result.output) == (1, True)
    words = ["--recipe", shop / "recipe.toml", "--convert", shop / "convert", "--out", tmp_path / "groups"]
    result = ctrkit("group", *words)
    assert (result.exit_code, "give the folder that ctrkit select-clicks wrote" in result.output) == (1, True)


FEATURES = [*SHARED, *OWN]


def whole(groups: Path, split: str) -> Block:
    return Block.concat(list(GroupedData(groups, split, FEATURES).blocks()))


def samples_with_all(groups: Path, split: str) -> list[dict[str, object]]:
    """Return every sample with its own features, its group's and its history, as readers of the files see them."""
    block = whole(groups, split)
    owner = np.repeat(np.arange(block.n_groups), np.diff(block.sample_offsets))

    def values(column: Column, row: int) -> object:
        return column.slice(row, row + 1).values.tolist() if isinstance(column, Ragged) else int(column[row])

    found = []
    for i, g in enumerate(owner):
        history = slice(block.behaviour_offsets[g], block.behaviour_offsets[g + 1])
        sample = {name: values(column, i) for name, column in block.sample.items()}
        sample |= {name: values(column, g) for name, column in block.group.items()}
        found.append(sample | {name: np.asarray(c)[history].tolist() for name, c in block.behaviour.items()})
    return sorted(found, key=lambda sample: int(sample["sample_id"]))


@pytest.mark.parametrize(("most", "block"), [(1, 8), (2, 3), (2, 1000), (3, 1)])
def test_large_groups_are_split_into_rows_that_share(shop: Path, tmp_path: Path, most: int, block: int) -> None:
    out = tmp_path / "groups"
    sets = [f"group.max_samples={most}", f"group.block_groups={block}"]
    assert group(shop, out, *sets).exit_code == 0
    for split in ("train", "valid", "test"):
        frame = pl.read_parquet(out / split / "part-*.parquet")
        before = groups_of(shop, split)
        assert frame["sample_id"].list.len().max() == most
        assert frame.schema == before.schema
        assert frame["group_id"].n_unique() == before.height
        rows = []
        for path in sorted((out / split).glob("part-*.parquet")):
            part = pl.read_parquet(path)
            rows += [part.slice(start, block) for start in range(0, part.height, block)]
        carried = 0
        for some in rows:
            ids = some["group_id"].to_list()
            assert some["common"].to_list() == [ids.index(i) for i in ids]
            others = some.filter(pl.col("common") != pl.int_range(pl.len(), dtype=pl.Int32))
            carried += others.height
            assert others["gender"].to_list() == [0] * others.height
            assert others["goods"].to_list() == others["image"].to_list() == [[]] * others.height
        assert (carried > 0) == (block > 1)
        # Rows of a group follow one another, its samples in order.
        ids = frame["group_id"].rle_id()
        assert ids.n_unique() == frame["group_id"].n_unique()
        together = frame.group_by("group_id").agg(pl.col("sample_id").explode()).sort("group_id")
        assert together.equals(before.select("group_id", "sample_id").sort("group_id"))
        assert samples_with_all(out, split) == samples_with_all(shop / "groups", split)
    for path in (shop / "groups" / "counts").iterdir():
        assert (out / "counts" / path.name).read_bytes() == path.read_bytes()


def test_a_group_is_split_only_above_the_limit(shop: Path, tmp_path: Path) -> None:
    most = groups_of(shop, "train")["sample_id"].list.len().max()
    assert most > 3
    assert group(shop, tmp_path / "groups", f"group.max_samples={most}").exit_code == 0
    for path in (shop / "groups" / "train").iterdir():
        assert (tmp_path / "groups" / "train" / path.name).read_bytes() == path.read_bytes()


def test_sample_columns_are_those_documented() -> None:
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SAMPLE_COLUMNS)
