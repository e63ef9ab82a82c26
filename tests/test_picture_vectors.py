"""Picture vectors by vocabulary index: centring, missing pictures, the big-file path, the control."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrkit import picture_vectors
from ctrkit.errors import UserError
from ctrkit.picture_vectors import PictureVectors
from tests.small_groups import write_features, write_image_vocabulary

# Vocabulary: p0 … p7 are the indexes 2 … 9. p1 and p6 share a row; p3 has none; p7 is in no file; training never
# shows p5.
IMAGES = [f"p{i}" for i in range(8)]
COUNTS = [5, 3, 2, 9, 1, 0, 4, 2]
IN_FILE = ["p6", "p5", "p4", "p3", "p2", "p1", "p0", "stranger"]
ROW = [1, 0, 3, -1, 2, 1, 4, 5]
BY_IMAGE = dict(zip(IN_FILE, ROW, strict=True))
VECTORS = (np.random.default_rng(0).normal(size=(6, 4)) * [1, 2, 3, 4] + 10).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_features(tmp_path / "features.h5", IN_FILE, ROW, VECTORS)
    write_image_vocabulary(tmp_path / "convert", IMAGES, COUNTS)
    return tmp_path


def opened(folder: Path, **how: Any) -> PictureVectors:
    return PictureVectors(folder / "features.h5", folder / "convert", **how)


def rows_of(vectors: PictureVectors, index: list[int]) -> np.ndarray:
    x_NW, position = vectors.gather(np.array(index, np.int64))
    return x_NW.numpy()[position.numpy()]


def test_mean_and_scale_are_of_the_distinct_training_pictures(folder: Path) -> None:
    vectors = opened(folder)
    assert (vectors.width, vectors.missing) == (4, 2)
    vectors.fit()
    training = VECTORS[[1, 2, 3, 4]].astype(np.float64)  # p1 and p6 once, p3 and p7 without a vector, p5 untrained
    mean = training.mean(0)
    np.testing.assert_allclose(vectors.mean_W, mean, rtol=1e-6)
    norm = np.sqrt(((training - mean) ** 2).sum(1).mean())
    np.testing.assert_allclose(vectors.scale, picture_vectors.NORM / norm, rtol=1e-6)
    found = rows_of(vectors, [2, 3, 4, 6, 8])
    np.testing.assert_allclose(found, (VECTORS[[4, 1, 2, 3, 1]] - mean) * float(vectors.scale), rtol=1e-5, atol=1e-5)
    distinct = rows_of(vectors, [2, 3, 4, 6])
    np.testing.assert_allclose(distinct.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.sqrt((distinct**2).sum(1).mean()), picture_vectors.NORM, rtol=1e-5)


def test_missing_is_zero_after_centring(folder: Path) -> None:
    vectors = opened(folder)
    vectors.fit()
    # Missing, unknown, unreadable (p3), not in the file (p7), beyond the vocabulary.
    assert not rows_of(vectors, [0, 1, 5, 9, 10, 4_000_000]).any()
    assert rows_of(vectors, [0, 2, 0])[1].any()


@pytest.mark.parametrize("host_bytes", [0, 16, 1 << 20])
@pytest.mark.parametrize("shuffle", [False, True])
def test_has_picture_is_one_more_number(host_bytes: int, shuffle: bool, folder: Path) -> None:
    """1 for a picture that has a vector, be it the mean itself; 0 for any other; the vectors as without it."""
    plain = opened(folder, shuffle=shuffle, host_bytes=host_bytes)
    flagged = opened(folder, shuffle=shuffle, host_bytes=host_bytes, has_picture=True)
    for vectors in (plain, flagged):
        vectors.fit()
    assert (plain.width, flagged.width, flagged.store.width) == (4, 5, 4)
    assert torch.equal(plain.mean_W, flagged.mean_W)
    assert torch.equal(plain.scale, flagged.scale)
    # Missing, unknown, unreadable (p3), not in the file (p7), beyond the vocabulary; and in between p0 … p6.
    index = [0, 2, 1, 3, 5, 4, 9, 6, 10, 7, 4_000_000, 8]
    found = rows_of(flagged, index)
    assert found[:, 4].tolist() == [0, 1] * 6
    np.testing.assert_array_equal(found[:, :4], rows_of(plain, index))
    assert rows_of(flagged, [0, 5]).tolist() == [[0] * 5] * 2
    assert rows_of(flagged, [2, 7])[:, 4].all()  # no row of zeros among those asked for
    assert flagged.gather(np.array([], np.int64))[0].shape == (0, 5)


def test_a_picture_at_the_mean_is_told_from_none(tmp_path: Path) -> None:
    write_features(tmp_path / "features.h5", ["a"], [0], np.full((1, 3), 7.0))
    write_image_vocabulary(tmp_path / "convert", ["a", "b"], [1, 1])
    vectors = opened(tmp_path, has_picture=True)
    vectors.fit()
    assert rows_of(vectors, [2, 3]).tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_names_are_of_indexes(folder: Path) -> None:
    vectors = opened(folder)
    assert vectors.names(np.array([2, 9, 0, 1, 2, 77], np.uint32)).to_list() == ["p0", "p7", "", "", "p0", ""]
    assert vectors.names(np.array([], np.int64)).to_list() == []


def test_each_picture_once(folder: Path) -> None:
    vectors = opened(folder)
    x_NW, position = vectors.gather(np.array([3, 8, 3, 2, 5, 0, 9]))
    assert x_NW.shape == (3, 4)
    assert x_NW.dtype == torch.float32
    assert position.dtype == torch.int64
    assert len(set(position[[0, 1, 2]].tolist())) == 1
    none, nowhere = vectors.gather(np.array([], np.int64))
    assert (none.shape, nowhere.shape) == ((0, 4), (0,))


def test_a_file_too_big_for_memory(folder: Path) -> None:
    inside, outside, partly = (opened(folder, host_bytes=size) for size in (1 << 20, 0, 2 * 4 * 2))
    for vectors in (inside, outside, partly):
        vectors.fit()
    assert torch.equal(inside.mean_W, outside.mean_W)
    assert torch.equal(inside.scale, outside.scale)
    index = np.random.default_rng(1).integers(0, 12, 40)
    for one, other, third in zip(inside.gather(index), outside.gather(index), partly.gather(index), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    assert outside.gather(np.array([], np.int64))[0].shape == (0, 4)
    assert [vectors.cache.uses().levels["host"].rows_held for vectors in (inside, outside, partly)] == [6, 0, 2]


def test_each_process_fits_a_share_and_their_sums_are_the_whole(folder: Path) -> None:
    whole = opened(folder)
    whole.fit()
    sums: list[np.ndarray] = []
    for first in range(3):
        opened(folder).fit(None, (first, 3), lambda own: sums.append(own) or own)  # type: ignore[func-returns-value]
    last = opened(folder)
    last.fit(None, (2, 3), lambda own: np.sum(sums, 0))
    np.testing.assert_allclose(last.mean_W, whole.mean_W, rtol=1e-6)
    np.testing.assert_allclose(last.scale, whole.scale, rtol=1e-6)
    assert not np.allclose(sums[0], sums[1])


def test_the_control_gives_each_picture_anothers_vector_everywhere(folder: Path) -> None:
    vectors, shuffled = opened(folder), opened(folder, shuffle=True)
    index = [i + 2 for i, name in enumerate(IMAGES) if BY_IMAGE.get(name, -1) >= 0]
    before, after = rows_of(vectors, index), rows_of(shuffled, index)
    assert (before != after).any(1).sum() >= len(index) - 1  # p1 and p6 may have swapped their one vector
    # One permutation, whoever asks: an ad's picture and the same picture in a history keep together, run after run.
    again = opened(folder, shuffle=True)
    for order in ([*reversed(index)], index * 2):
        expected = [after[index.index(i)] for i in order]
        np.testing.assert_array_equal(rows_of(again, order), expected)
    assert not rows_of(shuffled, [0, 1, 5, 9]).any()
    everything = {tuple(v) for v in VECTORS.astype(np.float32).tolist()}
    assert {tuple(v) for v in after.tolist()} <= everything


def test_equal_pictures_are_not_blown_up(tmp_path: Path) -> None:
    write_features(tmp_path / "features.h5", ["a", "b"], [0, 1], np.full((2, 3), 7.0))
    write_image_vocabulary(tmp_path / "convert", ["a", "b"], [1, 1])
    vectors = opened(tmp_path)
    vectors.fit()
    assert float(vectors.scale) == 1.0
    assert not rows_of(vectors, [2, 3]).any()


def test_features_of_other_data(tmp_path: Path) -> None:
    write_features(tmp_path / "features.h5", ["x"], [0], np.ones((1, 3)))
    write_image_vocabulary(tmp_path / "convert", ["a"], [1])
    with pytest.raises(UserError, match=r"no vector for any picture of .* was it extracted for other data"):
        opened(tmp_path)


def test_no_training_picture(tmp_path: Path) -> None:
    write_features(tmp_path / "features.h5", ["a"], [0], np.ones((1, 3)))
    write_image_vocabulary(tmp_path / "convert", ["a"], [0])
    with pytest.raises(UserError, match="no training sample refers to a picture that has a vector"):
        opened(tmp_path).fit()
