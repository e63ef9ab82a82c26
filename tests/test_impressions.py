"""Impressions found by user, day and ad: in whichever rows of groups/ they lie."""

import datetime
from pathlib import Path

import numpy as np
import pytest

from ctrkit.errors import UserError
from ctrkit.impressions import Impression, find
from tests.small_groups import Group, random_groups, to_block, write_groups

DAY = datetime.date(2024, 3, 1)


@pytest.fixture
def groups() -> list[Group]:
    """Thirteen groups; those of user `many` are four rows of one group, over two row groups and two files."""
    made = random_groups(2, [2, 3, 1, 2, 1, 2, 3, 1, 2, 3, 2, 1, 2], [3, 0, 2, 1, 4, 2, 0, 1, 5, 2, 3, 1, 2])
    for group in made[8:12]:
        group.user, group.behaviours, group.group_id = {**made[8].user, "user": "many"}, made[8].behaviours, 58
    return made


def same(impression: Impression, group: Group, sample: int) -> None:
    """Assert that it is that sample of that group, with what the group shares."""
    [expected] = [to_block([Group(group.user, group.behaviours, [group.samples[sample]], group.group_id)])]
    for owner in ("group", "sample", "behaviour"):
        ours, theirs = getattr(impression.block, owner), getattr(expected, owner)
        assert ours.keys() == theirs.keys()
        for name, column in theirs.items():
            for part in ("values", "offsets") if hasattr(column, "values") else ("__array__",):
                a, b = (x if part == "__array__" else getattr(x, part) for x in (ours[name], column))
                np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(impression.block.behaviour_offsets, expected.behaviour_offsets)
    assert impression.sample_id == group.samples[sample]["sample_id"]
    assert impression.click == group.samples[sample]["click"]


def test_every_impression_is_found_with_its_features(groups: list[Group], tmp_path: Path) -> None:
    write_groups(tmp_path / "groups", {"valid": groups[:3], "test": groups[3:]}, part_groups=7)
    for n, group in enumerate(groups):
        if n in range(8, 12):
            continue
        for s in range(len(group.samples)):
            found = find(tmp_path / "groups", f"u{group.group_id}", DAY, f"a{s}")
            same(found, group, s)
            assert (found.split, found.repeats) == ("valid" if n < 3 else "test", 1)
    # Ads are numbered within a row, so that the four rows of one group show a0 four times, a1 three times and a2 once.
    for s, rows in ((0, [8, 9, 10, 11]), (1, [8, 9, 10]), (2, [9])):
        for number, n in enumerate(rows, start=1):
            found = find(tmp_path / "groups", "many", DAY, f"a{s}", number)
            same(found, groups[n], s)
            assert (found.number, found.repeats) == (number, len(rows))
    with pytest.raises(UserError, match="user 'many' saw ad 'a2' once on 2024-03-01, so there is no number 2"):
        find(tmp_path / "groups", "many", DAY, "a2", 2)


def test_an_ad_of_others_lends_its_features(groups: list[Group], tmp_path: Path) -> None:
    write_groups(tmp_path / "groups", {"test": groups})
    found = find(tmp_path / "groups", "u52", DAY, "a2")
    assert found.lender is not None
    lender = next(g for g in groups if len(g.samples) == 3)
    assert found.lender.sample_id == lender.samples[2]["sample_id"]
    [own] = groups[2].samples
    mixed = {name: (lender.samples[2] if name.startswith("ad_") else own)[name] for name in own}
    found_as = Group(groups[2].user, groups[2].behaviours, [mixed], groups[2].group_id)
    assert (found.sample_id, found.click, found.repeats) == (None, None, 0)
    block = to_block([found_as])
    for name, column in block.sample.items():
        for part in ("values", "offsets") if hasattr(column, "values") else ("__array__",):
            a, b = (x if part == "__array__" else getattr(x, part) for x in (found.block.sample[name], column))
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_who_and_what_is_not_there(groups: list[Group], tmp_path: Path) -> None:
    folder = write_groups(tmp_path / "groups", {"test": groups})
    for user, day, ad, told in (
        ("u5x", DAY, "a0", "has no user 'u5x'; did you mean"),
        ("u50", datetime.date(2024, 3, 2), "a0", "user 'u50' has no impression on 2024-03-02 in"),
        ("u50", datetime.date(2024, 3, 2), "a0", "try 2024-03-01"),
        ("u50", DAY, "a9", "has no impression of ad 'a9', so its features are not known; did you mean"),
    ):
        with pytest.raises(UserError, match=told):
            find(folder, user, day, ad)
