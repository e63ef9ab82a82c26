"""The report's figures as tables of numbers, which the page and `ctrkit.figures` draw."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import polars as pl

from ctrkit import charts, contact_sheet, embedding_map, figures
from ctrkit.figures import Figure
from ctrkit.metric_tables import FEW, UNSEEN
from ctrkit.report_content import Activations, Content, Gallery

MOST_POINTS = 400
"""Training losses of a variant that are drawn."""
MOST_COLUMNS = 90
"""Columns of the chart of days."""
SORTS = {"unseen_ad": "ads seen in training or not", "history": "behaviours in the history", "day": "day"}
"""Sort of slices → its title."""


def make_figures(content: Content) -> list[Figure]:
    """Return the figures of a report, those that its content has."""
    metrics, thumbnails = content.metrics, content.thumbnails
    made = [Figure(name="gauc", title="GAUC, all impressions", table=gauc_table(metrics, None), draw=figures.whiskers)]
    if any(UNSEEN in v["slices"] for v in metrics["variants"].values()):
        table, title = gauc_table(metrics, UNSEEN), "GAUC, ads unseen in training"
        made.append(Figure(name="gauc-unseen-ads", title=title, table=table, draw=figures.whiskers))
    if (table := history_table(content)).height:
        draw, size = figures.learning_curves, (10.5, 4.6)
        made.append(Figure(name="learning-curves", title="Learning curves", table=table, draw=draw, size=size))
    if (table := calibration_table(metrics)).height:
        size = (8.0, 0.6 + 2.1 * -(-len(metrics["variants"]) // 4))
        made.append(Figure(name="calibration", title="Calibration", table=table, draw=figures.calibration, size=size))
    if (table := slice_table(metrics)).height:
        made.append(Figure(name="slices", title="GAUC by slice", table=table, draw=figures.slices, size=(9.5, 4.6)))
    if content.attention and content.attention.cases:
        table = attention_table(content.attention)
        draw = partial(
            figures.picture_rows,
            thumbnails=thumbnails,
            by=("case", "row"),
            head=lambda r: f"{r['row']} weights\nad {r['ad']}"[:60] + f"\n{r['category']}",
            value=lambda r: f"{r['weight']:.3f}",
            lead="ad_image",
        )
        rows, across = table.n_unique(["case", "row"]), table["rank"].max() or 1
        size = figures.rows_size(rows, int(across) + 1)  # type: ignore[arg-type]
        title = f"Attention of {content.attention.variant}"
        made.append(Figure(name="attention", title=title, table=table, draw=draw, size=size))
    if content.activation and content.activation.cases:
        table = activation_table(content.activation)
        draw = partial(figures.activation_bars, thumbnails=thumbnails)
        size, title = (9.5, 0.5 + 2.1 * len(content.activation.cases)), f"Activation of {content.activation.variant}"
        made.append(Figure(name="activation", title=title, table=table, draw=draw, size=size))
    if content.map:
        table, size = map_table(content.map), (4.2 * len(content.map.users), 4.9)
        title = f"Ads as {content.map.variant} sees them, t-SNE"
        made.append(Figure(name="embedding-map", title=title, table=table, draw=figures.embedding_map, size=size))
    if content.sheet and content.sheet.queries:
        table = neighbour_table(content.sheet)
        draw = partial(
            figures.picture_rows,
            thumbnails=thumbnails,
            by=("query",),
            head=lambda r: str(r["query"])[:28],
            value=lambda r: f"{r['cosine']:.3f}",
            lead="query",
        )
        size = figures.rows_size(len(content.sheet.queries), 1 + max(len(q.neighbours) for q in content.sheet.queries))
        made.append(Figure(name="neighbours", title="Pictures alike", table=table, draw=draw, size=size))
    if content.errors:
        of = content.errors.variant
        for name, title, kept, head, value in (
            (
                "surprises",
                f"Most surprising impressions of {of}",
                content.errors.impressions,
                lambda r: str(r["kind"]).replace(", ", ",\n"),
                lambda r: f"{r['score']:.3f}",
            ),
            (
                "calibration-by-ad",
                f"Ads on which {of} is worst calibrated: predicted / observed clicks",
                content.errors.ads,
                lambda r: str(r["kind"]),
                lambda r: f"{r['predicted']:.1f} / {r['clicks']}",
            ),
        ):
            if kept:
                table = pl.DataFrame(kept, infer_schema_length=None)
                draw = partial(figures.picture_rows, thumbnails=thumbnails, by=("kind",), head=head, value=value)
                size = figures.rows_size(2, max(3, (table.height + 1) // 2))
                made.append(Figure(name=name, title=title, table=table, draw=draw, size=size))
    if content.days is not None and content.days.height:
        table = day_table(content.days)
        made.append(
            Figure(name="days", title="Impressions by day", table=table, draw=figures.day_columns, size=(7.2, 3))
        )
    if content.stages:
        table = pl.DataFrame(list(content.stages), schema=["stage", "seconds"], orient="row")
        size = (7.2, 0.8 + 0.2 * table.height)
        made.append(Figure(name="time", title="Time by stage", table=table, draw=figures.horizontal_bars, size=size))
    return made


def gauc_table(metrics: dict[str, Any], slice_name: str | None) -> pl.DataFrame:
    """Return each variant's GAUC over a slice, or over all impressions, with interval, gain and R-GAUC."""
    keys = ("gauc", "gauc_low", "gauc_high", "gain", "gain_low", "gain_high", "r_gauc")
    rows = []
    for name in metrics["order"]["variants"]:
        variant = metrics["variants"][name]
        one = variant["all"] if slice_name is None else variant["slices"].get(slice_name)
        if one is not None and one["gauc"] is not None:
            rows.append({"variant": name, **{key: one[key] for key in keys}})
    return pl.DataFrame(rows, schema={"variant": pl.String, **dict.fromkeys(keys, pl.Float64)})


