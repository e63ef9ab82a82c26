"""Folders, tar and zip archives and Parquet files of pictures: the same ids, bytes and vectors from each."""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ctrkit import archive_file, pictures, sources
from ctrkit.cli import main
from ctrkit.distinct_pictures import tell_distinct_in_memory
from ctrkit.errors import UsageError, UserError
from ctrkit.picture_sources import open_source
from ctrkit.pictures import BadPicture, Source
from ctrkit.recipe import ExtractImages

IDS = ["a", "b", "c", "d", "e", "f", "ünï"]
"""Of which b and d are the same."""


def picture(image: str) -> bytes:
    pixels = np.random.default_rng(IDS.index("b" if image == "d" else image)).integers(0, 256, (32, 32, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "png")
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, **more: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in more.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, names: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in names.items():
            add(tar, name, data)


def write_zip(path: Path, names: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in names.items():
            archive.writestr(name, data)


def named(ids: list[str]) -> dict[str, bytes]:
    return {f"x/{image}.png": picture(image) for image in ids}


def folder(path: Path) -> str:
    for name, data in named(IDS).items():
        (path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        (path / "photos" / name).write_bytes(data)
    return "photos"


def one_tar(path: Path) -> str:
    write_tar(path / "photos.tar", {"x/notes.txt": b"no picture", "x/._a.png": b"hidden"} | named(IDS))
    return "photos.tar"


def folder_of_tars(path: Path) -> str:
    for shard in range(3):
        write_tar(path / "shards" / f"{shard}.tar", named(IDS[shard::3]), tarfile.GNU_FORMAT)
    (path / "shards" / "README.md").write_text("what these are")
    return "shards"


def glob_of_tars(path: Path) -> str:
    write_tar(path / "other.tar", {"x/z.png": picture("a")})
    return folder_of_tars(path) + "/?.tar"


def one_zip(path: Path) -> str:
    write_zip(path / "photos.zip", named(IDS), zipfile.ZIP_DEFLATED)
    return "photos.zip"


def stored_zip_and_tar(path: Path) -> str:
    (path / "mixed").mkdir()
    write_zip(path / "mixed" / "a.zip", named(IDS[:3]))
    write_tar(path / "mixed" / "b.tar", named(IDS[3:]))
    return "mixed"


def parquet(path: Path) -> str:
    (path / "tables").mkdir()
    for shard in range(2):
        rows = list(named(IDS[shard::2]).items())
        frame = pl.DataFrame({"image": [name for name, _ in rows], "bytes": [data for _, data in rows]})
        frame.write_parquet(path / "tables" / f"{shard}.parquet", row_group_size=3)
    return "tables"


Make = Callable[[Path], str]
MAKERS: list[Make] = [
    folder,
    one_tar,
    folder_of_tars,
    glob_of_tars,
    one_zip,
    stored_zip_and_tar,
    parquet,
]
SETTINGS = ExtractImages(template="x/{image}.png")


def name_of(make: Make) -> str:
    return make.__name__


def contents(source: Source, images: list[str]) -> list[bytes | str]:
    out: list[bytes | str] = []
    for image in images:
        try:
            out.append(pictures.read(source.place(image)))
        except BadPicture as bad:
            out.append(str(bad))
    return out


@pytest.mark.parametrize("make", MAKERS, ids=name_of)
def test_every_source_gives_the_same(tmp_path: Path, make: Make) -> None:
    source = open_source(tmp_path / make(tmp_path), SETTINGS)
    assert list(source.find()) == sorted(IDS)
    assert contents(source, IDS) == [picture(image) for image in IDS]
    assert contents(source, ["nowhere"]) == ["missing"]
    assert source.has("a")
    assert not source.has("nowhere")
    assert source.where("a").endswith("x/a.png")
    assert source.where("nowhere") == "x/nowhere.png"
    asked = ["f", "nowhere", "d", "b", "ünï"]
    order = [place for some in source.positions(asked, 1, 5) for place in some.tolist()]
    assert sorted(number for _, number in order) == [1, 2, 3, 4]
    for position, number in order:
        with contextlib.suppress(BadPicture):
            assert source.at(position, asked[number]) == source.place(asked[number])
    found = tell_distinct_in_memory(source, asked)
    assert found.content.tolist() == [0, -1, 1, 1, 2]
    assert found.reasons == {1: "missing"}


@pytest.mark.parametrize("make", MAKERS, ids=name_of)
def test_places_are_read_by_many_threads_and_by_other_processes(tmp_path: Path, make: Make) -> None:
    source = open_source(tmp_path / make(tmp_path), SETTINGS)
    wanted = [picture(image) for image in IDS] * 40
    places = [source.place(image) for image in IDS] * 40
    assert all(len(pickle.dumps(place)) < 1000 for place in places)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pictures.read, places)) == wanted
    if make in (one_zip, parquet):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            assert list(pool.map(pictures.read, places[:7])) == wanted[:7]


def test_more_archives_than_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(archive_file.OPEN_FILES + 40):
        write_tar(tmp_path / "shards" / f"{shard}.tar", {f"{shard}.png": b"%d" % shard})
    source = open_source(tmp_path / "shards", ExtractImages(template="{image}.png"))
    opened = len(os.listdir("/proc/self/fd"))
    images = list(source.find()) * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda image: int(pictures.read(source.place(image))), images)) == [int(i) for i in images]
    assert len(os.listdir("/proc/self/fd")) <= opened + archive_file.OPEN_FILES


