"""Recipes: loading, variants, overrides, and what is wrong with a wrong one."""

import datetime
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from ctrkit.errors import UsageError
from ctrkit.recipe import Recipe, find, load
from tests.tiny_world import CHECKOUT

SHIPPED = sorted(p.parent.name for p in (CHECKOUT / "data").glob("*/recipe.toml"))

TEXT = """
[features]
age = { of = "user" }
ad_shop = { of = "ad", column = "shop", vocab = "shop" }
shop = { of = "behaviour" }
ad_image = { of = "ad", kind = "image", column = "{goods}.jpg" }
image = { of = "behaviour", kind = "image" }

[train]
epochs = 3
tower = [8, 4]

[variants.long.train]
epochs = 9
[variants."a+b".select-clicks]
window_days = "all"
"""


def write(folder: Path, text: str = TEXT, name: str = "mine.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_and_all_their_variants_load(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.about
    for variant in recipe.variants:
        assert load(name, variant).name == name
    for better, worse in recipe.eval.compare:
        assert {better, worse} <= set(recipe.variants)


def test_defaults_that_depend_on_the_feature(tmp_path: Path) -> None:
    features = load(write(tmp_path)).features
    assert (features["age"].column, features["age"].vocab, features["age"].switch) == ("age", "age", "")
    assert features["ad_shop"].vocab == features["shop"].vocab == "shop"
    assert features["shop"].switch == "user_ids"
    assert features["image"].switch == ""
    assert features["ad_image"].vocab == features["image"].vocab == "image"


def test_selection_keeps_the_order(tmp_path: Path) -> None:
    recipe = load(write(tmp_path))
    assert list(recipe.select(of="behaviour")) == ["shop"]
    assert list(recipe.select(of="ad", kind="image")) == ["ad_image"]


def test_names(tmp_path: Path) -> None:
    assert load(write(tmp_path)).name == "mine"
    (tmp_path / "shop").mkdir()
    assert load(write(tmp_path / "shop", name="recipe.toml")).name == "shop"
    assert find(tmp_path / "shop") == tmp_path / "shop" / "recipe.toml"
    assert load(write(tmp_path, 'name = "other"\n' + TEXT)).name == "other"


def test_a_file_called_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path).parent)
    with pytest.raises(UsageError, match=r"no recipe 'mine'; did you mean 'mine\.toml'\?"):
        find("mine")


def test_variants_and_sets_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert load(path).train.epochs == 3
    assert load(path, "long").train.epochs == 9
    assert load(path, "long").train.tower == (8, 4)
    assert load(path, "a+b").select_clicks.window_days is None
    assert load(path, "long", ["train.epochs=5"]).train.epochs == 5
    assert load(path, None, ["train.epochs=5", "train.epochs=6"]).train.epochs == 6
    assert load(path, "long", ["variants.long.train.epochs=7"]).train.epochs == 7
    assert load(path, "a+b", ['variants."a+b".train.epochs=8']).train.epochs == 8
    assert load(path, None, ["variants.long.train.epochs=7"]).train.epochs == 3


def test_what_is_set_for_one_variant_need_not_suit_the_others(tmp_path: Path) -> None:
    warm = '\n[variants.warm.train]\nwarm_start = "full"\nwarm_from = "long"\n'
    path = write(tmp_path, TEXT + warm)
    assert load(path, "warm", ["train.warm_optimiser=true"]).train.warm_optimiser
    with pytest.raises(UsageError, match='warm_optimiser needs warm_start = "full"'):
        load(path, "long", ["train.warm_optimiser=true"])