def variant_names(content: Content) -> list[str]:
    """Return the variants in the order of their colours: those of the metrics, then other models."""
    order: list[str] = content.metrics["order"]["variants"]
    return [*order, *(name for name in content.histories if name not in order)]


def history_table(content: Content) -> pl.DataFrame:
    """Return the learning curves, a row a line of metrics.jsonl that is drawn. `loss` is the training loss since the
    line before (of very long trainings, the mean of several); `best` marks the validation of the highest GAUC, whose
    model is kept."""
    schema = {
        "variant": pl.String,
        "step": pl.Int64,
        "epoch": pl.Int64,
        "samples": pl.Int64,
        "loss": pl.Float64,
        "valid_loss": pl.Float64,
        "valid_gauc": pl.Float64,
        "best": pl.Boolean,
    }
    rows = []
    for name in variant_names(content):
        lines = content.histories.get(name, ())
        between = thinned([line for line in lines if "valid_gauc" not in line])
        lines = sorted([*between, *(line for line in lines if "valid_gauc" in line)], key=lambda line: line["step"])
        gaucs = [line["valid_gauc"] for line in lines if line.get("valid_gauc") is not None]
        best = max(gaucs, default=None)
        for line in lines:
            row = {"variant": name, **{key: line.get(key) for key in schema if key in line}, "best": False}
            if "valid_gauc" in line:
                row["best"] = best is not None and line["valid_gauc"] == best
                best = None if row["best"] else best
                if len(between) > 1:  # the finer curve is drawn
                    row["loss"] = None
            rows.append(row)
    return pl.DataFrame(rows, schema=schema)


