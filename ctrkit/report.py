"""The report: one HTML file that holds everything it shows, so that people look rather than read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import polars as pl
from markupsafe import Markup

from ctrkit import charts, contact_sheet, files, gallery, metric_tables, page_templates
from ctrkit.curves import read_history
from ctrkit.errors import UserError
from ctrkit.metric_tables import UNSEEN
from ctrkit.recipe import Recipe

SPLITS = ("train", "valid", "test")
PART = 1 << 20
"""Pictures of features.h5 whose rows are in memory at a time."""


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
    thumbnails: gallery.Thumbnails


def make_report(recipe: Recipe, sources: Sources) -> str:
    """Return the report as HTML. Raises UserError for a file that is not what it should be."""
    metrics = read_metrics(sources.metrics)
    thumbnails = gallery.Thumbnails(sources.pictures, recipe.extract_images)
    return render(
        recipe,
        metrics,
        data=data_facts(sources.convert) if sources.convert else [],
        rejects=rejects(sources.convert) if sources.convert else [],
        picture_facts=picture_facts(sources.features) if sources.features else [],
        histories={name: read_history(model) for name, model in sources.models.items()},
        shown=make_gallery(recipe, sources, thumbnails),
        sheet=make_sheet(recipe, sources, thumbnails),
        stages=stage_seconds(sources),
    )


def render(
    recipe: Recipe,
    metrics: dict[str, Any],
    *,
    data: Sequence[dict[str, Any]] = (),
    rejects: Sequence[tuple[str, int]] = (),
    picture_facts: Sequence[tuple[str, str]] = (),
    histories: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    shown: Gallery | None = None,
    sheet: contact_sheet.ContactSheet | None = None,
    stages: Sequence[tuple[str, float]] = (),
) -> str:
    """Render plain data to HTML. Everything that comes from the data is escaped."""
    histories = histories or {}
    order = metrics["order"]["variants"]
    names = [*order, *(name for name in histories if name not in order)]
    return page_templates.template("report.html.j2").render(
        recipe=recipe,
        title=recipe.report.title or f"{recipe.name}: click models that look at the pictures",
        metrics=metrics,
        fmt=metric_tables,
        unseen=UNSEEN if any(UNSEEN in v["slices"] for v in metrics["variants"].values()) else None,
        gauc_chart=gauc_chart(metrics, None),
        unseen_chart=gauc_chart(metrics, UNSEEN),
        slices=[s for s in metrics["order"]["slices"] if not s.startswith("day=")],
        data=data,
        rejects=rejects,
        picture_facts=picture_facts,
        names=[(name, charts.swatch(position)) for position, name in enumerate(names) if histories.get(name)],
        loss_chart=curve(names, histories, "loss", "Training loss by step"),
        valid_chart=curve(names, histories, "valid_gauc", "Validation GAUC by step"),
        gallery=shown,
        sheet=sheet,
        same=contact_sheet.SAME,
        stages=stages,
    )


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics.json that eval wrote."""
    metrics = files.read_json(path)
    if not isinstance(metrics, dict) or not {"settings", "order", "variants", "comparisons"} <= metrics.keys():
        raise UserError(f"{path} is not a metrics.json; write one with: ctrkit eval --gauc FILE... --json {path}")
    return metrics


def gauc_chart(metrics: dict[str, Any], slice_name: str | None) -> Markup:
    """Draw each variant's GAUC and its interval over a slice, or over all impressions."""
    rows, baseline = [], None
    for position, name in enumerate(metrics["order"]["variants"]):
        variant = metrics["variants"][name]
        one = variant["all"] if slice_name is None else variant["slices"].get(slice_name)
        if one is None or one["gauc"] is None:
            continue
        if name == metrics["settings"]["baseline"]:
            baseline = one["gauc"]
        rows.append(
            charts.Whisker(position=position, name=name, value=one["gauc"], low=one["gauc_low"], high=one["gauc_high"])
        )
    return charts.whiskers(rows, baseline, f"GAUC by variant, {slice_name or 'all impressions'}")


def curve(names: Sequence[str], histories: Mapping[str, Sequence[dict[str, Any]]], key: str, label: str) -> Markup:
    """Draw one number of the histories by step, a line a variant."""
    rows: list[charts.Line | None] = []
    for name in names:
        points = [(e["step"], e[key]) for e in histories.get(name, ()) if e.get(key) is not None]
        rows.append(charts.Line(name=name, points=points) if points else None)
    return charts.lines(rows, "step", label)


