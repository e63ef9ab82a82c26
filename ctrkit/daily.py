"""One day at a time: convert today's logs only, on top of what earlier days left."""

import datetime
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ctrkit import days, partitions, vocabulary
from ctrkit.errors import UsageError, UserError
from ctrkit.facts import read_facts
from ctrkit.parquet_footer import row_groups
from ctrkit.progress import say
from ctrkit.recipe import Recipe

Meaning = Mapping[str, Mapping[str, Any]]
"""Table of the recipe → key → value, as JSON has them."""
TRAINING_ADS = "training-ads"
"""The file of the ads that the earlier days of training have."""
SHOWN = 4


def check_previous(recipe: Recipe, previous: Path, today: datetime.date | None, meaning: Meaning) -> int:
    """Check that an earlier conversion can be extended by today; return its number of user partitions."""
    if today is None:
        raise UsageError("--extend needs --today, the day to add")
    facts = read_facts(previous)
    there = partitions.days_there(previous / "samples")
    if today <= there[-1]:
        raise UserError(
            f"{previous} has samples up to {there[-1]}, so {today} cannot be added; extend what an earlier day left"
        )
    if recipe.convert.negative_rate < 1 or facts["negative_rate"] < 1:
        raise UsageError(
            "convert.negative_rate and --extend do not go together: a day that is tested on today is trained on "
            "tomorrow"
        )
    if recipe.convert.sampled_negatives:
        raise UsageError(
            "convert.sampled_negatives and --extend do not go together: which ads a user never had, today's rows do "
            "not tell; convert the window without --extend"
        )
    if "recipe" not in facts:
        raise UserError(
            f"{previous} does not say what recipe it was made with: an older ctrkit made it; convert the window "
            "without --extend"
        )
    if differing := differences(meaning, facts["recipe"]):
        more = f" and {len(differing) - SHOWN} more keys" if len(differing) > SHOWN else ""
        raise UserError(
            f"{previous} was converted with another recipe, whose samples and indexes mean something else: "
            f"{'; '.join(differing[:SHOWN])}{more}. Give the recipe that it was made with, or convert the window "
            "without --extend (where `ctrkit run --today` or make TODAY=… does it: put the run's folder of days away)"
        )
    return int(facts["partitions"])


def differences(now: Meaning, then: Meaning) -> list[str]:
    """Name the keys in which two recipes differ, with their values."""
    found = []
    if list(now) != list(then) and set(now) == set(then):
        found.append("the features are in another order")
    for table in {**now, **then}:
        if table not in then or table not in now:
            found.append(f"[{table}] is {'new' if table in now else 'gone'}")
            continue
        a, b = now[table], then[table]
        differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        found += [f"{table}.{key} is {a.get(key)!r} and was {b.get(key)!r}" for key in differing]
    return found


def tell(recipe: Recipe, previous: Path | None, today: datetime.date) -> dict[str, int]:
    """Say which days were skipped and where histories are cut short; return the counts of it."""
    kept, days_, window = recipe.daily.behaviour_days, recipe.daily.window_days, recipe.select_clicks.window_days
    if any(f.of == "behaviour" for f in recipe.features.values()) and (window is None or kept < window + days_):
        why = (
            'select-clicks.window_days = "all" can only mean these days'
            if window is None
            else f"{window + days_} are needed for whole histories of select-clicks.window_days = {window}"
        )
        say(
            f"convert: behaviours of {kept} days are kept (daily.behaviour_days) for {days_} days of samples "
            f"(daily.window_days), and {why}: the earliest days' histories are shorter"
        )
    if previous is None:
        return {}
    last = partitions.days_there(previous / "samples")[-1]
    skipped = (today - last).days - 1
    if skipped:
        say(
            f"convert: {previous} ends with {last}, so {skipped:,} days before {today} are in no sample and no "
            f"history; if they have logs, convert them first, one after the other"
        )
    return {"days skipped": skipped} if skipped else {}


def times(recipe: Recipe, log: str, today: datetime.date, *, extending: bool) -> tuple[int, int]:
    """Return the times (epoch milliseconds, the second not included) of a log's rows to use."""
    zone = recipe.convert.time_zone
    back = recipe.daily.behaviour_days if log == "behaviours" else recipe.daily.window_days
    first = today if extending else today - datetime.timedelta(days=back - 1)
    late = round(recipe.convert.attribution_window * 1000) if log == "clicks" else 0
    return days.midnight(first, zone), days.midnight(today + datetime.timedelta(days=1), zone) + late


def kept_days(recipe: Recipe, previous: Path, today: datetime.date) -> list[datetime.date]:
    """Return the earlier days of samples that are still in the window."""
    first = today - datetime.timedelta(days=recipe.daily.window_days - 1)
    return [d for d in partitions.days_there(previous / "samples") if first <= d < today]


def training_ads(previous: Path, train: Sequence[datetime.date]) -> pl.Series:
    """Return the ads that some earlier days have, each once."""
    files = [p for day in train for p in sorted((previous / "samples" / f"day={day}").glob("part-*"))]
    if not files:
        return pl.Series("ad", [], dtype=pl.String)
    return pl.scan_parquet(files).select("ad").unique().collect(engine="streaming").to_series()


def next_sample_id(previous: Path) -> int:
    """Return the first sample_id that no earlier day has."""
    return int(read_facts(previous)["next_sample_id"])


def known_before(recipe: Recipe, previous: Path, today: datetime.date) -> dict[str, dict[str, int]]:
    """Return the sizes that the vocabularies had before today, and before each earlier day that was added by itself."""
    vocabs = dict.fromkeys(f.vocab for f in recipe.features.values() if f.kind != "image")
    sizes = {v: vocabulary.size(vocabulary.read(previous / "vocab", v)) for v in vocabs}
    earlier = read_facts(previous).get("known_before", {})
    kept = {str(d) for d in kept_days(recipe, previous, today)}
    return {day: found for day, found in earlier.items() if day in kept} | {str(today): sizes}


def known_sizes(convert_folder: Path) -> dict[str, int]:
    """Return the sizes that the vocabularies had after the training days; indexes from there on are unknown to a model.

    Empty where the vocabularies were built from the training days alone.
    """
    facts = read_facts(convert_folder)
    held_out = sorted([*facts["valid"], *facts["test"]])
    extended = sorted(day for day in facts.get("known_before", {}) if held_out and day >= held_out[0])
    return {str(v): int(size) for v, size in facts["known_before"][extended[0]].items()} if extended else {}


def link_days(recipe: Recipe, previous: Path, today: datetime.date, out: Path) -> dict[str, int]:
    """Take over the earlier days that are still in the window, as links where the file system has them.

    What is there already stays.
    """
    since = today - datetime.timedelta(days=recipe.daily.behaviour_days - 1)
    kept = {
        "samples": kept_days(recipe, previous, today),
        "behaviours": [d for d in partitions.days_there(previous / "behaviours") if since <= d < today],
    }
    for folder, some in kept.items():
        for day in some:
            _link(sorted((previous / folder / f"day={day}").glob("part-*")), out / folder / f"day={day}")
    there = partitions.days_there(previous / "samples")
    return {"earlier days kept": len(kept["samples"]), "earlier days dropped": len(there) - len(kept["samples"])}


def samples_of(folder: Path, day: datetime.date) -> int:
    """Return how many samples a day has."""
    return sum(sum(row_groups(path)) for path in (folder / "samples" / f"day={day}").glob("part-*"))


def _link(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = folder / file.name
        if not target.exists():
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
