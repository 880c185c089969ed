"""A 1x1 convolution with what is linear around it folded in, in plain PyTorch."""

import torch
from torch import Tensor


def fold_norm(
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    then_weight: Tensor | None,
    then_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """The parameters of the 1x1 convolution that does what a normalisation, a convolution, another convolution of its
    last N outputs and a scale do::

        y = conv2d(batch_norm(x, mean, variance, norm_weight, norm_bias, eps=eps), weight, bias)
        y = cat((y[:, :-N], conv2d(y[:, -N:], then_weight, then_bias)), dim=1)
        scale[:, None, None] * y

    Args:
        weight: (R, D). bias: (R,).
        mean, variance: (D,). Both None: no normalisation.
        norm_weight, norm_bias: (D,). None: 1 and 0.
        then_weight: (E, N), N <= R. then_bias: (E,). Both None: no other convolution.
        scale: as many as there are outputs. None: 1.
        eps: of the normalisation.

    Returns:
        Weight and then bias in one vector: (O * D + O,), O = R or R - N + E. Parameters of half precision give fp32:
        constants go into the bias that may be far larger than what is left of them.
    """
    tensors = (weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale)
    weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale = (  # type: ignore[assignment]
        t.float() if t is not None and t.dtype.itemsize < 4 else t for t in tensors
    )
    if mean is not None and variance is not None:
        slope = (variance + eps).rsqrt() if norm_weight is None else (variance + eps).rsqrt() * norm_weight
        offset = -mean * slope if norm_bias is None else norm_bias - mean * slope
        weight, bias = weight * slope, bias + weight @ offset
    if then_weight is not None and then_bias is not None:
        kept = len(weight) - then_weight.shape[1]
        weight = torch.cat((weight[:kept], then_weight @ weight[kept:]))
        bias = torch.cat((bias[:kept], then_bias + then_weight @ bias[kept:]))
    if scale is not None:
        weight, bias = scale[:, None] * weight, scale * bias
    return torch.cat((weight.flatten(), bias))
