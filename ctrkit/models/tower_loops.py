"""A tower of layers on normalised rows, by loops that Numba compiles, for `ctrkit.models.tower_threads`.

Some rows go through all layers together. x̂ = (x − mean)·r is a normalised input, x̂·γ + β what the first layer gets,
h what a layer's product gives, without its bias. Letters: R rows, D input width, H and O hidden widths, all of which
`tiles.fits`.
"""

from typing import Any

import numpy as np

from ctrkit.models import tiles
from ctrkit.models.pair_loops import dot, moments, prelu
from ctrkit.numba_loops import compiled_as_called

__all__ = ["backward", "enter_back", "forward", "moments", "tiles"]
FEW = 120
"""Rows that go through all layers together, so that what lies between the layers stays in the cache."""


@compiled_as_called()
def normal(x_RD: Any, mean_D: Any, r_D: Any, y_RD: Any) -> None:
    """y = x̂."""
    for i in range(len(x_RD)):
        x, y = x_RD[i], y_RD[i]
        for j in range(len(x)):
            y[j] = (x[j] - mean_D[j]) * r_D[j]


@compiled_as_called()
def scaled(x_RD: Any, gamma_D: Any, beta_D: Any) -> None:
    """x becomes x·γ + β."""
    for i in range(len(x_RD)):
        x = x_RD[i]
        for j in range(len(x)):
            x[j] = x[j] * gamma_D[j] + beta_D[j]


@compiled_as_called()
def forward(x_RD: Any, norm: Any, group_R: Any, h_GH: Any, layers: Any, out: Any, into: Any, logit_R: Any) -> None:
    """The logits.

    Parameters
    ----------
    norm: mean, r, γ and β, [D] each.
    group_R, h_GH: the group of each row, and what the first layer's h has of each group besides; no row where nothing.
    layers: of each layer its matrix, transposed, and bias and slopes of the activation behind it.
    out: [H] matrix and [1] bias of the logits.
    into: for each of `layers` [R, H], for its h.
    """
    mean_D, r_D, gamma_D, beta_D = norm
    widest = x_RD.shape[1]
    for layer in layers:
        widest = max(widest, layer[0].shape[1])
    room = np.empty(FEW * widest, x_RD.dtype)
    for begin in range(0, len(x_RD), FEW):
        end = min(begin + FEW, len(x_RD))
        n = end - begin
        y = room[: n * x_RD.shape[1]].reshape((n, x_RD.shape[1]))
        normal(x_RD[begin:end], mean_D, r_D, y)
        scaled(y, gamma_D, beta_D)
        for i in range(len(layers)):
            w_HO, bias_O, a_O = layers[i]
            h = into[i][begin:end]
            shared = i == 0 and len(h_GH) > 0
            if shared:
                for row in range(n):
                    h[row] = h_GH[group_R[begin + row]]
            tiles.product(y, w_HO, h, shared)
            y = room[: h.size].reshape(h.shape)
            prelu(h, bias_O, a_O, y)
        dot(y, out[0], out[1][0], logit_R[begin:end])


@compiled_as_called()
def backward(
    x_RD: Any,
    norm: Any,
    group_R: Any,
    dh_GH: Any,
    layers: Any,
    out_1H: Any,
    into: Any,
    dlogit_R1: Any,
    dw: Any,
    sums: Any,
    dout_1H: Any,
) -> None:
    """Take the gradient down to the first layer, whose dh comes in the place of its h.

    Parameters
    ----------
    dh_GH: to which each group's dh is added; no row where nobody wants it.
    layers: of each layer its matrix, and bias and slopes of the activation behind it.
    dw: to which the gradients of these matrices are added; for the first layer Σ dh·x̂ instead.
    sums: for each of `layers` [2, H], to which the gradients of its bias and slopes are added.
    """
    widest = x_RD.shape[1]
    for layer in layers:
        widest = max(widest, len(layer[0]))
    three = tiles.rooms(3, FEW * widest, x_RD)
    room, one, other = three[0], three[1], three[2]
    for begin in range(0, len(x_RD), FEW):
        end = min(begin + FEW, len(x_RD))
        n = end - begin
        dh = dlogit_R1[begin:end]
        for i in range(len(layers) - 1, -1, -1):
            h = into[i][begin:end]
            y, dx = room[: h.size].reshape(h.shape), one[: h.size].reshape(h.shape)
            if i == len(layers) - 1:
                tiles.product(dh, out_1H, dx, False)
            else:
                tiles.product(dh, layers[i + 1][0], dx, False)
            tiles.prelu_back(h, layers[i][1], layers[i][2], dx, y, sums[i])
            if i == len(layers) - 1:
                tiles.product_t(dh, 0, y, dout_1H)
            else:
                tiles.product_t(dh, 0, y, dw[i + 1])
            dh = dx
            one, other = other, one
        into[0][begin:end] = dh
        if len(dh_GH) > 0:
            for row in range(n):
                dh_GH[group_R[begin + row]] += dh[row]
        x = room[: n * x_RD.shape[1]].reshape((n, x_RD.shape[1]))
        normal(x_RD[begin:end], norm[0], norm[1], x)
        tiles.product_t(dh, 0, x, dw[0])


@compiled_as_called()
def enter_back(x_RD: Any, norm: Any, dh_RH: Any, w_HD: Any, constant_D: Any, factor_D: Any, dx_RD: Any) -> None:
    """dx = dh·w − constant − x̂·factor."""
    mean_D, r_D = norm[0], norm[1]
    for begin in range(0, len(x_RD), FEW):
        end = min(begin + FEW, len(x_RD))
        tiles.product(dh_RH[begin:end], w_HD, dx_RD[begin:end], False)
        for i in range(begin, end):
            x, dx = x_RD[i], dx_RD[i]
            for j in range(len(x)):
                dx[j] -= constant_D[j] + (x[j] - mean_D[j]) * r_D[j] * factor_D[j]
