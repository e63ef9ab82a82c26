"""Files cut into pieces: the rows are those of the whole file, wherever the cuts fall."""

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import zstandard

from ctrkit import pieces, tables
from ctrkit.errors import UserError
from ctrkit.pieces import BAD, EXTRA, ROW
from ctrkit.recipe import Source
from ctrkit.tables import open_table

SIZES = [1, 7, 16, 50, 1000, 32 << 20]
TIMES = int(os.environ.get("EXAMPLES", "1"))
Rows = list[tuple[int, list[str | None], str | None]]


def read(path: Path, columns: list[str], *, extra: bool = False, **source: Any) -> tuple[Rows, int]:
    """Return the rows of a file (number, cells, why it is bad) and in how many pieces they came.

    extra: whether rows may have more cells than the header.
    """
    table = open_table("users", Source(files=path.name, **source), path.parent)
    table.prepare(columns)
    rows: Rows = []
    found = table.pieces()
    for number, piece in found:
        begin = len(rows)
        for frame, n in table.read(number, piece):
            assert n == frame.height
            assert extra or frame[EXTRA].null_count() == frame.height
            cells = frame.select(pl.col(columns).cast(pl.String)).rows()
            at = (frame[ROW] + begin).to_list()
            rows += [(i, list(cell), bad) for i, cell, bad in zip(at, cells, frame[BAD], strict=True)]
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    return rows, len(found)


def good(rows: list[list[str]]) -> Rows:
    """Return what `read` returns of rows without fault; an empty cell is missing."""
    return [(i, [cell or None for cell in row], None) for i, row in enumerate(rows, 1)]


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes of a piece."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", request.param)
    return int(request.param)


def compress(data: bytes, how: str) -> bytes:
    """Compress in one frame, or in several that end anywhere."""
    cuts = range(0, len(data), 11) if how.endswith("many") else [0]
    parts = [data[a : a + 11 if how.endswith("many") else None] for a in cuts]
    one = gzip.compress if how.startswith(".gz") else zstandard.ZstdCompressor().compress
    return b"".join(map(one, parts))


ROWS = [
    ["u1", "plain", "1"],
    ["u2", 'a "quoted" word', "2"],
    ["u3", "two\nlines, and a comma", "3"],
    ["ü4", "", "4"],
    ["u5", "\n\n\n", "5"],
    ["u6", "x" * 60, "6"],
    ["u7", '"', "7"],
    ["u8", "end,", ""],
]


def csv_text(end: str = "\n", rows: list[list[str]] = ROWS) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=end)
    writer.writerows([["user", "text", "n"], *rows])
    return out.getvalue()


