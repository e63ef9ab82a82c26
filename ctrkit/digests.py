"""Digests of files and folders by content, remembered by size and times so that nothing is read twice."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from ctrkit import files
from ctrkit.errors import UserError

MISSING = "missing"
"""Stands for the digest of what is not there."""
NOT_A_FILE = "not a file"
"""Stands for the digest of a pipe, socket or device, which is not opened."""
SETTLED_SECONDS = 0.05
"""A file's times move only every few milliseconds: what is read sooner after a change may change again unseen."""


FILE, FOLDER, LINK = "file", "folder", "linked folder"
MANY = 1 << 16
"""Names of a folder from which on they are sorted on disk."""
AT_ONCE = 4096
"""Files whose digests are computed at a time."""


class Digests:
    """Content digests. With a cache file, a file whose size, times and inode have not moved is not read again."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[str, list[object]] = {}
        self._dirty = False
        if cache is not None and cache.is_file():
            with contextlib.suppress(ValueError):
                known = json.loads(cache.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """Return the digest of a file's bytes, or of a folder's names and bytes. "missing" if there is nothing."""
        if path.is_dir():
            return folder(self._inside(path))
        return self._file(path) if path.is_file() else MISSING

    def inside(self, path: Path) -> dict[Path, str]:
        """Return the digests of a folder's files, those in inner folders too, by their path below it."""
        return dict(self._inside(path))

    def _inside(self, path: Path) -> Iterator[tuple[Path, str]]:
        """Yield the files of a folder below it, and their digests, in the order of paths."""
        walk = _walk(path)
        while some := list(itertools.islice(walk, AT_ONCE)):
            for one, digest in zip(some, files.side_by_side(self._file, some), strict=True):
                yield one.relative_to(path), digest

    def _file(self, path: Path) -> str:
        try:
            there = path.stat()
        except OSError as e:
            return _gone(path, e)
        if not stat.S_ISREG(there.st_mode):
            return NOT_A_FILE
        stamp = [there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino]
        name = os.path.abspath(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == stamp:
            return str(known[-1])
        if self._cache is not None:
            age = time.time() - there.st_ctime_ns / 1e9
            time.sleep(min(max(SETTLED_SECONDS - age, 0.0), SETTLED_SECONDS))
        try:
            with open(path, "rb") as f:
                digest = hashlib.file_digest(f, xxhash.xxh3_128).hexdigest()
        except OSError as e:
            return _gone(path, e)
        if self._cache is not None:
            self._known[name] = [*stamp, digest]
            self._dirty = True
        return digest

    def save(self) -> None:
        """Write the cache file, if there is one and something new is known."""
        if self._cache is not None and self._dirty:
            files.write_text(self._cache, json.dumps(self._known))
            self._dirty = False


def _gone(path: Path, error: OSError) -> str:
    """Return what stands for a file that is no more, or is a link that leads nowhere. Raises UserError otherwise."""
    if error.errno in (errno.ENOENT, errno.ELOOP):
        return MISSING
    raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, in the order of paths, but for hidden ones and linked folders.
    Of one folder at a time the names are in memory, or in a temporary file."""
    for text in _sorted(_entries(folder)):
        name, _, kind = text.partition("\0")
        if kind == FILE:
            yield folder / name
        elif kind == FOLDER:
            yield from _walk(folder / name)


def _entries(folder: Path) -> Iterator[str]:
    """Yield the name and, after NUL, the kind of each file and folder in a folder, in no order."""
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                if not e.name.startswith("."):
                    yield e.name + "\0" + ((LINK if e.is_symlink() else FOLDER) if _is_folder(e) else FILE)
    except OSError as e:
        raise UserError(f"{folder} cannot be read: {e.strerror}") from None


def _sorted(texts: Iterator[str]) -> Iterator[str]:
    """Yield texts in order, very many through a temporary file."""
    some = list(itertools.islice(texts, MANY))
    if len(some) < MANY:
        yield from sorted(some)
        return
    from ctrkit.disk_texts import sorted_texts  # which imports numpy

    yield from sorted_texts(itertools.chain(some, texts))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def folder(inside: Iterable[tuple[Path, str]]) -> str:
    """Return the digest of a folder that has files, by their paths below it, of these digests."""
    h = hashlib.blake2b(digest_size=16)
    for path, digest in inside:
        h.update(os.fsencode(str(path)) + b"\0" + digest.encode() + b"\n")
    return h.hexdigest()


def text(value: str) -> str:
    """Return the digest of a string."""
    return hashlib.blake2b(value.encode(), digest_size=16).hexdigest()
