"""Which cases the gallery shows, and what of them."""

import base64
import io
import json

import polars as pl
import pytest
from PIL import Image

from ctrkit import gallery
from ctrkit.errors import UsageError
from ctrkit.recipe import ExtractImages, Recipe


def weights(*cases):
    """Each case: (sample_id, ad_image, click, weights oldest first)."""
    rows = [
        (sample_id, f"{sample_id}-{k}", w, ad, click, 0.5)
        for sample_id, ad, click, ws in cases
        for k, w in enumerate(ws)
    ]
    schema = {
        "sample_id": pl.Int64,
        "image": pl.String,
        "weight": pl.Float32,
        "ad_image": pl.String,
        "click": pl.Int8,
        "score": pl.Float32,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_rows_hold_the_highest_and_the_lowest_weights():
    (case,) = gallery.choose_cases(weights((7, "ad", 1, [0.1, 0.5, 0.02, 0.3, 0.08])), 3, 2)
    assert [b.image for b in case.highest] == ["7-1", "7-3"]
    assert [b.image for b in case.lowest] == ["7-4", "7-2"]
    assert (case.sample_id, case.ad_image, case.click, case.behaviours) == (7, "ad", True, 5)


@pytest.mark.parametrize(("n", "high", "low"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (9, 3, 3)])
def test_short_histories_are_shared_between_the_rows_without_repeats(n, high, low):
    (case,) = gallery.choose_cases(weights((1, "ad", 1, [1 / (k + 1) for k in range(n)])), 1, 3)
    assert (len(case.highest), len(case.lowest)) == (high, low)
    assert not {b.image for b in case.highest} & {b.image for b in case.lowest}


def test_clicked_cases_come_first_then_spread_and_each_ad_once():
    table = weights(
        (1, "x", 0, [0.9, 0.1]),
        (2, "y", 1, [0.6, 0.4]),
        (3, "z", 1, [0.8, 0.2]),
        (4, "z", 1, [0.7, 0.3]),
    )
    assert [c.sample_id for c in gallery.choose_cases(table, 3, 1)] == [3, 2, 1]
    # With two pictures a row, only 5 fills both rows, so that it comes before the clicked ones.
    longer = pl.concat([table, weights((5, "w", 0, [0.25] * 4))])
    assert [c.sample_id for c in gallery.choose_cases(longer, 3, 2)] == [5, 3, 2]
    assert [c.sample_id for c in gallery.choose_cases(table, 9, 1)] == [3, 2, 1, 4]
    assert gallery.choose_cases(weights(), 3, 1) == []


def test_candidates_are_distinct_users_with_long_histories_first(tmp_path):
    pl.DataFrame(
        {
            "sample_id": [1, 2, 3, 4, 5, 6],
            "user": ["a", "a", "b", "c", "d", "e"],
            "ad": list("xxyyzz"),
            "click": [0, 1, 0, 1, 1, 1],
            "history_length": [9, 9, 8, 3, 0, 4],
        },
        schema_overrides={"history_length": pl.UInt32, "click": pl.Int8},
    ).write_parquet(tmp_path / "p.parquet")
    # From 4 behaviours on, two rows of two are full: 2, 6 (clicked), 3 (not); then the short 4; never the empty 5.
    found = gallery.candidates(tmp_path / "p.parquet", 8, 4)
    assert found.rows() == [(2, "a", "x"), (6, "e", "z"), (3, "b", "y"), (4, "c", "y")]
    assert gallery.candidates(tmp_path / "p.parquet", 1, 4)["sample_id"].to_list() == [2]


def model(folder, name, **train):
    path = folder / name
    path.mkdir()
    settings = {"model": "dicm", "user_images": True, "pooling": "attentive", **train}
    (path / "settings.json").write_text(json.dumps({"train": settings}))
    return path


def test_the_variant_is_the_recipes_choice_or_the_first_that_attends(tmp_path):
    models = {
        "lr": model(tmp_path, "lr", model="lr"),
        "sum": model(tmp_path, "sum", pooling="sum"),
        "blind": model(tmp_path, "blind", user_images=False),
        "full": model(tmp_path, "full"),
        "more": model(tmp_path, "more"),
    }
    recipe = {"name": "r", "variants": {"gone": {}}}
    choose = lambda choice: gallery.choose_variant(  # noqa: E731
        Recipe.model_validate({**recipe, "report": {"gallery_variant": choice}}), models
    )
    assert choose("") == "full"
    assert choose("more") == "more"
    assert choose("sum") is None
    assert choose("gone") == "full"
    with pytest.raises(UsageError, match="'ful' is none of the models; did you mean 'full'"):
        choose("ful")
    assert gallery.choose_variant(Recipe(name="r"), {"lr": models["lr"]}) is None


def test_thumbnails_are_small_jpegs_and_missing_ones_none(tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no picture")
    thumbnails = gallery.Thumbnails(tmp_path, ExtractImages(template="{image}.png", size=224))
    head, _, data = thumbnails.uri("a").partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (96, 96)
        red, green, blue = picture.convert("RGB").getpixel((48, 48))
        assert red > 240
        assert max(green, blue) < 15
    for image in ("none", "broken", "", "../secret", "/etc/x"):
        assert thumbnails.uri(image) is None
    assert gallery.Thumbnails(None, ExtractImages(size=64)).uri("a") is None


def test_ads_without_a_picture_come_last(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    thumbnails = gallery.Thumbnails(tmp_path, ExtractImages(template="{image}.png", size=64))
    three = weights((1, "a", 1, (0.9, 0.1)), (2, "b", 0, (0.5, 0.5)), (3, "c", 1, (0.6, 0.4)))
    assert [c.sample_id for c in gallery.choose_cases(three, 3, 1)] == [1, 3, 2]
    assert [c.sample_id for c in gallery.choose_cases(three, 3, 1, thumbnails)] == [2, 1, 3]
    assert [c.sample_id for c in gallery.choose_cases(three, 1, 1, thumbnails)] == [2]


def activations(*cases):
    """Each case: (sample_id, ad, click, weights oldest first)."""
    frames = [
        weights((sample_id, f"picture of {ad}", click, ws)).with_columns(
            pl.Series("name", [f"c{k}" for k in range(len(ws))]),
            ad=pl.lit(ad),
            user=pl.lit(f"u{sample_id}"),
            category=pl.lit("hats"),
        )
        for sample_id, ad, click, ws in cases
    ]
    return pl.concat(frames)


def test_activations_stand_out_and_show_the_last_behaviours():
    flat, peak, long = (0.1,) * 8, (0.3, *(0.1,) * 7), tuple(k / 100 for k in range(20))
    made = gallery.choose_activations(
        activations((1, "x", 1, flat), (2, "y", 1, peak), (3, "z", 0, peak), (4, "y", 1, flat), (5, "w", 1, (0.9,))), 5
    )
    # Long histories, clicked, standing out; the ad y a second time and the short history after them.
    assert [c.sample_id for c in made] == [2, 1, 3, 5, 4]
    first = made[0]
    assert (first.ad, first.user, first.category, first.ad_image) == ("y", "u2", "hats", "picture of y")
    assert [b.name for b in first.behaviours] == [f"c{k}" for k in range(8)]
    assert [round(b.weight, 6) for b in first.behaviours] == [round(w, 6) for w in peak]
    [one] = gallery.choose_activations(activations((1, "x", 1, long)), 3)
    assert (one.left_out, len(one.behaviours)) == (4, gallery.MOST_BARS)
    assert one.behaviours[0].name == "c4"
    assert one.behaviours[-1].weight == pytest.approx(0.19)
