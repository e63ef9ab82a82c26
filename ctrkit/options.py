"""Options that every stage shares."""

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ctrkit.errors import UsageError
from ctrkit.recipe import load

DAY = click.DateTime(["%Y-%m-%d"])
"""A day as an option: 2024-03-01."""


class FiniteRange(click.FloatRange):
    """A number within bounds, and never nan, which click takes for within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


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


def maybe_recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--recipe`, `--variant` and `--set`, none of them required; `recipe` is None where none is named."""

    def wrapped(recipe: str | None, variant: str | None, sets: tuple[str, ...], **rest: Any) -> Any:
        if recipe is None and (variant or sets):
            raise UsageError("--variant and --set lay something over a recipe: name it with --recipe")
        return command(recipe=None if recipe is None else load(recipe, variant, sets), **rest)

    wrapped.__doc__ = command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key."),
        click.option("--variant", metavar="NAME", help="Lay this variant's overrides over the recipe."),
        click.option("--recipe", metavar="NAME|FILE", help="A shipped recipe's name, or a file."),
    ):
        wrapped = option(wrapped)
    return wrapped


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that a run's `ctrkit.pipeline.Setting` has wherever it is asked for; the command gets one keyword
    `asked`, the fields of it that they give."""

    def wrapped(
        sets: tuple[str, ...],
        raw: Path | None,
        weights: str | None,
        today: datetime.datetime | None,
        since: datetime.datetime | None,
        until: datetime.datetime | None,
        mlflow: str | None,
        **rest: Any,
    ) -> Any:
        days = {"today": today, "since": since, "until": until}
        dates = {name: day.date() if day else None for name, day in days.items()}
        return command(asked={"sets": sets, "raw": raw, "weights": weights, "mlflow": mlflow, **dates}, **rest)

    wrapped.__doc__ = command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        mlflow_option,
        click.option("--to", "until", type=DAY, help="The last of these days. Default: the first."),
        click.option(
            "--from", "since", type=DAY, help="Days from this one to --to, each from the model of the day before."
        ),
        click.option(
            "--today", type=DAY, help="Convert this day on top of the last one; outputs go to OUT/NAME/days/DAY/."
        ),
        click.option("--weights", help="Weights for extract-images: a state dict's path, `published` or `random`."),
        path_option("--raw", "Folder of raw data; leave out where the recipe simulates its own.", required=False),
        click.option("--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a recipe key."),
    ):
        wrapped = option(wrapped)
    return wrapped


def mlflow_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--mlflow`."""
    option = click.option("--mlflow", metavar="URI", help="Record it at MLflow too: sqlite:///FILE or http://SERVER.")
    return option(command)


def rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--nproc` and `--max-restarts`."""
    number = click.IntRange(min=1, max=1024)
    for option in (
        click.option(
            "--max-restarts",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="With several processes: how often all are started again after one has failed.",
        ),
        click.option("--nproc", type=number, help="Processes that share the work here. Default: the recipe's."),
    ):
        command = option(command)
    return command


def path_option(name: str, help: str, *, required: bool = True, **rest: Any) -> Callable[..., Any]:
    """Return a click option that gives a `Path`."""
    return click.option(name, type=click.Path(path_type=Path), required=required, help=help, **rest)
