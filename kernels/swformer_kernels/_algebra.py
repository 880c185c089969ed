"""The algebra of the Fourier branch's parameters: one matrix from all of them, the batch's statistics, and gradients.

The matrix and the spectrum that it mixes are described in `fourier_mix`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Launch, alike, cdiv, jit_for_all_sizes, matrix_options
from ._tiles import load, load_matrix, store, store_matrix

PLACES = (0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15)
"""Of the differentiable ones among the parameters of `fourier_mix`."""


@jit_for_all_sizes("batch")
def batch_statistics_kernel(
    spectrum, moments, weight, bias, table, statistics, products, zeros, batch, D, C, numbers, kept, side,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and variance of what the normalisations take, (4, 2 C): biased in `table`, unbiased in `statistics`.

    Unless `kept` is 0, `products` (2, 2 C, D) = weight @ moments, and `zeros` (B, 2 C) is the zero frequency after the
    first convolution. A program takes BLOCK_R of its channels.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < 2 * C
    offset = tl.load(bias + row, mask=exists, other=0.0).to(tl.float64) * side
    sum_at_zero = tl.zeros((BLOCK_R,), tl.float64)
    squares_at_zero = sum_at_zero
    for image in range(batch):
        real = offset
        for first in range(0, D, BLOCK_E):
            d = first + tl.arange(0, BLOCK_E)
            start = spectrum + (tl.zeros((BLOCK_E,), tl.int64) + image) * D * numbers
            value = tl.load(start + d.to(tl.int64) * numbers, mask=d < D, other=0.0).to(tl.float64) / side
            real += tl.sum(load_matrix(weight, row, exists, d, D, D).to(tl.float64) * value[None, :], 1)
        if kept > 0:
            tl.store(zeros + image * 2 * C + row, real, mask=exists)
        sum_at_zero += real
        squares_at_zero += real * real
    count = (numbers // 2).to(tl.float64) * batch
    nonzero = count - batch
    others = tl.maximum(nonzero, 1.0)
    row_stride = D + 1
    for part in tl.static_range(2):
        gram = moments + part * D * row_stride
        sums = tl.zeros((BLOCK_R,), tl.float64)
        for first in range(0, D, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            column = tl.load(gram + e * row_stride + D, mask=e < D, other=0.0)
            sums += tl.sum(load_matrix(weight, row, exists, e, D, D).to(tl.float64) * column[None, :], 1)
        spread = tl.zeros((BLOCK_R,), tl.float64)
        for first in range(0, D, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            product = tl.zeros((BLOCK_R, BLOCK_E), tl.float64)
            for start in range(0, D, BLOCK_K):
                d = start + tl.arange(0, BLOCK_K)
                mask = (d < D)[:, None] & (e < D)[None, :]
                right = tl.load(gram + d[:, None] * row_stride + e[None, :], mask=mask, other=0.0)
                left = load_matrix(weight, row, exists, d, D, D).to(tl.float64)
                product += tl.sum(left[:, :, None] * right[None, :, :], 1)
            if kept > 0:
                target = products + (part * 2 * C + row[:, None]) * D + e[None, :]
                tl.store(target, product, mask=exists[:, None] & (e < D)[None, :])
            spread += tl.sum(load_matrix(weight, row, exists, e, D, D).to(tl.float64) * product, 1)
        spread -= sums * sums / others
        spread = tl.where(spread < 0, 0.0, spread)
        if part == 1:
            sum_at_zero = tl.zeros((BLOCK_R,), tl.float64)
            squares_at_zero = sum_at_zero
        mean = (sums + sum_at_zero) / count
        away = sums / others - mean
        at_zero = squares_at_zero - 2.0 * mean * sum_at_zero + batch * mean * mean
        variance = (spread + nonzero * away * away + at_zero) / count
        place = row // C * 4 * C + 2 * (row % C) + part
        tl.store(table + place, mean, mask=exists)
        tl.store(table + 2 * C + place, variance, mask=exists)
        store(statistics + place, mean, exists)
        unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
        store(statistics + 2 * C + place, unbiased, exists)


@triton.jit
def _normalisation(norm, channel, exists, eps):
    """Mean, slope, offset and 1 / standard deviation of a normalisation (mean, variance, scale, shift), in fp64."""
    mean = tl.load(norm[0] + channel, mask=exists, other=0.0).to(tl.float64)
    variance = tl.load(norm[1] + channel, mask=exists, other=1.0).to(tl.float64)
    deviation = 1.0 / tl.sqrt(variance + eps)
    slope = tl.load(norm[2] + channel, mask=exists, other=0.0).to(tl.float64) * deviation
    return mean, slope, tl.load(norm[3] + channel, mask=exists, other=0.0).to(tl.float64) - mean * slope, deviation


@triton.jit
def _load_pairs(matrix, row, exists, c, C):
    """Elements 2 c and 2 c + 1 of rows of (2 C, 2 C), in fp32."""
    left = load_matrix(matrix, row, exists, 2 * c, 2 * C, 2 * C)
    return left, load_matrix(matrix, row, exists, 2 * c + 1, 2 * C, 2 * C)


@jit_for_all_sizes("D")
def compose_kernel(
    in_weight, in_bias, gate, value, out, D, C, side, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The matrix from the parameters: factor program_id(0), and blocks of its rows and of the input's channels.

    `gate` and `value` are mean, variance, scale, shift, weight and bias.
    """
    if tl.program_id(0) == 0:
        factor = gate
    else:
        factor = value
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = row < 2 * C
    place = 2 * (row % C) + row // C
    of_real = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    of_imaginary = of_real
    constant = load(factor[5] + place, exists)
    at_zero = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        n = tl.program_id(0) * C + c
        inner = c < C
        real, imaginary = _load_pairs(factor[4], place, exists, c, C)
        _, slope0, offset0, _ = _normalisation(factor, 2 * c, inner, eps)
        _, slope1, offset1, _ = _normalisation(factor, 2 * c + 1, inner, eps)
        constant += tl.sum(real * offset0.to(tl.float32)[None, :] + imaginary * offset1.to(tl.float32)[None, :], 1)
        real *= (slope0 / side).to(tl.float32)[None, :]
        imaginary *= (slope1 / side).to(tl.float32)[None, :]
        right = load_matrix(in_weight, n, inner, d, D, D)
        of_real = tl.dot(real, right, of_real, input_precision="ieee")
        of_imaginary = tl.dot(imaginary, right, of_imaginary, input_precision="ieee")
        first_bias = load(in_bias + n, inner) * side * side
        at_zero += tl.sum(real * first_bias[None, :], 1)
    row_stride = 2 * (D + 1)
    out += tl.program_id(0) * 2 * C * row_stride
    store_matrix(out, of_real, row, exists, d, D, row_stride)
    store_matrix(out + D + 1, of_imaginary, row, exists, d, D, row_stride)
    once = row < tl.where(tl.program_id(2) == 0, 2 * C, 0)
    tl.store(out + row * row_stride + D, constant, mask=once)
    tl.store(out + row * row_stride + 2 * D + 1, at_zero, mask=once)


