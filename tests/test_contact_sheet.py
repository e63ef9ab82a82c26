"""The contact sheet: nearest by cosine of centred vectors, against brute force; what is shown once or not at all."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ctrkit import contact_sheet
from ctrkit.contact_sheet import Centred, ContactSheet, make_sheet, most_used
from ctrkit.gallery import Thumbnails
from ctrkit.picture_vectors import PictureVectors
from ctrkit.recipe import ExtractImages
from tests.small_groups import write_features, write_image_vocabulary

Array = npt.NDArray[np.floating[Any]]
N = 30
IMAGES = [f"p{n}" for n in range(N)]
COUNTS = [3 * (N - 6 - n) if n < N - 6 else 0 for n in range(N)]  # the last six are of test days alone
VECTORS = np.random.default_rng(4).normal(size=(N, 5)).astype(np.float16) + np.float16(3)


def world(
    folder: Path,
    vectors: Array = VECTORS,
    *,
    images: Sequence[str] = IMAGES,
    counts: Sequence[int] = COUNTS,
    row: Sequence[int] | None = None,
    unreadable: Sequence[str] = (),
) -> Path:
    """Write features, vocabulary and pictures, one of each unless `row` says otherwise."""
    (folder / "pictures").mkdir(parents=True)
    write_features(folder / "features.h5", images, row or range(len(images)), vectors)
    write_image_vocabulary(folder / "convert", images, counts)
    for n, image in enumerate(images):
        if image not in unreadable:
            Image.new("RGB", (40, 40), (n % 256, 10, 200)).save(folder / "pictures" / f"{image}.png")
    return folder


def sheet(folder: Path, queries: int = 4, neighbours: int = 6, seed: int = 0) -> ContactSheet:
    thumbnails = Thumbnails(folder / "pictures", ExtractImages(template="{image}.png", size=32))
    where = folder / "features.h5", folder / "convert"
    return make_sheet(*where, thumbnails, queries=queries, neighbours=neighbours, seed=seed)


def cosines(vectors: Array, counts: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return [N, N], one pair at a time."""
    x = vectors.astype(np.float64) - vectors[np.array(counts) > 0].astype(np.float64).mean(0)
    return np.array([[(a @ b) / np.sqrt((a @ a) * (b @ b)) for b in x] for a in x])


def test_neighbours_are_the_nearest(tmp_path: Path) -> None:
    made = sheet(world(tmp_path), queries=N)
    assert (made.searched, made.rows) == (N, N)
    assert sorted(q.image for q in made.queries) == sorted(IMAGES[: N - 6])  # all that training shows, and no other
    cosine = cosines(VECTORS, COUNTS)
    for query in made.queries:
        own = IMAGES.index(query.image)
        assert query.count == COUNTS[own]
        order = [n for n in np.argsort(-cosine[own]) if n != own][:6]
        assert [n.image for n in query.neighbours] == [IMAGES[n] for n in order]
        assert [n.similarity for n in query.neighbours] == pytest.approx(cosine[own][order])
    assert {n.image for q in made.queries for n in q.neighbours} & set(IMAGES[N - 6 :])


def test_the_mean_is_that_of_models(tmp_path: Path) -> None:
    """Which is of the rows that training shows, each once."""
    row = [*range(N - 2), 0, -1]
    world(tmp_path, VECTORS[: N - 2], counts=[*COUNTS[:-2], 1, 9], row=row)
    models = PictureVectors(tmp_path / "features.h5", tmp_path / "convert")
    models.fit()
    searched = most_used(tmp_path / "features.h5", tmp_path / "convert", N)
    ours = Centred(models.store, searched["row"].to_numpy(), searched["count"].to_numpy() > 0)
    np.testing.assert_allclose(ours.mean_W, models.mean_W, rtol=1e-6)
    assert searched.height == N - 2


def test_the_common_part_does_not_count(tmp_path: Path) -> None:
    """Without centring every cosine would be near 1, and the nearest another one."""
    vectors = np.array([[1, 0], [1, 0.2], [-1, 0], [-1, -0.2], [0, 1], [0, -1]]) + 20
    made = sheet(world(tmp_path, vectors, images=IMAGES[:6], counts=[1] * 6), queries=6)
    found = {q.image: (q.neighbours[0].image, q.neighbours[-1].image) for q in made.queries}
    assert found["p0"] == ("p1", "p2")
    assert found["p3"][0] == "p2"
    assert all(q.neighbours[-1].similarity < -0.9 for q in made.queries)


def test_queries_are_drawn_by_use_and_seed(tmp_path: Path) -> None:
    counts = [60, 30, 10, 0, 0]
    world(tmp_path, VECTORS[:5], images=IMAGES[:5], counts=counts)
    firsts = [sheet(tmp_path, queries=1, neighbours=1, seed=seed).queries[0].image for seed in range(100)]
    shares = [firsts.count(f"p{n}") / 100 for n in range(5)]
    assert shares == pytest.approx([0.6, 0.3, 0.1, 0, 0], abs=0.1)
    assert sheet(tmp_path, 3).queries == sheet(tmp_path, 3).queries
    assert len({tuple(q.image for q in sheet(tmp_path, 3, seed=seed).queries) for seed in range(9)}) > 1
    assert len(sheet(tmp_path, 9).queries) == 3


