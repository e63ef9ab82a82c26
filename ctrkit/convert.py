"""Raw logs to samples and vocabularies (DICM section VI: two weeks of logs to train, the next day to test).

Nothing later than the training days decides what a vocabulary holds; pictures are only given keys.
"""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import columns, days, logs, partitions, vocabulary
from ctrkit.errors import UsageError
from ctrkit.recipe import Feature, Recipe
from ctrkit.sources import SOURCES
from ctrkit.tables import RawTable, Rejects, open_tables

SAMPLE_OWNERS = ("user", "ad", "scene")


def convert(recipe: Recipe, raw: Path, out: Path) -> dict[str, Any]:
    """Write `samples/`, `vocab/`, `split.json` and `rejects.parquet` (docs/formats.md) into the folder `out`.

    Returns the counts. Raises UserError, with nothing to keep in `out`, where the raw data cannot be used.
    """
    if not recipe.features:
        raise UsageError('the recipe has no [features]; name at least one, such as [features.ad_id] with of = "ad"')
    tables = open_tables(recipe, raw, *SOURCES)
    samples_plan = columns.plan(recipe, tables, SAMPLE_OWNERS)
    behaviours_plan = columns.plan(recipe, tables, ["behaviour"])
    rejects = Rejects()

    log, counts = _read_samples(recipe, tables, samples_plan, rejects)
    features = {name: recipe.features[name] for name in samples_plan}
    texts = {name: columns.values(log, name, f, samples_plan[name]) for name, f in features.items()}
    samples = log.select("sample_id", "time", "user", "ad", "click", "day")
    del log
    behaviour_texts, behaviour_times = _read_behaviours(recipe, tables, behaviours_plan, rejects, counts)
    rejects.check(recipe.convert.max_reject_rate)

    present = samples["day"].unique().sort().to_list()
    ends = (int(samples["time"][0]), int(samples["time"][-1]))
    split = days.split_days(present, *ends, recipe.split, recipe.convert.time_zone)
    training = samples["day"].is_in(split["train"])
    known_ads = samples.filter(training)["ad"].unique()
    samples = samples.with_columns(pl.col("ad").is_in(known_ads.implode()).not_().alias("unseen_ad"))

    before = days.midnight(split["train"][-1] + datetime.timedelta(days=1), recipe.convert.time_zone)
    vocabularies = _build_vocabularies(recipe, texts, training, behaviour_texts, behaviour_times < before)
    for name in list(texts):
        samples = samples.with_columns(vocabulary.encode(texts.pop(name), vocabularies[features[name].vocab]))

    partitions.write_by_day(samples, out / "samples")
    (out / "vocab").mkdir()
    for name, words in vocabularies.items():
        words.write_parquet(out / "vocab" / f"{name}.parquet")
    dates = {part: [str(d) for d in split[part]] for part in split}
    (out / "split.json").write_text(json.dumps(dates, indent=1) + "\n", encoding="utf-8")
    rejects.frame().write_parquet(out / "rejects.parquet")

    counts["clicks among samples"] = int(samples["click"].sum())
    for part, chosen in split.items():
        counts[f"{part} days"] = len(chosen)
        counts[f"{part} samples"] = int(samples["day"].is_in(chosen).sum())
    used = sum(counts[f"{part} samples"] for part in split)
    if used < samples.height:
        counts["samples on days of no split"] = samples.height - used
    test = samples.filter(pl.col("day").is_in(split["test"]))
    counts["test samples of unseen ads"] = int(test["unseen_ad"].sum())
    counts |= {f"vocabulary {name}": words.height for name, words in vocabularies.items()}
    return counts


def _read_samples(
    recipe: Recipe, tables: Mapping[str, RawTable], plan: columns.Plan, rejects: Rejects
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Return the labelled impressions with all columns that features need, in order of time, and counts."""
    needed = columns.needed(plan, tables, "ad")
    frame, counts = logs.impressions(dict(tables), recipe, needed.pop("impressions", []), rejects)
    if frame.is_empty():
        rejects.check(min(recipe.convert.max_reject_rate, 0.5))
    keyed: dict[str, pl.DataFrame] = {}
    for name, wanted in needed.items():
        keyed[name], read = logs.keyed(tables[name], columns.KEYS[name], wanted, rejects)
        counts |= read
    frame = columns.join_tables(frame, "ad", tables, keyed)
    for name in keyed:
        unmatched = int(frame[f"{name}.{columns.KEYS[name]}"].is_null().sum())
        counts[f"samples without a row of {name}"] = unmatched
    local = days.local("time", recipe.convert.time_zone)
    frame = frame.sort("time", maintain_order=True).with_columns(
        local.dt.date().alias("day"),
        local.dt.hour().cast(pl.String).alias("clock.hour"),
        local.dt.weekday().cast(pl.String).alias("clock.weekday"),
    )
    return frame.with_row_index("sample_id").with_columns(pl.col("sample_id").cast(pl.Int64)), counts


def _read_behaviours(
    recipe: Recipe,
    tables: Mapping[str, RawTable],
    plan: columns.Plan,
    rejects: Rejects,
    counts: dict[str, Any],
) -> tuple[dict[str, pl.Series], pl.Series]:
    """Return each behaviour feature's text, a row a behaviour, and the behaviours' times."""
    if not plan:
        return {}, pl.Series("time", [], dtype=pl.Int64)
    log, read = logs.behaviours_with_goods(recipe, tables, plan, rejects)
    counts |= read
    return {name: columns.values(log, name, recipe.features[name], plan[name]) for name in plan}, log["time"]


def _build_vocabularies(
    recipe: Recipe,
    samples: Mapping[str, pl.Series],
    training: pl.Series,
    behaviours: Mapping[str, pl.Series],
    earlier: pl.Series,
) -> dict[str, pl.DataFrame]:
    """Count the values of training samples and of behaviours before the end of training.

    A picture is in its vocabulary wherever it is referred to, with its count in training.
    """
    counts: dict[str, list[pl.DataFrame]] = {}
    for name, feature in recipe.features.items():
        texts, seen = (samples[name], training) if name in samples else (behaviours[name], earlier)
        counts.setdefault(feature.vocab, []).append(vocabulary.count_values(texts.filter(seen)))
        if feature.kind == "image":
            everywhere = vocabulary.count_values(texts).with_columns(pl.col("count") * 0)
            counts[feature.vocab].append(everywhere)
    first = {f.vocab: f for f in reversed(recipe.features.values())}
    return {name: vocabulary.build(counts[name], _min_count(first[name])) for name in counts}


def _min_count(feature: Feature) -> int:
    return 0 if feature.kind == "image" else feature.min_count
