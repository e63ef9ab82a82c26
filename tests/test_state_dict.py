"""State dicts: what was saved is read, anything else is refused in a sentence."""

from pathlib import Path

import pytest
import torch

from ctrkit import state_dict
from ctrkit.errors import UserError


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_both_of_torchs_formats(tmp_path: Path, zipped: bool) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "s.pth", _use_new_zipfile_serialization=zipped)
    assert state_dict.read(tmp_path / "s.pth")["w"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"", b"<html>", b"broken", b"PK\x03\x04 half a zip"])
def test_foreign_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.pth").write_bytes(content)
    with pytest.raises(UserError, match="not a state dict that torch can load"):
        state_dict.read(tmp_path / "s.pth")


def test_anything_but_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "s.pth")
    with pytest.raises(UserError, match="does not map names to tensors"):
        state_dict.read(tmp_path / "s.pth")
    torch.save({"network": torch.nn.Linear(1, 1)}, tmp_path / "s.pth")
    with pytest.raises(UserError, match="not a state dict"):
        state_dict.read(tmp_path / "s.pth")
