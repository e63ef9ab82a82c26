"""Loops that Numba compiles, once for a machine; where Numba is not installed, what needs them goes another way."""

import contextlib
import fcntl
import functools
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
PATIENCE = 60.0
"""Seconds to wait for another process that compiles."""


@functools.cache
def load(module: str) -> ModuleType | None:
    """Return a module of compiled functions; None where Numba is not installed, does not work or is told not to compile
    (NUMBA_DISABLE_JIT)."""
    try:
        import numba
    except ImportError:
        return None
    if getattr(numba.config, "DISABLE_JIT", 0):
        return None
    with _one_at_a_time(), _without_linear_algebra():
        return importlib.import_module(module)


@contextlib.contextmanager
def _without_linear_algebra() -> Iterator[None]:
    """Have imports of scipy.linalg fail: Numba looks for it, which no loop here uses, and it takes 0.2 s."""
    if "scipy.linalg" in sys.modules:
        yield
        return
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["scipy.linalg"]


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Have one process at a time compile, so that the others find what it made; unless that takes too long."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            lock = os.open(Path(tempfile.gettempdir(), f"ctrkit-compile-{os.getuid()}.lock"), flags, 0o600)
            held.callback(os.close, lock)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.02)
        yield


def compiled(*signatures: Any) -> Callable[[F], F]:
    """Compile a function for these types, or load what was compiled before.

    Numba keeps it beside this file, or where that cannot be written in the user's cache (or NUMBA_CACHE_DIR); where
    there is no such place either, every process compiles for itself.
    """

    return _decorator(list(signatures))


def read(dtype: Any) -> Any:
    """Return the type of an array [n] that a function only reads; it then takes arrays that cannot be written, too."""
    from numba import types

    return types.Array(dtype, 1, "C", readonly=True)


def compiled_as_called(*fastmath: str) -> Callable[[F], F]:
    """Compile a function for the types that it is called with, when it first is, or load what was compiled before.

    Multiplications and additions may fuse; `fastmath` names what else may be done to floating-point arithmetic.
    """
    return _decorator(None, fastmath={"contract", *fastmath}, error_model="numpy")


def _decorator(signatures: list[str] | None, **options: Any) -> Callable[[F], F]:
    import numba

    def decorate(function: F) -> F:
        try:
            made: Any = numba.njit(signatures, cache=True, nogil=True, boundscheck=False, **options)(function)
        except RuntimeError:
            made = numba.njit(signatures, nogil=True, boundscheck=False, **options)(function)
        return cast(F, made)

    return decorate
