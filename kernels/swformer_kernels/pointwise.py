"""The 1x1 convolution of up to three maps that are never concatenated, forward and backward.

Maps are taken as (B, C, H * W) with planes and pixels next to their neighbours; a program takes N pixels of an image.
Kernels take three maps, of which those that are missing have no channels: so all convolutions share them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    Launch,
    alignment,
    cdiv,
    channel_block,
    check_dtype,
    input_precision,
    jit_for_all_sizes,
    matrix_options,
    parameter_gradients,
    planes,
)
from ._sums import sum_partials
from ._tiles import dot, load, load_matrix, multiple, store, store_matrix

# Pixels a program takes, in bytes: 16 a thread, of 16 channels.
_BYTES = 256
# Output channels a program takes.
_CHANNELS = 128
# What the registers allow for the parameters' gradients: channels of either side, and pixels in bytes.
_PARAMETER_CHANNELS = 64
_PARAMETER_BYTES = 64
# Pixels a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_PIXELS_A_PARTIAL = 2048


@triton.jit
def _map_pointers(maps, strides, counts, image, channel, pixel, pixels, ALIGN: tl.constexpr):
    """Pointers to channels of the concatenation of the maps at the pixels, and their mask."""
    pixels = multiple(pixels, ALIGN)
    start = maps[0] + image * multiple(strides[0], ALIGN)
    first = counts[0]
    for i in tl.static_range(1, len(maps)):
        # Where its channel 0 were if the maps before lay before it.
        other = maps[i] + image * multiple(strides[i], ALIGN) - first.to(tl.int64) * pixels
        start = tl.where(channel < first, start, other)
        first += counts[i]
    rows = start + channel.to(tl.int64) * pixels
    # The choice of a pointer hides from the compiler what divides all of them: ALIGN numbers, as the launcher knows.
    rows = tl.multiple_of(rows, min(16, ALIGN * (maps[0].dtype.element_ty.primitive_bitwidth // 8)))
    exists = (channel >= 0) & (channel < first)
    return rows[:, None] + pixel[None, :], exists[:, None] & (pixel < pixels)[None, :]


@triton.jit
def load_maps(maps, strides, counts, image, channel, pixel, pixels, ALIGN: tl.constexpr):
    """Channels of the concatenation of the maps at the pixels, in fp32; zero outside."""
    pointers, mask = _map_pointers(maps, strides, counts, image, channel, pixel, pixels, ALIGN)
    return load(pointers, mask)


@triton.jit
def _load_three(maps, strides, counts, image, channel, pixel, pixels, ALIGN: tl.constexpr):
    """`load_maps` of three maps, the last of which may have another dtype."""
    if maps[2].dtype == maps[0].dtype:
        return load_maps(maps, strides, counts, image, channel, pixel, pixels, ALIGN)
    same, those = (maps[0], maps[1]), (counts[0], counts[1])
    first = load_maps(same, (strides[0], strides[1]), those, image, channel, pixel, pixels, ALIGN)
    channel -= counts[0] + counts[1]
    return first + load_maps((maps[2],), (strides[2],), (counts[2],), image, channel, pixel, pixels, ALIGN)


@jit_for_all_sizes("inputs")
def pointwise_kernel(
    maps, weight, bias, residual, outs, copy, inputs, outputs, biases, residuals, weight_image, weight_stride,
    bias_image, count0, count1, count2, image0, image1, image2,
    out_count0, out_count1, out_count2, out_image0, out_image1, out_image2, pixels, tiles,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, TRANSPOSED: tl.constexpr,
    COPIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The concatenation of `outs` = weight @ the concatenation of `maps` + bias + residual.

    Those two have as many channels as the outputs or none; the residual is contiguous. Rows of the weight are
    `weight_stride` apart or, if it is TRANSPOSED, columns. If COPIED, `copy`, contiguous, is the concatenation of the
    maps.
    """
    counts, out_counts = (count0, count1, count2), (out_count0, out_count1, out_count2)
    strides, out_strides = (image0, image1, image2), (out_image0, out_image1, out_image2)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * N + tl.arange(0, N)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    weight += image * weight_image
    total = tl.zeros((BLOCK_E, N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            left = load_matrix(weight, e, e < outputs, c, inputs, 1, weight_stride)
        else:
            left = load_matrix(weight, e, e < outputs, c, inputs, weight_stride)
        right = _load_three(maps, strides, counts, image, c, pixel, pixels, ALIGN)
        if COPIED:
            rest = tl.where(tl.program_id(1) == 0, inputs, 0)
            whole = inputs.to(tl.int64) * pixels
            pointers, mask = _map_pointers((copy,), (whole,), (rest,), image, c, pixel, pixels, ALIGN)
            store(pointers, right, mask)
        total = dot(left, right, total, PRECISION)
    if residuals > 0:
        total += load_maps((residual,), (outputs.to(tl.int64) * pixels,), (residuals,), image, e, pixel, pixels, ALIGN)
    total += load(bias + image * bias_image + e, mask=e < biases)[:, None]
    pointers, mask = _map_pointers(outs, out_strides, out_counts, image, e, pixel, pixels, ALIGN)
    store(pointers, total, mask)


@jit_for_all_sizes("inputs")
def pointwise_parameters_kernel(
    grad, maps, partials, inputs, outputs, grad_image, count0, count1, count2, image0, image1, image2,
    pixels, tiles, tiles_a_program, parts,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over some tiles of an image: of the weight's gradient and then of the bias's, a row of `partials`."""
    counts, strides = (count0, count1, count2), (image0, image1, image2)
    part = tl.program_id(0) % parts
    image = (tl.program_id(0) // parts).to(tl.int64)
    images = tl.num_programs(0) // parts
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_weight = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    of_bias = tl.zeros((BLOCK_E,), tl.float32)
    first = part * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        pixel = tile * N + tl.arange(0, N)
        left = load_maps((grad,), (grad_image,), (outputs,), image, e, pixel, pixels, ALIGN)
        right = load_maps(maps, strides, counts, image, c, pixel, pixels, ALIGN)
        of_weight = dot(left, tl.trans(right), of_weight, PRECISION)
        of_bias += tl.sum(left, 1)
    partials += (part * images + image) * outputs * (inputs + 1)
    store_matrix(partials, of_weight, e, e < outputs, c, inputs, inputs)
    tl.store(partials + outputs * inputs + e, of_bias, mask=e < tl.where(tl.program_id(2) == 0, outputs, 0))


def _numbers(maps: list[Tensor]) -> list[int]:
    """Channels of three maps and the strides of their images, zero for those that are missing."""
    missing = [0] * (3 - len(maps))
    return [*[x.shape[1] for x in maps], *missing, *[x.stride(0) for x in maps], *missing]


def _alignment(maps: list[Tensor]) -> int:
    """What divides strides and the number of pixels, 16 bytes at most, if all maps begin there, else 1."""
    begin = all([x.data_ptr() % 16 == 0 for x in maps])
    return alignment(maps[0].shape[2], 2, [x for x in maps if x.dim() == 3]) if begin else 1


def _three(maps: list[Tensor]) -> tuple[Tensor, ...]:
    return (*maps, *maps[:1] * (3 - len(maps)))


def _outputs(channels: int, most: int) -> int:
    """Output channels of a program: few choices, so that the convolutions of a network share kernels."""
    return 16 if channels <= 16 else min(most, max(64, channel_block(channels, most)))


def prepare(
    maps: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outs: list[Tensor],
    copy: Tensor | None = None,
) -> Launch:
    """Of `pointwise_kernel` on (B, C, P) maps; weight is (1 or B, outputs, inputs) with neighbours in a row or column.

    The third map may have another dtype than the others. The launch takes the maps in tuples of three and, where a
    bias, a residual or a copy is None, any other tensor.
    """
    batch, _, pixels = maps[0].shape
    _, outputs, inputs = weight.shape
    columns, block = _BYTES // maps[0].element_size(), _outputs(outputs, _CHANNELS)
    tiles = cdiv(pixels, columns)
    weight_image, row, column = weight.stride()
    transposed = row == 1 and column != 1
    bias_image = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    numbers = (
        inputs, outputs, 0 if bias is None else outputs, 0 if residual is None else outputs,
        weight_image if weight.shape[0] > 1 else 0, column if transposed else row, bias_image,
        *_numbers(maps), *_numbers(outs), pixels, tiles,
    )  # fmt: skip
    constants = {
        "BLOCK_K": 16,
        "BLOCK_E": block,
        "N": columns,
        "ALIGN": _alignment([*maps, *outs, *[t for t in (residual, copy) if t is not None]]),
        "TRANSPOSED": transposed,
        "COPIED": copy is not None,
        "PRECISION": input_precision(maps[0]),
        **matrix_options(maps[0], registers=64 if block == 16 else 128),
    }
    return Launch(pointwise_kernel, (batch * tiles, cdiv(outputs, block)), numbers, constants)


def _multiply(
    maps: list[Tensor], weight: Tensor, bias: Tensor | None, residual: Tensor | None, outs: list[Tensor]
) -> None:
    """Launch `pointwise_kernel`."""
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    launch = prepare(maps, weight, bias, residual, outs)
    with torch.cuda.device_of(maps[0]):
        launch(
            _three(maps), weight, weight if bias is None else bias, maps[0] if residual is None else residual,
            _three(outs), maps[0],
        )  # fmt: skip


def _check(maps: tuple[Tensor | None, ...]) -> list[Tensor]:
    tensors = [x for x in maps if x is not None]
    for i, x in enumerate(tensors):
        check_dtype(f"x{i}", x)
    if any([x.dtype != tensors[0].dtype for x in tensors]):  # a program takes one of them
        tensors = [x.float() for x in tensors]
    return [_planes(x) for x in tensors]


def _planes(x: Tensor) -> Tensor:
    """As the kernels take a map, copied only if it must be."""
    x = planes(x)
    return x if x.shape[1] == 1 or x.stride(1) == x.shape[2] else x.contiguous()


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
        _multiply(maps, weight, bias.contiguous(), None if residual is None else residual.contiguous(), [y.flatten(2)])
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
    flat, pixels = _planes(grad), x0.shape[2] * x0.shape[3]
    dtype = maps[0].dtype
    grads = [grad.new_empty(0) if x is None or not need_x else torch.empty(x.shape, dtype=dtype, device=x.device)
             for x in (x0, x1, x2)]  # fmt: skip
    if need_x and batch * pixels:
        _multiply([flat], weight.mT, None, None, [g.flatten(2) for g in grads if g.dim() == 4])
        grads = [g if x is None else g.to(x.dtype) for g, x in zip(grads, (x0, x1, x2), strict=True)]
    of_weight, of_bias = parameter_gradients(x0, (weight, bias), need_parameters)
    if need_parameters and x0.numel():
        width = _PARAMETER_BYTES // grad.element_size()
        tiles, each = cdiv(pixels, width), _PIXELS_A_PARTIAL // width
        parts = cdiv(tiles, each)
        count = outputs * (inputs + 1)
        partials = torch.empty((parts, batch, count), dtype=torch.float32, device=x0.device)
        # Few outputs of many inputs, as between resolutions, share the kernel of the others.
        rows = _outputs(max(outputs, inputs), _PARAMETER_CHANNELS)
        columns = channel_block(inputs, _PARAMETER_CHANNELS)
        # So few that each has 16 bytes of the narrower side.
        threads = min(256, min(rows, columns) * _PARAMETER_BYTES // 16)
        with torch.cuda.device_of(x0):
            pointwise_parameters_kernel[(batch * parts, cdiv(outputs, rows), cdiv(inputs, columns))](
                flat, _three(maps), partials, inputs, outputs, flat.stride(0), *_numbers(maps), pixels, tiles,
                each, parts,
                BLOCK_E=rows, BLOCK_C=columns, N=width, ALIGN=_alignment([flat, *maps]),
                PRECISION=input_precision(grad), **matrix_options(grad, threads, 128),
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
