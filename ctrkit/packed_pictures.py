"""Pictures in files of many: members of tar and zip files, values of Parquet columns."""

import functools
import itertools
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrkit import parquet_pages, zip_directory
from ctrkit.archive_file import ArchiveFile
from ctrkit.disk_index import KEY, NOWHERE, DiskIndex, keys
from ctrkit.disk_tables import Sorter, Table
from ctrkit.disk_texts import AT_ONCE, Texts
from ctrkit.errors import UserError
from ctrkit.picture_names import NO_ID, Names, in_order, inner_or_none, say_repeats
from ctrkit.pictures import POSITION, BadPicture, Int, Place, Positions, check_size
from ctrkit.progress import Meter, say
from ctrkit.recipe import ExtractImages

ZIP_HEADER = 30
"""Bytes before the name in a member's header."""
TAR = -1
"""Stands for a member of a tar among the methods of zip."""
BLOCK = tarfile.BLOCKSIZE
LARGE_PAGE = 8 << 20
PAGES = 1 << 10
"""Pages of Parquet files whose places are remembered."""
ROW_BITS = 31
"""Of a position in a Parquet file: the row in its page; the rest is the page."""
Fields = tuple[int, int, int, int, int]
"""Of a member: offset, packed and unpacked size, method, check."""


QUERY = np.dtype([("key", KEY), ("picture", ">i8")])


