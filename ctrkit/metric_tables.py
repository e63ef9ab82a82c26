"""What eval prints: metrics.json as text and rich tables. The report uses the same words."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ctrkit import files
from ctrkit.compat import NAMES
from ctrkit.errors import UserError

UNSEEN = "unseen_ad=true"
"""The slice that shows whether a model can do without a trained ad id."""
COUNTS = ("impressions", "users_kept", "users_dropped", "impressions_covered")
"""Metrics that are whole numbers; and those that may be null:"""
NUMBERS = (
    *("gauc", "gauc_low", "gauc_high", "gain", "gain_low", "gain_high", "r_gauc", "auc", "log_loss"),
    *("normalised_entropy", "calibration", "ece"),
)
MOST_COLUMNS = 8
"""More slices than these stand in rows."""
FEW = 30
"""Of fewer users than this, the GAUC of a slice is given in brackets."""


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics.json that eval wrote."""
    metrics = files.read_json(path)
    if not isinstance(metrics, dict) or not {"settings", "order", "variants", "comparisons"} <= metrics.keys():
        raise UserError(f"{path} is not a metrics.json; write one with: ctrkit eval --gauc FILE... --json {path}")
    return metrics


def check_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Raise UserError, with the first fault, unless a metrics.json has all that tables of it are made of."""

    def fault(where: str, what: str) -> UserError:
        return UserError(f"{path} is not a metrics.json as eval writes it: {where} {what}. Write it again with eval.")

    def within(holder: Any, key: str, kind: Any, where: str) -> Any:
        if not isinstance(holder, dict) or key not in holder:
            raise fault(f"{where}.{key}" if where else key, "is missing")
        if not isinstance(holder[key], kind):
            raise fault(f"{where}.{key}" if where else key, f"is {holder[key]!r}"[:80])
        return holder[key]

    settings = within(metrics, "settings", dict, "")
    for key in ("weight", "ties", "interval", "baseline"):
        within(settings, key, str, "settings")
    order, variants = within(metrics, "order", dict, ""), within(metrics, "variants", dict, "")
    slices = within(order, "slices", list, "order")
    if odd := [name for name in (*slices, *within(order, "variants", list, "order")) if not isinstance(name, str)]:
        raise fault("order", f"holds {odd[0]!r}, which is no name")
    for name in order["variants"]:
        one = within(variants, name, dict, "variants")
        where = f"variants.{name}"
        parts = {f"{where}.all": within(one, "all", dict, where)}
        of_slices = within(one, "slices", dict, where)
        parts |= {f"{where}.slices.{s}": within(of_slices, s, dict, f"{where}.slices") for s in of_slices}
        for place, part in parts.items():
            for key in COUNTS:
                within(part, key, int, place)
            for key in NUMBERS:
                within(part, key, int | float | None, place)


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Format a number, or "n/a"."""
    return "n/a" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def percent(value: float | None, digits: int = 2, sign: bool = True) -> str:
    """Format a fraction as a percentage, or "n/a"."""
    return "n/a" if value is None else f"{value:{'+' if sign else ''}.{digits}%}"


def interval(low: float | None, high: float | None, digits: int = 4, sign: bool = False) -> str:
    """Format an interval as "[low, high]", or nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, digits, sign)}, {number(high, digits, sign)}]"


def with_interval(value: float | None, low: float | None, high: float | None, sign: bool = False) -> str:
    """Format a value and its interval."""
    return f"{number(value, sign=sign)} {interval(low, high, sign=sign)}".rstrip()


def computed_how(metrics: dict[str, Any]) -> str:
    """Say how every GAUC of metrics.json was computed: weights, ties, intervals."""
    settings = metrics["settings"]
    by = "with equal weights" if settings["weight"] == "users" else f"by {settings['weight']}"
    text = (
        f"GAUC is each user's AUC averaged {by} over users with both clicked and unclicked impressions; "
        f"ties {settings['ties']}."
    )
    if settings["bootstrap"]:
        resamples = f"{settings['bootstrap']:,} resamples, seed {settings['seed']}"
        text += f" Intervals: {settings['interval']} ({resamples})."
    return text


def counted(n: int, thing: str) -> str:
    """Format a count of things: "1 user", "2 users"."""
    return f"{n:,} {thing}{'s' if n != 1 else ''}"


def covered_how(one: dict[str, Any]) -> str:
    """Say which users and impressions a GAUC covers."""
    return (
        f"{counted(one['users_kept'], 'user')} kept, {one['users_dropped']:,} dropped for having only one class; "
        f"{percent(one['share_covered'], 1, sign=False)} of {counted(one['impressions'], 'impression')} covered"
    )


def coverage(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (variants, which users and impressions their GAUCs cover); one entry if it is the same for all."""
    by_text: dict[str, list[str]] = {}
    for name in metrics["order"]["variants"]:
        by_text.setdefault(covered_how(metrics["variants"][name]["all"]), []).append(name)
    several = len(metrics["order"]["variants"]) > 1
    return [
        ("All variants" if several and len(by_text) == 1 else ", ".join(names), text) for text, names in by_text.items()
    ]


