"""The map of goods (DIN Fig. 4): t-SNE of what a model has learned of each ad, and what it predicts for some users.

Letters in names: A ads, D width of an ad's vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import files
from ctrkit.batches import GroupedData, Schema
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.predictions import first_rows
from ctrkit.recipe import Recipe

FEWEST = 8
"""Ads without which there is no map."""
PERPLEXITY = 30.0
EMBEDDING = ("din", "dicm", "base")
"""Models whose embeddings have more than one number."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """The map, ready to show."""

    variant: str
    users: Sequence[str]
    """Whose click probabilities it shows."""
    ads: pl.DataFrame
    """A row an ad, those shown most first: `ad` String, `image` String ("" without one), `category` String,
    `impressions` UInt32, `x`, `y` Float64, and `score_0`, `score_1`, … Float64, one a user."""
    parts: Sequence[str]
    """What an ad's vector is made of: features."""


def choose_variant(recipe: Recipe, models: Mapping[str, Path]) -> str | None:
    """Return whose ads are mapped: the recipe's choice, else the first DIN, else the first that is no linear model."""
    wanted = recipe.report.map_variant
    if wanted in models:
        return wanted
    if wanted and wanted not in recipe.variants:
        raise UsageError(f"report.map_variant {wanted!r} is none of the models{nearest(wanted, models)}")
    for kinds in (("din",), EMBEDDING):
        for name, model in models.items():
            if kind_of(model) in kinds:
                return name
    return None


def has_embeddings(model: Path) -> bool:
    """Say whether a model directory holds a model that is not linear."""
    return kind_of(model) in EMBEDDING


def kind_of(model: Path) -> str:
    """Return `train.model` of a model directory."""
    return str(files.read_json(model / "settings.json").get("train", {}).get("model"))


def make_map(
    model: Path,
    variant: str,
    predictions: Path,
    groups: Path,
    features: Path | None,
    convert: Path,
    split: str,
    *,
    ads: int,
    sample_ids: Sequence[int],
    category: str,
) -> EmbeddingMap | None:
    """Map the ads that the first rows of the predictions show most, at most `ads`; None where there are too few.

    An ad's vector: the embeddings of its ids that the model reads, and the middle vector of its picture where it looks
    at that, side by side. `sample_ids` choose the users: those of these impressions, whose ads are replaced by each of
    the map's in turn, at the place and time of their first impression of that day.
    """
    import torch

    from ctrkit.collate import Collator
    from ctrkit.modelfile import load
    from ctrkit.models.dicm import DICM
    from ctrkit.scoring import look_up, probability, values_of

    shown = first_rows(predictions).group_by("ad").agg(impressions=pl.len()).collect(engine="streaming")
    shown = shown.sort(["impressions", "ad"], descending=[True, False]).head(ads)
    if shown.height < FEWEST:
        return None
    trained = load(model, groups, features, convert)
    plan, network = trained.plan, trained.network
    network.eval()
    image = plan.ad_image or next(iter(plan.schema.names(("ad",), "image")), "")
    of_ads = [n for n, f in plan.schema.features.items() if f.of == "ad" and n in (*plan.features, image, category)]
    known = ad_features(groups, split, shown["ad"], of_ads)
    shown = shown.join(known, on="ad", maintain_order="left")
    data = GroupedData(groups, split, plan.features)
    collate = Collator(plan, trained.tables, trained.pictures)
    ids = [n for n in plan.sample if plan.schema.features[n].of == "ad"]
    scores: dict[str, Floats] = {}
    users: list[str] = []
    vectors_AD = np.zeros((shown.height, 0))
    for user, row in _rows_of(data, sample_ids):
        block = data.block(_with_ads(row, shown, plan.schema))
        with torch.inference_mode():
            batch = collate(block)
            look = look_up(trained, batch)
            scores[f"score_{len(users)}"] = probability(trained, network(batch, look)).numpy().astype(np.float64)
            if not users:
                parts = look.samples_S(ids)
                if isinstance(network, DICM) and (picture_AD := network.pictures(batch)[0]) is not None:
                    parts.append(picture_AD)
                if parts:
                    vectors_AD = torch.cat(parts, 1).numpy().astype(np.float64)
        users.append(user)
    if not users or not vectors_AD.shape[1]:
        return None
    xy_A2 = t_sne(vectors_AD)
    features_of = plan.schema.features
    category_A = values_of(convert, features_of[category].vocab, scalar(shown[category])) if category else None
    table = shown.select(
        "ad",
        (values_of(convert, "image", shown[image], "") if image else pl.lit("")).alias("image"),
        (category_A if category_A is not None else pl.lit("")).alias("category"),
        pl.col("impressions").cast(pl.UInt32),
        pl.Series("x", xy_A2[:, 0]),
        pl.Series("y", xy_A2[:, 1]),
        *(pl.Series(name, score) for name, score in scores.items()),
    )
    looked = [image] if plan.ad_image and plan.train.ad_image else []
    return EmbeddingMap(variant=variant, users=users, ads=table, parts=[*ids, *looked])


