"""The row groups of a Parquet file, from its footer alone: what polars does not tell.

The footer is a Thrift struct in compact protocol. Only what leads to the rows of each row group is read.
"""

from pathlib import Path
from typing import Any

from ctrkit.errors import UserError

MAGIC = b"PAR1"
# Thrift compact protocol: types of fields.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


def row_groups(path: Path) -> list[int]:
    """Return the number of rows of each row group."""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(max(0, size - 8))
        tail = f.read(8)
        length = int.from_bytes(tail[:4], "little")
        if size < 12 or tail[4:] != MAGIC or length > size - 12:
            raise UserError(f"{path} is not a whole Parquet file")
        f.seek(size - 8 - length)
        footer = f.read(length)
    try:
        groups = _Reader(footer).struct()[4]  # FileMetaData.row_groups
        return [int(group[3]) for group in groups]  # RowGroup.num_rows
    except (IndexError, KeyError, TypeError, ValueError, MemoryError, RecursionError):
        raise UserError(f"{path} is not a whole Parquet file: its footer is damaged") from None


def thrift_struct(data: bytes) -> tuple[dict[int, Any], int]:
    """Read the struct with which `data` begins: {field number: value}, and its length. Raises IndexError if `data` is
    too short."""
    reader = _Reader(data)
    return reader.struct(), reader.at


class _Reader:
    """Reads Thrift compact values: a struct becomes {field number: value}, a list or set a list."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> dict[int, Any]:
        """Read a struct."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            kind = head & 15
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind == STRUCT:
            return self.struct()
        if kind == BINARY:
            length = self._varint()
            self.at += length
            return self.data[self.at - length : self.at]
        if kind in (LIST, SET):
            head = self._byte()
            length = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(length)]
        if kind == MAP:
            length = self._varint()
            kinds = self._byte() if length else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(length)]
        if kind == DOUBLE:
            self.at += 8
            return None
        return self._byte() if kind in (TRUE, FALSE, BYTE) else self._zigzag()
