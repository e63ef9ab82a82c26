"""Writing without loss: a temporary neighbour, fsync, rename. A killed writer leaves the old file whole."""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ctrkit.errors import Resumable, UserError
from ctrkit.progress import say

ASIDE = ".old"
"""Ends the name of a folder that is about to be replaced."""
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file would become larger than is allowed (`ulimit -f` tells the limit)",
}
"""Errors of the system that room would mend."""
SYNC_FILE_RANGE_WRITE = 2
THREADS = min(8, os.cpu_count() or 1)
T = TypeVar("T")


def no_room(error: BaseException) -> str:
    """Return why there was no room to write, in words; "" if an error is another one.

    polars and Ray tell it in their own words, so the text is looked at too.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"(?:os error|Errno) (\d+)", str(error))):
        number = int(told[1])
    return NO_ROOM.get(number or 0, "")


def cannot_write(path: Path, error: Exception, then: str = "it goes on from what was done") -> UserError:
    """Return the user's error for one of the system's. then: what the same command does once there is room."""
    if why := no_room(error):
        return Resumable(f"cannot write {path}: {why}. Make room there and run the same command again: {then}")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        for above in path.parents:
            if above.exists() and not above.is_dir():
                return UserError(f"cannot write {path}: {above} is a file, not a folder; name another output")
    return UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")


def sidecar_path(output: Path) -> Path:
    """Return where the description of `output` lies: `<output>.json`."""
    return output.with_name(output.name + ".json") if output.name else Path(f"{output}.json")


def is_inside(path: Path, folder: Path) -> bool:
    """Say whether a path, that need not be there, lies in a folder that is."""
    return folder.is_dir() and folder.resolve() in path.resolve().parents


def fsync(path: Path) -> None:
    """Flush a file's or a folder's own entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_back(path: Path) -> None:
    """Have the system begin to write a file to disk, and wait for nothing: less is left for the flush at the end."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        fd = os.open(path, os.O_RDONLY)
        try:
            call(ctypes.c_int(fd), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(SYNC_FILE_RANGE_WRITE))
        finally:
            os.close(fd)


def side_by_side(function: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    """Return `function` of each path, in order; several at once, since it is mostly the system that works."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, paths))


class Behind:
    """Removes and flushes files while other work goes on. Use as a context manager."""

    def __enter__(self) -> "Behind":
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def remove(self, paths: Iterable[str | Path]) -> None:
        """Remove files that nobody will look at again."""
        for path in list(paths):
            self._thread.submit(Path(path).unlink, missing_ok=True)

    def flush(self, folder: Path) -> None:
        """Begin to write a folder's files to disk, so that less is left for the end."""
        for path in sorted(folder.rglob("*")):
            self._thread.submit(fsync, path)


def _below(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder and of all folders in it, and those folders, the inner ones first."""
    found: tuple[list[Path], list[Path]] = [], []
    for base, folders, names in os.walk(path, topdown=False):
        links = [name for name in folders if Path(base, name).is_symlink()]
        found[0].extend(Path(base, name) for name in (*names, *links))
        found[1].append(Path(base))
    return found


def _fsync_tree(path: Path) -> None:
    if path.is_dir():
        for some in _below(path):
            side_by_side(fsync, some)
    else:
        fsync(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        inner, folders = _below(path)
        side_by_side(Path.unlink, inner)
        for folder in folders:
            folder.rmdir()
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return the temporary neighbour of `path` for this process, after sweeping what dead ones left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.tmp-"
    for old in path.parent.glob(f"{prefix}*"):
        pid = old.name.removeprefix(prefix).removesuffix(ASIDE)
        if pid.isdigit() and not _alive(int(pid)):
            remove(old)
    return path.with_name(f"{prefix}{os.getpid()}")


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder at; on success it takes the place of `path`.

    Nothing of `path` changes before the block ends without an error, and by then the new content is on disk. The
    old sidecar goes first, so that none ever stands beside another's content; a folder that is replaced is moved
    aside, since no folder can be renamed over a full one.
    """
    try:
        tmp = _temporary(path)
        remove(tmp)
    except OSError as e:
        raise cannot_write(path, e) from e
    try:
        yield tmp
        if tmp.is_dir() and path.is_file():
            raise UserError(f"{path} is a file, and a folder is to be written; name another output")
        _fsync_tree(tmp)
        sidecar_path(path).unlink(missing_ok=True)
        if path.is_dir() and not path.is_symlink():
            aside = path.with_name(tmp.name + ASIDE)
            remove(aside)
            path.rename(aside)
            tmp.rename(path)
            remove(aside)
        else:
            tmp.replace(path)
        fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # as where another rank still writes into the folder; the next run sweeps it
            remove(tmp)
        raise


@contextlib.contextmanager
def locked(path: Path, *, quiet: bool = False) -> Iterator[None]:
    """Hold the lock of an output, `.NAME.lock` beside it, so that two processes never make it at once.

    Waits for the one that holds it, and says so unless `quiet`. A process that dies loses its locks.
    """
    lock = _lock_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(lock, quiet)
    except OSError as e:
        raise cannot_write(path, e) from e
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Say whether some process is making this output."""
    try:
        fd = os.open(_lock_path(path), os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _lock(lock: Path, quiet: bool) -> int:
    """Return a descriptor that holds the lock. Whoever held it before has removed the file, so look again."""
    waiting = quiet
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                say(f"waiting for another process that makes {lock.name.removeprefix('.').removesuffix('.lock')}")
            waiting = True
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), lock.stat()):
                return fd
        os.close(fd)


def is_ours(path: Path) -> bool:
    """Say whether ctrkit wrote a folder: its sidecar is there, or what a killed maker left beside it."""
    return sidecar_path(path).is_file() or _lock_path(path).exists() or bool(leftovers(path, parts=True))


def leftovers(path: Path, *, parts: bool) -> list[Path]:
    """Return what killed makers of an output left beside it: temporary files, and with `parts` finished parts and
    checkpoints."""
    beside = path.parent.glob(f".{path.name}.*")
    kept = (".parts-", ".checkpoint")
    return sorted(p for p in beside if ".tmp-" in p.name or (parts and any(name in p.name for name in kept)))


def tidy(path: Path) -> None:
    """Remove everything that killed makers of an output left beside it, their lock too. For finished outputs."""
    if leftovers(path, parts=True) or _lock_path(path).exists():
        with locked(path):
            for old in leftovers(path, parts=True):
                remove(old)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    try:
        tmp = _temporary(path)
        try:
            with open(tmp, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            tmp.replace(path)
            fsync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as e:
        raise cannot_write(path, e) from e


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted keys, indented, and the same bytes for the same value."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a broken or missing file is the user's error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
