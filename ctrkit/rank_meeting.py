"""The first thing that ranks tell each other: how each was started. Where they were not started alike, all say so in
the same sentence, and none waits.

It goes through torch's store, which rank 0 or its launcher holds. Every wait is for a while only, between two looks.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctrkit import __version__, provenance
from ctrkit.ranks import NotAlike, Ranks
from ctrkit.recipe import CACHES

OWN = {"processes", "threads"} | CACHES
"""Keys of a recipe's tables that each rank may set as its machine wants it."""
ALL_SECONDS = 3.0
"""How long to wait for the rest after one was found that differs, so that all that differ are named."""
HEARD_SECONDS = 10.0
"""How long rank 0, which may hold the store, waits before it leaves until the others have read why."""
LOOK_SECONDS = 0.05
SHOWN = 5


@dataclass(frozen=True)
class About:
    """How a rank was started."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Name → JSON value: the same for all."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """Input → digest, where it is known without reading it: the same for all that know it."""

    @classmethod
    def of(
        cls, command: str, tables: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Path | None] | None = None
    ) -> "About":
        """Return what a command's ranks have to have in common.

        tables: of the recipe, as JSON values.
        inputs: name → path; paths may differ, what lies there must not.
        """
        settings: dict[str, Any] = {"command": command, "ctrkit": __version__}
        for table, keys in tables.items():
            settings |= dict(_flat(table, {key: value for key, value in keys.items() if key not in OWN}))
        given = inputs or {}
        settings |= {f"{name} given": path is not None for name, path in given.items()}
        found = {name: provenance.read_sidecar(path).get("content") for name, path in given.items() if path is not None}
        return cls(settings, {name: content for name, content in found.items() if isinstance(content, str)})


def meet(ranks: Ranks, store: Any, about: About, patience: float, look: Callable[[], None]) -> None:
    """Wait until all ranks have come, and find out whether they were started alike. All ranks have to call it.

    patience: seconds to wait for one that does not come.
    look: is called again and again meanwhile, and raises where a rank has gone.

    Raises NotAlike, with the same message on all that came.
    """
    mine = {"settings": {"WORLD_SIZE": ranks.count, **about.settings}, "contents": dict(about.contents)}
    if store.add(f"came/{ranks.rank}", 1) > 1:
        raise NotAlike(
            f"another process has come as rank {ranks.rank} of {ranks.count}: start all of them anew, each with a RANK "
            "of its own, or with torchrun"
        )
    store.set(_key(ranks.rank), json.dumps(mine))
    wait = _first if ranks.rank == 0 else _other
    if told := wait(ranks, store, mine, time.monotonic() + patience, look):
        raise NotAlike(told)


def _first(ranks: Ranks, store: Any, mine: Any, until: float, look: Callable[[], None]) -> str:
    """Read what the others tell, and tell them what comes of it: "" where all are alike."""
    begun = time.monotonic()
    found = {0: mine}
    while True:
        look()
        for rank in range(1, ranks.count):
            if rank not in found and store.check([_key(rank)]):
                found[rank] = json.loads(store.get(_key(rank)))
                if _difference({0: mine, rank: found[rank]}):
                    until = min(until, time.monotonic() + ALL_SECONDS)
        if len(found) == ranks.count or time.monotonic() > until:
            break
        time.sleep(LOOK_SECONDS)
    told = _difference(dict(sorted(found.items())))
    if not told and len(found) < ranks.count:
        absent = [rank for rank in range(ranks.count) if rank not in found]
        told = (
            f"{_named(absent)} of {ranks.count} did not come within {_span(until - begun)}: start as many as "
            "WORLD_SIZE says, each with the MASTER_ADDR and MASTER_PORT of rank 0, or with torchrun"
        )
    store.set("verdict", json.dumps(told))
    until = time.monotonic() + HEARD_SECONDS
    while told and store.add("heard", 0) < len(found) - 1 and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return told


def _other(ranks: Ranks, store: Any, mine: Any, until: float, look: Callable[[], None]) -> str:
    """Return what rank 0 tells, or what is to be said of it where it tells nothing."""
    begun = time.monotonic()
    first, told = None, ""
    until += HEARD_SECONDS  # rank 0 may have come later, and knows who is missing
    while not store.check(["verdict"]):
        look()
        if first is None and store.check([_key(0)]):
            first = json.loads(store.get(_key(0)))
            told = _difference({0: first, ranks.rank: mine})
            until = min(until, time.monotonic() + HEARD_SECONDS) if told else until
        if time.monotonic() > until:
            late = f"rank 0 of {ranks.count} did not {'say that all are there' if first else 'come'} within "
            return told or f"{late}{_span(until - begun)}: start all ranks at the same time, or with torchrun"
        time.sleep(LOOK_SECONDS)
    verdict: str = json.loads(store.get("verdict"))
    store.add("heard", 1)
    return verdict or told


def _key(rank: int) -> str:
    return f"about/{rank}"


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(f"{name}.{key}", one)
    else:
        yield name, value


def _difference(found: Mapping[int, Any]) -> str:
    """Say in what ranks differ from rank 0; "" if in nothing."""
    lines = []
    settings = {rank: one["settings"] for rank, one in found.items()}
    if "command" in (differ := _differing(settings)):
        differ = ["command"]
    for key in differ:
        values: dict[str, list[int]] = {}
        for rank, one in settings.items():
            text = json.dumps(one[key], ensure_ascii=False) if key in one else "nothing"
            values.setdefault(text, []).append(rank)
        lines.append(f"{key} is " + " and ".join(f"{text} for {_named(ranks)}" for text, ranks in values.items()))
    first = found[0]["contents"]
    for name, content in first.items() if not lines else ():
        others = [rank for rank, one in found.items() if one["contents"].get(name, content) != content]
        if others:
            lines.append(f"what {_named(others)} finds as {name} is not what rank 0 finds")
    if not lines:
        return ""
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return (
        f"the ranks were not started alike: {'; '.join(lines[:SHOWN])}{more}. Start all of them with the same command "
        "and the same files"
    )


def _differing(settings: Mapping[int, Mapping[str, Any]]) -> list[str]:
    first = settings[0]
    keys = [*first, *(key for one in settings.values() for key in one if key not in first)]
    none = object()
    return [
        key
        for key in dict.fromkeys(keys)
        if any(one.get(key, none) != first.get(key, none) for one in settings.values())
    ]


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:-1][:SHOWN]))
    return (
        f"ranks {shown} and {ranks[-1]}" if len(ranks) <= SHOWN + 1 else f"ranks {shown} and {len(ranks) - SHOWN} more"
    )


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
