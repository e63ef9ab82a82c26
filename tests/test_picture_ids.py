"""Ids of pictures behave as a list of texts."""

import polars as pl
import pytest

from ctrkit.picture_ids import AT_ONCE, PictureIds


def test_it_is_a_sequence_of_texts() -> None:
    texts = [f"é-{i}" for i in range(AT_ONCE + 3)]
    ids = PictureIds(pl.Series(texts))
    assert len(ids) == len(texts)
    assert list(ids) == texts
    assert (ids[0], ids[-1]) == (texts[0], texts[-1])
    assert list(ids[5:9]) == texts[5:9]
    assert texts[7] in ids
    with pytest.raises(IndexError):
        ids[len(texts)]
    assert list(PictureIds([])) == []
    assert not PictureIds([])
