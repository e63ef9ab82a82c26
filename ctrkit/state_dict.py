"""State dicts: files of named tensors, and nothing that could run."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from ctrkit.errors import UserError


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
