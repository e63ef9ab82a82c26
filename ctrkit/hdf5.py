"""Writing HDF5 files on disks that may be full."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py


@contextlib.contextmanager
def create(path: Path) -> Iterator[tuple[Any, "CarefulFile"]]:
    """Yield a new h5py.File and the file below it, which tells whether writing goes well.

    HDF5 cannot close a file whose last bytes it could not write: it raises something that is no OSError, and the
    process crashes when it ends. So it is told that all went well, and the first error is raised here, at the latest
    when the block ends.
    """
    with CarefulFile(path, "wb+") as below:
        with h5py.File(below, "w") as h5:
            yield h5, below
        below.check()


class CarefulFile(io.FileIO):
    """A file that keeps the first error of writing to itself until it is asked."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or nothing once there has been an error."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self.error is None:
                done += super().write(view[done:]) or 0
        except OSError as e:
            self.error = e
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the length, unless there has been an error."""
        try:
            return super().truncate(size) if self.error is None else size or 0
        except OSError as e:
            self.error = e
            return size or 0

    def reserve(self, size: int) -> None:
        """Have room for so many bytes, or raise OSError: better before HDF5 relies on what it wrote than after."""
        os.posix_fallocate(self.fileno(), 0, size)

    def check(self) -> None:
        """Raise the first error that there was, if any."""
        if self.error is not None:
            raise self.error
