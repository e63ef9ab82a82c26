"""What a study draws: the keys of `[tune.space]`, each a range or a list of choices, as Optuna's parameters.

Choices may be of any kind, lists too; for Optuna they are texts, the JSON of the value.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrkit.errors import UsageError
from ctrkit.recipe import NOT_THE_MODEL, Range, Recipe, check_alone, find, merge, parse_set, read

if TYPE_CHECKING:
    from optuna.trial import Trial

TUNABLE = ("train", "features", "select-clicks", "extract-images", "import-features", "tune-backbone", "group")
"""Tables whose keys may be searched, besides `convert.negative_rate`: none changes which samples validate."""
FIXED = NOT_THE_MODEL | {"validation", "warm_start", "warm_from", "warm_optimiser"}
"""Keys of [train] that may not."""


@dataclass(frozen=True)
class Dimension:
    """One key and what it may be."""

    key: str
    range: Range | None
    choices: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return self.range is not None and all(
            isinstance(n, int) for n in (self.range.low, self.range.high, self.range.step or 1)
        )

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that tell whether all are possible."""
        return self.choices if self.range is None else (self.range.low, self.range.high)

    def suggest(self, trial: "Trial") -> Any:
        """Draw a value."""
        if self.range is None:
            texts = {_text(choice): choice for choice in self.choices}
            return texts[trial.suggest_categorical(self.key, list(texts))]
        low, high, step, log = self.range.low, self.range.high, self.range.step, self.range.log
        if step is not None:  # Optuna wants a whole number of steps
            high = low + math.floor((high - low) / step + 1e-9) * step
        if self.whole:
            return trial.suggest_int(self.key, int(low), int(high), step=int(step or 1), log=log)
        return trial.suggest_float(self.key, low, high, step=step, log=log)

    def parameter(self, value: Any) -> Any:
        """Return a value as Optuna has it; None if it is none of the possible ones."""
        if self.range is None:
            return _text(value) if _text(value) in map(_text, self.choices) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        low, high, step = self.range.low, self.range.high, self.range.step or (1 if self.whole else 0)
        steps = (value - low) / step if step else 0.0
        there = low <= value <= high and abs(steps - round(steps)) < 1e-9
        return (int(value) if self.whole else float(value)) if there and not (self.whole and value % 1) else None

    def value(self, parameter: Any) -> Any:
        """Return what Optuna's parameter stands for."""
        return parameter if self.range is not None else json.loads(parameter)


def dimensions(recipe: Recipe) -> list[Dimension]:
    """Return what a recipe's `[tune.space]` asks for."""
    return [
        Dimension(key, Range.model_validate(asked))
        if isinstance(asked, Mapping)
        else Dimension(key, None, tuple(asked))
        for key, asked in recipe.tune.space.items()
    ]


def override(key: str, value: Any) -> str:
    """Return a value as `--set` takes it."""
    return f"{key}={_text(value)}"


def checked(recipe: str, variant: str | None, sets: Sequence[str]) -> tuple[list[Dimension], dict[str, Any]]:
    """Return the dimensions of a recipe's space, and the recipe's own values of their keys.

    Raises UsageError for a recipe without a space, a key or a value that cannot be, and what must not be searched.
    """
    data, where = read(recipe, variant, sets), find(recipe)
    loaded = check_alone(data, str(where))
    found = dimensions(loaded)
    if not found:
        raise UsageError(
            f"{where} has no [tune.space], so there is nothing to search: name keys and their ranges there, such as "
            '"train.learning_rate" = { low = 1e-4, high = 1e-2, log = true } (docs/tuning.md)'
        )
    own: dict[str, Any] = {}
    paths: dict[tuple[str, ...], str] = {}
    for dimension in found:
        path = _path(dimension.key, where)
        if (other := paths.setdefault(path, dimension.key)) != dimension.key:
            raise UsageError(f"{where}: tune.space has {other!r} and {dimension.key!r}, which are the same key")
        for value in dimension.ends:
            _check_value(data, dimension.key, value, where)
        own[dimension.key] = _own(loaded, data, path)
    if loaded.train.warm_start:
        raise UsageError(
            f"{where}: train.warm_start = {loaded.train.warm_start!r} needs another variant's model, and a study "
            "trains each trial from scratch: --set train.warm_start= --set train.warm_from="
        )
    if not loaded.train.validation or not loaded.split.valid:
        key = "train.validation = false" if not loaded.train.validation else "split.valid, which names no day,"
        raise UsageError(f"{where}: {key} leaves no validation GAUC to search by; the test days are not looked at")
    return found, own


def _check_value(data: Mapping[str, Any], key: str, value: Any, where: Path) -> None:
    try:
        check_alone(merge(data, parse_set(override(key, value))), str(where))
    except UsageError as e:
        told = e.message.removeprefix(f"{where}: ")
        raise UsageError(f"{where}: tune.space has {key!r}, and with {_text(value)}: {told}") from None


def _path(key: str, where: Path) -> tuple[str, ...]:
    """Return the tables and the key of a name; refuse what would change the objective or nothing."""
    if "." not in key:
        raise UsageError(f"{where}: tune.space has {key!r}, and a key has its table before it: train.{key}, say")
    path: list[str] = []
    part: Any = parse_set(f"{key}=0")
    while isinstance(part, Mapping):
        [(name, part)] = part.items()
        path.append(name)
    if path[0] == "train" and path[-1] in FIXED:
        why = "does not change the model" if path[-1] in NOT_THE_MODEL else "is the same for all trials of a study"
        raise UsageError(f"{where}: tune.space has {key!r}, which {why}; leave it out")
    if path[0] not in TUNABLE and path != ["convert", "negative_rate"]:
        raise UsageError(
            f"{where}: tune.space has {key!r}; only keys of {', '.join(f'[{t}]' for t in TUNABLE)} and "
            "convert.negative_rate can be searched, since trials are compared on the same validation samples"
        )
    return tuple(path)


def _own(recipe: Recipe, data: Any, path: tuple[str, ...]) -> Any:
    """Return the value that a recipe has for a key, as its file gives it or by default; None where that is no value."""
    for name in path:
        data = data.get(name) if isinstance(data, Mapping) else None
    if data is not None:
        return data
    plain: Any = recipe.model_dump(mode="json", by_alias=True)
    for name in path:
        plain = plain[name]
    return plain


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
