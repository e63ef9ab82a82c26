"""The attention gallery (DICM Fig. 8): an ad's picture, and the user's pictures of high and of low weight. And the
behaviours that an ad activates (DIN Fig. 5)."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image

from ctrkit import files, picture_sources, pictures
from ctrkit.errors import UsageError, nearest
from ctrkit.predictions import first_rows
from ctrkit.recipe import ExtractImages, Recipe

CANDIDATES = 25
"""Impressions whose weights are looked at, for each case shown."""
THUMBNAIL = 96
"""Longest side of an inlined picture, in pixels."""


MOST_BARS = 16
"""Behaviours of a user that the bars show: the last ones."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """One of the user's behaviours: its picture, its weight, and what it is called."""

    image: str
    weight: float
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An impression to show."""

    sample_id: int
    ad_image: str
    click: bool
    score: float
    behaviours: int
    highest: tuple[Behaviour, ...]
    """By weight, highest first."""
    lowest: tuple[Behaviour, ...]
    """By weight, highest first; none of `highest`."""
    user: str = ""
    ad: str = ""
    category: str = ""
    """The ad's."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An impression, and the weight of each of the user's behaviours."""

    sample_id: int
    user: str
    ad: str
    ad_image: str
    category: str
    click: bool
    score: float
    behaviours: tuple[Behaviour, ...]
    """The last `MOST_BARS`, oldest first."""
    left_out: int
    """Earlier behaviours, which are not shown."""


def attends(model: Path) -> bool:
    """Say whether a model directory holds a model with attention over pictures."""
    train = files.read_json(model / "settings.json").get("train", {})
    pools = train.get("user_images") in (True, "simtier+pooled")
    return bool(train.get("model") == "dicm" and pools and train.get("pooling") == "attentive")


def activates(model: Path) -> bool:
    """Say whether a model directory holds a DIN."""
    return bool(files.read_json(model / "settings.json").get("train", {}).get("model") == "din")


def choose_activation(recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    """Return whose activation of behaviours is shown: the recipe's choice, else the first DIN."""
    return _choose("activation_variant", activates, recipe, models)


