"""The papers' tables with a recipe's variants as rows: ours and theirs side by side, as JSON, Markdown and HTML."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrkit import page_templates
from ctrkit.evaluation import evaluate
from ctrkit.metric_tables import computed_how, covered_how, number, percent, with_interval
from ctrkit.recipe import Eval, PaperTable, Recipe

Table = dict[str, Any]


def make_table(table: PaperTable, predictions: Mapping[str, Path], settings: Eval) -> Table:
    """Evaluate the rows of a table.

    Parameters
    ----------
    table: `[tables.NAME]`.
    predictions: variant → its predictions.parquet.
    settings: `[eval]`; weight, bootstrap and seed count.

    Returns JSON values: `title`, `baseline`, `rows`, `comparisons` (pairs, the first better in the paper), how it was
    computed. A row: `variant`, `label`, `gauc`, `gain` over the baseline and `r_gauc`, each interval at 95%, and the
    paper's `gauc`, `gain` and `r_gauc` (fractions, as ours), null where it has none.
    """
    paths = {row.variant: predictions[row.variant] for row in table.rows}
    chosen = settings.model_copy(update={"baseline": table.baseline, "compare": table.compare})
    metrics = evaluate(paths, chosen)
    gauc = {row.variant: row.paper_gauc for row in table.rows}
    r_gauc = {row.variant: row.paper_r_gauc for row in table.rows}
    rows = []
    for row in table.rows:
        one = metrics["variants"][row.variant]["all"]
        kept = ("gauc", "gauc_low", "gauc_high", "gain", "gain_low", "gain_high", "r_gauc")
        paper = {
            "gauc": row.paper_gauc,
            "gain": _minus(row.paper_gauc, gauc[table.baseline]),
            "r_gauc": None if row.paper_r_gauc is None else round(row.paper_r_gauc / 100, 6),
        }
        rows.append(
            {"variant": row.variant, "label": row.label or row.variant, **{k: one[k] for k in kept}, "paper": paper}
        )
    comparisons = []
    for c in metrics["comparisons"]:
        if c["slice"] != "all":
            continue
        points, gap = (_minus(of[c["better"]], of[c["worse"]]) for of in (r_gauc, gauc))
        paper = {"gauc": gap, "r_gauc": None if points is None else round(points / 100, 6)}
        comparisons.append(
            {**{k: c[k] for k in ("better", "worse", "difference", "low", "high")}, "paper": paper}
            | {"verdict": verdict(c["difference"], c["low"], c["high"])}
        )
    return {
        "title": table.title,
        "note": table.note,
        "baseline": table.baseline,
        "r_gauc": table.r_gauc,
        "rows": rows,
        "comparisons": comparisons,
        "computed": computed_how(metrics),
        "covered": covered_how(metrics["variants"][table.baseline]["all"]),
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a - b, 6)


def verdict(difference: float, low: float | None, high: float | None) -> str:
    """Say whether a difference has the paper's direction, which is upwards, and whether its interval leaves out 0."""
    if difference == 0:
        return "no difference"
    word = "agrees" if difference > 0 else "differs"
    sure = low is not None and high is not None and (low > 0 or high < 0)
    return word if sure else f"{word} (within noise)"


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of a table as text."""
    papers = [row["paper"] for row in table["rows"]]
    heads = ["model", "GAUC [95%]", "gain [95%]"]
    heads += ["R-GAUC"] if table["r_gauc"] else []
    shown = [key for key in ("gauc", "gain", "r_gauc") if any(p[key] is not None for p in papers)]
    shown = [key for key in shown if key != "gain" or "r_gauc" not in shown]
    heads += [
        f"paper: {name}" for key, name in (("gauc", "GAUC"), ("gain", "gain"), ("r_gauc", "R-GAUC")) if key in shown
    ]
    rows = []
    for row in table["rows"]:
        gain = with_interval(row["gain"], row["gain_low"], row["gain_high"], sign=True)
        own = [row["label"], with_interval(row["gauc"], row["gauc_low"], row["gauc_high"])]
        own.append("baseline" if row["variant"] == table["baseline"] else gain)
        own += [percent(row["r_gauc"])] if table["r_gauc"] else []
        rows.append(own + [_paper(row["paper"], key) for key in shown])
    return heads, rows


def _paper(paper: Mapping[str, float | None], key: str) -> str:
    value = paper[key]
    if value is None:
        return "–"
    return percent(value) if key == "r_gauc" else number(value, sign=key == "gain")


def comparison_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of a table's comparisons as text."""
    label = {row["variant"]: row["label"] for row in table["rows"]}
    heads = ["better in the paper", "than", "paper", "here: difference in GAUC [95%]", "direction"]
    rows = []
    for c in table["comparisons"]:
        paper = c["paper"]
        if paper["gauc"] is not None:
            said = number(paper["gauc"], sign=True)
        else:
            said = "–" if paper["r_gauc"] is None else f"{percent(paper['r_gauc'])} R-GAUC"
        here = with_interval(c["difference"], c["low"], c["high"], sign=True)
        rows.append([label[c["better"]], label[c["worse"]], said, here, c["verdict"]])
    return heads, rows


def markdown(recipe: Recipe, tables: Mapping[str, Table], figures: Mapping[str, Any]) -> str:
    """Return tables.md."""
    out = [f"# {recipe.name}: the papers' tables", "", recipe.about, ""]
    for table in tables.values():
        out += [f"## {table['title']}", "", f"{table['computed']} {table['covered']}.", ""]
        out += [*([table["note"], ""] if table["note"] else []), *_markdown_table(*cells(table)), ""]
        if table["comparisons"]:
            out += [*_markdown_table(*comparison_cells(table)), ""]
    for name, figure in figures.items():
        out += [f"## {figure['title']}", "", *([figure["note"], ""] if figure["note"] else [])]
        out += [f"![{figure['title']}]({name}.png)", "", f"Points: [{name}.csv]({name}.csv).", ""]
        out += [*(f"- {said['text']}" for said in figure["reach"]), ""]
    return "\n".join(out)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    return [line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)]


def html(recipe: Recipe, tables: Mapping[str, Table], figures: Mapping[str, Any], folder: Path) -> str:
    """Return tables.html, which needs no other file; `folder` has the figures' PNG files."""
    pictures = {name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in figures}
    shown = [(t, *cells(t), *comparison_cells(t)) for t in tables.values()]
    return page_templates.template("tables.html.j2").render(
        recipe=recipe, tables=shown, figures=figures, pictures=pictures
    )
