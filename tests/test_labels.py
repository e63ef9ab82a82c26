"""Which click belongs to which impression, against loops."""

import numpy as np
import pytest

from ctrkit.labels import nearest_impression, repeated
from ctrkit.spool import Ints

Columns = tuple[Ints, Ints, Ints]


def random_columns(seed: int, n: int, moments: int) -> Columns:
    """Return user, ad, time of rows, of which many share one moment."""
    rng = np.random.default_rng(seed)
    user, ad, time = (rng.integers(0, k, n) for k in (4, 3, moments))
    return user.astype(np.uint32), ad.astype(np.uint16), time * 1000


def reference(shown: Columns, clicked: Columns, window: int) -> tuple[list[int], list[bool]]:
    rows = list(zip(*(c.tolist() for c in shown), strict=True))
    hits = []
    clicks = list(zip(*(c.tolist() for c in clicked), strict=True))
    for user, ad, time in clicks:
        near = [(t, row) for row, (u, a, t) in enumerate(rows) if (u, a) == (user, ad) and time - window <= t <= time]
        hits.append(max(near)[1] if near else -1)
    taken: set[int] = set()
    late = [False] * len(clicks)
    for i in sorted(range(len(clicks)), key=lambda i: (clicks[i][2], i)):
        late[i] = hits[i] in taken
        if hits[i] >= 0:
            taken.add(hits[i])
    return hits, late


@pytest.mark.parametrize("window", [0, 999, 1000, 5000, 10**9])
@pytest.mark.parametrize("moments", [3, 40, 400])
def test_the_latest_impression_within_the_window(window: int, moments: int) -> None:
    shown, clicked = random_columns(1, 300, moments), random_columns(2, 200, moments)
    hit, late = nearest_impression(shown, clicked, window)
    expected = reference(shown, clicked, window)
    assert (hit.tolist(), late.tolist()) == expected
    assert window == 0 or -1 in hit or moments == 3
    assert (hit >= 0).sum() > late.sum() > 0 or moments == 400


def test_both_ends_of_the_window_count() -> None:
    def hit(shown: int, clicked: int) -> int:
        rows = [(np.array([1]), np.array([1]), np.array([t])) for t in (shown, clicked)]
        return int(nearest_impression(rows[0], rows[1], 500)[0][0])

    assert [hit(1000, t) for t in (999, 1000, 1500, 1501)] == [-1, 0, 0, -1]


@pytest.mark.parametrize(("shown", "clicked"), [(0, 5), (5, 0), (0, 0)])
def test_no_impressions_or_no_clicks(shown: int, clicked: int) -> None:
    hit, late = nearest_impression(random_columns(1, shown, 9), random_columns(2, clicked, 9), 1000)
    assert hit.tolist() == [-1] * clicked
    assert late.tolist() == [False] * clicked


def test_repeated_rows() -> None:
    user, ad, time = random_columns(3, 400, 30)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for row in zip(user.tolist(), ad.tolist(), time.tolist(), strict=True):
        expected.append(row in seen)
        seen.add(row)
    assert repeated(user, ad, time).tolist() == expected
    assert 0 < sum(expected) < 400
    assert repeated(user[:0], ad[:0], time[:0]).tolist() == []
