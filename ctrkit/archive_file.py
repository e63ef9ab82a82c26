"""Reading spans of large files from many threads, each file opened once."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from ctrkit.errors import UserError
from ctrkit.pictures import BadPicture

OPEN_FILES = 128
"""Files that stay open."""


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file as it was when it was first opened."""

    path: str
    size: int
    modified: int
    inode: int

    @classmethod
    def open(cls, path: Path) -> "ArchiveFile":
        """Return the file as it is now. Raises UserError."""
        try:
            found = path.stat()
            with open(path, "rb"):
                return cls(str(path), found.st_size, found.st_mtime_ns, found.st_ino)
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from None

    def read(self, offset: int, length: int) -> bytes:
        """Return a span of the file. Raises BadPicture if the file has changed or cannot be read."""
        try:
            descriptor = _descriptor(self)  # held, so that it stays open while it is read
            found = os.fstat(descriptor.number)
            data = os.pread(descriptor.number, length, offset)
        except OSError as e:
            raise BadPicture(f"cannot be read: {self.path}: {e.strerror}") from None
        if (found.st_size, found.st_mtime_ns, found.st_ino) != (self.size, self.modified, self.inode):
            raise BadPicture(f"cannot be read: {self.path} has changed meanwhile")
        if len(data) < length:
            raise BadPicture(f"cannot be read: {self.path} ends before it")
        return data


class _Descriptor:
    """An open file, closed when no thread uses it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@functools.lru_cache(maxsize=OPEN_FILES)
def _descriptor(file: ArchiveFile) -> _Descriptor:
    return _Descriptor(os.open(file.path, os.O_RDONLY))
