"""Pointwise (1x1) convolution of a concatenation that need not exist, in plain PyTorch."""

import torch
from torch import Tensor


def pointwise(
    x0: Tensor, x1: Tensor | None, x2: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A 1x1 convolution of up to three maps, with one weight and bias for all images or one for each::

        x = cat([x0, x1, x2], dim=1)
        einsum("bec,bchw->behw", weight.expand(B, -1, -1), x) + bias[..., None, None] + residual

    Args:
        x0, x1, x2: (B, C_i, H, W); x1 and x2 may be None.
        weight: (1 or B, E, C_0 + C_1 + C_2); cast to the dtype of `x0`, as `bias` is.
        bias: (E,) or (B, E).
        residual: (B, E, H, W) or None.

    Returns:
        (B, E, H, W) in the dtype of `x0`.
    """
    x = torch.cat([part for part in (x0, x1, x2) if part is not None], dim=1)
    batch, _, height, width = x.shape
    weight = weight.to(x.dtype).expand(batch, -1, -1)
    y = torch.baddbmm(bias.to(x.dtype)[..., None], weight, x.flatten(2)).unflatten(2, (height, width))
    return y if residual is None else y + residual
