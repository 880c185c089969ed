"""Spatial branch: depthwise convolution and GELU, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import SpatialParameters
from .common import check_odd, check_positive, conv2d, conv_parameters, plain, submodules


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution and exact (erf) GELU::

        gelu(conv2d(x, weight, bias, padding=k // 2, groups=C))

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd; cast to the dtype of `x`, as `bias` is.
        bias: (C,).

    Returns:
        (B, C, H, W) in the dtype of `x`.

    Source: the spatial branch in the architecture figure of arXiv 2505.05504.
    """
    return F.gelu(conv2d(x, weight, bias, groups=x.shape[1]))


class SpatialBranch(nn.Module):
    """`depthwise_gelu` with its convolution's parameters; kernel 3 is a guess of ours."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        dim, kernel_size = check_positive("dim", dim), check_odd("kernel_size", kernel_size)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    @property
    def readable(self) -> bool:
        """Whether `arguments` says all; else the layers are called."""
        return plain(*submodules(self, "conv"))

    def arguments(self) -> SpatialParameters:
        """The arguments of `depthwise_gelu` after `x`."""
        return SpatialParameters(*conv_parameters(*submodules(self, "conv")))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_gelu(x, *self.arguments()) if self.readable else F.gelu(self.conv(x))
