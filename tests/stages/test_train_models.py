"""The ways to look at a history and to regularise, from recipe to scores, through the command line."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from ctrkit.batches import Schema
from ctrkit.modelfile import build, read_counts
from ctrkit.recipe import load
from tests.tiny_run import TinyRun


def scored(run: TinyRun, folder: Path, *sets: str) -> tuple[dict[str, torch.Tensor], pl.DataFrame]:
    """Train with some settings, predict without naming them again but in the recipe; return tensors and scores."""
    words = [word for text in sets for word in ("--set", text)]
    model = run.train(folder / "model", *words)
    run.must("predict", *run.reads(), "--model", model, *words, "--out", folder / "scores.parquet")
    return torch.load(model / "model.pt", weights_only=True), pl.read_parquet(folder / "scores.parquet")


HISTORIES = {
    "pooling": ["train.pooling=din"],
    "pooling, din-v1": ["train.pooling=din", "train.din=din-v1", "train.activation=dice"],
    "ids": ["train.user_ids=din", "train.user_images=false"],
    "tiers": ["train.user_images=simtier", "train.ad_image=false", "train.tiers=8"],
    "both": ["train.user_images=simtier+pooled", "train.has_picture=true", "train.extractor=[5]"],
    "Dice": ["train.extractor_activation=dice", "train.share_extractors=true", "train.extractor=[8, 6, 5, 4]"],
}
EXPECTED = {
    "pooling": {"network.picture_unit.weight.p": (80, 6), "network.picture_unit.rest.0.weight": (40, 80)},
    "pooling, din-v1": {"network.picture_unit.weight.d": (36, 6), "network.picture_unit.act.mean_H": (36,)},
    "ids": {"network.id_unit.weight.k": (80, 24)},  # category and shop, which ads have too
    "tiers": {"network.discriminator.layers.0.weight": (12, 6 * 12 + 8)},
    "both": {"network.adnet.0.weight": (5, 513), "network.discriminator.layers.0.weight": (12, 6 * 12 + 5 + 5 + 20)},
    "Dice": {"network.adnet.6.weight": (4, 5), "network.adnet.5.a_H": (5,)},
}


@pytest.mark.parametrize("name", HISTORIES)
def test_ways_to_look_at_a_history(name: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The network has the parts that the settings name, also after it was read back; its scores differ by ad."""
    tensors, table = scored(tiny_run, tmp_path, *HISTORIES[name])
    for tensor, shape in EXPECTED[name].items():
        assert tuple(tensors[tensor].shape) == shape
    assert table["score"].is_between(0, 1, closed="none").all()
    assert table["score"].n_unique() > 50
    if name == "tiers":
        assert not any("net." in k and "usernet" in k for k in tensors)


def test_dropout_and_filter(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Both are told by the saved model: dropout trains another one, the filter's ids are kept with it."""
    base = ["train.model=base"]
    plain, _ = scored(tiny_run, tmp_path / "plain", *base, "train.regularisation=none")
    dropped, _ = scored(tiny_run, tmp_path / "dropped", *base, "train.regularisation=dropout")
    nothing, _ = scored(tiny_run, tmp_path / "nothing", *base, "train.regularisation=dropout", "train.dropout_rate=0.0")
    assert plain.keys() == dropped.keys()
    table = "table.12"
    assert not torch.equal(plain[table], dropped[table])
    torch.testing.assert_close(plain[table], nothing[table], rtol=1e-3, atol=1e-5)
    filtered, _ = scored(tiny_run, tmp_path / "filtered", *base, "train.regularisation=filter", "train.filter_top=4")
    sizes = json.loads((tiny_run.groups / "schema.json").read_text())["vocab_sizes"]
    many = {vocab for vocab in ("goods", "category", "shop") if sizes[vocab] > 2 + 4}
    assert "goods" in many
    frequent = {k: int(v.sum()) for k, v in filtered.items() if v.dtype == torch.bool}
    assert frequent == {f"frequent.{vocab}": 2 + 4 for vocab in many}
    settings = json.loads((tmp_path / "filtered" / "model" / "settings.json").read_text())
    assert (settings["train"]["regularisation"], settings["train"]["filter_top"]) == ("filter", 4)
    # What is filtered out is never trained.
    schema = Schema.read(tiny_run.groups)
    fresh = build(load(tiny_run.recipe, "base").train, schema, read_counts(tiny_run.groups, schema), None).tables[12]
    rows = torch.arange(2, sizes["goods"]) + fresh.offsets["goods"]
    kept = filtered["frequent.goods"][2:]
    same = (filtered[table][rows] == fresh.weight_VD[rows]).all(1)
    assert same[~kept].all()
    assert not same[kept].any()


REFUSED = {
    "train.pooling=din train.ad_image=false": 'pooling = "din" weighs each picture of the user',
    "train.user_ids=some": "train.user_ids: has to be true, false or \"din\" (given: 'some')",
    "train.user_images=tiers": 'train.user_images: has to be true, false, "simtier" or "simtier+pooled" (given: ',
    "train.pooling=mean": "train.pooling: input should be 'attentive', 'sum', 'max' or 'din' (given: 'mean')",
    "train.tiers=0": "train.tiers: input should be greater than or equal to 1",
    "train.extractor=[]": "train.extractor: tuple should have at least 1 item",
    "train.extractor=[8,0]": "train.extractor.1: input should be greater than or equal to 1",
    "train.regularisation=drop": "train.regularisation: input should be 'adaptive'",
    "train.dropout_rate=1.0": "train.dropout_rate: input should be less than 1",
    "train.filter_top=0": "train.filter_top: input should be greater than or equal to 1",
}


@pytest.mark.parametrize("sets", REFUSED)
def test_what_is_refused(sets: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    words = [word for text in sets.split(" ") for word in ("--set", text)]
    result = tiny_run.call("train", *tiny_run.reads(), *words, "--out", tmp_path / "model")
    assert result.exit_code == 2, result.output
    assert REFUSED[sets] in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "model").exists()
