"""The Fourier branch: the algebra of its parameters, the gated mixing of spectra, their moments, and all gradients.

The first convolution, the normalisations and the second convolutions are linear up to the non-linearities, so they are
one matrix on the spectrum of x itself; the last convolution commutes with the inverse transform. The matrix is (2, 2,
C, 2, D + 1): factor (gate, value), part (real, imaginary) and channel of the output, part and channel of the input; at
channel D of the input stand a constant (part 0) and what the zero frequency receives beside (part 1): a bias of the
first convolution is a constant image.

A spectrum is (B, channels, H, W // 2 + 1, 2), fp32: real and imaginary parts of the half that rfft2 gives. A program
takes N frequencies of an image, as one tensor (channels, N) of real and one of imaginary parts. Neither transform is
scaled, which would be another pass over memory: the matrix takes 1 / sqrt(H * W) in, and the mixing's result another.

The transforms are torch.fft's (cuFFT). A direct DFT by matrix products inside the mixing kernel would spare 16 of 24
bytes a number, but of an N x N image it takes 6 N multiply-adds a number, beside the mixing's 5 D: at N = 64, 39 ps in
an A100's exact fp32 and 15 ps as three tf32 products against 11 ps for the bytes. It also needs every channel's whole
plane, 4 D N^2 bytes, in shared memory: 655 KB at D = 40, N = 64; it fits 99 KiB up to N = 24, where launches cost more
than either.

Statistics of a batch follow from the second moments of x's spectrum, in fp64. The zero frequency, far larger than the
others unless x has mean 0, is kept out of the moments and enters by itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import channel_block, empty, input_precision, is_channels_last, matrix_options, parameter_gradients
from ._math import gelu, gelu_derivative
from ._sums import sum_partials
from ._tiles import load_matrix, multiple, store_block, store_rounded

# What the registers allow, by the way of taking products: frequencies and threads of a program of the spectrum's
# gradient, and channels of one of the parameters' gradients.
_GRADIENT_FREQUENCIES = {"ieee": 32, "tf32x3": 16, "tf32": 16}
_GRADIENT_THREADS = {"ieee": 256, "tf32x3": 128, "tf32": 256}
_PARAMETER_CHANNELS = {"ieee": 32, "tf32x3": 16, "tf32": 32}
# Frequencies a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_FREQUENCIES_A_PARTIAL = 2048


@triton.jit
def _pointers(spectrum, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the given channels at the tile's frequencies, parts interleaved, and their mask: (channels, 2 N)."""
    numbers = multiple(numbers, ALIGN)
    column = 2 * N * tile + tl.arange(0, 2 * N)
    pointers = spectrum + (image * channels + channel.to(tl.int64))[:, None] * numbers + column[None, :]
    return pointers, (channel < channels)[:, None] & (column < numbers)[None, :]


@triton.jit
def _load_spectrum(spectrum, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr):
    """Real and imaginary parts of the given channels at the tile's frequencies, zero outside."""
    pointers, mask = _pointers(spectrum, image, channel, channels, tile, numbers, N, ALIGN)
    return tl.split(tl.reshape(tl.load(pointers, mask=mask, other=0.0), (channel.shape[0], N, 2)))


@triton.jit
def _store_spectrum(
    spectrum, real, imaginary, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr
):
    pointers, mask = _pointers(spectrum, image, channel, channels, tile, numbers, N, ALIGN)
    tl.store(pointers, tl.reshape(tl.join(real, imaginary), (channel.shape[0], 2 * N)), mask=mask)


@triton.jit
def _side_by_side(left, right, ROWS: tl.constexpr, N: tl.constexpr):
    """(ROWS, N) and (ROWS, N) as (ROWS, 2 N), left before right."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, 2 * N))


@triton.jit
def _apart(both, ROWS: tl.constexpr, N: tl.constexpr):
    """The inverse of `_side_by_side`."""
    return tl.split(tl.permute(tl.reshape(both, (ROWS, 2, N)), (0, 2, 1)))


@triton.jit
def _stacked(upper, lower, ROWS: tl.constexpr, N: tl.constexpr):
    """(ROWS, N) over (ROWS, N): (2 ROWS, N)."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * ROWS, N))


@triton.jit
def _unstacked(both, ROWS: tl.constexpr, N: tl.constexpr):
    """The inverse of `_stacked`."""
    return tl.split(tl.permute(tl.reshape(both, (2, ROWS, N)), (1, 2, 0)))


