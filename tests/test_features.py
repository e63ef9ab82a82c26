"""FeatureStore: the rows that were asked for, in any layout of the file, and the shuffled control."""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch  # noqa: F401 - the reader converts by it where it has been imported
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrkit import features as module
from ctrkit.errors import UserError
from ctrkit.features import FeatureStore

IMAGES = ["é.jpg", "b", "c", "gone", "c again"]
ROW = [2, 0, 1, -1, 1]


def write(path: Path, **how: object) -> npt.NDArray[np.float16]:
    features = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float16)
    with h5py.File(path, "w") as h5:
        h5.create_dataset("features", data=features, **how)
        h5.create_dataset("image", data=np.array(IMAGES, dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=np.array(ROW, dtype=np.int64))
        h5.attrs["backbone"] = "none"
    return features


@pytest.mark.parametrize("how", [{}, {"chunks": (1, 8)}])
def test_reads_rows(tmp_path: Path, how: dict[str, object]) -> None:
    features = write(tmp_path / "f.h5", **how)
    store = FeatureStore(tmp_path / "f.h5")
    assert (store.rows, store.width, store.attributes) == (3, 8, {"backbone": "none"})
    assert store.row_of(["c", "nobody", "é.jpg", "gone", "c", "c again"]).tolist() == [1, -1, 2, -1, 1, 1]
    assert store.row_of([]).tolist() == []
    assert "pictures" in vars(store)
    store, other = FeatureStore(store.path), store
    images = other.pictures["image"]
    rows = store.row_of(images)  # in the file's order: the ids are not held
    assert "pictures" not in vars(store)
    assert rows.tolist() == other.row_of(images.reverse())[::-1].tolist() == other.pictures["row"].to_list()
    rows = np.array([2, -1, 0, 2, 2, 1, -1])
    found = store.read(rows)
    assert found.dtype == np.float32
    for row, vector in zip(rows, found, strict=True):
        np.testing.assert_array_equal(vector, features[row] if row >= 0 else np.zeros(8))
    assert store.read(np.array([], dtype=np.int64)).shape == (0, 8)
    assert not store.read(np.array([-1, -1])).any()
    np.testing.assert_array_equal(store.load(), features)
    assert store.load("float32").dtype == np.float32
    for wrong in (3, -2):
        with pytest.raises(IndexError):
            store.read(np.array([0, wrong]))


def write_rows(path: Path, features: npt.NDArray[Any], **how: object) -> None:
    """Write a features file with a picture a row."""
    with h5py.File(path, "w") as h5:
        h5.create_dataset("features", data=features, **how)
        add_pictures(h5, len(features))


def add_pictures(h5: h5py.File, rows: int) -> None:
    h5.create_dataset("image", data=np.array([str(i) for i in range(rows)], object), dtype=h5py.string_dtype())
    h5.create_dataset("row", data=np.arange(rows))


def write_shards(folder: Path, features: npt.NDArray[Any], ends: list[int], **how: object) -> Path:
    """Write features that lie in one file a shard, each with rows before and after that are not mapped."""
    layout = h5py.VirtualLayout(features.shape, features.dtype)
    begins = [0, *ends]
    for i, (begin, end) in enumerate(zip(begins, [*ends, len(features)], strict=True)):
        around = np.full((2, features.shape[1]), 7, features.dtype)
        with h5py.File(folder / f"shard-{i}.h5", "w") as h5:
            h5.create_dataset("vectors", data=np.concatenate([around, features[begin:end], around]), **how)
        source = h5py.VirtualSource(f"shard-{i}.h5", "vectors", (end - begin + 4, features.shape[1]))
        layout[begin:end] = source[2 : end - begin + 2]
    with h5py.File(folder / "all.h5", "w") as h5:
        h5.create_virtual_dataset("features", layout)
        add_pictures(h5, len(features))
    return folder / "all.h5"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_rows_of_any_file(data: st.DataObject) -> None:
    """Plain indexing is the reference."""
    rows, width = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([1, 3, 16]))
    features = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float16)
    how = data.draw(st.sampled_from([{}, {"chunks": (1, width)}, {"compression": "gzip"}]))
    asked = np.array(data.draw(st.lists(st.integers(-1, rows - 1), max_size=80)), np.int64)
    into = data.draw(st.sampled_from([None, np.float32, np.float16]))
    sizes = {"GAP": data.draw(st.sampled_from([0, 8, 1 << 15])), "BLOCK": data.draw(st.sampled_from([1, 64, 1 << 19]))}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(module, name, value)
        path = Path(folder, "f.h5")
        if data.draw(st.booleans()):
            write_rows(path, features, **how)
        else:
            ends = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))
            path = write_shards(Path(folder), features, ends, **how)
        store = FeatureStore(path)
        wanted = np.concatenate([features, np.zeros((1, width), np.float16)])[asked]
        for _ in range(2):
            out = None if into is None else np.full((len(asked), width), 9, into)
            found = store.read(asked, out)
            assert out is None or found is out
            assert found.dtype == (into or np.float32)
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(store.load(), features)


