"""The statistics of batch normalisation in plain PyTorch."""

import torch
from torch import Tensor


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, and the mean once more, exact and without a gradient::

        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        stack((mean, variance)), mean.double().detach()

    Args:
        x: (B, C, H, W).

    Returns:
        (2, C), in fp32, or fp64 where `x` is, and (C,) in fp64.
    """
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return torch.stack((mean, variance)), mean.double().detach()
