"""The report's figures as files: `NAME.csv`, the numbers that are drawn, and `NAME.png`. The same numbers give the same
bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ctrkit import plot_text
from ctrkit.charts import COLOURS, INK, MARKERS, OTHER_MARKER, RULE, SCALE, SOFT, SPLIT_COLOURS
from ctrkit.gallery import Thumbnails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SHADED = (0.02, 0.98)
"""Quantiles of the click probabilities at the ends of the map's scale."""
STYLES = ("-", "--", ":", "-.")
PLACE = 72
"""Pixels of a picture's side in figures of pictures."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure: its numbers and how they are drawn."""

    name: str
    title: str
    table: pl.DataFrame
    draw: "Callable[[Canvas, pl.DataFrame], None]"
    size: tuple[float, float] = (7.2, 4.2)
    """Inches."""


def write(figures: Sequence[Figure], folder: Path) -> None:
    """Write each figure's CSV and PNG into a folder that is there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    for figure in figures:
        figure.table.write_csv(folder / f"{figure.name}.csv")
        of_pictures = isinstance(figure.draw, partial) and figure.draw.func is picture_rows  # these place themselves
        canvas = Canvas(figsize=figure.size, layout=None if of_pictures else "constrained")
        FigureCanvasAgg(canvas)
        with plot_text.any_script():
            figure.draw(canvas, figure.table)
            # Text of the data is no mathematics.
            canvas.suptitle(figure.title, fontsize=11, parse_math=False)
            canvas.savefig(folder / f"{figure.name}.png", format="png", dpi=120, metadata={"Software": None})


def whiskers(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `gauc` with its interval, a row a `variant`."""
    axes = canvas.add_subplot()
    for n, row in enumerate(table.iter_rows(named=True)):
        colour = COLOURS[n % len(COLOURS)]
        axes.plot([row["gauc"]], [n], "o", color=colour)
        if row["gauc_low"] is not None:
            axes.plot([row["gauc_low"], row["gauc_high"]], [n, n], "-|", color=colour, lw=1.6)
    _names(axes, table["variant"].to_list())
    axes.set_xlabel("GAUC")
    _plain(axes)


