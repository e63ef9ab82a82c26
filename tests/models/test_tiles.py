"""Products by tiles against NumPy's, in sizes that leave rows and columns over."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", exc_type=ImportError)

from ctrkit.models import tiles

CLOSE = {np.float32: 1e-4, np.float64: 1e-12}


def random(dtype: Any, *shape: int) -> Any:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 40, 72, 200])
@pytest.mark.parametrize("rows", [0, 1, 7, 43])
def test_products(rows: int, columns: int, dtype: Any) -> None:
    a, b, c = random(dtype, rows, 13), random(dtype, 13, columns), random(dtype, rows, columns)
    out = c.copy()
    tiles.product(a, b, out, True)
    np.testing.assert_allclose(out, c + a @ b, atol=CLOSE[dtype])
    tiles.product(a, b, out, False)
    np.testing.assert_allclose(out, a @ b, atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [0, 1, 31, 2 * tiles.BLOCK + 3])
def test_products_of_a_transposed_matrix(rows: int, dtype: Any) -> None:
    a, b, c = random(dtype, rows, 11), random(dtype, rows, 24), random(dtype, 7, 24)
    out = c.copy()
    tiles.product_t(a, 4, b, out)
    np.testing.assert_allclose(out, c + a[:, 4:].T @ b, atol=10 * CLOSE[dtype])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [8, 24])
def test_a_matrix_scaled_by_columns_and_its_gradients(width: int, dtype: Any) -> None:
    """W = W_k + W_p·diag(q), whose gradient dW = dXᵀ·K is a product over a few rows."""
    q, k, dx = random(dtype, width), random(dtype, 6, width), random(dtype, 6, 16)
    wk, wp, dwk, dwp = (random(dtype, i + 16, width)[i:].copy() for i in range(4))
    turned = np.empty((width, 16), dtype)
    tiles.scaled_sum(np.ascontiguousarray(wk.T), q, np.ascontiguousarray(wp.T), turned)
    np.testing.assert_allclose(turned, (wk + q * wp).T, atol=CLOSE[dtype])
    dw, w = np.full((16, width), np.nan, dtype), np.full((16, width), np.nan, dtype)
    tiles.product_of(dx, k, dw)
    np.testing.assert_allclose(dw, dx.T @ k, atol=CLOSE[dtype])
    expected = dwk + dw, dwp + dw * q, dw * wp
    tiles.pair_matrix_back(np.tile(q, (16, 1)), wk, wp, dw, w, dwk, dwp)
    for found, other in zip((dwk, dwp, dw), expected, strict=True):
        np.testing.assert_allclose(found, other, atol=CLOSE[dtype])
    np.testing.assert_allclose(w, turned.T, atol=CLOSE[dtype])


def test_without_numbers_to_sum_a_product_is_zero() -> None:
    out = np.ones((3, 8), np.float32)
    tiles.product(np.empty((3, 0), np.float32), np.empty((0, 8), np.float32), out, False)
    assert not out.any()


@pytest.mark.parametrize("columns", [8, 16, 24])
def test_gradient_of_prelu(columns: int) -> None:
    h, dy = random(np.float64, 9, columns), random(np.float64, 9, columns) + 1
    bias, slope, sums = random(np.float64, columns), random(np.float64, columns) / 4, np.ones((2, columns))
    h[0, 0] = np.nan
    x, dx, y = h + bias, dy.copy(), np.empty_like(h)
    tiles.prelu_back(h, bias, slope, dx, y, sums)
    np.testing.assert_allclose(y, np.where(x > 0, x, slope * x))
    np.testing.assert_allclose(dx, np.where(x > 0, dy, slope * dy))
    np.testing.assert_allclose(sums[0], 1 + dx.sum(0))
    np.testing.assert_allclose(sums[1], 1 + (dy * np.minimum(x, 0)).sum(0))
    assert np.isnan(y[0, 0])
    assert np.isnan(sums[1, 0])


def test_which_widths_fit() -> None:
    assert tiles.fits(24, 80, 40)
    assert not tiles.fits(24, 36)
    assert not tiles.fits(4096, 256)
