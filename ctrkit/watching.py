"""Who looks on while a model is trained: each record of metrics.jsonl is told as it is made."""

from collections.abc import Callable, Mapping
from typing import Any

Watch = Callable[[Mapping[str, Any]], None]
"""Is told a record: `step`, `epoch`, `samples`, `loss`, `learning_rate`, and of a validation also `valid_loss` and
`valid_gauc`. What it raises ends the training."""


def nobody(record: Mapping[str, Any]) -> None:
    """Look on, and do nothing."""


class Looking:
    """A watch, to be given to a command as the object of its context."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch


def several(*watches: Watch) -> Watch:
    """Return a watch that tells others."""

    def tell(record: Mapping[str, Any]) -> None:
        for watch in watches:
            watch(record)

    return tell
