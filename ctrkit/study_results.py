"""What a study comes to: trials.csv, a table, two figures, and best.toml, a recipe."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ctrkit import plot_text, toml_text
from ctrkit.charts import COLOURS
from ctrkit.metric_tables import text_table
from ctrkit.recipe import check_alone, merge, parse_set
from ctrkit.search_space import override
from ctrkit.study import Row

SHOWN = 20
"""Trials in the table that is printed."""
NAMING = ("variants", "tables", "curves", "tune")
"""Tables of a recipe that its best one does not have."""
BEST, UNTUNED = "best", "untuned"
"""The variants of best.toml."""


def by_value(rows: Sequence[Row]) -> list[Row]:
    """Return the trials, complete ones first, the best first; then the pruned ones, then the others, by number."""
    order = ["complete", "pruned"]
    return sorted(rows, key=lambda r: (order.index(r.state) if r.state in order else 2, -(r.value or 0.0), r.number))


def as_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return the trials by number: number, state, recipe (1 for the recipe as it stands), valid_gauc, a column a key
    (lists as JSON), best_step, validations, seconds, and why one failed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "recipe", "valid_gauc", *keys, "best_step", "validations", "seconds", "why"])
    for row in rows:
        values = [_cell(row.values[key]) if key in row.values else "" for key in keys]
        notes = [row.notes.get(name, "") for name in ("best_step", "validations", "seconds", "why")]
        value = "" if row.value is None else row.value
        writer.writerow([row.number, row.state, int(row.notes.get("recipe", False)), value, *values, *notes])
    return out.getvalue()


def table(title: str, rows: Sequence[Row], keys: Sequence[str]) -> Table:
    """Return the best trials as a table."""
    short = [key.rpartition(".")[2] for key in keys]
    named = [name if short.count(name) == 1 else key for name, key in zip(short, keys, strict=True)]
    heads = ["trial", "validation GAUC", "state", *named, "seconds"]
    told = [row for row in by_value(rows) if row.state != "interrupted"]
    return text_table(title, heads, [_cells(row, keys) for row in told[:SHOWN]])


def _cells(row: Row, keys: Sequence[str]) -> list[str]:
    state = row.state
    if row.state == "pruned":
        state = f"pruned (validation {row.notes.get('validations')})"
    elif "same_as" in row.notes:
        state = f"as trial {row.notes['same_as']}"
    recipe = " (the recipe)" if row.notes.get("recipe") else ""
    values = [_short(row.values[key]) if key in row.values else "" for key in keys]
    seconds = f"{row.notes['seconds']:.0f}" if "seconds" in row.notes else ""
    return [f"{row.number}{recipe}", "" if row.value is None else f"{row.value:.4f}", state, *values, seconds]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else _cell(value)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def best_recipe(data: Mapping[str, Any], name: str, best: Row, own: Mapping[str, Any], trials: int) -> str:
    """Return the best trial's recipe as TOML: `data`, a recipe's plain tables, with the trial's values in it; a variant
    `best`, which is just that, and a variant `untuned` with the recipe's own values, to be compared.

    name: of the recipe. trials: how many there were.
    """
    tables = {key: value for key, value in data.items() if key not in NAMING}
    untuned: dict[str, Any] = {}
    for key, value in best.values.items():
        tables = merge(tables, parse_set(override(key, value)))
        if own[key] is not None:
            untuned = merge(untuned, parse_set(override(key, own[key])))
        elif key == "select-clicks.window_days":  # None stands for all
            untuned = merge(untuned, parse_set(override(key, "all")))
    gone = ("variants", "gallery_variant", "activation_variant", "map_variant", "baseline", "compare")
    for table in ("daily", "report", "eval"):
        if isinstance(tables.get(table), Mapping):
            tables[table] = {key: value for key, value in tables[table].items() if key not in gone}
    tables["name"] = name
    tables = merge(tables, {"eval": {"baseline": UNTUNED, "compare": [[BEST, UNTUNED]]}})
    tables["variants"] = {BEST: {}, UNTUNED: untuned}
    check_alone(tables, "best.toml")
    comment = (
        f"# Made by `ctrkit tune`: trial {best.number} of {trials}, validation GAUC {best.value:.6f}.\n"
        "# `untuned` is the recipe as it was. `make DATA=best.toml` or `ctrkit run best.toml` trains and tests both.\n"
    )
    return comment + toml_text.dump(tables)


def draw_history(rows: Sequence[Row], path: Path) -> None:
    """Draw each trial's value by its number, and the best so far, as PNG."""
    complete = [row for row in rows if row.state == "complete" and row.value is not None]
    pruned = [row for row in rows if row.state == "pruned" and row.value is not None]
    with plot_text.any_script():
        figure, axes = _figure(4.2)
        so_far, best = [], float("-inf")
        for row in complete:
            best = max(best, row.value or best)
            so_far.append(best)
        numbers = [row.number for row in complete]
        axes.step(numbers, so_far, where="post", color=COLOURS[0], lw=1.4, label="best so far")
        axes.plot(numbers, [row.value for row in complete], "o", color=COLOURS[0], markersize=5, label="complete")
        if pruned:
            last = [row.value for row in pruned]
            axes.plot(
                [row.number for row in pruned], last, "x", color=COLOURS[1], markersize=5, label="pruned, last value"
            )
        for row in complete:
            if row.notes.get("recipe"):
                axes.axhline(row.value, color=COLOURS[6], lw=1, ls=":", label="the recipe as it is")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("trial")
        axes.set_ylabel("validation GAUC")
        axes.grid(color="#dfe4ea", lw=0.6)
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def draw_importances(importances: Mapping[str, float], complete: int, path: Path) -> None:
    """Draw the share of the values' variance that each key explains, as PNG."""
    keys = sorted(importances, key=lambda key: importances[key])
    with plot_text.any_script():
        figure, axes = _figure(1.4 + 0.35 * len(keys))
        axes.barh(range(len(keys)), [importances[key] for key in keys], color=COLOURS[0], height=0.6)
        axes.set_yticks(range(len(keys)), keys, fontsize=8, parse_math=False)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"share of the variance of validation GAUC (fANOVA, {complete} complete trials)")
        axes.grid(axis="x", color="#dfe4ea", lw=0.6)
        axes.set_axisbelow(True)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
