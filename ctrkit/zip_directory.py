"""The directory at the end of a zip file, entry by entry: `zipfile` holds all of it, half a kilobyte an entry.

APPNOTE.TXT of PKWARE, 4.3.12 to 4.3.16 (the directory and its end, also in Zip64) and 4.5.3 (sizes of Zip64).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
ZIP64 = 1
"""Number of the extra field with sizes and offset of 8 bytes."""
FULL = 0xFFFFFFFF
"""Stands for a number that is in the extra field."""
BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A member."""

    offset: int
    """Of its header."""
    packed: int
    size: int
    """Bytes, packed and not."""
    method: int
    check: int
    """CRC-32."""
    encrypted: bool


def entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """Yield the name and the entry of each member, in the order of the directory. Raises ValueError if that is not
    whole."""
    with open(path, "rb", buffering=BUFFER) as f:
        begin, end, before = _directory(f)
        f.seek(begin)
        while f.tell() < end:
            data = f.read(ENTRY.size)
            if len(data) < ENTRY.size or not data.startswith(b"PK\1\2"):
                raise ValueError("its directory is damaged")
            _, _, _, flags, method, _, _, check, packed, size, name, extra, comment, *_, offset = ENTRY.unpack(data)
            named, more = f.read(name), f.read(extra)
            f.seek(comment, 1)
            if f.tell() > end:
                raise ValueError("its directory is damaged")
            size, packed, offset = _zip64(more, size, packed, offset)
            text = named.decode("utf-8" if flags & 0x800 else "cp437")
            yield text.partition("\0")[0], Entry(before + offset, packed, size, method, check, bool(flags & 1))


def _directory(f: BinaryIO) -> tuple[int, int, int]:
    """Return where the directory begins and ends, and how many bytes lie before the zip file."""
    length = f.seek(0, 2)
    start = max(0, length - END.size - 0xFFFF)
    f.seek(start)
    tail = f.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + END.size > len(tail):
        raise ValueError("it does not end with a directory")
    _, disk, _, _, _, size, offset, _ = END.unpack_from(tail, at)
    end = start + at
    if end >= LOCATOR.size:
        f.seek(end - LOCATOR.size)
        magic, _, end_64, disks = LOCATOR.unpack(f.read(LOCATOR.size))
        if magic == b"PK\6\7":
            if disks > 1:
                raise ValueError("it is one of several parts")
            end -= LOCATOR.size + END_64.size
            f.seek(end)
            found = f.read(END_64.size)
            if not found.startswith(b"PK\6\6"):  # with more fields than usual
                end = end_64
                f.seek(end)
                found = f.read(END_64.size)
            if len(found) < END_64.size or not found.startswith(b"PK\6\6"):
                raise ValueError("its directory is damaged")
            *_, size, offset = END_64.unpack(found)
    elif disk:
        raise ValueError("it is one of several parts")
    before = end - size - offset
    if before < 0:
        raise ValueError("its directory is not where its end says")
    return before + offset, end, before


def _zip64(extra: bytes, *numbers: int) -> Iterator[int]:
    """Yield size, packed size and offset; where one is `FULL`, that of the extra field."""
    at, left = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == ZIP64:
            left = extra[at + 4 : at + 4 + length]
        at += 4 + length
    for number in numbers:
        if number == FULL:
            if len(left) < 8:
                raise ValueError("its directory is damaged")
            number, left = int.from_bytes(left[:8], "little"), left[8:]
        yield number