def thinned(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines of training loss, where there are more than `MOST_POINTS` means of as many consecutive ones each."""
    at_once = -(-len(lines) // MOST_POINTS) or 1
    runs = [lines[n : n + at_once] for n in range(0, len(lines), at_once)]
    return [run[-1] | {"loss": sum(line["loss"] for line in run) / len(run)} for run in runs]


def calibration_table(metrics: dict[str, Any]) -> pl.DataFrame:
    """Return the bins of the calibration error of each variant that has them."""
    rows = [
        {"variant": name, "bin": n + 1, **one}
        for name in metrics["order"]["variants"]
        for n, one in enumerate(metrics["variants"][name].get("calibration_bins") or [])
    ]
    numbers = {"bin": pl.Int64, "impressions": pl.Int64, "predicted": pl.Float64, "observed": pl.Float64}
    return pl.DataFrame(rows, schema={"variant": pl.String, **numbers})


def slice_table(metrics: dict[str, Any]) -> pl.DataFrame:
    """Return the GAUC of each variant over each slice with `FEW` users or more (over all slices, in a run so small
    that none has as many). A sort of a single slice is left out."""
    schema = {"sort": pl.String, "slice": pl.String, "variant": pl.String, "impressions": pl.Int64}
    schema |= {"users_kept": pl.Int64, **dict.fromkeys(("gauc", "gauc_low", "gauc_high"), pl.Float64)}
    by_sort: dict[str, list[str]] = {}
    for name in metrics["order"]["slices"]:
        by_sort.setdefault(name.partition("=")[0], []).append(name)
    rows = []
    for sort, some in by_sort.items():
        for name in some if len(some) > 1 else ():
            for variant in metrics["order"]["variants"]:
                one = metrics["variants"][variant]["slices"].get(name)
                if one is not None:
                    own = {"sort": SORTS.get(sort, sort), "slice": name, "variant": variant}
                    rows.append(own | {key: one[key] for key in schema if key in one})
    table, several = pl.DataFrame(rows, schema=schema), pl.col("slice").n_unique().over("sort") > 1
    many = table.filter(pl.col("users_kept") >= FEW).filter(several)
    return many if many.height else table.filter(several)


def attention_table(shown: Gallery) -> pl.DataFrame:
    """Return the pictures of the gallery, a row each."""
    rows = []
    for n, case in enumerate(shown.cases):
        own = {f.name: getattr(case, f.name) for f in fields(case) if f.name not in ("highest", "lowest")}
        for name, row in (("highest", case.highest), ("lowest", case.lowest)):
            for rank, b in enumerate(row):
                rows.append({"case": n + 1, **own, "row": name, "rank": rank + 1, "image": b.image, "weight": b.weight})
    return pl.DataFrame(rows, infer_schema_length=None)


def activation_table(shown: Activations) -> pl.DataFrame:
    """Return the bars of the activations, a row each; `place` counts from the oldest that is shown."""
    rows = []
    for n, case in enumerate(shown.cases):
        own = {f.name: getattr(case, f.name) for f in fields(case) if f.name != "behaviours"}
        for place, b in enumerate(case.behaviours):
            one = {"place": place + 1, "name": b.name, "image": b.image, "weight": b.weight}
            rows.append({"case": n + 1, **own, **one})
    return pl.DataFrame(rows, infer_schema_length=None)


def map_table(made: embedding_map.EmbeddingMap) -> pl.DataFrame:
    """Return the map's points: the ad, its category and `shape` (null: the small dot), place and CTR by user."""
    shape = {name: n for n, name in enumerate(shaped_categories(made))}
    shapes = pl.Series("shape", [shape.get(c) for c in made.ads["category"]], pl.Int64)
    table = made.ads.with_columns(shapes, pl.col("x", "y").round(4))
    names = {f"score_{n}": f"ctr {user}" for n, user in enumerate(made.users)}
    return table.select("ad", "image", "category", "shape", "impressions", "x", "y", *names).rename(names)


def shaped_categories(made: embedding_map.EmbeddingMap) -> list[str]:
    """Return the categories that have a shape of their own on the map: those of most ads."""
    counts = made.ads.filter(pl.col("category") != "").group_by("category").len()
    names: list[str] = counts.sort(["len", "category"], descending=[True, False])["category"].to_list()
    return names[: len(charts.SHAPES)]


def day_table(days: pl.DataFrame) -> pl.DataFrame:
    """Return impressions, clicks and click rate by day; where there are more than `MOST_COLUMNS`, by runs of as many
    days with samples each, from `first_day` to `last_day`, none across two splits."""
    at_once = -(-days.height // MOST_COLUMNS)
    run = pl.int_range(pl.len()).over("split") // at_once
    summed = days.group_by(run.alias("run"), "split", maintain_order=True).agg(
        first_day=pl.col("day").first(),
        last_day=pl.col("day").last(),
        impressions=pl.col("impressions").sum(),
        clicks=pl.col("clicks").sum(),
    )
    rate = pl.col("clicks") / pl.col("impressions")
    return summed.select("first_day", "last_day", "split", "impressions", "clicks", click_rate=rate)


def neighbour_table(sheet: contact_sheet.ContactSheet) -> pl.DataFrame:
    """Return the contact sheet, a row a neighbour."""
    schema = {"query": pl.String, "count": pl.Int64, "rank": pl.Int64, "image": pl.String, "cosine": pl.Float64}
    rows = [
        (q.image, q.count, rank + 1, n.image, n.similarity)
        for q in sheet.queries
        for rank, n in enumerate(q.neighbours)
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")
