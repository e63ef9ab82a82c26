"""Rows of CSV text: where they end, and which are no plain CSV."""

import numpy as np
import pytest

from ctrkit.csv_rows import CsvRows, Kind

ROWS = CsvRows(",", 1 << 20)


def bytes_of(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(text.encode(), np.uint8)


def kinds(text: str, rows: CsvRows = ROWS) -> list[tuple[str, Kind]]:
    """Return the rows of a text, each with its kind; what is regular may be several rows."""
    return [(text[r.begin : r.end], r.kind) for r in rows.rows(bytes_of(text), 0, len(text))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        'a,"b"\n"c",d',
        '"a ""b"" c","",""""\r\n"d"\r\n',
        'a,"two\nlines"\n"x",""\n',
        '"a,""\n"\n',
    ],
)
def test_tidy_text_is_regular(text: str) -> None:
    assert ROWS.tidy(bytes_of(text))
    assert "".join(row for row, _ in kinds(text)) == text
    assert {kind for _, kind in kinds(text)} <= {"regular"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ('a "b" c,d\n', "regular"),
        ('5" a,6" b\n', "odd"),
        ('"a"b,c\n', "odd"),
        ('"a" ,c\n', "odd"),
        ('"a "b" c",d\n', "odd"),
        ('"a "b"\nc",d\n', "odd"),
        ('"a"\rb,c\n', "odd"),
        ('""a,c\n', "odd"),
        ('5" a,b\n', "bad"),
        ('"5 a,b\n', "bad"),
        ('"5 a,"b",c\n', "bad"),
        ('a,5",b\n', "bad"),
    ],
)
def test_a_row_is_told_by_itself(row: str, kind: Kind) -> None:
    """Whatever is before it and behind it."""
    other = 'x,"two\nlines"\n'
    for before, behind in (("", ""), ("", other), (other, ""), (other, other), ("y\n", "y\n")):
        text = before + row + behind
        found = kinds(text)
        assert not ROWS.tidy(bytes_of(text))
        assert (row, kind) in found or (kind == "regular" and any(row in some for some, k in found if k == kind))
        assert all(k == "regular" for some, k in found if some != row)


def test_a_cell_of_several_lines_that_is_too_long_is_a_stray_quote() -> None:
    cell = 'a,"' + "x\n" * 20 + '"\n'
    assert kinds(cell, CsvRows(",", 50)) == [(cell, "regular")]
    assert not CsvRows(",", 30).tidy(bytes_of(cell))
    assert kinds(cell, CsvRows(",", 30)) == [('a,"x\n', "bad"), ("x\n" * 19, "regular"), ('"\n', "bad")]
    line = 'a,"' + "x" * 100 + '"\n'
    assert kinds(line, CsvRows(",", 30)) == [(line, "regular")]


def test_no_row_of_tidy_text_is_anything_but_regular() -> None:
    """Wherever the blocks in which it is looked at end, between two quotes too."""
    rng = np.random.default_rng(6)
    tidy = 0
    for _ in range(1500):
        text = "".join(rng.choice(['""', '"', "\n", ",", "a", ',"', '"\n'], rng.integers(1, 12)))
        rows = CsvRows(",", int(rng.integers(1, 30)))
        if rows.tidy(bytes_of(text)):
            assert {kind for _, kind in kinds(text, rows)} <= {"regular"}, text
            tidy += 1
    assert tidy > 100


def test_the_end_behind_a_byte_is_found_from_near_it() -> None:
    """What is far before need not be looked at, and changes nothing."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        text = "".join(rng.choice(list('ab,"\n'), 300, p=[0.3, 0.2, 0.2, 0.15, 0.15])) + "\n"
        rows, data = CsvRows(",", int(rng.integers(1, 40))), bytes_of(text)
        ends = [0]
        while ends[-1] < len(data):
            ends.append(ends[-1] + rows.first(data[ends[-1] :]).end)
        for stop in range(1, len(data), 7):
            assert rows.end_after(data, 0, stop) == min(e for e in ends if e >= stop)
        assert rows.last_end(data) in ends
