"""A whole SWFormer block as one function, in plain PyTorch."""

import torch
from torch import Tensor

from ..parameters import BlockParameters
from .channel_attention import channel_attention
from .common import conv2d
from .depthwise_gelu import depthwise_gelu
from .fourier_mix import batch_norm, fourier_mix
from .multiscale_ffn import multiscale_ffn
from .wavelet_mix import wavelet_mix


def swformer_block(x: Tensor, parameters: BlockParameters, eps1: float, eps2: float, fourier_eps: float) -> Tensor:
    """`SWFormerBlock` with default options, all normalisations with their running statistics::

        u, v, w = conv2d(batch_norm(x, *norm1), *mixer.conv_in).chunk(3, dim=1)
        y = cat((depthwise_gelu(u, *mixer.spatial), wavelet_mix(v, *mixer.wavelet), fourier_mix(w, mixer.fourier)), 1)
        x = x + beta * conv2d(channel_attention(y, mixer.attention), *mixer.conv_out)
        x + gamma * multiscale_ffn(batch_norm(x, *norm2), ffn)

    with norm1, mixer, beta, norm2, ffn, gamma = parameters.

    Args:
        x: (B, D, H, W).
        parameters: mixer.conv_in (3 * D, D, 1, 1), each branch on D channels, mixer.conv_out (D, 3 * D, 1, 1).
        eps1, eps2, fourier_eps: of norm1, norm2 and the Fourier branch's normalisations.

    Returns:
        (B, D, H, W), in the dtype of `x`.

    Source: architecture figure of arXiv 2505.05504.
    """
    norm1, mixer, beta, norm2, ffn, gamma = parameters
    u, v, w = conv2d(batch_norm(x, norm1, False, 0.0, eps1), *mixer.conv_in).chunk(3, dim=1)
    branches = (
        depthwise_gelu(u, *mixer.spatial),
        wavelet_mix(v, *mixer.wavelet),
        fourier_mix(w, mixer.fourier, eps=fourier_eps),
    )
    y = conv2d(channel_attention(torch.cat(branches, dim=1), mixer.attention), *mixer.conv_out)
    x = x + beta * y
    return x + gamma * multiscale_ffn(batch_norm(x, norm2, False, 0.0, eps2), ffn)
