"""Digests by content, and what is remembered of them."""

import os
from pathlib import Path

import pytest

from ctrkit import digests, disk_texts
from ctrkit.digests import Digests
from ctrkit.errors import UserError


def test_content_decides_and_nothing_else(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("same")
    b.write_text("same")
    os.utime(b, (0, 0))
    b.chmod(0o600)
    assert Digests().of(a) == Digests().of(b)
    b.write_text("other")
    assert Digests().of(a) != Digests().of(b)
    assert Digests().of(tmp_path / "c") == "missing"


def test_folders_by_names_and_contents_but_hidden_files(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "a").write_text("a")
        (tmp_path / folder / "b").write_text("b")
    x, y = tmp_path / "x", tmp_path / "y"
    assert Digests().of(x) == Digests().of(y)
    (y / ".hidden").write_text("")
    (y / ".parts").mkdir()
    (y / ".parts" / "p").write_text("")
    assert Digests().of(x) == Digests().of(y)
    (y / "b").rename(y / "c")
    assert Digests().of(x) != Digests().of(y)
    (y / "c").rename(y / "b")
    assert Digests().of(x) == Digests().of(y)
    (y / "inner" / "a").write_text("A")
    assert Digests().of(x) != Digests().of(y)


def test_a_file_that_has_not_moved_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_text("a")
    first = Digests(cache)
    digest = first.of(path)
    first.save()
    monkeypatch.setattr("builtins.open", None)
    assert Digests(cache).of(path) == digest


def test_a_change_that_hides_its_time_is_seen(tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "cache"
    path.write_text("before")
    known = Digests(cache)
    digest = known.of(path)
    known.save()
    state = path.stat()
    with open(path, "r+") as f:
        f.write("behind")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert known.of(path) != digest
    assert Digests(cache).of(path) == Digests().of(path)


@pytest.mark.parametrize("broken", [b"{", b"[]", b"\xff", b"3"])
def test_a_broken_memory_is_no_memory(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "cache").write_bytes(broken)
    known = Digests(tmp_path / "cache")
    assert known.of(tmp_path / "a") == Digests().of(tmp_path / "a")
    known.save()
    assert Digests(tmp_path / "cache").of(tmp_path / "a") == Digests().of(tmp_path / "a")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    link = tmp_path / "impressions.csv"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"impressions\.csv cannot be read: Input/output error"):
        Digests().of(link)


def test_links_that_lead_nowhere_and_what_is_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    found = {str(path): digest for path, digest in Digests(tmp_path / "cache").inside(folder).items()}
    assert found == {"a": Digests().of(folder / "a"), "dangling": "missing", "loop": "missing", "pipe": "not a file"}


def test_a_folder_of_more_names_than_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a-", "a", "a.x", "é", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inner").write_text(name)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / os.fsdecode(b"\xe9")).write_text("no UTF-8")
    wanted = list(Digests().inside(tmp_path).items())
    assert [path for path, _ in wanted] == sorted(path for path, _ in wanted)
    assert len(wanted) == 7
    monkeypatch.setattr(digests, "MANY", 2)
    monkeypatch.setattr(disk_texts, "RUN", 3)
    assert list(Digests().inside(tmp_path).items()) == wanted


def test_a_file_that_goes_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    stat = Path.stat

    def then_gone(path: Path, **more: bool) -> os.stat_result:
        found = stat(path, **more)
        if path.name == "a":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", then_gone)
    assert Digests().inside(tmp_path) == {Path("a"): "missing"}
