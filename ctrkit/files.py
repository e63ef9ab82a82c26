"""Writing without loss: a temporary neighbour, fsync, rename. A killed writer leaves the old file whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctrkit.errors import UserError


def sidecar_path(output: Path) -> Path:
    """Return where the description of `output` lies: `<output>.json`."""
    return output.with_name(output.name + ".json")


def fsync(path: Path) -> None:
    """Flush a file's or a folder's own entry to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(path: Path) -> None:
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
    else:
        fsync(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Return the temporary neighbour of `path` for this process, after sweeping what dead ones left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.tmp-"
    for old in path.parent.glob(f"{prefix}*"):
        pid = old.name.removeprefix(prefix)
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

    Nothing of `path` changes before the block ends without an error. A folder that is replaced is moved
    aside first, its sidecar before it, so that no sidecar ever stands beside another's content.
    """
    try:
        tmp = _temporary(path)
        remove(tmp)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    try:
        yield tmp
        _fsync_tree(tmp)
        sidecar_path(path).unlink(missing_ok=True)
        if path.is_dir() and not path.is_symlink():
            aside = path.with_name(tmp.name + ".old")
            remove(aside)
            path.rename(aside)
            tmp.rename(path)
            shutil.rmtree(aside)
        else:
            tmp.replace(path)
        fsync(path.parent)
    finally:
        remove(tmp)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = _temporary(path)
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)
    fsync(path.parent)


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
