"""Scalars for TensorBoard, written while the work goes on. A side output: where it fails, the work goes on without."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ctrkit import digests, files
from ctrkit.progress import say


class Board:
    """Writes scalars into a folder of TensorBoard event files; nowhere without a folder. Use as a context manager.

    A point is on disk once it is added. What cannot be written (a full disk, a file in the folder's place) is told
    once, and then nothing more is written.

    Parameters
    ----------
    folder: for the event files, where others may be.
    step: the last step that is already there, 0 for a new run, before which the event files of the same output go.
        Points of later steps, of a run that was killed and now goes on at this step, are hidden.
    output: what the curves are of; a digest of its path ends the names of its event files.
    """

    def __init__(self, folder: Path | None, step: int, output: Path | None = None) -> None:
        self._folder, self._step = folder, step
        self._suffix = f".ctrkit-{digests.text(os.path.abspath(output or ''))[:12]}"
        self._file: int | None = None

    def __enter__(self) -> "Board":
        if self._folder is None:
            return self
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._step == 0:
                for old in self._folder.glob(f"events.out.tfevents.*{self._suffix}"):
                    old.unlink()
            name = f"events.out.tfevents.{time.time_ns():020}.{socket.gethostname()}.{os.getpid()}{self._suffix}"
            self._file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as e:
            self._give_up(e)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        self._close()

    def add(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Add a point to each curve; None is no point."""
        if self._file is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items() if value is not None]
        if points:
            self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def _write(self, event: object) -> None:
        if self._file is None:
            return
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())  # type: ignore[attr-defined]
        rest = record.getvalue()
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as e:
            self._give_up(e)

    def _give_up(self, error: OSError) -> None:
        why = files.no_room(error) or error.strerror
        say(f"train: no more curves for TensorBoard in {self._folder}: {why}. Training goes on without")
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
