"""`ctrkit import-features` through the command line: each format, each fault, and models trained on what it writes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrkit import vector_files
from ctrkit.features import FeatureStore
from ctrkit.pipeline import Graph, Setting
from tests.shop import ctrkit
from tests.tiny_run import TinyRun
from tests.tiny_world import RECIPE

Array = npt.NDArray[Any]
IDS = ["stranger", "d", "a", "c", "e", "b"]
VECTORS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
BY_ID = dict(zip(IDS, VECTORS, strict=True))
COUNTS = [("a", 9), ("b", 3), ("c", 8), ("d", 8), ("e", 0)]
"""Of the vocabulary, by index; in order of use a, c, d, b, e."""
BY_USE = ["a", "c", "d", "b", "e"]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a recipe and a vocabulary."""
    (tmp_path / "shop.toml").write_text("[import-features]\nmax_bad_rate = 0.0\n")
    write_vocabulary(tmp_path, COUNTS)
    return tmp_path


def write_vocabulary(folder: Path, counts: list[tuple[str, int]]) -> None:
    (folder / "convert" / "vocab").mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {"value": [v for v, _ in counts], "index": range(2, len(counts) + 2), "count": [c for _, c in counts]},
        schema={"value": pl.String, "index": pl.UInt32, "count": pl.UInt64},
    ).write_parquet(folder / "convert" / "vocab" / "image.parquet")


def write_parquet(path: Path, ids: list[Any], vectors: Any, **how: Any) -> Path:
    lists = [None if v is None else list(v) for v in vectors]
    pl.DataFrame({"id": ids, "vector": lists}).write_parquet(path, **how)
    return path


def write_npy(folder: Path, ids: list[str], vectors: Array, name: str = "") -> list[object]:
    np.save(folder / f"{name}vectors.npy", vectors)
    (folder / f"{name}ids.txt").write_text("".join(f"{i}\n" for i in ids))
    return ["--vectors", folder / f"{name}vectors.npy", "--ids", folder / f"{name}ids.txt"]


def amazon(ids: list[str], vectors: Array) -> bytes:
    return b"".join(i.encode() + np.asarray(v, "<f4").tobytes() for i, v in zip(ids, vectors, strict=True))


def run(shop: Path, *words: object, out: str = "features.h5", convert: bool = True, **sets: object) -> Result:
    of = ["--convert", shop / "convert"] if convert else ["--all"]
    set_ = [word for key, value in sets.items() for word in ("--set", f"import-features.{key}={value}")]
    return ctrkit("import-features", "--recipe", shop / "shop.toml", *of, "--out", shop / out, *words, *set_)


def done(shop: Path, *words: object, **more: Any) -> dict[str, Any]:
    """Import, which must succeed; return the counts."""
    result = run(shop, *words, **more)
    assert result.exit_code == 0, (result.output, result.exception)
    counts = json.loads((shop / f"{more.get('out', 'features.h5')}.json").read_text())["counts"]
    assert isinstance(counts, dict)
    return counts


def fault(shop: Path, *words: object, code: int = 1, **more: Any) -> str:
    """Import, which must end in one paragraph and leave nothing behind; return the paragraph."""
    before = {p for p in shop.iterdir() if "features" in p.name}
    result = run(shop, *words, **more)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert {p for p in shop.iterdir() if "features" in p.name} == before
    error = result.output.partition("Error: ")[2].strip()
    assert error
    assert "\n" not in error
    return error


def read(path: Path) -> tuple[Array, dict[str, int], dict[str, str]]:
    with h5py.File(path) as h5:
        images = [image.decode() for image in h5["image"][:]]
        return h5["features"][:], dict(zip(images, h5["row"][:].tolist(), strict=True)), dict(h5.attrs)


def check_by_use(shop: Path, out: str = "features.h5") -> None:
    """The five pictures of the vocabulary, most used first, with the vectors that have their ids."""
    features, row, _ = read(shop / out)
    assert features.dtype == np.float16
    assert row == {"a": 0, "b": 3, "c": 1, "d": 2, "e": 4}
    np.testing.assert_array_equal(features, np.array([BY_ID[i] for i in BY_USE]).astype(np.float16))


