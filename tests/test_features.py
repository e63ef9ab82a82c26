"""FeatureStore: the rows that were asked for, in any layout of the file, and the shuffled control."""

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

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
