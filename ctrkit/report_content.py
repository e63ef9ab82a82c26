"""What a report shows, gathered from a run's files and computed from its models, as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import contact_sheet, embedding_map, files, gallery, metric_tables, story
from ctrkit import surprises as errors_of_models
from ctrkit.batches import Schema
from ctrkit.curves import read_metrics_lines
from ctrkit.errors import UsageError, nearest
from ctrkit.predictions import is_parquet
from ctrkit.recipe import Feature, Recipe

CATEGORY_NAMES = ("categor", "cate", "genre", "class")
"""An ad's feature whose column begins so stands for its category."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a report is made from. Only the metrics are a must; what is missing is left out."""

    metrics: Path
    models: Mapping[str, Path] = field(default_factory=dict)
    """Variant → model directory."""
    predictions: Mapping[str, Path] = field(default_factory=dict)
    """Variant → predictions.parquet."""
    convert: Path | None = None
    groups: Path | None = None
    features: Path | None = None
    pictures: Path | None = None

    def named(self) -> dict[str, Path | None]:
        """Return all of them by name."""
        return {
            "convert": self.convert,
            "groups": self.groups,
            "features": self.features,
            "pictures": self.pictures,
            **{f"model {name}": path for name, path in self.models.items()},
            **{f"predictions {name}": path for name, path in self.predictions.items()},
            "metrics": self.metrics,
        }


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The attention gallery, ready to show."""

    variant: str
    cases: Sequence[gallery.Case]
    looked_at: int
    """Impressions whose weights were compared to choose the cases."""

    @property
    def categories(self) -> list[str]:
        """Return the categories of the cases' ads."""
        return sorted({case.category for case in self.cases if case.category})


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The behaviours that ads activate, ready to show."""

    variant: str
    cases: Sequence[gallery.Activation]
    normalised: bool
    """The weights of a user's behaviours add up to 1."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Where a model errs, ready to show."""

    variant: str
    impressions: Sequence[Mapping[str, Any]]
    """As `ctrkit.surprises.Surprises.impressions`, with `image` and `category` of the ad."""
    ads: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that a report shows, as plain data. None: absent, for the reason that `why` has by its name."""

    metrics: dict[str, Any]
    thumbnails: gallery.Thumbnails
    data: Sequence[dict[str, Any]] = ()
    days: pl.DataFrame | None = None
    rejects: Sequence[tuple[str, int]] = ()
    picture_facts: Sequence[tuple[str, str]] = ()
    models: Sequence[dict[str, Any]] = ()
    histories: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    attention: Gallery | None = None
    activation: Activations | None = None
    map: embedding_map.EmbeddingMap | None = None
    sheet: contact_sheet.ContactSheet | None = None
    errors: Errors | None = None
    stages: Sequence[tuple[str, float]] = ()
    why: Mapping[str, str] = field(default_factory=dict)


def gather(recipe: Recipe, sources: Sources) -> Content:
    """Read and compute everything that a report shows. Raises UserError for a file that is not what it should be."""
    metrics = metric_tables.read_metrics(sources.metrics)
    thumbnails = gallery.Thumbnails(sources.pictures, recipe.extract_images)
    check_variants(recipe, sources)
    why: dict[str, str] = {}
    convert = sources.convert
    return Content(
        metrics=metrics,
        thumbnails=thumbnails,
        data=story.data_facts(convert) if convert else [],
        days=story.days(convert) if convert else None,
        rejects=story.rejects(convert) if convert else [],
        picture_facts=story.picture_facts(sources.features) if sources.features else [],
        models=story.model_facts(sources.models),
        histories={name: read_metrics_lines(model) for name, model in sources.models.items()},
        attention=make_gallery(recipe, sources, thumbnails, why),
        activation=make_activations(recipe, sources, why),
        map=make_map(recipe, sources, why),
        sheet=make_sheet(recipe, sources, thumbnails, why),
        errors=make_errors(recipe, sources, metrics, why),
        stages=story.stage_seconds(sources.named()),
        why=why,
    )


def check_variants(recipe: Recipe, sources: Sources) -> None:
    """Refuse a setting that names a variant of neither the recipe nor the models."""
    for key in ("gallery_variant", "activation_variant", "map_variant"):
        wanted = getattr(recipe.report, key)
        if wanted and wanted not in sources.models and wanted not in recipe.variants:
            known = nearest(wanted, sources.models) or "; none was given with --model"
            raise UsageError(f"report.{key} {wanted!r} is none of the models{known}")


def category_feature(recipe: Recipe, schema: Schema) -> str:
    """Return the ad's feature that stands for its category; "" where no feature can."""
    of_ads = {n: f for n, f in schema.features.items() if f.of == "ad" and f.kind == "id"}
    wanted = recipe.report.category
    if wanted:
        if wanted not in of_ads:
            raise UsageError(f"report.category {wanted!r} is no id feature of ads{nearest(wanted, of_ads)}")
        return wanted
    of_ads = {n: f for n, f in of_ads.items() if f.switch != "ad_id" and not f.hash_buckets}

    def named_so(name: str, feature: Feature) -> bool:
        return any((text or "").lower().startswith(CATEGORY_NAMES) for text in (feature.column, name, feature.vocab))

    def size(name: str) -> int:
        return schema.vocab_sizes[of_ads[name].vocab]

    some = [n for n, f in of_ads.items() if named_so(n, f)] or [n for n in of_ads if size(n) > 3]
    return min(some, key=lambda n: (size(n), n), default="")