def rejects(shop: Path) -> list[tuple[Any, ...]]:
    return pl.read_parquet(shop / "features.h5.rejects.parquet").rows()


# --- formats -----------------------------------------------------------------------------------------------------


def write_hdf5(path: Path, ids: Any, vectors: Array, **how: Any) -> Path:
    with h5py.File(path, "w") as h5:
        h5.create_dataset("of/things", data=ids)
        h5.create_dataset("vectors", data=vectors, **how)
    return path


def arrow(path: Path, ids: Any, vectors: Any) -> Path:
    pq.write_table(pa.table({"id": ids, "vector": vectors}), path, row_group_size=2)
    return path


FORMATS: dict[str, Callable[[Path], list[object]]] = {
    "parquet": lambda d: ["--vectors", write_parquet(d / "v.parquet", IDS, VECTORS)],
    "parquet, row groups of 2": lambda d: ["--vectors", write_parquet(d / "v.pq", IDS, VECTORS, row_group_size=2)],
    "parquet, float64, fixed": lambda d: [
        "--vectors",
        arrow(d / "v.parquet", IDS, pa.FixedSizeListArray.from_arrays(VECTORS.ravel().astype(np.float64), 8)),
    ],
    "parquet, float16, dictionary": lambda d: [
        "--vectors",
        arrow(
            d / "v.parquet",
            pa.array(IDS).dictionary_encode(),
            pa.array([list(v) for v in VECTORS.astype(np.float16)], pa.large_list(pa.float16())),
        ),
    ],
    "two parquet files": lambda d: [
        "--vectors",
        write_parquet(d / "v1.parquet", IDS[:2], VECTORS[:2]),
        "--vectors",
        write_parquet(d / "v2.parquet", IDS[2:], VECTORS[2:]),
    ],
    "a folder": lambda d: [
        (d / "v").mkdir() or "--vectors",
        write_parquet(d / "v" / "1.parquet", IDS[:2], VECTORS[:2])
        and write_parquet(d / "v" / "2.parquet", IDS[2:], VECTORS[2:]).parent,
    ],
    "a glob": lambda d: [
        "--vectors",
        write_parquet(d / "v1.parquet", IDS[:2], VECTORS[:2])
        and write_parquet(d / "v2.parquet", IDS[2:], VECTORS[2:]).with_name("v?.parquet"),
    ],
    "npy": lambda d: write_npy(d, IDS, VECTORS),
    "npy, Fortran order": lambda d: write_npy(d, IDS, np.asfortranarray(VECTORS)),
    "npy, big endian float64": lambda d: write_npy(d, IDS, VECTORS.astype(">f8")),
    "npy, two": lambda d: [*write_npy(d, IDS[:3], VECTORS[:3], "1"), *write_npy(d, IDS[3:], VECTORS[3:], "2")],
    "npy, npy ids": lambda d: [*write_npy(d, IDS, VECTORS)[:3], np.save(d / "ids.npy", IDS) or d / "ids.npy"],
    "npy, bytes ids": lambda d: [
        *write_npy(d, IDS, VECTORS)[:3],
        np.save(d / "ids.npy", np.array(IDS, "S")) or d / "ids.npy",
    ],
    "npy, parquet ids": lambda d: [*write_npy(d, IDS, VECTORS)[:3], write_parquet(d / "ids.parquet", IDS, VECTORS)],
    "hdf5": lambda d: ["--vectors", write_hdf5(d / "v.h5", IDS, VECTORS)],
    "hdf5, bytes, compressed": lambda d: [
        "--vectors",
        write_hdf5(d / "v.hdf5", np.array(IDS, "S"), VECTORS, compression="gzip", chunks=(2, 8)),
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(shop: Path, name: str) -> None:
    counts = done(shop, *FORMATS[name](shop))
    check_by_use(shop)
    assert rejects(shop) == []
    assert (counts["vectors"], counts["rows"], counts["pictures"], counts["width"]) == (6, 5, 5, 8)
    assert counts["ids that are not in the vocabulary"] == 1
    _, _, attributes = read(shop / "features.h5")
    assert set(attributes) >= {"backbone", "layer", "weights", "dtype", "preprocessing", "versions", "source"}
    assert str(shop) not in json.dumps({k: str(v) for k, v in attributes.items()})


def test_batches_change_nothing(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parquet", "npy, Fortran order", "hdf5, bytes, compressed"):
        words = FORMATS[name](shop)
        done(shop, *words, out="whole.h5")
        monkeypatch.setattr(vector_files, "BATCH_BYTES", 100)
        monkeypatch.setattr(vector_files, "BATCH_IDS", 4)
        done(shop, *words, out="pieces.h5")
        monkeypatch.undo()
        assert (shop / "whole.h5").read_bytes() == (shop / "pieces.h5").read_bytes()


def test_the_amazon_binary(shop: Path) -> None:
    vectors = np.random.default_rng(1).random((4, 4096), np.float32)
    ids = ["B00000000X", "0000031852", "B00000000Y", "B00000000Z"]
    (shop / "image_features_Toys.b").write_bytes(amazon(ids, vectors))
    write_vocabulary(shop, [("B00000000Z.jpg", 4), ("0000031852.jpg", 9)])
    counts = done(
        shop, "--vectors", shop / "image_features_Toys.b", template="{id}.jpg", made_by="Caffe's AlexNet, fc7"
    )
    features, row, attributes = read(shop / "features.h5")
    assert row == {"0000031852.jpg": 0, "B00000000Z.jpg": 1}
    np.testing.assert_array_equal(features, vectors[[1, 3]].astype(np.float16))
    assert attributes["backbone"] == "Caffe's AlexNet, fc7"
    assert counts["ids that are not in the vocabulary"] == 2
    cut = shop / "cut.b"
    cut.write_bytes((shop / "image_features_Toys.b").read_bytes()[:-100])
    error = fault(shop, "--vectors", cut, template="{id}.jpg", out="other-features.h5")
    assert "65,476 bytes, which are not whole records of 16,394" in error
    assert "the last one lacks 100 bytes" in error
    assert f"truncate -s {3 * 16394} {cut}" in error
    cut.write_bytes(bytes(16394))
    assert "no id of ten letters and digits" in fault(shop, "--vectors", cut, out="other-features.h5")
    # Another name needs the format.
    (shop / "image_features_Toys.b").rename(shop / "toys.bin")
    words = ["--vectors", shop / "toys.bin"]
    assert "import-features.format=" in fault(shop, *words, code=2)
    done(shop, *words, template="{id}.jpg", format="amazon")


def test_everything(shop: Path) -> None:
    """--all: every vector in the order in which they come, whole numbers as ids, the first of each id."""
    words = ["--vectors", write_parquet(shop / "v.parquet", [30, 7, 30, 9], VECTORS[:4])]
    counts = done(shop, *words, convert=False, template="{id}.png")
    features, row, _ = read(shop / "features.h5")
    assert row == {"30.png": 0, "7.png": 1, "9.png": 2}
    np.testing.assert_array_equal(features, VECTORS[[0, 1, 3]].astype(np.float16))
    assert counts["ids again"] == 1
    assert rejects(shop) == [("30.png", "v.parquet", 3, "the id is there before, in row 1 of v.parquet")]


def test_two_runs_give_the_same_bytes(shop: Path) -> None:
    words = FORMATS["parquet"](shop)
    done(shop, *words)
    time.sleep(1.1)  # HDF5 counts in seconds
    done(shop, *words, out="again.h5")
    assert (shop / "features.h5").read_bytes() == (shop / "again.h5").read_bytes()


# --- faults ------------------------------------------------------------------------------------------------------


def test_vectors_that_cannot_be_used(shop: Path) -> None:
    """NaN, infinite, missing, of another width; the next vector of the same id is taken instead."""
    rows: list[tuple[Any, Any]] = [
        ("a", [np.nan] * 8),
        (None, [1.0] * 8),
        ("b", [np.inf, *[0.0] * 7]),
        ("a", [2.0] * 8),
        ("c", [1.0] * 7),
        ("a", [3.0] * 8),
        ("d", None),
        ("e", [4.0, None, *[4.0] * 6]),
        ("stranger", [5.0] * 8),
    ]
    words = ["--vectors", write_parquet(shop / "v.parquet", [i for i, _ in rows], [v for _, v in rows])]
    error = fault(shop, *words, max_bad_rate=0.7)
    assert "4 of 5 pictures of the vocabulary have no usable vector (80.0%)" in error
    assert "import-features.max_bad_rate = 0.7 allows: 2 × numbers that are missing, infinite or NaN" in error
    assert "(such as b, e)" in error
    assert "1 × 7 numbers, where the first vector has 8 (such as c)" in error
    counts = done(shop, *words, max_bad_rate=0.8)
    features, row, _ = read(shop / "features.h5")
    assert row == {"a": 0, "b": -1, "c": -1, "d": -1, "e": -1}
    np.testing.assert_array_equal(features, np.full((1, 8), 2))
    unusable = "numbers that are missing, infinite or NaN"
    assert rejects(shop) == [
        ("a", "v.parquet", 1, unusable),
        (None, "v.parquet", 2, "no id"),
        ("b", "v.parquet", 3, unusable),
        ("c", "v.parquet", 5, "7 numbers, where the first vector has 8"),
        ("a", "v.parquet", 6, "the id is there before, in row 4 of v.parquet"),
        ("d", "v.parquet", 7, "no vector"),
        ("e", "v.parquet", 8, unusable),
    ]
    assert (counts["rejected"], counts["ids again"], counts["without an id"], counts["with a vector"]) == (7, 1, 1, 1)
    # With --all what counts is the share of the vectors: six of nine.
    error = fault(shop, *words, convert=False, max_bad_rate=0.6, out="all-features.h5")
    assert "6 of 9 vectors cannot be used (66.7%)" in error
    done(shop, *words, convert=False, max_bad_rate=0.67)
    features, row, _ = read(shop / "features.h5")
    assert row == {"a": 0, "stranger": 1}


def test_pictures_without_a_vector(shop: Path) -> None:
    words = ["--vectors", write_parquet(shop / "v.parquet", ["a", "x", "c", "d"], VECTORS[:4])]
    error = fault(shop, *words, max_bad_rate=0.39)
    assert "2 of 5 pictures of the vocabulary have no usable vector (40.0%)" in error
    assert "2 × no vector of this id (such as b, e)" in error
    assert "1 vectors have ids that it does not know, such as 'x'" in error
    counts = done(shop, *words, max_bad_rate=0.4)
    _, row, _ = read(shop / "features.h5")
    assert row == {"a": 0, "c": 1, "d": 2, "b": -1, "e": -1}
    reason = "no vector of this id"
    assert rejects(shop) == [("b", None, None, reason), ("e", None, None, reason)]
    assert (counts["ids that are not in the vocabulary"], counts["rejected"]) == (1, 2)


def test_ids_that_are_made_otherwise(shop: Path) -> None:
    words = ["--vectors", write_parquet(shop / "v.parquet", ["a.jpg", "b.jpg"], VECTORS[:2])]
    error = fault(shop, *words, max_bad_rate=1.0)
    assert "no vector is of a picture of the vocabulary" in error
    assert "ids such as 'a.jpg', the vocabulary 'a'" in error
    assert "import-features.template" in error
    assert "has to have {id} once" in fault(shop, *words, code=2, template="x.jpg")


def test_values_beyond_float16_are_clipped_and_counted(shop: Path) -> None:
    vectors = VECTORS.copy()
    vectors[1, :3] = [1e6, -70000, 65519]
    vectors[2, 0] = 65504
    vectors[0, 0] = 1e9  # of no picture
    result = run(shop, *write_npy(shop, IDS, vectors))
    assert "3 values were beyond float16 and are clipped to ±65504" in result.output
    features, row, _ = read(shop / "features.h5")
    assert features[row["d"], :3].tolist() == [65504, -65504, 65504]
    assert features[row["a"], 0] == 65504
    whole = np.arange(48).reshape(6, 8) * 2000 - 9000
    assert done(shop, *write_npy(shop, IDS, whole))["values clipped"] == int((np.abs(whole[1:]) > 65504).sum())


def test_widths_differ(shop: Path) -> None:
    first = write_parquet(shop / "v1.parquet", IDS[:3], VECTORS[:3])
    other = write_parquet(shop / "v2.parquet", IDS[3:], VECTORS[3:, :7])
    error = fault(shop, "--vectors", first, "--vectors", other)
    assert "v1.parquet has vectors of 8 numbers, and" in error
    assert "v2.parquet of 7" in error
    for count, said in [(5, "6 vectors, and"), (7, "6 vectors, and")]:
        words = write_npy(shop, IDS, VECTORS)
        (shop / "ids.txt").write_text("x\n" * count)
        assert said in fault(shop, *words)
    write_hdf5(shop / "v.h5", IDS[:5], VECTORS)
    assert "each vector needs one id" in fault(shop, "--vectors", shop / "v.h5")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(6), r"shape [6], not [rows, width]"),
        (np.zeros((6, 2, 2)), "flatten them first"),
        (np.array([["x"]] * 6), "not numbers"),
        (np.zeros((6, 2), bool), "not numbers"),
        (np.zeros((6, 2), complex), "not numbers"),
        (np.zeros((0, 8)), "there is no vector in it"),
        (np.zeros((6, 0)), "there is no vector in it"),
        (np.array([["x"]] * 6, object), "not an NPY file of numbers"),
    ],
)
def test_arrays_that_are_no_vectors(shop: Path, array: Array, said: str) -> None:
    assert said in fault(shop, *write_npy(shop, IDS[: len(array)], array))


