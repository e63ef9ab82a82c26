"""Validation GAUC by step, a line a variant, as the papers' figures show it: CSV, PNG, who gets there first."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrkit import plot_text
from ctrkit.charts import COLOURS
from ctrkit.errors import UserError
from ctrkit.recipe import PaperCurves

Points = list[dict[str, Any]]
"""The evaluations of a training, in order: `step`, `epoch`, `valid_gauc`, `valid_loss`, …"""
LINES = ("-", "--", ":", "-.")
COUNTS = ("step", "epoch", "samples")
COLUMNS = (*COUNTS, "loss", "valid_loss", "valid_gauc")


def make_curves(name: str, figure: PaperCurves, models: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Write `NAME.csv` and `NAME.png` of a figure into a folder; return what tables.json says of it.

    Raises UserError for a model that was not validated while it was trained.
    """
    points = {row.variant: read_points(models[row.variant], row.variant) for row in figure.rows}
    label = {row.variant: row.label or row.variant for row in figure.rows}
    (folder / f"{name}.csv").write_text(as_csv(points, label), encoding="utf-8")
    title = figure.title or name
    draw([(label[v], some) for v, some in points.items()], title, folder / f"{name}.png")
    best = {}
    for variant, some in points.items():
        at = max(some, key=lambda p: p["valid_gauc"])
        best[variant] = {
            "label": label[variant],
            "step": at["step"],
            "valid_gauc": at["valid_gauc"],
            "last": some[-1]["valid_gauc"],
            "steps": some[-1]["step"],
        }
    return {
        "title": title,
        "note": figure.note,
        "best": best,
        "reach": [reach(points, label, fast, slow) for fast, slow in figure.reach],
    }


def read_points(model: Path, variant: str) -> Points:
    """Read the evaluations of a model's training that have a validation GAUC."""
    points = [e for e in read_history(model) if e.get("valid_gauc") is not None]
    if not points:
        raise UserError(
            f"{model} (variant {variant}) has no validation GAUC in its history, so there is no curve to draw: [split] "
            "needs validation days, and train.validation must be on"
        )
    return points


def read_history(model: Path) -> list[dict[str, Any]]:
    """Read the evaluations of a model directory's metrics.jsonl, a dictionary each; none if there is no such file."""
    return [record for record in read_metrics_lines(model) if "valid_gauc" in record]


def read_metrics_lines(model: Path) -> list[dict[str, Any]]:
    """Read all lines of a model directory's metrics.jsonl: evaluations, and training losses between them."""
    path = model / "metrics.jsonl"
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as e:
            raise UserError(
                f"{path}: line {number} is not JSON ({e}): take the line out, or train the model again"
            ) from None
        if record is not None and (fault := _fault(record)):
            raise UserError(f"{path}: line {number} {fault}: take the line out, or train the model again")
        if record is not None:
            found.append(record)
    return found


def _fault(record: Any) -> str:
    """Return what is wrong with a line of metrics.jsonl; "" for one that can be drawn."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    needed = ("step",) if "valid_gauc" in record else ("step", "loss")
    for name in COLUMNS:
        value = record.get(name)
        kinds = int if name in COUNTS else (int, float)
        if value is None and name in needed:
            return f"has no {name!r}"
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            return f"has {json.dumps(value)} as {name!r}"
    return ""


def first_step(points: Points, value: float) -> int | None:
    """Return the first step at which the validation GAUC is at least `value`; None if it never is."""
    return next((int(p["step"]) for p in points if p["valid_gauc"] >= value), None)


def reach(points: Mapping[str, Points], label: Mapping[str, str], fast: str, slow: str) -> dict[str, Any]:
    """Say at which step each of two variants first reaches the best validation GAUC of the second."""
    best = max(p["valid_gauc"] for p in points[slow])
    steps = {v: first_step(points[v], best) for v in (fast, slow)}
    a, b = steps[fast], steps[slow]
    assert b is not None
    if a is None:
        text = f"{label[fast]} never reaches the best of {label[slow]} ({best:.4f}, at step {b:,})"
    else:
        text = (
            f"{label[fast]} reaches the best of {label[slow]} ({best:.4f}) at step {a:,}, {label[slow]} at step {b:,}"
        )
        text += f": in {a / b:.2f} of its steps"
    return {"fast": fast, "slow": slow, "valid_gauc": best, "steps": steps, "text": text}


def as_csv(points: Mapping[str, Points], label: Mapping[str, str]) -> str:
    """Return the points as CSV: variant, label, then `COLUMNS`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["variant", "label", *COLUMNS])
    for variant, some in points.items():
        writer.writerows([variant, label[variant], *(p.get(c) for c in COLUMNS)] for p in some)
    return out.getvalue()


def draw(lines: Sequence[tuple[str, Points]], title: str, path: Path) -> None:
    """Draw the validation GAUC by step, a line each with its label, as PNG. The same points give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plot_text.any_script():
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for n, (_, points) in enumerate(lines):
            style = LINES[n // len(COLOURS) % len(LINES)]
            steps, values = [p["step"] for p in points], [p["valid_gauc"] for p in points]
            axes.plot(steps, values, style, color=COLOURS[n % len(COLOURS)], marker=".", markersize=4, lw=1.4)
        # Text of the data is no mathematics.
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("step")
        axes.set_ylabel("validation GAUC")
        axes.grid(color="#dfe4ea", lw=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        legend = axes.legend(axes.get_lines(), [name for name, _ in lines], fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
