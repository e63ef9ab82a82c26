"""A file that cannot be written is an OSError, not a crash."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from ctrkit import hdf5


def test_what_is_written_is_there(tmp_path: Path) -> None:
    with hdf5.create(tmp_path / "it.h5") as (h5, below):
        h5.create_dataset("features", (1000, 8), np.float16)[100:200] = np.ones((100, 8))
        below.check()
        h5.attrs["name"] = "it"
    with h5py.File(tmp_path / "it.h5") as h5:
        assert (h5["features"][:].sum(), h5.attrs["name"]) == (800, "it")
        assert h5["features"].id.get_offset() > 0  # in one piece, so that it can be mapped


FULL = """
import resource, sys
import numpy as np
from ctrkit import hdf5
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    with hdf5.create(sys.argv[1]) as (h5, below):
        features = h5.create_dataset("features", (1000, 8), np.float16)
        for row in range(1000):
            features[row] = row
        print("to the end")
except OSError as e:
    print(e.strerror)
"""


@pytest.mark.parametrize("limit", [100, 9000, 17_000])
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, limit: int) -> None:
    words = [sys.executable, "-c", FULL, tmp_path / "it.h5", str(limit)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["to the end", "File too large", ""]


def test_an_error_of_the_block_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hdf5.create(tmp_path / "it.h5"):
        print(1 / 0)