def choose_variant(recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    """Return whose attention is shown: the recipe's choice, else the first that attends to pictures."""
    return _choose("gallery_variant", attends, recipe, models)


def _choose(key: str, fits: Callable[[Path], bool], recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    wanted = getattr(recipe.report, key)
    if wanted in models:
        return str(wanted) if fits(models[wanted]) else None
    if wanted and wanted not in recipe.variants:
        raise UsageError(f"report.{key} {wanted!r} is none of the models{nearest(wanted, models)}")
    return next((name for name, model in models.items() if fits(model)), None)


def candidates(predictions: Path, most: int, long: int) -> pl.DataFrame:
    """Return `sample_id`, `user` and `ad` of impressions worth looking at, one a user: those with histories of `long`
    and more first, then clicked, then early ones. They are among the first `ctrkit.predictions.FIRST_ROWS`."""
    return (
        first_rows(predictions)
        .filter(pl.col("history_length") > 0)
        .select("sample_id", "user", "ad", "click", length=pl.col("history_length").clip(upper_bound=long))
        .sort(["length", "click", "sample_id"], descending=[True, True, False])
        .unique("user", keep="first", maintain_order=True)
        .head(most)
        .select("sample_id", "user", "ad")
        .collect()
    )


def choose_cases(weights: pl.DataFrame, cases: int, per_row: int, thumbnails: "Thumbnails | None" = None) -> list[Case]:
    """Return the cases to show: those that fill both rows first, clicked before others, then by spread of weights.

    `weights` is what `ctrkit.scoring.attention_weights` returns: one row a behaviour, oldest first; and, where it has
    them, `user`, `ad` and `category`, text. An ad's picture is shown once, as long as there are others; one that cannot
    be read (of `thumbnails`, where they are given) after all that can.
    """
    found = []
    for rows in weights.partition_by("sample_id", maintain_order=True):
        first = rows.row(0, named=True)
        shown = [
            Behaviour(image=image or "", weight=weight)
            for image, weight in rows.sort("weight", descending=True, maintain_order=True)
            .select("image", "weight")
            .iter_rows()
        ]
        n = min(per_row, (len(shown) + 1) // 2)
        case = Case(
            sample_id=first["sample_id"],
            ad_image=first["ad_image"] or "",
            click=bool(first["click"]),
            score=first["score"],
            behaviours=len(shown),
            highest=tuple(shown[:n]),
            lowest=tuple(shown[n:][-per_row:]),
            **_words(first),
        )
        found.append(case)
    ranked = sorted(found, key=lambda c: (c.behaviours < 2 * per_row, not c.click, -_spread(c), c.sample_id))
    seen: set[str] = set()
    firsts: list[Case] = []
    repeats: list[Case] = []
    for case in ranked:
        (repeats if case.ad_image in seen else firsts).append(case)
        seen.add(case.ad_image)
    order = firsts + repeats
    if thumbnails is None or thumbnails.where is None:
        return order[:cases]
    pictured: list[Case] = []
    for case in order:
        if len(pictured) < cases and thumbnails.picture(case.ad_image) is not None:
            pictured.append(case)
    return [*pictured, *(case for case in order if case not in pictured)][:cases]


def _words(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: row.get(name) or "" for name in ("user", "ad", "category")}


def choose_activations(weights: pl.DataFrame, cases: int) -> list[Activation]:
    """Return the impressions to show: clicked before others, then those whose largest weight stands out most.

    `weights` as for `choose_cases`, with the behaviours' `name`, text. An ad is shown once, as long as there are
    others.
    """
    found = []
    for rows in weights.partition_by("sample_id", maintain_order=True):
        first, last = rows.row(0, named=True), rows.tail(MOST_BARS)
        shown = last.select("image", "weight", "name").iter_rows()
        case = Activation(
            sample_id=first["sample_id"],
            ad_image=first["ad_image"] or "",
            click=bool(first["click"]),
            score=first["score"],
            behaviours=tuple(Behaviour(image=i or "", weight=w, name=n or "") for i, w, n in shown),
            left_out=rows.height - last.height,
            **_words(first),
        )
        found.append(
            (len(case.behaviours) < min(8, MOST_BARS), not case.click, -_stands_out(case), case.sample_id, case)
        )
    firsts: dict[str, Activation] = {}
    repeats: list[Activation] = []
    for *_, case in sorted(found, key=lambda f: f[:-1]):
        if case.ad in firsts:
            repeats.append(case)
        firsts.setdefault(case.ad, case)
    return [*firsts.values(), *repeats][:cases]


def _stands_out(case: Activation) -> float:
    """Return how far the largest of the weights shown lies above their mean, in units of their mean size."""
    sizes = [abs(b.weight) for b in case.behaviours]
    mean = sum(sizes) / len(sizes)
    return (max(sizes) - mean) / mean if mean else 0.0


def _spread(case: Case) -> float:
    """Return the difference of the rows' mean weights, in units of the mean weight of the whole history."""
    if not case.lowest:
        return 0.0
    high, low = (sum(b.weight for b in row) / len(row) for row in (case.highest, case.lowest))
    return (high - low) * case.behaviours


class Thumbnails:
    """Pictures as data URIs, the square that the network sees, made small.

    Parameters
    ----------
    where: what `--pictures` names; opened when the first picture is asked for.
    settings: how ids name pictures, and the side of the square.
    """

    def __init__(self, where: Path | None, settings: ExtractImages) -> None:
        self.where, self.settings = where, settings
        self.picture = cache(self._picture)
        self.uri = cache(self._uri)

    @cached_property
    def _source(self) -> pictures.Source:
        assert self.where is not None
        return picture_sources.open_source(self.where, self.settings)

    def _picture(self, image: str) -> Image.Image | None:
        """Return the picture, or None where it is missing or cannot be read."""
        if self.where is None or not image:
            return None
        try:
            with pictures.quiet():
                pixels = pictures.decode(
                    pictures.read(self._source.place(image)), self.settings.size, self.settings.crop
                )
        except pictures.BadPicture:
            return None
        small = Image.fromarray(pixels.transpose(1, 2, 0))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return small

    def _uri(self, image: str) -> str | None:
        """Return the picture as a data URI, or None."""
        small = self.picture(image)
        return None if small is None else as_uri(small)


def as_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI, JPEG."""
    out = BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """Many pictures in one, row by row; those that are missing leave their place empty."""

    uri: str
    side: int
    """Pixels of a place's side."""
    columns: int
    rows: int
    missing: tuple[int, ...]
    """Places without a picture."""


def make_sprite(thumbnails: Thumbnails, images: Sequence[str], side: int = 64) -> Sprite | None:
    """Put pictures into one, in order; None where there is none of them."""
    found = [thumbnails.picture(image) for image in images]
    if not any(found):
        return None
    columns = min(len(found), 30)
    rows = -(-len(found) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for n, picture in enumerate(found):
        if picture is not None:
            sheet.paste(picture.resize((side, side)), (n % columns * side, n // columns * side))
    missing = tuple(n for n, picture in enumerate(found) if picture is None)
    return Sprite(uri=as_uri(sheet), side=side, columns=columns, rows=rows, missing=missing)
