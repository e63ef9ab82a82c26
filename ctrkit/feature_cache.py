"""Picture features larger than memory: the rows that are used most on the device, the next ones in the host's memory,
the rest on the disk.

Rows of features.h5 are in order of use, most first, so what is held is a prefix: of all rows or, where they are spread
over ranks, of those that lie on this one. What is held changes no bit of what is read.

Letters: N rows that are read, W width.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from torch import Tensor

from ctrkit.features import FeatureStore, gather

GIB = 1 << 30
HOST_BYTES = 4 * GIB
"""Of host memory, where nobody says how much."""
LEVELS = ("device", "host", "disk")
FILL_BYTES = 32 << 20
"""Bytes of rows that are read at a time to fill a cache."""


@dataclass
class Use:
    """How one level was used."""

    rows_held: int = 0
    rows_asked: int = 0
    """Of the level: those that no level before it held."""
    rows_found: int = 0
    """Those of them that it held."""
    bytes_read: int = 0
    """Of the rows found."""


@dataclass
class Uses:
    """How the rows of pictures were read, since the cache was made."""

    levels: dict[str, Use] = field(default_factory=dict)
    """Level → its use, in the order in which they are asked."""
    seconds_reading: float = 0.0
    """That reading took, mostly while a batch before was trained on."""
    seconds_waited: float = 0.0
    """Of these, those in which training or validation stood still."""

    @classmethod
    def of_ranks(cls, uses: Sequence["Uses"]) -> "Uses":
        """Return the sums over ranks; of the seconds those of the rank with the most."""
        out = cls()
        for name in uses[0].levels:
            each = [asdict(of_rank.levels[name]) for of_rank in uses]
            out.levels[name] = Use(**{key: sum(use[key] for use in each) for key in each[0]})
        out.seconds_reading = max(of_rank.seconds_reading for of_rank in uses)
        out.seconds_waited = max(of_rank.seconds_waited for of_rank in uses)
        return out

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return sum(use.rows_found for use in self.levels.values())

    @property
    def from_disk(self) -> int:
        """Rows that were read from the disk."""
        return self.levels["disk"].rows_found if self.levels else 0

    def counts(self) -> dict[str, Any]:
        """Return all of it for a sidecar."""
        levels: dict[str, Any] = {
            name: {key.replace("_", " "): n for key, n in asdict(use).items()} for name, use in self.levels.items()
        }
        seconds = {"reading": self.seconds_reading, "waited": self.seconds_waited}
        return levels | {f"seconds {name}": round(value, 3) for name, value in seconds.items()}

    def table(self) -> Table:
        """Return the levels as a table; of a device only where it holds rows."""
        out = Table("features on", title="Pictures that batches looked at")
        for title in ("rows held", "rows asked", "hit rate", "GB read"):
            out.add_column(title, justify="right")
        for name, use in self.levels.items():
            if name == "device" and not use.rows_held:
                continue
            rate = f"{use.rows_found / use.rows_asked:.1%}" if use.rows_asked else "–"
            cells = f"{use.rows_held:,}", f"{use.rows_asked:,}", rate, f"{use.bytes_read / 1e9:,.3f}"
            out.add_row(name, *cells)
        return out

    def told(self) -> str:
        """Say how long it took."""
        took, waited = f"{self.seconds_reading:,.1f} s", f"{self.seconds_waited:,.1f} s"
        return f"reading picture features took {took}, and training waited {waited} of them for it"


class FeatureCache:
    """Reads rows of a features.h5 as tensors on a device. It is filled when it is first asked; threads may share it.

    Parameters
    ----------
    store: the file.
    host_bytes: as many of the rows that are used most as fit into so many bytes are held in the host's memory, behind
        those on the device.
    device_bytes: likewise on the device.
    device: on which rows are wanted. To a GPU they go as they lie in the file, from page-locked memory.
    share: (first, step): which rows are this process's, first, first + step, …; no others can be read.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        host_bytes: int = HOST_BYTES,
        device_bytes: int = 0,
        device: str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.store, self.share = store, share
        self.host_bytes, self.device_bytes, self.device = host_bytes, device_bytes, torch.device(device)
        self._held: tuple[Tensor, Tensor] | None = None
        self._filling, self._counting = threading.Lock(), threading.Lock()
        self._uses = Uses({name: Use() for name in LEVELS})
        self._read: deque[tuple[float, float]] = deque()
        """Beginning and end of reads that nobody has been found to wait for yet."""

    def prefetch(self, row_N: npt.NDArray[np.int64]) -> None:
        """Start to read what is not held of rows as `read` takes them, and return at once."""
        self.store.prefetch(row_N[np.searchsorted(self._place(row_N), sum(map(len, self._levels()))) :])

    def read(self, row_N: npt.NDArray[np.int64]) -> Tensor:
        """Return [N, W] float32 on the device: the vectors of rows, which rise. Zeros for −1, which may come first.

        Raises ValueError for a row that is not this process's.
        """
        begun = time.monotonic()
        device_HW, host_HW = self._levels()
        on_device, on_host = len(device_HW), len(host_HW)
        place_N = self._place(row_N)
        none, first, beyond = np.searchsorted(place_N, [0, on_device, on_device + on_host]).tolist()
        on_cpu = self.device.type == "cpu"
        out_NW = self._empty(len(row_N), "float32", self.device)
        out_NW[:none] = 0
        out_NW[none:first] = device_HW.index_select(0, torch.from_numpy(place_N[none:first]).to(self.device))
        read = out_NW[first:] if on_cpu else self._empty(len(row_N) - first, pinned=True)
        rest = read.numpy()
        from_host = place_N[first:beyond] - on_device
        gather([host_HW.numpy()], np.zeros_like(from_host), from_host, rest[: len(from_host)])
        self.store.read(row_N[beyond:], rest[len(from_host) :])
        if not on_cpu:
            out_NW[first:] = read.to(self.device, non_blocking=True)
        self._count([first - none, beyond - first, len(row_N) - beyond], begun)
        return out_NW

    def waited(self, since: float, until: float) -> None:
        """Count that training stood still between two readings of `time.monotonic`, for features as far as they were
        being read."""
        with self._counting:
            for begun, ended in self._read:
                self._uses.seconds_waited += max(0.0, min(ended, until) - max(begun, since))
            self._read.clear()

    def uses(self) -> Uses:
        """Return a copy of what was counted so far."""
        with self._counting:
            levels = {name: Use(**asdict(use)) for name, use in self._uses.levels.items()}
            return Uses(levels, self._uses.seconds_reading, self._uses.seconds_waited)

    def _place(self, row_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the place of each row among this process's; negative for −1."""
        first, step = self.share
        place_N, other_N = np.divmod(row_N - first, step)
        if other_N[row_N >= 0].any():
            raise ValueError(f"rows are asked of a process that has only every {step}th, from {first} on")
        return np.where(row_N < 0, -1, place_N)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Return the rows on the device and those in the host's memory, read if need be."""
        with self._filling:
            if self._held is None:
                first, step = self.share
                own = np.arange(first, self.store.rows, step)
                row_bytes = max(1, self.store.width * self.store.dtype.itemsize)
                on_device = min(len(own), self.device_bytes // row_bytes)
                beyond = min(len(own), on_device + self.host_bytes // row_bytes)
                self._held = (
                    self._filled(own[:on_device], self._empty(on_device, device=self.device)),
                    self._filled(own[on_device:beyond], self._empty(beyond - on_device)),
                )
                for name, held in zip(LEVELS, (on_device, beyond - on_device, len(own) - beyond), strict=True):
                    self._uses.levels[name].rows_held = held
            return self._held

    def _filled(self, rows: npt.NDArray[np.int64], out_HW: Tensor) -> Tensor:
        """Read rows into a tensor, some at a time, and return it."""
        some = max(1, FILL_BYTES // max(1, out_HW[:1].nbytes))
        for begin in range(0, len(rows), some):
            part = rows[begin : begin + some]
            if out_HW.device.type == "cpu":
                self.store.read(part, out_HW[begin : begin + some].numpy())
            else:
                read = self._empty(len(part))
                self.store.read(part, read.numpy())
                out_HW[begin : begin + some] = read.to(out_HW.device)
        return out_HW

    def _empty(self, rows: int, dtype: str = "", device: torch.device | str = "cpu", *, pinned: bool = False) -> Tensor:
        """Return room for rows, as they lie in the file or in another dtype."""
        shape, dtype = (rows, self.store.width), dtype or self.store.dtype.name
        if torch.device(device).type == "cpu" and not pinned:
            return torch.from_numpy(np.empty(shape, dtype))  # numpy asks for huge pages, which are sooner there
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device, pin_memory=pinned)

    def _count(self, found: Sequence[int], begun: float) -> None:
        """Count a read: the rows of each level, and its time."""
        ended = time.monotonic()
        row_bytes = self.store.width * self.store.dtype.itemsize
        asked = sum(found)
        with self._counting:
            for name, rows in zip(LEVELS, found, strict=True):
                use = self._uses.levels[name]
                use.rows_asked += asked
                use.rows_found += rows
                use.bytes_read += rows * row_bytes
                asked -= rows
            self._uses.seconds_reading += ended - begun
            self._read.append((begun, ended))
