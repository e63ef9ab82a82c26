"""Products of small matrices by tiles that stay in registers, and PReLU's gradient, in vectors. Numba only.

A library's product packs both factors first, which a product of a few thousand rows and some dozen columns does not
repay. Here both are read where they lie, in the cache. Arrays are C-contiguous and of one floating type; those that are
read by rows have a multiple of `LANES` columns (`fits`). Sums run over rising k, whatever the number of threads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ctrkit.numba_loops import compiled_as_called

LANES = 8
"""Columns that one vector holds."""
WIDEST = 512
"""Of a layer whose factors stay in the cache."""
R5, R3, R1 = (5, 8, 8) if llvm.get_host_cpu_features().get("avx512vl") else (2, 3, 6)
"""Rows of a tile that is 5, 3 or 1 vectors wide: as many as there are registers for, 32 or 16."""
BLOCK = 240
"""Rows over which `product_t` sums before it goes to the next tile."""


def fits(*widths: int) -> bool:
    """Say whether matrices of these widths can be multiplied here, and faster than by a library."""
    return all(width % LANES == 0 and width <= WIDEST for width in widths)


class _Code:
    """Instructions on vectors of LANES numbers."""

    def __init__(self, context: Any, builder: Any, kind: Any) -> None:
        self.builder, self.size = builder, kind.bitwidth // 8
        self.number, self.int64 = context.get_data_type(kind), ir.IntType(64)
        self.vector = ir.VectorType(self.number, LANES)
        self.zero = ir.Constant(self.vector, None)

    def place(self, base: Any, row: Any, v: int) -> Any:
        """Return where vector v of a row lies that begins at an offset from `base`."""
        offset = self.builder.add(row, self.int64(LANES * v))
        return self.builder.bitcast(self.builder.gep(base, [offset]), self.vector.as_pointer())

    def load(self, place: Any) -> Any:
        loaded = self.builder.load(place)
        loaded.align = self.size
        return loaded

    def store(self, value: Any, place: Any) -> None:
        self.builder.store(value, place).align = self.size

    def spread(self, place: Any) -> Any:
        """Return a vector of one number."""
        undefined, int32 = ir.Constant(self.vector, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(undefined, self.builder.load(place), int32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(int32, LANES), None))

    def multiply_add(self, x: Any, y: Any, to: Any) -> Any:
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(product, to, flags=("contract",))

    def sums(self, n: Any, count: int, turn: Callable[[Any, Sequence[Any]], list[Any]]) -> list[Any]:
        """Return so many vectors: zero, of which turn(k, vectors) makes the next for each k from 0 to n − 1."""
        b = self.builder
        before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", n, self.int64(0)), loop, done)
        b.position_at_end(loop)
        k = b.phi(self.int64)
        carried = [b.phi(self.vector) for _ in range(count)]
        made = turn(k, carried)
        following = b.add(k, self.int64(1))
        b.cbranch(b.icmp_signed("<", following, n), loop, done)
        k.add_incoming(self.int64(0), before)
        k.add_incoming(following, loop)
        b.position_at_end(done)
        found = [b.phi(self.vector) for _ in range(count)]
        for phis in (carried, found):
            for phi, value in zip(phis, made, strict=True):
                phi.add_incoming(self.zero, before)
                phi.add_incoming(value, loop)
        return found


def _pointer(typing: Any, array: Any, offset: Any) -> Any:
    """Return where an element of an array lies, counted from its first."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, values[0])
        return builder.gep(made.data, [values[1]])

    return types.CPointer(array.dtype)(array, offset), code  # type: ignore[no-untyped-call]


pointer: Any = intrinsic(_pointer)


def _tile(
    typing: Any, rows: Any, vectors: Any, a: Any, a_row: Any, a_k: Any, b: Any, n: Any, c: Any, step: Any, add: Any
) -> Any:
    """C[i, j] = Σ_k A[i, k]·B[k, j], or `add` that, for so many rows and `vectors`·LANES columns, n numbers k.

    a_row, a_k: from A[i, k] to A[i + 1, k] and to A[i, k + 1]; step: from a row of B or C to the next.
    """
    if not (isinstance(rows, types.IntegerLiteral) and isinstance(vectors, types.IntegerLiteral)):
        return None
    height, width = range(rows.literal_value), range(vectors.literal_value)

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, a, a_row, a_k, b, n, c, step, add = values
        code = _Code(context, builder, signature.args[2].dtype)
        starts = [builder.mul(a_row, code.int64(i)) for i in height]

        def turn(k: Any, sums: Sequence[Any]) -> list[Any]:
            from_a, from_b = builder.mul(k, a_k), builder.mul(k, step)
            row_b = [code.load(code.place(b, from_b, v)) for v in width]
            spread = [code.spread(builder.gep(a, [builder.add(from_a, start)])) for start in starts]
            return [code.multiply_add(spread[i], row_b[v], sums[i * len(width) + v]) for i in height for v in width]

        found = code.sums(n, len(height) * len(width), turn)
        places = [code.place(c, builder.mul(step, code.int64(i)), v) for i in height for v in width]
        with builder.if_else(add) as (there, nothing):
            with there:
                for value, place in zip(found, places, strict=True):
                    code.store(builder.fadd(code.load(place), value), place)
            with nothing:
                for value, place in zip(found, places, strict=True):
                    code.store(value, place)
        return context.get_dummy_value()

    return types.void(rows, vectors, a, a_row, a_k, b, n, c, step, add), code


