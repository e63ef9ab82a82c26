"""Whether the files that a report is made from belong together: checked before anything is shown."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import metric_tables, predictions, provenance, vocabulary
from ctrkit.batches import Schema
from ctrkit.errors import UserError, nearest

ROWS = 1_000_000
"""Rows of predictions that are in memory at a time."""
SHOWN = ("sample_id", "user", "ad", "day", "history_length")
"""Columns of predictions, besides click and score, that a report may show; they are read to see whether they can be."""


def check(
    metrics_path: Path,
    models: Mapping[str, Path],
    scored: Mapping[str, Path],
    convert: Path | None,
    groups: Path | None,
) -> None:
    """Refuse models and predictions of no variant of the metrics, predictions that the metrics were not computed from,
    damaged ones, and a vocabulary that the groups were not made with. Raises UserError.

    models, scored: variant → its model directory, its predictions.
    """
    metrics = metric_tables.read_metrics(metrics_path)
    _check_names("--model", models, metrics["variants"], metrics_path)
    _check_names("--predictions", scored, metrics["variants"], metrics_path)
    if convert is not None and groups is not None:
        vocabulary.require_of_groups(convert, Schema.read(groups).vocab_digest, groups)
    evaluated = _evaluated(metrics_path)
    for name, path in scored.items():
        if name in evaluated and evaluated[name] != provenance.cache().of(path):
            raise UserError(
                f"{path} (--predictions {name}) is not what {metrics_path} was computed from: give the predictions of "
                f"{name!r} that belong to it, or run ctrkit eval on these and give its --json file"
            )
        if predictions.is_parquet(path):
            rows = _check_predictions(path)
            if rows is not None:
                _check_counts(name, path, rows, metrics["variants"][name]["all"], metrics_path)


def _check_names(option: str, given: Iterable[str], variants: Mapping[str, Any], metrics_path: Path) -> None:
    for name in given:
        if name not in variants:
            raise UserError(f"{option} {name}=…: {metrics_path} has no variant {name!r}{nearest(name, variants)}")


def _evaluated(metrics_path: Path) -> Mapping[str, str]:
    """Return variant → digest of the predictions that a metrics.json was computed from; empty where its sidecar is not
    there or is of another file."""
    sidecar = provenance.read_sidecar(metrics_path)
    if not sidecar or sidecar["content"] != provenance.cache().of(metrics_path):
        return {}
    made_from: Mapping[str, str] = sidecar.get("inputs", {})
    return made_from


def _check_predictions(path: Path) -> tuple[int, int] | None:
    """Return the impressions and clicks of a Parquet file of predictions, whose every label and score is looked at;
    None where it has not both columns."""
    try:
        schema = pl.read_parquet_schema(path)
        if not {"click", "score"} <= schema.keys():
            return None
        for column in ("click", "score"):
            if not (schema[column].is_numeric() or (column == "click" and schema[column] == pl.Boolean)):
                raise UserError(f"{path}: column {column!r} is {schema[column]}, not numbers")
        total = int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())
        clicks, columns = 0, ["click", "score", *(column for column in SHOWN if column in schema)]
        for first in range(0, total, ROWS):
            frame = pl.scan_parquet(path, glob=False).select(columns).slice(first, ROWS).collect()
            clicks += int(predictions.labels(frame["click"], path, first, advice="").sum())
            predictions.scores(frame["score"], path, first, advice="")
    except (OSError, pl.exceptions.PolarsError) as e:
        raise UserError(
            f"{path} cannot be read as Parquet ({(str(e).splitlines() or [''])[0]}): make it again with ctrkit predict"
        ) from None
    return total, clicks


def _check_counts(name: str, path: Path, rows: tuple[int, int], whole: Mapping[str, Any], metrics_path: Path) -> None:
    told = whole["impressions"], whole["clicks"]
    if rows != told:
        raise UserError(
            f"{path} (--predictions {name}) has {rows[0]:,} impressions and {rows[1]:,} clicks, but {metrics_path} was "
            f"computed from {told[0]:,} and {told[1]:,}: give the predictions that belong to it"
        )
