"""The spatial and the wavelet branch behind one 1x1 convolution, in plain PyTorch."""

from torch import Tensor

from ..parameters import SpatialParameters, WaveletParameters
from .depthwise_gelu import depthwise_gelu
from .pointwise import pointwise
from .wavelet_mix import wavelet_mix


def local_branches(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, spatial: SpatialParameters, wavelet: WaveletParameters
) -> tuple[Tensor, Tensor]:
    """Both branches of the halves of a 1x1 convolution of x::

        u, v = conv2d(x, in_weight[..., None, None], in_bias).chunk(2, dim=1)
        depthwise_gelu(u, *spatial), wavelet_mix(v, *wavelet)

    Args:
        x: (B, D, H, W).
        in_weight: (2 * C, D). in_bias: (2 * C,).
        spatial, wavelet: of the two branches on C channels each.

    Returns:
        Two of (B, C, H, W), in the dtype of `x`.
    """
    u, v = pointwise(x, None, None, in_weight[None], in_bias).chunk(2, 1)
    return depthwise_gelu(u, *spatial), wavelet_mix(v, *wavelet)