tile: Any = intrinsic(prefer_literal=True)(_tile)


def _prelu_strip(
    typing: Any, vectors: Any, h: Any, bias: Any, slope: Any, dy: Any, y: Any, rows: Any, step: Any, dx: Any, da: Any
) -> Any:
    """`prelu_back` of `vectors`·LANES columns; step: from a row to the next; dx, da: the sums."""
    if not isinstance(vectors, types.IntegerLiteral):
        return None
    width = range(vectors.literal_value)

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, h, bias, slope, dy, y, rows, step, dx_sum, da_sum = values
        code = _Code(context, builder, signature.args[1].dtype)
        start = code.int64(0)
        biases, slopes = ([code.load(code.place(x, start, v)) for v in width] for x in (bias, slope))

        def turn(i: Any, sums: Sequence[Any]) -> list[Any]:
            row, out = builder.mul(i, step), []
            for v in width:
                x = builder.fadd(code.load(code.place(h, row, v)), biases[v])
                d = code.load(code.place(dy, row, v))
                positive = builder.fcmp_ordered(">", x, code.zero)
                dx = builder.select(positive, d, builder.fmul(slopes[v], d))
                code.store(dx, code.place(dy, row, v))
                code.store(builder.select(positive, x, builder.fmul(slopes[v], x)), code.place(y, row, v))
                out.append(builder.fadd(sums[2 * v], dx))
                out.append(code.multiply_add(builder.select(positive, code.zero, x), d, sums[2 * v + 1]))
            return out

        found = code.sums(rows, 2 * len(width), turn)
        for v in width:
            for value, base in zip(found[2 * v : 2 * v + 2], (dx_sum, da_sum), strict=True):
                place = code.place(base, start, v)
                code.store(builder.fadd(code.load(place), value), place)
        return context.get_dummy_value()

    return types.void(vectors, h, bias, slope, dy, y, rows, step, dx, da), code


prelu_strip: Any = intrinsic(prefer_literal=True)(_prelu_strip)


def _scaled_row(typing: Any, a: Any, q: Any, b: Any, c: Any, n: Any) -> Any:
    """C = A + q·B of n·LANES numbers; q: where one number lies."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        a, q, b, c, n = values
        code = _Code(context, builder, signature.args[0].dtype)
        scale = code.spread(q)

        def turn(k: Any, _: Sequence[Any]) -> list[Any]:
            row = builder.mul(k, code.int64(LANES))
            value = code.multiply_add(scale, code.load(code.place(b, row, 0)), code.load(code.place(a, row, 0)))
            code.store(value, code.place(c, row, 0))
            return []

        code.sums(n, 0, turn)
        return context.get_dummy_value()

    return types.void(a, q, b, c, n), code


scaled_row: Any = intrinsic(_scaled_row)


def _pair_matrix(typing: Any, q: Any, wk: Any, wp: Any, dw: Any, w: Any, dwk: Any, dwp: Any, n: Any) -> Any:
    """`pair_matrix_back` of n·LANES numbers."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        *bases, n = values
        code = _Code(context, builder, signature.args[0].dtype)

        def turn(k: Any, _: Sequence[Any]) -> list[Any]:
            row = builder.mul(k, code.int64(LANES))
            places = [code.place(base, row, 0) for base in bases]
            q, wk, wp, dw, _w, dwk, dwp = (code.load(place) for place in places)
            made = {
                3: builder.fmul(dw, wp),
                4: code.multiply_add(q, wp, wk),
                5: builder.fadd(dwk, dw),
                6: code.multiply_add(q, dw, dwp),
            }
            for i, value in made.items():
                code.store(value, places[i])
            return []

        code.sums(n, 0, turn)
        return context.get_dummy_value()

    return types.void(q, wk, wp, dw, w, dwk, dwp, n), code


