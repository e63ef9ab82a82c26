"""Words and numbers of what eval prints."""

from ctrkit.metric_tables import interval, lines, number, of_few, percent, with_interval


def test_long_names_break_after_a_plus_only():
    assert lines("basic+ad_id+ad_image") == "basic+ad_id+ad_image"
    assert lines("basic+ad_id+ad_image+user_images") == "basic+ad_id+ad_image+\nuser_images"
    assert lines("a+bb+ccc", width=4) == "a+\nbb+\nccc"
    assert lines("no-place-to-break-in-this-name", width=4) == "no-place-to-break-in-this-name"
    for name in ("basic", "x+", "+x", "basic+ad_id+ad_image+user_ids+user_images"):
        assert lines(name).replace("\n", "") == name


def test_numbers():
    assert number(None) == "n/a"
    assert number(0.5, sign=True) == "+0.5000"
    assert percent(0.11552) == "+11.55%"
    assert interval(None, 1.0) == ""
    assert with_interval(0.1, None, None) == "0.1000"
    assert with_interval(0.1, 0.0, 0.2) == "0.1000 [0.0000, 0.2000]"
    assert of_few({"gauc": 0.5, "users_kept": 30}) == "0.5000"
    assert of_few({"gauc": 0.5, "users_kept": 29}) == "(0.5000)"
    assert of_few({"gauc": None, "users_kept": 0}) == "(n/a)"
