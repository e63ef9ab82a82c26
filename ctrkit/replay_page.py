"""What `replay` shows: replay.json as tables for the terminal, as Markdown, as one HTML page and as a figure."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ctrkit import page_templates, plot_text
from ctrkit.charts import COLOURS
from ctrkit.metric_tables import number, percent, text_table

SIMULATED = (
    "Everything here is simulated: shop, users, bids and clicks are made up, and the models were trained on that "
    "shop's logs. It shows that the parts fit together and that a better ranking pays in this world; it does not tell "
    "what pictures are worth on real traffic."
)
PAPER = (
    "The paper: DICM section VII-E, relative gain of the strategy with images over the one without, live traffic of an "
    "advertising system, counted within 24 hours; no interval is given."
)
METRICS = {"ctr": "CTR", "ecpm": "eCPM"}
HOW = {
    "test": "as a test sees it (users dealt to arms, clicks drawn)",
    "expected": "the same users, expected clicks",
    "all_traffic": "each arm with all users, expected clicks",
}
Found = Mapping[str, Any]


def about(found: Found) -> list[str]:
    """Return what was done, a sentence or two each."""
    s, rule = found["settings"], {"second": "generalised second price", "first": "first price"}
    slots = "one slot" if s["slots"] == 1 else f"{s['slots']} slots"
    return [
        f"{found['users']:,} users of {', '.join(found['days'])} with {found['page_views']:,} page views, {slots} "
        f"each; {s['candidates']} candidate ads a page view, ranked by bid × predicted click probability; bids "
        f"log-normal, median {s['bid_median']:g}, σ {s['bid_sigma']:g}; a click costs by {rule[s['price']]}. "
        f"Seed {s['seed']}.",
        "CTR: clicks over impressions. eCPM: revenue per 1,000 impressions, in units of money. Intervals at 95%, by "
        "the delta method with the user as unit; they know of chance in users and clicks, not of how a training went.",
        PAPER,
    ]


def arm_cells(found: Found) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows: the rates of each arm."""
    heads = ["arm", "users", "clicks / impressions", "CTR", "eCPM", "expected", "", "with all users", "", "unseen ads"]
    heads[6], heads[8] = "eCPM expected", "eCPM with all users"
    heads[5], heads[7] = "CTR expected", "CTR with all users"
    rows = []
    for name, one in found["arms"].items():
        test = one["test"]
        row = [name, f"{test['users']:,}", f"{test['clicks']:,} / {test['impressions']:,}"]
        for part in (test, one["expected"], one["all_traffic"]):
            row += [percent(part["ctr"], sign=False), number(part["ecpm"], 1)]
        rows.append([*row, percent(found["unseen_ads"][name], 1, sign=False)])
    best = found["by_the_truth"]
    ends = [percent(best["ctr"], sign=False), number(best["ecpm"], 1), ""]
    rows.append(["(ranked by bid × the true probability)", *[""] * 6, *ends])
    return heads, rows


def lift_cells(found: Found) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows: the differences from the control, the A/A test's and the paper's."""
    rows = [
        [f"{c['arm']} against {c['control']}", how, *(_lift(c[what][m]) for m in METRICS)]
        for c in found["comparisons"]
        for what, how in HOW.items()
    ]
    same = found["a_a"]
    rows.append([f"A/A: {found['control']} against itself", HOW["test"], *(_lift(same[m]) for m in METRICS)])
    rows.append(["the paper", "live traffic", *(percent(found["paper"][m], 1) for m in METRICS)])
    return ["relative difference", "how", "CTR [95%]", "eCPM [95%]"], rows


def a_a(found: Found) -> str:
    """Say how often the A/A test finds a difference where there is none."""
    same = found["a_a"]
    if not same["splits"] or same["ctr_excludes_zero"] is None:
        return ""
    shares = " and ".join(f"{percent(same[f'{m}_excludes_zero'], 1, sign=False)} ({METRICS[m]})" for m in METRICS)
    return (
        f"In {same['splits']:,} other A/A tests, each with a split and clicks of its own, the interval left out 0 in "
        f"{shares}; 5% is what it should be."
    )


def _lift(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "n/a"
    return f"{percent(one['value'], 1)} [{percent(one['low'], 1)}, {percent(one['high'], 1)}]"


def show(found: Found, console: Console) -> None:
    """Print the tables."""
    title = f"{found['recipe']}: a simulated A/B test"
    heads, rows = arm_cells(found)
    tested = ("users", "clicks / impressions", "CTR", "eCPM")
    keep = [0, *(i for i, head in enumerate(heads) if head in tested or "all users" in head)]
    console.print(text_table(title, [heads[i] for i in keep], [[row[i] for i in keep] for row in rows]))
    console.print(text_table("", *lift_cells(found)))
    for text in (a_a(found), SIMULATED):
        if text:
            console.print(text)


def markdown(found: Found) -> str:
    """Return replay.md."""
    out = [f"# {found['recipe']}: a simulated A/B test", "", f"**{SIMULATED}**", ""]
    for cells in (lift_cells(found), arm_cells(found)):
        out += [*_markdown_table(*cells), ""]
    for text in (a_a(found), *about(found)):
        out += [text, ""] if text else []
    return "\n".join([*out, "![Relative differences with their intervals](lift.png)", ""])


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return [line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)]


def html(found: Found, folder: Path) -> str:
    """Return replay.html, which needs no other file; `folder` has lift.png."""
    picture = base64.b64encode((folder / "lift.png").read_bytes()).decode()
    tables = [lift_cells(found), arm_cells(found)]
    texts = [text for text in (a_a(found), *about(found)) if text]
    return page_templates.template("replay.html.j2").render(
        recipe=found["recipe"], simulated=SIMULATED, tables=tables, texts=texts, picture=picture
    )


def draw(found: Found, path: Path) -> None:
    """Draw the differences with their intervals, and the paper's, as PNG. The same numbers give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(c["arm"], what, c[what]) for c in found["comparisons"] for what in HOW]
    rows.append((f"A/A: {found['control']}", "test", found["a_a"]))
    short = {"test": "the test", "expected": "expected", "all_traffic": "all users"}
    with plot_text.any_script():
        figure = Figure(figsize=(8.4, 1.6 + 0.34 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
            for place, (_, what, one) in enumerate(rows):
                if (lift := one[metric]) is None:
                    continue
                x, low, high = (100 * lift[key] for key in ("value", "low", "high"))
                colour = COLOURS[list(HOW).index(what)]
                axes.errorbar([x], [place], xerr=[[x - low], [high - x]], fmt="o", color=colour, markersize=5, lw=1.6)
            axes.axvline(0, color="#5d6878", lw=0.8)
            axes.axvline(100 * found["paper"][metric], color="#009e73", lw=1, ls="--")
            axes.set_title(f"{name}: difference from the control, %\n(dashed: the paper's, live traffic)", fontsize=9)
            axes.margins(y=0.15)
            axes.grid(axis="x", color="#dfe4ea", lw=0.6)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        panels[0].set_yticks(range(len(rows)), [f"{name}\n{short[what]}" for name, what, _ in rows], fontsize=7)
        for label in panels[0].get_yticklabels():  # text of the data is no mathematics
            label.set_parse_math(False)
        panels[0].invert_yaxis()
        figure.suptitle("A simulated A/B test", fontsize=11)
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
