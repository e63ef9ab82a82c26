"""State dicts: files of named tensors, and nothing that could run."""

import math
import mmap
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from ctrkit.errors import UserError

ROWS_AT_ONCE = 1 << 18


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict with `weights_only`, mapped into memory where the format allows: only what is used is read.

    Of a checkpoint that has a state dict under the key "state_dict" that one is returned; the "module." that
    DistributedDataParallel sets before every name is left out. Raises UserError for a file that is damaged, or holds
    anything else but named tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # torch's unpickler raises nearly anything on foreign bytes
        if isinstance(e, pickle.UnpicklingError):  # its text advises to run what the file says
            reason = "it holds other objects than tensors, or is no file of torch's at all. Save the network's "
            reason += "state_dict() alone, with torch.save"
        else:
            reason = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        raise UserError(f"{path} is not a state dict that torch can load: {reason}") from None
    if isinstance(state, dict) and _is_one(inner := state.get("state_dict")):
        state = inner
    if not _is_one(state):
        raise UserError(
            f"{path} is not a state dict: it does not map names to tensors, nor has it one under the key 'state_dict'. "
            "Save the network's state_dict() alone, with torch.save"
        )
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _is_one(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def is_finite(tensor: Tensor) -> bool:
    """Say whether all numbers are finite. Looks at some rows at a time, so that what is mapped need not fit into
    memory."""
    parts = torch.split(tensor, ROWS_AT_ONCE) if tensor.ndim else [tensor]
    return all(bool(torch.isfinite(part).all()) for part in parts)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors detached and on the CPU, none as a part of a larger storage, which would be written whole.

    Nothing is copied that need not be.
    """
    out = {}
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        whole = there.untyped_storage().nbytes() == there.numel() * there.element_size()
        out[name] = there if whole else there.clone()
    return out


def write(path: Path, value: Mapping[str, Any]) -> str:
    """Write what `torch.load` reads; return the file's digest, as `ctrkit.digests` computes it.

    Raises OSError where it cannot be written, which torch hides in a RuntimeError.
    """
    with open(path, "wb") as f:
        digesting = _Digesting(f)
        try:
            torch.save(value, digesting)  # type: ignore[arg-type]
        except RuntimeError as e:
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise
    return digesting.digest.hexdigest()


def mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """Return a tensor of zeros that lies in a nameless file, not in memory, until nobody has it any more.

    folder: with room for it; default: that of temporary files. Raises OSError where there is none.
    """
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as f:
        os.posix_fallocate(f.fileno(), 0, size)  # so that a full disk is an error now, and no fault later
        return torch.frombuffer(mmap.mmap(f.fileno(), size), dtype=dtype).view(shape)


class _Digesting:
    """Writes to a file, and keeps the digest of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
