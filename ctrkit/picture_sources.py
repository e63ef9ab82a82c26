"""Where pictures lie: a folder, tar and zip archives, or Parquet files with the bytes.

What ids name (`ctrkit.picture_names`) is a path below the folder, a member's path in an archive, or a text in a column
of a Parquet file. Archives and Parquet files are looked through once; a picture is then a span of a file, which any
thread reads without a lock.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrkit.archive_file import ArchiveFile
from ctrkit.disk_texts import AT_ONCE, Texts
from ctrkit.errors import UsageError, UserError
from ctrkit.packed_pictures import Archives, ParquetPictures
from ctrkit.picture_names import Index, Names, Template, in_order, inner_or_none
from ctrkit.pictures import POSITION, BadPicture, Place, Positions, Source, check_size, extensions
from ctrkit.recipe import ExtractImages
from ctrkit.sources import index_path, picture_paths

ARCHIVES = (".tar", ".zip", ".parquet", ".pq")
"""Endings of the files that make a folder one of archives."""
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""How packed files begin."""
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


def open_source(path: Path, settings: ExtractImages, folder: Path | None = None) -> Source:
    """Open what `--pictures` names: a folder, an archive, or a folder or glob of archives. Raises UserError.

    folder: in whose file system nameless files of tables lie; None: that of temporary files.
    """
    archives = find_archives(path)
    kinds = {archive: _kind(archive) for archive in archives}
    if "parquet" in kinds.values():
        if other := next((archive for archive, kind in kinds.items() if kind != "parquet"), None):
            raise UserError(f"--pictures {path} has Parquet files and others ({other.name}) among them; give one kind")
        if settings.index is not None:
            raise UsageError(
                "extract-images.index gives paths, and Parquet files have none: leave it out, and name the id's column "
                "in extract-images.id_column"
            )
        return ParquetPictures(archives, Template(settings.template, folder), settings, folder)
    names: Names = Template(settings.template, folder)
    if settings.index is not None:
        names = Index(index_path(path, settings.index), settings, folder)
    return Archives(kinds, names, folder) if archives else Folder(path, names, folder)


def find_archives(path: Path) -> list[Path]:
    """Return the archives that `--pictures` names, sorted; none if it is a folder of pictures. Raises UserError."""
    return _shards(path) if path.is_dir() else [one for one in picture_paths(path) if one.is_file()]


def _shards(folder: Path) -> list[Path]:
    """Return the archives of a folder that has such, and neither pictures nor folders, in it."""
    inner = [one for one in sorted(folder.iterdir()) if not one.name.startswith(".")]
    if any(one.is_dir() or one.suffix.lower() in extensions() for one in inner):
        return []
    found = [one for one in inner if one.suffix.lower() in ARCHIVES or one.name.lower().endswith(COMPRESSED_TARS)]
    if odd := next((one for one in found if not one.is_file()), None):
        raise UserError(f"{odd} is not a file (a link that leads nowhere, or a pipe, socket or device); remove it")
    return found


def _kind(path: Path) -> str:
    """Return "zip", "parquet" or "tar", by how the file begins. Raises UserError for packed files."""
    start = ArchiveFile.open(path)
    head = start.read(0, min(8, start.size))
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is compressed ({name}), so that no picture in it can be read without all before it. Unpack it "
                f"first: pictures are compressed themselves, and a plain tar of them is hardly larger"
            )
    if head.startswith(b"PAR1"):
        return "parquet"
    return "zip" if head.startswith((b"PK\3\4", b"PK\5\6")) else "tar"


@dataclass(frozen=True, slots=True)
class File:
    """A picture that is a file."""

    path: str

    def read(self) -> bytes:
        """Return the file's bytes. Raises BadPicture."""
        try:
            number = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block
            try:
                found = os.fstat(number)
                if not stat.S_ISREG(found.st_mode):
                    raise BadPicture("not a file")
                check_size(found.st_size)
                return _read_whole(number, found.st_size)
            finally:
                os.close(number)
        except FileNotFoundError:
            raise BadPicture("missing") from None
        except OSError as e:
            if e.errno == errno.ENXIO:  # a socket
                raise BadPicture("not a file") from None
            raise BadPicture(f"cannot be read: {e.strerror}") from None


def _read_whole(number: int, size: int) -> bytes:
    data = os.read(number, size + 1)
    while len(data) < size and (more := os.read(number, size - len(data))):
        data += more
    return data


class Folder:
    """Pictures as files below a folder."""

    def __init__(self, folder: Path, names: Names, tables: Path | None) -> None:
        self.folder, self.names, self._tables = folder, names, tables
        self.unnamed = names.unnamed
        self._found: Texts | None = None

    def find(self) -> Texts:
        """Return the ids of all pictures below the folder, sorted."""
        if self._found is None:
            self._found = in_order(self.names.images(_walk(self.folder, "")), self.unnamed, self._tables)
        return self._found

    def has(self, image: str) -> bool:
        """Say whether the picture's file is there."""
        try:
            return os.path.isfile(self._path(image))
        except BadPicture:
            return False

    def _path(self, image: str) -> str:
        inner = self.names.inner(image)
        if inner.startswith("/") or ".." in inner.split("/") or "\0" in inner or not image:
            raise BadPicture("the name is not a path below the pictures folder")
        return os.path.join(self.folder, inner)

    def place(self, image: str) -> Place:
        """Return the picture's file. Raises BadPicture for a name that leads out of the folder."""
        return File(self._path(image))

    def where(self, image: str) -> str:
        """Return the path below the folder."""
        return inner_or_none(self.names, image)

    def at(self, position: int, image: str) -> Place:
        """Return the picture's file. Raises BadPicture for a name that leads out of the folder."""
        return self.place(image)

    def positions(self, images: Sequence[str], begin: int, end: int) -> Iterator[Positions]:
        """Yield pictures in the order in which they are asked for."""
        for at in range(begin, end, AT_ONCE):
            some = np.zeros(min(AT_ONCE, end - at), POSITION)
            some["picture"] = np.arange(at, at + len(some))
            yield some


def _walk(folder: Path | str, below: str) -> Iterator[str]:
    """Yield the paths of all files below a folder but for hidden ones, as they come."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield below + entry.name
            elif not entry.is_symlink():
                yield from _walk(entry.path, f"{below}{entry.name}/")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
