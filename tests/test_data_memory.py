"""The data stages hold no more when there are more rows of the same values: what of each pass may stay in memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrkit import dictionaries, spool

WORDS = 20_000
"""Distinct ones of a column."""
MIB = 1 << 20


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def chunks_of(folder: Path, many: int, whole: bool) -> list[dict[str, Any]]:
    """Write the words of so many chunks, of a column that has the same `WORDS` values however many chunks there are."""
    rng = np.random.default_rng(1)
    chunks = []
    for i in range(many):
        numbers = pl.Series("value", rng.permutation(WORDS))
        words = numbers if whole else ("query " + numbers.cast(pl.String)).rename("value")
        stem = f"{folder}/{i:03}"
        spool.write_frame(f"{stem}.words-0", words.to_frame())
        chunks.append({"stem": stem, "words": {"x": [".words-0", 0, WORDS, whole]}})
    return chunks


def peak_of_unify(folder: Path, many: int, whole: bool) -> int:
    """Return the most bytes that Python and NumPy hold at once while the dictionaries of so many chunks are merged."""
    folder.mkdir()
    chunks = chunks_of(folder, many, whole)
    tracemalloc.start()
    found = dictionaries.unify(["x"], chunks, folder / "all", [])["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["size"] == WORDS + 1
    assert found["begins"][-1] == many * (WORDS + 1)
    return peak


@pytest.mark.parametrize("whole", [True, False], ids=["numbers", "texts"])
def test_dictionaries_hold_the_distinct_words_not_the_codes_of_all_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.setattr(dictionaries, "AT_ONCE", 4 * WORDS)  # of both sizes the same at once
    few, many = (peak_of_unify(tmp_path / str(n), n, whole) for n in (16, 128))
    assert many < 1.1 * few  # the codes of 112 chunks more are 9 MB


@pytest.mark.parametrize("prefix", [None, "u", "a long name of a user "])
def test_what_lies_between_the_passes_is_mapped_not_read(tmp_path: Path, prefix: str | None) -> None:
    """Users and ids of all chunks stay open in every worker, so they must not be in its memory."""
    ids = pl.Series("id", np.arange(200_000))
    if prefix is not None:
        ids = (prefix + ids.cast(pl.String)).rename("id")
    for i in range(20):
        spool.write_frame(tmp_path / f"{i}.ids", ids.to_frame())
    spool.mapped(f"{tmp_path}/0.ids")
    before = anonymous_bytes()
    held = [spool.mapped(f"{tmp_path}/{i}.ids") for i in range(20)]
    grown = anonymous_bytes() - before
    assert sum(some.slice(190_000, 5).equals(ids.slice(190_000, 5)) for some in held) == 20
    assert grown < 20 * ids.estimated_size() / 10


def test_a_mapped_frame_outlives_its_file(tmp_path: Path) -> None:
    """What nobody needs any more is removed while other tasks may still hold it."""
    frame = pl.DataFrame({"a": ["x", None, "a text of more than twelve bytes"], "b": [[1, 2], [], None]})
    spool.write_frame(tmp_path / "f", frame)
    found = spool.mapped_frame(tmp_path / "f")
    (tmp_path / "f").unlink()
    assert found.equals(frame)
    spool.write_frame(tmp_path / "none", frame.clear())
    assert spool.mapped_frame(tmp_path / "none").equals(frame.clear())
