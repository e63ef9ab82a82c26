"""A network of PReLU on pairs, all layers in one loop that Numba compiles, for `ctrkit.models.pair_net`.

Its first layer gives the pair of a sample with query q and a behaviour with key k

    x = bias + W_q·q + (W_k + W_p·diag(q))·k.

The sum before k and the matrix are the sample's, made once for all of its pairs, which are neighbours. So what is left
of a pair is one product, and the gradients of q and of the three matrices follow from two sums over a sample's pairs:
Σ dx, and Σ dx·kᵀ. Shape letters as in `ctrkit.models.pair_blocks`; T the pairs of a thread. Widths that `tiles.fits`.
"""

from typing import Any

import numpy as np

from ctrkit.models import tiles
from ctrkit.models.pair_loops import cuts, dot, pool, pool_back, prelu
from ctrkit.numba_loops import compiled_as_called

__all__ = ["backward", "cuts", "forward", "pool", "pool_back", "tiles"]
FEW = 120
"""Pairs that go through all layers together, so that what lies between the layers stays in the nearest cache."""


@compiled_as_called()
def _take(x_ND: Any, rows: Any, out_CD: Any) -> None:
    for i in range(len(out_CD)):
        x, out = x_ND[rows[i]], out_CD[i]
        for j in range(len(out)):
            out[j] = x[j]


@compiled_as_called()
def _end_of_run(values: Any, begin: int) -> int:
    """Return where the run of equal values that begins here ends."""
    end = begin + 1
    while end < len(values) and values[end] == values[begin]:
        end += 1
    return end


@compiled_as_called()
def _tiled(x_D: Any, out_HD: Any) -> None:
    """Every row of `out` = x."""
    for i in range(len(out_HD)):
        out = out_HD[i]
        for j in range(len(out)):
            out[j] = x_D[j]


@compiled_as_called()
def forward(
    q_SD: Any,
    k_BD: Any,
    sample_T: Any,
    behaviour_T: Any,
    first: Any,
    layers: Any,
    out: Any,
    x_SH: Any,
    into: Any,
    logit_T: Any,
) -> None:
    """The logits.

    Parameters
    ----------
    first: W_q, W_k and W_p, transposed, and bias and slopes.
    layers: of each layer after the first its matrix, transposed, and bias and slopes of the activation behind it.
    out: [H] matrix and [1] bias of the logits.
    x_SH: for bias + W_q·q of the samples that have pairs here.
    into: for each of `layers` [T, H], for what goes into the activation behind it, without the bias.
    """
    if not len(sample_T):
        return
    wq_DH, wk_DH, wp_DH, bias_H, a_H = first
    widest = len(bias_H)
    for layer in layers:
        widest = max(widest, layer[0].shape[1])
    some = slice(sample_T[0], sample_T[-1] + 1)
    _tiled(bias_H, x_SH[some])
    tiles.product(q_SD[some], wq_DH, x_SH[some], True)
    few, h_0 = np.empty((FEW, q_SD.shape[1]), q_SD.dtype), np.empty((FEW, len(bias_H)), q_SD.dtype)
    w_DH, y = np.empty_like(wk_DH), np.empty(FEW * widest, q_SD.dtype)
    last = np.int64(-1)
    for begin in range(0, len(sample_T), FEW):
        end = min(begin + FEW, len(sample_T))
        k_CD, h_CH, sample = few[: end - begin], h_0[: end - begin], sample_T[begin:end]
        y_CH = y[: h_CH.size].reshape(h_CH.shape)
        _take(k_BD, behaviour_T[begin:end], k_CD)
        i = 0
        while i < len(sample):
            j, s = _end_of_run(sample, i), sample[i]
            if s != last:
                tiles.scaled_sum(wk_DH, q_SD[s], wp_DH, w_DH)
                last = s
            tiles.product(k_CD[i:j], w_DH, h_CH[i:j], False)
            prelu(h_CH[i:j], x_SH[s], a_H, y_CH[i:j])
            i = j
        for n in range(len(layers)):
            w_HO, bias_O, a_O = layers[n]
            h = into[n][begin:end]
            tiles.product(y_CH, w_HO, h, False)
            y_CH = y[: h.size].reshape(h.shape)
            prelu(h, bias_O, a_O, y_CH)
        dot(y_CH, out[0], out[1][0], logit_T[begin:end])