# --- index tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("make", [folder, one_tar, one_zip], ids=name_of)
def test_index_gives_each_path(tmp_path: Path, ending: str, make: Make) -> None:
    path = tmp_path / make(tmp_path)
    table = pl.DataFrame(
        {
            "goods": ["007", "8", "9", "10", "007"],
            "file": ["x/a.png", "./x/b.png", "x/gone.png", None, "x/c.png"],
            "price": [1.0, 2.0, 3.0, 4.0, 5.0],
        }
    )
    home = path if path.is_dir() else tmp_path
    if ending == "parquet":
        table.write_parquet(home / "index.parquet")
    else:
        table.write_csv(home / f"index.{ending}", separator="\t" if ending == "tsv" else ",")
    settings = ExtractImages(index=f"index.{ending}", id_column="goods", path_column="file")
    source = open_source(path, settings)
    assert list(source.find()) == ["007", "10", "8", "9"]
    images = ["007", "8", "9", "10", "11"]
    # Of two rows with the same id the first one counts.
    unknown = ["no path in the index", "not in the index"]
    assert contents(source, images) == [picture("a"), picture("b"), "missing", *unknown]
    assert [source.has(image) for image in images] == [True, True, False, False, False]
    assert source.where("10") == ""
    assert sources.picture_inputs(path, settings)["picture index"] == home / f"index.{ending}"


def test_index_above_the_pictures_and_paths_that_leave_the_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "secret.png").write_bytes(b"secret")
    rows = {"a": "x/a.png", "up": "../secret.png", "far": str(tmp_path / "secret.png")}
    pl.DataFrame({"image": list(rows), "path": list(rows.values())}).write_csv(tmp_path / "index.csv")
    source = open_source(tmp_path / "photos", ExtractImages(index="../index.csv"))
    refused = "the name is not a path below the pictures folder"
    assert contents(source, list(rows)) == [picture("a"), refused, refused]


