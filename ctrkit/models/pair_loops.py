"""Passes over a block of pairs that Numba compiles, for `ctrkit.models.pair_threads`.

Each does in one pass what takes several torch operations, and lets go of the interpreter meanwhile. Shape letters as in
`ctrkit.models.pair_blocks`. Arrays are C-contiguous and of one floating type, indexes int64. h is what a layer's
product gives, without its bias, and x = h + bias. NaN stays NaN. Sums over rows are made block by block, so that they
are as exact in float32 as a block is short.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ctrkit.numba_loops import compiled_as_called


@intrinsic
def _float_of_bits(context: Any, bits: Any) -> Any:
    """Return the float32 that has these 32 bits."""
    return types.float32(types.int32), lambda _, builder, __, values: builder.bitcast(values[0], ir.FloatType())


def exponential(x: Any) -> Any:
    """Return eˣ. In float32 by operations that vectorise, within 2 units of the last place, for x from −87 to 88; as at
    these ends beyond them."""


@overload(exponential)
def _exponential(x: Any) -> Any:
    if x != types.float32:

        def double(x: Any) -> Any:
            return math.exp(x)

        return double
    number = np.float32
    per_ln2 = number(1 / math.log(2))
    # ln 2 in two parts, the first short, so that its multiples are exact.
    ln2_high, ln2_low = number(355 / 512), number(math.log(2) - 355 / 512)
    half, lowest, highest, bias, bits = number(0.5), number(-87), number(88), np.int32(127), np.int32(23)
    c0, c1, c2, c3, c4, c5, c6, c7 = (number(1 / math.factorial(i)) for i in range(8))

    def single(x: Any) -> Any:
        x = lowest if x < lowest else x
        x = highest if x > highest else x
        n = np.floor(x * per_ln2 + half)
        r = (x - n * ln2_high) - n * ln2_low  # |r| ≤ ln 2 / 2
        series = c0 + r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
        return series * _float_of_bits((np.int32(n) + bias) << bits)  # type: ignore[call-arg]

    return single


def sigmoid(x: Any) -> Any:
    """Return 1/(1 + e^−x)."""


@overload(sigmoid)
def _sigmoid(x: Any) -> Any:
    one = np.float32(1) if x == types.float32 else np.float64(1)

    def either(x: Any) -> Any:
        return one / (one + exponential(-x))

    return either


@compiled_as_called()
def multiply(q_SD: Any, k_BD: Any, sample_C: Any, behaviour_C: Any, out_CD: Any) -> None:
    """Put q∘k of each pair into `out`."""
    for i in range(len(out_CD)):
        q, k, out = q_SD[sample_C[i]], k_BD[behaviour_C[i]], out_CD[i]
        for j in range(len(out)):
            out[j] = q[j] * k[j]


@compiled_as_called()
def multiply_back(q_SD: Any, k_BD: Any, sample_C: Any, behaviour_C: Any, dout_CD: Any, dq_SD: Any, dk_BD: Any) -> None:
    """Add the gradients of q and k."""
    for i in range(len(dout_CD)):
        s, b = sample_C[i], behaviour_C[i]
        q, k, dq, dk, dout = q_SD[s], k_BD[b], dq_SD[s], dk_BD[b], dout_CD[i]
        for j in range(len(dout)):
            dq[j] += k[j] * dout[j]
            dk[j] += q[j] * dout[j]


@compiled_as_called()
def enter(h_SH: Any, h_BH: Any, sample_C: Any, behaviour_C: Any, h_CH: Any, add: bool) -> None:
    """Put the sample's and the behaviour's part of each pair into h; or `add` them to what is there."""
    for i in range(len(h_CH)):
        one, other, h = h_SH[sample_C[i]], h_BH[behaviour_C[i]], h_CH[i]
        if add:
            for j in range(len(h)):
                h[j] += one[j] + other[j]
        else:
            for j in range(len(h)):
                h[j] = one[j] + other[j]


@compiled_as_called()
def enter_back(dh_CH: Any, sample_C: Any, behaviour_C: Any, dh_SH: Any, dh_BH: Any) -> None:
    """Add the gradients of both parts."""
    for i in range(len(dh_CH)):
        dh, one, other = dh_CH[i], dh_SH[sample_C[i]], dh_BH[behaviour_C[i]]
        for j in range(len(dh)):
            one[j] += dh[j]
            other[j] += dh[j]


@compiled_as_called()
def prelu(h_CH: Any, bias_H: Any, a_H: Any, y_CH: Any) -> None:
    """y = x if x > 0, else a·x."""
    zero = h_CH.dtype.type(0)
    for i in range(len(h_CH)):
        h, y = h_CH[i], y_CH[i]
        for j in range(len(h)):
            x = h[j] + bias_H[j]
            y[j] = x if x > zero else a_H[j] * x


@compiled_as_called()
def prelu_back(h_CH: Any, bias_H: Any, a_H: Any, dy_CH: Any, y_CH: Any, sums_2H: Any) -> None:
    """y again; dy becomes dx; add Σ dx and the slope's gradient Σ dy·min(x, 0) to `sums`."""
    zero = h_CH.dtype.type(0)
    dx_H, da_H = np.zeros_like(a_H), np.zeros_like(a_H)
    for i in range(len(h_CH)):
        h, dy, y = h_CH[i], dy_CH[i], y_CH[i]
        for j in range(len(h)):
            x, d = h[j] + bias_H[j], dy[j]
            y[j] = x if x > zero else a_H[j] * x
            dx = d if x > zero else a_H[j] * d
            da_H[j] += zero if x > zero else x * d
            dx_H[j] += dx
            dy[j] = dx
    sums_2H[0] += dx_H
    sums_2H[1] += da_H