def ad_features(groups: Path, split: str, ads: pl.Series, names: Sequence[str]) -> pl.DataFrame:
    """Return `ad` and these features of ads, as the split's first impression of each has them."""
    names = list(dict.fromkeys(names))
    found = (
        pl.scan_parquet(groups / split / "part-*.parquet")
        .select("ad", *names)
        .explode("ad", *names)
        .filter(pl.col("ad").is_in(ads.implode()))
        .unique("ad", keep="first", maintain_order=True)
    )
    return found.collect(engine="streaming")


def _rows_of(data: GroupedData, sample_ids: Sequence[int]) -> list[tuple[str, pl.DataFrame]]:
    """Return the (user, row of the groups) of impressions, in their order; those that are not there are left out."""
    columns = ["user", "group_id", "sample_id", "click", *data.names]
    found: dict[int, pl.DataFrame] = {}
    for frame in data.frames(columns):
        here = frame.filter(pl.col("sample_id").list.set_intersection(list(sample_ids)).list.len() > 0)
        for row in here.iter_slices(1):
            found |= dict.fromkeys(set(sample_ids).intersection(row["sample_id"][0].to_list()), row)
        if len(found) == len(set(sample_ids)):
            break
    return [(found[n]["user"][0], found[n]) for n in sample_ids if n in found]


def _with_ads(row: pl.DataFrame, ads: pl.DataFrame, schema: Schema) -> pl.DataFrame:
    """Return one row of the groups with other ads, all shown where and when the row's first impression was."""
    new = [pl.Series("sample_id", [list(range(ads.height))], row.schema["sample_id"])]
    for name in row.columns:
        of = schema.features[name].of if name in schema.features else ""
        if of == "ad":
            new.append(pl.Series(name, [ads[name].to_list()], row.schema[name]))
        elif of == "scene" or name == "click":
            new.append(pl.Series(name, [[row[name][0].to_list()[0]] * ads.height], row.schema[name]))
    return row.with_columns(new)


def scalar(column: pl.Series) -> pl.Series:
    """Return a feature's index, of a multi-hot one the first; 0 where it has none."""
    return (column.list.first() if column.dtype == pl.List else column).fill_null(0)


def t_sne(x_AD: Floats) -> Floats:
    """Return [A, 2], t-SNE in the plane; the same numbers each time, scaled to the square from 0 to 1."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # Vectors that are all the same have no map; a start from principal components would divide by zero.
    if not np.isfinite(x_AD).all():
        raise UserError("the model's embeddings are not finite; train it again")
    if np.ptp(x_AD, axis=0).max() == 0:
        return np.full((len(x_AD), 2), 0.5)
    start_A2 = _principal(x_AD)
    perplexity = min(PERPLEXITY, (len(x_AD) - 1) / 3)
    with threadpool_limits(1):  # sums by several threads differ in the last bits, and t-SNE makes much of them
        made = TSNE(2, perplexity=perplexity, init=start_A2, learning_rate="auto", random_state=0, n_jobs=1)
        xy_A2 = made.fit_transform(x_AD.astype(np.float32)).astype(np.float64)
    low_2, span = xy_A2.min(0), float(np.ptp(xy_A2, axis=0).max()) or 1.0
    out: Floats = (xy_A2 - low_2 + (span - np.ptp(xy_A2, axis=0)) / 2) / span
    return out


def _principal(x_AD: Floats) -> npt.NDArray[np.float32]:
    """Return [A, 2]: the first two principal components, the first with a deviation of 1e-4, as t-SNE starts best."""
    centred = x_AD - x_AD.mean(0)
    _, _, axes_DD = np.linalg.svd(centred, full_matrices=False)
    xy = centred @ axes_DD[:2].T
    xy = np.pad(xy, ((0, 0), (0, 2 - xy.shape[1])))
    start: npt.NDArray[np.float32] = (xy / (xy[:, 0].std() or 1.0) * 1e-4).astype(np.float32)
    return start
