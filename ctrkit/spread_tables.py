"""ID tables that are spread over ranks, on disk: each rank writes its rows, and any number of ranks reads them.

The folder is one of torch.distributed.checkpoint: a file a rank, and `.metadata`. Row i of a matrix lies on rank i mod
W, which its contiguous shards cannot say, so each rank's rows are a tensor of their own: `NAME.RofW` [1 + rows, D],
whose row 1 + k is row R + k·W of the matrix NAME; row 0 is padding. Who reads them takes what is his, one such tensor
at a time: nobody has ever a whole matrix that is spread.
"""

import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ctrkit import digests
from ctrkit.embedding import Table
from ctrkit.errors import UserError
from ctrkit.ranks import Ranks, ToldByFirst

ROWS_AT_ONCE = 1 << 18
Matrices = Mapping[str, tuple[Table, str]]
"""Name → the table, and which of its matrices: `weight_VD`, `m_VD`, `v_VD`."""
_NAME = re.compile(r"(.+)\.(\d+)of(\d+)")


def write(ranks: Ranks, matrices: Matrices, folder: Path | None = None) -> dict[str, tuple[int, str]]:
    """Write matrices of spread tables into a folder, which rank 0 names; each rank writes its share.

    A collective. Returns file → (bytes, digest) at rank 0. There raises OSError where some rank cannot write.
    """
    folder = ranks.tell(folder)
    own = {f"{name}.{t.rank}of{t.ranks}": getattr(t, matrix) for name, (t, matrix) in matrices.items()}
    try:
        save(own, storage_writer=_Writer(folder))
    except CheckpointException as e:
        if ranks.rank:
            raise ToldByFirst from None
        raise _cause(e) from None
    mine = [*folder.glob(f"__{ranks.rank}_*"), *([folder / ".metadata"] if ranks.rank == 0 else [])]
    found: dict[str, tuple[int, str]] = {}
    for files in ranks.gather({path.name: (path.stat().st_size, digests.Digests().of(path)) for path in mine}):
        found |= files
    return found


def read(folder: Path, matrices: Matrices) -> None:
    """Set matrices to what a folder has of them: those of whole tables, or of spread ones what lies here.

    Raises UserError for a folder that is damaged, or lacks rows of a matrix.
    """
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    rows: Counter[str] = Counter()
    for key, tensor in stored.items():
        named = _NAME.fullmatch(key)
        if named is None or named[1] not in matrices or not isinstance(tensor, TensorStorageMetadata):
            continue
        table, matrix = matrices[named[1]]
        rank, count = int(named[2]), int(named[3])
        rows[named[1]] += tensor.size[0] - 1
        if (rank - table.rank) % math.gcd(count, table.ranks):
            continue  # none of its rows lies here
        share_nD = _load(reader, key, tensor)[1:]
        for start in range(0, len(share_nD), ROWS_AT_ONCE):
            some_nD = share_nD[start : start + ROWS_AT_ONCE]
            table.put(matrix, rank + count * torch.arange(start, start + len(some_nD)), some_nD)
    for name, (table, _) in matrices.items():
        if rows[name] != table.n_rows:
            raise UserError(f"{folder} has {rows[name]:,} of the {table.n_rows:,} rows of {name!r}: it is damaged")


def _load(reader: "_Reader", key: str, stored: TensorStorageMetadata) -> torch.Tensor:
    wanted = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        try:
            load(wanted, storage_reader=reader, no_dist=True)
        except CheckpointException as e:
            raise _cause(e) from None
    return wanted[key]


class _Writer(FileSystemWriter):
    """Writes nothing that differs from run to run, and raises the system's own errors."""

    def storage_meta(self) -> StorageMeta | None:
        return None  # path and a random id

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as e:
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise


class _Reader(FileSystemReader):
    """Reads `.metadata`, a pickle, once and without running what it says; torch itself reads tensors `weights_only`."""

    _read: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is None:
            path = Path(self.path, ".metadata")
            try:
                with open(path, "rb") as f:
                    found = _Unpickler(f).load()
                if not isinstance(found, Metadata):
                    raise pickle.UnpicklingError
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError):
                raise UserError(f"{path} is not what torch.distributed.checkpoint wrote") from None
            found.storage_meta = StorageMeta(load_id=self.load_id)
            self._read = found
        return self._read


class _Unpickler(pickle.Unpickler):
    """Makes what a checkpoint's metadata consist of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
}


def _cause(error: CheckpointException) -> BaseException:
    """Return the first rank's error."""
    return min(error.failures.items())[1][0]
