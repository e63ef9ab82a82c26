"""Days, each trained from the model of the day before and tested on its own, in one table of days and variants."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrkit import files, vocabulary
from ctrkit.errors import UserError
from ctrkit.evaluation import evaluate
from ctrkit.facts import read_facts
from ctrkit.metric_tables import UNSEEN, computed_how, interval, number, percent, with_interval
from ctrkit.recipe import Recipe

FROM_SCRATCH = ", from scratch"
"""Ends the label of a variant that was trained on the whole window, beside the one that started from the day before."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Tested:
    """A variant on a day."""

    day: str
    label: str
    folder: Path
    """It has `model/` and `predictions.parquet`."""
    convert: Path


def make_table(recipe: Recipe, tested: Sequence[Tested]) -> dict[str, Any]:
    """Evaluate every variant on every day.

    Returns JSON values: `rows`, one a day and variant (`day`, `variant`, `started_from` "the day before", "scratch" or,
    where days are missing between, "a model of days up to DAY"; `trained_on` the first and last day and
    `train_samples`, `gauc` with its interval, `impressions`, `users_kept`, `new_ids` that the day brought, `unseen_ads`
    the share of impressions on ads of no training day); `differences`, a row a day on which a variant was trained in
    both ways: from the day before less from scratch, paired; `means` over the days by variant; how it was computed.
    """
    rows: list[Row] = []
    differences: list[Row] = []
    how = ""
    for day in dict.fromkeys(t.day for t in tested):
        today = {t.label: t for t in tested if t.day == day}
        pairs = tuple((label, label + FROM_SCRATCH) for label in today if label + FROM_SCRATCH in today)
        settings = recipe.eval.model_copy(update={"baseline": "", "compare": pairs})
        metrics = evaluate({label: t.folder / "predictions.parquet" for label, t in today.items()}, settings)
        how = computed_how(metrics)
        for label, t in today.items():
            one, unseen = metrics["variants"][label]["all"], metrics["variants"][label]["slices"].get(UNSEEN)
            rows.append(
                {
                    "day": day,
                    "variant": label,
                    **training(t.folder / "model", day),
                    **{key: one[key] for key in ("gauc", "gauc_low", "gauc_high", "impressions", "users_kept")},
                    "new_ids": new_ids(t.convert, day),
                    "unseen_ads": (unseen["impressions"] if unseen else 0) / one["impressions"],
                }
            )
        for c in metrics["comparisons"]:
            if c["slice"] == "all":
                kept = {key: c[key] for key in ("difference", "low", "high")}
                differences.append({"day": day, "variant": c["better"], **kept})
    return {"rows": rows, "differences": differences, "means": means(rows), "computed": how}


def training(model: Path, day: str) -> Row:
    """Return what a model, to be tested on a day, says of its training: where it started, on which days and samples.

    The model of the day before has seen the days up to the one before that.
    """
    settings = files.read_json(model / "settings.json")
    try:
        span = settings["days"]["train"]
        until = settings["days"].get("before", {}).get("last")
        usual = datetime.date.fromisoformat(day) - datetime.timedelta(days=2)
        warm = "the day before" if until == str(usual) else f"a model of days up to {until}"
        return {
            "started_from": warm if settings["train"]["warm_start"] else "scratch",
            "trained_on": [span["first"], span["last"]],
            "train_samples": span["samples"],
        }
    except (KeyError, TypeError):
        raise UserError(
            f"{model / 'settings.json'} does not say on which days the model was trained: train it again with this "
            "version of ctrkit"
        ) from None


def new_ids(convert: Path, day: str) -> int | None:
    """Return how many ids of all vocabularies a day brought; None where it was not added to earlier days."""
    before = read_facts(convert).get("known_before", {}).get(day)
    if before is None:
        return None
    sizes = {v: vocabulary.size(vocabulary.read(convert / "vocab", v)) for v in before}
    return sum(sizes[v] - int(size) for v, size in before.items())


def means(rows: Sequence[Row]) -> list[Row]:
    """Return the mean GAUC of each variant over the days that all variants have."""
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    by_day: dict[str, dict[str, float | None]] = {}
    for row in rows:
        by_day.setdefault(row["day"], {})[row["variant"]] = row["gauc"]
    shared = [day for day, values in by_day.items() if all(values.get(label) is not None for label in labels)]
    out = []
    for label in labels:
        values = [by_day[day][label] for day in shared]
        mean = sum(v for v in values if v is not None) / len(values) if values else None
        out.append({"variant": label, "days": len(shared), "gauc": mean})
    return out


HEADS = [
    "day",
    "variant",
    "GAUC [95%]",
    "impressions",
    "started from",
    "trained on",
    "samples",
    "new ids",
    "unseen ads",
]


def cells(table: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows as text, under `HEADS`."""
    out = []
    for row in table["rows"]:
        first, last = row["trained_on"]
        out.append(
            [
                row["day"],
                row["variant"].removesuffix(FROM_SCRATCH),
                with_interval(row["gauc"], row["gauc_low"], row["gauc_high"]),
                f"{row['impressions']:,}",
                row["started_from"],
                last if first == last else f"{first} to {last}",
                f"{row['train_samples']:,}",
                "–" if row["new_ids"] is None else f"{row['new_ids']:,}",
                percent(row["unseen_ads"], 1, sign=False),
            ]
        )
    return out


def further(table: Mapping[str, Any]) -> list[str]:
    """Return the differences and the means as lines of text."""
    started = {(row["day"], row["variant"]): row["started_from"] for row in table["rows"]}
    out = [
        f"{d['day']}: {d['variant']} from {started[d['day'], d['variant']]} less from scratch: "
        f"GAUC {number(d['difference'], sign=True)} "
        f"{interval(d['low'], d['high'], sign=True)}".rstrip()
        for d in table["differences"]
    ]
    days = table["means"][0]["days"] if table["means"] else 0
    if days > 1:
        said = ", ".join(f"{m['variant']} {number(m['gauc'])}" for m in table["means"])
        out.append(f"mean GAUC of the {days} days that all variants have: {said}")
    return out


def markdown(recipe: Recipe, table: Mapping[str, Any]) -> str:
    """Return daily.md."""
    lines = [f"# {recipe.name}, day by day", "", table["computed"], ""]
    lines += ["| " + " | ".join(row) + " |" for row in (HEADS, ["---"] * len(HEADS), *cells(table))]
    lines += ["", *(f"- {said}" for said in further(table)), ""]
    return "\n".join(lines)