def test_broken_files(shop: Path) -> None:
    for name, words in [
        ("v.parquet", FORMATS["parquet"](shop)),
        ("vectors.npy", FORMATS["npy"](shop)),
        ("v.h5", FORMATS["hdf5"](shop)),
    ]:
        whole = (shop / name).read_bytes()
        for some in (whole[: len(whole) // 2], b"", b"\0" * 300):
            (shop / name).unlink()
            (shop / name).write_bytes(some)
            assert name in fault(shop, *words)
    np.savez(shop / "vectors.npz", VECTORS)
    (shop / "ids.txt").write_bytes(b"\xff\xfe\n" * 6)
    assert "NPZ" in fault(shop, "--vectors", shop / "vectors.npz", "--ids", shop / "ids.txt", format="npy")
    words = write_npy(shop, IDS, VECTORS)
    (shop / "ids.txt").write_bytes(b"\xff\xfe\n" * 6)
    assert "ids.txt is not a text file of ids" in fault(shop, *words)
    np.save(shop / "ids.npy", np.zeros(6))
    assert "ids of type Float64" in fault(shop, *words[:3], shop / "ids.npy")


def test_calls_that_cannot_be_meant(shop: Path) -> None:
    words = FORMATS["npy"](shop)
    assert "each NPY file needs an --ids" in fault(shop, *words[:2], code=2)
    assert "is not there" in fault(shop, "--vectors", shop / "none.npy")
    assert "is not there" in fault(shop, "--vectors", shop / "*.none")
    (shop / "empty").mkdir()
    assert "has no file of vectors" in fault(shop, "--vectors", shop / "empty")
    two = pl.DataFrame({"id": IDS, "name": IDS, "vector": VECTORS.tolist(), "other": VECTORS.tolist()})
    two.write_parquet(shop / "two.parquet")
    of = ["--vectors", shop / "two.parquet"]
    assert "import-features.vector=…: one of vector, other" in fault(shop, *of, code=2, id="id")
    assert "import-features.id=…: one of id, name" in fault(shop, *of, code=2, vector="vector")
    assert "nothing called 'vectr' (import-features.vector); did you mean 'vector'?" in fault(
        shop, *of, code=2, id="id", vector="vectr"
    )
    assert "not lists of numbers" in fault(shop, *of, id="id", vector="name")
    done(shop, *of, id="name", vector="other")
    check_by_use(shop)
    result = ctrkit("import-features", "--recipe", shop / "shop.toml", *words, "--out", shop / "x.h5")
    assert result.exit_code == 2
    assert "or --all" in result.output
    (shop / "convert" / "vocab" / "image.parquet").unlink()
    assert "is convert done?" in fault(shop, *words, out="y-features.h5")


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_vectors_against_a_plain_loop(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shop = tmp_path_factory.mktemp("any")
    (shop / "shop.toml").write_text("[import-features]\nmax_bad_rate = 1.0\n")
    names = [f"p{i}" for i in range(8)]
    vocabulary = data.draw(st.lists(st.tuples(st.sampled_from(names), st.integers(0, 3)), unique_by=lambda x: x[0]))
    vector = st.lists(st.sampled_from([0.5, -2.0, 1e5, float("nan")]), min_size=2, max_size=2)
    rows = data.draw(st.lists(st.tuples(st.sampled_from(names), vector), min_size=1, max_size=30))
    everything = data.draw(st.booleans())
    write_vocabulary(shop, vocabulary)
    cut = data.draw(st.integers(0, len(rows)))
    words: list[object] = []
    for number, part in enumerate([rows[:cut], rows[cut:]]):
        if part:
            words += write_npy(shop, [i for i, _ in part], np.array([v for _, v in part]), str(number))
    wanted: dict[str, list[float]] = {}
    for name, numbers in rows:
        if name not in wanted and not np.isnan(numbers).any():
            wanted[name] = numbers
    by_use = [v for v, _ in sorted(vocabulary, key=lambda x: -x[1])]
    order = list(dict.fromkeys(n for n, v in rows if n in wanted)) if everything else [v for v in by_use if v in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_files, "BATCH_BYTES", 64)
        result = run(shop, *words, convert=not everything)
    if not order:
        assert result.exit_code == 1
        return
    assert result.exit_code == 0, (result.output, result.exception)
    features, row, _ = read(shop / "features.h5")
    if everything:  # an id whose first vector is bad comes where its first good one is
        assert set(row) == set(order)
        order = sorted(row, key=lambda name: row[name])
    else:
        assert list(row) == by_use
    assert [name for name in sorted(row, key=lambda n: row[n]) if row[name] >= 0] == order
    np.testing.assert_array_equal(features, np.clip([wanted[n] for n in order], -65504, 65504).astype(np.float16))


# --- size and room -----------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_vectors(shop: Path) -> None:
    """A Parquet file of one row group, 157 MB of numbers, in 100 MiB more than a few vectors take."""
    rows, width = 9600, 4096
    block = np.random.default_rng(0).integers(0, 100, (1200, width)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(np.concatenate([block] * (rows // 1200)).ravel(), width)
    table = pa.table({"id": [f"p{i}" for i in range(rows)], "vector": lists})
    pq.write_table(table, shop / "large.parquet", row_group_size=rows, compression="none")
    pq.write_table(table[:10], shop / "small.parquet")

    def peak(name: str) -> int:
        code = "import re\nfrom ctrkit.cli import main\nmain(standalone_mode=False)\n"
        code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
        words = ["import-features", "--recipe", shop / "shop.toml", "--all", "--out", shop / "f.h5"]
        command = [sys.executable, "-c", code, *words, "--vectors", shop / name]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) >> 10

    small, large = peak("small.parquet"), peak("large.parquet")
    assert large - small < 100, (small, large)
    np.testing.assert_array_equal(FeatureStore(shop / "f.h5").read(np.array([0, rows - 1])), block[[0, -1]])


def test_an_id_that_hdf5_cannot_hold(shop: Path) -> None:
    write_vocabulary(shop, [("a", 1), ("b\0", 1)])
    counts = done(shop, "--vectors", write_parquet(shop / "v.parquet", ["a", "b\0"], VECTORS[:2]), max_bad_rate=0.5)
    assert counts["without an id"] == 1
    assert read(shop / "features.h5")[1] == {"a": 0, "b\ufffd": -1}


KILLED = """
import os, signal, sys
from ctrkit import importing, vector_files
from ctrkit.cli import main

left, write = int(sys.argv.pop(1)), importing._write_rows

def until_then(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*given)

importing._write_rows, vector_files.BATCH_BYTES = until_then, 1
main()
"""


@pytest.mark.parametrize("written", [0, 3])
def test_killed_it_leaves_the_old_file_whole_and_starts_again(shop: Path, written: int) -> None:
    old = write_parquet(shop / "old.parquet", IDS, VECTORS + 1)
    done(shop, "--vectors", old)
    before = {p.name: p.read_bytes() for p in shop.iterdir() if "features.h5" in p.name and p.suffix != ".lock"}
    new = write_parquet(shop / "new.parquet", IDS, VECTORS)
    words = ["import-features", "--recipe", shop / "shop.toml", "--convert", shop / "convert", "--vectors", new]
    words += ["--out", shop / "features.h5"]
    result = subprocess.run([sys.executable, "-c", KILLED, str(written), *map(str, words)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert {name: (shop / name).read_bytes() for name in before} == before
    done(shop, "--vectors", new)
    check_by_use(shop)
    assert not [p.name for p in shop.iterdir() if ".tmp-" in p.name]


def test_no_room(shop: Path) -> None:
    words = write_npy(shop, [f"p{i}" for i in range(4000)], np.ones((4000, 64), np.float32))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        error = fault(shop, *words, convert=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot write" in error
    done(shop, *words, convert=False)


# --- what reads it -----------------------------------------------------------------------------------------------


def export(features: Path, folder: Path) -> list[object]:
    """Write the vectors of a features.h5 as Parquet, in another order."""
    store = FeatureStore(features)
    pictures = store.pictures.filter(pl.col("row") >= 0).sample(fraction=1.0, shuffle=True, seed=1)
    vectors = store.read(pictures["row"].to_numpy())
    return ["--vectors", write_parquet(folder / "vectors.parquet", pictures["image"].to_list(), vectors)]


def test_models_train_and_predict_on_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The same vectors, whether extracted here or imported, make the same model and the same scores."""
    words = export(tiny_run.features, tmp_path)
    tiny_run.must("import-features", "--convert", tiny_run.convert, "--out", tmp_path / "features.h5", *words)
    scores = []
    for name, features in [("extracted", tiny_run.features), ("imported", tmp_path / "features.h5")]:
        reads = ["--groups", tiny_run.groups, "--features", features, "--convert", tiny_run.convert]
        tiny_run.must("train", *reads, "--out", tmp_path / name)
        out = tmp_path / f"{name}.parquet"
        tiny_run.must("predict", *reads, "--model", tmp_path / name, "--out", out)
        scores.append(pl.read_parquet(out))
    np.testing.assert_allclose(scores[0]["score"], scores[1]["score"], rtol=1e-3, atol=1e-5)
    assert scores[0]["score"].n_unique() > 10
    shown = ctrkit("inspect", tmp_path / "features.h5")
    assert shown.exit_code == 0
    assert "made elsewhere" in shown.output


def test_a_run_with_vectors_from_elsewhere(tmp_path: Path) -> None:
    """A recipe whose [import-features] names files takes them in the place of the extraction."""
    names = 'files = ["a.npy", "b.npy"]\nids = ["a.txt", "b.txt"]'
    recipe = RECIPE.replace("[simulate]", f"[import-features]\n{names}\n[simulate]")
    (tmp_path / "tiny.toml").write_text(recipe)
    graph = Graph(Setting(str(tmp_path / "tiny.toml"), None, None, (), tmp_path / "runs"))
    [step] = [step for step in graph.steps if step.output.name == "features.h5"]
    raw, convert = tmp_path / "runs" / "tiny" / "raw", tmp_path / "runs" / "tiny" / "convert"
    vectors = [
        "--vectors",
        f"{raw}/a.npy",
        "--vectors",
        f"{raw}/b.npy",
        "--ids",
        f"{raw}/a.txt",
        "--ids",
        f"{raw}/b.txt",
    ]
    assert (step.stage, list(step.options)) == ("import-features", ["--convert", str(convert), *vectors])
    assert {need.stage for need in step.needs} == {"simulate", "convert"}
    assert all(step in other.needs for other in graph.steps if other.stage in ("train", "predict", "report"))
    assert all(other.stage != "extract-images" for other in graph.steps)


# --- what strangers brought --------------------------------------------------------------------------------------


def test_a_byte_order_mark_before_the_ids_is_none_of_them(shop: Path) -> None:
    words = write_npy(shop, IDS, VECTORS)
    (shop / "ids.txt").write_text("\n".join([*IDS[1:], IDS[0]]), encoding="utf-8-sig")
    np.save(shop / "vectors.npy", np.roll(VECTORS, -1, axis=0))
    done(shop, *words)
    check_by_use(shop)


def test_pipes_are_refused(shop: Path) -> None:
    words = write_npy(shop, IDS, VECTORS)
    os.mkfifo(shop / "pipe.npy")
    assert "pipe.npy is not a file; vectors and ids are read" in fault(shop, "--vectors", shop / "pipe.npy", *words[2:])
    assert "pipe.npy is not a file" in fault(shop, *words[:2], "--ids", shop / "pipe.npy")


def test_an_error_of_too_many_is_of_all(shop: Path) -> None:
    nan = float("nan")
    ids = ["a", "a", "b", None, "", "c", "d", "e", "f"]
    vectors = [[1.0, 2.0], [3.0, 4.0], [1e9, -1e9], [1.0, 1.0], [1.0, 1.0], [nan, 1.0], None, [1.0, None], [1.0]]
    words = ["--vectors", write_parquet(shop / "v.parquet", ids, vectors)]
    error = fault(shop, *words, convert=False)
    assert "6 of 9 vectors cannot be used (66.7%)" in error
    assert "2 × no id (such as row 4 of v.parquet, row 5 of v.parquet)" in error
    assert "2 × numbers that are missing, infinite or NaN (such as c, e)" in error
    assert "Besides, 1 have an id that is there before." in error
    assert done(shop, *words, convert=False, max_bad_rate=1.0)["rejected"] == 6 + 1
    assert "5 of 5 pictures" not in fault(shop, *words)
    assert "3 of 5 pictures of the vocabulary have no usable vector (60.0%)" in fault(shop, *words)


def test_all_or_those_of_a_vocabulary(shop: Path) -> None:
    assert "give one of the two" in fault(shop, *write_npy(shop, IDS, VECTORS), "--all", code=2)


def test_ids_and_vectors_that_cannot_be(shop: Path) -> None:
    floats = write_parquet(shop / "v.parquet", [1.5] * 6, VECTORS)
    assert "id: floats cannot be ids, only texts and whole numbers can" in fault(shop, "--vectors", floats, code=2)
    words = write_npy(shop, IDS, VECTORS)
    np.save(shop / "vectors.npy", np.array([{}, 1], dtype=object))
    for _ in range(2):
        error = fault(shop, *words)
        assert "it holds Python objects, or is no NPY file at all" in error
        assert "pickle" not in error
        (shop / "vectors.npy").write_bytes(b"not one")


def test_after_a_full_disk_it_says_that_it_starts_again(shop: Path) -> None:
    words = write_npy(shop, IDS, np.ones((6, 100_000), np.float16))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        error = fault(shop, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "run the same command again: it starts again" in error
    assert "goes on from" not in error
