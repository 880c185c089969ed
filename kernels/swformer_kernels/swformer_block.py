"""A whole SWFormer block without gradients: the kernels of its parts, with what these leave to PyTorch in them.

On a small image the host takes longer than the kernels, so what follows from sizes is worked out once for each.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _algebra, _spectrum, depthwise_gelu, fold_attention, fold_norm, multiscale_ffn, pointwise, wavelet_mix
from ._device import Launch, alike, check_dtype
from .fourier_mix import inverse_transform, transform

_COUNTS = (4, 2, 2, 6, 2, 6, 6, 2, 4, 2, 1, 4, 2, 6, 2, 1)
"""Of the parameters: the first normalisation, the mixer's first convolution, its local branches, the Fourier branch's
first convolution, factors and last convolution, the attention, the mixer's last convolution, beta, the second
normalisation, the FFN's first, depthwise and last convolutions, gamma.
"""
_PARTS = tuple(slice(sum(_COUNTS[:i]), sum(_COUNTS[: i + 1])) for i in range(len(_COUNTS)))


class _Plan(NamedTuple):
    """The launches of a block, in order, and how many numbers are kept between them."""

    fold: Launch
    conv_in: Launch
    spatial: Launch
    wavelet: Launch
    matrix: Launch
    mixing: Launch
    attention: Launch
    conv_out: Launch
    ffn_in: Launch
    ffn_low: Launch
    ffn_out: Launch
    small: tuple[int, ...]
    """In fp32: weights and biases of the mixer's first convolution and the Fourier branch's, and of the FFN's first
    one, sums of both local branches in parts, the matrix, weights and biases of the mixer's last convolution.
    """
    pyramids: tuple[int, int]


def _aligned(*counts: int) -> tuple[int, ...]:
    """The last one more, so that what follows them in fp32 begins at a boundary of 16 bytes."""
    return *counts[:-1], counts[-1] + -sum(counts) % 4


@lru_cache(maxsize=512)
def _plan(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, products: str, eps: tuple[float, ...], *widths: int
) -> _Plan:
    """Of a contiguous image. `widths` are the outputs of the Fourier branch's first and last convolution and of the
    attention's and the FFN's first one; `products` is how `torch.get_float32_matmul_precision` wants them.
    """
    batch, dim, height, width = shape
    of_first, of_last, of_attention, of_ffn = widths
    area, channels, frequencies = height * width, of_first // 2, height * (width // 2 + 1)
    side, inputs = math.sqrt(area), 2 * dim + channels
    # Launches look at sizes and strides alone. The block itself has more maps at a time.
    x = torch.empty(shape, dtype=dtype, device=device)
    both = x.new_empty(batch, 2 * dim, height, width)
    mixed = x.new_empty(batch, channels, height, width, dtype=torch.float32)
    spectrum = x.new_empty(batch, dim, height, width // 2 + 1, 2, dtype=torch.float32)
    flat, both_flat, mixed_flat = (t.flatten(2) for t in (x, both, mixed))
    copy = None if dtype == torch.float32 else torch.empty_like(flat, dtype=torch.float32)
    first, last = x.new_empty(1, 2 * dim, dim), x.new_empty(batch, dim, inputs)
    kernel, net = x.new_empty(dim, 1, 3, 3), multiscale_ffn.Sizes(tuple(shape), of_ffn // 3, dim)
    spatial, spatial_parts = depthwise_gelu.prepare(both[:, :dim], x, kernel)
    wavelet, wavelet_parts = wavelet_mix.prepare(both[:, dim:], x, kernel)
    return _Plan(
        fold_norm.prepare(x, eps[0], (3 * dim, dim, dim, of_first, 0), eps[1], (of_ffn, dim)),
        pointwise.prepare([flat], first, first[0, :, 0], None, [both_flat], copy),
        spatial,
        wavelet,
        _algebra.prepare(x, dim, channels, side, eps[2]),
        _spectrum.prepare(spectrum, channels, None, 1 / side),
        fold_attention.prepare(
            x, (dim, dim, of_last, channels, dim, of_attention), batch, float(area), float(area),
            (spatial_parts, wavelet_parts), (2 * channels * frequencies, 2 * frequencies),
        ),
        pointwise.prepare([flat, flat, mixed_flat], last, x.new_empty(batch, dim), flat, [flat]),
        multiscale_ffn.prepare_in(net, x),
        multiscale_ffn.prepare_low(net),
        multiscale_ffn.prepare_out(net, x, x),
        (
            *_aligned(2 * dim * dim, of_first * dim, 2 * dim, of_first),
            *_aligned(of_ffn * dim, of_ffn),
            *_aligned(batch * dim * spatial_parts),
            *_aligned(batch * dim * wavelet_parts),
            *_aligned(8 * channels * (dim + 1)),
            *_aligned(batch * dim * inputs, batch * dim),
        ),
        (net.numel(x), net.numel(x, first=1)),
    )  # fmt: skip


def swformer_block(x: Tensor, *arguments: Any) -> Tensor:
    """`reference.swformer_block` with running statistics and depthwise kernels of 3 x 3.

    `x` is float32, float16 or bfloat16, the parameters of any of these dtypes; arithmetic and folded parameters are
    fp32, maps between kernels have the dtype of `x`, spectra and what is transformed fp32.

    Raises:
        TypeError: `x` has another dtype.
    """
    check_dtype("x", x)
    if not x.numel():
        return x.new_empty(x.shape)
    x, tensors = x.contiguous(), tuple([p.contiguous() for p in arguments[:-3]])
    if x.data_ptr() % 16:  # a part of another tensor
        x = x.clone()
    (
        norm1, conv_in, spatial, wavelet, fourier_in, gate, value, fourier_out,
        attention, conv_out, (beta,), norm2, ffn_in, depthwise, ffn_out, (gamma,),
    ) = [tensors[part] for part in _PARTS]  # fmt: skip
    widths = [bias.shape[0] for bias in (fourier_in[1], fourier_out[1], attention[1], ffn_in[1])]
    plan = _plan(x.shape, x.dtype, x.device, torch.get_float32_matmul_precision(), arguments[-3:], *widths)
    (
        local_weight, fourier_weight, local_bias, fourier_bias, ffn_weight, ffn_bias,
        left_sums, right_sums, matrix, last_weight, last_bias,
    ) = x.new_empty(sum(plan.small), dtype=torch.float32).split_with_sizes(plan.small)  # fmt: skip
    batch, dim, height, width = x.shape
    with torch.cuda.device_of(x):
        first, second = alike((*conv_in, *norm1), (*ffn_in, *norm2))
        plan.fold(
            (*first[:2], first[2:], *fourier_in, first[1], local_weight),
            (*second[:2], second[2:], *fourier_in, second[1], ffn_weight),
        )
        both = x.new_empty(batch, 2 * dim, height, width)
        copy = torch.empty_like(x, dtype=torch.float32) if plan.conv_in.constants["COPIED"] else x
        plan.conv_in((x, x, x), local_weight, local_bias, x, (both, both, both), copy)
        spectrum = transform(copy)
        del copy
        left, right = torch.empty_like(x), torch.empty_like(x)
        plan.spatial(both, left, *spatial, left_sums)
        plan.wavelet(both[:, dim:], None, right, *wavelet, right_sums)
        del both
        plan.matrix(fourier_weight, fourier_bias, *alike(gate, value), matrix)
        mixed = x.new_empty(batch, widths[0] // 2, height, width // 2 + 1, 2, dtype=torch.float32)
        plan.mixing(spectrum, matrix, None, None, mixed)
        del spectrum
        frequencies = inverse_transform(mixed, x, torch.float32)
        # In the zero frequency stands the mean.
        plan.attention(left_sums, right_sums, mixed, fourier_out, attention, *conv_out, beta, last_weight)
        del mixed
        y = torch.empty_like(x)
        plan.conv_out((left, right, frequencies), last_weight, last_bias, x, (y, y, y), y)
        del left, right, frequencies
        hidden, mixed = [x.new_empty(count) for count in plan.pyramids]
        plan.ffn_in(y, ffn_weight, ffn_bias, hidden)
        weights, biases = multiscale_ffn.depthwise_parameters(depthwise)
        plan.ffn_low(hidden, mixed, weights, biases)
        out = torch.empty_like(x)
        plan.ffn_out(hidden, mixed, weights[0], biases[0], *ffn_out, gamma, y, out)
    return out
