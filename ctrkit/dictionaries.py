"""One dictionary for all chunks: every distinct text of a log's column, and what each chunk's codes mean in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit import spool
from ctrkit.spool import Ints

Chunk = Mapping[str, Any]
SHORT = ".words"
"""What the name of a chunk's file of all short dictionaries ends in."""
AT_ONCE = 1 << 21
"""Words of chunks that are looked up together, at least: what is in memory besides the distinct ones and all codes."""


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
    words_of = {name: _Words(name, chunks, kinds[name], short) for name in names}
    return {name: _merge(name, words_of[name], folder, name in in_order) for name in names}


class _Words(Sequence[pl.Series]):
    """A column's words, chunk by chunk, of the chunks that have it. Those in files of their own are read when they are
    asked for, the others, short ones, once for all columns: `short` keeps them.
    """

    def __init__(
        self, name: str, chunks: Sequence[Chunk], dtype: type[pl.DataType], short: dict[str, pl.Series]
    ) -> None:
        self._places = [(c["stem"], *c["words"][name][:3]) for c in chunks if name in c["words"]]
        self._dtype, self._short = dtype, short

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> pl.Series: ...
    @overload
    def __getitem__(self, at: slice) -> list[pl.Series]: ...
    def __getitem__(self, at: int | slice) -> pl.Series | list[pl.Series]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        stem, end, begin, until = self._places[at]
        words = self._short.get(stem) if end == SHORT else None
        if words is None:
            words = pl.read_ipc(stem + end)["value"]
        if end == SHORT:
            self._short[stem] = words
        return words.slice(begin, until - begin).cast(self._dtype)


def _merge(name: str, words_of: Sequence[pl.Series], folder: Path, in_order: bool) -> dict[str, Any]:
    pieces, words = _code_each(words_of)
    if in_order:
        order = spool.text_order(words)
        rank = np.empty(len(order) + 1, np.uint32)
        rank[0], rank[order + 1] = 0, np.arange(1, len(order) + 1)
        words = words.gather(order)
    begins = [0]
    with spool.whole(folder / f"{name}.map") as tmp, open(tmp, "wb") as f:
        for piece in pieces:
            codes = np.append(np.uint32(0), rank[piece] if in_order else piece)
            f.write(codes.astype(spool.smallest(words.len() + 1), copy=False).data)
            begins.append(begins[-1] + len(piece) + 1)
    spool.write_frame(folder / f"{name}.words", words.rename("value").to_frame())
    return {"size": words.len() + 1, "begins": begins}


def _code_each(words_of: Sequence[pl.Series]) -> tuple[Sequence[Ints], pl.Series]:
    """Return the codes (UInt32) of each of several dictionaries' words in one of them all, and its words, String."""
    if words_of and words_of[0].dtype == pl.Int64 and (coded := spool.code_ranges(words_of)) is not None:
        return coded[0], coded[1].cast(pl.String)
    pieces: list[npt.NDArray[np.uint32]] = []
    words = pl.Series("value", [], dtype=words_of[0].dtype if words_of else pl.String)
    waiting: list[pl.Series] = []
    for i, some in enumerate(words_of):
        waiting.append(some)
        if i + 1 < len(words_of) and sum(w.len() for w in waiting) < max(AT_ONCE, words.len()):
            continue
        codes, together = spool.code(pl.concat([words, *waiting]))
        changed, *new = np.split(codes.astype(np.uint32), np.cumsum([words.len(), *(w.len() for w in waiting)])[:-1])
        for at, piece in enumerate(pieces):
            pieces[at] = changed[piece - 1]
        pieces += new
        words, waiting = together, []
    return pieces, words.cast(pl.String)


def words(folder: Path, name: str) -> pl.Series:
    """Return the texts of codes 1, 2, …."""
    return pl.read_ipc(folder / f"{name}.words")["value"]


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
