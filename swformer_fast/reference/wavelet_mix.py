"""Wavelet branch: learnable Haar transform, depthwise convolution, inverse transform, in plain PyTorch."""

import torch
from torch import Tensor, nn

from ..parameters import WaveletParameters
from .common import check_odd, check_positive, conv2d, conv_parameters, parameters_of, plain, submodules
from .haar_dwt2d import HAAR_HIGH, HAAR_LOW, haar_dwt2d
from .haar_idwt2d import haar_idwt2d


def wavelet_mix(
    x: Tensor, weight: Tensor, bias: Tensor, dec_lo: Tensor, dec_hi: Tensor, rec_lo: Tensor, rec_hi: Tensor
) -> Tensor:
    """Depthwise convolution of the wavelet coefficients::

        y = haar_dwt2d(x, dec_lo, dec_hi)
        y = conv2d(y, weight, bias, padding=k // 2, groups=4 * C)
        haar_idwt2d(y, rec_lo, rec_hi, output_size=(H, W))

    Args:
        x: (B, C, H, W), H and W odd or even.
        weight: (4 * C, 1, k, k), k odd; all parameters are cast to the dtype of `x`.
        bias: (4 * C,).
        dec_lo, dec_hi, rec_lo, rec_hi: two taps each.

    Returns:
        (B, C, H, W) in the dtype of `x`.

    Source: the wavelet branch in the architecture figure of arXiv 2505.05504; the filters' form follows the same
    authors' published code.
    """
    y = conv2d(haar_dwt2d(x, dec_lo, dec_hi), weight, bias, groups=4 * x.shape[1])
    return haar_idwt2d(y, rec_lo, rec_hi, output_size=(x.shape[2], x.shape[3]))


class WaveletBranch(nn.Module):
    """`wavelet_mix` with its filters (Haar at the start) and its convolution's parameters.

    Kernel 3 is a guess of ours.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        dim, kernel_size = check_positive("dim", dim), check_odd("kernel_size", kernel_size)
        self.dec_lo = nn.Parameter(torch.tensor(HAAR_LOW))
        self.dec_hi = nn.Parameter(torch.tensor(HAAR_HIGH))
        self.rec_lo = nn.Parameter(torch.tensor(HAAR_LOW))
        self.rec_hi = nn.Parameter(torch.tensor(HAAR_HIGH))
        self.conv = nn.Conv2d(4 * dim, 4 * dim, kernel_size, padding=kernel_size // 2, groups=4 * dim)

    @property
    def readable(self) -> bool:
        """Whether `arguments` says all; else the layers are called."""
        return plain(*submodules(self, "conv"))

    def arguments(self) -> WaveletParameters:
        """The arguments of `wavelet_mix` after `x`."""
        taps = parameters_of(self, "dec_lo", "dec_hi", "rec_lo", "rec_hi")
        return WaveletParameters(*conv_parameters(*submodules(self, "conv")), *taps)

    def forward(self, x: Tensor) -> Tensor:
        if self.readable:
            return wavelet_mix(x, *self.arguments())
        y = self.conv(haar_dwt2d(x, self.dec_lo, self.dec_hi))
        return haar_idwt2d(y, self.rec_lo, self.rec_hi, output_size=(x.shape[2], x.shape[3]))
