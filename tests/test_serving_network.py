"""The dense network that is exported scores as the trained one, whatever the model is put together from."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ctrkit.errors import UserError
from ctrkit.exporting import check, reads, serving_parts
from ctrkit.modelfile import TrainedModel, build
from ctrkit.picture_vectors import PictureVectors
from ctrkit.programs import Arrays, Programs
from ctrkit.recipe import Train
from ctrkit.serving_network import PReLU
from tests.models.reference import SMALL, make, pictures
from tests.small_groups import SCHEMA, SIZES

TOLERANCE = 1e-5
Switches = dict[str, Any]


class Plain(Programs):
    """The modules that are exported, as they are before."""

    def __init__(self, model: TrainedModel) -> None:
        state = model.tensors()
        self.parts = serving_parts(model.plan, model.network.eval(), state)
        self.settings = {"reads": reads(model.plan)}

    def has(self, name: str) -> bool:
        return name in self.parts

    def run(self, name: str, given: Any) -> Arrays:
        module = self.parts[name]
        assert not any(p.requires_grad or p.dtype == torch.float64 for p in module.parameters())
        out = module(*(torch.from_numpy(given[n]) for n in module.inputs))
        return {n: tensor.numpy() for n, tensor in zip(module.outputs, out, strict=True)}


def difference(model: TrainedModel, *users: tuple[int, int]) -> float:
    arguments = (model.plan, model.network.eval(), model.tensors(), Plain(model))
    return check(*arguments, users) if users else check(*arguments)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, PictureVectors]:
    made = {flag: pictures(tmp_path_factory.mktemp("data"), has_picture=flag)[0] for flag in (False, True)}
    for one in made.values():
        one.mean_W, one.scale = torch.linspace(-1, 1, 5), torch.tensor(0.7)
    return made


@pytest.mark.parametrize(
    "train",
    [
        {"model": "lr"},
        *({"model": "base", "activation": a, "batch_norm": b} for a in ("prelu", "dice") for b in (True, False)),
        {"model": "base", "tower": ()},
        *(
            {"model": "din", "din": kind, "activation": a, "din_activation": d}
            for kind, a, d in itertools.product(["din-v1", "din-code"], ["prelu", "dice"], ["sigmoid", "dice"])
        ),
    ],
    ids=str,
)
def test_models_of_ids(train: Switches, vectors: dict[bool, PictureVectors]) -> None:
    """With multi-hot features, several widths, vocabularies that user, ad and behaviours share; and no history."""
    assert difference(make(train, vectors[False])) < TOLERANCE


HISTORIES: list[tuple[bool | str, str]] = [
    (False, "attentive"),
    ("simtier", "attentive"),
    *itertools.product([True, "simtier+pooled"], ["attentive", "sum", "max", "din"]),
]


@pytest.mark.parametrize(("user_images", "pooling"), HISTORIES)
def test_every_combination_of_dicm(user_images: bool | str, pooling: str, vectors: dict[bool, PictureVectors]) -> None:
    others = itertools.product([False, True], [False, True], [False, True, "din"], ["prelu", "dice"], [False, True])
    seen = 0
    for n, (ad_id, ad_image, user_ids, activation, share) in enumerate(others):
        if pooling == "din" and user_images in (True, "simtier+pooled") and not ad_image:
            continue
        train = {
            "ad_id": ad_id,
            "ad_image": ad_image,
            "user_ids": user_ids,
            "user_images": user_images,
            "pooling": pooling,
            "activation": activation,
            "extractor_activation": activation,
            "share_extractors": share,
            "has_picture": n % 3 == 0,
            "batch_norm": n % 4 != 1,
            "din": ("din-code", "din-v1")[n % 2],
        }
        assert difference(make(train, vectors[n % 3 == 0]), (0, 1), (1, 2), (4, 3)) < TOLERANCE, train
        seen += 1
    assert seen in (24, 48)


def test_a_long_history(vectors: dict[bool, PictureVectors]) -> None:
    """5,000 behaviours, more than are taken with all ads at once."""
    train = {"user_ids": "din", "user_images": "simtier+pooled"}
    assert difference(make(train, vectors[False]), (5000, 30)) < TOLERANCE


def test_ads_are_scored_in_parts(vectors: dict[bool, PictureVectors], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many (ad, behaviour) pairs go at once: the same scores, the same weights."""
    plain = Plain(make({}, vectors[False]))
    rng = np.random.default_rng(3)
    user = {"user_ids": np.ones(1, np.int64), "user.tags": np.ones(2, np.int64)}
    user["behaviour_pictures"] = rng.normal(size=(5, 3)).astype(np.float32)
    ads = {"ad_ids": rng.integers(0, 5, (7, 4)), "ad.ad_tags": rng.integers(0, 6, (7, 2))}
    ads["ad_pictures"] = rng.normal(size=(7, 3)).astype(np.float32)
    state = plain.user(user, 5)
    whole, weights = plain.score(state, ads, 7, 5)
    assert weights is not None
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    assert whole.shape == (7,)
    assert weights.shape == (7, 5)
    monkeypatch.setattr("ctrkit.programs.PAIRS", 10)
    parts, of_parts = plain.score(state, ads, 7, 5)
    assert of_parts is not None
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    np.testing.assert_allclose(of_parts, weights, atol=1e-6)


