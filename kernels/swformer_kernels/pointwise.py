"""The 1x1 convolution of up to three maps that are never concatenated, forward and backward.

Maps are taken as (B, C, H * W) with neighbouring pixels next to each other; a program takes N pixels of an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import alignment, channel_block, check_dtype, input_precision, matrix_options, parameter_gradients, planes
from ._sums import sum_partials
from ._tiles import load, load_matrix, map_pointers, multiple, store, store_matrix

# Pixels a program takes, in bytes: 16 a thread, of 16 channels.
_BYTES = 256
# Output channels a program takes.
_CHANNELS = 128
# What the registers allow for the parameters' gradients: channels of either side, and pixels.
_PARAMETER_CHANNELS = 64
_PARAMETER_PIXELS = 32
# Pixels a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_PIXELS_A_PARTIAL = 2048


@triton.jit
def total_channels(counts):
    total = 0
    for i in tl.static_range(len(counts)):
        total += counts[i]
    return total


@triton.jit
def load_maps(maps, strides, counts, image, channel, pixel, pixels, ALIGN: tl.constexpr):
    """Channels of the concatenation of the maps at the pixels, in fp32; zero outside."""
    total = tl.zeros((channel.shape[0], pixel.shape[0]), tl.float32)
    first = 0
    for i in tl.static_range(len(maps)):
        place = channel - first
        exists = (place >= 0) & (place < counts[i])
        pointers, mask = map_pointers(maps[i], strides[i], image, place, exists, pixel, pixels, ALIGN, False)
        # Only one of the maps has a channel: the others add zero.
        total += load(pointers, mask)
        first += counts[i]
    return total


@triton.jit
def store_maps(maps, strides, counts, value, image, channel, pixel, pixels, ALIGN: tl.constexpr):
    """The inverse of `load_maps`."""
    first = 0
    for i in tl.static_range(len(maps)):
        place = channel - first
        exists = (place >= 0) & (place < counts[i])
        pointers, mask = map_pointers(maps[i], strides[i], image, place, exists, pixel, pixels, ALIGN, False)
        store(pointers, value, mask)
        first += counts[i]


@triton.jit
def pointwise_kernel(
    maps, strides, counts, weight, weight_strides, bias, bias_stride, residual, residual_strides,
    outs, out_strides, out_counts, pixels, tiles,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The concatenation of `outs` = weight @ the concatenation of `maps` + bias + residual; those two may be None."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixels = multiple(pixels, ALIGN)
    pixel = tl.program_id(0) % tiles * N + tl.arange(0, N)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inputs = total_channels(counts)
    outputs = total_channels(out_counts)
    weight += image * weight_strides[0]
    total = tl.zeros((BLOCK_E, N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        left = load_matrix(weight, e, e < outputs, c, inputs, weight_strides[1], weight_strides[2])
        right = load_maps(maps, strides, counts, image, c, pixel, pixels, ALIGN)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if bias is not None:
        bias += image * bias_stride
        total += load(bias + e, mask=e < outputs)[:, None]
    if residual is not None:
        total += load_maps((residual,), (residual_strides,), out_counts, image, e, pixel, pixels, ALIGN)
    store_maps(outs, out_strides, out_counts, total, image, e, pixel, pixels, ALIGN)


@triton.jit
def pointwise_parameters_kernel(
    grad, grad_strides, maps, strides, counts, partials, outputs, pixels, tiles, tiles_a_program, parts,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over some tiles of an image: of the weight's gradient and then of the bias's, a row of `partials`."""
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // parts).to(tl.int64)
    images = tl.num_programs(0) // parts
    pixels = multiple(pixels, ALIGN)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inputs = total_channels(counts)
    of_weight = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    of_bias = tl.zeros((BLOCK_E,), tl.float32)
    first = part * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        pixel = tile * N + tl.arange(0, N)
        left = load_maps((grad,), (grad_strides,), (outputs,), image, e, pixel, pixels, ALIGN)
        right = load_maps(maps, strides, counts, image, c, pixel, pixels, ALIGN)
        of_weight = tl.dot(left, tl.trans(right), of_weight, input_precision=PRECISION)
        of_bias += tl.sum(left, 1)
    partials += (part * images + image) * outputs * (inputs + 1)
    store_matrix(partials, of_weight, e, e < outputs, c, inputs, inputs)
    tl.store(partials + outputs * inputs + e, of_bias, mask=e < tl.where(tl.program_id(2) == 0, outputs, 0))