def horizontal_bars(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `seconds`, a bar a `stage`."""
    axes = canvas.add_subplot()
    axes.barh(range(table.height), table["seconds"].to_list(), color=COLOURS[0])
    _names(axes, table["stage"].to_list())
    axes.set_xlabel("seconds")
    _plain(axes)


def learning_curves(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `loss`, `valid_loss` and `valid_gauc` by `step`, a line a `variant`; a ring around the best GAUC."""
    names = table["variant"].unique(maintain_order=True).to_list()
    all_axes = canvas.subplots(1, 3)
    for axes, key, label in zip(
        all_axes,
        ("loss", "valid_loss", "valid_gauc"),
        ("training loss", "validation loss", "validation GAUC"),
        strict=True,
    ):
        for n, name in enumerate(names):
            rows = table.filter((pl.col("variant") == name) & pl.col(key).is_not_null())
            look = {"color": COLOURS[n % len(COLOURS)], "linestyle": STYLES[n // len(COLOURS) % len(STYLES)]}
            axes.plot(rows["step"].to_list(), rows[key].to_list(), marker=".", markersize=4, lw=1.3, **look)
            best = rows.filter(pl.col("best")) if key == "valid_gauc" else rows.clear()
            axes.plot(best["step"].to_list(), best[key].to_list(), "o", mfc="none", mec=look["color"], markersize=9)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("step")
        _plain(axes)
    _legend(canvas, all_axes[0].get_lines()[::2], names)


def calibration(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `observed` over `predicted`, a panel a `variant`, with the diagonal."""
    parts = table.partition_by("variant", maintain_order=True)
    top = float(np.max(table.select("predicted", "observed").to_numpy())) * 1.05
    across = min(4, len(parts))
    for n, part in enumerate(parts):
        axes = canvas.add_subplot(math.ceil(len(parts) / across), across, n + 1)
        axes.plot([0, top], [0, top], "--", color=SOFT, lw=0.8)
        axes.plot(part["predicted"].to_list(), part["observed"].to_list(), ".-", color=COLOURS[0], lw=1)
        axes.set_title(_short(part["variant"][0], 30), fontsize=7, parse_math=False)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=6)
        _plain(axes)
    canvas.supxlabel("predicted click rate", fontsize=8)
    canvas.supylabel("observed click rate", fontsize=8)


def slices(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `gauc` by `slice`, a line a `variant`, a panel for each sort of slices."""
    names = table["variant"].unique(maintain_order=True).to_list()
    sorts = table.partition_by("sort", maintain_order=True)
    all_axes = np.atleast_1d(canvas.subplots(1, len(sorts), sharey=True))
    for axes, part in zip(all_axes, sorts, strict=True):
        places = part["slice"].unique(maintain_order=True).to_list()
        for n, name in enumerate(names):
            rows = part.filter((pl.col("variant") == name) & pl.col("gauc").is_not_null())
            look = {"color": COLOURS[n % len(COLOURS)], "linestyle": STYLES[n // len(COLOURS) % len(STYLES)]}
            axes.plot(
                [places.index(s) for s in rows["slice"]], rows["gauc"].to_list(), marker="o", ms=3.5, lw=1.2, **look
            )
        axes.set_xticks(range(len(places)), [_short(p.partition("=")[2] or p, 12) for p in places], fontsize=7)
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.set_title(part["sort"][0], fontsize=9, parse_math=False)
        _plain(axes)
    all_axes[0].set_ylabel("GAUC")
    _legend(canvas, all_axes[0].get_lines(), names)


def day_columns(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `impressions` by `first_day`, coloured by `split`, and the click rate as a line."""
    axes = canvas.add_subplot()
    colours = [SPLIT_COLOURS[s] for s in table["split"]]
    axes.bar(range(table.height), table["impressions"].to_list(), color=colours)
    step = max(1, table.height // 8)
    axes.set_xticks(range(0, table.height, step), table["first_day"].to_list()[::step], fontsize=7)
    axes.set_ylabel("impressions")
    _plain(axes)
    rates = axes.twinx()
    rates.plot(range(table.height), table["click_rate"].to_list(), ".-", color=INK, lw=1)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("click rate (line)")
    for side in ("top", "left"):
        rates.spines[side].set_visible(False)


def embedding_map(canvas: "Canvas", table: pl.DataFrame) -> None:
    """Draw `x` and `y`, shapes by `shape`, colours by the click probability, a panel a user (columns `ctr USER`)."""
    from matplotlib.colors import LinearSegmentedColormap

    users = [c for c in table.columns if c.startswith("ctr ")]
    keys: dict[str, Any] = {}
    for n, user in enumerate(users):
        axes = canvas.add_subplot(1, len(users), n + 1)
        low, high = (table[user].quantile(q, "linear") for q in SHADED)
        drawn = None
        for (shape,), part in table.group_by("shape", maintain_order=True):
            marker = OTHER_MARKER if shape is None else MARKERS[int(shape)]
            drawn = axes.scatter(
                part["x"].to_list(),
                part["y"].to_list(),
                c=part[user].to_list(),
                marker=marker,
                s=16,
                vmin=low,
                vmax=high,
                cmap=LinearSegmentedColormap.from_list("scale", SCALE),
                linewidths=0,
            )
            keys.setdefault("other categories" if shape is None else part["category"][0], drawn)
        axes.set_title(_short(f"user {user.removeprefix('ctr ')}", 30), fontsize=8, parse_math=False)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        if drawn is not None:
            canvas.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.8, label="predicted CTR", pad=0.02)
    _legend(canvas, list(keys.values()), [name or "no category" for name in keys], 5)


def picture_rows(
    canvas: "Canvas",
    table: pl.DataFrame,
    *,
    thumbnails: Thumbnails,
    by: Sequence[str],
    head: Callable[[dict[str, object]], str],
    value: Callable[[dict[str, object]], str],
    lead: str = "",
) -> None:
    """Draw pictures in rows: a row for each run of equal `by`, with `head` to its left and `value` under each picture.

    lead: a column with the picture that comes first in a row; "": none.
    """
    runs = [list(run) for _, run in groupby(table.iter_rows(named=True), key=lambda r: tuple(r[b] for b in by))]
    first, gap = (1 if lead else 0), 22
    across = max([len(run) for run in runs], default=1) + first
    pitch, left = PLACE + gap, 170
    sheet = np.full((max(1, len(runs)) * pitch, left + across * pitch, 3), 255, np.uint8)
    axes = canvas.add_axes((0, 0, 1, 0.955))
    small: dict[str, Any] = {"fontsize": 6, "parse_math": False, "color": INK}
    for y, run in enumerate(runs):
        shown = [(str(run[0][lead]), "")] if lead else []
        shown += [(str(row["image"] or ""), value(row)) for row in run]
        axes.text(4, y * pitch + PLACE / 2, head(run[0]), va="center", **small)
        for x, (image, text) in enumerate(shown):
            top, side = y * pitch, left + x * pitch
            picture = thumbnails.picture(image)
            box = (slice(top, top + PLACE), slice(side, side + PLACE))
            sheet[box] = 240 if picture is None else np.asarray(picture.convert("RGB").resize((PLACE, PLACE)))
            axes.text(side + PLACE / 2, top + PLACE + 2, text, ha="center", va="top", **small)
    axes.imshow(sheet)
    axes.set_axis_off()


def rows_size(rows: int, across: int) -> tuple[float, float]:
    """Return the size of a figure of pictures, in inches."""
    return (170 + across * (PLACE + 22)) / 120, max(1, rows) * (PLACE + 22) / 120 + 0.5


def activation_bars(canvas: "Canvas", table: pl.DataFrame, *, thumbnails: Thumbnails) -> None:
    """Draw `weight` by `place`, a panel a `case`, with the behaviours' pictures under the bars."""
    parts = table.partition_by("case", maintain_order=True)
    for n, part in enumerate(parts):
        axes = canvas.add_subplot(len(parts), 1, n + 1)
        axes.bar(range(part.height), part["weight"].to_list(), color=COLOURS[0], width=0.6)
        names = [_short(name or "", 10) for name in part["name"]]
        axes.set_xticks(range(part.height), names, fontsize=6, rotation=30, ha="right")
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
        first = part.row(0, named=True)
        what = "clicked" if first["click"] else "not clicked"
        text = f"ad {first['ad']} {first['category']}, {what}, score {first['score']:.3f}"
        axes.set_title(_short(text, 90), fontsize=7, loc="left", parse_math=False)
        axes.tick_params(axis="y", labelsize=6)
        _plain(axes)
        pictures = [thumbnails.picture(image or "") for image in part["image"]]
        _pictures_above(axes, pictures)


def _pictures_above(axes: "Axes", pictures: Sequence[object]) -> None:
    """Put pictures over the columns 0, 1, … of a plot."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    if not any(pictures):
        return
    top = axes.get_ylim()[1]
    axes.set_ylim(top=top + (top - axes.get_ylim()[0]) * 0.45)
    for place, picture in enumerate(pictures):
        if picture is not None:
            box = OffsetImage(np.asarray(picture), zoom=0.24)
            axes.add_artist(AnnotationBbox(box, (place, top), frameon=False, box_alignment=(0.5, 0.0)))


def _names(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name, 40) for name in names], fontsize=7)
    axes.invert_yaxis()


def _legend(canvas: "Canvas", lines: Sequence[object], names: Sequence[str], across: int = 3) -> None:
    legend = canvas.legend(lines, names, loc="outside lower center", ncols=across, fontsize=7, frameon=False)  # type: ignore[call-overload]
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain(axes: "Axes") -> None:
    axes.grid(color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        text.set_parse_math(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