def data_facts(convert: Path) -> list[dict[str, Any]]:
    """Return a row a split of the samples that convert wrote, and one for all: counts of what is in it."""
    days = files.read_json(convert / "split.json")
    split_of = {day: split for split in SPLITS for day in days[split]}
    counted = (
        pl.scan_parquet(convert / "samples" / "*" / "*.parquet", hive_partitioning=True, try_parse_hive_dates=False)
        .select("day", "user", "ad", "click", "unseen_ad")
        .with_columns(split=pl.col("day").cast(pl.String).replace_strict(split_of, default=None))
        .filter(pl.col("split").is_not_null())
    )
    what = {
        "days": pl.col("day").n_unique(),
        "impressions": pl.len(),
        "clicks": pl.col("click").sum().cast(pl.Int64),
        "users": pl.col("user").n_unique(),
        "ads": pl.col("ad").n_unique(),
        "unseen": pl.col("unseen_ad").mean(),
    }
    by_split = {row["split"]: row for row in counted.group_by("split").agg(**what).collect().to_dicts()}
    rows = [by_split[split] for split in SPLITS if split in by_split]
    return [*rows, {"split": "all", **counted.select(**what).collect().row(0, named=True)}]


def rejects(convert: Path) -> list[tuple[str, int]]:
    """Return why convert rejected rows, and how many, most first."""
    counted = pl.scan_parquet(convert / "rejects.parquet").group_by("reason").agg(rows=pl.len())
    return list(counted.sort(["rows", "reason"], descending=[True, False]).collect().iter_rows())


def picture_facts(features: Path) -> list[tuple[str, str]]:
    """Return what features.h5 says of its pictures and of the network, as names and values."""
    try:
        with h5py.File(features) as f:
            vectors, pictures, attributes = f["features"].shape, len(f["row"]), dict(f.attrs)
            missing = sum(int((f["row"][n : n + PART] < 0).sum()) for n in range(0, pictures, PART))
    except (OSError, KeyError) as e:
        raise UserError(f"{features} is not a features.h5 of ctrkit extract-images: {e}") from None

    def name(attribute: str) -> str:
        return str(attributes.get(attribute, "unknown"))

    weights = name("weights")
    if weights.startswith("random"):
        weights += ": an untrained network, which sees colours and textures but knows no objects"
    return [
        ("Pictures", f"{pictures:,}, of these {missing:,} missing or unreadable"),
        ("Distinct pictures", f"{vectors[0]:,}"),
        ("Network", f"{name('backbone')}, layer {name('layer')}, {vectors[1]:,} numbers a picture"),
        ("Weights", weights),
    ]


def stage_seconds(sources: Sources) -> list[tuple[str, float]]:
    """Return what the sidecars say each output took to make, in seconds."""
    found = []
    for name, path in sources.named().items():
        if path is None or not files.sidecar_path(path).is_file():
            continue
        sidecar = files.read_json(files.sidecar_path(path))
        variant = name.partition(" ")[2]
        found.append((f"{sidecar['stage']} {variant}".rstrip(), float(sidecar["seconds"])))
    return found


def make_sheet(recipe: Recipe, sources: Sources, thumbnails: gallery.Thumbnails) -> contact_sheet.ContactSheet | None:
    """Choose the pictures of the contact sheet; None without vectors, vocabulary and pictures."""
    settings = recipe.report
    if not settings.sheet_queries or sources.features is None or sources.convert is None or sources.pictures is None:
        return None
    if not (sources.convert / "vocab" / "image.parquet").is_file():
        return None
    return contact_sheet.make_sheet(
        sources.features,
        sources.convert,
        thumbnails,
        queries=settings.sheet_queries,
        neighbours=settings.sheet_neighbours,
        seed=settings.sheet_seed,
    )


def make_gallery(recipe: Recipe, sources: Sources, thumbnails: gallery.Thumbnails) -> Gallery | None:
    """Choose the cases and read their attention weights; None without a model that attends to pictures."""
    settings = recipe.report
    variant = gallery.choose_variant(recipe, sources.models) if settings.gallery_cases else None
    if variant is None or variant not in sources.predictions:
        return None
    if sources.groups is None or sources.features is None or sources.convert is None:
        return None
    from ctrkit.scoring import attention_weights  # brings in torch, which only a gallery needs

    chosen = gallery.candidates(sources.predictions[variant], settings.gallery_cases, settings.gallery_pictures)
    weights = attention_weights(
        sources.models[variant],
        sources.groups,
        sources.features,
        sources.convert,
        recipe.predict.split,
        chosen,
    )
    return Gallery(
        variant=variant,
        cases=gallery.choose_cases(weights, settings.gallery_cases, settings.gallery_pictures),
        looked_at=len(chosen),
        thumbnails=thumbnails,
    )
