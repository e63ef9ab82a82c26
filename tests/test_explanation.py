"""A prediction taken apart: against loops over changed samples in plain Python, for every kind of model."""

import copy
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrkit.explanation import Explanation, explain
from ctrkit.impressions import Impression
from ctrkit.modelfile import TrainedModel
from tests.models.reference import PICTURE_WIDTH, SMALL, Array, Reference, make, pictures, sigmoid, weights
from tests.small_groups import FEATURES, SIZES, Group, random_groups, to_block

KINDS: dict[str, dict[str, Any]] = {
    "lr": {"model": "lr"},
    "base": {"model": "base"},
    "din": {"model": "din"},
    "din-v1": {"model": "din", "din": "din-v1"},
    "ids only": {"ad_image": False, "user_images": False},
    "attentive": {"user_ids": True},
    "sum": {"pooling": "sum"},
    "max": {"pooling": "max"},
    "din pooling": {"pooling": "din", "user_ids": "din"},
    "simtier": {"user_images": "simtier", "ad_image": False, "tiers": 6},
    "simtier+pooled": {"user_images": "simtier+pooled", "tiers": 6, "has_picture": True},
}


class Case:
    """A model of a kind, as it is and as loops, and one impression of a user with five behaviours."""

    def __init__(self, folder: Path, kind: str, behaviours: int = 5) -> None:
        train = KINDS[kind]
        vectors, self.by_index = pictures(folder, has_picture=train.get("has_picture", False))
        self.model: TrainedModel = make(train, vectors)
        self.weights = weights(self.model)
        [self.group] = random_groups(3, [1], [behaviours])
        # No input may already be what it is replaced by, and two behaviours have one picture, none an unreadable one.
        self.group.user |= {"gender": 3, "tags": [2, 4]}
        self.group.samples[0] |= {"scene": 4, "ad_id": 5, "ad_goods": 6, "ad_tags": [3], "ad_brand": 2, "ad_image": 4}
        for b, behaviour in enumerate(self.group.behaviours):
            behaviour |= {"goods": 2 + b, "brand": 2 + b % 3, "colour": 3, "image": [2, 3, 4, 4, 6][b % 5]}
        self.convert = folder / "convert"
        for vocab, size in SIZES.items():
            index = pl.Series(range(2, size), dtype=pl.UInt32)
            table = pl.DataFrame({"index": index}).with_columns(value=pl.format(vocab + "-{}", "index"))
            if vocab != "image":
                table.write_parquet(self.convert / "vocab" / f"{vocab}.parquet")

    def explain(self) -> Explanation:
        impression = Impression(
            user="u",
            day=datetime.date(2024, 3, 1),
            ad="a",
            split="test",
            block=to_block([self.group]),
            sample_id=self.group.samples[0]["sample_id"],
            click=0,
            unseen_ad=False,
            time=0,
            number=1,
            repeats=1,
        )
        return explain(self.model, impression, self.convert)

    def reference(self) -> Reference:
        return Reference(self.model.plan.train, self.weights, self.by_index, False)

    def log_odds(self, group: Group) -> float:
        return float(self.reference().log_odds([group])[0])


