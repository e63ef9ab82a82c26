"""Texts on disk behave as a list of them, and are sorted as a list is."""

from pathlib import Path

import numpy as np
import pytest

from ctrkit import disk_texts
from ctrkit.disk_texts import AT_ONCE, Texts, sorted_texts

ODD = ["", "é", "e\0", "e", "\udce9.png", "\U0001f600", "￮", "a" * 300]


def test_it_is_a_sequence_of_texts() -> None:
    texts = [f"é-{i}" for i in range(AT_ONCE + 3)] + ODD
    held = Texts(texts[:10])
    held.extend(texts[10:])
    assert len(held) == len(texts)
    assert list(held) == texts
    assert (held[0], held[-1]) == (texts[0], texts[-1])
    assert held[5:9] == texts[5:9]
    assert held[9:5] == []
    assert texts[7] in held
    with pytest.raises(IndexError):
        held[len(texts)]
    assert list(Texts()) == []
    assert not Texts()


@pytest.mark.parametrize("n", [0, 1, 10, 11, 500])
def test_sort_is_that_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(disk_texts, "RUN", 10)
    monkeypatch.setattr(disk_texts, "LEAST_BLOCK", 3)
    texts = [ODD[i % len(ODD)] + str(i % 97) for i in np.random.default_rng(n).permutation(n).tolist()]
    assert list(sorted_texts(iter(texts), tmp_path)) == sorted(texts)