@compiled_as_called("reassoc")
def dot(y_CH: Any, w_H: Any, bias: Any, out_C: Any) -> None:
    """out = y·w + bias."""
    for i in range(len(y_CH)):
        y, total = y_CH[i], bias
        for j in range(len(y)):
            total += y[j] * w_H[j]
        out_C[i] = total


@compiled_as_called()
def logistic(h_CH: Any, bias_H: Any, y_CH: Any) -> None:
    """y = sigmoid(x)."""
    for i in range(len(h_CH)):
        h, y = h_CH[i], y_CH[i]
        for j in range(len(h)):
            y[j] = sigmoid(h[j] + bias_H[j])


@compiled_as_called()
def logistic_back(h_CH: Any, bias_H: Any, dy_CH: Any, y_CH: Any, sums_2H: Any) -> None:
    """y again; dy becomes dx; add Σ dx to `sums`."""
    one = h_CH.dtype.type(1)
    dx_H = np.zeros_like(bias_H)
    for i in range(len(h_CH)):
        h, dy, y = h_CH[i], dy_CH[i], y_CH[i]
        for j in range(len(h)):
            p = sigmoid(h[j] + bias_H[j])
            dx = dy[j] * p * (one - p)
            dx_H[j] += dx
            y[j] = p
            dy[j] = dx
    sums_2H[0] += dx_H


@compiled_as_called()
def moments(h_CH: Any, n_1: Any, mean_H: Any, square_H: Any) -> None:
    """Take a block into the mean and the summed squares of the distances from it, of `n` rows so far (the pairwise
    update of Chan, Golub and LeVeque)."""
    rows = h_CH.dtype.type(len(h_CH))
    here_H, squares_H = np.zeros_like(mean_H), np.zeros_like(mean_H)
    for i in range(len(h_CH)):
        h = h_CH[i]
        for j in range(len(h)):
            here_H[j] += h[j]
    for j in range(len(here_H)):
        here_H[j] /= rows
    for i in range(len(h_CH)):
        h = h_CH[i]
        for j in range(len(h)):
            squares_H[j] += (h[j] - here_H[j]) * (h[j] - here_H[j])
    share = rows / (n_1[0] + rows)
    for j in range(len(here_H)):
        far = here_H[j] - mean_H[j]
        mean_H[j] += far * share
        square_H[j] += squares_H[j] + far * far * share * n_1[0]
    n_1[0] += rows


@compiled_as_called()
def dice(h_CH: Any, bias_H: Any, a_H: Any, mean_H: Any, r_H: Any, y_CH: Any) -> None:
    """y = x·(a + (1 − a)·p), p = sigmoid(z), z = (h − mean)·r."""
    one = h_CH.dtype.type(1)
    for i in range(len(h_CH)):
        h, y = h_CH[i], y_CH[i]
        for j in range(len(h)):
            p = sigmoid((h[j] - mean_H[j]) * r_H[j])
            y[j] = (h[j] + bias_H[j]) * (a_H[j] + (one - a_H[j]) * p)


@compiled_as_called()
def dice_back(h_CH: Any, bias_H: Any, a_H: Any, mean_H: Any, r_H: Any, dy_CH: Any, y_CH: Any, sums_4H: Any) -> None:
    """y again; dy becomes dx with mean and r held fixed; add Σ dx, the slope's gradient Σ dy·x·(1 − p), Σ dz and
    Σ dz·z to `sums`."""
    one = h_CH.dtype.type(1)
    dx_H, da_H, dz_H, dzz_H = (np.zeros_like(a_H), np.zeros_like(a_H), np.zeros_like(a_H), np.zeros_like(a_H))
    for i in range(len(h_CH)):
        h, dy, y = h_CH[i], dy_CH[i], y_CH[i]
        for j in range(len(h)):
            x, z = h[j] + bias_H[j], (h[j] - mean_H[j]) * r_H[j]
            p = sigmoid(z)
            slope = a_H[j] + (one - a_H[j]) * p
            dyx = dy[j] * x
            dz = dyx * (one - a_H[j]) * p * (one - p)
            dx = dy[j] * slope + dz * r_H[j]
            y[j] = x * slope
            dy[j] = dx
            dx_H[j] += dx
            da_H[j] += dyx * (one - p)
            dz_H[j] += dz
            dzz_H[j] += dz * z
    sums_4H[0] += dx_H
    sums_4H[1] += da_H
    sums_4H[2] += dz_H
    sums_4H[3] += dzz_H