def test_copies_are_shown_once(tmp_path: Path) -> None:
    """p1 … p3 are p0 saved anew, p5 is p4: in no row twice, and no two of them queries."""
    vectors = np.random.default_rng(0).normal(size=(20, 64)) * 10
    for copy, original in ((1, 0), (2, 0), (3, 0), (5, 4)):
        vectors[copy] = vectors[original] + np.random.default_rng(copy).normal(size=64) * 0.01
    vectors[6] = vectors[0] + np.random.default_rng(9).normal(size=64)  # like p0, but not the same
    made = sheet(world(tmp_path, vectors, images=IMAGES[:20], counts=[1] * 20), queries=20, neighbours=19)
    same = [{f"p{n}" for n in range(4)}, {"p4", "p5"}]
    for query in made.queries:
        shown = [query.image, *(n.image for n in query.neighbours)]
        assert len(shown) == 16
        assert all(len(copies & set(shown)) == 1 for copies in same)
        if query.image in same[0]:
            assert query.neighbours[0].image == "p6"
            assert 0.98 < query.neighbours[0].similarity < 0.9999
    assert len(made.queries) == 16


def test_pictures_of_one_content_are_one(tmp_path: Path) -> None:
    """Three ids share a row: it is called by the most used, and counts as often as all of them."""
    images, counts = ["a", "b", "c", "d", "gone"], [4, 9, 2, 1, 7]
    world(tmp_path, VECTORS[:2], images=images, counts=counts, row=[0, 0, 0, 1, -1])
    assert most_used(tmp_path / "features.h5", tmp_path / "convert", 9).rows() == [(0, "b", 15), (1, "d", 1)]
    made = sheet(tmp_path)
    assert {(q.image, q.count, len(q.neighbours)) for q in made.queries} == {("b", 15, 1), ("d", 1, 1)}
    assert (made.searched, made.rows) == (2, 2)


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    world(tmp_path, unreadable=["p0", "p7", "p29"])
    (tmp_path / "pictures" / "p7.png").write_text("no picture")
    made = sheet(tmp_path, queries=N)
    whole = sheet(world(tmp_path / "whole"), queries=N, neighbours=N)
    gone = {"p0", "p7", "p29"}
    assert {q.image for q in made.queries} == {q.image for q in whole.queries} - gone
    for query in made.queries:
        [other] = [q for q in whole.queries if q.image == query.image]
        assert query.neighbours == tuple(n for n in other.neighbours if n.image not in gone)[:6]


def test_a_large_store_is_searched_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the most used pictures, wherever they lie in the file; of equal ones the first of the vocabulary."""
    order = np.random.default_rng(1).permutation(N)
    counts = [5, 1, 9, 1, 9, 1, 1, 4, *[0] * (N - 8)]
    world(tmp_path, VECTORS[np.argsort(order)], counts=counts, row=order.tolist())
    monkeypatch.setattr(contact_sheet, "SEARCHED", 6)
    made = sheet(tmp_path, queries=N)
    assert (made.searched, made.rows) == (6, N)
    assert sorted(q.image for q in made.queries) == ["p0", "p1", "p2", "p3", "p4", "p7"]
    part = [0, 1, 2, 3, 4, 7]
    cosine = cosines(VECTORS[part], [1] * 6)
    for query in made.queries:
        own = part.index(int(query.image[1:]))
        expected = [n for n in np.argsort(-cosine[own]) if n != own]
        assert [n.image for n in query.neighbours] == [f"p{part[n]}" for n in expected]


def test_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sheet(world(tmp_path), queries=N)
    monkeypatch.setattr(contact_sheet, "PART_BYTES", 100)
    monkeypatch.setattr(contact_sheet, "PART_IDS", 7)
    parts = sheet(tmp_path, queries=N)
    assert [q.image for q in parts.queries] == [q.image for q in whole.queries]
    for one, other in zip(parts.queries, whole.queries, strict=True):
        assert [n.image for n in one.neighbours] == [n.image for n in other.neighbours]
        assert [n.similarity for n in one.neighbours] == pytest.approx([n.similarity for n in other.neighbours])


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,000 vectors of 2,048 numbers are 64 MB in the form in which they are compared."""
    vectors = np.random.default_rng(0).standard_normal((4000, 2048), dtype=np.float32)
    images = [f"p{n}" for n in range(4000)]
    write_features(tmp_path / "features.h5", images, range(4000), vectors)
    write_image_vocabulary(tmp_path / "convert", images, [1] * 4000)
    monkeypatch.setattr(contact_sheet, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(Thumbnails, "_uri", lambda self, image: "data:")
    tracemalloc.start()
    try:
        made = sheet(tmp_path, queries=3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(q.neighbours) for q in made.queries] == [6, 6, 6]
    assert peak < 16e6


@pytest.mark.parametrize("value", [7.0, np.nan, np.inf])
def test_vectors_that_tell_nothing_give_an_empty_sheet(value: float, tmp_path: Path) -> None:
    """Pictures that are all alike have no direction from their mean; numbers that are none have no mean."""
    vectors = np.full((4, 3), 7.0)
    vectors[0] = value
    assert sheet(world(tmp_path, vectors, images=IMAGES[:4], counts=[1] * 4)).queries == []


def test_features_of_other_data_or_unseen_in_training_give_an_empty_sheet(tmp_path: Path) -> None:
    world(tmp_path, counts=[0] * N)
    assert sheet(tmp_path).queries == []
    write_image_vocabulary(tmp_path / "other" / "convert", ["x"], [1])
    thumbnails = Thumbnails(tmp_path / "pictures", ExtractImages())
    where = tmp_path / "features.h5", tmp_path / "other" / "convert"
    made = make_sheet(*where, thumbnails, queries=3, neighbours=3, seed=0)
    assert (made.queries, made.searched, made.rows) == ([], 0, N)
