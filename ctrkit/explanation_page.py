"""A prediction taken apart, as tables for the terminal, as JSON and as one HTML page that needs nothing but itself."""

import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctrkit import page_templates
from ctrkit.explanation import Behaviour, Explanation, Score, Value
from ctrkit.gallery import Thumbnails
from ctrkit.metric_tables import new_table

SHOWN = 20
"""Behaviours in the terminal's table."""


def show(made: Explanation, out: Console) -> None:
    """Print an explanation."""
    out.print(made.model, markup=False, highlight=False)
    out.print(headline(made), markup=False, highlight=False, soft_wrap=True, style="bold")
    out.print()
    out.print(input_table(made))
    if made.behaviours:
        out.print()
        out.print(behaviour_table(made))
        if len(made.behaviours) > SHOWN:
            out.print(f"… and {len(made.behaviours) - SHOWN} more: --html or --json has all")
        for name, meaning in made.measures.items():
            out.print(f"{name}: {meaning}", markup=False, highlight=False, soft_wrap=True)
    out.print()
    for note in made.notes:
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def headline(made: Explanation) -> str:
    """Say in a line what was predicted, and what happened."""
    at = made.impression
    if at.sample_id is None:
        happened = "not shown that day"
    else:
        new = ", an ad unseen in training" if at.unseen_ad else ""
        happened = f"impression {at.sample_id} ({at.split}), {'clicked' if at.click else 'not clicked'}{new}"
    return f"user {at.user}, {at.day}, ad {at.ad}: {made.score.probability:.4f} ({happened})"


def input_table(made: Explanation) -> Table:
    """Return what the prediction would be without each group of inputs, as a table for the terminal."""
    table = new_table(f"Without each input (log-odds {made.score.log_odds:+.3f} with all)")
    for head in ("input", "holds", "replaced by"):
        table.add_column(head, overflow="fold")
    for head in ("score without", "adds to log-odds"):
        table.add_column(head, justify="right")
    for one in made.inputs:
        cells = (
            one.name,
            held(one.values) or histories(made),
            one.without,
            f"{one.score.probability:.4f}",
            f"{one.adds:+.3f}",
        )
        table.add_row(*map(Text, cells))
    return table


def behaviour_table(made: Explanation) -> Table:
    """Return the behaviours with what the model makes of them, those that count most first."""
    table = new_table("The user's behaviours")
    for head in ("behaviour (1: oldest)", "goods" if not made.behaviours else ", ".join(made.behaviours[0].values)):
        table.add_column(head, overflow="fold")
    for head in (*made.measures, "score without", "adds to log-odds"):
        table.add_column(head, justify="right")
    for one in ranked(made)[:SHOWN]:
        values = ", ".join(" ".join(map(str, some)) for some in one.values.values())
        told = [number(one.measures[name]) for name in made.measures]
        cells = (str(one.number), values, *told, f"{one.score.probability:.4f}", f"{one.adds:+.3f}")
        table.add_row(*map(Text, cells))
    return table


def ranked(made: Explanation) -> list[Behaviour]:
    """Return the behaviours by the first measure, highest first; where there is none, by what they add."""
    first = next(iter(made.measures), None)

    def rank(one: Behaviour) -> float:
        value = one.adds if first is None else one.measures[first]
        return float("inf") if value is None else -value

    return sorted(made.behaviours, key=rank)


def held(values: dict[str, list[Value]]) -> str:
    """Say what features hold."""
    return ", ".join(f"{name} {' '.join(map(str, some)) or 'none'}" for name, some in values.items())


def histories(made: Explanation) -> str:
    """Say how many behaviours there are, which is what groups of behaviours' inputs hold."""
    return f"{len(made.behaviours)} behaviour{'' if len(made.behaviours) == 1 else 's'}"


def number(value: float | None) -> str:
    """Return a measure as text: whole numbers as they are."""
    if value is None:
        return "none"
    return f"{value:.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.3f}"


def as_json(made: Explanation) -> dict[str, Any]:
    """Return an explanation as plain values: see docs/explain.md."""
    at = made.impression

    def score(one: Score) -> dict[str, float]:
        return {"score": one.probability, "log_odds": one.log_odds}

    def plain(values: dict[str, list[Value]]) -> dict[str, list[dict[str, Any]]]:
        return {name: [{"index": v.index, "value": v.text} for v in some] for name, some in values.items()}

    lender = at.lender
    return {
        "user": at.user,
        "day": str(at.day),
        "ad": at.ad,
        "split": at.split,
        "sample_id": at.sample_id,
        "click": at.click,
        "unseen_ad": at.unseen_ad,
        "time": at.time,
        "ad_from": lender and {"sample_id": lender.sample_id, "user": lender.user, "day": str(lender.day)},
        "model": made.model,
        **score(made.score),
        "ad_image": made.ad_image or None,
        "inputs": [
            {"name": i.name, "values": plain(i.values), "without": i.without, "adds": i.adds, **score(i.score)}
            for i in made.inputs
        ],
        "behaviours": [
            {
                "number": b.number,
                "values": plain(b.values),
                "image": b.image or None,
                "measures": b.measures,
                "adds": b.adds,
                **score(b.score),
            }
            for b in made.behaviours
        ],
        "reads": made.reads,
        "measures": made.measures,
        "notes": made.notes,
    }


def page(made: Explanation, thumbnails: Thumbnails) -> str:
    """Return an explanation as one HTML page. Everything that comes from the data is escaped."""
    of_inputs = max((abs(one.adds) for one in made.inputs), default=0.0)
    of_behaviours = max((abs(one.adds) for one in made.behaviours), default=0.0)
    return page_templates.template("explain.html.j2").render(
        made=made,
        at=made.impression,
        behaviours=ranked(made),
        shows_pictures=bool(made.ad_image) or any(b.image for b in made.behaviours),
        thumbnails=thumbnails,
        time=datetime.datetime.fromtimestamp(made.impression.time / 1000, datetime.UTC),
        histories=histories,
        number=number,
        input_bar=lambda adds: bar(adds, of_inputs),
        behaviour_bar=lambda adds: bar(adds, of_behaviours),
    )


def bar(adds: float, longest: float) -> dict[str, Any]:
    """Return where a bar from the middle begins and how long it is, in percent of the whole width."""
    share = 50.0 * abs(adds) / longest if longest else 0.0
    return {"left": f"{50.0 - share if adds < 0 else 50.0:.2f}", "width": f"{share:.2f}", "up": adds >= 0}