def statement(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield the GAUC of each file with all that it was computed with, a line a file.

    Where several files cover the same users and impressions, that is said in one line, and the GAUCs are left to
    the table.
    """
    weight, ties = metrics["settings"]["weight"], metrics["settings"]["ties"]
    names = metrics["order"]["variants"]
    covered = {covered_how(metrics["variants"][name]["all"]) for name in names}
    if len(names) > 1 and len(covered) == 1 and all(metrics["variants"][n]["all"]["gauc"] is not None for n in names):
        yield f"GAUC of {len(names)} files: weighted by {weight}; {covered.pop()}; ties {ties}"
        return
    for name in names:
        one = metrics["variants"][name]["all"]
        value = with_interval(one["gauc"], one["gauc_low"], one["gauc_high"])
        if one["gauc"] is None:
            value = "n/a (no user has both clicked and unclicked impressions, so none has an AUC)"
        yield f"{name}: GAUC {value}; weighted by {weight}; {covered_how(one)}; ties {ties}"


def of_few(one: dict[str, Any]) -> str:
    """Format a slice's GAUC, in brackets if few users stand behind it."""
    text = number(one["gauc"])
    return f"({text})" if one["users_kept"] < FEW else text


def significant(low: float | None, high: float | None) -> str:
    """Say whether the interval of a difference leaves out 0."""
    if low is None or high is None:
        return "n/a"
    return "yes" if low > 0 or high < 0 else "no"


def lines(name: str, width: int = 28) -> str:
    """Break a long variant name after a "+", since "basic+ad_id+ad_image+user_images" has no other place for it."""
    rows = [""]
    for part in name.replace("+", "+\0").split("\0"):
        if rows[-1] and len(rows[-1]) + len(part) > width:
            rows.append("")
        rows[-1] += part
    return "\n".join(rows)


def new_table(title: str) -> Table:
    """Return an empty table as all of eval's look."""
    looks = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    looks.padding = (0, 1, 0, 0)
    return looks


def overall_table(metrics: dict[str, Any]) -> Table:
    """Return files × metrics, over all impressions."""
    baseline = metrics["settings"]["baseline"]
    table = new_table("All impressions")
    table.add_column("variant", overflow="fold")
    table.add_column("GAUC")
    if baseline:
        table.add_column(Text(f"gain on {baseline}"))
        table.add_column("R-GAUC", justify="right")
        table.add_column("significant")
    for column in ("AUC", "log loss", "NE", "calibration", "ECE"):
        table.add_column(column, justify="right")
    for name in metrics["order"]["variants"]:
        one = metrics["variants"][name]["all"]
        cells = [lines(name), with_interval(one["gauc"], one["gauc_low"], one["gauc_high"])]
        if baseline:
            gain = with_interval(one["gain"], one["gain_low"], one["gain_high"], sign=True)
            cells += ["baseline" if name == baseline else gain, percent(one["r_gauc"])]
            cells.append("" if name == baseline else significant(one["gain_low"], one["gain_high"]))
        cells += [number(one["auc"]), number(one["log_loss"]), number(one["normalised_entropy"])]
        cells += [number(one["calibration"], 3), number(one["ece"])]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def compat_table(metrics: dict[str, Any]) -> Table:
    """Return files × programs: the GAUC that each would print."""
    table = new_table("GAUC as other programs compute it (docs/gauc.md)")
    table.add_column("variant", overflow="fold")
    table.add_column("GAUC", justify="right")
    programs = metrics["settings"]["compat"]
    for program in programs:
        table.add_column(NAMES[program], justify="right")
    for name in metrics["order"]["variants"]:
        cells = [lines(name), number(metrics["variants"][name]["all"]["gauc"])]
        for program in programs:
            one = metrics["variants"][name]["compat"][program]
            spread = one["value"] is not None and one["low"] != one["high"]
            cells.append("nan" if one["value"] is None else number(one["value"]))
            cells[-1] += f" ({number(one['low'])} to {number(one['high'])}, by the order of ties)" if spread else ""
        table.add_row(*(Text(cell) for cell in cells))
    return table


def slice_tables(metrics: dict[str, Any], slices: Sequence[str]) -> Iterator[Table]:
    """Yield tables of the GAUC by slice: files × slices, or where slices are many, slices × files, a few files each."""
    names = metrics["order"]["variants"]
    if len(slices) <= MOST_COLUMNS:
        yield _slice_table(metrics, names, slices, slices_down=False)
        return
    for begin in range(0, len(names), MOST_COLUMNS):
        yield _slice_table(metrics, names[begin : begin + MOST_COLUMNS], slices, slices_down=True)


def _slice_table(metrics: dict[str, Any], names: Sequence[str], slices: Sequence[str], *, slices_down: bool) -> Table:
    table = new_table("GAUC by slice")
    table.add_column("slice" if slices_down else "variant", overflow="fold")
    for column in names if slices_down else slices:
        table.add_column(Text(column), justify="right", overflow="fold")
    by_name = {name: metrics["variants"][name]["slices"] for name in names}
    cells = {(name, s): of_few(by_name[name][s]) if s in by_name[name] else "" for name in names for s in slices}
    if slices_down:
        for s in slices:
            table.add_row(*(Text(cell) for cell in [s, *(cells[name, s] for name in names)]))
    else:
        for name in names:
            table.add_row(*(Text(cell) for cell in [lines(name, 33), *(cells[name, s] for s in slices)]))
    if any(one["users_kept"] < FEW for of in by_name.values() for s, one in of.items() if s in slices):
        table.caption, table.caption_justify = f"In brackets: of fewer than {FEW} users.", "left"
    return table


def comparison_table(metrics: dict[str, Any], *slices: str) -> Table:
    """Return the paired comparisons over the named slices."""
    table = new_table("Differences in GAUC, paired")
    for column in ("better", "worse", "impressions", "difference", "95% interval", "excludes 0"):
        table.add_column(column, overflow="fold")
    for c in metrics["comparisons"]:
        if c["slice"] not in slices:
            continue
        sure = {None: "n/a", True: "yes", False: "no"}[c["significant"]]
        cells = [lines(c["better"], 33), lines(c["worse"], 33), c["slice"], number(c["difference"], sign=True)]
        cells += [interval(c["low"], c["high"], sign=True), sure]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def text_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return cells as a table for the terminal."""
    table = new_table(title)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
