"""Pictures in files of many: members of tar and zip files, values of Parquet columns."""

import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrkit import parquet_pages
from ctrkit.archive_file import ArchiveFile
from ctrkit.errors import UserError
from ctrkit.picture_names import NO_ID, Names, in_order, inner_or_none, say_repeats
from ctrkit.pictures import BadPicture, Int, Place, check_size
from ctrkit.progress import Meter, say
from ctrkit.recipe import ExtractImages

ZIP_HEADER = 30
"""Bytes before the name in a member's header."""
TAR = -1
"""Stands for a member of a tar among the methods of zip."""
BLOCK = tarfile.BLOCKSIZE
LARGE_PAGE = 8 << 20


class Packed(ABC):
    """Pictures in files of many; `row` leads from a picture's path to its number, in the order of files and offsets."""

    any_ending = False

    def __init__(self, files: Sequence[Path], names: Names) -> None:
        self.files, self.names = files, names
        self.unnamed = list(names.unnamed)
        self._row: dict[str, int] = {}

    @abstractmethod
    def _place(self, row: int) -> Place: ...

    @abstractmethod
    def _file(self, row: int) -> Path: ...

    def _find(self, image: str) -> int:
        try:
            return self._row.get(_plain(self.names.inner(image)), -1)
        except BadPicture:
            return -1

    def find(self) -> list[str]:
        """Return the ids of all pictures, sorted."""
        found, bad = in_order(self.names.images(self._row, self.any_ending))
        self.unnamed = [one for one in self.unnamed if one not in bad] + bad
        return found

    def has(self, image: str) -> bool:
        """Say whether the picture is there."""
        return self._find(image) >= 0

    def place(self, image: str) -> Place:
        """Return where the picture lies. Raises BadPicture if it does not."""
        row = self._row.get(_plain(self.names.inner(image)), -1)
        if row < 0:
            raise BadPicture("missing")
        return self._place(row)

    def where(self, image: str) -> str:
        """Return the file and the path in it."""
        row = self._find(image)
        inner = inner_or_none(self.names, image)
        return f"{self._file(row).name}/{inner}" if row >= 0 else inner

    def order(self, images: Sequence[str]) -> Int:
        """Return the order in the files."""
        rows = np.fromiter((self._find(image) for image in images), dtype=np.int64, count=len(images))
        return np.argsort(rows, kind="stable").astype(np.int64)


def _plain(inner: str) -> str:
    """Return a member's path without "./" before it, as `tar c .` writes it."""
    return inner[2:] if inner.startswith("./") else inner


@dataclass(frozen=True, slots=True)
class Member:
    """A picture in a tar or zip file."""

    archive: ArchiveFile
    offset: int
    """Of the data in a tar, of the header in a zip."""
    packed: int
    size: int
    """Bytes, packed and not."""
    method: int
    """TAR, or how zip packed it."""
    check: int
    """Zip's CRC-32."""

    def read(self) -> bytes:
        """Return the member's bytes. Raises BadPicture."""
        check_size(max(self.packed, self.size))
        if self.method == TAR:
            return self.archive.read(self.offset, self.size)
        header = self.archive.read(self.offset, ZIP_HEADER)
        if not header.startswith(b"PK\3\4"):
            raise BadPicture("broken: no member where the zip file's directory says")
        before = ZIP_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self.archive.read(self.offset + before, self.packed)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
            except zlib.error:
                raise BadPicture("broken: cannot be unpacked from the zip file") from None
        elif self.method != zipfile.ZIP_STORED:
            raise BadPicture("zip file with another compression than deflate, or encrypted")
        if len(data) != self.size or zlib.crc32(data) != self.check:
            raise BadPicture("broken: not what the zip file's checksum says")
        return data


MEMBER = np.dtype(
    [("archive", "i4"), ("offset", "i8"), ("packed", "i8"), ("size", "i8"), ("method", "i2"), ("check", "u4")]
)
ENCRYPTED = 0x7FFF
"""Stands for the method of members that need a password."""


class Archives(Packed):
    """Pictures in tar and zip files. Of members with the same name the last one counts, as if they were unpacked."""

    def __init__(self, kinds: dict[Path, str], names: Names) -> None:
        super().__init__(list(kinds), names)
        self._archives = [ArchiveFile.open(path) for path in kinds]
        tables = []
        row = 0
        with Meter("look through archives", len(kinds), "files") as meter:
            for number, (path, kind) in enumerate(kinds.items()):
                found, table = _zip_members(path) if kind == "zip" else _tar_members(path, self._archives[number].size)
                table["archive"] = number
                known = len(self._row)
                self._row.update(zip(found, range(row, row + len(found)), strict=True))
                say_repeats(path, len(found) + known - len(self._row), "the last")
                row += len(found)
                tables.append(table)
                meter.add()
        self._members = np.concatenate(tables)

    def _place(self, row: int) -> Place:
        archive, *rest = self._members[row].item()
        return Member(self._archives[archive], *rest)

    def _file(self, row: int) -> Path:
        return self.files[int(self._members["archive"][row])]