class Packed(ABC):
    """Pictures in files of many. A picture's position rises with files and offsets."""

    any_ending = False
    last = True
    """Whether of equal paths the last one counts."""

    def __init__(self, files: Sequence[Path], names: Names, folder: Path | None) -> None:
        self.files, self.names, self._folder = files, names, folder
        self.unnamed = names.unnamed
        self._found: Texts | None = None
        self._inner = Texts(folder=folder)
        """Paths in the files, or ids of rows; some may be there several times."""
        self._position = DiskIndex(folder, last=self.last)

    @abstractmethod
    def _place(self, position: int) -> Place: ...

    @abstractmethod
    def _file(self, position: int) -> Path: ...

    def _add(self, inner: Sequence[str], positions: Int) -> None:
        self._inner.extend(inner)
        self._position.add(inner, positions)

    def _finish(self, begins: Sequence[int]) -> None:
        """Sort what was added, and tell how many paths of each file were there before. begins: its first position."""
        repeats = np.zeros(len(self.files), np.int64)

        def count(positions: Int) -> None:
            file = np.searchsorted(begins, positions, side="right") - 1
            repeats[:] += np.bincount(file, minlength=len(repeats))

        self._position.finish(count)
        for path, repeated in zip(self.files, repeats.tolist(), strict=True):
            say_repeats(path, repeated, "the last" if self.last else "the first")

    def _find(self, image: str) -> int:
        try:
            return self._position.find(_plain(self.names.inner(image)))
        except BadPicture:
            return NOWHERE

    def find(self) -> Texts:
        """Return the ids of all pictures, sorted."""
        if self._found is None:
            self._found = in_order(self.names.images(self._inner, self.any_ending), self.unnamed, self._folder)
        return self._found

    def has(self, image: str) -> bool:
        """Say whether the picture is there."""
        return self._find(image) != NOWHERE

    def place(self, image: str) -> Place:
        """Return where the picture lies. Raises BadPicture if it does not."""
        return self.at(self._find(image), image)

    def at(self, position: int, image: str) -> Place:
        """Return where the picture lies, given its position. Raises BadPicture if that is nowhere."""
        if position == NOWHERE:
            self.names.inner(image)  # which may know why
            raise BadPicture("missing")
        return self._place(position)

    def where(self, image: str) -> str:
        """Return the file and the path in it."""
        position = self._find(image)
        inner = inner_or_none(self.names, image)
        return f"{self._file(position).name}/{inner}" if position != NOWHERE else inner

    def positions(self, images: Sequence[str], begin: int, end: int) -> Iterator[Positions]:
        """Yield pictures in the order of the files; those that are nowhere come last."""
        queries, located = Sorter(QUERY, self._folder), Sorter(POSITION, self._folder)
        for at in range(begin, end, AT_ONCE):
            some = np.zeros(min(AT_ONCE, end - at), QUERY)
            some["picture"] = np.arange(at, at + len(some))
            some["key"] = keys(_plain(inner_or_none(self.names, image)) for image in images[at : at + len(some)])
            queries.add(some)
        for some, position in self._position.join(queries.sorted()):
            found = np.empty(len(some), POSITION)
            found["position"], found["picture"] = position, some["picture"]
            located.add(found)
        return located.sorted()


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

    def __init__(self, kinds: dict[Path, str], names: Names, folder: Path | None) -> None:
        super().__init__(list(kinds), names, folder)
        self._archives = [ArchiveFile.open(path) for path in kinds]
        self._members = Table(MEMBER, folder)
        begins = []
        with Meter("look through archives", len(kinds), "files") as meter:
            for number, (path, kind) in enumerate(kinds.items()):
                begins.append(len(self._members))
                if kind == "zip":
                    self._add_all(number, _zip_members(path))
                else:
                    self._add_tar(number, path)
                meter.add()
        self._finish(begins)

    def _add_all(self, archive: int, members: Iterator[tuple[str, Fields]]) -> None:
        while some := list(itertools.islice(members, AT_ONCE)):
            begin = len(self._members)
            self._members.append(np.array([(archive, *fields) for _, fields in some], MEMBER))
            self._add([name for name, _ in some], np.arange(begin, len(self._members)))

    def _add_tar(self, archive: int, path: Path) -> None:
        """Add the pictures of a tar file, and after them those that are links to others of it, or to links."""
        links = Texts(folder=self._folder)

        def plain() -> Iterator[tuple[str, Fields]]:
            for name, offset, size, target in _tar_members(path, self._archives[archive].size):
                if target is None:
                    yield name, (offset, size, size, TAR, 0)
                else:
                    links.extend([name, target])

        begin = len(self._members)
        self._add_all(archive, plain())
        while links:
            known, begin = self._index(begin), len(self._members)
            left = Texts(folder=self._folder)

            def linked(
                links: Texts = links, known: DiskIndex = known, left: Texts = left
            ) -> Iterator[tuple[str, Fields]]:
                texts = iter(links)
                for name, target in zip(texts, texts, strict=True):
                    if (at := known.find(target)) == NOWHERE:
                        left.extend([name, target])
                    else:
                        yield name, self._members.read(at, at + 1)[0].item()[1:]

            self._add_all(archive, linked())
            if len(self._members) == begin:
                break
            links = left

    def _index(self, begin: int) -> DiskIndex:
        """Return the members' numbers by their names, of those from `begin` on."""
        index = DiskIndex(self._folder, last=True)
        for at in range(begin, len(self._members), AT_ONCE):
            names = self._inner[at : at + AT_ONCE]
            index.add(names, np.arange(at, at + len(names)))
        index.finish()
        return index

    def _place(self, position: int) -> Place:
        archive, *rest = self._members.read(position, position + 1)[0].item()
        return Member(self._archives[archive], *rest)

    def _file(self, position: int) -> Path:
        return self.files[int(self._members.read(position, position + 1)["archive"][0])]


def _zip_members(path: Path) -> Iterator[tuple[str, Fields]]:
    """Yield a zip file's pictures in the order of its directory."""
    try:
        for name, entry in zip_directory.entries(path):
            if _is_picture(name):
                method = ENCRYPTED if entry.encrypted else entry.method
                yield _plain(name), (entry.offset, entry.packed, entry.size, method, entry.check)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not a whole zip file: {e}") from None


def _is_picture(name: str) -> bool:
    """Say whether a member's name may be a picture's: no folder, nothing hidden."""
    return not name.endswith("/") and not any(part.startswith(".") for part in _plain(name).split("/"))


