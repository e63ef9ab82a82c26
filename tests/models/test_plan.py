"""Which features a model looks at."""

import pytest

from ctrkit.batches import Schema
from ctrkit.errors import UsageError
from ctrkit.models.plan import Plan, make_plan
from ctrkit.recipe import Feature, Recipe, Train
from tests.small_groups import FEATURES, SCHEMA


def plan(features: dict[str, Feature] = FEATURES, **train: object) -> Plan:
    return make_plan(Train(**train), Schema(features, SCHEMA.vocab_sizes, "", 4), 7)  # type: ignore[arg-type]


def test_features_by_owner_in_the_recipes_order() -> None:
    made = plan(model="din")
    assert made.user == ["gender", "tags"]
    assert made.sample == ["scene", "ad_id", "ad_goods", "ad_tags", "ad_brand"]
    assert made.behaviour == ["goods", "brand", "colour"]
    assert made.features == [*made.user, *made.sample, *made.behaviour]
    assert made.total_width(made.behaviour) == 4 + 3 + 4


def test_switches() -> None:
    assert plan().features[-2:] == ["ad_image", "image"]
    assert not plan().behaviour
    assert plan(user_ids=True).behaviour == ["goods", "brand", "colour"]
    assert "ad_id" not in plan(ad_id=False).ids
    assert plan(ad_image=False).ad_image == plan(user_images=False).user_image == ""
    for model in ("lr", "base", "din"):
        assert plan(model=model).features == plan(model=model).ids
        assert "ad_id" not in plan(model=model, ad_id=False).ids
    assert not plan(model="lr").behaviour
    assert plan(model="base", user_ids=False).behaviour  # a switch of DICM's


def test_logistic_regression_has_width_one() -> None:
    made = plan(model="lr")
    assert made.total_width(made.ids) == len(made.ids)


def test_partners_share_a_vocabulary_and_have_one_value() -> None:
    assert plan(model="din").partners() == {"goods": "ad_goods", "brand": "ad_brand"}
    features = {
        "ad_tags": {"of": "ad", "multi_hot": True, "vocab": "tag"},
        "scene_goods": {"of": "scene", "vocab": "goods"},
        "tag": {"of": "behaviour"},
        "goods": {"of": "behaviour"},
    }
    recipe = Recipe.model_validate({"name": "x", "features": features})
    assert plan(recipe.features, model="din").partners() == {}


def test_what_cannot_be_planned() -> None:
    only_pictures = {n: f for n, f in FEATURES.items() if f.kind == "image"}
    with pytest.raises(UsageError, match="no ID feature of user, ad or scene"):
        plan(only_pictures)
    ids = {n: f for n, f in FEATURES.items() if f.kind == "id"}
    with pytest.raises(UsageError, match=r"\[train\] ad_image is on, but \[features\] has no feature of = 'ad'"):
        plan(ids)
    with pytest.raises(UsageError, match=r"\[train\] user_images is on, but .* of = 'behaviour'"):
        plan(ids, ad_image=False)
    assert not plan(ids, model="base").ad_image


def test_numbers_are_inputs_as_ids_are() -> None:
    """A number is a bucket, and a bucket an id: of every owner, in the recipe's order."""
    features = Recipe.model_validate(
        {
            "name": "x",
            "features": {
                "age": {"of": "user", "kind": "number", "edges": [20, 40]},
                "ad_id": {"of": "ad"},
                "price": {"of": "ad", "kind": "number", "quantiles": 4},
                "paid": {"of": "behaviour", "kind": "number", "edges": [5]},
            },
        }
    ).features
    schema = Schema(features, {"age": 5, "ad_id": 4, "price": 6, "paid": 4}, "0" * 32, 4)
    plan = make_plan(Train(model="din"), schema, 0)
    assert (plan.user, plan.sample, plan.behaviour) == (["age"], ["ad_id", "price"], ["paid"])
    dicm = make_plan(Train(ad_image=False, user_images=False), schema, 0)
    assert (dicm.user, dicm.sample, dicm.behaviour) == (["age"], ["ad_id", "price"], [])