@triton.jit
def _store_norm_gradients(grads, of_slope, of_offset, mean, slope, deviation, channel, inner, side, count):
    """Gradients of a normalisation's scale and shift, grads[0] and grads[1].

    Returns what is, for a value u of its input, the gradient through the statistics: share[1] + share[0] * u.
    """
    of_offset = of_offset.to(tl.float64)
    of_slope = of_slope.to(tl.float64) / side - mean * of_offset
    store(grads[0] + channel, of_slope * deviation, inner)
    store(grads[1] + channel, of_offset, inner)
    per_value = -of_slope * slope * deviation * deviation / count
    return per_value, -of_offset * slope / count - per_value * mean


@triton.jit
def _through_moments(moments, products, share, n, mask, d, D):
    """The gradient of the first convolution's weight through one part's moments."""
    product = tl.load(products + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    sums = tl.load(moments + d * (D + 1) + D, mask=d < D, other=0.0)
    return share[0][:, None] * product + share[1][:, None] * sums[None, :]


@jit_for_all_sizes("batch")
def compose_backward_kernel(
    grad, in_weight, in_bias, gate, value, moments, products, zeros, spectrum,
    weight_grad, bias_grad, gate_grads, value_grads, right, batch, numbers, row_stride, D, C, side, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters from the matrix's, of factor program_id(0) and block program_id(1) of its channels.

    Those of `gate` and `value` are of scale, shift, weight and bias. Unless `moments` is None, also through the
    statistics; the first convolution's weight times `right` (2 C, 2 * (D + 1) + B) is then what
    `spectrum_moments_backward_kernel` takes.
    """
    if tl.program_id(0) == 0:
        factor, grads = gate, gate_grads
    else:
        factor, grads = value, value_grads
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner = c < C
    n = tl.program_id(0) * C + c
    width = 2 * (D + 1)
    grad += tl.program_id(0) * 2 * C * width
    mean0, slope0, offset0, deviation0 = _normalisation(factor, 2 * c, inner, eps)
    mean1, slope1, offset1, deviation1 = _normalisation(factor, 2 * c + 1, inner, eps)
    scaled0, scaled1 = (slope0 / side).to(tl.float32)[None, :], (slope1 / side).to(tl.float32)[None, :]
    first_bias = load(in_bias + n, inner) * side * side
    of_slope0 = tl.zeros((BLOCK_C,), tl.float32)
    of_slope1, of_offset0, of_offset1, of_first_bias = of_slope0, of_slope0, of_slope0, of_slope0
    for start in range(0, 2 * C, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        exists = row < 2 * C
        place = 2 * (row % C) + row // C
        constant = tl.load(grad + row * width + D, mask=exists, other=0.0)
        at_zero = tl.load(grad + row * width + 2 * D + 1, mask=exists, other=0.0)
        mixing0 = at_zero[:, None] * first_bias[None, :]
        mixing1 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            transposed = tl.trans(load_matrix(in_weight, n, inner, d, D, D))
            mixing0 = tl.dot(load_matrix(grad, row, exists, d, D, width), transposed, mixing0, input_precision="ieee")
            left = load_matrix(grad + D + 1, row, exists, d, D, width)
            mixing1 = tl.dot(left, transposed, mixing1, input_precision="ieee")
        real, imaginary = _load_pairs(factor[4], place, exists, c, C)
        of_slope0 += tl.sum(real * mixing0, 0)
        of_slope1 += tl.sum(imaginary * mixing1, 0)
        of_offset0 += tl.sum(real * constant[:, None], 0)
        of_offset1 += tl.sum(imaginary * constant[:, None], 0)
        of_first_bias += tl.sum(real * scaled0 * at_zero[:, None], 0)
        target = grads[2] + place[:, None] * 2 * C + 2 * c[None, :]
        mask = exists[:, None] & inner[None, :]
        of_weight = mixing0 * scaled0 + constant[:, None] * offset0.to(tl.float32)[None, :]
        store(target, of_weight, mask)
        of_weight = mixing1 * scaled1 + constant[:, None] * offset1.to(tl.float32)[None, :]
        store(target + 1, of_weight, mask)
        mask = row < tl.where(tl.program_id(1) == 0, 2 * C, 0)
        tl.store(grads[3] + place, constant.to(grads[3].dtype.element_ty), mask=mask)
    of_first_bias = of_first_bias.to(tl.float64) * side * side
    count = (numbers // 2).to(tl.float64) * batch
    shares = _store_norm_gradients(grads, of_slope0, of_offset0, mean0, slope0, deviation0, 2 * c, inner, side, count)
    others = _store_norm_gradients(
        grads, of_slope1, of_offset1, mean1, slope1, deviation1, 2 * c + 1, inner, side, count
    )
    if moments is not None:
        for image in range(batch):
            real = tl.load(zeros + image * 2 * C + n, mask=inner, other=0.0)
            at_zero = shares[1] + shares[0] * real
            of_first_bias += at_zero * side
            target = right + n * row_stride + width + image
            tl.store(target, (at_zero / side).to(tl.float32), mask=inner)
        tl.store(right + n * row_stride + D, (shares[1] / side).to(tl.float32), mask=inner)
        tl.store(right + n * row_stride + 2 * D + 1, (others[1] / side).to(tl.float32), mask=inner)
    store(bias_grad + n, of_first_bias, inner)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for start in range(0, 2 * C, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            exists = row < 2 * C
            real, imaginary = _load_pairs(factor[4], 2 * (row % C) + row // C, exists, c, C)
            of_real = load_matrix(grad, row, exists, d, D, width)
            of_imaginary = load_matrix(grad + D + 1, row, exists, d, D, width)
            total = tl.dot(tl.trans(real * scaled0), of_real, total, input_precision="ieee")
            total = tl.dot(tl.trans(imaginary * scaled1), of_imaginary, total, input_precision="ieee")
        mask = inner[:, None] & (d < D)[None, :]
        if moments is not None:
            weight = load_matrix(in_weight, n, inner, d, D, D)
            through = _through_moments(moments, products, shares, n, mask, d, D)
            through += _through_moments(moments + D * (D + 1), products + 2 * C * D, others, n, mask, d, D)
            for image in range(batch):
                at_zero = shares[1] + shares[0] * tl.load(zeros + image * 2 * C + n, mask=inner, other=0.0)
                plane = spectrum + (tl.zeros((BLOCK_D,), tl.int64) + image) * D * numbers
                real_zero = tl.load(plane + d.to(tl.int64) * numbers, mask=d < D, other=0.0).to(tl.float64) / side
                through += at_zero[:, None] * real_zero[None, :]
            total += through.to(tl.float32)
            target = right + n[:, None] * row_stride + d[None, :]
            tl.store(target, weight * (shares[0] / side / side).to(tl.float32)[:, None], mask=mask)
            tl.store(target + D + 1, weight * (others[0] / side / side).to(tl.float32)[:, None], mask=mask)
        store_matrix(weight_grad, total, n, inner, d, D, D)


class Composed(NamedTuple):
    """What `compose` returns."""

    matrix: Tensor
    """(4 * C, 2 * (D + 1)), fp32, for the unscaled spectrum."""
    statistics: Tensor | None
    """Of the batch, (4, 2 * C): gate mean, unbiased variance, value mean, variance. None without moments."""
    norms: tuple[tuple[Tensor, ...], ...]
    """Gate's and value's mean, variance, scale, shift, weight and bias."""
    products: Tensor | None
    zeros: Tensor | None
    """As in `batch_statistics_kernel`, for `compose_backward`."""


def _options(like: Tensor) -> dict[str, int | bool]:
    return matrix_options(like) | {"num_warps": 4}


def prepare(like: Tensor, dim: int, channels: int, side: float, eps: float) -> Launch:
    """Of `compose_kernel`."""
    grid, constants = (2, cdiv(2 * channels, 32), cdiv(dim, 32)), {"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_C": 16}
    return Launch(compose_kernel, grid, (dim, channels, side, eps), constants | _options(like))


def compose(
    eps: float,
    area: int,
    parameters: tuple[Any, ...],
    spectrum: Tensor,
    moments: Tensor | None = None,
    differentiable: bool = False,
) -> Composed:
    """The matrix of the mixing from the parameters of `fourier_mix`; where there are moments, with their statistics.

    The columns of the spectrum are divided by sqrt(area), area = H * W.
    `spectrum` is unscaled, `moments` are those of the scaled one. `differentiable` keeps what `compose_backward` takes.
    """
    contiguous: list[Any] = [None if p is None else p.contiguous() for p in parameters[:14]]
    in_weight, in_bias, *factors = contiguous
    gate, value = alike(tuple(factors[:6]), tuple(factors[6:]))
    batch, dim = spectrum.shape[:2]
    channels, side = len(in_bias) // 2, math.sqrt(area)
    matrix = spectrum.new_empty(4 * channels, 2 * (dim + 1))
    statistics = products = zeros = None
    launch = prepare(spectrum, dim, channels, side, eps)
    with torch.cuda.device_of(spectrum):
        if moments is not None:
            table = moments.new_empty(4, 2 * channels)
            statistics = torch.empty_like(table, dtype=torch.promote_types(parameters[4].dtype, torch.float32))
            if differentiable:
                products = moments.new_empty(2, 2 * channels, dim)
                zeros = moments.new_empty(batch, 2 * channels)
            numbers = spectrum.shape[2] * spectrum.shape[3] * 2
            batch_statistics_kernel[(cdiv(2 * channels, 4),)](
                spectrum, moments, in_weight, in_bias, table, statistics,
                *((products, zeros) if differentiable else (moments, moments)),
                batch, dim, channels, numbers, int(differentiable), side,
                BLOCK_R=4, BLOCK_E=32, BLOCK_K=16, **_options(spectrum),
            )  # fmt: skip
            gate, value = (*table[:2], *gate[2:]), (*table[2:], *value[2:])
        launch(in_weight, in_bias, gate, value, matrix)
    return Composed(matrix, statistics, (gate, value), products, zeros)


def compose_backward(
    grad: Tensor,
    composed: Composed,
    eps: float,
    area: int,
    parameters: tuple[Any, ...],
    spectrum: Tensor,
    moments: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of in_weight, in_bias and, for gate and value, scale, shift, weight and bias, from the matrix's.

    And, with moments, the gradient of the spectrum through them as `spectrum_moments_backward` takes it.
    """
    in_weight, in_bias = (p.contiguous() for p in parameters[:2])
    batch, dim = spectrum.shape[:2]
    channels = len(in_bias) // 2
    numbers = spectrum.shape[2] * spectrum.shape[3] * 2
    grads = [torch.empty_like(p) for p in (in_weight, in_bias, *composed.norms[0][2:], *composed.norms[1][2:])]
    width = 2 * (dim + 1) + batch
    right = None if moments is None else spectrum.new_empty(2 * channels, width)
    with torch.cuda.device_of(spectrum):
        compose_backward_kernel[(2, cdiv(channels, 16))](
            grad, in_weight, in_bias, *composed.norms, moments, composed.products, composed.zeros, spectrum, *grads[:2],
            tuple(grads[2:6]), tuple(grads[6:]), right, batch, numbers, width, dim, channels, math.sqrt(area), eps,
            BLOCK_R=16, BLOCK_C=16, BLOCK_D=32, **_options(spectrum),
        )  # fmt: skip
    grads = [g.to(parameters[i].dtype) for g, i in zip(grads, PLACES[:10], strict=True)]
    if right is None:
        return tuple(grads), None
    product = right.new_empty(dim, width)
    # Autocast leaves a product that is written to a tensor alone.
    return tuple(grads), torch.mm(in_weight.flatten(1).T.float(), right, out=product)
