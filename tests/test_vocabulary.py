from pathlib import Path

import polars as pl
import pytest

from ctrkit import vocabulary
from ctrkit.errors import UserError


def test_most_frequent_first_ties_by_value_and_rare_ones_left_out() -> None:
    counts = vocabulary.count_values(pl.Series(["b", "a", "c", "b", None, "a", "d"]))
    more = vocabulary.count_values(pl.Series([["c", "d"], [], None, ["d", "e"]]))
    built = vocabulary.build([counts, more], min_count=2)
    assert built.rows() == [("d", 2, 3), ("a", 3, 2), ("b", 4, 2), ("c", 5, 2)]
    assert built.schema == {"value": pl.String, "index": pl.UInt32, "count": pl.UInt64}
    assert vocabulary.size(built) == 6


def test_encode_missing_unknown_and_known() -> None:
    words = vocabulary.build([vocabulary.count_values(pl.Series(["x", "x", "y"]))], 1)
    assert vocabulary.encode(pl.Series("f", ["y", None, "z", "x"]), words).to_list() == [3, 0, 1, 2]
    lists = pl.Series("f", [["y", "x"], [], None, ["z"]])
    coded = vocabulary.encode(lists, words)
    assert coded.to_list() == [[3, 2], [], [], [1]]
    assert coded.dtype == pl.List(pl.UInt32)


def test_an_empty_vocabulary_knows_nothing() -> None:
    words = vocabulary.build([], 1)
    assert vocabulary.encode(pl.Series("f", ["y", None]), words).to_list() == [1, 0]
    assert vocabulary.encode(pl.Series("f", [["y"], []]), words).to_list() == [[1], []]


def test_a_vocabulary_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run ctrkit convert"):
        vocabulary.read(tmp_path, "goods")