def test_mistakes_in_the_index(tmp_path: Path) -> None:
    path = tmp_path / folder(tmp_path)
    with pytest.raises(UserError, match=r"none.csv \(extract-images.index\) cannot be read"):
        open_source(path, ExtractImages(index="none.csv"))
    (path / "index.csv").write_text("image,pathh\na,x/a.png\n")
    with pytest.raises(UsageError, match=r"no column 'path'; did you mean 'pathh'\? .*extract-images.path_column"):
        open_source(path, ExtractImages(index="index.csv"))
    (path / "index.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(path, ExtractImages(index="index.parquet"))
    with pytest.raises(UsageError, match="Parquet files have none"):
        open_source(tmp_path / parquet(tmp_path), ExtractImages(index="index.csv"))


# --- folders -----------------------------------------------------------------------------------------------------


def test_find_inverts_the_template(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ["x/b.jpg", "x/a.jpg", "c.jpg", "x/d.PNG", "x/notes.txt", "x/.hidden.jpg", "x/e.pdf", ".cache/f.jpg"]:
        (tmp_path / name).touch()
    assert list(open_source(tmp_path, ExtractImages(template="x/{image}.jpg")).find()) == ["a", "b"]
    assert list(open_source(tmp_path, ExtractImages()).find()) == ["c.jpg", "x/a.jpg", "x/b.jpg", "x/d.PNG"]
    with pytest.raises(UsageError, match="does not contain"):
        open_source(tmp_path, ExtractImages(template="x.jpg"))


def test_a_pipe_is_no_picture_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    os.symlink("/dev/zero", tmp_path / "b.jpg")
    source = open_source(tmp_path, ExtractImages())
    assert contents(source, ["a.jpg", "b.jpg", "x" * 400]) == [
        "not a file",
        "not a file",
        "cannot be read: File name too long",
    ]


def test_archives_beside_pictures_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / folder(tmp_path)
    write_zip(path / "old.zip", {"z.png": picture("a")})
    assert list(open_source(path, SETTINGS).find()) == sorted(IDS)


# --- tar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(tmp_path: Path, form: int) -> None:
    long = "n" * 90 + "/" + "m" * 90
    write_tar(tmp_path / "a.tar", {f"./{long}.png": picture("a"), "./b.png": b"", "c.png": picture("c")}, form)
    source = open_source(tmp_path / "a.tar", ExtractImages(template="{image}.png"))
    assert list(source.find()) == ["b", "c", long]
    assert contents(source, [long, "b", "c"]) == [picture("a"), "empty file", picture("c")]


def test_tar_with_links_folders_and_later_versions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x", b"", type=tarfile.DIRTYPE)
        add(tar, "x/a.png", b"old")
        add(tar, "x/b.png", picture("b"))
        add(tar, "x/a.png", picture("a"))
        add(tar, "x/hard.png", b"", type=tarfile.LNKTYPE, linkname="x/b.png")
        add(tar, "x/soft.png", b"", type=tarfile.SYMTYPE, linkname="../x/b.png")
        add(tar, "x/out.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    source = open_source(tmp_path / "a.tar", SETTINGS)
    assert list(source.find()) == ["a", "b", "hard", "soft"]
    assert contents(source, ["a", "hard", "soft"]) == [picture("a"), picture("b"), picture("b")]


def test_same_name_in_two_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "shards" / "1.tar", {"x/a.png": b"old", "x/b.png": picture("b")})
    write_tar(tmp_path / "shards" / "2.tar", {"x/a.png": picture("a")})
    source = open_source(tmp_path / "shards", SETTINGS)
    assert contents(source, ["a", "b"]) == [picture("a"), picture("b")]
    assert "2.tar: 1 names of pictures are there before; the last of each counts" in capsys.readouterr().err


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shards" / one_tar(tmp_path)
    for name, mode in (("a.tar.gz", "w:gz"), ("b.tar.bz2", "w:bz2"), ("c.tar", "w:xz")):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path.with_name(name), mode) as tar:
            add(tar, "x/a.png", picture("a"))
        with pytest.raises(UserError, match=rf"{name} is compressed .*Unpack it first"):
            open_source(path.with_name(name), SETTINGS)
    with pytest.raises(UserError, match=r"a.tar.gz is compressed \(gzip\)"):
        open_source(path.parent, SETTINGS)
    (tmp_path / "a.png.gz").write_bytes(gzip.compress(picture("a")))
    with pytest.raises(UserError, match="compressed"):
        open_source(tmp_path / "a.png.gz", SETTINGS)


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / one_tar(tmp_path)
    whole = path.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(picture("e")) + 100])
    with pytest.raises(UserError, match=r"cut.tar is (cut off|not a whole tar)"):
        open_source(tmp_path / "cut.tar", SETTINGS)
    at = whole.index(b"x/c.png")
    (tmp_path / "bad.tar").write_bytes(whole[:at] + b"\x01" * 512 + whole[at + 512 :])
    with pytest.raises(UserError, match=r"bad.tar is damaged at byte|not a whole tar"):
        open_source(tmp_path / "bad.tar", SETTINGS)
    (tmp_path / "text.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(UserError, match="not a whole tar file, nor zip or Parquet"):
        open_source(tmp_path / "text.tar", SETTINGS)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(UserError, match="not a whole tar"):
        open_source(tmp_path / "empty.tar", SETTINGS)


def test_archive_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / one_tar(tmp_path)
    source = open_source(path, SETTINGS)
    pictures.read(source.place("a"))
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(BadPicture, match="has changed"):
        pictures.read(source.place("a"))
    assert contents(open_source(path, SETTINGS), ["a"]) == [picture("a")]


# --- zip ---------------------------------------------------------------------------------------------------------


def test_zip_with_what_archivers_add(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"__MACOSX/x/._a.png": b"", "x/": b"", "x/Thumbs.db": b"", **named(["a"])})
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(b"a program that unpacks itself" + data)
    with pytest.raises(UserError, match="not a whole tar file, nor zip"):
        open_source(tmp_path / "a.zip", SETTINGS)
    (tmp_path / "a.zip").write_bytes(data)
    source = open_source(tmp_path / "a.zip", SETTINGS)
    assert list(source.find()) == ["a"]
    assert contents(source, ["a"]) == [picture("a")]


