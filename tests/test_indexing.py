from collections import Counter

import numpy as np
import pytest

from ctrkit import indexing, numba_loops


@pytest.mark.parametrize("rows", [0, 1, 100, 20_000])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("loops", [True, False])
def test_codes_are_counted(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: type, loops: bool) -> None:
    if not loops:
        monkeypatch.setattr(numba_loops, "load", lambda module: None)
    codes = np.random.default_rng(rows).integers(0, 250, rows).astype(dtype)
    codes.flags.writeable = False  # as those of mapped files
    counts = np.full(300, 7, np.uint32)
    indexing.add_counts(codes, counts)
    expected = Counter(codes.tolist())
    assert counts.tolist() == [7 + expected[code] for code in range(300)]


@pytest.mark.parametrize("days", ["", "0", "1", "0011", "1100", "0110", "1011", "0101"])
def test_chosen_rows_are_a_slice_if_they_are_one_run(days: str) -> None:
    chosen = np.array([day == "1" for day in days], bool)
    rows = indexing._rows(chosen)
    assert isinstance(rows, slice) == (days in ("", "0", "1", "0011", "1100", "0110"))
    values = np.arange(len(days))
    assert values[rows].tolist() == [i for i, day in enumerate(days) if day == "1"]
