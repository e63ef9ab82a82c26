"""A model on disk and back; files that do not fit are refused in one paragraph."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from ctrkit.errors import UserError
from ctrkit.modelfile import TrainedModel, build, load, open_pictures, read_counts, save
from ctrkit.recipe import Train
from tests.models.reference import PICTURE_WIDTH, SMALL, make, pictures
from tests.small_groups import SCHEMA, SIZES, some_groups, write_features, write_groups

NONE = {vocab: np.zeros(size, np.int64) for vocab, size in SIZES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Groups, features, vocabulary and a DICM that was made with them."""
    write_groups(tmp_path / "groups", {"test": some_groups()})
    vectors, _ = pictures(tmp_path)
    vectors.fit()
    made = make({"model": "dicm", "user_ids": True, "activation": "dice"}, vectors)
    (tmp_path / "model").mkdir()
    save(made, tmp_path / "model", {"pictures": vectors.store.attributes})
    return tmp_path


def read(folder: Path) -> TrainedModel:
    return load(folder / "model", folder / "groups", folder / "features.h5", folder / "convert")


def test_every_number_survives(folder: Path) -> None:
    saved = torch.load(folder / "model" / "model.pt", weights_only=True)
    read_back = read(folder)
    found = read_back.state()
    assert found.keys() == saved.keys()
    assert {"pictures.mean", "pictures.scale", "table.3", "table.4"} < found.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert list(read_back.plan.schema.features) == list(SCHEMA.features)
    assert read_back.plan.ids == make({"model": "dicm", "user_ids": True}, read_back.pictures).plan.ids  # type: ignore[arg-type]


def test_state_is_a_copy() -> None:
    made = build(Train(model="lr"), SCHEMA, NONE, None)
    before = made.state()
    made.tables[1].weight_VD += 1
    assert not made.tables[1].weight_VD.equal(before["table.1"])
    made.load_state(before)
    assert made.tables[1].weight_VD.equal(before["table.1"])


def test_logistic_regression_starts_at_zero() -> None:
    made = build(Train(model="lr"), SCHEMA, NONE, None)
    assert not any(t.any() for t in made.state().values())


def test_fresh_parameters_follow_the_seed() -> None:
    one, again, other = (build(Train(**SMALL, model="din", seed=s), SCHEMA, NONE, None).state() for s in (1, 1, 2))
    assert all(torch.equal(t, again[n]) for n, t in one.items())
    assert not torch.equal(one["table.4"], other["table.4"])


def test_counts_of_a_folder(folder: Path) -> None:
    counts = read_counts(folder / "groups", SCHEMA)
    assert {n: len(c) for n, c in counts.items()} == SIZES
    (folder / "groups" / "counts" / "goods.parquet").unlink()
    assert not read_counts(folder / "groups", SCHEMA)["goods"].any()


def test_models_without_pictures_open_none() -> None:
    assert open_pictures(Train(model="din"), None, None) is None
    assert open_pictures(Train(ad_image=False, user_images=False), None, None) is None
    with pytest.raises(UserError, match=r"give --features .* and --convert"):
        open_pictures(Train(), None, None)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def another_tower(path: Path) -> None:
    edit(path, lambda s: s["train"].update(tower=[9]))


def another_width(path: Path) -> None:
    rows = np.ones((7, PICTURE_WIDTH + 1))
    write_features(path, [f"p{i}" for i in range(7)], range(7), rows)


def another_backbone(path: Path) -> None:
    with h5py.File(path, "a") as h5:
        h5.attrs["backbone"] = "vgg16"


def another_preprocessing(path: Path) -> None:
    with h5py.File(path, "a") as h5:
        h5.attrs["preprocessing"] = "crop"


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no model": (
        "model",
        shutil.rmtree,
        "is not a model folder: it has no settings.json. Make one with `ctrkit train`",
    ),
    "broken settings": ("model/settings.json", lambda p: p.write_text("{"), "settings.json is not JSON"),
    "foreign settings": ("model/settings.json", lambda p: p.write_text("{}"), "not the settings of a model of this"),
    "unknown setting": (
        "model/settings.json",
        lambda p: edit(p, lambda s: s["train"].update(towers=[3])),
        r"not the settings of a model of this version of ctrkit .* Train the model again",
    ),
    "no tensors": ("model/model.pt", Path.unlink, r"model.pt is not there\. Train the model again"),
    "cut tensors": ("model/model.pt", cut, r"model.pt is damaged: .* Train the model again"),
    "text for tensors": (
        "model/model.pt",
        lambda p: p.write_text("hello"),
        "is damaged: it is not what ctrkit train wrote",
    ),
    "other tensors": (
        "model/model.pt",
        lambda p: torch.save({"a": torch.ones(1)}, p),
        r"model.pt does not fit .*settings.json: 'a' is of shape \[1\], not missing",
    ),
    "another model's tensors": (
        "model/settings.json",
        another_tower,
        r"'network.discriminator.layers.0.bias' is of shape \[7\], not of shape \[9\]",
    ),
    "another vocabulary": (
        "groups/schema.json",
        lambda p: edit(p, lambda s: s.update(vocab_digest="1" * 32)),
        r"another vocabulary than .* \(digests \w{8} and 11111111\)",
    ),
    "no groups": ("groups", shutil.rmtree, "is not a groups folder"),
    "features of another width": ("features.h5", another_width, "of width 5, but .* has width 6: use the features it"),
    "features of another network": ("features.h5", another_backbone, "backbone = none, but .* has backbone = vgg16"),
    "features of other preprocessing": (
        "features.h5",
        another_preprocessing,
        "preprocessing = None, but .* has preprocessing = crop",
    ),
    "no features": ("features.h5", Path.unlink, "features.h5 is not there; `ctrkit extract-images` writes it"),
}


@pytest.mark.parametrize(("path", "spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit(path: str, spoil: Callable[[Path], Any], message: str, folder: Path) -> None:
    spoil(folder / path)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in error.value.message