def test_bad_members_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 1 << 20)
    write_zip(tmp_path / "a.zip", named(IDS[:2]))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("x/c.png", picture("c"), zipfile.ZIP_BZIP2)
        archive.writestr("x/e.png", b"e" * 1000, zipfile.ZIP_DEFLATED)
        archive.writestr("x/bomb.png", bytes(3 << 20), zipfile.ZIP_DEFLATED)
        archive.writestr("x/lies.png", bytes(3 << 20), zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(picture("b")) + 50] ^= 1  # stored
    data[data.index(b"x/e.png") + 12] ^= 0xFF  # deflated
    size = data.rindex(b"x/lies.png") - 22
    data[size : size + 4] = (1000).to_bytes(4, "little")
    flags = data.rindex(b"x/a.png") - 38
    data[flags] |= 1  # encrypted
    (tmp_path / "a.zip").write_bytes(data)
    reasons = contents(open_source(tmp_path / "a.zip", SETTINGS), ["a", "b", "c", "e", "bomb", "lies"])
    assert reasons[0] == reasons[2] == "zip file with another compression than deflate, or encrypted"
    assert reasons[1] == reasons[5] == "broken: not what the zip file's checksum says"
    assert str(reasons[3]).startswith("broken: ")
    assert reasons[4] == "too large: more than 1 MiB"


def test_cut_off_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / one_zip(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="is not a whole zip file"):
        open_source(path, SETTINGS)


# --- Parquet -----------------------------------------------------------------------------------------------------


