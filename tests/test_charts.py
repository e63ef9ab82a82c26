"""Charts: round ticks, points where they belong, text that stays text."""

import re
import xml.etree.ElementTree as ET

import pytest

from ctrkit.charts import Line, Whisker, lines, ticks, whiskers


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.601, 0.649, [0.61, 0.62, 0.63, 0.64]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (-1.5, 1.2, [-1.0, 0.0, 1.0]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def dots(svg):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).iter("circle")]


def test_whiskers_lie_in_order_and_the_dot_within_its_interval():
    rows = [
        Whisker(name="a", position=0, value=0.60, low=0.59, high=0.61),
        Whisker(name="b", position=1, value=0.65, low=0.64, high=0.67),
        Whisker(name="c", position=2, value=0.62, low=None, high=None),
    ]
    svg = whiskers(rows, 0.6, "chart")
    (a, _), (b, _), (c, _) = dots(svg)
    assert a < c < b
    ends = [tuple(map(float, m)) for m in re.findall(r'd="M([\d.]+) \d+H([\d.]+)M', svg)]
    assert len(ends) == 2  # c has no interval
    assert ends[0][0] < a < ends[0][1]
    assert b - ends[1][0] == pytest.approx((ends[1][1] - b) / 2, abs=0.02)


def test_lines_rise_where_the_numbers_rise():
    svg = lines([Line(name="a", points=[(10, 0.1), (20, 0.4), (30, 0.2)])], "step", "chart")
    (x1, y1), (x2, y2), (x3, y3) = dots(svg)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.02)
    assert y2 < y3 < y1  # SVG counts downwards


def test_one_point_and_none():
    assert len(dots(lines([None, Line(name="a", points=[(5, 0.5)])], "step", "chart"))) == 1
    assert lines([None], "step", "chart") == ""
    assert whiskers([], None, "chart") == ""


def test_names_are_escaped():
    hostile = '<script>alert("x")</script>'
    for svg in (
        whiskers([Whisker(name=hostile, position=0, value=0.5, low=0.4, high=0.6)], None, hostile),
        lines([Line(name=hostile, points=[(0, 1), (1, 2)])], hostile, hostile),
    ):
        assert "<script" not in svg
        assert hostile in "".join(ET.fromstring(svg).itertext())
