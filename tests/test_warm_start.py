"""Starting from a trained model, through the command line: what is taken over, what is fresh, what is refused."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch

from ctrkit import training_days
from ctrkit.batches import GroupedData, Schema
from ctrkit.digests import Digests
from ctrkit.modelfile import read_counts
from ctrkit.recipe import Train
from tests.tiny_run import TinyRun

EARLY = ["--set", "train.last_day=1", "--set", "train.validation=false"]
LATE = ["--set", "train.first_day=2"]
FROZEN = ["--set", "train.learning_rate=1e-30", "--set", "train.regularisation=none"]
"""So that what is saved is, but for the running averages, what training began with."""
RUNNING = ("running_mean", "running_var", "num_batches_tracked", "n", "mean", "var")


def words(warm_start: str) -> list[str]:
    return [*LATE, *FROZEN, "--set", f"train.warm_start={warm_start}"]


def tensors(model: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(model / "model.pt", weights_only=True)
    return state


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def parameters(state: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the network's tensors that training moves by gradients."""
    return [n for n in state if n.startswith("network.") and n.rpartition(".")[2] not in RUNNING]


@pytest.fixture(scope="module")
def early(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the first training day."""
    return tiny_run.train(tmp_path_factory.mktemp("early") / "model", *EARLY)


@pytest.fixture(scope="module")
def fresh(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A model of the second day as it begins without a warm start."""
    return tensors(tiny_run.train(tmp_path_factory.mktemp("fresh") / "model", *LATE, *FROZEN))


def test_partial_warm_up_takes_the_extractors_and_the_pictures_mean_alone(
    tiny_run: TinyRun, early: Path, fresh: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = tensors(early)
    after = tensors(tiny_run.train(tmp_path / "m", *words("extractors"), "--warm-start", early))
    taken = [n for n in parameters(after) if n.startswith(("network.adnet.", "network.usernet."))]
    assert len(taken) == 2 * 5  # three layers, a PReLU between
    for name in taken:
        assert same(after[name], before[name]), name
        assert not same(after[name], fresh[name]), name
    assert after["pictures.mean"].equal(before["pictures.mean"])
    assert after["pictures.scale"].equal(before["pictures.scale"])
    others = set(parameters(after)) - set(taken)
    assert any(n.startswith("network.attention.") for n in others)
    for name in others | {"table.12"}:
        assert same(after[name], fresh[name]), name
    assert json.loads((tmp_path / "m.json").read_text())["counts"]["warm start"]["tensors"] == 10


def test_full_warm_start_takes_everything(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    before = tensors(early)
    after = tensors(tiny_run.train(tmp_path / "m", *words("full"), "--warm-start", early))
    assert before.keys() == after.keys()
    for name in [*parameters(after), "table.12", "pictures.mean", "pictures.scale"]:
        assert same(after[name], before[name]), name


def test_a_warm_start_is_a_change_of_the_model(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    """The same sources, settings and seed give the same bytes; another source gives others."""
    two = [*LATE, "--set", "train.warm_start=full", "--warm-start"]
    a, b = (tiny_run.train(tmp_path / name, *two, early) / "model.pt" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    other = tiny_run.train(tmp_path / "other", *EARLY, "--set", "train.seed=9")
    c = tiny_run.train(tmp_path / "c", *two, other) / "model.pt"
    assert a.read_bytes() != c.read_bytes()
    inputs = [json.loads((tmp_path / f"{name}.json").read_text())["inputs"]["warm start"] for name in "abc"]
    assert inputs[0] == inputs[1] != inputs[2]


# --- another vocabulary ----------------------------------------------------------------------------------------------


def reversed_vocabulary(tiny_run: TinyRun, folder: Path) -> TinyRun:
    """A copy of the run whose vocabularies `ad_id` and `goods` count backwards, with a value that the old one lacks."""
    other = TinyRun(folder)
    shutil.copytree(tiny_run.folder, folder, dirs_exist_ok=True)
    for vocab in ("ad_id", "goods"):
        path = other.convert / "vocab" / f"{vocab}.parquet"
        table = pl.read_parquet(path)
        turned = table.with_columns(value=pl.col("value").reverse())
        # The last value is one that the old model has never heard of.
        turned = turned.with_columns(
            value=pl.when(pl.col("index") == pl.col("index").max()).then(pl.lit("anew")).otherwise(pl.col("value"))
        )
        turned.write_parquet(path)
    schema = json.loads((other.groups / "schema.json").read_text())
    schema["vocab_digest"] = Digests().of(other.convert / "vocab")
    (other.groups / "schema.json").write_text(json.dumps(schema))
    (folder / "groups.json").unlink()
    (folder / "convert.json").unlink()
    return other


def offset(tiny_run: TinyRun, model: Path, vocab: str) -> int:
    """Return where a vocabulary begins in the table of width 12: in the order in which the features name them."""
    schema = json.loads((model / "settings.json").read_text())["schema"]
    order = ["gender", "age", "ad_id", "category", "shop", "position", "goods"]
    sizes = [schema["vocab_sizes"][v] for v in order[: order.index(vocab)]]
    return sum(sizes)


def test_ids_are_found_by_their_values(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Rows go where their values went, by a loop over values; new values, and index 0, are as without a warm start."""
    ids = ["--set", "train.user_ids=true"]
    old = tiny_run.train(tmp_path / "old", *EARLY, *ids)
    other = reversed_vocabulary(tiny_run, tmp_path / "other")
    begun = tensors(other.train(tmp_path / "fresh", *LATE, *FROZEN, *ids))["table.12"]
    warm = [*words("full"), *ids, "--warm-start", old, "--warm-convert", tiny_run.convert]
    new = other.train(tmp_path / "new", *warm)
    a, b = tensors(old)["table.12"], tensors(new)["table.12"]
    vocabs = {
        v: [
            dict(pl.read_parquet(run.convert / "vocab" / f"{v}.parquet").select("value", "index").iter_rows())
            for run in (tiny_run, other)
        ]
        for v in ("gender", "age", "ad_id", "category", "shop", "position", "goods")
    }
    moved = 0
    counts = json.loads((tmp_path / "new.json").read_text())["counts"]["warm start"]["ids"]
    for vocab, (before, after) in vocabs.items():
        begin = offset(tiny_run, old, vocab)
        assert same(b[begin + 1], a[begin + 1])
        for value, index in after.items():
            if value in before:
                assert same(b[begin + index], a[begin + before[value]]), (vocab, value)
                moved += index != before[value]
            else:
                assert value == "anew"
                assert same(b[begin + index], begun[begin + index])
        shared = len(before.keys() & after.keys())
        assert counts[vocab] == {"taken over": shared, "fresh": len(after) - shared}
    assert moved > 40
    assert (b[0] == 0).all()


def test_another_vocabulary_has_to_be_given(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    other = reversed_vocabulary(tiny_run, tmp_path / "other")
    call = [*other.reads(), "--out", tmp_path / "m", *words("full"), "--warm-start", early]
    result = other.call("train", *call)
    assert result.exit_code == 1
    assert "give --warm-convert, the folder of `ctrkit convert` with which" in result.output
    result = other.call("train", *call, "--warm-convert", other.convert)
    assert result.exit_code == 1
    assert "(--warm-convert) is not the vocabulary with which" in result.output
    result = other.call("train", *call, "--warm-convert", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert f"{tmp_path / 'nowhere'} (--warm-convert) is not there" in result.output
    # Extractors have no ids.
    other.train(tmp_path / "part", *words("extractors"), "--warm-start", early)


def test_the_optimiser_goes_on_with_the_rows_that_were_taken_over(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Steps go on counting; moments of rows that are not trained again lie where their values went."""
    more = ["--set", "train.user_ids=true", "--set", "train.save_optimiser=true"]
    old = tiny_run.train(tmp_path / "old", *EARLY, *more)
    other = reversed_vocabulary(tiny_run, tmp_path / "other")
    warm = [*words("full"), *more, "--warm-start", old, "--warm-convert", tiny_run.convert]
    without = other.train(tmp_path / "without", *warm)
    new = other.train(tmp_path / "new", *warm, "--set", "train.warm_optimiser=true")
    a, b, c = (torch.load(m / "optimiser.pt", weights_only=True) for m in (old, new, without))
    assert a.keys() == b.keys()
    steps = [name for name in a if name.endswith(".step")]
    assert {"table.12.step", "adam.discriminator.layers.0.weight.step"} & set(steps)
    for name in steps:
        assert float(b[name]) == float(a[name]) + float(c[name]) > float(c[name]) > 0, name
    span = training_days.choose(Train(first_day=2), days_of_training(other))
    trained = training_days.read_counts(other.groups, Schema.read(other.groups), span)
    compared = 0
    for vocab in ("ad_id", "goods"):
        begin = offset(tiny_run, old, vocab)
        before, after = (
            dict(pl.read_parquet(run.convert / "vocab" / f"{vocab}.parquet").select("value", "index").iter_rows())
            for run in (tiny_run, other)
        )
        for value, index in after.items():
            if trained[vocab][index] == 0 and value in before:
                for key in ("table.12.m", "table.12.v"):
                    assert b[key][begin + index].equal(a[key][begin + before[value]])
                    compared += bool(a[key][begin + before[value]].any())
    assert compared > 0


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(run: TinyRun, out: Path, *more: object, code: int = 1) -> str:
    result = run.call("train", *run.reads(), "--out", out, *more)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not out.exists()
    return str(result.output)


def test_models_of_days_that_are_not_earlier(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    said = refused(tiny_run, out, "--set", "train.warm_start=full", "--warm-start", early)
    assert "was trained on days up to 2024-03-01, and this training begins with 2024-03-01" in said
    validated = tiny_run.train(tmp_path / "validated", "--set", "train.last_day=1")
    said = refused(tiny_run, out, *words("full"), "--warm-start", validated)
    assert "was validated on days up to 2024-03-03" in said
    assert "train.validation = false" in said
    settings = json.loads((early / "settings.json").read_text())
    samples = settings["days"]["train"].pop("samples")
    assert settings["days"] == {"train": {"first": "2024-03-01", "last": "2024-03-01"}}
    assert samples == json.loads(early.with_name("model.json").read_text())["counts"]["samples"] > 50
    shutil.copytree(early, tmp_path / "old")
    (tmp_path / "old" / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "days"}))
    said = refused(tiny_run, out, *words("full"), "--warm-start", tmp_path / "old")
    assert "does not say on which days it was trained" in said


@pytest.mark.parametrize(
    ("how", "sets", "said"),
    [
        ("full", ["train.extractor=[8, 6]"], "(train.extractor = [16, 6] there and [8, 6] here)"),
        (
            "extractors",
            ["train.extractor=[8, 6]"],
            "has train.extractor = [16, 6], and this model [8, 6]: its extractors cannot be taken over",
        ),
        ("full", ["train.user_ids=true"], "(train.user_ids = false there and true here)"),
        ("full", ["train.pooling=sum", "train.tower=[5]"], "train.pooling = 'attentive' there and 'sum' here"),
        ("extractors", ["train.share_extractors=true"], "has train.share_extractors = false, and this model true"),
        ("extractors", ["train.model=din"], "this model has none"),
        ("full", ["train.model=din"], "(train.model = 'dicm' there and 'din' here"),
    ],
)
def test_models_that_do_not_fit(
    tiny_run: TinyRun, early: Path, tmp_path: Path, how: str, sets: list[str], said: str
) -> None:
    more = [word for text in sets for word in ("--set", text)]
    assert said in refused(tiny_run, tmp_path / "m", *words(how), *more, "--warm-start", early)


@pytest.mark.parametrize(
    ("there", "how", "here", "said"),
    [
        ("train.batch_norm=true", "full", "train.batch_norm=false", "train.batch_norm = true there and false here"),
        ("train.pooling=sum", "full", "train.pooling=max", "train.pooling = 'sum' there and 'max' here"),
        (
            "train.share_extractors=true",
            "full",
            "train.share_extractors=false",
            "train.share_extractors = true there and false here",
        ),
        (
            "train.shuffle_pictures=true",
            "full",
            "train.shuffle_pictures=false",
            "train.shuffle_pictures = true there and false here",
        ),
        (
            "train.shuffle_pictures=true",
            "extractors",
            "train.shuffle_pictures=false",
            "has train.shuffle_pictures = true, and this model false",
        ),
        ("train.extractor=[16,6,6]", "extractors", "train.extractor=[16,6]", "has train.extractor = [16, 6, 6]"),
        (
            "train.extractor_activation=dice",
            "extractors",
            "train.tower=[12]",
            "has train.extractor_activation = 'dice'",
        ),
        ("train.extractor_activation=dice", "full", "train.tower=[12]", "train.extractor_activation = 'dice' there"),
        ("train.tower=[12,2]", "full", "train.tower=[12]", "train.tower = [12, 2] there and [12] here"),
    ],
)
def test_models_that_mean_something_else(
    tiny_run: TinyRun, tmp_path: Path, there: str, how: str, here: str, said: str
) -> None:
    """Of tensors that fit, or more than fit: refused, and the setting named."""
    source = tiny_run.train(tmp_path / "source", *EARLY, "--set", there)
    assert said in refused(tiny_run, tmp_path / "m", *words(how), "--set", here, "--warm-start", source)
    tiny_run.train(tmp_path / "same", *words(how), "--set", there, "--warm-start", source)


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (["model=din"], ["model=base"], "train.model = 'din' there and 'base' here"),
        (
            ["model=din"],
            ["model=din", "din_activation=prelu"],
            "train.din_activation = 'sigmoid' there and 'prelu' here",
        ),
        (["model=din", "tiers=3", "pooling=sum"], ["model=din"], ""),  # parts that DIN has not
    ],
)
def test_models_without_pictures_that_mean_something_else(
    tiny_run: TinyRun, tmp_path: Path, there: list[str], here: list[str], said: str
) -> None:
    sets = [[w for key in keys for w in ("--set", f"train.{key}")] for keys in (there, here)]
    source = tiny_run.train(tmp_path / "source", *EARLY, *sets[0])
    if said:
        assert said in refused(tiny_run, tmp_path / "m", *words("full"), *sets[1], "--warm-start", source)
    else:
        tiny_run.train(tmp_path / "m", *words("full"), *sets[1], "--warm-start", source)


def spoil_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def spoil_settings(path: Path, change: Callable[[Any], Any]) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(change(settings) or settings))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "model.pt",
            lambda s: s["network.adnet.0.weight"].fill_(float("nan")),
            "'network.adnet.0.weight' that are not",
        ),
        ("model.pt", lambda s: s["table.12"][3].fill_(float("inf")), "numbers in 'table.12' that are not finite"),
        ("model.pt", lambda s: s.pop("table.12"), "'table.12' is missing there"),
        (
            "model.pt",
            lambda s: s.update({"network.more.weight": torch.ones(2)}),
            "'network.more.weight' is of shape [2]",
        ),
        ("optimiser.pt", lambda s: s.pop("table.12.m"), "'table.12.m' is missing"),
        ("optimiser.pt", lambda s: s.update({"table.12.v": torch.ones(3, 12)}), "'table.12.v' is of shape [3, 12]"),
        ("optimiser.pt", lambda s: s.clear(), "is missing"),
        ("optimiser.pt", lambda s: s["table.12.m"].fill_(float("nan")), "'table.12.m' that are not finite"),
        ("settings.json", lambda s: s["days"]["train"].update(last="never"), "does not say in dates"),
        ("settings.json", lambda s: [s], "is not the settings of a model of this version"),
        ("settings.json", lambda s: s.pop("picture_width") and None, "is not the settings of a model of this version"),
    ],
)
def test_sources_that_are_spoiled(
    tiny_run: TinyRun, optimised: Path, tmp_path: Path, file: str, change: Callable[[Any], Any], said: str
) -> None:
    source = Path(shutil.copytree(optimised, tmp_path / "source"))
    (spoil_settings if file == "settings.json" else spoil_tensors)(source / file, change)
    more = ["--set", "train.warm_optimiser=true", "--warm-start", source]
    assert said in refused(tiny_run, tmp_path / "m", *words("full"), *more)


