"""State dicts: files of named tensors, and nothing that could run."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ctrkit.errors import UserError


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict with `weights_only`, mapped into memory where the format allows: only what is used is read.

    Raises UserError for a file that is damaged, or holds anything but named tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # torch's unpickler raises nearly anything on foreign bytes
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"{path} is not a state dict that torch can load: {type(e).__name__}: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict: it does not map names to tensors")
    return state
