"""Loops over the bytes of CSV text, compiled by Numba once for a machine.
A *cell* is eight bytes that stand for its text: a text of up to 7 bytes itself, its length in the highest byte; of a
longer one the highest bit, 31 bits of length and 32 of where it begins in the data. 0 is an empty cell.

Data are followed by at least eight bytes that are no part of them.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ctrkit.numba_loops import compiled
from ctrkit.spool import Ints

_intrinsic: Any = intrinsic
_inline: Any = numba.njit(inline="always")
SKIP, CELL, TIME, DWELL = range(4)
"""What becomes of a column: nothing, cells, times, durations."""
BREAK = np.uint8(10)
ONES, HIGH = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
LONG = np.uint64(1 << 63)
LENGTH, PLACE = np.uint64(0x7FFFFFFF), np.uint64(0xFFFFFFFF)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
P1, P2, P3, P4, P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)
"""Of xxHash64."""
EIGHT, ONE, ZERO = np.uint64(8), np.uint64(1), np.uint64(0)
ZEROS, TEN_OR_MORE = np.uint64(0x3030303030303030), np.uint64(0x7676767676767676)
AHEAD = 16
"""Cells after which a place of the table will be needed."""
BLOCK, EMPTY = 64, -2
"""Cells that are looked at together, and what stands for an empty one among them."""
DIGITS = 15
"""That a float holds exactly."""
WHOLE_DIGITS = 18
"""That 64 bits hold for sure."""


@_intrinsic
def _load(typing: Any, data: Any, at: Any) -> Any:
    """Return eight bytes as a number, wherever they lie."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [args[1]])
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(data, types.int64), generate


