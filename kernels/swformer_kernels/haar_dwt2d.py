"""Learnable 2-D Haar analysis, forward and backward."""

from __future__ import annotations

from torch import Tensor

from ._device import check_dtype, empty
from ._haar import analysis_kernel, gradients, launch, synthesis_kernel


def haar_dwt2d(x: Tensor, dec_lo: Tensor, dec_hi: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, ceil(H/2), ceil(W/2)): `reference.haar_dwt2d`.

    `x` is float32, float16 or bfloat16 of any strides, the taps of any of these dtypes; arithmetic is fp32. A
    channels_last `x` gives a channels_last result, any other a contiguous one.

    Raises:
        TypeError: `x` has another dtype.
    """
    check_dtype("x", x)
    batch, channels, height, width = x.shape
    y = empty(x, batch, 4 * channels, (height + 1) // 2, (width + 1) // 2)
    if y.numel():
        launch(analysis_kernel, tuple(x.shape), x, None, y, x, dec_lo, dec_hi, extend=True)
    return y


def haar_dwt2d_backward(
    grad: Tensor, x: Tensor, dec_lo: Tensor, dec_hi: Tensor, need_x: bool, need_filters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `haar_dwt2d` by x, dec_lo, dec_hi; those not needed are empty. Deterministic.

    `grad` may have any strides. The gradient of x has the layout that `haar_dwt2d` gives its result.
    """
    check_dtype("x", x)
    return gradients(synthesis_kernel, tuple(x.shape), grad, x, dec_lo, dec_hi, need_x, need_filters, extend=True)