def test_parquet_with_other_columns(tmp_path: Path) -> None:
    rows = [{"id": 7, "image": {"bytes": picture("a"), "path": "p"}}, {"id": 8, "image": {"bytes": None, "path": "q"}}]
    rows += [{"id": 7, "image": {"bytes": b"later", "path": "r"}}, {"id": None, "image": None}]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", ExtractImages(id_column="id", bytes_column="image.bytes"))
    assert list(source.find()) == ["7", "8"]
    assert contents(source, ["7", "8", "9"]) == [picture("a"), "missing", "missing"]  # of two rows the first
    source = open_source(tmp_path / "a.parquet", ExtractImages(id_column="image.path", bytes_column="image.bytes"))
    assert list(source.find()) == ["p", "q", "r"]
    with pytest.raises(UsageError, match=r"no column 'bytes' \(extract-images.bytes_column\)"):
        open_source(tmp_path / "a.parquet", ExtractImages(id_column="id"))
    with pytest.raises(UsageError, match=r"no column 'image' \(extract-images.id_column\)"):
        open_source(tmp_path / "a.parquet", ExtractImages(bytes_column="image.bytes"))


def test_damaged_parquet_page_is_a_bad_picture(tmp_path: Path) -> None:
    path = tmp_path / parquet(tmp_path) / "0.parquet"
    whole = bytearray(path.read_bytes())
    page = open_source(path, SETTINGS).place("a").page  # type: ignore[attr-defined]
    whole[page.offset : page.offset + 40] = bytes(40)
    path.write_bytes(whole)
    assert str(contents(open_source(path, SETTINGS), ["a"])[0]).startswith("broken: the Parquet file is damaged there")


# --- what is not there, and mixtures -----------------------------------------------------------------------------


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not there: it is not a folder, not a file$"):
        open_source(tmp_path / "nowhere", SETTINGS)
    with pytest.raises(UserError, match="and matches none as a glob"):
        open_source(tmp_path / "no*.tar", SETTINGS)
    parquet(tmp_path)
    write_tar(tmp_path / "tables" / "a.tar", named(["a"]))
    with pytest.raises(UserError, match=r"has Parquet files and others \(a.tar\)"):
        open_source(tmp_path / "tables", SETTINGS)