def test_what_training_filters_and_thins_out(vectors: dict[bool, PictureVectors]) -> None:
    """Ids that `regularisation = "filter"` leaves out score as unknown; a kept share of the negatives is undone."""
    schema = replace(SCHEMA, negative_rate=0.2)
    counts = {vocab: np.arange(size) for vocab, size in SIZES.items()}
    train = Train(**SMALL, model="base", regularisation="filter", filter_top=2)
    model = build(train, schema, counts, None)
    assert any(name.startswith("frequent.") for name in model.tensors())
    for table in model.tables.values():
        table.weight_VD[1:] = torch.randn(table.weight_VD[1:].shape, generator=torch.Generator().manual_seed(1))
    assert difference(model) < TOLERANCE


@pytest.mark.parametrize("slope", [-0.5, 1.0, 1.5])
def test_slopes_of_any_size(slope: float, vectors: dict[bool, PictureVectors]) -> None:
    """PReLU with a slope above 1 is no maximum."""
    model = make({}, vectors[False])
    with torch.no_grad():
        for name, tensor in model.network.state_dict().items():
            if tensor.ndim == 1 and name.endswith(("act.weight", ".1.weight", ".3.weight")):
                tensor.clamp_(max=0.9)[0] = slope
    parts = Plain(model).parts
    ways = {m.is_maximum for part in parts.values() for m in part.modules() if isinstance(m, PReLU)}
    assert (False in ways) == (slope > 1)
    assert difference(model) < TOLERANCE


def test_a_model_that_ranks_nothing_is_refused() -> None:
    features = {name: f for name, f in SCHEMA.features.items() if f.of in ("user", "behaviour")}
    schema = replace(SCHEMA, features=features)
    counts = {vocab: np.zeros(size, np.int64) for vocab, size in SIZES.items()}
    model = build(Train(**SMALL, model="base"), schema, counts, None)
    with pytest.raises(UserError, match="reads nothing of the ad or the scene, so all ads would have the same score"):
        serving_parts(model.plan, model.network, model.tensors())


def test_a_difference_is_found(vectors: dict[bool, PictureVectors]) -> None:
    """What the check is for: a weight that is not the trained one, or no number."""
    model = make({"model": "din"}, vectors[False])
    for wrong, least in ((2.0, 1e-3), (float("nan"), float("inf"))):
        plain = Plain(model)
        plain.parts["ads"].bias_H[0] = plain.parts["ads"].of_ad.bias[0] = wrong
        assert check(model.plan, model.network, model.tensors(), plain) >= least