Members = tuple[list[str], np.ndarray[tuple[int], np.dtype[np.void]]]
"""Paths, and a `MEMBER` of each; by offset."""


def _zip_members(path: Path) -> Members:
    try:
        with zipfile.ZipFile(path) as archive:
            found = sorted((m for m in archive.infolist() if _is_picture(m.filename)), key=lambda m: m.header_offset)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
        raise UserError(f"{path} is not a whole zip file: {e}") from None
    rows = [
        (0, m.header_offset, m.compress_size, m.file_size, ENCRYPTED if m.flag_bits & 1 else m.compress_type, m.CRC)
        for m in found
    ]
    return [_plain(m.filename) for m in found], np.array(rows, dtype=MEMBER)


def _is_picture(name: str) -> bool:
    """Say whether a member's name may be a picture's: no folder, nothing hidden."""
    return not name.endswith("/") and not any(part.startswith(".") for part in _plain(name).split("/"))


def _tar_members(path: Path, size: int) -> Members:
    found: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []
    try:
        with open(path, "rb") as f, tarfile.open(fileobj=f, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would keep all of them
                name = _plain(member.name)
                if member.islnk():
                    links.append((name, _plain(member.linkname)))
                elif member.issym():
                    links.append((name, os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))))
                elif member.isreg() and not member.issparse() and _is_picture(name):
                    if member.offset_data + member.size > size:
                        raise UserError(f"{path} is cut off: {name} goes on beyond its end. Copy the file again")
                    found.pop(name, None)
                    found[name] = (member.offset_data, member.size)
            f.seek(tar.offset)
            if f.read(BLOCK).strip(b"\0"):
                raise UserError(f"{path} is damaged at byte {tar.offset:,}, where a member should begin")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{path} is not a whole tar file, nor zip or Parquet: {e}") from None
    for name, target in links:
        if target in found and _is_picture(name):
            found[name] = found[target]
    rows = [(0, offset, length, length, TAR, 0) for offset, length in found.values()]
    return list(found), np.array(rows, dtype=MEMBER)


# --- Parquet -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """A picture in a Parquet file."""

    page: parquet_pages.Page
    row: int
    """In the page."""

    def read(self) -> bytes:
        """Return the value. Raises BadPicture."""
        try:
            value = parquet_pages.cache.values(self.page)[self.row]
        except (ValueError, IndexError, OSError) as e:
            raise BadPicture(f"broken: the Parquet file is damaged there: {e}") from None
        if value is None:
            raise BadPicture("missing")
        check_size(len(value))
        return bytes(value)


class ParquetPictures(Packed):
    """Pictures in a column of Parquet files. Of rows with the same id the first one counts."""

    any_ending = True

    def __init__(self, files: Sequence[Path], names: Names, settings: ExtractImages) -> None:
        super().__init__(files, names)
        self._pages: list[parquet_pages.Page] = []
        self._path_of_page: list[int] = []
        before = 0
        with Meter("look through Parquet files", len(files), "files") as meter:
            for number, path in enumerate(files):
                pages = parquet_pages.pages(path, settings.bytes_column, "extract-images.bytes_column")
                ids = parquet_pages.texts(path, settings.id_column, "extract-images.id_column")
                known, there = len(self._row), 0
                for row, image in enumerate(ids, before):
                    if not image:
                        self.unnamed.append((f"row {row - before + 1} of {path.name}", NO_ID))
                    else:
                        there += 1
                        self._row.setdefault(image, row)
                say_repeats(path, there + known - len(self._row), "the first")
                if pages and sum(page.unpacked for page in pages) / len(pages) > LARGE_PAGE:
                    say(
                        f"extract-images: {path} has pages of {pages[0].unpacked >> 20:,} MiB, and a whole one is read "
                        "for a picture. Written again by polars (pages of 1 MiB) it is read faster"
                    )
                self._pages += pages
                self._path_of_page += [number] * len(pages)
                before += len(ids)
                meter.add()
        self._begin = np.cumsum([0, *(page.values for page in self._pages)])

    def _page(self, row: int) -> int:
        return int(np.searchsorted(self._begin, row, side="right")) - 1

    def _place(self, row: int) -> Place:
        page = self._page(row)
        return Value(self._pages[page], row - int(self._begin[page]))

    def _file(self, row: int) -> Path:
        return self.files[self._path_of_page[self._page(row)]]