def test_brackets_in_a_real_path_are_no_glob(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    path = tmp_path / "run[1]" / one_tar(tmp_path / "run[1]")
    assert list(open_source(path, SETTINGS).find()) == sorted(IDS)
    assert sources.picture_inputs(path, SETTINGS) == {"pictures": path}


def test_inputs_are_what_a_glob_matches(tmp_path: Path) -> None:
    path = tmp_path / glob_of_tars(tmp_path)
    inputs = sources.picture_inputs(path, SETTINGS)
    assert inputs == {f"pictures/{n}.tar": tmp_path / "shards" / f"{n}.tar" for n in range(3)}
    shutil.move(tmp_path / "shards", tmp_path / "elsewhere")
    assert list(sources.picture_inputs(tmp_path / "elsewhere" / "?.tar", SETTINGS)) == list(inputs)


# --- through the command line ------------------------------------------------------------------------------------

RECIPE = """
name = "tiny"
[extract-images]
backbone = "squeezenet1_1:features.0"
weights = "random"
template = "x/{image}.png"
size = 32
batch = 4
"""


def extract(path: Path, given: str, *more: str, out: str = "features.h5") -> Result:
    (path / "recipe.toml").write_text(RECIPE)
    fixed = ["--recipe", str(path / "recipe.toml"), "--pictures", str(path / given), "--out", str(path / out)]
    return CliRunner().invoke(main, ["extract-images", *fixed, *more])


def vectors(path: Path) -> dict[str, bytes | None]:
    with h5py.File(path) as h5:
        features, rows = h5["features"][:], h5["row"][:]
        images = [image.decode() for image in h5["image"][:]]
    return {i: None if row < 0 else features[row].tobytes() for i, row in zip(images, rows, strict=True)}


@pytest.mark.parametrize("make", [one_tar, glob_of_tars, one_zip, parquet], ids=name_of)
def test_same_vectors_from_every_source(tmp_path: Path, make: Make) -> None:
    plain = extract(tmp_path, folder(tmp_path), "--all", out="plain.h5")
    assert plain.exit_code == 0, plain.output
    given = make(tmp_path)
    packed = extract(tmp_path, given, "--all")
    assert packed.exit_code == 0, packed.output
    wanted = vectors(tmp_path / "plain.h5")
    assert sorted(wanted) == sorted(IDS)
    assert wanted["b"] == wanted["d"] != wanted["a"]
    assert vectors(tmp_path / "features.h5") == wanted


def test_only_pictures_that_are_referred_to(tmp_path: Path) -> None:
    given = one_zip(tmp_path)
    vocab = tmp_path / "convert" / "vocab"
    vocab.mkdir(parents=True)
    pl.DataFrame(
        {"value": ["d", "gone", "a"], "index": [2, 3, 4], "count": [5, 4, 3]},
        schema={"value": pl.String, "index": pl.UInt32, "count": pl.UInt64},
    ).write_parquet(vocab / "image.parquet")
    chosen = ["--convert", str(tmp_path / "convert"), "--set", "extract-images.max_bad_rate=0.5"]
    result = extract(tmp_path, given, *chosen)
    assert result.exit_code == 0, result.output
    found = vectors(tmp_path / "features.h5")
    assert list(found) == ["d", "gone", "a"]
    assert [name for name, vector in found.items() if vector is None] == ["gone"]
    rejects = pl.read_parquet(tmp_path / "features.h5.rejects.parquet")
    assert rejects.rows() == [("gone", "x/gone.png", "missing")]


def test_a_changed_shard_makes_the_output_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = glob_of_tars(tmp_path)
    assert extract(tmp_path, given, "--all").exit_code == 0
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    assert "is what it would be made again" in extract(tmp_path, given, "--all").output
    write_tar(tmp_path / "shards" / "1.tar", named(["b"]))
    again = extract(tmp_path, given, "--all")
    assert again.exit_code == 0, again.output
    assert sorted(vectors(tmp_path / "features.h5")) == ["a", "b", "c", "d", "f", "ünï"]


def test_mistakes_on_the_command_line_are_told(tmp_path: Path) -> None:
    given = one_tar(tmp_path)
    with gzip.open(tmp_path / "photos.tar.gz", "wb") as f:
        f.write((tmp_path / given).read_bytes())
    for pictures_, more, code, said in [
        ("nowhere", (), 1, "is not there"),
        ("photos.tar.gz", (), 1, "is compressed (gzip)"),
        (given, ("--set", "extract-images.index=none.csv"), 1, "none.csv (extract-images.index) cannot be read"),
        (given, ("--set", "extract-images.indx=none.csv"), 2, "did you mean 'index'"),
    ]:
        result = extract(tmp_path, pictures_, "--all", *more)
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit)
        assert said in result.output
    assert threading.active_count() < 20


def reasons(path: Path) -> list[tuple[str | None, str, str]]:
    return pl.read_parquet(path / "features.h5.rejects.parquet").rows()  # type: ignore[return-value]


COLUMN = ("--set", "extract-images.path_column=nope")
MOST = ("--set", "extract-images.max_bad_rate=0.9")