@compiled_as_called()
def backward(
    q_SD: Any,
    k_BD: Any,
    sample_T: Any,
    behaviour_T: Any,
    first: Any,
    layers: Any,
    x_SH: Any,
    into: Any,
    dlogit_T1: Any,
    dfirst: Any,
    dw: Any,
    sums: Any,
    dq_SD: Any,
    dk_BD: Any,
) -> None:
    """Add the gradients of all that `forward` reads.

    Parameters
    ----------
    first: W_k and W_p, transposed; W_q, W_k and W_p.
    layers: of each layer after the first, the logits' too, its matrix, and bias and slopes of the activation before it.
    dfirst: the gradients of W_q, W_k and W_p.
    dw: those of the matrices of `layers`.
    sums: for each of `layers` what `tiles.prelu_back` sums up.
    """
    if not len(sample_T):
        return
    wk_DH, wp_DH, wq_HD, wk_HD, wp_HD = first
    dwq_HD, dwk_HD, dwp_HD = dfirst
    high, width, dtype = len(wk_HD), wk_HD.shape[1], q_SD.dtype
    widest = high
    for layer in layers:
        widest = max(widest, layer[0].shape[1])
    begin_S, end_S = sample_T[0], sample_T[-1] + 1
    dx_SH = np.zeros((end_S - begin_S, high), dtype)
    ones_H1 = np.ones((high, 1), dtype)
    few, dfew, h_0 = np.empty((FEW, width), dtype), np.empty((FEW, width), dtype), np.empty((FEW, high), dtype)
    w_DH, q_HD, dw_HD, w_HD = np.empty_like(wk_DH), np.empty_like(wk_HD), np.empty_like(wk_HD), np.empty_like(wk_HD)
    own_2H, of_all_2H = np.empty((2, high), dtype), sums[0]
    three = tiles.rooms(3, FEW * widest, q_SD)
    y, one, other = three[0], three[1], three[2]
    last = np.int64(-1)
    for begin in range(0, len(sample_T), FEW):
        end = min(begin + FEW, len(sample_T))
        n = end - begin
        sample, behaviour, k_CD, dk_CD, h_CH = sample_T[begin:end], behaviour_T[begin:end], few[:n], dfew[:n], h_0[:n]
        _take(k_BD, behaviour, k_CD)
        i = 0
        while i < n:
            j, s = _end_of_run(sample, i), sample[i]
            if s != last:
                tiles.scaled_sum(wk_DH, q_SD[s], wp_DH, w_DH)
                last = s
            tiles.product(k_CD[i:j], w_DH, h_CH[i:j], False)
            i = j
        dh = dlogit_T1[begin:end]
        for layer in range(len(layers) - 1, 0, -1):
            w_OH, bias_H, a_H = layers[layer]
            into_CH = into[layer - 1][begin:end]
            y_CH, dx_CH = y[: into_CH.size].reshape(into_CH.shape), one[: into_CH.size].reshape(into_CH.shape)
            tiles.product(dh, w_OH, dx_CH, False)
            tiles.prelu_back(into_CH, bias_H, a_H, dx_CH, y_CH, sums[layer])
            tiles.product_t(dh, 0, y_CH, dw[layer])
            dh = dx_CH
            one, other = other, one
        w_OH, _, a_H = layers[0]
        y_CH, dx_CH = y[: h_CH.size].reshape(h_CH.shape), one[: h_CH.size].reshape(h_CH.shape)
        tiles.product(dh, w_OH, dx_CH, False)
        i = 0
        while i < n:
            j, s = _end_of_run(sample, i), sample[i]
            dx = dx_CH[i:j]
            own_2H[:] = 0
            tiles.prelu_back(h_CH[i:j], x_SH[s], a_H, dx, y_CH[i:j], own_2H)
            of_all_2H[0] += own_2H[0]
            of_all_2H[1] += own_2H[1]
            dx_SH[s - begin_S] += own_2H[0]
            _tiled(q_SD[s], q_HD)
            tiles.product_of(dx, k_CD[i:j], dw_HD)
            tiles.pair_matrix_back(q_HD, wk_HD, wp_HD, dw_HD, w_HD, dwk_HD, dwp_HD)
            tiles.product_t(ones_H1, 0, dw_HD, dq_SD[s : s + 1])
            tiles.product(dx, w_HD, dk_CD[i:j], False)
            i = j
        tiles.product_t(dh, 0, y_CH, dw[0])
        for i in range(n):
            dk, found = dk_BD[behaviour[i]], dk_CD[i]
            for d in range(width):
                dk[d] += found[d]
    some = slice(begin_S, end_S)
    tiles.product(dx_SH, wq_HD, dq_SD[some], True)
    tiles.product_t(dx_SH, 0, q_SD[some], dwq_HD)
