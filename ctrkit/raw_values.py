"""Raw values of a request to the indexes that `ctrkit convert` would have given them: 0 missing, 1 unknown, 2… values.

By dictionaries and bisection, a column of few values at a time; what polars does with odd values, polars does here too.
"""

import bisect
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import xxhash

from ctrkit import vocabulary
from ctrkit.known_texts import Known, finder
from ctrkit.recipe import Feature
from ctrkit.tables import as_text
from ctrkit.vocabulary import FIRST, MISSING, UNKNOWN

Value = str | int | float | bool | None
Shared = dict[tuple[str, bool], Known]
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
    shared: what other indexers of the folder have read; features of one vocabulary share it.
    """

    def __init__(self, feature: Feature, vocab: Path, shared: "Shared | None" = None) -> None:
        self.feature = feature
        self._known: Known | None = None
        """Where values are looked up by their texts; what is unknown may be so only since it is no text."""
        if feature.hash_buckets:
            pass
        elif feature.kind == "number":
            table = vocabulary.read(vocab, feature.vocab)
            self._edges = [float(text.rpartition("< ")[2]) for text in table["value"][:-1]]
        else:
            shared = {} if shared is None else shared
            of = feature.vocab, feature.multi_hot
            if of not in shared:
                table = vocabulary.read(vocab, feature.vocab)
                texts = [*table["value"].to_list(), None, ""]
                index = [*table["index"].to_list(), MISSING, MISSING]
                shared[of] = finder(texts, index, UNKNOWN, at_once=not feature.multi_hot)
            self._known = shared[of]

    def index(self, value: Value) -> int:
        """Return the index of one value."""
        return self._known.number(value) if self._known is not None and type(value) is str else self.one([value])[0]

    def one(self, values: Sequence[Value]) -> list[int]:
        """Return the index of each value."""
        if self.feature.kind == "number":
            return [self._bucket(value) for value in values]
        if self._known is not None:
            found = self._known.numbers(values)
            if UNKNOWN not in found or TEXTS.issuperset(map(type, values)):
                return found
        texts = [value if type(value) is str else as_text_of(value) for value in values]
        index = iter(self._find([text for text in texts if text]))
        return [next(index) if text else MISSING for text in texts]

    def many(self, value: Value | list[Value]) -> list[int]:
        """Return the indexes of a multi-hot feature's values, a list or text that is split at the separator."""
        if isinstance(value, list):
            texts = [as_text_of(v) for v in value]
        else:
            text = as_text_of(value)
            texts = [] if text is None else list(text.split(self.feature.separator))
        return self._find([text for text in texts if text])

    def _find(self, texts: list[str]) -> list[int]:
        if self._known is not None:
            return self._known.numbers(texts)
        buckets = self.feature.hash_buckets
        return [FIRST + xxhash.xxh64_intdigest(text.encode()) % buckets for text in texts]

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
