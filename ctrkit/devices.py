"""Where tensors live: the names of devices, and a lock so that two stages never share a GPU."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ctrkit.errors import UsageError
from ctrkit.progress import say


def resolve(name: str, setting: str = "device") -> str:
    """Return torch's name of a device; "auto" is "cuda" where there is a GPU, else "cpu".

    `setting` is the recipe key that gave the name, for the UsageError about one that is not a device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{setting} = {name!r} is not a device; use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{setting} = {name!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{setting} = {name!r}, but torch finds {torch.cuda.device_count()} GPU(s) here, from cuda:0")
    return str(device)


@contextlib.contextmanager
def lock(device: str) -> Iterator[None]:
    """Hold a GPU for the block, waiting for the stage of this user that holds it. A CPU is shared."""
    where = torch.device(device)
    if where.type != "cuda":
        yield
        return
    with open(lock_file(str(torch.cuda.get_device_properties(where).uuid)), "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for the GPU ({device}), which another stage is using")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def lock_file(uuid: str) -> Path:
    """Return the file that stands for a GPU of this machine; it stays, empty."""
    return Path(tempfile.gettempdir(), f"ctrkit-{os.getuid()}-gpu-{uuid}.lock")
