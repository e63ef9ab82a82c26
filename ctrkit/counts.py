"""A stage's counts as a table for people."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ctrkit.progress import console


def show(title: str, counts: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
    """Print a table of counts, a row each, with notes beside those that have one."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if notes:
        table.add_column()
    for name, value in counts.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name, shown, *([notes.get(name, "")] if notes else []))
    console().print(table)