@compiled_as_called()
def dice_finish(h_CH: Any, mean_H: Any, constant_H: Any, factor_H: Any, dx_CH: Any) -> None:
    """Add what reaches x through the batch's statistics: constant + factor·(h − mean)."""
    for i in range(len(h_CH)):
        h, dx = h_CH[i], dx_CH[i]
        for j in range(len(h)):
            dx[j] += constant_H[j] + factor_H[j] * (h[j] - mean_H[j])


@compiled_as_called()
def pool(
    logit_P: Any,
    scale_1: Any,
    softmax: bool,
    sample_P: Any,
    behaviour_P: Any,
    times_B: Any,
    v_BE: Any,
    w_P: Any,
    out_SE: Any,
) -> None:
    """w = scale·logit, or its softmax over the pairs of a sample, which are neighbours; add Σ w·v to `out`.

    times_B: how often each behaviour counts, its weights being summed in w; nothing: once each.
    """
    begin, repeated = 0, len(times_B) > 0
    while begin < len(sample_P):
        s, end = sample_P[begin], begin + 1
        while end < len(sample_P) and sample_P[end] == s:
            end += 1
        w = w_P[begin:end]
        for i in range(len(w)):
            w[i] = scale_1[0] * logit_P[begin + i]
        if softmax:
            top, total = w[0], w_P.dtype.type(0)
            for i in range(len(w)):
                top = w[i] if w[i] > top else top
            for i in range(len(w)):
                w[i] = exponential(w[i] - top)
        if repeated:
            for i in range(len(w)):
                w[i] *= times_B[behaviour_P[begin + i]]
        if softmax:
            for i in range(len(w)):
                total += w[i]
            for i in range(len(w)):
                w[i] /= total
        out = out_SE[s]
        for i in range(len(w)):
            v = v_BE[behaviour_P[begin + i]]
            for j in range(len(out)):
                out[j] += w[i] * v[j]
        begin = end


@compiled_as_called("reassoc")
def pool_back(
    w_P: Any,
    scale_1: Any,
    softmax: bool,
    sample_P: Any,
    behaviour_P: Any,
    times_B: Any,
    v_BE: Any,
    dout_SE: Any,
    dlogit_P: Any,
    dv_BE: Any,
) -> None:
    """The gradients of the logits, and of v, added. times_B as in `pool`."""
    zero = w_P.dtype.type(0)
    begin, repeated = 0, len(times_B) > 0
    while begin < len(sample_P):
        s, end = sample_P[begin], begin + 1
        while end < len(sample_P) and sample_P[end] == s:
            end += 1
        dout, mean = dout_SE[s], zero
        for p in range(begin, end):
            v, dv, w, dw = v_BE[behaviour_P[p]], dv_BE[behaviour_P[p]], w_P[p], zero
            for j in range(len(dout)):
                dw += v[j] * dout[j]
            for j in range(len(dout)):
                dv[j] += w * dout[j]
            dlogit_P[p] = dw
            mean += w * dw
        for p in range(begin, end):
            if softmax:
                dlogit_P[p] = (dlogit_P[p] - mean) * w_P[p]
            elif repeated:
                dlogit_P[p] *= times_B[behaviour_P[p]]
            dlogit_P[p] *= scale_1[0]
        begin = end


@compiled_as_called()
def cuts(sample_P: Any, behaviour_P: Any, wanted: Any) -> Any:
    """Return where to cut the pairs, at the places `wanted` or the next ones behind them, so that no sample and no
    behaviour has pairs on both sides; the number of pairs where there is none. `wanted` rises."""
    n = len(sample_P)
    least_P = np.empty(n + 1, np.int64)  # of this pair's behaviour and all behind it
    least_P[n] = np.int64(1) << 62
    for p in range(n - 1, -1, -1):
        least_P[p] = min(least_P[p + 1], behaviour_P[p])
    out, found, most = np.full(len(wanted), n, np.int64), 0, np.int64(-1)
    for p in range(n):
        if p and most < least_P[p] and sample_P[p - 1] != sample_P[p]:
            while found < len(wanted) and wanted[found] <= p:
                out[found] = p
                found += 1
        most = max(most, behaviour_P[p])
    return out