@pytest.fixture(scope="module")
def optimised(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the first training day, with its optimiser."""
    return tiny_run.train(tmp_path_factory.mktemp("opt") / "model", *EARLY, "--set", "train.save_optimiser=true")


def test_extractors_that_the_source_lacks(tiny_run: TinyRun, tmp_path: Path) -> None:
    source = tiny_run.train(tmp_path / "source", *EARLY, "--set", "train.user_images=false")
    said = refused(tiny_run, tmp_path / "m", *words("extractors"), "--warm-start", source)
    assert "has no extractor of Usernet (train.user_images was off)" in said
    only_ad = ["--set", "train.user_images=false"]
    tiny_run.train(tmp_path / "ad", *words("extractors"), *only_ad, "--warm-start", source)


def test_other_picture_vectors(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    other = tmp_path / "features.h5"
    raw = tiny_run.folder / "raw" / "pictures"
    images = ["--pictures", raw, "--convert", tiny_run.convert, "--out", other]
    tiny_run.must("extract-images", "--set", "extract-images.seed=5", *images)
    reads = ["--groups", tiny_run.groups, "--features", other, "--convert", tiny_run.convert]
    for how in ("full", "extractors"):
        result = tiny_run.call("train", *reads, "--out", tmp_path / "m", *words(how), "--warm-start", early)
        assert result.exit_code == 1
        assert "was trained on picture vectors with weights = random, seed 0" in result.output


def test_options_that_need_each_other(tiny_run: TinyRun, early: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    said = refused(tiny_run, out, "--warm-start", early, code=2)
    assert "--warm-start needs to know what to take over" in said
    assert "needs --warm-start" in refused(tiny_run, out, "--set", "train.warm_start=full", code=2)
    both = ["--warm-start", early, "--warm-convert", tiny_run.convert]
    assert "--warm-convert is for" in refused(tiny_run, out, *words("extractors"), *both, code=2)
    said = refused(tiny_run, out, "--set", "train.warm_optimiser=true", code=2)
    assert 'warm_optimiser needs warm_start = "full"' in said
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no settings.json" in refused(tiny_run, out, *words("full"), "--warm-start", empty)
    more = [*words("full"), "--set", "train.warm_optimiser=true", "--warm-start", early]
    assert "has no optimiser.pt" in refused(tiny_run, out, *more)


def days_of_training(run: TinyRun) -> list[datetime.date]:
    return training_days.days_of(run.groups, "train")


# --- the days that are trained on ------------------------------------------------------------------------------------


def test_days_are_chosen_by_number_and_by_date(tiny_run: TinyRun) -> None:
    days = training_days.days_of(tiny_run.groups, "train")
    assert len(days) == 2

    def chosen(**keys: Any) -> tuple[object, object]:
        return training_days.choose(Train(**keys), days)

    assert chosen() == (days[0], days[1])
    assert chosen(last_day=1) == chosen(last_day=-2) == chosen(last_day=days[0]) == (days[0], days[0])
    assert chosen(first_day=-1) == chosen(first_day=2) == chosen(first_day="2024-03-02") == (days[1], days[1])


def test_days_that_are_not_there(tiny_run: TinyRun, tmp_path: Path) -> None:
    for sets in (["first_day=3"], ["first_day=2", "last_day=1"], ["first_day=2025-01-01"]):
        words = [w for text in sets for w in ("--set", f"train.{text}")]
        said = refused(tiny_run, tmp_path / "m", *words)
        assert "leave no day to train on: the groups have 2 training days, 2024-03-01 to 2024-03-02" in said
    assert "1 is the first, -1 the last" in refused(tiny_run, tmp_path / "m", "--set", "train.first_day=0", code=2)


def test_samples_and_counts_of_chosen_days(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The samples, n_i and the pictures' mean are those of the day, by a loop over its groups."""
    schema = Schema.read(tiny_run.groups)
    days = training_days.days_of(tiny_run.groups, "train")
    every = read_counts(tiny_run.groups, schema)
    both = training_days.read_counts(tiny_run.groups, schema, (days[0], days[1]))
    first, second = (training_days.read_counts(tiny_run.groups, schema, (d, d)) for d in days)
    for vocab in every:
        np.testing.assert_array_equal(both[vocab], every[vocab])
        np.testing.assert_array_equal(first[vocab] + second[vocab], every[vocab])
    whole = GroupedData(tiny_run.groups, "train", ["ad_id", "goods"])
    parts = [GroupedData(tiny_run.groups, "train", ["ad_id", "goods"], (d, d)) for d in days]
    assert [len(p) for p in parts] == [
        pl.read_parquet(tiny_run.groups / "train" / "*.parquet").filter(day=d)["sample_id"].list.len().sum()
        for d in days
    ]
    ids = [
        {int(i) for b in data.epoch(50, seed=(1, 0)) for i in np.asarray(b.sample["sample_id"])}
        for data in (whole, *parts)
    ]
    assert ids[1] | ids[2] == ids[0]
    assert not ids[1] & ids[2]
    n_U = np.zeros(schema.vocab_sizes["goods"], int)
    rows = pl.read_parquet(tiny_run.groups / "train" / "*.parquet").filter(day=days[0])
    for goods, samples in rows.select("goods", "sample_id").iter_rows():
        for index in set(goods):
            n_U[index] += len(samples)
    np.testing.assert_array_equal(first["goods"][1:], n_U[1:])
    # The mean of the pictures that the day's samples refer to.
    model = tensors(tiny_run.train(tmp_path / "m", *EARLY))
    images = set(rows["ad_image"].explode().to_list()) | set(rows["image"].explode().drop_nulls().to_list())
    names = dict(pl.read_parquet(tiny_run.convert / "vocab/image.parquet").select("index", "value").iter_rows())
    with h5py.File(tiny_run.features) as f:
        place = {name.decode(): int(row) for name, row in zip(f["image"][:], f["row"][:], strict=True)}
        vectors = f["features"][:].astype(np.float64)
    used = sorted({place[names[i]] for i in images if i > 1})
    np.testing.assert_allclose(model["pictures.mean"], vectors[used].mean(0), rtol=1e-5, atol=1e-6)
    assert len(used) < len(vectors)


def test_an_epoch_of_chosen_days_goes_on_where_it_was(tiny_run: TinyRun) -> None:
    """Batches after a skip are those of the whole epoch, though some blocks have no group of the day."""
    days = training_days.days_of(tiny_run.groups, "train")
    for day in days:
        data = GroupedData(tiny_run.groups, "train", ["ad_id"], (day, day))
        every = [np.asarray(b.sample["sample_id"]) for b in data.epoch(16, seed=(1, 0))]
        for skip in (1, 3, len(every) - 1):
            rest = [np.asarray(b.sample["sample_id"]) for b in data.epoch(16, seed=(1, 0), skip=skip)]
            assert all(np.array_equal(a, b) for a, b in zip(every[skip:], rest, strict=True))
