"""One day at a time: convert today's logs only, on top of what earlier days left."""

import datetime
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ctrkit import days, partitions, vocabulary
from ctrkit.errors import UsageError, UserError
from ctrkit.recipe import Recipe


def check_previous(recipe: Recipe, previous: Path, today: datetime.date | None) -> int:
    """Check that an earlier conversion can be extended by today; return its number of user partitions."""
    if today is None:
        raise UsageError("--extend needs --today, the day to add")
    facts = partitions.read_facts(previous)
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
    missing = [f.vocab for f in recipe.features.values() if not (previous / "vocab" / f"{f.vocab}.parquet").is_file()]
    if missing:
        raise UserError(
            f"{previous} has no vocabulary {missing[0]!r}: it is of another recipe; convert the window without --extend"
        )
    return int(facts["partitions"])


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


def known_ads(recipe: Recipe, previous: Path, today: str) -> pl.Series:
    """Return the ads that earlier days of the window have."""
    kept = kept_days(recipe, previous, datetime.date.fromisoformat(today))
    found = partitions.read_by_day(previous / "samples", kept, ["ad"])
    return pl.Series("ad", [], dtype=pl.String) if found is None else found["ad"].unique()


def next_sample_id(previous: Path) -> int:
    """Return the first sample_id that no earlier day has."""
    return int(partitions.read_facts(previous)["next_sample_id"])


def known_before(recipe: Recipe, previous: Path, today: datetime.date) -> dict[str, dict[str, int]]:
    """Return the sizes that the vocabularies had before today, and before each earlier day that was added by itself."""
    vocabs = dict.fromkeys(f.vocab for f in recipe.features.values() if f.kind != "image")
    sizes = {v: vocabulary.size(vocabulary.read(previous / "vocab", v)) for v in vocabs}
    earlier = partitions.read_facts(previous).get("known_before", {})
    kept = {str(d) for d in kept_days(recipe, previous, today)}
    return {day: found for day, found in earlier.items() if day in kept} | {str(today): sizes}


def known_sizes(convert_folder: Path) -> dict[str, int]:
    """Return the sizes that the vocabularies had after the training days; indexes from there on are unknown to a model.

    Empty where the vocabularies were built from the training days alone.
    """
    facts = partitions.read_facts(convert_folder)
    held_out = sorted([*facts["valid"], *facts["test"]])
    extended = sorted(day for day in facts.get("known_before", {}) if held_out and day >= held_out[0])
    return {str(v): int(size) for v, size in facts["known_before"][extended[0]].items()} if extended else {}


def link_days(recipe: Recipe, previous: Path, today: datetime.date, out: Path) -> dict[str, int]:
    """Take over the earlier days that are still in the window, as links where the file system has them."""
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


def _link(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = folder / file.name
        if not target.exists():
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
