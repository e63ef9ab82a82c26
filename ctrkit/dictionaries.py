"""One dictionary for all chunks: every distinct text of a log's column, and what each chunk's codes mean in it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import spool
from ctrkit.disk_tables import Table
from ctrkit.spool import Ints

Chunk = Mapping[str, Any]
SHORT = ".words"
"""What the name of a chunk's file of all short dictionaries ends in."""
AT_ONCE = 1 << 20
"""Words of chunks that are looked up together, at least: what is in memory besides the distinct ones."""


def tasks(names: Sequence[str], chunks: Sequence[Chunk]) -> list[list[str]]:
    """Share the dictionaries out: each long one alone, the longest first; all short ones together."""
    lengths = dict.fromkeys(names, 0)
    alone = set()
    for chunk in chunks:
        for name in lengths.keys() & chunk["words"].keys():
            end, a, b, _ = chunk["words"][name]
            lengths[name] += b - a
            if end != SHORT:
                alone.add(name)
    short = [n for n in names if n not in alone]
    long = sorted(alone, key=lambda name: (-lengths[name], name))
    return [*([n] for n in long), *([short] if short else [])]


def unify(names: Sequence[str], chunks: Sequence[Chunk], folder: Path, in_order: Sequence[str]) -> dict[str, Any]:
    """Merge each of these dictionaries over all chunks that have it.

    Writes FOLDER/NAME.words (the distinct texts; sorted, for the names `in_order`) and FOLDER/NAME.map: for each chunk
    the code here of each code there, 0 first. Returns, by name, `size` (largest code + 1) and where each chunk begins
    in the map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {n: pl.Int64 if all(c["words"][n][3] for c in chunks if n in c["words"]) else pl.String for n in names}
    short: dict[str, pl.Series] = {}
    return {n: _merge(n, _Words(n, chunks, kinds[n], short), folder, n in in_order) for n in names}


class _Words(Iterable[pl.Series]):
    """A column's words, chunk by chunk, of the chunks that have it, mapped when it is their turn; files of short ones
    once for all columns: `short` keeps them.
    """

    def __init__(
        self, name: str, chunks: Sequence[Chunk], dtype: type[pl.DataType], short: dict[str, pl.Series]
    ) -> None:
        self._places = [(c["stem"], *c["words"][name][:3]) for c in chunks if name in c["words"]]
        self.dtype, self._short = dtype, short
        self.lengths = [until - begin for *_, begin, until in self._places]

    def __iter__(self) -> Iterator[pl.Series]:
        for stem, end, begin, until in self._places:
            words = self._short.get(stem) if end == SHORT else None
            if words is None:
                words = spool.mapped_frame(stem + end)["value"]
            if end == SHORT:
                self._short[stem] = words
            yield words.slice(begin, until - begin).cast(self.dtype)


def _merge(name: str, words_of: _Words, folder: Path, in_order: bool) -> dict[str, Any]:
    codes = Table(np.uint32, folder)
    words = _code_each(words_of, codes)
    rank = np.arange(words.len() + 1, dtype=np.uint32)
    if in_order:
        order = spool.text_order(words)
        rank[order + 1] = np.arange(1, len(order) + 1)
        words = words.gather(order)
    rank = rank.astype(spool.smallest(words.len() + 1), copy=False)
    begins, at = [0], 0
    with spool.whole(folder / f"{name}.map") as tmp, open(tmp, "wb") as f:
        for n in words_of.lengths:
            f.write(rank[:1].data)
            f.write(spool.take(rank, codes.read(at, at + n)).data)
            begins.append(begins[-1] + n + 1)
            at += n
    spool.write_frame(folder / f"{name}.words", words.rename("value").to_frame())
    return {"size": words.len() + 1, "begins": begins}


def _code_each(words_of: _Words, codes: Table) -> pl.Series:
    """Append to `codes` the code (UInt32) of each word of each chunk; return the words by code from 1, String.

    No code changes once it is given, so that memory holds the distinct words and some chunks', not all codes.
    """
    if words_of.dtype == pl.Int64 and (coded := spool.code_ranges(words_of)) is not None:
        for piece in coded[0]:
            codes.append(piece)
        return coded[1].cast(pl.String)
    words = pl.Series("value", [], dtype=words_of.dtype)
    waiting: list[pl.Series] = []
    for some in words_of:
        waiting.append(some)
        if sum(w.len() for w in waiting) >= max(AT_ONCE, words.len()):
            words = _add(words, waiting, codes)
            waiting = []
    return (_add(words, waiting, codes) if waiting else words).cast(pl.String)


def _add(words: pl.Series, more: Sequence[pl.Series], codes: Table) -> pl.Series:
    """Append the codes of `more` words to `codes`; return the words, new ones behind them as they come."""
    every = pl.concat([words, *more])
    code = spool.code(every)[0]
    first = np.empty(int(code.max(initial=0)) + 1, np.uint32)  # the row in which each code comes first
    first[code[::-1]] = np.arange(len(code) - 1, -1, -1, dtype=np.uint32)  # of several values NumPy keeps the last
    new = np.zeros(len(code), bool)
    new[first[1:]] = True
    number = np.cumsum(new, dtype=np.uint32)
    codes.append(number[first[code[words.len() :]]])
    return every.filter(pl.Series(new))


def words(folder: Path, name: str) -> pl.Series:
    """Return the texts of codes 1, 2, …."""
    return spool.mapped_frame(folder / f"{name}.words")["value"]


class Maps:
    """The maps of the dictionaries, mapped into memory, not read."""

    def __init__(
        self, folder: Path, found: Mapping[str, Mapping[str, Any]], order: Mapping[str, Sequence[str]]
    ) -> None:
        self.folder, self.found = folder, found
        self._place = {name: {stem: i for i, stem in enumerate(stems)} for name, stems in order.items()}
        self._maps: dict[str, Ints] = {}

    def of(self, name: str, stem: str) -> Ints:
        """Return the code in the dictionary of each code of a chunk, in the smallest type for its size."""
        if name not in self._maps:
            path = self.folder / f"{name}.map"
            dtype = np.dtype(spool.smallest(self.found[name]["size"]))
            full = path.stat().st_size > 0
            self._maps[name] = np.asarray(np.memmap(path, dtype, "r")) if full else np.empty(0, dtype)
        begins = self.found[name]["begins"]
        i = self._place[name][stem]
        return self._maps[name][begins[i] : begins[i + 1]]
