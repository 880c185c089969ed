"""A whole SWFormer block without gradients: the kernels of its parts, with what these leave to PyTorch in them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import depthwise_gelu, wavelet_mix
from ._algebra import compose
from ._device import check_dtype
from ._spectrum import spectrum_mix
from .fold_attention import fold_parts
from .fold_norm import fold_pair
from .fourier_mix import inverse_transform, transform
from .multiscale_ffn import scaled_ffn
from .pointwise import pointwise

_PARTS = (4, 2, 2, 6, 16, 4, 2, 1, 4, 10, 1, 3)
"""Of the arguments: the first normalisation, the mixer's first convolution, its branches, attention and last
convolution, beta, the second normalisation, the FFN, gamma, the epsilons of both normalisations and the Fourier branch.
"""


def _cut(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    parts, first = [], 0
    for count in _PARTS:
        parts.append(arguments[first : first + count])
        first += count
    return parts


def swformer_block(x: Tensor, *arguments: Any) -> Tensor:
    """`reference.swformer_block` with running statistics and depthwise kernels of 3 x 3.

    `x` is float32, float16 or bfloat16, the parameters of any of these dtypes; arithmetic and folded parameters are
    fp32, maps between kernels have the dtype of `x`, spectra fp32.

    Raises:
        TypeError: `x` has another dtype.
    """
    check_dtype("x", x)
    norm1, conv_in, spatial, wavelet, fourier, attention, conv_out, beta, norm2, ffn, gamma, eps = _cut(arguments)
    if not x.numel():
        return x.new_empty(x.shape)
    x = x.contiguous()
    batch, dim, height, width = x.shape
    area = height * width
    in_weight, in_bias, *factors, last_weight, last_bias = fourier
    channels, then = in_bias.shape[0], (in_weight, in_bias, None)
    folded, of_ffn = fold_pair((*conv_in, *norm1, *then), (*ffn[:2], *norm2, *then), eps[0], eps[1])
    sizes = (2 * dim * dim, channels * dim, 2 * dim, channels)
    local_weight, fourier_weight, local_bias, fourier_bias = folded.split(sizes)

    both = pointwise(x, None, None, local_weight.view(1, 2 * dim, dim), local_bias, None)
    left, left_sums = depthwise_gelu.with_parts(both[:, :dim], spatial, True)
    right, right_sums = wavelet_mix.with_parts(both[:, dim:], wavelet, True)
    del both
    assert left_sums is not None
    assert right_sums is not None
    spectrum = transform(x)
    matrix = compose(eps[2], area, (fourier_weight.view(channels, dim), fourier_bias, *factors), spectrum).matrix
    mixed = spectrum_mix(spectrum, matrix, None, None, width, 1 / math.sqrt(area))
    del spectrum
    frequencies = inverse_transform(mixed, x)

    sums = left_sums, right_sums, mixed[:, :, 0, 0, 0]  # in the zero frequency stands the mean
    parameters = (*attention, last_weight, last_bias, *conv_out, *beta)
    weights = fold_parts(*sums, float(area), parameters, area)
    weight, bias = weights.split((weights.numel() - batch * dim, batch * dim))
    del mixed, sums
    y = pointwise(left, right, frequencies, weight.view(batch, dim, -1), bias.view(batch, dim), x)
    weight, bias = of_ffn.split((of_ffn.numel() - ffn[1].numel(), ffn[1].numel()))
    return scaled_ffn(y, (weight.view(-1, dim), bias, *ffn[2:]), gamma[0].contiguous(), y)
