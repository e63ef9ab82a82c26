"""Texts → numbers on disk: the answers of a dictionary, one by one and joined."""

from pathlib import Path

import numpy as np
import pytest

from ctrkit import disk_tables
from ctrkit.disk_index import KEY, NOWHERE, DiskIndex, keys
from ctrkit.disk_tables import Sorter

QUERY = np.dtype([("key", KEY), ("number", ">i8")])


@pytest.mark.parametrize("run", [20, 1 << 17])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("n", [0, 1, 65, 3000])
def test_answers_are_those_of_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, last: bool, run: int
) -> None:
    monkeypatch.setattr(disk_tables, "RUN", run)
    rng = np.random.default_rng(n)
    texts = [f"p{i}é" for i in rng.integers(0, max(1, n // 2), n).tolist()]  # most of them several times
    index = DiskIndex(tmp_path, last=last)
    wanted: dict[str, int] = {}
    again = []
    for number, text in enumerate(texts):
        if text in wanted:
            again.append(number)
        if last or text not in wanted:
            wanted[text] = number
    for part in np.array_split(np.arange(n), 3):
        index.add([texts[i] for i in part.tolist()], part)
    told: list[int] = []
    index.finish(lambda numbers: told.extend(numbers.tolist()))
    assert sorted(told) == again
    assert len(index) == len(wanted)
    asked = [*dict.fromkeys(texts), *(f"q{i}" for i in range(50))]
    assert [index.find(text) for text in asked] == [wanted.get(text, NOWHERE) for text in asked]
    queries = Sorter(QUERY, tmp_path)
    asked += asked[:30]
    query = np.empty(len(asked), QUERY)
    query["key"], query["number"] = keys(asked), np.arange(len(asked))
    queries.add(query)
    found = {}
    for chunk, number in index.join(queries.sorted()):
        found.update(zip(chunk["number"].tolist(), number.tolist(), strict=True))
    assert [found[i] for i in range(len(asked))] == [wanted.get(text, NOWHERE) for text in asked]
