"""The mixer's last convolution with what is linear around it folded in, in plain PyTorch."""

import torch
from torch import Tensor


def fold_attention(
    spatial_sums: Tensor,
    wavelet_sums: Tensor,
    fourier_sums: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    area: int,
) -> Tensor:
    """The parameters, for each image, of the 1x1 convolution of the three branches' maps that does what the Fourier
    branch's last convolution, channel attention, the mixer's last convolution and a scale do::

        y = cat((spatial, wavelet, conv2d(fourier, last_weight, last_bias)), dim=1)
        y = y * sigmoid(w2 @ relu(w1 @ y.mean((2, 3)) + b1) + b2)
        scale[:, None, None] * conv2d(y, weight, bias)

    Args:
        spatial_sums, wavelet_sums, fourier_sums: (B, S), (B, W), (B, I): the maps' sums over the pixels.
        w1: (R, C), C = S + W + F. b1: (R,). w2: (C, R). b2: (C,).
        last_weight: (F, I). last_bias: (F,).
        weight: (E, C). bias: (E,).
        scale: (E,). None: 1.
        area: pixels of an image.

    Returns:
        All weights and then all biases in one vector: (B * E * (S + W + I) + B * E,), in the sums' dtype, to which the
        parameters are cast.
    """
    w1, b1, w2, b2, last_weight, last_bias, weight, bias = (
        p.to(fourier_sums.dtype) for p in (w1, b1, w2, b2, last_weight, last_bias, weight, bias)
    )
    scale = None if scale is None else scale.to(fourier_sums.dtype)
    of_last = fourier_sums @ last_weight.t() + area * last_bias
    means = torch.cat((spatial_sums, wavelet_sums, of_last), dim=1) / area
    attention = ((means @ w1.t() + b1).relu() @ w2.t() + b2).sigmoid()
    if scale is not None:
        weight, bias = scale[:, None] * weight, scale * bias
    local = spatial_sums.shape[1] + wavelet_sums.shape[1]
    weight = weight * attention[:, None]
    of_last = weight[..., local:] @ torch.cat((last_weight, last_bias[:, None]), dim=1)
    weights = torch.cat((weight[..., :local], of_last[..., :-1]), dim=2)
    return torch.cat((weights.flatten(), (bias + of_last[..., -1]).flatten()))
