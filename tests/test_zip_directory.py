"""The directory of zip files, against zipfile."""

import io
import random
import zipfile
from pathlib import Path

import pytest

from ctrkit import zip_directory


def check(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        wanted = [
            (m.filename, (m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC, m.flag_bits & 1 == 1))
            for m in archive.infolist()
        ]
    found = [
        (name, (e.offset, e.packed, e.size, e.method, e.check, e.encrypted)) for name, e in zip_directory.entries(path)
    ]
    assert found == wanted
    return len(found)


def make(comment: bytes = b"", before: bytes = b"", zip64: bool = False) -> bytes:
    out = io.BytesIO(before)
    out.seek(len(before))
    with zipfile.ZipFile(out, "a" if before else "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(20):
            info = zipfile.ZipInfo(f"x/ünï-{n}.png" if n % 2 else f"{n}.png")
            info.extra = b"\x99\x99\x02\x00ab" * (n % 3)
            info.comment = b"c" * n
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(bytes(n * 7))
        archive.comment = comment
    return out.getvalue()


@pytest.mark.parametrize("comment", [b"", b"a remark" * 300])
@pytest.mark.parametrize("before", [b"", b"a program" * 99])
@pytest.mark.parametrize("zip64", [False, True])
def test_as_zipfile_reads_it(tmp_path: Path, comment: bytes, before: bytes, zip64: bool) -> None:
    (tmp_path / "a.zip").write_bytes(make(comment, before, zip64))
    assert check(tmp_path / "a.zip") == 20


def test_more_members_than_16_bits_count_and_offsets_of_64_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for n in range(66_000):
            archive.writestr(f"{n}", b"")
    assert check(tmp_path / "a.zip") == 66_000
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    (tmp_path / "b.zip").write_bytes(make(zip64=True))
    assert check(tmp_path / "b.zip") == 20


def test_damaged_ones_are_told(tmp_path: Path) -> None:
    whole = make()
    directory = whole.index(b"PK\1\2")
    rng = random.Random(0)
    told = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(directory, len(whole))] ^= 1 << rng.randrange(8)
        cut = len(whole) if rng.random() < 0.7 else rng.randrange(len(whole))
        (tmp_path / "a.zip").write_bytes(damaged[:cut])
        try:
            list(zip_directory.entries(tmp_path / "a.zip"))
        except ValueError:
            told += 1
    assert told > 90
