"""Plain CSV by compiled code, against the way of all other formats."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctrkit import numba_loops, plain_csv, scan
from ctrkit.recipe import Recipe
from ctrkit.tables import open_table
from tests import reference_data
from tests.shop import RECIPE, ctrkit, random_rows, write

compiled = pytest.importorskip("ctrkit.compiled", exc_type=ImportError)

HEADER = "uid,ad,time,click,dwell,x,y,id\n"
ROW = "u1,a1,1700000000,0,1.5,red,7,100\n"
PARTITIONS = 7


def table_of(folder: Path, text: bytes, name: str = "impressions", **source: object) -> scan.Log:
    """Return the log of one file."""
    (folder / "a.csv").write_bytes(text)
    columns = {"user": "uid"} | ({} if name == "behaviours" else {"id": "id"})
    options = {"files": "a.csv", "columns": columns, **source}
    label = "click = 1" if name == "impressions" else ""
    recipe = Recipe.model_validate({"name": "x", "convert": {name: options, "label": label}})
    table = open_table(name, getattr(recipe.convert, name), folder, recipe)
    keys = {"ad": ("ad",), "x": ("x",), "y": ("y",), "xy": ("x", "y"), "clock": ("clock.hour",)}
    log = scan.Log(table, keys, name == "impressions", PARTITIONS, "UTC")
    table.prepare(log.columns())
    return log


def told(log: scan.Log, some: scan.Some) -> dict[str, object]:
    """Return everything that rows say, as plain values."""
    good = some.good
    found: dict[str, object] = {"rows": some.rows, "bad": some.bad.rows(), "row": good.row.tolist()}
    for name in ("click", "dwell", "other_day"):
        values = getattr(good, name)
        found[name] = None if values is None else values.tolist()
    if not good.height:
        return found
    found["time"] = good.time.tolist()
    for name, keys in log.keys.items():
        codes, words = scan._code(good, keys, "UTC") if len(keys) == 1 else scan._code_together(good, keys, "UTC")
        texts = [None, *words.cast(pl.String).to_list()]
        assert len(set(texts)) == len(texts)
        found[name] = [texts[code] for code in codes.tolist()]
    codes, words, parts = good.code_users(PARTITIONS)
    assert parts.tolist() == [reference_data.xxhash64(text) % PARTITIONS for text in words.cast(pl.String)]
    found["user"] = [words.cast(pl.String)[int(code) - 1] for code in codes]
    if log.with_id:
        ids, parts = good.ids(PARTITIONS)
        found["id"], found["id parts"] = ids.cast(pl.String).to_list(), parts.tolist()
    return found


def check(folder: Path, text: str | bytes, *, plain: bool = True, name: str = "impressions", **source: object) -> None:
    """Read text both ways, which must say the same; `plain`: whether compiled code must be able to."""
    data = text.encode() if isinstance(text, str) else text
    log = table_of(folder, data, name, **source)
    ((number, piece),) = log.table.pieces()
    quick = list(scan._read(log, number, piece))
    assert [isinstance(some.good, plain_csv.PlainRows) for some in quick] == [plain] * len(quick)
    slow = list(scan._read_frames(log, number, piece))
    assert [told(log, some) for some in quick] == [told(log, some) for some in slow]


def rows(make: Callable[[random.Random], list[str]], n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return HEADER + "".join(",".join(make(rng)) + "\n" for _ in range(n))


@pytest.mark.parametrize("name", ["impressions", "behaviours"])
@pytest.mark.parametrize(
    "text",
    [
        ROW,
        ROW.rstrip("\n"),
        ROW + "u2,a1,1700000001,1,,,,101\n",
        ROW + "u2,a1,1700000001.5,1,0,ü,7.0,x1",
        ROW + "u2,a1,1700000001.0005,1,0.0005,ü,7.0,1\nu2,a1,1700000001.0015,1,9999999999,,,1\n",
        ROW * 2 + "u2,a1,1700000001,1,3,a,b,102,\n" + ROW,
        "".join(f"u{t},{t},1700000000,1,2.25,{t}1,{t},{t}\n" for t in ["7", "007", "-0", "-7", "+7"]),
        "".join(f"{t},{t},1700000000,1,1,{t},{t},{t}\n" for t in ["1" * n for n in range(1, 26)]),
        "".join(f"{t},{t},1700000000,1,1,{t},{t},{t}\n" for t in ["ab" * n for n in range(1, 40)]),
        "".join(f"{t},{t},1700000000,1,1,{t},{t},{t}\n" for t in ["u1", "u01", "u", "u12", "u1x", "v1", "u1"]),
        "".join(f"p-{t},a,1700000000,1,1,prefix-8{t},a prefix {t},{t}\n" for t in [0, 5, 1048575, 1048576, 99999999]),
    ],
)  # fmt: skip
def test_rows_of_all_kinds(tmp_path: Path, name: str, text: str) -> None:
    check(tmp_path, HEADER + text, name=name)


@pytest.mark.parametrize(
    "bad",
    [
        ",a1,1700000000,1,1,x,y,5\n",
        "u1,,1700000000,1,1,x,y,5\n",
        "u1,a1,,1,1,x,y,5\n",
        "u1,a1,yesterday,1,1,x,y,5\n",
        "u1,a1,-5,1,1,x,y,5\n",
        "u1,a1,99999999999999,1,1,x,y,5\n",
        "u1,a1,1700000000,1,1,x,y,5,more\n",
        "u1\n",
        "\n",
    ],
)
def test_bad_rows_are_told_as_ever(tmp_path: Path, bad: str) -> None:
    check(tmp_path, HEADER + ROW + bad + ROW + bad + bad)
    check(tmp_path, HEADER + bad + ROW, name="behaviours")


@pytest.mark.parametrize(
    "text",
    [
        ROW + 'u1,a1,1700000000,1,1,"x, y",y,5\n',
        ROW.replace("\n", "\r\n") * 2,
        ROW + "u1,a1,1.7e9,1,1,x,y,5\n",
        ROW + "u1,a1,1700000000,,1,x,y,5\n",
        (ROW + "u1,a1,1700000000,1,1,\xff,y,5\n").encode("latin-1"),
    ],
)
def test_what_is_not_plain_is_left_to_others(tmp_path: Path, text: str | bytes) -> None:
    head = HEADER.encode()
    check(tmp_path, head + (text if isinstance(text, bytes) else text.encode()), plain=False)


@pytest.mark.parametrize("dwell", ["1e3", "never", "-3", "1.", ".5", "1.2.3", "12345678901234567"])
def test_numbers_that_are_written_otherwise_are_left_to_others(tmp_path: Path, dwell: str) -> None:
    check(tmp_path, HEADER + ROW + f"u1,a1,1700000000,1,{dwell},x,y,5\n", plain=False, name="behaviours")


def test_no_rows(tmp_path: Path) -> None:
    check(tmp_path, HEADER)
    check(tmp_path, HEADER.rstrip("\n"), name="behaviours")


@pytest.mark.parametrize("source", [{"time_unit": "iso"}, {"where": "click = 1"}, {"null_values": ["7"]}])
def test_what_a_recipe_may_ask_for_is_left_to_others(tmp_path: Path, source: dict[str, object]) -> None:
    time = "2024-03-01T00:00:00Z" if "time_unit" in source else "1700000000"
    check(tmp_path, HEADER + ROW.replace("1700000000", time) * 3, plain=False, **source)


def test_other_separators_and_encodings(tmp_path: Path) -> None:
    check(tmp_path, (HEADER + ROW * 2).replace(",", "\t"), separator="\t")
    check(tmp_path, (HEADER + ROW * 2).replace(",", "::"), separator="::")
    check(tmp_path, (HEADER + ROW.replace("red", "röt")).encode("latin-1"), encoding="latin-1")
    check(tmp_path, "\ufeff" + HEADER + ROW)


@pytest.mark.parametrize("seed", range(4))
def test_many_distinct_texts(tmp_path: Path, seed: int) -> None:
    """More than the first tables hold, of numbers, prefixed numbers and texts, turning from one into the other."""

    def make(rng: random.Random) -> list[str]:
        n = rng.randrange(3_000_000)
        text = rng.choice([str(n), f"u{n % 5000}", "".join(rng.choices("abcde", k=rng.randrange(1, 20)))])
        late = str(n) if rng.random() < 0.999 else text
        return [text, f"ad-{n % 7000}", "1700000000", str(n % 2), f"{n / 1000}", late, "" if n % 3 else text, str(n)]

    check(tmp_path, rows(make, 6_000, seed))
    check(tmp_path, rows(make, 6_000, seed), name="behaviours")


def test_more_rows_than_are_cut_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_csv, "BLOCK_ROWS", 5)

    def make(rng: random.Random) -> list[str]:
        user = "" if rng.random() < 0.3 else str(rng.randrange(9))
        return [user, "1", str(1_700_000_000 + rng.randrange(99)), "1", "", rng.choice("ab"), "", str(rng.random())]

    for seed in range(8):
        check(tmp_path, rows(make, 40, seed))


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_a_conversion_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    raw, recipe = write(tmp_path, RECIPE, **random_rows(seed, users=60))

    def convert(name: str) -> list[tuple[str, str]]:
        result = ctrkit("convert", "--recipe", recipe, "--raw", raw, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        return list(digests(tmp_path / name))

    used: list[bool] = []
    read = plain_csv.read

    def counting(*args: object) -> object:
        used.append(True)
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(plain_csv, "read", counting)
    quick = convert("quick")
    assert used
    used.clear()
    monkeypatch.setattr(numba_loops, "load", lambda module: None)
    assert convert("slow") == quick
    assert not used


def test_numbers_of_cells() -> None:
    """Whole numbers are those that are written as Python writes them."""
    texts = ["0", "7", "-7", "10", "-10", "00", "01", "-0", "-01", "+1", "", "-", "1a", " 1", "9" * 18, "9" * 19]
    for text in texts:
        data = np.frombuffer(text.encode() + bytes(16), np.uint8).copy()
        length = len(text.encode())
        inline = int.from_bytes(text.encode(), "little") | length << 56
        cells = np.array([inline if length < 8 else 1 << 63 | length << 32], np.uint64)
        numbers = np.zeros(1, np.int64)
        whole = text.lstrip("-").isdigit() and str(int(text)) == text and length < 19
        assert compiled.whole_numbers(cells, data, numbers) == whole, text
        assert not whole or numbers[0] == int(text)


@pytest.mark.parametrize("prefix", ["", "u", "user-id/"])
def test_small_whole_numbers_are_told_from_all_other_cells(prefix: str) -> None:
    """Against a regular expression: each text a column of its own, since coding ends at the first that is no number."""
    rng = random.Random(0)
    texts = ["", "0", "00", "01", "1", "9", "9999999", "0000001", "12345678", "12a", "-1", "+1", " 1", "1 ", "/1", "1:"]
    texts += [str(rng.randrange(10 ** rng.randint(1, 8))) for _ in range(300)]
    texts += ["".join(rng.choices("0123456789/:a\0ÿ", k=rng.randint(1, 8))) for _ in range(600)]
    table, words, codes = np.zeros(10**7, np.uint32), np.zeros(1, np.uint64), np.zeros(2, np.uint32)
    before = np.uint64(int.from_bytes(prefix.encode(), "little")), np.uint64(len(prefix))
    for text in texts:
        raw = (prefix + text).encode()
        data = np.frombuffer(raw.ljust(64, b"\0"), np.uint8).copy()
        short = int.from_bytes(raw, "little") | len(raw) << 56
        cell = short if len(raw) < 8 else 1 << 63 | len(raw) << 32
        cells = np.array([0, cell], np.uint64)  # an empty one first
        found = compiled.code_numbers(cells, 0, data, *before, table, words, 0, codes)
        if not raw:
            assert found == (2, 0, -1)
        elif re.fullmatch("0|[1-9][0-9]{0,6}", text):
            assert found == (2, 1, -1)
            assert (codes.tolist(), words.tolist()) == ([0, 1], [cell])
            assert table[int(text)] == 1
            table[int(text)] = 0
        else:
            assert found == (1, 0, -1)
