"""GAUC and AUC against nested loops over all pairs, and each user's against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ctrkit.gauc import GAUC, auc, gauc, user_auc, user_codes


def pairs_auc(label, score):
    """Win 1, tie one half, over all (clicked, unclicked) pairs; None without a pair."""
    wins = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for y, s in zip(label, score, strict=True)
        if y
        for z, t in zip(label, score, strict=True)
        if not z
    ]
    return sum(wins) / len(wins) if wins else None


def loop_gauc(user, label, score, weight):
    above, below, kept, dropped, covered = 0.0, 0.0, 0, 0, 0
    for u in sorted(set(user)):
        rows = [i for i, v in enumerate(user) if v == u]
        one = pairs_auc([label[i] for i in rows], [score[i] for i in rows])
        if one is None:
            dropped += 1
            continue
        w = {"impressions": len(rows), "clicks": sum(bool(label[i]) for i in rows), "users": 1}[weight]
        above, below, kept, covered = above + w * one, below + w, kept + 1, covered + len(rows)
    return (above / below if kept else None), kept, dropped, covered


@pytest.mark.parametrize("weight", ["impressions", "clicks", "users"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_equals_nested_loops_with_heavy_ties_and_single_class_users(weight, dtype):
    rng = np.random.default_rng(5)
    values = np.array([-2.5, -0.0, 0.0, 1 / 3, 0.5, 0.5 + 2**-10, 7.0], dtype)
    for _ in range(60):
        n = int(rng.integers(1, 50))
        user = rng.integers(0, 9, n)
        label = rng.random(n) < rng.choice([0.05, 0.5])
        score = rng.choice(values, n)
        got = gauc(user, label, score, weight)
        value, kept, dropped, covered = loop_gauc(user.tolist(), label.tolist(), score.tolist(), weight)
        assert (got.users_kept, got.users_dropped, got.impressions_covered) == (kept, dropped, covered)
        assert got.impressions == n
        assert got.value == (None if value is None else pytest.approx(value, abs=1e-14))
        everyone = pairs_auc(label.tolist(), score.tolist())
        assert auc(label, score) == (None if everyone is None else pytest.approx(everyone, abs=1e-14))


def test_known_value():
    # a: 0.9 > 0.1 and 0.9 > 0.5: AUC 1, 3 impressions. b: one tie of one pair: 0.5, 2 impressions. c: no click.
    user = ["a", "a", "a", "b", "b", "c"]
    got = gauc(user, [1, 0, 0, 1, 0, 0], [0.9, 0.1, 0.5, 0.4, 0.4, 0.8])
    assert got == GAUC(
        value=(3 * 1.0 + 2 * 0.5) / 5,
        weight="impressions",
        users_kept=2,
        users_dropped=1,
        impressions=6,
        impressions_covered=5,
    )
    assert gauc(user, [1, 0, 0, 1, 0, 0], [0.9, 0.1, 0.5, 0.4, 0.4, 0.8], "clicks").value == 0.75


def test_users_may_be_text_or_any_integers_and_rows_in_any_order():
    rng = np.random.default_rng(1)
    user = rng.integers(-4, 4, 200)
    label, score = rng.integers(0, 2, 200), rng.random(200)
    expected = gauc(user, label, score)
    assert gauc(np.array([f"u{u}" for u in user]), label, score) == expected
    assert gauc(user.astype(object).astype(str), label, score) == expected
    assert gauc(user * 2**40, label, score) == expected
    order = rng.permutation(200)
    assert gauc(user[order], label[order], score[order]) == expected


def test_minus_zero_ties_with_zero():
    for dtype in (np.float32, np.float64):
        assert auc([1, 0], np.array([-0.0, 0.0], dtype)) == 0.5
        assert auc([1, 0], np.array([0.0, -0.0], dtype)) == 0.5


def test_neighbouring_floats_do_not_tie():
    for dtype in (np.float32, np.float64):
        for value in (1e-30, 0.5, -0.5):
            x = dtype(value)
            assert auc([1, 0], np.array([np.nextafter(x, dtype(9)), x], dtype)) == 1.0
    tiny = np.array([2**-149, 0.0], np.float32)
    assert auc([1, 0], tiny) == 1.0


def test_codes_too_large_to_pack_with_float_patterns_still_work():
    user = np.array([2**40, 2**40, 2**40 + 1, 2**40 + 1])
    made = user_auc(user, [1, 0, 1, 0], np.array([0.3, 0.2, 0.1, 0.2], np.float32))
    assert made.user.tolist() == [2**40, 2**40 + 1]
    assert made.auc.tolist() == [1.0, 0.0]


def test_a_score_that_knows_nothing_has_gauc_one_half():
    rng = np.random.default_rng(2)
    user, label = rng.integers(0, 500, 20_000), rng.random(20_000) < 0.3
    assert gauc(user, label, np.zeros(20_000)).value == 0.5
    assert gauc(user, label, rng.random(20_000)).value == pytest.approx(0.5, abs=0.02)


def test_knowing_only_the_user_raises_auc_but_not_gauc():
    rng = np.random.default_rng(3)
    user = rng.integers(0, 200, 20_000)
    rate = rng.random(200)
    label = rng.random(20_000) < rate[user]
    assert auc(label, rate[user]) > 0.8
    assert gauc(user, label, rate[user]).value == 0.5


@pytest.mark.parametrize(
    ("user", "label", "score", "fault"),
    [
        ([1, 1], [1, 2], [0.1, 0.2], "labels"),
        ([1, 1], [1, 0.5], [0.1, 0.2], "labels"),
        ([1, 1], [1, 0], [0.1, float("nan")], "finite"),
        ([1, 1], [1, 0], [0.1, float("inf")], "finite"),
        ([1, 1], [1, 0], [0.1], "shape"),
        ([1], [1, 0], [0.1, 0.2], "shape"),
    ],
)
def test_bad_arrays_raise(user, label, score, fault):
    with pytest.raises(ValueError, match=fault):
        gauc(user, label, score)


def test_unknown_weight_raises():
    with pytest.raises(ValueError, match="weight"):
        gauc([1], [1], [0.5], "rows")


def test_no_rows():
    assert gauc([], [], []).value is None


SPECIAL = [0.0, -0.0, 2**-149, -(2**-149), 2**-126 - 2**-149, 2**-126, 0.5, 0.5 + 2**-24, 1 / 3, 1.0, -1.0, 3e38, -3e38]
SPECIAL_64 = [*SPECIAL, 2**-1074, -(2**-1074), 2**-1022, 0.5 + 2**-53, 1e308, -1e308]
USERS = {
    "integers": st.sampled_from([0, 1, 2, 3, 5]),
    "any integers": st.sampled_from([-(2**63), -7, 0, 2**31, 2**63 - 1]),
    "text": st.sampled_from([" b", "a", "b", "\N{SNOWMAN}", "a "]),
    "one": st.just(4),
}


@st.composite
def impressions(draw, dtype, users):
    scores = st.sampled_from(SPECIAL_64 if dtype is np.float64 else SPECIAL)
    scores |= st.floats(width=64 if dtype is np.float64 else 32, allow_nan=False, allow_infinity=False)
    rows = draw(st.lists(st.tuples(USERS[users], st.booleans(), scores), min_size=1, max_size=40))
    user, label, score = zip(*rows, strict=True)
    return np.array(user), np.array(label), np.array(score, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("users", USERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_user_has_the_auc_of_scikit_learn(users, dtype, data):
    user, label, score = data.draw(impressions(dtype, users))
    codes = user_codes(user)
    made = user_auc(codes, label, score)
    assert made.user.tolist() == sorted(set(codes.tolist()))
    assert len(set(codes.tolist())) == len(set(user.tolist()))
    aucs, weights = [], []
    for one, n, clicks, value in zip(made.user, made.impressions, made.clicks, made.auc, strict=True):
        rows = codes == one
        assert len(set(user[rows].tolist())) == 1
        assert (n, clicks) == (rows.sum(), label[rows].sum())
        if 0 < clicks < n:
            # As ranks, since scikit-learn tells scores apart by differences, which overflow and vanish.
            ranks = np.unique(score[rows], return_inverse=True)[1]
            expected = roc_auc_score(label[rows], ranks)
            assert value == pytest.approx(expected, abs=1e-12)
            aucs.append(expected)
            weights.append(n)
        else:
            assert np.isnan(value)
    found = gauc(user, label, score)
    assert (found.users_kept, found.users_dropped) == (len(aucs), len(made.user) - len(aucs))
    if aucs:
        assert found.value == pytest.approx(np.average(aucs, weights=weights), abs=1e-12)
    else:
        assert found.value is None


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int8, np.bool_, np.longdouble])
def test_scores_of_other_types_are_compared_exactly(dtype):
    if dtype is np.bool_:
        low, high = False, True
    elif dtype is np.longdouble:
        low, high = np.longdouble(1), np.nextafter(np.longdouble(1), np.longdouble(2))
    else:
        high = np.iinfo(dtype).max
        low = high - 1
    score = np.array([high, low, low], dtype)
    assert auc([1, 0, 0], score) == 1.0
    assert auc([0, 1, 0], score) == 0.25


@pytest.mark.parametrize("user", [["a", None], [1.0, float("nan")], [float("inf"), 1.0]])
def test_users_without_a_value_raise(user):
    with pytest.raises(ValueError, match="users without a value"):
        gauc(np.array(user, object if user[0] == "a" else float), [1, 0], [0.1, 0.2])


@pytest.mark.parametrize("user", [["a", ""], ["a", "  "], np.array(["a", "\t"], object)])
def test_blank_users_raise(user):
    with pytest.raises(ValueError, match="users without a value"):
        gauc(user, [1, 0], [0.1, 0.2])


@pytest.mark.parametrize("bad", [None, "text", [None, None], ["x", "y"], [object(), object()], [{}, []]])
@pytest.mark.parametrize("place", ["label", "score"])
def test_what_is_no_array_of_numbers_raises(place, bad):
    arrays = {"user": [1, 1], "label": [1, 0], "score": [0.1, 0.2]} | {place: bad}
    with pytest.raises(ValueError, match=r"shape|are numbers"):
        gauc(**arrays)


@pytest.mark.parametrize("bad", [None, "text", [1, None], ["a", 1, None], [object(), object()]])
def test_users_that_are_no_users_raise(bad):
    with pytest.raises(ValueError, match="users"):
        gauc(np.array(bad, object), [1, 0, 1][: np.size(bad)], [0.1, 0.2, 0.3][: np.size(bad)])


def test_users_of_nan_among_objects_raise():
    with pytest.raises(ValueError, match="users without a value"):
        gauc(np.array([1, float("nan")], object), [1, 0], [0.1, 0.2])