@triton.jit
def _multiplicity(tile, width, N: tl.constexpr):
    """How often each frequency of the half spectrum counts in the whole one, (1, N)."""
    column = (N * tile + tl.arange(0, N)) % (width // 2 + 1)
    return tl.where((column == 0) | (2 * column == width), 1.0, 2.0)[None, :]


@triton.jit
def _matrix_rows(first, C, BC: tl.constexpr):
    """The matrix's rows for channels first .. first + BC - 1 of all factors and parts, (4 BC,), and which exist."""
    index = tl.arange(0, 4 * BC)
    channel = first + index % BC
    return index // BC * C + channel, channel < C


@triton.jit
def _preactivations(
    spectrum, matrix, image, tile, row, exists, D, numbers,
    BK: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate and value before their non-linearities, each (2 BC, N), real parts over imaginary parts."""
    ld = 2 * (D + 1)
    constant = tl.load(matrix + row * ld + D, mask=exists, other=0.0)[:, None]
    at_zero = tl.load(matrix + row * ld + 2 * D + 1, mask=exists, other=0.0)[:, None]
    total = constant + tl.where((N * tile + tl.arange(0, N) == 0)[None, :], at_zero, 0.0)
    for first in range(0, D, BK):
        d = first + tl.arange(0, BK)
        real, imaginary = _load_spectrum(spectrum, image, d, D, tile, numbers, N, ALIGN)
        total = tl.dot(load_matrix(matrix, row, exists, d, D, ld), real, total, input_precision=PRECISION)
        total = tl.dot(load_matrix(matrix + D + 1, row, exists, d, D, ld), imaginary, total, input_precision=PRECISION)
    return _unstacked(total, 2 * BC, N)


@triton.jit
def _output_gradients(
    grad, weight, scale, image, tile, c, C, E, width, numbers,
    BK: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of gate times value, (2 BC, N), real parts over imaginary parts."""
    if weight is None:
        real, imaginary = _load_spectrum(grad, image, c, E, tile, numbers, N, ALIGN)
    else:
        total = tl.zeros((BC, 2 * N), tl.float32)
        for first in range(0, E, BK):
            e = first + tl.arange(0, BK)
            real, imaginary = _load_spectrum(grad, image, e, E, tile, numbers, N, ALIGN)
            transposed = tl.trans(load_matrix(weight, e, e < E, c, C, C))
            total = tl.dot(transposed, _side_by_side(real, imaginary, BK, N), total, input_precision=PRECISION)
        real, imaginary = _apart(total, BC, N)
    return _stacked(real, imaginary, BC, N) * (scale * _multiplicity(tile, width, N))


@triton.jit
def _gate_gradients(gate, value, grad, BC: tl.constexpr, N: tl.constexpr):
    """The gradients of sigmoid(gate) * gelu(value), gate's over value's, and that product."""
    s = tl.sigmoid(gate)
    u = gelu(value)
    return _stacked(grad * u * s * (1.0 - s), grad * s * gelu_derivative(value), 2 * BC, N), s * u


@triton.jit
def spectrum_mix_kernel(
    spectrum, matrix, weight, bias, scale, out, D, C, E, numbers, tiles,
    BK: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale * weight @ the gated mixing, plus the bias in the zero frequency. Without a weight, the mixing."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    if weight is not None:
        total = tl.zeros((BE, 2 * N), tl.float32)
    for first in range(0, C, BC):
        row, exists = _matrix_rows(first, C, BC)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BK, BC, N, ALIGN, PRECISION
        )
        real, imaginary = _unstacked(tl.sigmoid(gate) * gelu(value), BC, N)
        c = first + tl.arange(0, BC)
        if weight is None:
            _store_spectrum(out, scale * real, scale * imaginary, image, c, C, tile, numbers, N, ALIGN)
        else:
            last = load_matrix(weight, e, e < E, c, C, C)
            total = tl.dot(last, _side_by_side(real, imaginary, BC, N), total, input_precision=PRECISION)
    if weight is not None:
        real, imaginary = _apart(scale * total, BE, N)
        at_zero = (N * tile + tl.arange(0, N) == 0)[None, :]
        real += tl.where(at_zero, tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[:, None], 0.0)
        _store_spectrum(out, real, imaginary, image, e, E, tile, numbers, N, ALIGN)


@triton.jit
def spectrum_mix_backward_kernel(
    grad, spectrum, matrix, weight, scale, out, D, C, E, width, numbers, tiles,
    BK: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the spectrum."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    ld = 2 * (D + 1)
    real = tl.zeros((BD, N), tl.float32)
    imaginary = real
    for first in range(0, C, BC):
        row, exists = _matrix_rows(first, C, BC)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BK, BC, N, ALIGN, PRECISION
        )
        c = first + tl.arange(0, BC)
        inner = _output_gradients(
            grad, weight, scale, image, tile, c, C, E, width, numbers, BK, BC, N, ALIGN, PRECISION
        )
        inner, _ = _gate_gradients(gate, value, inner, BC, N)
        left = tl.trans(load_matrix(matrix, row, exists, d, D, ld))
        real = tl.dot(left, inner, real, input_precision=PRECISION)
        left = tl.trans(load_matrix(matrix + D + 1, row, exists, d, D, ld))
        imaginary = tl.dot(left, inner, imaginary, input_precision=PRECISION)
    count = _multiplicity(tile, width, N)
    _store_spectrum(out, real / count, imaginary / count, image, d, D, tile, numbers, N, ALIGN)


@triton.jit
def spectrum_parameters_kernel(
    grad, spectrum, matrix, weight, scale, partials, D, C, E, width, numbers, tiles, all_tiles, tiles_a_program,
    BK: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums, over some tiles, of the gradients of the matrix, the weight and the bias: a row of `partials`.

    A program takes block program_id(1) of the channels between, and block program_id(2) of the spectrum's channels and
    of the output's.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    row, exists = _matrix_rows(tl.program_id(1) * BC, C, BC)
    of_real = tl.zeros((4 * BC, BD), tl.float32)
    of_imaginary = of_real
    of_constant = tl.zeros((4 * BC,), tl.float32)
    of_zero = of_constant
    if weight is not None:
        of_weight = tl.zeros((BD, BC), tl.float32)
        of_bias = tl.zeros((BD,), tl.float32)
    start = tl.program_id(0) * tiles_a_program
    for index in range(start, tl.minimum(start + tiles_a_program, all_tiles)):
        tile = index % tiles
        image = (index // tiles).to(tl.int64)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BK, BC, N, ALIGN, PRECISION
        )
        inner = _output_gradients(
            grad, weight, scale, image, tile, c, C, E, width, numbers, BK, BC, N, ALIGN, PRECISION
        )
        inner, y = _gate_gradients(gate, value, inner, BC, N)
        real, imaginary = _load_spectrum(spectrum, image, d, D, tile, numbers, N, ALIGN)
        of_real = tl.dot(inner, tl.trans(real), of_real, input_precision=PRECISION)
        of_imaginary = tl.dot(inner, tl.trans(imaginary), of_imaginary, input_precision=PRECISION)
        of_constant += tl.sum(inner, 1)
        at_zero = (N * tile + tl.arange(0, N) == 0)[None, :]
        of_zero += tl.sum(tl.where(at_zero, inner, 0.0), 1)
        if weight is not None:
            real, imaginary = _load_spectrum(grad, image, d, E, tile, numbers, N, ALIGN)
            of_bias += tl.sum(tl.where(at_zero, real, 0.0), 1)
            count = scale * _multiplicity(tile, width, N)
            left = _side_by_side(real * count, imaginary * count, BD, N)
            real, imaginary = _unstacked(y, BC, N)
            right = tl.trans(_side_by_side(real, imaginary, BC, N))
            of_weight = tl.dot(left, right, of_weight, input_precision=PRECISION)
    ld = 2 * (D + 1)
    size = 4 * C * ld
    if weight is not None:
        size += E * (C + 1)
    target = partials + tl.program_id(0).to(tl.int64) * size
    store_block(target, of_real, row, exists, d, D, ld)
    store_block(target + D + 1, of_imaginary, row, exists, d, D, ld)
    once = exists & (row < tl.where(tl.program_id(2) == 0, 4 * C, 0))
    tl.store(target + row * ld + D, of_constant, mask=once)
    tl.store(target + row * ld + 2 * D + 1, of_zero, mask=once)
    if weight is not None:
        target += 4 * C * ld
        store_block(target, of_weight, d, d < E, c, C, C)
        tl.store(target + E * C + d, of_bias, mask=d < tl.where(tl.program_id(1) == 0, E, 0))


@triton.jit
def spectrum_moments_kernel(
    spectrum, scale, partials, D, numbers, tiles, all_tiles, tiles_a_program,
    BC: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Partial sums, over some tiles of the scaled spectrum, of products of channels c with channels d and of channels
    c themselves.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    products0 = tl.zeros((BC, BD), tl.float32)
    products1 = products0
    sums0 = tl.zeros((BC,), tl.float32)
    sums1 = sums0
    start = tl.program_id(0) * tiles_a_program
    for index in range(start, tl.minimum(start + tiles_a_program, all_tiles)):
        tile = index % tiles
        image = (index // tiles).to(tl.int64)
        others = (N * tile + tl.arange(0, N) > 0)[None, :]
        real, imaginary = _load_spectrum(spectrum, image, c, D, tile, numbers, N, ALIGN)
        real, imaginary = tl.where(others, real, 0.0), tl.where(others, imaginary, 0.0)
        right0, right1 = _load_spectrum(spectrum, image, d, D, tile, numbers, N, ALIGN)
        right0, right1 = tl.where(others, right0, 0.0), tl.where(others, right1, 0.0)
        products0 = tl.dot(real, tl.trans(right0), products0, input_precision="ieee")
        products1 = tl.dot(imaginary, tl.trans(right1), products1, input_precision="ieee")
        sums0 += tl.sum(real, 1)
        sums1 += tl.sum(imaginary, 1)
    ld = D + 1
    target = partials + tl.program_id(0).to(tl.int64) * (2 * D * ld)
    mask = c < tl.where(tl.program_id(2) == 0, D, 0)
    store_block(target, scale * scale * products0, c, c < D, d, D, ld)
    store_block(target + D * ld, scale * scale * products1, c, c < D, d, D, ld)
    tl.store(target + c * ld + D, scale * sums0, mask=mask)
    tl.store(target + (D + c) * ld + D, scale * sums1, mask=mask)


@triton.jit
def spectrum_moments_backward_kernel(
    grad, spectrum, product, out, D, width, numbers, tiles, ld,
    BK: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out = grad + the part of the gradient that comes through the statistics; `product` as in `compose_backward`."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    zeros = tl.zeros((BD, N), tl.float32)
    real = tl.load(product + d * ld + D, mask=d < D, other=0.0)[:, None] + zeros
    imaginary = tl.load(product + d * ld + 2 * D + 1, mask=d < D, other=0.0)[:, None] + zeros
    for first in range(0, D, BK):
        k = first + tl.arange(0, BK)
        right0, right1 = _load_spectrum(spectrum, image, k, D, tile, numbers, N, ALIGN)
        real = tl.dot(load_matrix(product, d, d < D, k, D, ld), right0, real, input_precision="ieee")
        left = load_matrix(product + D + 1, d, d < D, k, D, ld)
        imaginary = tl.dot(left, right1, imaginary, input_precision="ieee")
    others = (N * tile + tl.arange(0, N) > 0)[None, :]
    at_zero = tl.load(product + d * ld + 2 * (D + 1) + image, mask=d < D, other=0.0)[:, None]
    count = _multiplicity(tile, width, N)
    grad0, grad1 = _load_spectrum(grad, image, d, D, tile, numbers, N, ALIGN)
    real = grad0 + tl.where(others, real / count, at_zero)
    imaginary = grad1 + tl.where(others, imaginary / count, 0.0)
    _store_spectrum(out, real, imaginary, image, d, D, tile, numbers, N, ALIGN)


@triton.jit
def batch_statistics_kernel(
    spectrum, moments, weight, bias, table, statistics, products, zeros, batch, D, C, numbers, side,
    BR: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Mean and variance of what the normalisations take, (4, 2 C): biased in `table`, unbiased in `statistics`.

    Unless they are None, `products` (2, 2 C, D) = weight @ moments, and `zeros` (B, 2 C) is the zero frequency after
    the first convolution. A program takes BR of its channels.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    exists = row < 2 * C
    offset = tl.load(bias + row, mask=exists, other=0.0).to(tl.float64) * side
    sum_at_zero = tl.zeros((BR,), tl.float64)
    squares_at_zero = sum_at_zero
    for image in range(batch):
        real = offset
        for first in range(0, D, BE):
            d = first + tl.arange(0, BE)
            start = spectrum + (tl.zeros((BE,), tl.int64) + image) * D * numbers
            value = tl.load(start + d.to(tl.int64) * numbers, mask=d < D, other=0.0).to(tl.float64) / side
            real += tl.sum(load_matrix(weight, row, exists, d, D, D).to(tl.float64) * value[None, :], 1)
        if zeros is not None:
            tl.store(zeros + image * 2 * C + row, real, mask=exists)
        sum_at_zero += real
        squares_at_zero += real * real
    count = (numbers // 2).to(tl.float64) * batch
    rest = count - batch
    others = tl.maximum(rest, 1.0)
    ld = D + 1
    for part in tl.static_range(2):
        gram = moments + part * D * ld
        sums = tl.zeros((BR,), tl.float64)
        for first in range(0, D, BE):
            e = first + tl.arange(0, BE)
            column = tl.load(gram + e * ld + D, mask=e < D, other=0.0)
            sums += tl.sum(load_matrix(weight, row, exists, e, D, D).to(tl.float64) * column[None, :], 1)
        spread = tl.zeros((BR,), tl.float64)
        for first in range(0, D, BE):
            e = first + tl.arange(0, BE)
            product = tl.zeros((BR, BE), tl.float64)
            for start in range(0, D, BK):
                d = start + tl.arange(0, BK)
                mask = (d < D)[:, None] & (e < D)[None, :]
                right = tl.load(gram + d[:, None] * ld + e[None, :], mask=mask, other=0.0)
                left = load_matrix(weight, row, exists, d, D, D).to(tl.float64)
                product += tl.sum(left[:, :, None] * right[None, :, :], 1)
            if products is not None:
                target = products + (part * 2 * C + row[:, None]) * D + e[None, :]
                tl.store(target, product, mask=exists[:, None] & (e < D)[None, :])
            spread += tl.sum(load_matrix(weight, row, exists, e, D, D).to(tl.float64) * product, 1)
        spread -= sums * sums / others
        spread = tl.where(spread < 0, 0.0, spread)
        if part == 1:
            sum_at_zero = tl.zeros((BR,), tl.float64)
            squares_at_zero = sum_at_zero
        mean = (sums + sum_at_zero) / count
        away = sums / others - mean
        at_zero = squares_at_zero - 2.0 * mean * sum_at_zero + batch * mean * mean
        variance = (spread + rest * away * away + at_zero) / count
        place = row // C * 4 * C + 2 * (row % C) + part
        tl.store(table + place, mean, mask=exists)
        tl.store(table + 2 * C + place, variance, mask=exists)
        store_rounded(statistics + place, mean, exists)
        unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
        store_rounded(statistics + 2 * C + place, unbiased, exists)


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


@triton.jit
def compose_kernel(
    in_weight, in_bias, gate, value, out, D, C, side, eps, BR: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr
):
    """The matrix from the parameters: factor program_id(0), and blocks of its rows and of the input's channels.

    `gate` and `value` are mean, variance, scale, shift, weight and bias.
    """
    if tl.program_id(0) == 0:
        factor = gate
    else:
        factor = value
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    exists = row < 2 * C
    place = 2 * (row % C) + row // C
    of_real = tl.zeros((BR, BD), tl.float32)
    of_imaginary = of_real
    constant = tl.load(factor[5] + place, mask=exists, other=0.0).to(tl.float32)
    at_zero = tl.zeros((BR,), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
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
        first_bias = tl.load(in_bias + n, mask=inner, other=0.0).to(tl.float32) * side * side
        at_zero += tl.sum(real * first_bias[None, :], 1)
    ld = 2 * (D + 1)
    out += tl.program_id(0) * 2 * C * ld
    store_block(out, of_real, row, exists, d, D, ld)
    store_block(out + D + 1, of_imaginary, row, exists, d, D, ld)
    once = row < tl.where(tl.program_id(2) == 0, 2 * C, 0)
    tl.store(out + row * ld + D, constant, mask=once)
    tl.store(out + row * ld + 2 * D + 1, at_zero, mask=once)


@triton.jit
def _store_norm_gradients(grads, of_slope, of_offset, mean, slope, deviation, channel, inner, side, count):
    """Gradients of a normalisation's scale and shift, grads[0] and grads[1].

    Returns what is, for a value u of its input, the gradient through the statistics: share[1] + share[0] * u.
    """
    of_offset = of_offset.to(tl.float64)
    of_slope = of_slope.to(tl.float64) / side - mean * of_offset
    store_rounded(grads[0] + channel, of_slope * deviation, inner)
    store_rounded(grads[1] + channel, of_offset, inner)
    per_value = -of_slope * slope * deviation * deviation / count
    return per_value, -of_offset * slope / count - per_value * mean


@triton.jit
def _through_moments(moments, products, share, n, mask, d, D):
    """The gradient of the first convolution's weight through one part's moments."""
    product = tl.load(products + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    sums = tl.load(moments + d * (D + 1) + D, mask=d < D, other=0.0)
    return share[0][:, None] * product + share[1][:, None] * sums[None, :]


@triton.jit
def compose_backward_kernel(
    grad, in_weight, in_bias, gate, value, moments, products, zeros, spectrum, batch, numbers,
    weight_grad, bias_grad, gate_grads, value_grads, right, ld, D, C, side, eps,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
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
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inner = c < C
    n = tl.program_id(0) * C + c
    width = 2 * (D + 1)
    grad += tl.program_id(0) * 2 * C * width
    mean0, slope0, offset0, deviation0 = _normalisation(factor, 2 * c, inner, eps)
    mean1, slope1, offset1, deviation1 = _normalisation(factor, 2 * c + 1, inner, eps)
    scaled0, scaled1 = (slope0 / side).to(tl.float32)[None, :], (slope1 / side).to(tl.float32)[None, :]
    first_bias = tl.load(in_bias + n, mask=inner, other=0.0).to(tl.float32) * side * side
    of_slope0 = tl.zeros((BC,), tl.float32)
    of_slope1, of_offset0, of_offset1, of_first_bias = of_slope0, of_slope0, of_slope0, of_slope0
    for start in range(0, 2 * C, BR):
        row = start + tl.arange(0, BR)
        exists = row < 2 * C
        place = 2 * (row % C) + row // C
        constant = tl.load(grad + row * width + D, mask=exists, other=0.0)
        at_zero = tl.load(grad + row * width + 2 * D + 1, mask=exists, other=0.0)
        mixing0 = at_zero[:, None] * first_bias[None, :]
        mixing1 = tl.zeros((BR, BC), tl.float32)
        for first in range(0, D, BD):
            d = first + tl.arange(0, BD)
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
        tl.store(target, of_weight.to(target.dtype.element_ty), mask=mask)
        of_weight = mixing1 * scaled1 + constant[:, None] * offset1.to(tl.float32)[None, :]
        tl.store(target + 1, of_weight.to(target.dtype.element_ty), mask=mask)
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
            target = right + n * ld + width + image
            tl.store(target, (at_zero / side).to(tl.float32), mask=inner)
        tl.store(right + n * ld + D, (shares[1] / side).to(tl.float32), mask=inner)
        tl.store(right + n * ld + 2 * D + 1, (others[1] / side).to(tl.float32), mask=inner)
    store_rounded(bias_grad + n, of_first_bias, inner)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        total = tl.zeros((BC, BD), tl.float32)
        for start in range(0, 2 * C, BR):
            row = start + tl.arange(0, BR)
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
                plane = spectrum + (tl.zeros((BD,), tl.int64) + image) * D * numbers
                real_zero = tl.load(plane + d.to(tl.int64) * numbers, mask=d < D, other=0.0).to(tl.float64) / side
                through += at_zero[:, None] * real_zero[None, :]
            total += through.to(tl.float32)
            target = right + n[:, None] * ld + d[None, :]
            tl.store(target, weight * (shares[0] / side / side).to(tl.float32)[:, None], mask=mask)
            tl.store(target + D + 1, weight * (others[0] / side / side).to(tl.float32)[:, None], mask=mask)
        target = weight_grad + n[:, None] * D + d[None, :]
        tl.store(target, total.to(target.dtype.element_ty), mask=mask)


def _tiles(spectrum: Tensor, columns: int) -> tuple[int, int, int]:
    """Numbers of a channel of an image, tiles of an image, alignment of a channel in numbers."""
    numbers = 2 * spectrum.shape[2] * spectrum.shape[3]
    return numbers, triton.cdiv(numbers, 2 * columns), math.gcd(16, numbers)


def spectrum_mix(
    spectrum: Tensor,
    matrix: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    width: int,
    scale: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """The gated mixing of a spectrum. With s, for each frequency, (real parts, 1, imaginary parts, 1 or 0)::

        gate, value = (matrix @ s).chunk(2)                    # real parts, then imaginary parts, of C channels each
        y = (sigmoid(gate) * gelu(value)).view(2, C)
        scale * out_weight @ (y[0] + 1j * y[1])                # + out_bias in the zero frequency

    where the last entry of s is 1 in the zero frequency only.

    Args:
        spectrum: (B, D, H, width // 2 + 1, 2), contiguous, fp32.
        matrix: (4 * C, 2 * (D + 1)), fp32; see the head of this file.
        out_weight: (E, C). out_bias: (E,). Both None: the unit matrix and no bias, E = C.
        precision: of products, "ieee", "tf32x3" or "tf32"; None follows `torch.get_float32_matmul_precision`, whose
            default, "highest", is "ieee".

    Returns:
        (B, E, H, width // 2 + 1, 2).
    """
    batch, dim, height, half, _ = spectrum.shape
    channels = len(matrix) // 4
    outputs = channels if out_weight is None else len(out_weight)
    out = spectrum.new_empty(batch, outputs, height, half, 2)
    numbers, tiles, align = _tiles(spectrum, 32)
    block = channel_block(outputs, 128)
    with torch.cuda.device_of(spectrum):
        spectrum_mix_kernel[(batch * tiles, 1 if out_weight is None else triton.cdiv(outputs, block))](
            spectrum, matrix, out_weight, out_bias, scale, out, dim, channels, outputs, numbers, tiles,
            BK=16, BC=16, BE=block, N=32, ALIGN=align,
            PRECISION=input_precision(spectrum, precision), **matrix_options(spectrum),
        )  # fmt: skip
    return out


def spectrum_mix_backward(
    grad: Tensor,
    spectrum: Tensor,
    matrix: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    width: int,
    scale: float,
    need_spectrum: bool,
    need_parameters: bool,
    precision: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients, by the spectrum, `matrix`, `out_weight` and `out_bias`, of the image that spectrum_mix's is.

    `grad` is the transform of the image's gradient, and the spectrum's gradient is what the inverse transform turns
    into the gradient of the image whose transform the spectrum is. Transform and inverse are rfft2 and irfft2, both
    scaled "ortho" or both unscaled: frequencies whose mirror images rfft2 leaves out count twice in the one and half in
    the other. What is not needed is empty; without `out_weight` there are two. Deterministic.
    """
    batch, dim = spectrum.shape[:2]
    channels = len(matrix) // 4
    outputs = channels if out_weight is None else len(out_weight)
    precision = input_precision(spectrum, precision)
    out = torch.empty_like(spectrum) if need_spectrum else spectrum.new_empty(0)
    given = () if out_weight is None or out_bias is None else (out_weight, out_bias)
    grads = parameter_gradients(spectrum, (matrix, *given), need_parameters)
    with torch.cuda.device_of(spectrum):
        if need_spectrum:
            columns = _GRADIENT_FREQUENCIES[precision]
            numbers, tiles, align = _tiles(spectrum, columns)
            block = channel_block(dim, 64)
            options = matrix_options(spectrum)
            options["num_warps"] = options["num_warps"] * _GRADIENT_THREADS[precision] // 256
            spectrum_mix_backward_kernel[(batch * tiles, triton.cdiv(dim, block))](
                grad, spectrum, matrix, out_weight, scale, out, dim, channels, outputs, width, numbers, tiles,
                BK=16, BC=16, BD=block, N=columns, ALIGN=align, PRECISION=precision, **options,
            )  # fmt: skip
        if need_parameters:
            numbers, tiles, align = _tiles(spectrum, 16)
            each = _FREQUENCIES_A_PARTIAL // 16
            parts = triton.cdiv(batch * tiles, each)
            widest = max(dim, outputs) if given else dim
            block = channel_block(widest, _PARAMETER_CHANNELS[precision])
            partials = spectrum.new_empty(parts, 1, sum(g.numel() for g in grads))
            spectrum_parameters_kernel[(parts, triton.cdiv(channels, 16), triton.cdiv(widest, block))](
                grad, spectrum, matrix, out_weight, scale, partials, dim, channels, outputs, width, numbers, tiles,
                batch * tiles, each, BK=16, BC=16, BD=block, N=16, ALIGN=align, PRECISION=precision,
                **matrix_options(spectrum),
            )  # fmt: skip
            sum_partials(partials, *grads)
    return out, *grads


def spectrum_moments(spectrum: Tensor, scale: float = 1.0) -> Tensor:
    """(2, D, D + 1), fp64: of real and imaginary parts, over all frequencies but zero, products of channels and sums.

    Equal to, with s (2, B, D, frequencies but zero) times `scale`::

        torch.cat((torch.einsum("rbif,rbjf->rij", s, s), s.sum((1, 3)).unsqueeze(2)), 2)
    """
    batch, dim = spectrum.shape[:2]
    numbers, tiles, align = _tiles(spectrum, 32)
    each = _FREQUENCIES_A_PARTIAL // 32
    parts, block = triton.cdiv(batch * tiles, each), channel_block(dim, 64)
    partials = spectrum.new_empty(parts, 1, 2 * dim * (dim + 1))
    moments = spectrum.new_empty(2, dim, dim + 1, dtype=torch.float64)
    with torch.cuda.device_of(spectrum):
        spectrum_moments_kernel[(parts, triton.cdiv(dim, block), triton.cdiv(dim, block))](
            spectrum, scale, partials, dim, numbers, tiles, batch * tiles, each,
            BC=block, BD=block, N=32, ALIGN=align, **matrix_options(spectrum),
        )  # fmt: skip
        sum_partials(partials, moments)
    return moments


def spectrum_moments_backward(grad: Tensor, spectrum: Tensor, product: Tensor, width: int) -> Tensor:
    """`grad`, the gradient of a spectrum as in `spectrum_mix_backward`, plus what comes through its statistics.

    With p, q (D, D + 1) and r (D, B) the columns of `product`, that is p @ (real parts, 1), q @ (imaginary parts, 1),
    and r in the zero frequency of each image.
    """
    batch, dim = spectrum.shape[:2]
    numbers, tiles, align = _tiles(spectrum, 32)
    out = torch.empty_like(spectrum)
    block = channel_block(dim, 64)
    with torch.cuda.device_of(spectrum):
        spectrum_moments_backward_kernel[(batch * tiles, triton.cdiv(dim, block))](
            grad, spectrum, product, out, dim, width, numbers, tiles, product.shape[1],
            BK=16, BD=block, N=32, ALIGN=align, **matrix_options(spectrum),
        )  # fmt: skip
    return out


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


def compose(
    eps: float,
    area: int,
    parameters: tuple[Any, ...],
    spectrum: Tensor,
    moments: Tensor | None = None,
    differentiable: bool = False,
) -> Composed:
    """The matrix of the mixing from the parameters of `fourier_mix`; where there are moments, with their statistics.

    Equal to `swformer_fast._fourier.compose` with the columns of the spectrum divided by sqrt(area), area = H * W.
    `spectrum` is unscaled, `moments` are those of the scaled one. `differentiable` keeps what `compose_backward` takes.
    """
    in_weight, in_bias, *rest = (None if p is None else p.contiguous() for p in parameters[:14])
    # A program takes gate's or value's: their dtypes must be the same.
    others = rest[6:] + rest[:6]
    rest = [p if p is None or p.dtype == q.dtype else p.float() for p, q in zip(rest, others, strict=True)]
    batch, dim = spectrum.shape[:2]
    channels, side = len(in_bias) // 2, math.sqrt(area)
    gate, value = tuple(rest[:6]), tuple(rest[6:])
    matrix = spectrum.new_empty(4 * channels, 2 * (dim + 1))
    statistics = products = zeros = None
    options = matrix_options(spectrum) | {"num_warps": 4}
    with torch.cuda.device_of(spectrum):
        if moments is not None:
            table = moments.new_empty(4, 2 * channels)
            statistics = torch.empty_like(table, dtype=parameters[4].dtype)
            if differentiable:
                products = moments.new_empty(2, 2 * channels, dim)
                zeros = moments.new_empty(batch, 2 * channels)
            numbers = spectrum.shape[2] * spectrum.shape[3] * 2
            batch_statistics_kernel[(triton.cdiv(2 * channels, 4),)](
                spectrum, moments, in_weight, in_bias, table, statistics, products, zeros,
                batch, dim, channels, numbers, side,
                BR=4, BE=32, BK=16, **options,
            )  # fmt: skip
            gate, value = (*table[:2], *gate[2:]), (*table[2:], *value[2:])
        compose_kernel[(2, triton.cdiv(2 * channels, 32), triton.cdiv(dim, 32))](
            in_weight, in_bias, gate, value, matrix, dim, channels, side, eps, BR=32, BD=32, BC=16, **options
        )
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
        compose_backward_kernel[(2, triton.cdiv(channels, 16))](
            grad, in_weight, in_bias, *composed.norms, moments, composed.products, composed.zeros, spectrum, batch,
            numbers, *grads[:2], tuple(grads[2:6]), tuple(grads[6:]), right, width, dim, channels,
            math.sqrt(area), eps,
            BR=16, BC=16, BD=32, **matrix_options(spectrum) | {"num_warps": 4},
        )  # fmt: skip
    grads = [g.to(parameters[i].dtype) for g, i in zip(grads, _PLACES[:10], strict=True)]
    if right is None:
        return tuple(grads), None
    product = right.new_empty(dim, width)
    # Written to what is given, which autocast leaves alone.
    return tuple(grads), torch.mm(in_weight.flatten(1).T.float(), right, out=product)


_PLACES = (0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15)
"""Of the differentiable ones among the parameters of `fourier_mix`."""


def _transform(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, D, H, W // 2 + 1, 2), unscaled, contiguous, fp32."""
    return torch.view_as_real(torch.fft.rfft2(x.float().contiguous())).contiguous()


def _image(spectrum: Tensor, like: Tensor) -> Tensor:
    """The unscaled inverse transform, in the dtype and layout of `like`."""
    y = torch.fft.irfft2(torch.view_as_complex(spectrum), s=like.shape[2:], norm="forward")
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return y.to(like.dtype, memory_format=layout)


def fourier_mix(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.fourier_mix` with the parameters of the op: the image, its sums over the pixels, the moments and
    statistics of the batch.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes. The sums are (B, C) in
    fp32, empty unless needed. The last two results are empty where the normalisations have running statistics.
    """
    *parameters, eps, need_sums = arguments
    batch, dim, height, width = x.shape
    wide, own = len(parameters[1]), parameters[2] is None
    out_weight, out_bias = (None if p is None else p.contiguous() for p in parameters[14:])
    sums = x.new_empty(0, dtype=torch.float32)
    if batch == 0:
        outputs = wide // 2 if out_weight is None else len(out_weight)
        sums = sums.view(0, outputs) if need_sums else sums
        moments = torch.zeros((2, dim, dim + 1) if own else 0, dtype=torch.float64, device=x.device)
        statistics = torch.zeros((4, wide) if own else 0, dtype=parameters[4].dtype, device=x.device)
        return empty(x, 0, outputs, height, width), sums, moments, statistics
    scale = 1 / math.sqrt(height * width)
    spectrum = _transform(x)
    moments = spectrum_moments(spectrum, scale) if own else None
    composed = compose(eps, height * width, tuple(parameters), spectrum, moments)
    mixed = spectrum_mix(spectrum, composed.matrix, out_weight, out_bias, width, scale)
    del spectrum
    if need_sums:  # they are the zero frequency
        sums = mixed[:, :, 0, 0, 0] * (height * width)
    y = _image(mixed, x)
    if moments is None or composed.statistics is None:
        return y, sums, x.new_empty(0, dtype=torch.float64), parameters[4].new_empty(0)
    return y, sums, moments, composed.statistics


def fourier_mix_backward(
    grad: Tensor, grad_sums: Tensor | None, moments: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of `fourier_mix` by x and its twelve parameters; those not needed are empty. Deterministic.

    Recomputed from x: its spectrum, the matrix and, in the kernels, the tiles of pre-activations.
    """
    *parameters, eps, need_x, need_parameters = arguments
    given = tuple(parameters[i] for i in _PLACES if parameters[i] is not None)
    out = x.new_empty(0 if len(x) or not need_x else x.shape)
    grads = parameter_gradients(x, given, need_parameters)
    if len(x):
        area, width, own = x.shape[2] * x.shape[3], x.shape[3], parameters[2] is None
        spectrum, grad = _transform(x), _transform(grad)
        if grad_sums is not None:
            grad[:, :, 0, 0, 0].add_(grad_sums, alpha=area)
        statistics = moments if own else None
        composed = compose(eps, area, tuple(parameters), spectrum, statistics, differentiable=True)
        out_weight, out_bias = (None if p is None else p.contiguous() for p in parameters[14:])
        through = need_parameters or own
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
            out = _image(of_spectrum, x)
    missing = (x.new_empty(0) for _ in range(len(_PLACES) - len(grads)))
    return out, *grads, *missing
