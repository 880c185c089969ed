"""The inverse of the two-dimensional Haar wavelet transform, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import check_flag
from .haar_dwt2d import HAAR_HIGH, HAAR_LOW, filter_bank


def haar_idwt2d(
    y: Tensor,
    rec_lo: Tensor | None = None,
    rec_hi: Tensor | None = None,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """The inverse of `haar_dwt2d` when the filters are orthonormal, as Haar's are; its transpose for any filters.

    With the 2-D filters f_k built from `rec_lo` and `rec_hi` as in `haar_dwt2d`::

        x[b, c] = sum over k of conv_transpose2d(y[b, k * C + c], f_k, stride=2)

    Args:
        y: (B, 4 * C, h, w) with groups LL, LH, HL, HH.
        rec_lo, rec_hi: two taps each; None means Haar.
        output_size: (H, W) with ceil(H / 2) = h and ceil(W / 2) = w; the result is cropped to it. None means
            (2 * h, 2 * w).

    Returns:
        (B, C, H, W).
    """
    channels = y.shape[1] // 4
    y = y.unflatten(1, (4, channels)).transpose(1, 2).flatten(1, 2)
    bank = filter_bank(y, rec_lo, rec_hi).repeat(channels, 1, 1, 1)
    x = F.conv_transpose2d(y, bank, stride=2, groups=channels)
    return x if output_size is None else x[..., : output_size[0], : output_size[1]]


class HaarIDWT2d(nn.Module):
    """`haar_idwt2d` with learnable filters `rec_lo`, `rec_hi`, Haar at the start; fixed Haar if not `learnable`."""

    rec_lo: nn.Parameter | None
    rec_hi: nn.Parameter | None

    def __init__(self, learnable: bool = True) -> None:
        super().__init__()
        self.learnable = learnable = check_flag("learnable", learnable)
        self.register_parameter("rec_lo", nn.Parameter(torch.tensor(HAAR_LOW)) if learnable else None)
        self.register_parameter("rec_hi", nn.Parameter(torch.tensor(HAAR_HIGH)) if learnable else None)

    def forward(self, y: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        return haar_idwt2d(y, self.rec_lo, self.rec_hi, output_size)

    def extra_repr(self) -> str:
        return f"learnable={self.learnable}"