def test_a_table_that_is_set_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    space = '\n[tune.space]\n"train.pooling" = ["sum", "max"]\n"train.learning_rate" = { low = 1e-3, high = 1e-2 }\n'
    path = write(tmp_path, TEXT + space)
    rate = 'tune.space."train.learning_rate"={low=1e-4, high=0.1, log=true}'
    assert set(load(path, None, [rate]).tune.space) == {"train.pooling", "train.learning_rate"}
    assert set(load(path, None, ['tune.space={"train.tower"=[[8], [4]]}']).tune.space) == {"train.tower"}
    assert set(load(path, "long", ['tune.space={"train.tower"=[[8], [4]]}']).tune.space) == {"train.tower"}
    with pytest.raises(UsageError, match="high"):
        load(path, None, ['tune.space."train.learning_rate"={low=1e-4}'])


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("train.learning_rate=0.1", "train.learning_rate", 0.1),
        ("train.batch_norm=false", "train.batch_norm", False),
        ("train.tower=[3, 2]", "train.tower", (3, 2)),
        ("train.model=din", "train.model", "din"),
        ('train.model="din"', "train.model", "din"),
        ("report.title=A title", "report.title", "A title"),
        ("report.title=a=b", "report.title", "a=b"),
        ("select-clicks.min_dwell=2", "select_clicks.min_dwell", 2.0),
        ("split.test=[2024-03-05]", "split.test", (datetime.date(2024, 3, 5),)),
        ("split.test=0.1", "split.test", 0.1),
        ("convert.clicks.files=c.csv", "convert.clicks.files", "c.csv"),
        ("engine=ray", "engine", "ray"),
        ("workers=3", "workers", 3),
        ("select-clicks.type_weights={ cart = 3 }", "select_clicks.type_weights", {"cart": 3.0}),
        ("convert.drop_repeats=false", "convert.drop_repeats", False),
    ],
)
def test_values_of_sets(tmp_path: Path, text: str, path: str, value: object) -> None:
    found: object = load(write(tmp_path), None, [text])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[trian]\n", "the recipe has no key 'trian'; did you mean 'train' or 'variants'?"),
        ("[train]\nepoch = 2\n", "table [train] has no key 'epoch'; did you mean 'epochs'?"),
        ("[select_click]\n", "did you mean 'select-clicks'"),
        ("[features]\na = { of = 'user', colum = 'x' }\n", "has no key 'colum'; did you mean 'column'?"),
        ("[features]\na = { of = 'users' }\n", "features.a.of: input should be 'user', 'ad', 'scene' or 'behaviour'"),
        ("[features]\na = { }\n", "features.a.of: field required"),
        ("[convert.clicks]\nfile = 'x'\n", "has no key 'file'; did you mean 'files'"),
        ("[convert]\ntime_zone = 'Europe/Berln'\n", "no time zone 'Europe/Berln'; did you mean 'Europe/Berlin'"),
        ("[train]\nmodel = 'dcim'\n", "train.model: input should be 'dicm', 'din', 'base' or 'lr' (given: 'dcim')"),
        ("[variants.x.train]\nepoch = 2\n", "variant 'x': table [train] has no key 'epoch'; did you mean 'epochs'?"),
        (
            "[variants.x.trian]\nepochs = 2\n",
            "variant 'x': the recipe has no key 'trian'; did you mean 'train' or 'variants'?",
        ),
        ("[variants.'a/b'.train]\n", "variants.a/b"),
        ("name = '../up'\n", "name: "),
        ("[split]\nvalid = [2024-03-05]\ntest = [2024-03-05]\n", "the validation days must come before the test days"),
        (
            "[features]\na = { of = 'user', vocab = 'v' }\nb = { of = 'ad', vocab = 'v', width = 3 }\n",
            "features 'a' and 'b' share the vocabulary 'v' but differ in width: 12 and 3",
        ),
        ("[features]\na = { of = 'behaviour', multi_hot = true }\n", "multi_hot is for ids of user, ad or scene"),
        ("[train\n", "is not a TOML file"),
        ("engine = 'spark'\n", "engine: input should be 'local' or 'ray' (given: 'spark')"),
        ("[features]\na = { of = 'user', kind = 'number' }\n", "either edges or quantiles go together"),
        ("[features]\na = { of = 'user', edges = [1] }\n", "either edges or quantiles go together"),
        (
            "[features]\na = { of = 'ad', kind = 'number', edges = [1], quantiles = 2 }\n",
            "either edges or quantiles go together",
        ),
        ("[features]\na = { of = 'ad', kind = 'number', edges = [2, 1] }\n", "edges must rise: [2.0, 1.0]"),
        ("[features]\na = { of = 'ad', hash_buckets = 9, top = 5 }\n", "hash_buckets for ids without"),
        (
            "[features]\na = { of = 'user', vocab = 'v' }\nb = { of = 'ad', vocab = 'v', top = 3 }\n",
            "features 'a' and 'b' share the vocabulary 'v' but differ in top: 0 and 3",
        ),
        (
            "[convert.impressions]\nfiles = 'a.csv'\ncolumns = { user = 1 }\n",
            "column 1 is given by position, which needs header = false",
        ),
        ("[convert.impressions]\nfiles = 'a'\nencoding = 'utf-16'\n", "encoding 'utf-16' is unknown or not"),
        ("[convert.impressions]\nfiles = 'a'\nencoding = 'kli'\n", "encoding 'kli' is unknown or not"),
        ("[select-clicks]\nhalf_life_days = inf\n", "select-clicks.half_life_days: input should be a finite number"),
        ("[select-clicks]\nmin_dwell = inf\n", "select-clicks.min_dwell: input should be a finite number (given: inf)"),
        ("[select-clicks]\nwindow_days = inf\n", "select-clicks.window_days: input should be a finite number"),
        ("[select-clicks]\nwindow_days = 1000000000000000000000\n", "select-clicks.window_days: input should be less"),
        ("[select-clicks.type_weights]\nbuy = nan\n", "select-clicks.type_weights.buy: input should be a finite"),
        ("[convert]\nattribution_window = inf\n", "convert.attribution_window: input should be a finite number"),
        ("[convert]\nattribution_window = 1e300\n", "convert.attribution_window: input should be less than"),
        ("[features]\na = { of = 'ad', kind = 'number', edges = [1, inf] }\n", "features.a.edges.1: input should be a"),
        ("[train]\nlearning_rate = inf\n", "train.learning_rate: input should be a finite number (given: inf)"),
        ("workers = 100000\n", "workers: input should be less than or equal to 512 (given: 100000)"),
        (
            "[split]\ntest = '2024-03-20'\n",
            "split.test: has to be a number of days, a share between 0 and 1, or a list of dates, such as [2024-03-20] "
            "(given: '2024-03-20').",
        ),
        ("[split]\ntest = 2024-03-20\n", "such as [2024-03-20] (given: 2024-03-20)."),
        ("[split]\nvalid = nan\n", "split.valid: has to be a number of days"),
        ("[convert.ads]\nfiles = 3\n", "convert.ads.files: has to be a name or a list of names (given: 3)."),
        (
            "[convert.ads]\nfiles = 'a'\ncolumns = { ad = 0 }\n",
            "convert.ads.columns.ad: has to be a column's name, or its position from 1 (given: 0).",
        ),
        ("[convert]\nnegative_rate = 0\n", "convert.negative_rate: input should be greater than 0 (given: 0)"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, error: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as told:
        load(path)
    assert error in told.value.message
    assert str(path) in told.value.message
    assert "\n" not in told.value.message


def test_what_is_set_is_told_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    for variant, where in ((None, str(path)), ("long", f"{path}, variant 'long'")):
        with pytest.raises(UsageError) as told:
            load(path, variant, ["train.seed=2", "train.epoch=7"])
        expected = f"{where} --set train.seed=2 --set train.epoch=7: table [train] has no key 'epoch'; did you mean"
        assert told.value.message.startswith(expected)


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as told:
        load(write(tmp_path, "[train]\nepoch = 2\nbach = 3\n"))
    first, second = "did you mean 'epochs'?", "did you mean 'batch' or 'batch_norm'?"
    assert told.value.message.endswith(f"'epoch'; {first} table [train] has no key 'bach'; {second}")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not a TOML file"):
        load(tmp_path / "x.toml")


def test_a_recipe_is_frozen_and_comes_back_from_its_tables(tmp_path: Path) -> None:
    recipe = load(write(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 5
    names = [f.alias or n for n, f in Recipe.model_fields.items()]
    assert Recipe.model_validate(recipe.tables(*names)) == recipe


def test_shipped_recipes_have_no_table_that_nothing_reads() -> None:
    known = {f.alias or n for n, f in Recipe.model_fields.items()}
    for name in SHIPPED:
        assert set(tomllib.loads(find(name).read_text())) <= known


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[features]\nscore = { of = "user" }', "a feature cannot be called 'score'"),
        ('[features]\nloss = { of = "ad" }', "a feature cannot be called 'loss'"),
        ('[features]\nuser_code = { of = "ad" }', "a feature cannot be called 'user_code'"),
        ('[features]\ngoods_code = { of = "ad" }', "a feature cannot be called 'goods_code'"),
        ("[daily]\ntrain = { first_day = 2 }", "daily: train has first_day, which day after day decides"),
        ('[daily]\ntrain = { warm_start = "extractors" }', "daily: train has warm_start"),
        ("[split]\ntest = true", "split.test: has to be a number or text (given: true)"),
        ('[train]\ntower = ["8"]', 'train.tower: has to be a number (given: "8")'),
        ('[train]\nfirst_day = "3"', "train.first_day: has to be a date, or the number of a training day"),
        ("[convert.impressions]\nfiles = 'a'\nheader = 'yes'", 'has to be true or false (given: "yes")'),
    ],
)
def test_keys_of_another_kind_and_names_that_are_taken(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    assert said in caught.value.message
