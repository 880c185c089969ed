"""Two-dimensional Haar wavelet transform with learnable two-tap filters, in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import check_flag

HAAR_LOW = (math.sqrt(0.5), math.sqrt(0.5))
HAAR_HIGH = (math.sqrt(0.5), -math.sqrt(0.5))


def haar_filters(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """HAAR_LOW and HAAR_HIGH, made on the device: a copy from the host would stop a GPU's stream."""
    low = torch.full((2,), HAAR_LOW[0], dtype=dtype, device=device)
    return low, torch.linspace(*HAAR_HIGH, 2, dtype=dtype, device=device)


def filter_bank(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """The four 2-D filters LL, LH, HL, HH for each channel group: (4, 1, 2, 2), in the dtype of `x`."""
    if low is None or high is None:
        haar_low, haar_high = haar_filters(x.dtype, x.device)
        low, high = haar_low if low is None else low, haar_high if high is None else high
    low, high = low.to(x.dtype), high.to(x.dtype)
    bands = (torch.outer(low, low), torch.outer(high, low), torch.outer(low, high), torch.outer(high, high))
    return torch.stack(bands).unsqueeze(1)


def haar_dwt2d(x: Tensor, dec_lo: Tensor | None = None, dec_hi: Tensor | None = None) -> Tensor:
    """One level of the 2-D wavelet transform with two-tap filters, shared by the channels.

    With `f_LL = outer(dec_lo, dec_lo)`, `f_LH = outer(dec_hi, dec_lo)`, `f_HL = outer(dec_lo, dec_hi)`,
    `f_HH = outer(dec_hi, dec_hi)` (rows along H, columns along W; taps as in cross-correlation)::

        y[b, k * C + c] = conv2d(x[b, c], f_k, stride=2),   k = LL, LH, HL, HH

    Args:
        x: (B, C, H, W) with H, W >= 1. An odd side is extended by one replicated sample at the bottom or right.
        dec_lo, dec_hi: two taps each; None means Haar, (s, s) and (s, -s) with s = 1 / sqrt(2).

    Returns:
        (B, 4 * C, ceil(H / 2), ceil(W / 2)). With Haar filters the four groups equal cA, cH, cV, cD of
        `pywt.dwt2(x, "haar")`.
    """
    channels, height, width = x.shape[1:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    bank = filter_bank(x, dec_lo, dec_hi).repeat(channels, 1, 1, 1)
    y = F.conv2d(x, bank, stride=2, groups=channels)
    return y.unflatten(1, (channels, 4)).transpose(1, 2).flatten(1, 2)


class HaarDWT2d(nn.Module):
    """`haar_dwt2d` with learnable filters `dec_lo`, `dec_hi`, Haar at the start; fixed Haar if not `learnable`."""

    dec_lo: nn.Parameter | None
    dec_hi: nn.Parameter | None

    def __init__(self, learnable: bool = True) -> None:
        super().__init__()
        self.learnable = learnable = check_flag("learnable", learnable)
        self.register_parameter("dec_lo", nn.Parameter(torch.tensor(HAAR_LOW)) if learnable else None)
        self.register_parameter("dec_hi", nn.Parameter(torch.tensor(HAAR_HIGH)) if learnable else None)

    def forward(self, x: Tensor) -> Tensor:
        return haar_dwt2d(x, self.dec_lo, self.dec_hi)

    def extra_repr(self) -> str:
        return f"learnable={self.learnable}"