def _tar_members(path: Path, size: int) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield name, offset and size of a tar file's pictures; of links name, 0, 0 and what they lead to."""
    try:
        with open(path, "rb") as f, tarfile.open(fileobj=f, mode="r:", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would keep all of them
                name = _plain(member.name)
                if not _is_picture(name):
                    continue
                if member.islnk():
                    yield name, 0, 0, _plain(member.linkname)
                elif member.issym():
                    yield name, 0, 0, os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
                elif member.isreg() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise UserError(f"{path} is cut off: {name} goes on beyond its end. Copy the file again")
                    yield name, member.offset_data, member.size, None
            f.seek(tar.offset)
            if f.read(BLOCK).strip(b"\0"):
                raise UserError(f"{path} is damaged at byte {tar.offset:,}, where a member should begin")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{path} is not a whole tar file, nor zip or Parquet: {e}") from None


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


PAGE = np.dtype(
    [
        *(("file", "i4"), ("offset", "i8"), ("packed", "i8"), ("unpacked", "i8"), ("values", "i8")),
        *(("encoding", "i4"), ("levels", "i8"), ("max_level", "i4"), ("codec", "i4"), ("dictionary", "i8")),
    ]
)
"""A `parquet_pages.Page`; `dictionary` is the number of another, or −1."""


class ParquetPictures(Packed):
    """Pictures in a column of Parquet files. Of rows with the same id the first one counts."""

    any_ending = True
    last = False

    def __init__(self, files: Sequence[Path], names: Names, settings: ExtractImages, folder: Path | None) -> None:
        super().__init__(files, names, folder)
        self._pages = Table(PAGE, folder)
        self._codecs: dict[str, int] = {}
        self._archives = [ArchiveFile.open(path) for path in files]
        self._page = functools.lru_cache(PAGES)(self._read_page)
        begins = []
        with Meter("look through Parquet files", len(files), "files") as meter:
            for number, path in enumerate(files):
                begins.append(len(self._pages) << ROW_BITS)
                self._look_through(number, path, settings)
                meter.add()
        self._finish(begins)

    def _look_through(self, number: int, path: Path, settings: ExtractImages) -> None:
        begin, pages, size = self._add_pages(number, path, settings)
        if len(pages) and size / len(pages) > LARGE_PAGE:
            say(
                f"extract-images: {path} has pages of {size // len(pages) >> 20:,} MiB, and a whole one is read "
                "for a picture. Written again by polars (pages of 1 MiB) it is read faster"
            )
        before = 0
        for ids in parquet_pages.texts(path, settings.id_column, "extract-images.id_column"):
            row = np.arange(before, before + len(ids))
            at = np.searchsorted(begin, row, side="right") - 1
            position = (pages[at] << ROW_BITS) + row - begin[at]
            there = np.array([bool(image) for image in ids], np.bool_)
            self._add([image for image in ids if image], position[there])
            self.unnamed.extend((f"row {r + 1} of {path.name}" for r in row[~there].tolist()), NO_ID)
            before += len(ids)

    def _add_pages(self, file: int, path: Path, settings: ExtractImages) -> tuple[Int, Int, int]:
        """Note the pages of a file. Return each one's first row, its number, and the bytes of all."""
        begin, numbers = array("q"), array("q")
        rows = size = 0
        noted: parquet_pages.Page | None = None
        dictionary = -1
        for page in parquet_pages.pages(path, settings.bytes_column, "extract-images.bytes_column"):
            if page.dictionary is not None and page.dictionary is not noted:
                noted, dictionary = page.dictionary, self._note(file, page.dictionary, -1)
            begin.append(rows)
            numbers.append(self._note(file, page, -1 if page.dictionary is None else dictionary))
            rows, size = rows + page.values, size + page.unpacked
        return np.array(begin, np.int64), np.array(numbers, np.int64), size

    def _note(self, file: int, page: parquet_pages.Page, dictionary: int) -> int:
        """Add a page to the table; return its number."""
        codec = self._codecs.setdefault(page.codec, len(self._codecs))
        fields = (page.offset, page.packed, page.unpacked, page.values, page.encoding, page.levels, page.max_level)
        self._pages.append(np.array([(file, *fields, codec, dictionary)], PAGE))
        return len(self._pages) - 1

    def _read_page(self, number: int) -> parquet_pages.Page:
        file, *fields, codec, dictionary = self._pages.read(number, number + 1)[0].item()
        offset, packed, unpacked, values, encoding, levels, max_level = fields
        return parquet_pages.Page(
            self._archives[file],
            offset,
            packed,
            unpacked,
            values,
            list(self._codecs)[codec],
            encoding,
            levels,
            max_level,
            self._page(dictionary) if dictionary >= 0 else None,
        )

    def _place(self, position: int) -> Place:
        return Value(self._page(position >> ROW_BITS), position & ((1 << ROW_BITS) - 1))

    def _file(self, position: int) -> Path:
        page = position >> ROW_BITS
        return self.files[int(self._pages.read(page, page + 1)["file"][0])]