@pytest.mark.parametrize("how", ["", ".gz", ".gz many", ".zst", ".zst many"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_cells_are_never_cut(tmp_path: Path, size: int, end: str, how: str) -> None:
    data = csv_text(end).encode()
    path = tmp_path / f"log.csv{how[:4].strip()}"
    path.write_bytes(compress(data, how) if how else data)
    rows, n = read(path, ["user", "text", "n"])
    assert rows == good(ROWS)
    assert (n > 1) == (not how and size < 200)


def test_a_last_row_without_a_line_break_and_a_byte_order_mark(tmp_path: Path, size: int) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf" + csv_text().encode().rstrip(b"\n"))
    assert read(tmp_path / "log.csv", ["user", "text", "n"])[0] == good(ROWS)


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "utf-8"])
def test_encodings(tmp_path: Path, size: int, encoding: str) -> None:
    """A second byte of GBK may be that of a letter or of |, but never that of a comma, quote or line break."""
    texts = ["é|ß", "ÿ"] if encoding == "latin-1" else ["女装|毛衣", "鎩亅丂"]
    rows = [[f"u{i}", text, str(i)] for i, text in enumerate(texts * 3)]
    (tmp_path / "log.csv").write_bytes(csv_text(rows=rows).encode(encoding))
    assert read(tmp_path / "log.csv", ["user", "text", "n"], encoding=encoding)[0] == good(rows)
    lines = [json.dumps(dict(zip(("user", "text", "n"), row, strict=True)), ensure_ascii=False) for row in rows]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode(encoding))
    assert read(tmp_path / "log.jsonl", ["user", "text", "n"], encoding=encoding)[0] == good(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_separators_of_several_characters(tmp_path: Path, size: int, encoding: str) -> None:
    """Quotes mean nothing there."""
    rows = [["1", 'He said "no', "a:b"], ["2", "", '"x'], ["3", "é", "c"]]
    text = "".join("::".join(row) + "\n" for row in rows)
    (tmp_path / "log.dat").write_bytes(text.encode(encoding))
    options = {"format": "csv", "header": False, "separator": "::", "encoding": encoding}
    found, _ = read(tmp_path / "log.dat", ["column_1", "column_2", "column_3"], **options)
    assert found == good(rows)


@pytest.mark.parametrize("how", ["", ".gz many", ".zst many"])
def test_json_lines(tmp_path: Path, size: int, how: str) -> None:
    """Keys in any order, some not there, a type that changes, bad lines; the file's number of lines is kept."""
    lines = [
        '{"user": "u1", "text": "a\\nb", "n": 1}',
        '{"n": 2, "user": "u2", "more": [1, 2]}',
        "{broken",
        "",
        '{"user": "u5", "text": "\\"", "n": 5}',
        "7",
        '{"text": "last", "n": 7, "user": "u7"}',
    ]
    data = ("\n".join(lines) + "\n").encode()
    path = tmp_path / f"log.jsonl{how[:4].strip()}"
    path.write_bytes(compress(data, how) if how else data)
    rows, _ = read(path, ["user", "text"])
    assert rows == [
        (1, ["u1", "a\nb"], None),
        (2, ["u2", None], None),
        (3, [None, None], "not a line of JSON"),
        (4, [None, None], "an empty line"),
        (5, ["u5", '"'], None),
        (6, [None, None], "not a JSON object"),
        (7, ["u7", "last"], None),
    ]


def test_halves_of_characters_and_nan_in_json(tmp_path: Path) -> None:
    """Python's json writes both. A backslash before a u is no such half."""
    texts = ["u\\ud83d", "\\ud83d\\ude00", "\\\\ud83d", "\\uDE00\\ud83d\\ude00x"]
    lines = [f'{{"user": "{text}", "n": 1}}' for text in texts]
    expected = ["u\ufffd", "😀", "\\ud83d", "\ufffd😀x"]
    for more, lists in (([], []), (['{"user": "u", "n": NaN, "text": ["x"]}'], ["u"])):
        (tmp_path / "log.jsonl").write_text("\n".join([*lines, *more]))
        assert [cells for _, cells, _ in read(tmp_path / "log.jsonl", ["user"])[0]] == [[t] for t in expected + lists]


@pytest.mark.parametrize("how", ["", ".gz", ".zst many"])
def test_a_quote_without_its_partner_spoils_one_row(
    tmp_path: Path, size: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LONGEST_CELL", 64)
    lines = [f"u{i},text {i},{i}" for i in range(30)]
    lines[4] = 'u4,5" wide,4'
    data = ("user,text,n\n" + "\n".join(lines) + "\n").encode()
    path = tmp_path / f"log.csv{how[:4].strip()}"
    path.write_bytes(compress(data, how) if how else data)
    rows, _ = read(path, ["user", "n"])
    expected = good([[f"u{i}", str(i)] for i in range(30)])
    expected[4] = (5, [None, None], "a quote without its partner")
    assert rows == expected


STRAYS = ['u9,5" screen,9', 'u9,"5 inch,9', 'u9,5 inch",9', 'u9,"5" screen" wide,9', 'u9,a"b,"c"d']


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("how", ["", ".gz"])
def test_a_stray_quote_leaves_cells_of_several_lines_alone(tmp_path: Path, size: int, how: str, stray: str) -> None:
    """Wherever it is, and however many there are: before it, behind it, between them."""
    cells = ["two\nuFORGED,99,1\nlines", 'a "b"\n"c"', "", "u, v", "plain", "x,\n", '"', "\\"]
    whole = [[f"u{i}", cell, str(i)] for i, cell in enumerate(cells)]
    for places in ([0], [4], [len(whole)], [1, 2, 3], [0, 5, 8]):
        rows = [csv_text(rows=[row]).split("\n", 1)[1] for row in whole]
        expected: Rows = good(whole)
        for place in sorted(places, reverse=True):
            rows.insert(place, stray + "\n")
            expected.insert(place, (0, [None, None, None], "a quote without its partner"))
        path, data = tmp_path / f"log.csv{how}", ("user,text,n\n" + "".join(rows)).encode()
        path.write_bytes(compress(data, how) if how else data)
        found, _ = read(path, ["user", "text", "n"])
        assert found == [(i, cells, why) for i, (_, cells, why) in enumerate(expected, 1)]


def test_quotes_anywhere_are_read_alike_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EXAMPLES=20 tries twenty times as many."""
    rng = np.random.default_rng(8)
    for _ in range(15 * TIMES):
        monkeypatch.setattr(pieces, "LONGEST_CELL", int(rng.choice([4, 16, 1 << 20])))
        text = "user,text,n\n" + "".join(rng.choice(list('ab,""\n\n\rü'), rng.integers(5, 100)))
        for name, pack in (("log.csv", bytes), ("log.csv.gz", gzip.compress)):
            (tmp_path / name).write_bytes(pack(text.encode()))
        found = []
        for size in (32 << 20, 1, 2, 7, 30):
            monkeypatch.setattr(pieces, "PIECE_BYTES", size)
            found += [read(tmp_path / name, ["user", "text", "n"], extra=True)[0] for name in ("log.csv", "log.csv.gz")]
        assert all(rows == found[0] for rows in found), text


ODD = [
    "007",
    "+7",
    "-0",
    " 7",
    "7 ",
    "7.0",
    "1e3",
    "1_000",
    "0x10",
    "--7",
    "-",
    "'7",
    "\t7",
    "7\t",
    "٧",
    "9223372036854775808",
]


@pytest.mark.parametrize("odd", [*ODD, '"7"', '"007"'])
@pytest.mark.parametrize("last", [False, True])
def test_whole_numbers_keep_their_text(tmp_path: Path, odd: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of plain numbers may be read as such; one cell that is written otherwise still says what it says."""
    plain = [str(n) for n in [0, -5, 10, 9223372036854775807, -9223372036854775808, *range(500)]]
    cells = [*plain[:300], odd, "", *plain[300:]]
    if last:
        cells = [*plain, odd]
    text = "first,user,last\n" + "\n".join(f"{cell},{cell},{cell}" for cell in cells)
    (tmp_path / "log.csv").write_text(text)
    expected = [[cell.strip('"')] for cell in cells]
    monkeypatch.setattr(tables, "SAMPLE_ROWS", 100)
    for size in (1 << 20, 500):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        for name in ("first", "user", "last"):
            assert read(tmp_path / "log.csv", [name])[0] == good(expected)


def test_random_rows_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of quotes, commas, line breaks and letters, by Python's csv."""
    rng = np.random.default_rng(4)
    alphabet = list('ab,"\nü ')
    rows = [["".join(rng.choice(alphabet, rng.integers(0, 9))) for _ in range(3)] for _ in range(200)]
    rows = [["u" + row[0], row[1], row[2] + "."] for row in rows]
    (tmp_path / "log.csv").write_text(csv_text(rows=rows))
    for size in range(1, 120, 7):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        found, n = read(tmp_path / "log.csv", ["user", "text", "n"])
        assert found == good(rows)
        assert n > 20


def test_parquet_is_cut_at_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"user": [f"u{i}" for i in range(20)], "text": ["x"] * 20})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=3)
    (tmp_path / "log.parquet.zst").write_bytes(compress((tmp_path / "log.parquet").read_bytes(), ".zst"))
    expected = good([[f"u{i}", "x"] for i in range(20)])
    for most, n in ((1, 7), (6, 4), (7, 4), (100, 1)):
        monkeypatch.setattr(pieces, "PIECE_ROWS", most)
        assert read(tmp_path / "log.parquet", ["user", "text"]) == (expected, n)
        assert read(tmp_path / "log.parquet.zst", ["user", "text"]) == (expected, 1)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.csv.zst"])
def test_a_compressed_file_that_ends_early(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    rows = [[f"u{i}", str(rng.random()), str(i)] for i in range(200_000)]
    data = compress(csv_text(rows=rows).encode(), name[-4:])
    (tmp_path / name).write_bytes(data[: len(data) - 100])
    with pytest.raises(UserError, match=rf"{name} cannot be read as CSV: .*Is it whole"):
        read(tmp_path / name, ["user"])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_rows(tmp_path: Path, size: int, end: str) -> None:
    """They are counted, so that the numbers of later rows are those that an editor shows."""
    (tmp_path / "log.csv").write_bytes(end.join(["user,n", "u1,1", "", "u3,3", "", "", "", "u7,7", ""]).encode())
    nothing = ["", ""]
    expected = good([["u1", "1"], nothing, ["u3", "3"], nothing, nothing, nothing, ["u7", "7"]])
    assert read(tmp_path / "log.csv", ["user", "n"])[0] == expected