pair_matrix: Any = intrinsic(_pair_matrix)


@compiled_as_called()
def scaled_sum(a_KN: Any, q_K: Any, b_KN: Any, c_KN: Any) -> None:
    """C = A + diag(q)·B. N a multiple of LANES."""
    width = c_KN.shape[1]
    for k in range(len(q_K)):
        at = k * width
        scaled_row(pointer(a_KN, at), pointer(q_K, k), pointer(b_KN, at), pointer(c_KN, at), width // LANES)


@compiled_as_called()
def pair_matrix_back(q: Any, wk: Any, wp: Any, dw: Any, w: Any, dwk: Any, dwp: Any) -> None:
    """W = W_k + q∘W_p, and its gradients: add dW to dW_k and q∘dW to dW_p, put W into `w` and dW∘W_p, q's gradient at
    each place, into `dw`. All of one shape, of a multiple of LANES numbers."""
    starts = pointer(q, 0), pointer(wk, 0), pointer(wp, 0), pointer(dw, 0), pointer(w, 0), pointer(dwk, 0)
    pair_matrix(*starts, pointer(dwp, 0), w.size // LANES)


@compiled_as_called()
def rooms(count: int, size: int, like: Any) -> Any:
    """Return [count, size or more], rows that are buffers of `size` numbers, a third of a page apart in their pages.

    Where one is read while another is written at the same place of its page, a core takes them for the same memory.
    """
    page = 4096 // like.itemsize
    return np.empty((count, (size + page - 1) // page * page + page // 3 // LANES * LANES), like.dtype)


@compiled_as_called()
def product(a_MK: Any, b_KN: Any, c_MN: Any, add: bool) -> None:
    """C = A·B, or C + A·B where it is to `add`. N a multiple of LANES."""
    _strips(a_MK, 0, len(a_MK), a_MK.shape[1], 1, b_KN, c_MN, add)


@compiled_as_called()
def product_t(a_KM: Any, first: int, b_KN: Any, c_MN: Any) -> None:
    """C + Aᵀ·B, where A's column `first` is that of C's first row. N a multiple of LANES."""
    for k in range(0, len(b_KN), BLOCK):
        _strips(a_KM[k : k + BLOCK], first, len(c_MN), 1, a_KM.shape[1], b_KN[k : k + BLOCK], c_MN, True)


@compiled_as_called()
def product_of(a_KM: Any, b_KN: Any, c_MN: Any) -> None:
    """C = Aᵀ·B, K at most some hundred. N a multiple of LANES."""
    _strips(a_KM, 0, len(c_MN), 1, a_KM.shape[1], b_KN, c_MN, False)


@compiled_as_called()
def _strips(a: Any, first: int, rows: int, a_row: int, a_k: int, b: Any, c: Any, add: bool) -> None:
    """`tile` all of C, a strip of columns after the other; A begins at its element `first`."""
    n, width, j = len(b), c.shape[1], 0
    while j < width:
        left, i = width - j, 0
        from_b = pointer(b, j)
        if left >= 5 * LANES:
            while i + R5 <= rows:
                tile(R5, 5, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += R5
            while i < rows:
                tile(1, 5, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += 1
            j += 5 * LANES
        elif left >= 3 * LANES:
            while i + R3 <= rows:
                tile(R3, 3, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += R3
            while i < rows:
                tile(1, 3, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += 1
            j += 3 * LANES
        else:
            while i + R1 <= rows:
                tile(R1, 1, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += R1
            while i < rows:
                tile(1, 1, pointer(a, first + i * a_row), a_row, a_k, from_b, n, pointer(c, i * width + j), width, add)
                i += 1
            j += LANES


@compiled_as_called()
def prelu_back(h_CH: Any, bias_H: Any, a_H: Any, dy_CH: Any, y_CH: Any, sums_2H: Any) -> None:
    """With x = h + bias: y = x if x > 0, else a·x; dy becomes dx; add Σ dx and the slope's gradient Σ dy·min(x, 0) to
    `sums`. H a multiple of LANES."""
    rows, width, j = len(h_CH), h_CH.shape[1], 0
    while j < width:
        h, bias, a, dy, y = pointer(h_CH, j), pointer(bias_H, j), pointer(a_H, j), pointer(dy_CH, j), pointer(y_CH, j)
        dx, da = pointer(sums_2H, j), pointer(sums_2H, width + j)
        if width - j >= 2 * LANES:
            prelu_strip(2, h, bias, a, dy, y, rows, width, dx, da)
            j += 2 * LANES
        else:
            prelu_strip(1, h, bias, a, dy, y, rows, width, dx, da)
            j += LANES