def needs(sources: Sources, variant: str, *names: str) -> str:
    """Return why a section cannot be shown, for what is not given of what it needs (the options that would give it) or
    for predictions it cannot choose from; "" if it can."""
    missing = [f"--{name}" for name in names if getattr(sources, name) is None]
    missing += [f"--predictions {variant}=…"] if variant not in sources.predictions else []
    if missing:
        return f"Not shown: it needs {' and '.join(missing)}."
    return unusable(sources.predictions[variant], {"sample_id", "user", "ad", "click", "history_length"})


def unusable(predictions: Path, columns: set[str]) -> str:
    """Return why impressions cannot be chosen from predictions; "" if they can."""
    if not is_parquet(predictions):
        return "Not shown: the predictions are no Parquet file."
    lacking = columns - set(pl.read_parquet_schema(predictions))
    return f"Not shown: the predictions have no column {', '.join(sorted(lacking))}." if lacking else ""


def elsewhere(recipe: Recipe, sources: Sources, key: str) -> str:
    """Return why the variant that `report.key` names cannot be looked into although its model is given: it was trained
    on other groups or features; "" otherwise."""
    wanted = getattr(recipe.report, key)
    if wanted not in sources.models or wanted in fitting(sources):
        return ""
    return f"Not shown: report.{key} is {wanted!r}, which was trained on other groups or features than those given."


def absence(sources: Sources, key: str, asked: int, serves: Callable[[Path], bool], otherwise: str) -> str:
    """Return why no model is looked into: it is not asked for (`report.key` is 0), the models that would serve were
    trained on other groups or features, or otherwise."""
    if not asked:
        return f"Not shown: report.{key} is 0."
    others = [name for name, model in sources.models.items() if serves(model)]
    if others:
        return f"Not shown: trained on other groups or features than those given: {', '.join(others)}."
    return otherwise


def fitting(sources: Sources) -> dict[str, Path]:
    """Return the models that were trained on the groups and features given, as far as sidecars tell: those of variants
    with data of their own would give other scores here than `predict` did."""
    made = {name: story.read_sidecar(path).get("content") for name, path in sources.named().items() if path is not None}

    def fits(model: Path) -> bool:
        read = story.read_sidecar(model).get("inputs", {})
        known = [(read[name], made[name]) for name in ("groups", "features") if name in read and made.get(name)]
        return all(then == now for then, now in known)

    return {name: model for name, model in sources.models.items() if fits(model)}


def looks_at_pictures(model: Path) -> bool:
    """Say whether a model directory holds a model that reads picture vectors."""
    train = files.read_json(model / "settings.json").get("train", {})
    return bool(train.get("model") == "dicm" and (train.get("ad_image") or train.get("user_images")))


def has_pictures(groups: Path | None) -> bool:
    """Say whether the recipe of a groups folder has pictures."""
    return groups is None or bool(Schema.read(groups).names(("ad", "behaviour"), "image"))


def weights_of(recipe: Recipe, sources: Sources, variant: str, chosen: pl.DataFrame) -> pl.DataFrame:
    """Return the weights of the behaviours of chosen impressions, with `user`, `ad`, `category` and `name`."""
    from ctrkit.scoring import attention_weights, values_of  # brings in torch

    assert sources.groups is not None
    assert sources.convert is not None
    schema = Schema.read(sources.groups)
    category = category_feature(recipe, schema)
    called = behaviour_name(schema)
    table = attention_weights(
        sources.models[variant],
        sources.groups,
        sources.features if looks_at_pictures(sources.models[variant]) else None,
        sources.convert,
        recipe.predict.split,
        chosen["sample_id"].to_list(),
        [name for name in (category, called) if name],
    )
    table = table.join(chosen, on="sample_id", how="left", maintain_order="left")
    for name, feature in (("category", category), ("name", called)):
        if feature:
            vocab = schema.features[feature].vocab
            table = table.with_columns(values_of(sources.convert, vocab, table[f"index of {feature}"]).alias(name))
        else:
            table = table.with_columns(pl.lit("").alias(name))
    return table


