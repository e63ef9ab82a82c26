"""Where tensors live: the names of devices, and a lock so that two stages never share a GPU."""

import contextlib
import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ctrkit.errors import UsageError, UserError
from ctrkit.progress import say
from ctrkit.ranks import Ranks


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
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{setting} = {name!r} is not supported; use 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{setting} = {name!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{setting} = {name!r}, but torch finds {torch.cuda.device_count()} GPU(s) here, from cuda:0")
    return str(device)


def of_rank(name: str, setting: str, ranks: Ranks) -> str:
    """Return torch's name of the device of one of several ranks: of GPUs that of its number on this machine."""
    device = resolve(name, setting)
    if device != "cuda" or ranks.count == 1:
        return device
    device = resolve(f"cuda:{ranks.local_rank}", f"rank {ranks.rank}: {setting}")
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def memory_told(mend: str) -> Iterator[None]:
    """Within the block, make of an error about memory that is not there the user's, which ends with what mends it."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = (str(e).splitlines() or [""])[0]
        if not isinstance(e, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise UserError(f"there is not enough memory: {text.rpartition('] ')[2] or 'none is left'}. {mend}") from None


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


def set_up(device: str, threads: int) -> None:
    """Set this process up for training: threads, bits that do not change from run to run on the CPU, memory kept."""
    import torch

    torch.set_num_threads(threads)
    # As torch.use_deterministic_algorithms, which imports torch's compiler too: see `ctrkit.compiling`.
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
    # Nobody reads memory before it is written, so filling it is for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_memory()


def _keep_memory() -> None:
    """Tell glibc not to give memory back between steps: each page of it costs a fault when it is used again."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 25)  # 32 MiB, the most that glibc takes
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
