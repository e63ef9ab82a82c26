"""Thrift's compact protocol, written: the structs that Parquet describes its pages and columns with.

`ctrkit.parquet_footer` reads them.
"""

from collections.abc import Sequence
from typing import Any

TRUE, FALSE, I32, I64, BINARY, LIST, STRUCT = 1, 2, 5, 6, 8, 9, 12
"""Types of fields."""
BYTES = [bytes([i]) for i in range(128)]


def struct(*fields: tuple[int, int, Any]) -> bytes:
    """Encode a struct.

    fields: number, type and value, by number. The value of a BINARY is bytes, of a STRUCT or a LIST an encoded one.
    """
    out = bytearray()
    last = 0
    for number, kind, value in fields:
        out.append(number - last << 4 | kind)
        out += _value(kind, value)
        last = number
    out.append(0)
    return bytes(out)


def items(kind: int, values: Sequence[Any]) -> bytes:
    """Encode a list of values of one type."""
    head = bytes([len(values) << 4 | kind]) if len(values) < 15 else bytes([0xF0 | kind]) + varint(len(values))
    return head + b"".join(_value(kind, v) for v in values)


def varint(number: int) -> bytes:
    """Encode a whole number from 0: seven bits a byte, the lowest first; the last byte is below 128."""
    if number < 128:
        return BYTES[number]
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _value(kind: int, value: Any) -> bytes:
    if kind in (I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return varint(len(value)) + bytes(value)
    return bytes(value)
