"""Batches of vectors in files that survive a kill at any moment: records, each of which is there whole or not at all.

A log is a folder of files, one for each process that ever wrote to it; a file is records one after the other:

    header  magic, number of the batch, rows, bytes of the notes, digest of the body, digest of the header so far
    body    the vectors, [rows, width] float16, then the notes, JSON

Appending is one write and no flush: what a process wrote outlives it, however it ends. When the whole machine stops,
the digests tell the records that reached the disk from those that did not.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ctrkit.disk_tables import RUN, Records, Table
from ctrkit.errors import Resumable

Half = npt.NDArray[np.float16]
Notes = dict[str, Any]
RECORD = np.dtype([("file", "i4"), ("offset", "i8"), ("rows", "i4"), ("notes", "i4")])
"""Of a batch: in which file it is, from 1 on (0: in none), where its body begins, its rows, the bytes of its notes."""

MAGIC = b"ctrkit\x01\n"
_HEADER = struct.Struct("<8sQIIQ")
_CHECK = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECK.size


class _Place(NamedTuple):
    """A `RECORD`."""

    file: int
    offset: int
    rows: int
    notes: int


class BatchLog:
    """Batches `begin` to `end` − 1 of a log. Use as a context manager.

    Parameters
    ----------
    folder: of the log, made by the first `append`.
    width: of the vectors.
    begin, end: the batches that this process is to do. Those that the folder holds whole are taken over, whoever
        wrote them; their bodies are read once, to be sure.
    """

    def __init__(self, folder: Path, width: int, begin: int, end: int) -> None:
        self.folder, self.width, self.begin, self.end = folder, width, begin, end
        self._files: list[Path] = []
        self._records = Table.zeros(end - begin, RECORD, folder.parent)
        self.rows = 0
        """Of all batches that are there."""
        self._writer = self._reader = -1
        self._written = 0
        self._read_from: Path | None = None
        for path in sorted(folder.glob("log-*")):
            self._files.append(path)
            self._take_over(path)

    def __enter__(self) -> "BatchLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: TracebackType | BaseException | None) -> None:
        for fd in (self._writer, self._reader):
            if fd >= 0:
                os.close(fd)
        self._writer = self._reader = -1

    def missing(self) -> Iterator[int]:
        """Yield the batches that are still to do, in order."""
        return self._that(lambda records: records["file"] == 0)

    def append(self, number: int, vectors: Half, notes: Notes) -> None:
        """Add a batch: vectors [rows, width] and what else is to be known. An OSError leaves the log as it was."""
        if self._writer < 0:
            self._create()
        body = np.ascontiguousarray(vectors).tobytes() + (json.dumps(notes).encode() if notes else b"")
        noted = len(body) - vectors.nbytes
        header = _HEADER.pack(MAGIC, number, len(vectors), noted, xxhash.xxh3_64_intdigest(body))
        record = header + _CHECK.pack(xxhash.xxh3_64_intdigest(header)) + body
        try:
            self._write(record)
            self._note(number, len(self._files), self._written + HEADER_BYTES, len(vectors), noted)
        except OSError:
            os.ftruncate(self._writer, self._written)
            raise
        self._written += len(record)

    def read(self, number: int) -> tuple[Half, Notes]:
        """Return a batch's vectors, [rows, width], and notes. Raises Resumable if the file has changed since."""
        place = self._place(number)
        path = self._files[place.file - 1]
        if path != self._read_from:
            if self._reader >= 0:
                os.close(self._reader)
            self._reader, self._read_from = os.open(path, os.O_RDONLY), path
        body = self._body(self._reader, place)
        if body is None:
            raise Resumable(f"{path} has changed or is damaged; run the same command again, which does the rest anew")
        size = place.rows * self.width * 2
        vectors = np.frombuffer(body[:size], np.float16).reshape(-1, self.width)
        return vectors, json.loads(body[size:]) if place.notes else {}

    def notes(self) -> Iterator[tuple[int, Notes]]:
        """Yield number and notes of the batches that have some, in order."""
        for number in self._that(lambda records: records["notes"] > 0):
            yield number, self.read(number)[1]

    def _that(self, holds: Callable[[Records], npt.NDArray[np.bool_]]) -> Iterator[int]:
        """Yield the batches of whose records it holds, in order."""
        for begin in range(0, len(self._records), RUN):
            some = np.flatnonzero(holds(self._records.read(begin, begin + RUN)))
            yield from (some + begin + self.begin).tolist()

    def _create(self) -> None:
        """Open a file that no other process writes to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while self._writer < 0:
            path = self.folder / f"log-{number:06}"
            try:
                self._writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            except FileExistsError:
                number += 1
        self._files.append(path)

    def _write(self, record: bytes) -> None:
        left = memoryview(record)
        while left:
            left = left[os.write(self._writer, left) :]

    def _note(self, number: int, file: int, offset: int, rows: int, notes: int) -> None:
        self._records.put(number - self.begin, np.array([(file, offset, rows, notes)], RECORD))
        self.rows += rows

    def _place(self, number: int) -> "_Place":
        return _Place(*self._records.read(number - self.begin, number - self.begin + 1)[0].item())

    def _body(self, fd: int, place: "_Place") -> bytes | None:
        """Return the body of a batch, or None if it is not what its header says."""
        size = place.rows * self.width * 2 + place.notes
        header = os.pread(fd, HEADER_BYTES, place.offset - HEADER_BYTES)
        body = os.pread(fd, size, place.offset)
        whole = len(header) == HEADER_BYTES and len(body) == size
        return body if whole and _HEADER.unpack_from(header)[4] == xxhash.xxh3_64_intdigest(body) else None

    def _take_over(self, path: Path) -> None:
        """Find the records of a file, up to the first that is not whole."""
        offset = 0
        fd = os.open(path, os.O_RDONLY)
        try:
            while len(header := os.pread(fd, HEADER_BYTES, offset)) == HEADER_BYTES:
                magic, number, rows, notes, _ = _HEADER.unpack_from(header)
                (check,) = _CHECK.unpack_from(header, _HEADER.size)
                if magic != MAGIC or check != xxhash.xxh3_64_intdigest(header[: _HEADER.size]):
                    break
                offset += HEADER_BYTES
                if self.begin <= number < self.end and not self._place(number).file:
                    place = _Place(len(self._files), offset, rows, notes)
                    if self._body(fd, place) is not None:
                        self._note(number, *place)
                offset += rows * self.width * 2 + notes
        finally:
            os.close(fd)
