"""Options that every stage shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ctrkit.recipe import load

DAY = click.DateTime(["%Y-%m-%d"])
"""A day as an option: 2024-03-01."""


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--recipe`, `--variant` and `--set`; the command gets one keyword `recipe`, loaded and checked."""

    def wrapped(recipe: str, variant: str | None, sets: tuple[str, ...], **rest: Any) -> Any:
        return command(recipe=load(recipe, variant, sets), **rest)

    wrapped.__doc__ = command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key."),
        click.option("--variant", metavar="NAME", help="Lay this variant's overrides over the recipe."),
        click.option("--recipe", required=True, metavar="NAME|FILE", help="A shipped recipe's name, or a file."),
    ):
        wrapped = option(wrapped)
    return wrapped


def path_option(name: str, help: str, *, required: bool = True, **rest: Any) -> Callable[..., Any]:
    """Return a click option that gives a `Path`."""
    return click.option(name, type=click.Path(path_type=Path), required=required, help=help, **rest)