def test_what_is_no_file_is_rejected(tmp_path: Path) -> None:
    photos = tmp_path / folder(tmp_path) / "x"
    (photos / "dangling.png").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.png")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(photos / "socket.png"))
        result = extract(tmp_path, "photos", "--all", *MOST)
    assert result.exit_code == 0, result.output
    assert sorted(vectors(tmp_path / "features.h5")) == sorted([*IDS, "dangling", "pipe", "socket"])
    assert [(image, why) for image, _, why in reasons(tmp_path)] == [
        ("dangling", "missing"),
        ("pipe", "not a file"),
        ("socket", "not a file"),
    ]
    os.mkfifo(tmp_path / "pipe")
    for given in ("pipe", "shards"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        if given == "shards":
            os.mkfifo(tmp_path / "shards" / "a.tar")
        result = extract(tmp_path, given, "--all")
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
        assert "pipe, socket or device" in result.output


def test_a_name_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    photos = os.fsencode(tmp_path / folder(tmp_path) / "x")
    with open(photos + b"/caf\xe9.png", "wb") as f:
        f.write(picture("a"))
    result = extract(tmp_path, "photos", "--all", *MOST)
    assert result.exit_code == 0, result.output
    assert sorted(vectors(tmp_path / "features.h5")) == sorted(IDS)
    assert reasons(tmp_path) == [(None, "caf\\xe9", "the name is not UTF-8; rename it")]
    assert "1 of the rejected are pictures that no id names" in result.output
    too_many = extract(tmp_path, "photos", "--all", "--set", "extract-images.max_bad_rate=0.12")
    assert "1 of 8 pictures (12.5%) cannot be used" in too_many.output
    assert "1 the name is not UTF-8; rename it (such as caf\\xe9)" in too_many.output


def test_rows_of_an_index_without_a_path_or_an_id(tmp_path: Path) -> None:
    folder(tmp_path)
    lines = ["image,path", "one,x/a.png", "two,", ",x/b.png", ",", "one,", '"",x/c.png']
    (tmp_path / "photos" / "index.csv").write_text("\n".join(lines) + "\n")
    result = extract(tmp_path, "photos", "--all", "--set", "extract-images.index=index.csv", *MOST)
    assert result.exit_code == 0, result.output
    assert [name for name, vector in vectors(tmp_path / "features.h5").items() if vector] == ["one"]
    assert reasons(tmp_path) == [
        ("two", "", "no path in the index"),
        (None, "row 3 of index.csv: x/b.png", "no id"),
        (None, "row 4 of index.csv", "no id"),
        (None, "row 6 of index.csv: x/c.png", "no id"),
    ]
    counts = json.loads((tmp_path / "features.h5.json").read_text())["counts"]
    assert (counts["rejected"], counts["without an id"], counts["pictures"]) == (4, 3, 2)
    named = extract(tmp_path, "photos", "--all", "--set", "extract-images.index=index.csv", *COLUMN)
    assert "has no column 'nope'; known: image, path. Name it with extract-images.path_column" in named.output


def test_rows_of_parquet_without_an_id(tmp_path: Path) -> None:
    rows = {"image": ["x/a.png", None, "x/b.png", None], "bytes": [picture("a"), picture("c"), picture("b"), None]}
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    result = extract(tmp_path, "a.parquet", "--all", *MOST)
    assert result.exit_code == 0, result.output
    assert reasons(tmp_path) == [(None, f"row {row} of a.parquet", "no id") for row in (2, 4)]
    pl.DataFrame({"image": ["x/a.png"], "bytes": ["text"]}).write_parquet(tmp_path / "b.parquet")
    told = extract(tmp_path, "b.parquet", "--all", *MOST)
    assert told.exit_code == 2
    assert "column 'bytes' (extract-images.bytes_column) holds texts, and pictures are bytes" in told.output


def test_a_template_that_nothing_matches_is_named(tmp_path: Path) -> None:
    told = extract(tmp_path, folder(tmp_path), "--all", "--set", "extract-images.template=y/{image}.png")
    assert told.exit_code == 1
    assert "none in" in told.output
    assert "is named as extract-images.template = 'y/{image}.png' says" in told.output


def test_all_or_those_of_a_vocabulary(tmp_path: Path) -> None:
    told = extract(tmp_path, folder(tmp_path), "--all", "--convert", str(tmp_path))
    assert told.exit_code == 2
    assert "give one of the two" in told.output


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    told = extract(tmp_path, folder(tmp_path), "--all", out="recipe.toml/o.h5")
    assert told.exit_code == 1
    assert f"{tmp_path / 'recipe.toml'} is a file, not a folder; name another output" in told.output
