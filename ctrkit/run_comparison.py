"""Runs side by side: what their metrics.json say of each variant, in one table, as text and as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ctrkit import page_templates
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.metric_tables import (
    check_metrics,
    counted,
    lines,
    new_table,
    number,
    percent,
    read_metrics,
    with_interval,
)

ALL = "all"
SAME = {"weight": "users count by", "ties": "ties are", "interval": "intervals are"}
"""Settings that have to agree for GAUCs to be comparable, and the words for them."""
HEAD = ("variant", "run", "GAUC", "difference", "gain", "R-GAUC", "AUC", "log loss", "NE", "calibration", "ECE")
LEFT = 3
"""Columns of `HEAD` that are set to the left."""


@dataclass(frozen=True)
class Comparison:
    """A table of runs and what has to be said of it."""

    slice: str
    rows: list[tuple[str, ...]]
    """As `HEAD`; a variant's rows follow each other, in the order of the runs."""
    notes: list[str]


def metrics_path(run: Path) -> Path:
    """Return the metrics.json of a run: the file itself, or that of its folder."""
    path = run / "metrics.json" if run.is_dir() else run
    if not path.exists():
        raise UserError(f"{path} is not there: {run} is no run that has been evaluated. Give a run's folder or a file.")
    return path


def compare(runs: Mapping[str, Path], slice_name: str = ALL, variants: Sequence[str] = ()) -> Comparison:
    """Lay runs side by side, over one slice. `runs`: name → metrics.json; `variants`: only these, if any.

    Raises UserError for files that are no metrics.json, UsageError for variants that no run has and for slices that
    one has of none of the variants.
    """
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    for name, path in runs.items():
        check_metrics(path, metrics[name])
    order = list(dict.fromkeys(v for m in metrics.values() for v in m["order"]["variants"]))
    slices = list(dict.fromkeys([ALL, *(s for m in metrics.values() for s in m["order"]["slices"])]))
    if slice_name not in slices:
        raise UsageError(f"no run has the slice {slice_name!r}{nearest(slice_name, slices)}")
    for name in variants:
        if name not in order:
            raise UsageError(f"no run has the variant {name!r}{nearest(name, order)}")
    for run, m in metrics.items():
        there = [m["variants"][v] for v in variants or order if v in m["order"]["variants"]]
        if slice_name != ALL and there and not any(slice_name in one["slices"] for one in there):
            raise UsageError(f"{run} has no slice {slice_name!r}{nearest(slice_name, m['order']['slices'])}")
    rows = []
    for variant in variants or order:
        first: float | None = None
        for run, m in metrics.items():
            if variant not in m["order"]["variants"]:
                continue
            one = m["variants"][variant]
            one = one[ALL] if slice_name == ALL else one["slices"].get(slice_name)
            if one is None:
                continue
            rows.append(_row(variant, run, one, first))
            first = one["gauc"] if first is None else first
    return Comparison(slice_name, rows, _notes(metrics, slice_name, variants or order))


def _row(variant: str, run: str, one: Mapping[str, Any], first: float | None) -> tuple[str, ...]:
    difference = "" if first is None or one["gauc"] is None else number(one["gauc"] - first, sign=True)
    return (
        variant,
        run,
        with_interval(one["gauc"], one["gauc_low"], one["gauc_high"]),
        difference,
        number(one["gain"], sign=True),
        percent(one["r_gauc"]),
        number(one["auc"]),
        number(one["log_loss"]),
        number(one["normalised_entropy"]),
        number(one["calibration"], 3),
        number(one["ece"]),
    )


def _notes(metrics: Mapping[str, Any], slice_name: str, variants: Sequence[str]) -> list[str]:
    """Say how the GAUCs were computed, and where runs cannot be compared."""
    notes = []
    for key, words in SAME.items():
        values = {run: str(m["settings"][key]) for run, m in metrics.items()}
        if len(set(values.values())) == 1:
            notes.append(f"In all runs {words} {next(iter(values.values()))}.")
        else:
            said = "; ".join(f"{run}: {value}" for run, value in values.items())
            notes.append(f"The runs cannot be compared as they are: {words} different things ({said}).")
    baselines = {run: m["settings"]["baseline"] for run, m in metrics.items()}
    if len(set(baselines.values())) > 1:
        said = "; ".join(f"{run}: {name or 'none'}" for run, name in baselines.items())
        notes.append(f"Gains and R-GAUC are against different baselines ({said}).")
    covered: dict[str, list[str]] = {}
    for run, m in metrics.items():
        for variant in variants:
            one = m["variants"][variant] if variant in m["order"]["variants"] else None
            one = one and (one[ALL] if slice_name == ALL else one["slices"].get(slice_name))
            if one:
                text = (
                    f"{counted(one['users_kept'], 'user')} kept, {one['users_dropped']:,} dropped for having only one "
                    f"class; {one['impressions_covered']:,} of {counted(one['impressions'], 'impression')} covered"
                )
                covered.setdefault(text, []).append(run)
    for text, names in covered.items():
        these = list(dict.fromkeys(names))
        every = len(covered) == 1 and len(these) == len(metrics)
        notes.append(f"{'All runs' if every else ', '.join(these)}: {text}.")
    if len(covered) > 1:
        notes.append("So the rows are not all of the same impressions, and differences are of the data as well.")
    notes.append(
        "Differences are from a variant's first run, and not paired; for a paired one, with its significance, give "
        "the predictions of both to ctrkit eval --compare."
    )
    return notes


def table(made: Comparison) -> Table:
    """Return the comparison as a table for the terminal."""
    title = "All impressions" if made.slice == ALL else made.slice
    out = new_table(title)
    for position, head in enumerate(HEAD):
        out.add_column(head, justify="left" if position < LEFT else "right", overflow="fold")
    before = None
    for row in made.rows:
        variant = "" if row[0] == before else lines(row[0])
        before = row[0]
        out.add_row(*(Text(cell) for cell in (variant, *row[1:])))
    return out


def page(made: Comparison, runs: Sequence[str]) -> str:
    """Return the comparison as one HTML page that needs nothing but itself."""
    return page_templates.template("compare.html.j2").render(made=made, runs=runs, head=HEAD, left=LEFT, all=ALL)