def without(group: Group, name: str) -> Group:
    """Return the group without a group of inputs, value by value."""
    out = copy.deepcopy(group)
    sample = out.samples[0]

    def forget(row: dict[str, Any], *features: str) -> None:
        for feature in features:
            row[feature] = [] if FEATURES[feature].multi_hot else 1

    match name:
        case "ad id":
            forget(sample, "ad_id")
        case "ad picture":
            sample["ad_image"] = 0
        case "ad features":
            forget(sample, "ad_goods", "ad_tags", "ad_brand")
        case "user features":
            forget(out.user, "gender", "tags")
        case "scene":
            forget(sample, "scene")
        case "behaviour ids":
            for behaviour in out.behaviours:
                behaviour |= {"goods": 0, "brand": 0, "colour": 0}
        case "behaviour pictures":
            for behaviour in out.behaviours:
                behaviour["image"] = 0
        case "history":
            out.behaviours = []
        case _:
            raise AssertionError(name)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_without_each_input_and_each_behaviour(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    made = case.explain()
    whole = case.log_odds(case.group)
    assert made.score.log_odds == pytest.approx(whole, abs=1e-9)
    assert made.score.probability == pytest.approx(float(sigmoid(np.array(whole))), abs=1e-9)
    for one in made.inputs:
        expected = case.log_odds(without(case.group, one.name))
        assert one.score.log_odds == pytest.approx(expected, abs=1e-9), one.name
        assert one.adds == pytest.approx(whole - expected, abs=1e-9)
        assert abs(one.adds) > 1e-6, one.name
    for b, behaviour in enumerate(made.behaviours):
        left = copy.deepcopy(case.group)
        del left.behaviours[b]
        assert behaviour.number == b + 1
        assert behaviour.score.log_odds == pytest.approx(case.log_odds(left), abs=1e-9)
        assert behaviour.adds == pytest.approx(whole - case.log_odds(left), abs=1e-9)


ALWAYS = ["ad id", "ad features", "user features", "scene"]
INPUTS = {
    "lr": ALWAYS,
    "base": [*ALWAYS, "behaviour ids", "history"],
    "din": [*ALWAYS, "behaviour ids", "history"],
    "ids only": ALWAYS,
    "attentive": ["ad id", "ad picture", *ALWAYS[1:], "behaviour ids", "behaviour pictures", "history"],
    "max": ["ad id", "ad picture", *ALWAYS[1:], "behaviour pictures", "history"],
    "simtier": ["ad id", "ad picture", *ALWAYS[1:], "behaviour pictures", "history"],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_only_what_the_model_reads_is_taken_away(kind: str, tmp_path: Path) -> None:
    made = Case(tmp_path, kind).explain()
    assert [one.name for one in made.inputs] == INPUTS[kind]
    assert len(made.behaviours) == (0 if kind in ("lr", "ids only") else 5)
    values = {name: [str(v) for v in some] for one in made.inputs for name, some in one.values.items()}
    assert values["tags"] == ["tag-2", "tag-4"]
    assert values["ad_id"] == ["ad_id-5"]
    assert values.get("ad_image", ["p2"]) == ["p2"]
    if kind in ("base", "din"):  # ids are all that the model has of a behaviour
        ids, history = made.inputs[-2:]
        assert ids.score.log_odds == pytest.approx(history.score.log_odds, abs=1e-12)


def measured(made: Explanation, name: str) -> Array:
    return np.array([behaviour.measures[name] for behaviour in made.behaviours], dtype=float)


@pytest.mark.parametrize("kind", ["din", "din-v1", "attentive", "din pooling"])
def test_weights_are_the_models(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    made = case.explain()
    [expected] = case.reference().attention([case.group])
    np.testing.assert_allclose(measured(made, "weight"), expected, atol=1e-9)
    if kind == "din pooling":
        reference = case.reference()
        [of_ids] = reference.id_weights([case.group], "id_unit")
        np.testing.assert_allclose(measured(made, "id weight"), of_ids, atol=1e-9)
    assert made.measures["weight"].endswith("not normalised" if kind == "din-v1" else "softmax over the history")


def test_max_pooling_tells_who_wins_how_many_dimensions(tmp_path: Path) -> None:
    case = Case(tmp_path, "max")
    made = case.explain()
    reference = case.reference()
    reference.extract([case.group])
    vectors = [reference.user_vector[b["image"]] for b in case.group.behaviours]
    won = [sum(v[d] == max(w[d] for w in vectors) for d in range(SMALL["extractor"][-1])) for v in vectors]
    assert measured(made, "dimensions won").tolist() == won
    assert won[2] == won[3]  # one picture twice: a tie counts for each
    assert sum(won) > 0
    assert "of the 3 numbers" in made.measures["dimensions won"]


def test_sum_pooling_has_no_weights_and_says_so(tmp_path: Path) -> None:
    for n, kind in enumerate(("sum", "base")):
        (tmp_path / str(n)).mkdir()
        made = Case(tmp_path / str(n), kind).explain()
        assert made.measures == {}
        assert any("none has a weight" in note for note in made.notes)


def test_cosines_of_simtier(tmp_path: Path) -> None:
    case = Case(tmp_path, "simtier+pooled")
    case.group.behaviours[1]["image"] = 5  # the picture that could not be read
    made = case.explain()
    ad = case.by_index[case.group.samples[0]["ad_image"], :PICTURE_WIDTH]
    for b, behaviour in enumerate(made.behaviours):
        vector = case.by_index[case.group.behaviours[b]["image"], :PICTURE_WIDTH]
        if b == 1:
            assert behaviour.measures["cosine"] is None
        else:
            cosine = ad @ vector / np.linalg.norm(ad) / np.linalg.norm(vector)
            assert behaviour.measures["cosine"] == pytest.approx(cosine, abs=1e-9)
    assert set(made.measures) == {"weight", "cosine"}
    told = {one.name: one.without for one in made.inputs}
    assert told["ad picture"] == told["behaviour pictures"] == "no picture (the zero vector, has_picture 0)"


@pytest.mark.parametrize("kind", ["din", "attentive", "max", "simtier"])
def test_a_user_without_history(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind, behaviours=0)
    made = case.explain()
    assert made.behaviours == []
    assert "The user has no history that day." in made.notes
    assert made.score.log_odds == pytest.approx(case.log_odds(case.group), abs=1e-9)
    assert made.inputs[-1].name == "history"
    assert made.inputs[-1].adds == pytest.approx(0.0, abs=1e-12)


def test_unknown_and_missing_values_are_told_apart(tmp_path: Path) -> None:
    case = Case(tmp_path, "attentive")
    case.group.user["gender"] = 1
    case.group.samples[0] |= {"ad_goods": 0, "ad_tags": []}
    values = {name: some for one in case.explain().inputs for name, some in one.values.items()}
    assert (str(values["gender"][0]), values["gender"][0].text) == ("unknown", None)
    assert (str(values["ad_goods"][0]), values["ad_goods"][0].text) == ("missing", None)
    assert values["ad_tags"] == []
