"""The report: one HTML file that holds everything it shows, so that people look rather than read; and its figures as
PNG and CSV. docs/report.md says what each section shows."""

from pathlib import Path
from typing import Any

from ctrkit import figures
from ctrkit.recipe import Recipe
from ctrkit.report_content import Sources, gather
from ctrkit.report_figures import make_figures
from ctrkit.report_page import render


def write_report(recipe: Recipe, sources: Sources, page: Path, folder: Path) -> dict[str, Any]:
    """Write the page, and its figures into a folder that is made; return counts for the sidecar."""
    content = gather(recipe, sources)
    made = make_figures(content)
    folder.mkdir()
    figures.write(made, folder)
    page.write_text(render(recipe, content, made), encoding="utf-8")
    return {"figures": [figure.name for figure in made], "absent": sorted(content.why)}
