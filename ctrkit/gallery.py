"""The attention gallery (DICM Fig. 8): an ad's picture, and the user's pictures of high and of low weight."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path

import polars as pl
from PIL import Image

from ctrkit import files, picture_sources, pictures
from ctrkit.errors import UsageError, nearest
from ctrkit.recipe import ExtractImages, Recipe

CANDIDATES = 25
"""Impressions whose weights are looked at, for each case shown."""
THUMBNAIL = 96
"""Longest side of an inlined picture, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """A picture of the user's behaviour sequence."""

    image: str
    weight: float


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


def attends(model: Path) -> bool:
    """Say whether a model directory holds a model with attention over pictures."""
    train = files.read_json(model / "settings.json").get("train", {})
    pools = train.get("user_images") in (True, "simtier+pooled")
    return bool(train.get("model") == "dicm" and pools and train.get("pooling") == "attentive")


def choose_variant(recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    """Return whose attention is shown: the recipe's choice, else the first that attends to pictures."""
    wanted = recipe.report.gallery_variant
    if wanted in models:
        return wanted if attends(models[wanted]) else None
    if wanted and wanted not in recipe.variants:
        raise UsageError(f"report.gallery_variant {wanted!r} is none of the models{nearest(wanted, models)}")
    return next((name for name, model in models.items() if attends(model)), None)


def candidates(predictions: Path, cases: int, per_row: int) -> list[int]:
    """Return sample ids worth looking at, one a user: long histories first, then clicked, then early ones."""
    return (
        pl.scan_parquet(predictions, glob=False)
        .filter(pl.col("history_length") > 0)
        .select("sample_id", "user", "click", length=pl.col("history_length").clip(upper_bound=2 * per_row))
        .sort(["length", "click", "sample_id"], descending=[True, True, False])
        .unique("user", keep="first", maintain_order=True)
        .head(cases * CANDIDATES)
        .collect()["sample_id"]
        .to_list()
    )


def choose_cases(weights: pl.DataFrame, cases: int, per_row: int) -> list[Case]:
    """Return the cases to show: those that fill both rows first, clicked before others, then by spread of weights.

    `weights` is what `ctrkit.scoring.attention_weights` returns: one row a behaviour, oldest first. An ad's
    picture is shown once, as long as there are others.
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
        )
        found.append(case)
    ranked = sorted(found, key=lambda c: (c.behaviours < 2 * per_row, not c.click, -_spread(c), c.sample_id))
    seen: set[str] = set()
    firsts: list[Case] = []
    repeats: list[Case] = []
    for case in ranked:
        (repeats if case.ad_image in seen else firsts).append(case)
        seen.add(case.ad_image)
    return (firsts + repeats)[:cases]


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
        self.uri = cache(self._uri)

    @cached_property
    def _source(self) -> pictures.Source:
        assert self.where is not None
        return picture_sources.open_source(self.where, self.settings)

    def _uri(self, image: str) -> str | None:
        """Return the picture, or None where it is missing or cannot be read."""
        if self.where is None:
            return None
        try:
            with pictures.quiet():
                pixels = pictures.decode(pictures.read(self._source.place(image)), self.settings.size)
        except pictures.BadPicture:
            return None
        small = Image.fromarray(pixels.transpose(1, 2, 0))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        out = BytesIO()
        small.save(out, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