def behaviour_name(schema: Schema) -> str:
    """Return the feature that tells what a behaviour was: its category where there is one, else the first id; or ""."""
    ids = {n: f for n, f in schema.features.items() if f.of == "behaviour" and f.kind == "id" and not f.hash_buckets}
    named_so = [n for n, f in ids.items() if (f.column or n).lower().startswith(CATEGORY_NAMES)]
    return next(iter([*named_so, *ids]), "")


def make_gallery(
    recipe: Recipe, sources: Sources, thumbnails: gallery.Thumbnails, why: dict[str, str]
) -> Gallery | None:
    """Choose the cases of the attention gallery and read their weights."""
    settings = recipe.report
    if settings.gallery_cases and (reason := elsewhere(recipe, sources, "gallery_variant")):
        why["attention"] = reason
        return None
    variant = gallery.choose_variant(recipe, fitting(sources)) if settings.gallery_cases else None
    if variant is None:
        otherwise = "Not shown: none of the models given has attention over pictures."
        otherwise = otherwise if has_pictures(sources.groups) else no_pictures()
        why["attention"] = absence(sources, "gallery_cases", settings.gallery_cases, gallery.attends, otherwise)
        return None
    if missing := needs(sources, variant, "groups", "features", "convert"):
        why["attention"] = missing
        return None
    chosen = gallery.candidates(
        sources.predictions[variant], settings.gallery_cases * gallery.CANDIDATES, 2 * settings.gallery_pictures
    )
    if chosen.height == 0:
        why["attention"] = "Not shown: no user has a history."
        return None
    weights = weights_of(recipe, sources, variant, chosen)
    cases = gallery.choose_cases(weights, settings.gallery_cases, settings.gallery_pictures, thumbnails)
    return Gallery(variant=variant, cases=cases, looked_at=chosen.height)


def no_pictures() -> str:
    """Return why sections of pictures are absent from a run without any."""
    return "Not shown: this recipe has no pictures."


def make_activations(recipe: Recipe, sources: Sources, why: dict[str, str]) -> Activations | None:
    """Choose impressions, and read how much each of the user's behaviours is activated by the ad."""
    settings = recipe.report
    if settings.activation_cases and (reason := elsewhere(recipe, sources, "activation_variant")):
        why["activation"] = reason
        return None
    variant = gallery.choose_activation(recipe, fitting(sources)) if settings.activation_cases else None
    if variant is None:
        otherwise = "Not shown: none of the models given is a DIN."
        why["activation"] = absence(
            sources, "activation_cases", settings.activation_cases, gallery.activates, otherwise
        )
        return None
    if missing := needs(sources, variant, "groups", "convert"):
        why["activation"] = missing
        return None
    most = settings.activation_cases * gallery.CANDIDATES
    chosen = gallery.candidates(sources.predictions[variant], most, gallery.MOST_BARS)
    if chosen.height == 0:
        why["activation"] = "Not shown: no user has a history."
        return None
    weights = weights_of(recipe, sources, variant, chosen)
    train = files.read_json(sources.models[variant] / "settings.json")["train"]
    return Activations(
        variant=variant,
        cases=gallery.choose_activations(weights, settings.activation_cases),
        normalised=train.get("din") == "din-code",
    )


def make_map(recipe: Recipe, sources: Sources, why: dict[str, str]) -> embedding_map.EmbeddingMap | None:
    """Map the ads by what a model has learned of them."""
    settings = recipe.report
    if settings.map_ads and (reason := elsewhere(recipe, sources, "map_variant")):
        why["map"] = reason
        return None
    variant = embedding_map.choose_variant(recipe, fitting(sources)) if settings.map_ads else None
    if variant is None:
        otherwise = "Not shown: none of the models given has embeddings of more than one number."
        why["map"] = absence(sources, "map_ads", settings.map_ads, embedding_map.has_embeddings, otherwise)
        return None
    pictured = looks_at_pictures(sources.models[variant])
    if missing := needs(sources, variant, "groups", "convert", *(["features"] * pictured)):
        why["map"] = missing
        return None
    assert sources.groups is not None
    assert sources.convert is not None
    users = gallery.candidates(sources.predictions[variant], settings.map_users, gallery.MOST_BARS)
    made = embedding_map.make_map(
        sources.models[variant],
        variant,
        sources.predictions[variant],
        sources.groups,
        sources.features if pictured else None,
        sources.convert,
        recipe.predict.split,
        ads=settings.map_ads,
        sample_ids=users["sample_id"].to_list(),
        category=category_feature(recipe, Schema.read(sources.groups)),
    )
    if made is None:
        why["map"] = (
            f"Not shown: it takes {embedding_map.FEWEST} ads, a user with a history, and a model that reads ids or "
            "pictures of ads."
        )
    return made


