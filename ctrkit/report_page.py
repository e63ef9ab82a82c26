"""The report as HTML, drawn from its content and the tables of its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from markupsafe import Markup

from ctrkit import charts, contact_sheet, gallery, metric_tables, page_templates, story
from ctrkit import surprises as errors_of_models
from ctrkit.figures import SHADED, Figure
from ctrkit.metric_tables import UNSEEN
from ctrkit.recipe import Recipe
from ctrkit.report_content import Content
from ctrkit.report_figures import SORTS, gauc_table, shaped_categories, variant_names


def render(recipe: Recipe, content: Content, made: Sequence[Figure]) -> str:
    """Render a report to HTML. Everything that comes from the data is escaped. `made`: from `make_figures`."""
    metrics = content.metrics
    tables = {figure.name: figure.table for figure in made}
    names = variant_names(content)
    trained = [(n, name, charts.swatch(n)) for n, name in enumerate(names) if content.histories.get(name)]
    key = [(n, name, charts.swatch(n)) for n, name in enumerate(names)]
    return page_templates.template("report.html.j2").render(
        recipe=recipe,
        title=recipe.report.title or f"{recipe.name}: click models that look at the pictures",
        content=content,
        metrics=metrics,
        thumbnails=content.thumbnails,
        fmt=metric_tables,
        duration=story.duration,
        tiles=story.tiles(content.data, content.rejects, content.picture_facts, content.stages),
        best=best_variant(metrics),
        unseen=UNSEEN if any(UNSEEN in v["slices"] for v in metrics["variants"].values()) else None,
        gauc_chart=gauc_chart(metrics, None),
        unseen_chart=gauc_chart(metrics, UNSEEN),
        not_drawn=not_drawn(metrics, tables.get("slices")),
        slices=[s for s in metrics["order"]["slices"] if not s.startswith("day=")],
        key=key,
        trained=trained,
        learning=learning_charts(tables, names),
        overfitting=overfitting(tables.get("learning-curves"), names),
        calibration=calibration_charts(tables.get("calibration")),
        slice_charts=slice_charts(tables.get("slices"), names),
        map=map_view(content, tables),
        days_chart=days_chart(tables.get("days")),
        one_day_each="days" in tables and tables["days"].height == content.days.height,  # type: ignore[union-attr]
        split_colours={k: v for k, v in charts.SPLIT_COLOURS.items() if k},
        same=contact_sheet.SAME,
        figures=[figure.name for figure in made],
        kinds=(errors_of_models.UNLIKELY, errors_of_models.LIKELY),
        ad_kinds=(errors_of_models.TOO_HIGH, errors_of_models.TOO_LOW),
        fewest=errors_of_models.FEWEST_IMPRESSIONS,
    )


def best_variant(metrics: dict[str, Any]) -> str | None:
    """Return the variant of the highest GAUC; None where none has one, or there is but one."""
    gauc = {name: v["all"]["gauc"] for name, v in metrics["variants"].items() if v["all"]["gauc"] is not None}
    return max(gauc, key=lambda name: gauc[name]) if len(gauc) > 1 else None


def gauc_chart(metrics: dict[str, Any], slice_name: str | None) -> Markup:
    """Draw each variant's GAUC and its interval over a slice, or over all impressions."""
    order, baseline = metrics["order"]["variants"], None
    rows = []
    for row in gauc_table(metrics, slice_name).iter_rows(named=True):
        name = row["variant"]
        if name == metrics["settings"]["baseline"]:
            baseline = row["gauc"]
        ends = {"value": row["gauc"], "low": row["gauc_low"], "high": row["gauc_high"]}
        rows.append(charts.Whisker(position=order.index(name), name=name, **ends))
    return charts.whiskers(rows, baseline, f"GAUC by variant, {slice_name or 'all impressions'}")


def learning_charts(tables: Mapping[str, pl.DataFrame], names: Sequence[str]) -> dict[str, Any]:
    """Draw the learning curves: one chart of GAUC by variant, one of losses, and a small one of both losses each."""
    table = tables.get("learning-curves")
    if table is None:
        return {}

    def points(name: str, key: str) -> list[tuple[float, float]]:
        rows = table.filter((pl.col("variant") == name) & pl.col(key).is_not_null())
        return list(zip(rows["step"].to_list(), rows[key].to_list(), strict=True))

    def chart(key: str, label: str) -> Markup:
        lines: list[charts.Line | None] = []
        for name in names:
            rows = table.filter((pl.col("variant") == name) & pl.col(key).is_not_null())
            marked = rows["best"].arg_true().to_list() if key == "valid_gauc" else []
            some = points(name, key)
            lines.append(charts.Line(name=name, points=some, marked=marked) if some else None)
        return charts.lines(lines, "step", label)

    losses = pl.concat([table["loss"].rename("l"), table["valid_loss"].rename("l")]).drop_nulls()
    panels = []
    for n, name in enumerate(names):
        train, valid = points(name, "loss"), points(name, "valid_loss")
        if train or valid:
            limits = float(losses.quantile(0.01) or 0), float(losses.quantile(0.99) or 1)
            panels.append((n, name, charts.training_panel(train, valid, limits, f"losses of {name} by step")))
    return {
        "loss": chart("loss", "Training loss by step"),
        "gauc": chart("valid_gauc", "Validation GAUC by step"),
        "panels": panels,
    }


