"""Learnable 2-D Haar synthesis, forward and backward."""

from __future__ import annotations

from torch import Tensor

from ._device import check_dtype, empty
from ._haar import analysis_kernel, gradients, launch, synthesis_kernel


def haar_idwt2d(y: Tensor, rec_lo: Tensor, rec_hi: Tensor, height: int, width: int) -> Tensor:
    """(B, 4C, ceil(height/2), ceil(width/2)) -> (B, C, height, width): `reference.haar_idwt2d`.

    Dtypes, strides and layouts as in `haar_dwt2d`.
    """
    check_dtype("y", y)
    size = (y.shape[0], y.shape[1] // 4, height, width)
    x = empty(y, *size)
    if x.numel():
        launch(synthesis_kernel, size, y, None, x, y, rec_lo, rec_hi, extend=False)
    return x


def haar_idwt2d_backward(
    grad: Tensor, y: Tensor, rec_lo: Tensor, rec_hi: Tensor, height: int, width: int, need_y: bool, need_filters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `haar_idwt2d` by y, rec_lo, rec_hi; those not needed are empty. Deterministic."""
    check_dtype("y", y)
    size = (y.shape[0], y.shape[1] // 4, height, width)
    return gradients(analysis_kernel, size, grad, y, rec_lo, rec_hi, need_y, need_filters, extend=False)
