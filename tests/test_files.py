"""Atomic writes and locks."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctrkit import files
from ctrkit.errors import Resumable, UserError


def dead_pid() -> int:
    """Return the number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out.txt"
    for text in ("old", "new"):
        with files.atomic(out) as tmp:
            tmp.write_text(text)
            assert not out.exists() or out.read_text() == "old"
        assert out.read_text() == text
    assert names(out.parent) == ["out.txt"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("old", "new"):
        with files.atomic(out) as tmp:
            (tmp / "inner").mkdir(parents=True)
            (tmp / "inner" / name).write_text(name)
        assert names(out / "inner") == [name]
    assert names(tmp_path) == ["out"]


def test_the_sidecar_of_what_is_replaced_goes_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    files.write_json(files.sidecar_path(out), {"about": "old"})
    with files.atomic(out) as tmp:
        tmp.write_text("new")
        assert files.sidecar_path(out).exists()
    assert names(tmp_path) == ["out"]


def fail(out: Path) -> None:
    with files.atomic(out) as tmp:
        tmp.write_text("half")
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("old")
    else:
        out.mkdir()
    files.write_json(files.sidecar_path(out), {"about": "old"})
    with pytest.raises(ZeroDivisionError):
        fail(out)
    assert names(tmp_path) == ["out", "out.json"]
    assert out.is_dir() if kind == "folder" else out.read_text() == "old"


def test_the_remains_of_dead_writers_are_swept_and_no_others(tmp_path: Path) -> None:
    dead, alive = dead_pid(), os.getppid()
    (tmp_path / f".out.tmp-{dead}").write_text("")
    (tmp_path / f".out.tmp-{dead}.old").mkdir()
    (tmp_path / f".out.tmp-{alive}").write_text("")
    (tmp_path / f".other.tmp-{dead}").write_text("")
    with files.atomic(tmp_path / "out") as tmp:
        tmp.write_text("")
    assert names(tmp_path) == sorted([f".out.tmp-{alive}", f".other.tmp-{dead}", "out"])


def test_tidy_removes_what_belongs_to_one_output(tmp_path: Path) -> None:
    for name in (".out.tmp-77", ".out.parts-abc", ".out.rejects.parquet.tmp-77", ".out.json.tmp-77", ".out.lock"):
        (tmp_path / name).write_text("")
    for name in ("out", "out.json", ".outer.tmp-77", ".other.lock"):
        (tmp_path / name).write_text("")
    assert len(files.leftovers(tmp_path / "out", parts=False)) == 3
    files.tidy(tmp_path / "out")
    assert names(tmp_path) == [".other.lock", ".outer.tmp-77", "out", "out.json"]


def test_what_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "out"
    with pytest.raises(UserError, match="cannot write"), files.atomic(where):
        pass
    with pytest.raises(UserError, match="cannot write"):
        files.write_text(where, "")
    with pytest.raises(UserError, match="cannot write"), files.locked(where):
        pass


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("keep")
    with pytest.raises(UserError, match="out is a file, and a folder is to be written"), files.atomic(out) as tmp:
        tmp.mkdir()
    assert out.read_text() == "keep"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the quota of the disk is used up"),
        (RuntimeError("underlying IO error: File too large (os error 27)"), "a file would become larger"),  # polars
        (RuntimeError("OSError: [Errno 28] No space left"), "the disk is full"),  # Ray
        (OSError(errno.EIO, "Input/output error"), ""),
        (FileNotFoundError(errno.ENOENT, "No such file: 'Errno 28'"), ""),
        (ValueError("28"), ""),
    ],
)
def test_what_room_would_mend(error: Exception, told: str) -> None:
    assert files.no_room(error).startswith(told)
    assert bool(files.no_room(error)) == bool(told)
    told_user = files.cannot_write(Path("x"), error)
    assert isinstance(told_user, Resumable) == bool(told)
    assert told_user.message.startswith("cannot write x: ")


def test_json_has_one_form(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "ß"})
    files.write_json(tmp_path / "b.json", {"a": "ß", "b": [1, 2.5]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "a.json") == {"a": "ß", "b": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "c.json", float("nan"))
    assert names(tmp_path) == ["a.json", "b.json"]


def test_json_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        files.read_json(tmp_path / "a.json")


def _count(path: Path, rounds: int) -> None:
    """Count in a file without any care but the lock's."""
    for _ in range(rounds):
        with files.locked(path):
            seen = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(seen + 1))


def test_one_holder_of_a_lock_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(path, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text() == "60"
    assert names(tmp_path) == ["count"]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "out"
    assert not files.is_locked(path)
    code = "import sys, time; from pathlib import Path; from ctrkit import files\n"
    code += "with files.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    assert files.is_locked(path)
    process.kill()
    process.communicate()
    assert not files.is_locked(path)
    with files.locked(path):
        assert files.is_locked(path)
    assert names(tmp_path) == []
