"""The Fourier branch: transforms, the gated mixing of spectra (`_spectrum`), the algebra of parameters (`_algebra`).

The first convolution, the normalisations and the second convolutions are linear up to the non-linearities, so they are
one matrix on the spectrum of x itself; the last convolution commutes with the inverse transform. The matrix is (2, 2,
C, 2, D + 1): factor (gate, value), part (real, imaginary) and channel of the output, part and channel of the input; at
channel D of the input stand a constant (part 0) and what the zero frequency receives beside (part 1): a bias of the
first convolution is a constant image.

Neither transform is scaled, which would be another pass over memory: the matrix takes 1 / sqrt(H * W) in, and the
mixing's result another.

The transforms are torch.fft's (cuFFT). A direct DFT by matrix products inside the mixing kernel would spare 16 of 24
bytes a number, but of an N x N image it takes 6 N multiply-adds a number, beside the mixing's 5 D: at N = 64, 39 ps in
an A100's exact fp32 and 15 ps as three tf32 products against 11 ps for the bytes. It also needs every channel's whole
plane, 4 D N^2 bytes, in shared memory: 655 KB at D = 40, N = 64; it fits 99 KiB up to N = 24, where launches cost more
than either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._algebra import PLACES, compose, compose_backward
from ._device import empty, is_channels_last, parameter_gradients
from ._spectrum import spectrum_mix, spectrum_mix_backward, spectrum_moments, spectrum_moments_backward


def transform(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D, H, W // 2 + 1, 2), unscaled, contiguous, fp32."""
    return torch.view_as_real(torch.fft.rfft2(x.float().contiguous())).contiguous()


def inverse_transform(spectrum: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The unscaled inverse transform, in the layout of `like` and in its dtype unless another is given."""
    y = torch.fft.irfft2(torch.view_as_complex(spectrum), s=like.shape[2:], norm="forward")
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return y.to(dtype or like.dtype, memory_format=layout)


def fourier_mix(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.fourier_mix` with the parameters of the op: the image, its sums over the pixels, the moments and
    statistics of the batch.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes. The sums are (B, C) in
    fp32, empty unless needed. The last two results are empty where the normalisations have running statistics.
    """
    *parameters, eps, need_sums = arguments
    batch, dim, height, width = x.shape
    channels, of_batch = len(parameters[1]), parameters[2] is None
    out_weight, out_bias = (None if p is None else p.contiguous() for p in parameters[14:])
    sums, dtype = x.new_empty(0, dtype=torch.float32), torch.promote_types(parameters[4].dtype, torch.float32)
    if batch == 0:
        outputs = channels // 2 if out_weight is None else len(out_weight)
        sums = sums.view(0, outputs) if need_sums else sums
        no_moments = torch.zeros((2, dim, dim + 1) if of_batch else 0, dtype=torch.float64, device=x.device)
        statistics = torch.zeros((4, channels) if of_batch else 0, dtype=dtype, device=x.device)
        return empty(x, 0, outputs, height, width), sums, no_moments, statistics
    scale = 1 / math.sqrt(height * width)
    spectrum = transform(x)
    moments = spectrum_moments(spectrum, scale) if of_batch else None
    composed = compose(eps, height * width, tuple(parameters), spectrum, moments)
    mixed = spectrum_mix(spectrum, composed.matrix, out_weight, out_bias, width, scale)
    del spectrum
    if need_sums:  # they are the zero frequency
        sums = mixed[:, :, 0, 0, 0] * (height * width)
    y = inverse_transform(mixed, x)
    if moments is None or composed.statistics is None:
        return y, sums, x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=dtype)
    return y, sums, moments, composed.statistics


def fourier_mix_backward(
    grad: Tensor, grad_sums: Tensor | None, moments: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of `fourier_mix` by x and its twelve parameters; those not needed are empty. Deterministic.

    Recomputed from x: its spectrum, the matrix and, in the kernels, the tiles of pre-activations.
    """
    *parameters, eps, need_x, need_parameters = arguments
    differentiable = tuple(parameters[i] for i in PLACES if parameters[i] is not None)
    out = x.new_empty(0 if len(x) or not need_x else x.shape)
    grads = parameter_gradients(x, differentiable, need_parameters)
    if len(x):
        area, width, of_batch = x.shape[2] * x.shape[3], x.shape[3], parameters[2] is None
        spectrum, grad = transform(x), transform(grad)
        if grad_sums is not None:
            grad[:, :, 0, 0, 0].add_(grad_sums, alpha=area)
        statistics = moments if of_batch else None
        composed = compose(eps, area, tuple(parameters), spectrum, statistics, differentiable=True)
        out_weight, out_bias = (None if p is None else p.contiguous() for p in parameters[14:])
        through = need_parameters or of_batch
        of_spectrum, of_matrix, *last = spectrum_mix_backward(
            grad, spectrum, composed.matrix, out_weight, out_bias, width, 1 / math.sqrt(area), need_x, through
        )
        if through:
            first, product = compose_backward(of_matrix, composed, eps, area, tuple(parameters), spectrum, statistics)
            if need_x and product is not None:
                of_spectrum = spectrum_moments_backward(of_spectrum, spectrum, product, width)
            if need_parameters:
                grads = (*first, *last)
        if need_x:
            out = inverse_transform(of_spectrum, x)
    missing = (x.new_empty(0) for _ in range(len(PLACES) - len(grads)))
    return out, *grads, *missing
