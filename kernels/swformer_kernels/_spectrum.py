"""The gated mixing of spectra, their moments, and all gradients.

A spectrum is (B, channels, H, W // 2 + 1, 2), fp32: real and imaginary parts of the half that rfft2 gives. A program
takes N frequencies of an image, as one tensor (channels, N) of real and one of imaginary parts. The matrix that mixes
is described in `fourier_mix`.

Statistics of a batch follow from the second moments of x's spectrum, in fp64 (`_algebra`). The zero frequency, far
larger than the others unless x has mean 0, is kept out of the moments and enters by itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    Launch,
    cdiv,
    channel_block,
    input_precision,
    jit_for_all_sizes,
    matrix_options,
    parameter_gradients,
)
from ._math import gelu, gelu_derivative
from ._sums import sum_partials
from ._tiles import dot, load, load_matrix, multiple, store_matrix

# What the registers allow, by the way of taking products: frequencies, threads and registers of a program of the
# spectrum's gradient, and channels of one of the parameters' gradients.
_GRADIENT_FREQUENCIES = {"ieee": 32, "tf32x3": 16, "tf32": 32}
_GRADIENT_THREADS = {"ieee": (256, 255), "tf32x3": (128, 168), "tf32": (256, 128)}
_PARAMETER_CHANNELS = {"ieee": 32, "tf32x3": 16, "tf32": 32}
# Frequencies a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_FREQUENCIES_A_PARTIAL = 2048


@triton.jit
def _frequency_pointers(spectrum, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to channels at the tile's frequencies, parts interleaved, and their mask: (channels, 2 N)."""
    numbers = multiple(numbers, ALIGN)
    column = 2 * N * tile + tl.arange(0, 2 * N)
    pointers = spectrum + (image * channels + channel.to(tl.int64))[:, None] * numbers + column[None, :]
    return pointers, (channel < channels)[:, None] & (column < numbers)[None, :]


@triton.jit
def _load_spectrum(spectrum, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr):
    """Real and imaginary parts of channels at the tile's frequencies, zero outside."""
    pointers, mask = _frequency_pointers(spectrum, image, channel, channels, tile, numbers, N, ALIGN)
    return tl.split(tl.reshape(tl.load(pointers, mask=mask, other=0.0), (channel.shape[0], N, 2)))


