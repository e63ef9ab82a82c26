"""Scalars for TensorBoard, written while the work goes on."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FLUSH_SECONDS = 10
"""How long a point may wait before it is on disk."""


class Board:
    """Writes scalars into a folder of TensorBoard event files; nowhere without a folder. Use as a context manager.

    Parameters
    ----------
    folder: for the event files; those of another run go.
    step: the last step that is already there, 0 for a new run. Points of later steps, of a run that was killed and now
        goes on at this step, are hidden.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._folder, self._step = folder, step
        self._writer: Any = None

    def __enter__(self) -> "Board":
        if self._folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            if self._step == 0:
                for old in self._folder.glob("events.out.tfevents.*"):
                    old.unlink()
            purge = self._step + 1 if self._step else None
            self._writer = SummaryWriter(log_dir=str(self._folder), purge_step=purge, flush_secs=FLUSH_SECONDS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Add a point to each curve; None is no point."""
        if self._writer is not None:
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