def make_sheet(
    recipe: Recipe, sources: Sources, thumbnails: gallery.Thumbnails, why: dict[str, str]
) -> contact_sheet.ContactSheet | None:
    """Choose the pictures of the contact sheet; None without vectors, vocabulary and pictures."""
    settings = recipe.report
    missing = [f"--{name}" for name in ("features", "convert", "pictures") if getattr(sources, name) is None]
    if not has_pictures(sources.groups):
        why["sheet"] = no_pictures()
    elif missing:
        why["sheet"] = f"Not shown: it needs {' and '.join(missing)}."
    elif not settings.sheet_queries:
        why["sheet"] = "Not shown: report.sheet_queries is 0."
    if "sheet" in why:
        return None
    assert sources.features is not None
    assert sources.convert is not None
    if not (sources.convert / "vocab" / "image.parquet").is_file():
        why["sheet"] = no_pictures()
        return None
    return contact_sheet.make_sheet(
        sources.features,
        sources.convert,
        thumbnails,
        queries=settings.sheet_queries,
        neighbours=settings.sheet_neighbours,
        seed=settings.sheet_seed,
    )


def main_variant(recipe: Recipe, sources: Sources, metrics: dict[str, Any]) -> str | None:
    """Return the variant whose errors are shown: the gallery's, else, of those with predictions, the best by GAUC."""
    other = elsewhere(recipe, sources, "gallery_variant")
    named = None if other else gallery.choose_variant(recipe, fitting(sources))
    if named in sources.predictions:
        return named
    gauc = {name: metrics["variants"].get(name, {}).get("all", {}).get("gauc") for name in sources.predictions}
    return max(sources.predictions, key=lambda name: gauc[name] or 0.0, default=None)


def make_errors(recipe: Recipe, sources: Sources, metrics: dict[str, Any], why: dict[str, str]) -> Errors | None:
    """Find where the main variant errs, with the ads' pictures and categories."""
    variant = main_variant(recipe, sources, metrics) if recipe.report.surprises else None
    if variant is None:
        reason = "no predictions were given" if recipe.report.surprises else "report.surprises is 0"
        why["errors"] = f"Not shown: {reason}."
        return None
    if reason := unusable(sources.predictions[variant], {"sample_id", "user", "ad", "day", "click", "score"}):
        why["errors"] = reason
        return None
    found = errors_of_models.find(variant, sources.predictions[variant], recipe.report.surprises)
    if found is None:
        why["errors"] = "Not shown: the scores are no probabilities."
        return None
    ads = describe(recipe, sources, pl.concat([found.impressions["ad"], found.ads["ad"]]).unique(maintain_order=True))
    return Errors(
        variant=variant,
        impressions=found.impressions.join(ads, on="ad", how="left", maintain_order="left").to_dicts(),
        ads=found.ads.join(ads, on="ad", how="left", maintain_order="left").to_dicts(),
    )


def describe(recipe: Recipe, sources: Sources, ads: pl.Series) -> pl.DataFrame:
    """Return `ad`, `image` and `category` of ads, text; "" where it is not known."""
    if sources.groups is None or sources.convert is None:
        return pl.DataFrame({"ad": ads}).with_columns(image=pl.lit(""), category=pl.lit(""))
    from ctrkit.scoring import values_of

    schema = Schema.read(sources.groups)
    image, category = next(iter(schema.names(("ad",), "image")), ""), category_feature(recipe, schema)
    known = embedding_map.ad_features(sources.groups, recipe.predict.split, ads, [n for n in (image, category) if n])
    text = {}
    for name, feature, unknown in (("image", image, ""), ("category", category, "unknown")):
        if not feature:
            text[name] = pl.Series(name, [""] * known.height, pl.String)
            continue
        index = embedding_map.scalar(known[feature])
        text[name] = values_of(sources.convert, schema.features[feature].vocab, index, unknown).alias(name)
    return known.select("ad").with_columns(**text)
