"""The map of goods: alike vectors lie together, the same numbers make the same map."""

import json

import numpy as np
import polars as pl
import pytest

from ctrkit import embedding_map
from ctrkit.errors import UsageError, UserError
from ctrkit.recipe import Recipe


def test_what_is_alike_lies_together():
    rng = np.random.default_rng(0)
    centre_3D = rng.normal(size=(3, 12)) * 5
    of = np.repeat([0, 1, 2], 20)
    xy = embedding_map.t_sne(centre_3D[of] + rng.normal(size=(60, 12)) * 0.1)
    assert xy.shape == (60, 2)
    assert xy.min() == 0.0
    assert xy.max() == 1.0
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (of[distance.argmin(1)] == of).all()


def test_the_same_numbers_make_the_same_map():
    x = np.random.default_rng(1).normal(size=(40, 5))
    assert (embedding_map.t_sne(x) == embedding_map.t_sne(x.copy())).all()


def test_vectors_that_say_nothing():
    assert (embedding_map.t_sne(np.ones((9, 3))) == 0.5).all()
    one = embedding_map.t_sne(np.arange(9.0)[:, None])
    assert np.isfinite(one).all()
    with pytest.raises(UserError, match="not finite"):
        embedding_map.t_sne(np.full((9, 3), np.nan))


def test_the_first_index_of_a_feature():
    assert embedding_map.scalar(pl.Series([5, None, 2], dtype=pl.UInt32)).to_list() == [5, 0, 2]
    assert embedding_map.scalar(pl.Series([[5, 1], [], [3]], dtype=pl.List(pl.UInt32))).to_list() == [5, 0, 3]


def test_ads_have_the_features_of_their_first_impression(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    frame = {"ad": [["a", "b"], ["a"], ["c"]], "shop": [[2, 3], [9], [4]], "tags": [[[5, 6], []], [[7]], [[8]]]}
    pl.DataFrame(frame).write_parquet(folder / "part-0.parquet")
    made = embedding_map.ad_features(tmp_path, "test", pl.Series(["c", "a", "gone"]), ["shop", "tags"])
    assert made.sort("ad").rows() == [("a", 2, [5, 6]), ("c", 4, [8])]


def test_whose_ads_are_mapped(tmp_path):
    models = {}
    for name in ("lr", "dicm", "din"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"train": {"model": name}}))
        models[name] = tmp_path / name
    recipe = Recipe(name="r")

    def choose(*names, wanted=""):
        report = recipe.report.model_copy(update={"map_variant": wanted})
        own = recipe.model_copy(update={"report": report})
        return embedding_map.choose_variant(own, {name: models[name] for name in names})

    assert choose("lr", "dicm", "din") == "din"
    assert choose("lr", "dicm") == "dicm"
    assert choose("lr") is None
    assert choose("lr", "dicm", "din", wanted="dicm") == "dicm"
    with pytest.raises(UsageError, match=r"report\.map_variant 'dim' is none of the models.*did you mean 'din'"):
        choose("lr", "din", wanted="dim")
