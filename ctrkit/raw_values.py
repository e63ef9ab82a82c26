"""Raw values of a request to the indexes that `ctrkit convert` would have given them: 0 missing, 1 unknown, 2… values.

By dictionaries and bisection, a column of few values at a time; what polars does with odd values, polars does here too.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import xxhash

from ctrkit import vocabulary
from ctrkit.recipe import Feature
from ctrkit.tables import as_text
from ctrkit.vocabulary import FIRST, MISSING, UNKNOWN

Value = str | int | float | bool | None
TEXTS = frozenset([str, type(None)])
"""Types of values that are texts as they are."""
PLAIN = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
"""Numbers that Python reads as polars does."""


class Indexer:
    """Indexes of one feature's raw values.

    Parameters
    ----------
    feature: as the recipe has it.
    vocab: the folder of vocabularies; its file is read where the feature needs it.
    """

    def __init__(self, feature: Feature, vocab: Path) -> None:
        self.feature = feature
        self._look_up: Callable[[str], int]
        self._known: dict[str | None, int] | None = None
        if feature.hash_buckets:
            buckets = feature.hash_buckets
            self._look_up = lambda text: FIRST + xxhash.xxh64_intdigest(text.encode()) % buckets
            return
        table = vocabulary.read(vocab, feature.vocab)
        if feature.kind == "number":
            self._edges = [float(text.rpartition("< ")[2]) for text in table["value"][:-1]]
        else:
            known: dict[str | None, int] = dict(zip(table["value"].to_list(), table["index"].to_list(), strict=True))
            known |= {None: MISSING, "": MISSING}
            self._known = known
            self._look_up = lambda text: known.get(text, UNKNOWN)

    def one(self, values: Sequence[Value]) -> list[int]:
        """Return the index of each value."""
        if self.feature.kind == "number":
            return [self._bucket(value) for value in values]
        if self._known is not None:
            found: list[int] = list(map(self._known.get, values, itertools.repeat(UNKNOWN)))  # type: ignore[arg-type]
            if UNKNOWN not in found or TEXTS.issuperset(map(type, values)):
                return found
        look_up = self._look_up
        return [
            MISSING if text is None else look_up(text)
            for text in (value if type(value) is str and value else as_text_of(value) for value in values)
        ]

    def many(self, value: Value | list[Value]) -> list[int]:
        """Return the indexes of a multi-hot feature's values, a list or text that is split at the separator."""
        if isinstance(value, list):
            texts = [as_text_of(v) for v in value]
        else:
            text = as_text_of(value)
            texts = [] if text is None else list(text.split(self.feature.separator))
        return [self._look_up(text) for text in texts if text]

    def _bucket(self, value: Value) -> int:
        """Return the bucket of a number, or of the text of one."""
        number: float | None
        if type(value) is float:
            number = value
        else:
            text = as_text_of(value)
            if text is None:
                return MISSING
            number = float(text) if PLAIN.fullmatch(text) else pl.Series([text]).cast(pl.Float64, strict=False)[0]
        if number is None or number != number:
            return UNKNOWN
        return bisect.bisect_right(self._edges, number) + FIRST


def as_text_of(value: Value) -> str | None:
    """Return a value as `ctrkit convert` reads it from a log: as text, whole numbers without a point; None:
    missing."""
    if value is None or value == "":
        return None
    if type(value) is str:
        return value
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        return str(int(value))
    return _as_polars_writes(value)


@functools.lru_cache(1 << 14, typed=True)
def _as_polars_writes(value: float | bool) -> str | None:
    series = pl.Series("x", [value])
    text: str | None = series.to_frame().select(as_text(series.dtype, "x")).item()
    return text
