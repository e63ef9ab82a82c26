"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # rich is imported where something is shown: most processes show nothing
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
LINE_SECONDS = 5.0
"""Without a terminal, a line at most this often."""


def console() -> "Console":
    """Return the console for tables: standard output, wide enough for a table where there is no terminal."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=140)


def say(text: str) -> None:
    """Print one plain line of progress to standard error, at once."""
    print(text, file=sys.stderr, flush=True)


class Meter:
    """Counts work done, shows rate and time left. Use as a context manager; call `add` as work is done.

    Parameters
    ----------
    label: what is done, such as "extract-images".
    total: how many units there are, or None where that is unknown.
    unit: what is counted, such as "pictures".
    done: how many were done before, by another process; they do not count for the rate.
    quiet: show nothing, since another process does.
    """

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, *, quiet: bool = False) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self.note = ""
        self.quiet = quiet
        self._begun = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if sys.stderr.isatty() and not self.quiet:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, rate="", completed=self.done)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif exc[0] is None:
            self._line(time.monotonic())

    def add(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units done; `note` (say, the loss) is shown beside the rate."""
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self._rate(now)} {self.note}")
        elif now - self._last >= LINE_SECONDS:
            self._line(now)

    def _rate(self, now: float) -> str:
        rate = (self.done - self._before) / max(now - self._begun, 1e-9)
        return f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.1f} {self.unit}/s"

    def _line(self, now: float) -> None:
        self._last = now
        if self.quiet:
            return
        of = f"/{self.total:,}" if self.total is not None else ""
        left = ""
        if self.total and self._before < self.done < self.total:
            left = f", {(now - self._begun) * (self.total - self.done) / (self.done - self._before):.0f} s left"
        note = f", {self.note}" if self.note else ""
        say(f"{self.label}: {self.done:,}{of} {self.unit}, {self._rate(now)}{left}{note}")


def track(items: Iterable[T], label: str, total: int | None, unit: str) -> Iterator[T]:
    """Yield the items, counting each as one unit of a `Meter`."""
    with Meter(label, total, unit) as meter:
        for item in items:
            yield item
            meter.add()