def _strides(maps: list[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((x.stride(0), x.stride(1)) for x in maps)


def _counts(maps: list[Tensor]) -> tuple[int, ...]:
    return tuple(x.shape[1] for x in maps)


def _multiply(
    maps: list[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, outs: list[Tensor]
) -> None:
    """Launch `pointwise_kernel` on (B, C, P) maps; weight is (1 or B, outputs, inputs)."""
    batch, _, pixels = maps[0].shape
    columns, block = _BYTES // maps[0].element_size(), channel_block(sum(_counts(outs)), _CHANNELS)
    tiles = triton.cdiv(pixels, columns)
    everything = [*maps, *outs] if residual is None else [*maps, *outs, residual]
    weight_strides = (weight.stride(0) if len(weight) > 1 else 0, weight.stride(1), weight.stride(2))
    bias_stride = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    with torch.cuda.device_of(maps[0]):
        pointwise_kernel[(batch * tiles, triton.cdiv(sum(_counts(outs)), block))](
            tuple(maps), _strides(maps), _counts(maps), weight, weight_strides, bias, bias_stride,
            residual, None if residual is None else _strides([residual])[0],
            tuple(outs), _strides(outs), _counts(outs), pixels, tiles,
            BLOCK_K=16, BLOCK_E=block, N=columns, ALIGN=alignment(pixels, 2, everything),
            PRECISION=input_precision(maps[0], exact="tf32x3"), **matrix_options(maps[0]),
        )  # fmt: skip


def _check(maps: tuple[Tensor | None, ...]) -> list[Tensor]:
    tensors = [x for x in maps if x is not None]
    for i, x in enumerate(tensors):
        check_dtype(f"x{i}", x)
    return [planes(x) for x in tensors]


def pointwise(
    x0: Tensor, x1: Tensor | None, x2: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """`reference.pointwise`: the 1x1 convolution of the concatenation of the maps, plus `residual`.

    Maps are float32, float16 or bfloat16, parameters of any of these dtypes; sums are fp32, products as
    `torch.set_float32_matmul_precision` says, for half-precision maps tf32, in which these are exact. Maps of any
    strides; those whose pixels are not evenly spaced are copied. The result is contiguous.

    Raises:
        TypeError: a map has another dtype.
    """
    maps = _check((x0, x1, x2))
    y = torch.empty((x0.shape[0], weight.shape[1], *x0.shape[2:]), dtype=x0.dtype, device=x0.device)
    if y.numel():
        _multiply(maps, weight, bias.contiguous(), None if residual is None else planes(residual), [y.flatten(2)])
    return y


def pointwise_backward(
    grad: Tensor,
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `pointwise` by x0, x1, x2, weight and bias; those not needed are empty. Deterministic."""
    maps = _check((x0, x1, x2))
    batch, outputs, inputs = x0.shape[0], weight.shape[1], weight.shape[2]
    flat, pixels = planes(grad), x0.shape[2] * x0.shape[3]
    grads = [grad.new_empty(0) if x is None or not need_x else torch.empty(x.shape, dtype=x.dtype, device=x.device)
             for x in (x0, x1, x2)]  # fmt: skip
    if need_x and batch * pixels:
        _multiply([flat], weight.mT, None, None, [g.flatten(2) for g in grads if g.dim() == 4])
    of_weight, of_bias = parameter_gradients(x0, (weight, bias), need_parameters)
    if need_parameters and x0.numel():
        tiles = triton.cdiv(pixels, _PARAMETER_PIXELS)
        each = _PIXELS_A_PARTIAL // _PARAMETER_PIXELS
        parts = triton.cdiv(tiles, each)
        count = outputs * (inputs + 1)
        partials = torch.empty((parts, batch, count), dtype=torch.float32, device=x0.device)
        rows, columns = channel_block(outputs, _PARAMETER_CHANNELS), channel_block(inputs, _PARAMETER_CHANNELS)
        options = matrix_options(grad)
        # So few threads that each has 16 bytes of the narrower side.
        threads = min(256, min(rows, columns) * _PARAMETER_PIXELS * grad.element_size() // 16)
        options["num_warps"] = max(1, options["num_warps"] * threads // 256)
        with torch.cuda.device_of(x0):
            pointwise_parameters_kernel[(batch * parts, triton.cdiv(outputs, rows), triton.cdiv(inputs, columns))](
                flat, _strides([flat])[0], tuple(maps), _strides(maps), _counts(maps), partials,
                outputs, pixels, tiles, each, parts,
                BLOCK_E=rows, BLOCK_C=columns, N=_PARAMETER_PIXELS, ALIGN=alignment(pixels, 2, [flat, *maps]),
                PRECISION=input_precision(grad, exact="tf32x3"), **options,
            )  # fmt: skip
            images = max(len(weight), bias.numel() // outputs)
            sums = [
                g if g.numel() == images * n else g.new_empty((images, n), dtype=torch.float64)
                for g, n in ((of_weight, outputs * inputs), (of_bias, outputs))
            ]
            sum_partials(partials.view(-1, images, count), *sums)
            # One of them may be shared by the images and the other not.
            of_weight, of_bias = (
                total if total is g else total.sum(0).to(g.dtype).view(g.shape)
                for total, g in zip(sums, (of_weight, of_bias), strict=True)
            )
    return *grads, of_weight, of_bias