def test_wide_rows_through_torch_and_through_numpy(tmp_path: Path) -> None:
    """All float16 numbers, small ones and infinite ones too, in rows of which a block holds few."""
    features = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(16, 4096)
    features = np.concatenate([features] * 12)
    write_rows(tmp_path / "f.h5", features)
    asked = np.random.default_rng(0).integers(-1, len(features), 500)
    found = FeatureStore(tmp_path / "f.h5").read(asked)
    wanted = np.concatenate([features, np.zeros((1, 4096), np.float16)])[asked].astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    np.save(tmp_path / "wanted.npy", wanted)
    code = f"""if True:
        import sys, pathlib, numpy as np
        from ctrkit.features import FeatureStore
        asked = np.random.default_rng(0).integers(-1, {len(features)}, 500)
        found = FeatureStore(pathlib.Path({str(tmp_path / "f.h5")!r})).read(asked)
        assert "torch" not in sys.modules
        np.testing.assert_array_equal(found, np.load({str(tmp_path / "wanted.npy")!r}))"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_share_a_store(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float16)
    path = write_shards(tmp_path, features, [400, 1500], chunks=(16, 64))
    write_rows(tmp_path / "f.h5", features)
    for store in (FeatureStore(path), FeatureStore(tmp_path / "f.h5")):
        wrong = []

        def work(seed: int, store: FeatureStore = store, wrong: list[int] = wrong) -> None:
            random = np.random.default_rng(seed)
            for _ in range(20):
                asked = random.integers(0, 2000, 300)
                store.prefetch(random.integers(-1, 2000, 50))
                if not np.array_equal(store.read(asked), features[asked].astype(np.float32)):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_rows_that_are_close_are_read_together() -> None:
    width = module.GAP // 4
    rows = np.array([0, 1, 2, 7, 13, 13 + 4, 100])
    assert list(module.runs(rows, width)) == [(0, 8), (13, 18), (100, 101)]
    assert list(module.runs(rows[:0], width)) == []
    assert list(module.runs(rows, module.GAP * 2)) == [(0, 3), (7, 8), (13, 14), (17, 18), (100, 101)]


def test_what_is_not_in_memory_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.zeros((100, 64), np.float16)
    write_rows(tmp_path / "f.h5", features)
    asked: list[list[int]] = []
    monkeypatch.setattr(module._Piece, "advise", lambda piece, rows: asked.append(rows.tolist()))
    store = FeatureStore(tmp_path / "f.h5")
    store.prefetch(np.array([40, 3, -1, 12, 40]))
    store.read(np.array([3, 12, 50]))
    store.read(np.array([3, 12, 50]))
    assert asked == [[3, 12, 40], [50]]
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1)  # a machine with less memory than the file is large
    asked.clear()
    store = FeatureStore(tmp_path / "f.h5")
    for _ in range(2):
        store.read(np.array([12, 12]))
    assert asked == [[12], [12]]


def test_out_must_fit(tmp_path: Path) -> None:
    write_rows(tmp_path / "f.h5", np.zeros((5, 4), np.float16))
    with pytest.raises(ValueError, match=r"out is \[2, 4\], and 3 rows of 4 are asked for"):
        FeatureStore(tmp_path / "f.h5").read(np.array([0, 1, 2]), np.empty((2, 4), np.float32))


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    """HDF5 itself gives zeros for what is not there."""
    features = np.ones((20, 4), np.float16)
    path = write_shards(tmp_path, features, [5, 12])
    shard = tmp_path / "shard-1.h5"

    def fault() -> str:
        with pytest.raises(UserError) as e:
            FeatureStore(path).read(np.array([7]))
        return str(e.value)

    for name, data, said in [
        ("other", np.ones((11, 4), np.float16), "shard-1.h5, which has no data set 'vectors'"),
        ("vectors", np.ones((8, 4), np.float16), "shard-1.h5 has other rows"),
        ("vectors", np.ones((11, 3), np.float16), "vectors of different width or type"),
        ("vectors", np.ones((11, 4), np.float32), "vectors of different width or type"),
    ]:
        shard.unlink()
        with h5py.File(shard, "w") as h5:
            h5[name] = data
        assert said in fault()
    half = shard.read_bytes()[:-8]
    shard.unlink()
    shard.write_bytes(half)
    assert "shard-1.h5 is not an HDF5 file, or is damaged" in fault()
    shard.unlink()
    assert "shard-1.h5, which is not there; keep the files that lie beside all.h5 as they were" in fault()
    for rows in (slice(6, 20), slice(4, 18), slice(0, 20)):
        for name in ("all.h5", "shard-3.h5"):
            (tmp_path / name).unlink(missing_ok=True)
        with h5py.File(tmp_path / "all.h5", "w") as h5:
            n = rows.stop - rows.start
            again = h5py.VirtualLayout((20, 4), np.float16)
            again[:5] = h5py.VirtualSource("shard-0.h5", "vectors", (9, 4))[2:7]
            again[rows] = h5py.VirtualSource("shard-3.h5", "vectors", (n, 4))
            h5.create_virtual_dataset("features", again)
            add_pictures(h5, 20)
        with h5py.File(tmp_path / "shard-3.h5", "w") as h5:
            h5["vectors"] = np.ones((n, 4), np.float16)
        assert "not every row has one file that holds it" in fault()
    path.unlink()
    with h5py.File(path, "w") as h5:
        odd = h5py.VirtualLayout((20, 4), np.float16)
        odd[::2] = h5py.VirtualSource("shard-3.h5", "vectors", (10, 4))
        h5.create_virtual_dataset("features", odd)
        add_pictures(h5, 20)
    assert "not mapped whole and in order" in fault()


def test_file_without_a_single_row(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as h5:
        h5.create_dataset("features", (0, 8), dtype=np.float16)
        h5.create_dataset("image", data=np.array(["a"], dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=np.array([-1]))
    store = FeatureStore(tmp_path / "f.h5", shuffle_seed=1)
    assert store.load().shape == (0, 8)
    assert store.read(store.row_of(["a", "b"])).tolist() == np.zeros((2, 8)).tolist()


def test_shuffled_gives_every_picture_anothers_row_for_good(tmp_path: Path) -> None:
    images = [f"p{n}" for n in range(50)]
    row = np.where(np.arange(50) % 7 == 3, -1, np.arange(50))
    with h5py.File(tmp_path / "f.h5", "w") as h5:
        h5.create_dataset("features", data=np.eye(50, dtype=np.float16))
        h5.create_dataset("image", data=np.array(images, dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=row)
    plain = FeatureStore(tmp_path / "f.h5").row_of(images)
    shuffled = FeatureStore(tmp_path / "f.h5", shuffle_seed=1).row_of(images)
    assert plain.tolist() == row.tolist()
    assert sorted(shuffled) == sorted(row)
    assert ((row < 0) == (shuffled < 0)).all()
    assert (shuffled != row)[row >= 0].all()
    assert shuffled.tolist() == FeatureStore(tmp_path / "f.h5", shuffle_seed=1).row_of(images).tolist()
    assert shuffled.tolist() != FeatureStore(tmp_path / "f.h5", shuffle_seed=2).row_of(images).tolist()


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        _ = FeatureStore(tmp_path / "none.h5").rows
    with pytest.raises(UserError, match=r"is a folder, not the file features\.h5"):
        _ = FeatureStore(tmp_path).rows
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(UserError, match="not an HDF5 file"):
        _ = FeatureStore(tmp_path / "text.h5").rows
    write(tmp_path / "whole.h5")
    (tmp_path / "half.h5").write_bytes((tmp_path / "whole.h5").read_bytes()[:-400])
    with pytest.raises(UserError, match="damaged"):
        _ = FeatureStore(tmp_path / "half.h5").rows
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5.create_dataset("features", data=np.zeros((1, 1)))
    with pytest.raises(UserError, match="no data set image, row"):
        _ = FeatureStore(tmp_path / "other.h5").rows


def test_the_benchmark(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    sizes = ["--rows", "300", "--width", "64", "--batch", "100", "--batches", "2", "--repeats", "1"]
    command = [sys.executable, root / "benchmarks" / "feature_reads.py", *sizes, "--data", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["name"], found["unit"], found["width"]) == ("feature-reads", "rows/s", 64)
    assert found["ratio"] == pytest.approx(found["ours"] / found["reference"], abs=0.001)
    assert found["ours"] == found["warm_rows_per_second"]["read"]
    (tmp_path / "Makefile").write_text(f"READY :=\ninclude {root}/benchmarks/bench.mk\n")
    words = ["make", "--dry-run", "bench-feature-reads", "N=7", "BENCH=--width 2"]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == ".venv/bin/python benchmarks/feature_reads.py --rows 7 --width 2"
