"""Damaged raw files: convert either says in words what is wrong, or accounts for every row. Never a traceback.

The damage is the same in every run. EXAMPLES=20 tries twenty times as many.
"""

import gzip
import json
import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import zstandard

from tests import shop

TIMES = int(os.environ.get("EXAMPLES", "1"))
ENDINGS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.zst"]
DAMAGED = 20
"""Damaged files of each format."""


def rows() -> dict[str, list[str]]:
    return shop.random_rows(17, users=8, goods=6, days=4)


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small shop in each format."""
    made = {}
    for ending in ENDINGS:
        folder = tmp_path_factory.mktemp(ending)
        shop.write(folder, **rows())
        for path in sorted((folder / "raw").glob("*.csv")):
            frame = pl.read_csv(path, infer_schema=False)
            path.unlink()
            write(frame, folder / "raw" / f"{path.stem}.{ending}")
        recipe = shop.RECIPE.replace('.csv"', f'.{ending}"').replace(
            "[convert]\n", "[convert]\nmax_reject_rate = 0.5\n"
        )
        (folder / "recipe.toml").write_text(recipe)
        made[ending] = folder
    return made


def write(frame: pl.DataFrame, path: Path) -> None:
    kind = path.name.split(".")[1]
    if kind == "parquet":
        frame.write_parquet(path, row_group_size=50)
        return
    text = frame.write_ndjson() if kind == "jsonl" else frame.write_csv(separator="\t" if kind == "tsv" else ",")
    path.write_bytes(pack(path, text.encode()))


def pack(path: Path, data: bytes) -> bytes:
    return {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)


def unpack(path: Path) -> bytes:
    data = path.read_bytes()
    return {".gz": gzip.decompress, ".zst": zstandard.decompress}.get(path.suffix, bytes)(data)


# --- ways to do damage: bytes to bytes ---

Damage = Callable[[bytes, random.Random], bytes]


def spot(data: bytes, r: random.Random) -> int:
    return r.randrange(len(data)) if data else 0


def flip(data: bytes, r: random.Random) -> bytes:
    i = spot(data, r)
    return data[:i] + bytes([data[i] ^ 1 << r.randrange(8)]) + data[i + 1 :] if data else data


def delete(data: bytes, r: random.Random) -> bytes:
    i = spot(data, r)
    return data[:i] + data[i + r.choice([1, 1, 3, 50]) :]


def insert(data: bytes, r: random.Random) -> bytes:
    i = spot(data, r)
    return data[:i] + r.choice(INSERTS) + data[i:]


INSERTS = [
    *(b'"', b"'", b"\0", b"\n", b"\r", b"\r\n", b"\n\n\n", b",", b",,,", b"\t", b"{", b"}", b"[1]", b"\\", b"null"),
    *(
        b"\xff",
        b"\xc3",
        b"\xe4\xb8",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\x1f",
        b"\x1e",
        b"\x1a",
        b" ",
        b"nan",
        b"-",
        b"e9",
    ),
    *(b"1e400", b"9" * 30, b"9" * 400, b"x" * 70_000, b'"' + b"y" * 70_000 + b'"', "中".encode() * 3, b"../../x"),
]


def truncate(data: bytes, r: random.Random) -> bytes:
    return data[: spot(data, r)]


def swap_lines(data: bytes, r: random.Random) -> bytes:
    lines = data.split(b"\n")
    i, j = r.randrange(len(lines)), r.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def repeat_line(data: bytes, r: random.Random) -> bytes:
    lines = data.split(b"\n")
    i = r.randrange(len(lines))
    return b"\n".join([*lines[:i], lines[i], *lines[i:]])


def cell(data: bytes, r: random.Random) -> bytes:
    """Put something else for a word of the text."""
    lines = data.split(b"\n")
    i = r.randrange(len(lines))
    separator = next((s for s in (b"\t", b",") if s in lines[i]), b",")
    cells = lines[i].split(separator)
    cells[r.randrange(len(cells))] = r.choice([*INSERTS, b""])
    lines[i] = separator.join(cells)
    return b"\n".join(lines)


def crlf(data: bytes, r: random.Random) -> bytes:
    return data.replace(b"\n", b"\r\n")


def bom(data: bytes, r: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


def utf16(data: bytes, r: random.Random) -> bytes:
    return data.decode(errors="replace").encode("utf-16")


def nothing(data: bytes, r: random.Random) -> bytes:
    return b""


OFTEN: list[Damage] = [flip, delete, insert, insert, cell, cell, swap_lines, repeat_line]
ALL: list[Damage] = [*OFTEN, *OFTEN, truncate, crlf, bom, utf16, nothing]


def damage(path: Path, r: random.Random) -> str:
    """Damage a file, its text or (a third of the time) its compressed or Parquet bytes; return how."""
    packed = path.suffix in (".parquet", ".gz", ".zst") and (path.suffix == ".parquet" or r.random() < 1 / 3)
    data = path.read_bytes() if packed else unpack(path)
    chosen = r.choices(ALL, k=r.choice([1, 1, 2, 5]))
    for do in chosen:
        data = do(data, r)
    path.write_bytes(data if packed else pack(path, data))
    return f"{path.name}: {' '.join(do.__name__ for do in chosen)}"


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files_are_refused_in_words_or_accounted_for(shops: dict[str, Path], ending: str) -> None:
    outcomes: Counter[int] = Counter()
    for seed in range(DAMAGED * TIMES):
        r = random.Random(f"{ending} {seed}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(shutil.copytree(shops[ending], Path(name) / "shop"))
            paths = sorted((folder / "raw").iterdir())
            path = r.choice([*paths, *(p for p in paths if p.name.startswith("impressions"))])
            how = f"seed {seed}, {damage(path, r)}"
            code = check(folder, how)
            if code == 0 and ending != "parquet":
                check_unharmed(shops[ending], folder, how)
            outcomes[code] += 1
    assert outcomes[0]
    assert outcomes[1]


def check(folder: Path, how: str) -> int:
    """Convert the shop; return the exit code."""
    result = shop.run(folder, "convert")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        traceback.print_exception(result.exception)
        raise AssertionError(f"{how}: {result.exception!r}")
    assert result.exit_code in (0, 1, 2), how
    out = folder / "convert"
    if result.exit_code:
        assert "Error: " in result.output, how
        assert "Traceback" not in result.output, how
        assert not out.exists(), how
        return result.exit_code
    counts = json.loads((folder / "convert.json").read_text())["counts"]
    samples = pl.read_parquet(out / "samples" / "day=*" / "part-*.parquet").height
    rejects = pl.read_parquet(out / "rejects.parquet")
    of_kind = Counter(rejects.filter(pl.col("source") == "impressions")["kind"])
    assert of_kind.total() + samples == counts["impressions read"], how
    assert rejects.select("source", "file", "row").is_unique().all(), how
    assert rejects["reason"].is_not_null().all(), how
    for source in ("impressions", "clicks", "behaviours"):
        path = next((folder / "raw").glob(f"{source}.*"))
        if (lines := lines_of(path)) is not None:
            assert counts[f"{source} read"] == lines, how
    return 0


def check_unharmed(original: Path, folder: Path, how: str) -> None:
    """Lines of the impressions that no damage has met are samples, or are told to be rejected or duplicates."""
    path = next((folder / "raw").glob("impressions.*"))
    was, is_now = (unpack(f / "raw" / path.name).replace(b"\r\n", b"\n").split(b"\n") for f in (original, folder))
    json_lines = ".jsonl" in path.name
    if not json_lines and (is_now[0] != was[0] or b'"' in b"".join(is_now)):
        return
    rejects = pl.read_parquet(folder / "convert" / "rejects.parquet").filter(pl.col("source") == "impressions")
    known, told = {line for line in was if line}, set(rejects["row"])
    wanted: Counter[tuple[str, str, int]] = Counter()
    for number, line in enumerate(is_now if json_lines else is_now[1:], 1):
        if line in known and number not in told:
            text = line.decode()
            cells = json.loads(text).values() if json_lines else text.replace("\t", ",").split(",")
            _, time, user, ad, _ = cells
            wanted[user, ad, 1000 * int(time)] += 1
    samples = pl.read_parquet(folder / "convert" / "samples" / "day=*" / "part-*.parquet")
    found = Counter(samples.select("user", "ad", "time").rows())
    assert not wanted - found, how


def lines_of(path: Path) -> int | None:
    """Return how many rows a text file has, where that is plain to see: no quotes, nothing but line breaks \\n."""
    if ".parquet" in path.name:
        return int(pl.scan_parquet(path).select(pl.len()).collect().item())
    data = unpack(path)
    if b'"' in data and ".jsonl" not in path.name:
        return None
    lines = data.replace(b"\r\n", b"\n").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return len(lines) - (".jsonl" not in path.name)