@_intrinsic
def _trailing_zeros(typing: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@_intrinsic
def _prefetch(typing: Any, table: Any, at: Any) -> Any:
    """Have the processor fetch a place of an array that will be needed soon."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, flag, flag, flag])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(fetch, [place, *(ir.Constant(flag, i) for i in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(table, types.int64), generate


@_inline
def _marks(eight: Any, separators: Any, breaks: Any) -> Any:
    """Return a number whose lowest bit tells the first separator or line break of eight bytes; 0: none."""
    a, b = eight ^ separators, eight ^ breaks
    return (((a - ONES) & ~a) | ((b - ONES) & ~b)) & HIGH


@_inline
def _decimal(data: Any, begin: Any, end: Any) -> Any:
    """Return the value of "12" or "12.5" as a Float64, −1 if it is written otherwise or has too many digits."""
    number, scale = np.int64(0), np.int64(0)
    digits = end - begin
    for at in range(begin, end):
        digit = np.int64(data[at]) - 48
        if 0 <= digit < 10:
            number = number * 10 + digit
            scale *= 10
        elif digit == -2 and scale == 0 and begin < at < end - 1:
            scale = np.int64(1)
            digits -= 1
        else:
            return -1.0
        if at - begin > DIGITS:
            return -1.0
    if digits > DIGITS:
        return -1.0
    return float(number) / float(scale) if scale else float(number)


@_inline
def _rounded(x: Any) -> Any:
    """Return a positive number rounded, halves to the even one."""
    low = np.floor(x)
    whole = np.int64(low)
    if x - low > 0.5 or (x - low == 0.5 and whole & 1):
        whole += 1
    return whole


@compiled(
    "Tuple((i8,i8,i8,i8))(u1[::1],i8,i8,u1,u1[::1],i8[::1],b1[::1],i8,i8,i8,u8[:,::1],i8[::1],i8[::1],u4[::1],u4[:,::1],i8)"
)
def cut_cells(
    data: Any,
    size: Any,
    at: Any,
    separator: Any,
    kinds: Any,
    targets: Any,
    needed: Any,
    unit: Any,
    latest: Any,
    longest: Any,
    cells: Any,
    times: Any,
    dwells: Any,
    rows: Any,
    odd: Any,
    row: Any,
) -> tuple[int, int, int, int]:
    """Cut rows of text into cells until the arrays are full; no cell is quoted.

    Parameters
    ----------
    data: UInt8; `at` is where the first row begins, `size` behind the last line break.
    kinds, targets, needed: of each column of the file, what becomes of it, its row of `cells`, and whether it must not
        be empty.
    unit: milliseconds of a time's unit; times must not be above `latest` (milliseconds), dwells above `longest` are not
        known.
    cells: UInt64 [columns, room], zero.
    times, dwells: Int64 [room], milliseconds; dwells from 1, 0 where not known.
    rows: UInt32 [room], the number in the text of each row that was cut.
    odd: UInt32 [3, room], the number, begin and end of each row that was left out: needed cells are empty, cells are
        too many, a number is not written as usual.
    row: the number of the first row.

    Returns where it ended, how many rows were cut, how many left out, and the number of the next one.
    """
    width, room = len(kinds), len(rows)
    separators, breaks = ONES * np.uint64(separator), ONES * np.uint64(BREAK)
    must = 0
    for column in range(width):
        must += needed[column]
    n = left_out = 0
    while at < size and n < room and left_out < room:
        begin, column, good, there = at, 0, True, 0
        dwells[n] = 0
        while True:
            eight = _load(data, at)
            marks = _marks(eight, separators, breaks)
            if marks:
                length = _trailing_zeros(marks) >> np.uint64(3)
                end = at + np.int64(length)
                cell = (eight & ((ONE << (length << np.uint64(3))) - ONE)) | (length << np.uint64(56))
            else:
                end = at + 8
                marks = _marks(_load(data, end), separators, breaks)
                while not marks:
                    end += 8
                    marks = _marks(_load(data, end), separators, breaks)
                end += np.int64(_trailing_zeros(marks) >> np.uint64(3))
                cell = LONG | (np.uint64(end - at) << np.uint64(32)) | np.uint64(at)
            if column < width:
                kind = kinds[column]
                if end > at:
                    there += needed[column]
                    if kind == CELL:
                        cells[targets[column], n] = cell
                    elif kind == TIME:
                        value = _decimal(data, at, end) * unit
                        if value < 0 or value > latest:
                            good = False
                        else:
                            times[n] = _rounded(value)
                    elif kind == DWELL:
                        value = _decimal(data, at, end) * 1000
                        if value < 0:
                            good = False
                        elif value <= longest:
                            dwells[n] = _rounded(value) + 1
                elif kind == CELL:
                    cells[targets[column], n] = ZERO
            elif column == width and end > at:
                good = False
            column += 1
            at = end + 1
            if data[end] == BREAK:
                break
        if good and there == must:
            for empty in range(column, width):
                if kinds[empty] == CELL:
                    cells[targets[empty], n] = ZERO
            rows[n] = row
            n += 1
        else:
            odd[0, left_out], odd[1, left_out], odd[2, left_out] = row, begin, at
            left_out += 1
        row += 1
    return at, n, left_out, row


@_inline
def _hash(cell: Any, data: Any) -> Any:
    """Return a number whose highest bits differ for different texts, most likely."""
    if not cell & LONG:
        return (cell ^ (cell >> np.uint64(29))) * GOLDEN
    at, length = np.int64(cell & PLACE), np.int64((cell >> np.uint64(32)) & LENGTH)
    found = np.uint64(length) * GOLDEN
    end = at + length - 8
    while at < end:
        found = (found ^ _load(data, at)) * GOLDEN
        found ^= found >> np.uint64(32)
        at += 8
    found = (found ^ _load(data, end)) * GOLDEN
    return (found ^ (found >> np.uint64(32))) * GOLDEN


@_inline
def _same(cell: Any, other: Any, data: Any) -> Any:
    """Say whether two cells hold the same text."""
    if cell == other:
        return True
    if not (cell & other & LONG) or (cell ^ other) >> np.uint64(32):
        return False
    length = np.int64((cell >> np.uint64(32)) & LENGTH)
    a, b = np.int64(cell & PLACE), np.int64(other & PLACE)
    for i in range(0, length - 8, 8):
        if _load(data, a + i) != _load(data, b + i):
            return False
    return _load(data, a + length - 8) == _load(data, b + length - 8)


@_inline
def _number(cell: Any) -> Any:
    """Return the whole number of a cell of up to 7 bytes, written as usual; −1 for any other cell. Without a branch,
    so that several are worked on at once."""
    length = cell >> np.uint64(56)
    empty = ((EIGHT - length) << np.uint64(3)) & np.uint64(63)
    # Byte by byte, after the zeros of the cell's end have gone to the front: digit − 48.
    digits = (cell << empty) ^ (ZEROS << empty)
    bad = (digits | (digits + TEN_OR_MORE)) & HIGH != ZERO
    led = (length > ONE) & ((cell ^ ZEROS) & np.uint64(255) == ZERO)
    digits = (digits * np.uint64(10) + (digits >> EIGHT)) & np.uint64(0x00FF00FF00FF00FF)
    digits = (digits * np.uint64(100) + (digits >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    number = np.int64((digits * np.uint64(10000) + (digits >> np.uint64(32))) & PLACE)
    return np.int64(-1) if bad | led | (length > np.uint64(7)) else number


@_inline
def _behind(cell: Any, data: Any, prefix: Any, length: Any) -> Any:
    """Return the cell of what stands behind a prefix of so many bytes (up to 8) in a cell; 0 if that is empty, longer
    than 7 bytes or behind something else."""
    mask = ~ZERO if length == EIGHT else (ONE << (length << np.uint64(3))) - ONE
    if cell & LONG:
        at, rest = np.int64(cell & PLACE), ((cell >> np.uint64(32)) & LENGTH) - length
        if rest > np.uint64(7) or (_load(data, at) & mask) != prefix:
            return ZERO
        text = _load(data, at + np.int64(length))
    else:
        rest = (cell >> np.uint64(56)) - length
        if rest > np.uint64(7) or (cell & mask) != prefix:
            return ZERO
        text = cell >> (length << np.uint64(3))
    if rest == ZERO:
        return ZERO
    return (text & ((ONE << (rest << np.uint64(3))) - ONE)) | (rest << np.uint64(56))


@compiled("Tuple((i8,i8,i8))(u8[::1],i8,u1[::1],u8,u8,u4[::1],u8[::1],i8,u4[::1])")
def code_numbers(
    cells: Any, begin: Any, data: Any, prefix: Any, length: Any, table: Any, words: Any, count: Any, codes: Any
) -> tuple[int, int, int]:
    """Give cells of whole numbers codes, those from `begin` on, until one is none that the table has a place for.

    Parameters
    ----------
    prefix, length: what stands before each number: its bytes as a number, and how many there are, up to 8.
    table: UInt32, the code of each number.
    words, count, codes: as for `code_cells`; words has as many places as table.

    Returns the cell where it ended, the count, and the number of that cell, −1 if it is none.
    """
    numbers = np.empty(BLOCK, np.int64)
    number: Any = -1
    for start in range(begin, len(cells), BLOCK):
        end = good = min(start + BLOCK, len(cells))
        if length == ZERO:
            for i in range(start, end):
                numbers[i - start] = np.int64(EMPTY) if cells[i] == ZERO else _number(cells[i])
        else:
            for i in range(start, end):
                rest = _behind(cells[i], data, prefix, length)
                numbers[i - start] = EMPTY if cells[i] == ZERO else (_number(rest) if rest else -1)
        for i in range(start, end):  # before any is looked up, so that their places are fetched side by side
            number = numbers[i - start]
            if number == -1 or number >= len(table):
                good = i
                break
            if number != EMPTY:
                _prefetch(table, number)
        for i in range(start, good):
            at = numbers[i - start]
            if at == EMPTY:
                codes[i] = 0
                continue
            code = table[at]
            if code == 0:
                words[count] = cells[i]
                count += 1
                code = np.uint32(count)
                table[at] = code
            codes[i] = code
        if good < end:
            return good, count, number
    return len(cells), count, -1


@compiled("u8[:,::1](u8[::1],u1[::1],i8)")
def table_of(words: Any, data: Any, slots: Any) -> Any:
    """Return the table for `code_cells` that has these words."""
    table = np.zeros((slots, 2), np.uint64)
    bits = np.uint64(64) - _trailing_zeros(np.uint64(slots))
    for known in range(len(words)):
        slot = np.int64(_hash(words[known], data) >> bits)
        while table[slot, 1]:
            slot = (slot + 1) & (slots - 1)
        table[slot, 0], table[slot, 1] = words[known], np.uint64(known + 1)
    return table


@compiled("Tuple((u8[:,::1],u8[::1],i8))(u8[::1],i8,u1[::1],u8[:,::1],u8[::1],i8,u4[::1])")
def code_cells(
    cells: Any, begin: Any, data: Any, table: Any, words: Any, count: Any, codes: Any
) -> tuple[Ints, Ints, int]:
    """Give each cell from `begin` on a code: 0 for an empty one, else its text's number in order of appearance, from 1.

    Parameters
    ----------
    table: UInt64 [slots, 2], cell and code; slots is a power of two.
    words: UInt64, the first cell of each code from 1, `count` so far.
    codes: UInt32 [cells], written.

    Returns table, words and count as they are then.
    """
    slots = len(table)
    bits = np.uint64(64) - _trailing_zeros(np.uint64(slots))
    for i in range(begin, len(cells)):
        if i + AHEAD < len(cells):
            _prefetch(table, 2 * np.int64(_hash(cells[i + AHEAD], data) >> bits))
        cell = cells[i]
        if cell == ZERO:
            codes[i] = 0
            continue
        slot = np.int64(_hash(cell, data) >> bits)
        while True:
            code = table[slot, 1]
            if code == ZERO:
                count += 1
                table[slot, 0], table[slot, 1] = cell, np.uint64(count)
                words[count - 1] = cell
                codes[i] = np.uint32(count)
                if 2 * count >= slots:
                    slots *= 4
                    bits = np.uint64(64) - _trailing_zeros(np.uint64(slots))
                    table = table_of(words[:count], data, slots)
                    more = np.empty(slots // 2 + 1, np.uint64)
                    more[:count] = words[:count]
                    words = more
                break
            if _same(table[slot, 0], cell, data):
                codes[i] = np.uint32(code)
                break
            slot = (slot + 1) & (slots - 1)
    return table, words, count


@compiled("b1(u8[::1],u1[::1],i8[::1])")
def whole_numbers(cells: Any, data: Any, numbers: Any) -> bool:
    """Write the cells as Int64; return whether each is a whole number written as usual, not 007, +7 or -0."""
    for i in range(len(cells)):
        cell = cells[i]
        long = cell & LONG
        at, length = np.int64(cell & PLACE), np.int64((cell >> np.uint64(32)) & LENGTH)
        if not long:
            length = np.int64(cell >> np.uint64(56))
        number, sign, digits = np.int64(0), 1, 0
        for j in range(length):
            byte = np.int64(data[at + j]) if long else np.int64((cell >> np.uint64(8 * j)) & np.uint64(255))
            if j == 0 and byte == 45:
                sign = -1
                continue
            digit = byte - 48
            if digit < 0 or digit > 9:
                return False
            if number == 0 and (j > (1 if sign < 0 else 0) or (digit == 0 and sign < 0)):
                return False
            number = number * 10 + digit
            digits += 1
        if digits == 0 or digits > WHOLE_DIGITS:
            return False
        numbers[i] = sign * number
    return True


@compiled("i8(u8[::1],i8[::1])")
def word_ends(cells: Any, ends: Any) -> Any:
    """Write where each text ends if all stand one after the other; return the last."""
    end: Any = 0
    for i in range(len(cells)):
        cell = cells[i]
        end += np.int64((cell >> np.uint64(32)) & LENGTH) if cell & LONG else np.int64(cell >> np.uint64(56))
        ends[i] = end
    return end


@compiled("void(u8[::1],u1[::1],u1[::1])")
def write_words(cells: Any, data: Any, out: Any) -> None:
    """Write the texts of cells, one after the other."""
    end: Any = 0
    for i in range(len(cells)):
        cell = cells[i]
        if cell & LONG:
            at, length = np.int64(cell & PLACE), np.int64((cell >> np.uint64(32)) & LENGTH)
            for j in range(length):
                out[end + j] = data[at + j]
        else:
            length = np.int64(cell >> np.uint64(56))
            for j in range(length):
                out[end + j] = np.uint8((cell >> np.uint64(8 * j)) & np.uint64(255))
        end += length


@_inline
def _rotated(number: Any, bits: Any) -> Any:
    return (number << np.uint64(bits)) | (number >> np.uint64(64 - bits))


@compiled("void(u8[::1],u1[::1],u8,u2[::1])")
def parts_of_words(cells: Any, data: Any, partitions: Any, parts: Any) -> None:
    """Write the partition of each text: its xxHash64 modulo the number of partitions, as `spool.partition_of`."""
    for i in range(len(cells)):
        cell = cells[i]
        if cell & LONG:
            at, length = np.int64(cell & PLACE), np.int64((cell >> np.uint64(32)) & LENGTH)
            end = at + length
            if length >= 32:
                a, b, c, d = P1 + P2, P2, ZERO, ZERO - P1
                while at + 32 <= end:
                    a = _rotated(a + _load(data, at) * P2, 31) * P1
                    b = _rotated(b + _load(data, at + 8) * P2, 31) * P1
                    c = _rotated(c + _load(data, at + 16) * P2, 31) * P1
                    d = _rotated(d + _load(data, at + 24) * P2, 31) * P1
                    at += 32
                found = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
                for lane in (a, b, c, d):
                    found = (found ^ (_rotated(lane * P2, 31) * P1)) * P1 + P4
            else:
                found = P5
            found += np.uint64(length)
            while at + 8 <= end:
                found = _rotated(found ^ (_rotated(_load(data, at) * P2, 31) * P1), 27) * P1 + P4
                at += 8
            rest = _load(data, at)
            left = np.uint64(end - at)
        else:
            left = cell >> np.uint64(56)
            found = P5 + left
            rest = cell
        if left >= np.uint64(4):
            found = _rotated(found ^ ((rest & PLACE) * P1), 23) * P2 + P3
            rest >>= np.uint64(32)
            left -= np.uint64(4)
        while left:
            found = _rotated(found ^ ((rest & np.uint64(255)) * P5), 11) * P1
            rest >>= EIGHT
            left -= ONE
        found = (found ^ (found >> np.uint64(33))) * P2
        found = (found ^ (found >> np.uint64(29))) * P3
        parts[i] = np.uint16((found ^ (found >> np.uint64(32))) % partitions)