def overfitting(table: pl.DataFrame | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a variant that was validated: its best and its last validation, and the losses at both."""
    out: list[dict[str, Any]] = []
    if table is None:
        return out
    for name in names:
        own = table.filter(pl.col("variant") == name)
        valid = own.filter(pl.col("valid_gauc").is_not_null())
        if valid.height == 0:
            continue
        best, last = valid.filter(pl.col("best")).row(0, named=True), valid.row(-1, named=True)
        train = own["loss"].drop_nulls()
        lowest = valid["valid_loss"].min() if valid["valid_loss"].null_count() < valid.height else None
        rise = last["valid_loss"] - lowest if lowest is not None and last["valid_loss"] is not None else None
        out.append(
            {
                "variant": name,
                "best_step": best["step"],
                "best": best["valid_gauc"],
                "steps": last["step"],
                "last": last["valid_gauc"],
                "train_loss": train[-1] if len(train) else None,
                "valid_loss": last["valid_loss"],
                "rise": rise,
                "validations": valid.height,
            }
        )
    return out


def calibration_charts(table: pl.DataFrame | None) -> list[tuple[str, Markup]]:
    """Draw a panel of observed over predicted rates for each variant, all on one scale."""
    if table is None:
        return []
    top = max(float(table["predicted"].max() or 0), float(table["observed"].max() or 0)) * 1.04 or 1.0  # type: ignore[arg-type]
    out = []
    for part in table.partition_by("variant", maintain_order=True):
        points = list(zip(part["predicted"].to_list(), part["observed"].to_list(), strict=True))
        name = part["variant"][0]
        out.append((name, charts.calibration_panel(points, top, f"observed over predicted click rate of {name}")))
    return out


def not_drawn(metrics: Mapping[str, Any], table: pl.DataFrame | None) -> list[str]:
    """Return the sorts of slices, but for days, that have no chart."""
    sorts = dict.fromkeys(name.partition("=")[0] for name in metrics["order"]["slices"] if not name.startswith("day="))
    drawn = set(table["sort"]) if table is not None else set()
    return [title for title in (SORTS.get(sort, sort) for sort in sorts) if title not in drawn]


def slice_charts(table: pl.DataFrame | None, names: Sequence[str]) -> list[tuple[str, Markup]]:
    """Draw a chart of the GAUC by slice, a line a variant, for each sort of slices."""
    if table is None:
        return []
    limits = float(table["gauc"].min() or 0), float(table["gauc"].max() or 1)  # type: ignore[arg-type]
    out = []
    for part in table.partition_by("sort", maintain_order=True):
        places = part["slice"].unique(maintain_order=True).to_list()
        lines: list[charts.Line | None] = []
        for name in names:
            rows = part.filter((pl.col("variant") == name) & pl.col("gauc").is_not_null())
            points = [(float(places.index(s)), g) for s, g in zip(rows["slice"], rows["gauc"], strict=True)]
            lines.append(charts.Line(name=name, points=points) if points else None)
        shown = [p.partition("=")[2] for p in places]
        if part["sort"][0] == SORTS["unseen_ad"]:
            shown = ["unseen" if s == "true" else "seen" for s in shown]
        shown = shown if len(shown) <= 8 else ["" if n % (-(-len(shown) // 8)) else s for n, s in enumerate(shown)]
        title = part["sort"][0]
        out.append((title, charts.lines(lines, title, f"GAUC by {title}", names=shown, limits=limits)))
    return out


def days_chart(table: pl.DataFrame | None) -> Markup:
    """Draw the impressions of each day."""
    if table is None:
        return Markup("")
    rows = [
        (r["first_day"], float(r["impressions"]), charts.SPLIT_COLOURS[r["split"]]) for r in table.iter_rows(named=True)
    ]
    return charts.columns(rows, "impressions by day")


def map_view(content: Content, tables: Mapping[str, pl.DataFrame]) -> dict[str, Any] | None:
    """Return the map as the page shows it: the chart as the first user sees it, keys, and what the script needs."""
    table, made = tables.get("embedding-map"), content.map
    if table is None or made is None:
        return None
    users, shades = [], []
    for user in made.users:
        ctr = table[f"ctr {user}"]
        low, high = (float(ctr.quantile(q, "linear") or 0) for q in SHADED)
        steps = ((ctr - low) / ((high - low) or 1.0) * (charts.SHADES - 1)).round().clip(0, charts.SHADES - 1)
        shades.append(steps.cast(pl.Int64).to_list())
        users.append({"name": user, "low": f"{low:.3f}", "high": f"{high:.3f}"})
    dots = []
    first = f"ctr {made.users[0]}"
    for n, row in enumerate(table.iter_rows(named=True)):
        name = f"ad {row['ad']}, {row['category'] or 'no category'}: predicted CTR {row[first]:.3f}"
        place = {"x": row["x"], "y": row["y"], "shape": row["shape"], "shade": shades[0][n]}
        dots.append(charts.Dot(name=name, **place))
    sprite = gallery.make_sprite(content.thumbnails, table["image"].to_list())
    shaped = shaped_categories(made)
    script = {
        "users": users,
        "shades": shades,
        "ctr": [[round(c, 4) for c in table[f"ctr {user}"]] for user in made.users],
        "ads": table.select("ad", "category", "impressions").rows(),
        "palette": [charts.shade(n) for n in range(charts.SHADES)],
        "missing": list(sprite.missing) if sprite else [],
        "sprite": {"side": sprite.side, "columns": sprite.columns, "rows": sprite.rows} if sprite else None,
    }
    return {
        "chart": charts.scatter(dots, f"map of {table.height} ads", "map"),
        "users": users,
        "keys": [(charts.shape_key(n), name) for n, name in enumerate(shaped)],
        "others": charts.shape_key(None) if set(table["category"]) - set(shaped) else None,
        "categories": sorted(set(table["category"]) - {""}),
        "palette": script["palette"],
        "sprite": sprite,
        "script": script,
        "ads": table.height,
        "variant": made.variant,
        "parts": ", ".join(made.parts),
    }