@triton.jit
def _store_spectrum(
    spectrum, real, imaginary, image, channel, channels, tile, numbers, N: tl.constexpr, ALIGN: tl.constexpr
):
    pointers, mask = _frequency_pointers(spectrum, image, channel, channels, tile, numbers, N, ALIGN)
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
    """How often each frequency of the half spectrum counts in the full one, (1, N)."""
    column = (N * tile + tl.arange(0, N)) % (width // 2 + 1)
    return tl.where((column == 0) | (2 * column == width), 1.0, 2.0)[None, :]


@triton.jit
def _matrix_rows(first, C, BLOCK_C: tl.constexpr, FACTORS: tl.constexpr = 2):
    """The matrix's rows for channels first .. first + BLOCK_C - 1 of both parts of all factors, or of the gate alone,
    (2 FACTORS BLOCK_C,), and which exist.
    """
    index = tl.arange(0, 2 * FACTORS * BLOCK_C)
    channel = first + index % BLOCK_C
    return index // BLOCK_C * C + channel, channel < C


@triton.jit
def _preactivations(
    spectrum, matrix, image, tile, row, exists, D, numbers,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate and value before their non-linearities, each (2 BLOCK_C, N), real parts over imaginary parts."""
    row_stride = 2 * (D + 1)
    constant = tl.load(matrix + row * row_stride + D, mask=exists, other=0.0)[:, None]
    at_zero = tl.load(matrix + row * row_stride + 2 * D + 1, mask=exists, other=0.0)[:, None]
    total = constant + tl.where((N * tile + tl.arange(0, N) == 0)[None, :], at_zero, 0.0)
    for first in range(0, D, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        real, imaginary = _load_spectrum(spectrum, image, d, D, tile, numbers, N, ALIGN)
        total = dot(load_matrix(matrix, row, exists, d, D, row_stride), real, total, PRECISION)
        total = dot(load_matrix(matrix + D + 1, row, exists, d, D, row_stride), imaginary, total, PRECISION)
    return _unstacked(total, 2 * BLOCK_C, N)


@triton.jit
def _output_gradients(
    grad, weight, scale, image, tile, c, C, E, width, numbers,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of gate times value, (2 BLOCK_C, N), real parts over imaginary parts."""
    if weight is None:
        real, imaginary = _load_spectrum(grad, image, c, E, tile, numbers, N, ALIGN)
    else:
        total = tl.zeros((BLOCK_C, 2 * N), tl.float32)
        for first in range(0, E, BLOCK_K):
            e = first + tl.arange(0, BLOCK_K)
            real, imaginary = _load_spectrum(grad, image, e, E, tile, numbers, N, ALIGN)
            transposed = tl.trans(load_matrix(weight, e, e < E, c, C, C))
            total = dot(transposed, _side_by_side(real, imaginary, BLOCK_K, N), total, PRECISION)
        real, imaginary = _apart(total, BLOCK_C, N)
    return _stacked(real, imaginary, BLOCK_C, N) * (scale * _multiplicity(tile, width, N))


@triton.jit
def _gate_gradients(gate, value, grad):
    """The gradients of sigmoid(gate) * gelu(value) by gate and by value, and that product."""
    s = tl.sigmoid(gate)
    u = gelu(value)
    return grad * u * s * (1.0 - s), grad * s * gelu_derivative(value), s * u


@jit_for_all_sizes("D")
def spectrum_mix_kernel(
    spectrum, matrix, weight, bias, out, D, C, E, scale, numbers, tiles,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale * weight @ the gated mixing, plus the bias in the zero frequency. Without a weight, the mixing."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    if weight is not None:
        total = tl.zeros((BLOCK_E, 2 * N), tl.float32)
    for first in range(0, C, BLOCK_C):
        row, exists = _matrix_rows(first, C, BLOCK_C)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BLOCK_K, BLOCK_C, N, ALIGN, PRECISION
        )
        real, imaginary = _unstacked(tl.sigmoid(gate) * gelu(value), BLOCK_C, N)
        c = first + tl.arange(0, BLOCK_C)
        if weight is None:
            _store_spectrum(out, scale * real, scale * imaginary, image, c, C, tile, numbers, N, ALIGN)
        else:
            last = load_matrix(weight, e, e < E, c, C, C)
            total = dot(last, _side_by_side(real, imaginary, BLOCK_C, N), total, PRECISION)
    if weight is not None:
        real, imaginary = _apart(scale * total, BLOCK_E, N)
        at_zero = (N * tile + tl.arange(0, N) == 0)[None, :]
        real += tl.where(at_zero, load(bias + e, mask=e < E)[:, None], 0.0)
        _store_spectrum(out, real, imaginary, image, e, E, tile, numbers, N, ALIGN)


@jit_for_all_sizes("D")
def spectrum_mix_backward_kernel(
    grad, spectrum, matrix, weight, out, D, C, E, scale, width, numbers, tiles,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the spectrum."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_stride = 2 * (D + 1)
    real = tl.zeros((BLOCK_D, N), tl.float32)
    imaginary = real
    for first in range(0, C, BLOCK_C):
        row, exists = _matrix_rows(first, C, BLOCK_C)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BLOCK_K, BLOCK_C, N, ALIGN, PRECISION
        )
        c = first + tl.arange(0, BLOCK_C)
        inner = _output_gradients(
            grad, weight, scale, image, tile, c, C, E, width, numbers, BLOCK_K, BLOCK_C, N, ALIGN, PRECISION
        )
        of_gate, of_value, _ = _gate_gradients(gate, value, inner)
        # One factor after the other: both would need twice the registers.
        row, exists = _matrix_rows(first, C, BLOCK_C, 1)
        for factor in tl.range(2, num_stages=1):
            inner = tl.where(factor == 0, of_gate, of_value)
            rows = matrix + factor * 2 * C * row_stride
            real = dot(tl.trans(load_matrix(rows, row, exists, d, D, row_stride)), inner, real, PRECISION)
            left = tl.trans(load_matrix(rows + D + 1, row, exists, d, D, row_stride))
            imaginary = dot(left, inner, imaginary, PRECISION)
    count = _multiplicity(tile, width, N)
    _store_spectrum(out, real / count, imaginary / count, image, d, D, tile, numbers, N, ALIGN)


@jit_for_all_sizes("D")
def spectrum_parameters_kernel(
    grad, spectrum, matrix, weight, partials, D, C, E, scale, width, numbers, tiles, all_tiles, tiles_a_program,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums, over some tiles, of the gradients of the matrix, the weight and the bias: a row of `partials`.

    A program takes block program_id(1) of the channels between, and block program_id(2) of the spectrum's channels and
    of the output's.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, exists = _matrix_rows(tl.program_id(1) * BLOCK_C, C, BLOCK_C)
    of_real = tl.zeros((4 * BLOCK_C, BLOCK_D), tl.float32)
    of_imaginary = of_real
    of_constant = tl.zeros((4 * BLOCK_C,), tl.float32)
    of_zero = of_constant
    if weight is not None:
        of_weight = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
        of_bias = tl.zeros((BLOCK_D,), tl.float32)
    start = tl.program_id(0) * tiles_a_program
    for index in range(start, tl.minimum(start + tiles_a_program, all_tiles)):
        tile = index % tiles
        image = (index // tiles).to(tl.int64)
        gate, value = _preactivations(
            spectrum, matrix, image, tile, row, exists, D, numbers, BLOCK_K, BLOCK_C, N, ALIGN, PRECISION
        )
        inner = _output_gradients(
            grad, weight, scale, image, tile, c, C, E, width, numbers, BLOCK_K, BLOCK_C, N, ALIGN, PRECISION
        )
        of_gate, of_value, y = _gate_gradients(gate, value, inner)
        inner = _stacked(of_gate, of_value, 2 * BLOCK_C, N)
        real, imaginary = _load_spectrum(spectrum, image, d, D, tile, numbers, N, ALIGN)
        of_real = dot(inner, tl.trans(real), of_real, PRECISION)
        of_imaginary = dot(inner, tl.trans(imaginary), of_imaginary, PRECISION)
        of_constant += tl.sum(inner, 1)
        at_zero = (N * tile + tl.arange(0, N) == 0)[None, :]
        of_zero += tl.sum(tl.where(at_zero, inner, 0.0), 1)
        if weight is not None:
            real, imaginary = _load_spectrum(grad, image, d, E, tile, numbers, N, ALIGN)
            of_bias += tl.sum(tl.where(at_zero, real, 0.0), 1)
            count = scale * _multiplicity(tile, width, N)
            left = _side_by_side(real * count, imaginary * count, BLOCK_D, N)
            real, imaginary = _unstacked(y, BLOCK_C, N)
            right = tl.trans(_side_by_side(real, imaginary, BLOCK_C, N))
            of_weight = dot(left, right, of_weight, PRECISION)
    row_stride = 2 * (D + 1)
    size = 4 * C * row_stride
    if weight is not None:
        size += E * (C + 1)
    target = partials + tl.program_id(0).to(tl.int64) * size
    store_matrix(target, of_real, row, exists, d, D, row_stride)
    store_matrix(target + D + 1, of_imaginary, row, exists, d, D, row_stride)
    once = exists & (row < tl.where(tl.program_id(2) == 0, 4 * C, 0))
    tl.store(target + row * row_stride + D, of_constant, mask=once)
    tl.store(target + row * row_stride + 2 * D + 1, of_zero, mask=once)
    if weight is not None:
        target += 4 * C * row_stride
        store_matrix(target, of_weight, d, d < E, c, C, C)
        tl.store(target + E * C + d, of_bias, mask=d < tl.where(tl.program_id(1) == 0, E, 0))


@jit_for_all_sizes("D")
def spectrum_moments_kernel(
    spectrum, partials, D, scale, numbers, tiles, all_tiles, tiles_a_program,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Partial sums, over some tiles of the scaled spectrum, of products of channels c with channels d and of channels
    c themselves.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    products0 = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    products1 = products0
    sums0 = tl.zeros((BLOCK_C,), tl.float32)
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
    row_stride = D + 1
    target = partials + tl.program_id(0).to(tl.int64) * (2 * D * row_stride)
    mask = c < tl.where(tl.program_id(2) == 0, D, 0)
    store_matrix(target, scale * scale * products0, c, c < D, d, D, row_stride)
    store_matrix(target + D * row_stride, scale * scale * products1, c, c < D, d, D, row_stride)
    tl.store(target + c * row_stride + D, scale * sums0, mask=mask)
    tl.store(target + (D + c) * row_stride + D, scale * sums1, mask=mask)


@jit_for_all_sizes("D")
def spectrum_moments_backward_kernel(
    grad, spectrum, product, out, D, width, numbers, tiles, row_stride,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out = grad + the part of the gradient that comes through the statistics; `product` as in `compose_backward`."""
    tile = tl.program_id(0) % tiles
    image = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    zeros = tl.zeros((BLOCK_D, N), tl.float32)
    real = tl.load(product + d * row_stride + D, mask=d < D, other=0.0)[:, None] + zeros
    imaginary = tl.load(product + d * row_stride + 2 * D + 1, mask=d < D, other=0.0)[:, None] + zeros
    for first in range(0, D, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        right0, right1 = _load_spectrum(spectrum, image, k, D, tile, numbers, N, ALIGN)
        real = tl.dot(load_matrix(product, d, d < D, k, D, row_stride), right0, real, input_precision="ieee")
        left = load_matrix(product + D + 1, d, d < D, k, D, row_stride)
        imaginary = tl.dot(left, right1, imaginary, input_precision="ieee")
    others = (N * tile + tl.arange(0, N) > 0)[None, :]
    at_zero = tl.load(product + d * row_stride + 2 * (D + 1) + image, mask=d < D, other=0.0)[:, None]
    count = _multiplicity(tile, width, N)
    grad0, grad1 = _load_spectrum(grad, image, d, D, tile, numbers, N, ALIGN)
    real = grad0 + tl.where(others, real / count, at_zero)
    imaginary = grad1 + tl.where(others, imaginary / count, 0.0)
    _store_spectrum(out, real, imaginary, image, d, D, tile, numbers, N, ALIGN)


def _tiles(spectrum: Tensor, columns: int) -> tuple[int, int, int]:
    """Numbers of a channel of an image, tiles of an image, alignment of a channel in numbers: 16 bytes or 8."""
    numbers = 2 * spectrum.shape[2] * spectrum.shape[3]
    return numbers, cdiv(numbers, 2 * columns), math.gcd(4, numbers)


def prepare(spectrum: Tensor, channels: int, outputs: int | None, scale: float, precision: str | None = None) -> Launch:
    """Of `spectrum_mix_kernel`; the mixing has so many channels, and no outputs of a last convolution or so many."""
    batch, dim = spectrum.shape[:2]
    block = 16 if outputs is None else channel_block(outputs, 128)
    columns = 32 if block <= 64 else 16
    precision = input_precision(spectrum, precision)
    numbers, tiles, align = _tiles(spectrum, columns)
    constants = {"BLOCK_K": 16, "BLOCK_C": 16, "BLOCK_E": block, "N": columns, "ALIGN": align, "PRECISION": precision}
    constants |= matrix_options(spectrum, registers=255 if precision == "ieee" else 128)
    grid = (batch * tiles, 1 if outputs is None else cdiv(outputs, block))
    every = (dim, channels, channels if outputs is None else outputs, scale, numbers, tiles)
    return Launch(spectrum_mix_kernel, grid, every, constants)


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
        matrix: (4 * C, 2 * (D + 1)), fp32; see the head of `fourier_mix`.
        out_weight: (E, C). out_bias: (E,). Both None: the unit matrix and no bias, E = C.
        precision: of products, "ieee", "tf32x3" or "tf32"; None follows `torch.get_float32_matmul_precision`, whose
            default, "highest", is whichever of the first two is faster.

    Returns:
        (B, E, H, width // 2 + 1, 2).
    """
    batch, _, height, half, _ = spectrum.shape
    channels = len(matrix) // 4
    outputs = None if out_weight is None else len(out_weight)
    out = spectrum.new_empty(batch, outputs or channels, height, half, 2)
    launch = prepare(spectrum, channels, outputs, scale, precision)
    with torch.cuda.device_of(spectrum):
        launch(spectrum, matrix, out_weight, out_bias, out)
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
    last = () if out_weight is None or out_bias is None else (out_weight, out_bias)
    grads = parameter_gradients(spectrum, (matrix, *last), need_parameters)
    with torch.cuda.device_of(spectrum):
        if need_spectrum:
            columns = _GRADIENT_FREQUENCIES[precision]
            numbers, tiles, align = _tiles(spectrum, columns)
            block = channel_block(dim, 64)
            threads, registers = _GRADIENT_THREADS[precision]
            if block < 64:  # below what Hopper's matrix units take from shared memory
                registers = 255
            spectrum_mix_backward_kernel[(batch * tiles, cdiv(dim, block))](
                grad, spectrum, matrix, out_weight, out, dim, channels, outputs, scale, width, numbers, tiles,
                BLOCK_K=16, BLOCK_C=16, BLOCK_D=block, N=columns, ALIGN=align, PRECISION=precision,
                **matrix_options(spectrum, threads, registers),
            )  # fmt: skip
        if need_parameters:
            numbers, tiles, align = _tiles(spectrum, 16)
            each = _FREQUENCIES_A_PARTIAL // 16
            parts = cdiv(batch * tiles, each)
            widest = max(dim, outputs) if last else dim
            block = channel_block(widest, _PARAMETER_CHANNELS[precision] if last else 32)
            # The last weight's gradient takes the registers of a program.
            options = matrix_options(spectrum, *((256, 255) if last or precision == "ieee" else (128, 168)))
            partials = spectrum.new_empty(parts, 1, sum(g.numel() for g in grads))
            spectrum_parameters_kernel[(parts, cdiv(channels, 16), cdiv(widest, block))](
                grad, spectrum, matrix, out_weight, partials, dim, channels, outputs, scale, width, numbers, tiles,
                batch * tiles, each, BLOCK_K=16, BLOCK_C=16, BLOCK_D=block, N=16, ALIGN=align, PRECISION=precision,
                **options,
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
    parts, block = cdiv(batch * tiles, each), channel_block(dim, 64)
    partials = spectrum.new_empty(parts, 1, 2 * dim * (dim + 1))
    moments = spectrum.new_empty(2, dim, dim + 1, dtype=torch.float64)
    with torch.cuda.device_of(spectrum):
        spectrum_moments_kernel[(parts, cdiv(dim, block), cdiv(dim, block))](
            spectrum, partials, dim, scale, numbers, tiles, batch * tiles, each,
            BLOCK_C=block, BLOCK_D=block, N=32, ALIGN=align, **matrix_options(spectrum),
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
        spectrum_moments_backward_kernel[(batch * tiles, cdiv(dim, block))](
            grad, spectrum, product, out, dim, width, numbers, tiles, product.shape[1],
            BLOCK_K=16, BLOCK_D=block, N=32, ALIGN=align, **matrix_options(spectrum),
        )  # fmt: skip
    return out
