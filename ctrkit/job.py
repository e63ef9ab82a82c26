"""What the tasks of a conversion know and leave for each other: the job, its state, and rows as they are labelled."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import dictionaries, spool
from ctrkit.columns import Input
from ctrkit.dictionaries import Maps
from ctrkit.recipe import Recipe
from ctrkit.tables import RawTable

Chunk = dict[str, Any]
Counts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every task of a conversion knows."""

    recipe: Recipe
    inputs: dict[str, Input]
    work: Path
    out: Path
    partitions: int
    previous: Path | None = None
    """What was converted up to the day before: the vocabularies to extend, the days to keep."""

    def features(self, log: str) -> list[str]:
        """Return the features made from a log."""
        return [name for name, one in self.inputs.items() if one.log == log]

    def keys(self, log: str, tables: Mapping[str, RawTable]) -> dict[str, tuple[str, ...]]:
        """Return the dictionaries that a log's rows need codes of."""
        found = {one.dictionary: one.keys for one in self.inputs.values() if one.log == log}
        if log == "behaviours":
            found |= {f"behaviours.{c}": (c,) for c in ("goods", "type") if c in tables[log].names}
        else:
            found["ad"] = ("ad",)
        return found


def write_state(job: Job, name: str, value: object) -> None:
    """Leave a JSON value for later tasks; a killed run's stays."""
    path = job.work / f"{name}.state"
    if not path.is_file():
        tmp = path.with_suffix(".tmp")
        tmp.write_text(json.dumps(value), encoding="utf-8")
        tmp.replace(path)


@functools.lru_cache(maxsize=8)
def state(work: Path, name: str) -> Any:
    """Return what `write_state` wrote."""
    return json.loads((work / f"{name}.state").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=2)
def maps(work: Path) -> Maps:
    """Return what each chunk's codes mean in the dictionaries of all."""
    known = state(work, "dictionaries")
    return Maps(work / "dictionaries", known["found"], known["order"])


@functools.lru_cache(maxsize=4)
def _dictionary_words(work: Path, name: str) -> pl.Series:
    words = dictionaries.words(work / "dictionaries", name)
    return pl.concat([pl.Series("value", [None], dtype=pl.String), words])


def texts(job: Job, name: str) -> pl.Series:
    """Return the texts of a dictionary by code; null for 0."""
    return _dictionary_words(job.work, name)


class Labelled:
    """The labelled impressions of a partition, in order of day, user and time."""

    def __init__(self, job: Job, part: int) -> None:
        self.stem = job.work / "labelled" / f"impressions-{part:04}"
        facts = state(job.work, "label")[part]
        self.begins = [0, *np.cumsum(facts["days"]).tolist()]
        self.rows = self.begins[-1]
        self.columns = spool.Columns(Path(f"{self.stem}.rows"), facts["layout"], 0, self.rows)

    def users(self) -> pl.Series:
        """Return the users by their rank."""
        return spool.mapped_frame(f"{self.stem}.users")["user"]
