"""Multi-scale feed-forward network, forward and backward.

Average pooling commutes with the first 1x1 convolution, so the pooled image is convolved. Maps of all three scales that
are kept between kernels make a pyramid: one buffer with the levels (B, M, ceil(H / s), ceil(W / s)) for s = 1, 2, 4. A
program takes a tile of some rows and columns of an image or a level; pixels that it needs from its neighbours' tiles it
reads or computes again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    alignment,
    channel_block,
    check_dtype,
    empty,
    input_precision,
    is_channels_last,
    matrix_options,
    parameter_gradients,
)
from ._math import gelu, gelu_derivative
from ._sums import sum_partials
from ._tiles import multiple

_COLUMNS = 32
# Rows of a tile: of the 1x1 convolutions around the pyramid (those of a sample of the last level), of the planes' part
# forward and backward, and of the kernels of single levels.
_BAND = 4
_OUT_ROWS, _OUT_COLUMNS = 8, 16
_OUT_BACKWARD_ROWS = 1
_LEVEL_ROWS = 8
# Channels that a program takes: of the first convolution and its gradients, after and before the last one, of a level.
_HIDDEN_CHANNELS = 64
_INPUT_CHANNELS = 64
_PARAMETER_CHANNELS = 32
_OUT_CHANNELS = 64
_OUT_BACKWARD_CHANNELS = 32
_LEVEL_CHANNELS = 4
# Pixels a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_PIXELS_A_PARTIAL = 1024


@triton.jit
def _place(program, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Image, first row and first column of a tile of images of size (..., height, width)."""
    columns = tl.cdiv(size[-1], COLS)
    rows = tl.cdiv(size[-2], ROWS)
    return (program // columns // rows).to(tl.int64), program // columns % rows * ROWS, program % columns * COLS


@triton.jit
def _pixels(row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows and columns of the pixels of the tile that starts there, (ROWS * COLS,)."""
    n = tl.arange(0, ROWS * COLS)
    return row + n // COLS, col + n % COLS


@triton.jit
def _image_pointers(
    x, strides, image, channel, channels, row, col, size, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Pointers to channels of an image at the pixels, (channels, pixels), and their mask."""
    start = x + image * multiple(strides[0], ALIGN)
    c = channel.to(tl.int64)[:, None]
    lines = row.to(tl.int64)[None, :] * multiple(strides[2], ALIGN)
    if CHANNELS_LAST:
        channels = multiple(channels, ALIGN)
        pointers = start + lines + col.to(tl.int64)[None, :] * multiple(strides[3], ALIGN) + c * strides[1]
        inside = (row < size[2]) & (col < size[3])
    else:
        pointers = start + c * multiple(strides[1], ALIGN) + lines + col.to(tl.int64)[None, :] * strides[3]
        inside = (row < size[2]) & (col < multiple(size[3], ALIGN))
    return pointers, (channel < channels)[:, None] & inside[None, :]


@triton.jit
def _level_pointers(level, image, channel, channels, row, col, height, width, ALIGN: tl.constexpr):
    """The same of a level (B, channels, height, width); rows and columns may be outside."""
    width = multiple(width, ALIGN)
    start = (image * channels + channel.to(tl.int64)) * height * width
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    pointers = level + start[:, None] + (row.to(tl.int64) * width + col)[None, :]
    return pointers, (channel < channels)[:, None] & inside[None, :]


@triton.jit
def _weights(weight, row, rows, column, columns, ld):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(weight + row[:, None] * ld + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pixels_of(row, col, size, FACTOR: tl.constexpr):
    """How many pixels each sample of a level holds; 1 outside."""
    rows = tl.maximum(tl.minimum(size[2] - FACTOR * row, FACTOR), 1)
    return (rows * tl.maximum(tl.minimum(size[3] - FACTOR * col, FACTOR), 1)).to(tl.float32)


@triton.jit
def _interpolate(i, low_size, size):
    """Bilinear map of one axis, align_corners=False: output i is (1 - share) * input[low] + share * input[high]."""
    at = tl.maximum((2 * i.to(tl.int64) + 1) * low_size - size, 0)
    low = at // (2 * size)
    share = (at - low * 2 * size).to(tl.float32) / (2 * size)
    return low.to(tl.int32), tl.minimum(low + 1, low_size - 1).to(tl.int32), share


@triton.jit
def _convolved(level, weight, bias, image, channel, channels, row, col, height, width, ALIGN: tl.constexpr):
    """Depthwise 3 x 3 convolution of a level at the pixels."""
    mask = channel < channels
    total = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[:, None]
    total += tl.zeros((1, row.shape[0]), tl.float32)
    # Rows in a loop, columns unrolled: the middle column is aligned, and the code stays small.
    for u in range(3):
        for v in tl.static_range(3):
            pointers, inside = _level_pointers(
                level, image, channel, channels, row + (u - 1), col + (v - 1), height, width, ALIGN
            )
            factor = tl.load(weight + channel * 9 + 3 * u + v, mask=mask, other=0.0).to(tl.float32)
            total += factor[:, None] * tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _upsampled(level, image, channel, channels, row, col, height, width, size):
    """The bilinear map of a level to the image's size, at the pixels."""
    top, bottom, down = _interpolate(row, height, size[2])
    left, right, across = _interpolate(col, width, size[3])
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for corner in range(4):
        r = tl.where(corner < 2, top, bottom)
        q = tl.where(corner % 2 == 0, left, right)
        share = tl.where(corner < 2, 1.0 - down, down) * tl.where(corner % 2 == 0, 1.0 - across, across)
        pointers, inside = _level_pointers(level, image, channel, channels, r, q, height, width, 1)
        total += share[None, :] * tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _before_gelu(
    hidden, mixed, starts, weight, bias, image, channel, channels, row, col, size, levels,
    SCALE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the GELU takes at the pixels, of one scale."""
    if SCALE == 0:
        return _convolved(hidden, weight, bias, image, channel, channels, row, col, size[2], size[3], ALIGN)
    else:
        height, width = levels[SCALE]
        return _upsampled(mixed + starts[SCALE], image, channel, channels, row, col, height, width, size)


@triton.jit
def _pooled(pixels, ROWS: tl.constexpr, COLS: tl.constexpr, FACTOR: tl.constexpr):
    """Sums over the pixels of each sample of a tile (channels, ROWS * COLS)."""
    BK: tl.constexpr = pixels.shape[0]
    if FACTOR == 1:
        return pixels
    else:
        across = tl.sum(tl.reshape(pixels, (BK, ROWS, COLS // FACTOR, FACTOR)), 3)
        down = tl.sum(tl.reshape(across, (BK, ROWS // FACTOR, FACTOR, COLS // FACTOR)), 2)
        return tl.reshape(down, (BK, ROWS // FACTOR * (COLS // FACTOR)))


@triton.jit
def _store_hidden(
    x, strides, weight, bias, out, image, top, left, m, size, mid, level,
    BK: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of a level that an image's tile is pooled to, after the first 1x1 convolution."""
    dim = size[1]
    row, col = _pixels(top, left, ROWS, COLS)
    u, v = _pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLS // FACTOR)
    sums = tl.zeros((m.shape[0], u.shape[0]), tl.float32)
    for start in range(0, dim, BK):
        d = start + tl.arange(0, BK)
        pointers, mask = _image_pointers(x, strides, image, d, dim, row, col, size, ALIGN, CHANNELS_LAST)
        pixels = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        factor = _weights(weight, m, mid, d, dim, dim)
        sums = tl.dot(factor, _pooled(pixels, ROWS, COLS, FACTOR), sums, input_precision=PRECISION)
    offset = tl.load(bias + m, mask=m < mid, other=0.0).to(tl.float32)
    values = sums / _pixels_of(u, v, size, FACTOR)[None, :] + offset[:, None]
    target, inside = _level_pointers(out, image, m, mid, u, v, level[0], level[1], LEVEL_ALIGN)
    tl.store(target, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def ffn_in_kernel(
    x, strides, weight, bias, hidden, starts, size, levels, mid,
    BK: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pyramid of the first 1x1 convolution: each level pools the image and has a third of the weight."""
    image, top, left = _place(tl.program_id(0), size, ROWS, COLS)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    # Level by level: side by side they would need more registers than there are, and the tile stays in cache.
    for s in tl.static_range(3):
        _store_hidden(
            x, strides, weight + s * mid * size[1], bias + s * mid, hidden + starts[s], image, top, left, m, size, mid,
            levels[s], BK, 1 << s, ROWS, COLS, ALIGN, CHANNELS_LAST, LEVEL_ALIGN, PRECISION,
        )  # fmt: skip


@triton.jit
def _low_tile(program, batch, channels, levels, BC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of a program over the tiles of the levels 1 and 2: whether it is level 2, image, channels, rows, columns."""
    blocks = tl.cdiv(channels, BC)
    first = batch * blocks * tl.cdiv(levels[1][0], ROWS) * tl.cdiv(levels[1][1], COLS)
    last = program >= first
    program = tl.where(last, program - first, program)
    height = tl.where(last, levels[2][0], levels[1][0])
    width = tl.where(last, levels[2][1], levels[1][1])
    place, top, left = _place(program, (height, width), ROWS, COLS)
    row, col = _pixels(top, left, ROWS, COLS)
    channel = (place % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    return last, place // blocks, channel, row, col, height, width


@triton.jit
def ffn_low_kernel(
    hidden, mixed, starts, mixed_starts, weights, biases, batch, channels, levels,
    BC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LEVEL_ALIGN: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of the levels 1 and 2."""
    last, image, channel, row, col, height, width = _low_tile(tl.program_id(0), batch, channels, levels, BC, ROWS, COLS)
    if last:
        weight, bias = weights[2], biases[2]
    else:
        weight, bias = weights[1], biases[1]
    values = _convolved(
        hidden + tl.where(last, starts[2], starts[1]), weight, bias,
        image, channel, channels, row, col, height, width, LEVEL_ALIGN,
    )  # fmt: skip
    out = mixed + tl.where(last, mixed_starts[2], mixed_starts[1])
    pointers, mask = _level_pointers(out, image, channel, channels, row, col, height, width, LEVEL_ALIGN)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def ffn_out_kernel(
    hidden, mixed, mixed_starts, dw_weight, dw_bias, weight, bias, residual, residual_strides, y, strides,
    size, levels, mid,
    BC: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution at full resolution, the bilinear maps, GELU, the last 1x1 convolution, the residual,
    unless that is None."""
    outputs = size[1]
    image, top, left = _place(tl.program_id(0), size, ROWS, COLS)
    row, col = _pixels(top, left, ROWS, COLS)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.load(bias + e, mask=e < outputs, other=0.0).to(tl.float32)[:, None]
    total += tl.zeros((BE, ROWS * COLS), tl.float32)
    for s in tl.static_range(3):
        for start in range(0, mid, BC):
            c = start + tl.arange(0, BC)
            before = _before_gelu(
                hidden, mixed, mixed_starts, dw_weight, dw_bias, image, c, mid, row, col, size, levels, s, LEVEL_ALIGN
            )
            factor = _weights(weight + s * mid, e, outputs, c, mid, 3 * mid)
            total = tl.dot(factor, gelu(before), total, input_precision=PRECISION)
    if residual is not None:
        pointers, mask = _image_pointers(
            residual, residual_strides, image, e, outputs, row, col, size, ALIGN, CHANNELS_LAST
        )
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    pointers, mask = _image_pointers(y, strides, image, e, outputs, row, col, size, ALIGN, CHANNELS_LAST)
    tl.store(pointers, total.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _active_gradient(
    grad, strides, weight, image, channel, channels, row, col, size,
    BK: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of what the GELU gives, of the scale whose columns of the last weight begin at `weight`."""
    outputs = size[1]
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for start in range(0, outputs, BK):
        k = start + tl.arange(0, BK)
        pointers, mask = _image_pointers(grad, strides, image, k, outputs, row, col, size, ALIGN, CHANNELS_LAST)
        right = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        factor = tl.trans(_weights(weight, k, outputs, channel, channels, 3 * channels))
        total = tl.dot(factor, right, total, input_precision=PRECISION)
    return total


@triton.jit
def ffn_out_backward_kernel(
    grad, strides, hidden, mixed, mixed_starts, dw_weight, dw_bias, weight, first_grad, other_grads, partials,
    size, levels, mid, tiles, tiles_a_program,
    BK: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what the GELU takes: of the first scale, and of the other two at full resolution (2, B, M, H, W).

    Unless `partials` is None, a row of it gets the sums, over some tiles, of the gradients of the last convolution's
    weight and then bias. A program takes block program_id(1) of the hidden channels and program_id(2) of the outputs.
    """
    batch, outputs, height, width = size
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    of_weight = (tl.zeros((BE, BC), tl.float32), tl.zeros((BE, BC), tl.float32), tl.zeros((BE, BC), tl.float32))
    of_bias = tl.zeros((BE,), tl.float32)
    once = (c < tl.where(tl.program_id(2) == 0, mid, 0))[:, None]
    first = tl.program_id(0) * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        image, top, left = _place(tile, size, ROWS, COLS)
        row, col = _pixels(top, left, ROWS, COLS)
        added = ()
        for s in tl.static_range(3):
            inner = _active_gradient(
                grad, strides, weight + s * mid, image, c, mid, row, col, size, BK, ALIGN, CHANNELS_LAST, PRECISION
            )
            before = _before_gelu(
                hidden, mixed, mixed_starts, dw_weight, dw_bias, image, c, mid, row, col, size, levels, s, LEVEL_ALIGN
            )
            if s == 0:
                out = first_grad
            else:
                out = other_grads
            place = image + max(s - 1, 0) * batch
            pointers, mask = _level_pointers(out, place, c, mid, row, col, height, width, LEVEL_ALIGN)
            values = inner * gelu_derivative(before)
            tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask & once)
            if partials is not None:
                pointers, mask = _image_pointers(grad, strides, image, e, outputs, row, col, size, ALIGN, CHANNELS_LAST)
                right = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                active = tl.trans(gelu(before))
                added = added + (tl.dot(right, active, of_weight[s], input_precision=PRECISION),)
                if s == 0:
                    of_bias += tl.sum(right, 1)
        if partials is not None:
            of_weight = added
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * outputs * (3 * mid + 1)
        mask = (e < outputs)[:, None] & (c < mid)[None, :]
        for s in tl.static_range(3):
            tl.store(partials + e[:, None] * 3 * mid + s * mid + c[None, :], of_weight[s], mask=mask)
        exists = e < tl.where(tl.program_id(1) == 0, outputs, 0)
        tl.store(partials + outputs * 3 * mid + e, of_bias, mask=exists)


@triton.jit
def _reaching(u, low_size, size):
    """The first pixel to which sample u of an axis gives a share under `_interpolate`."""
    before = (2 * u.to(tl.int64) - 1) * size - low_size
    return tl.where(before < 0, 0, before // (2 * low_size) + 1).to(tl.int32)


@triton.jit
def _share(i, u, low_size, size):
    """The share that pixel i takes of sample u."""
    place = tl.minimum(tl.maximum((2 * i.to(tl.int64) + 1) * low_size - size, 0), 2 * size * (low_size - 1))
    distance = tl.abs(place - 2 * size * u.to(tl.int64))
    return tl.maximum(2 * size - distance, 0).to(tl.float32) / (2 * size)


@triton.jit
def ffn_downsample_kernel(
    other_grads, out, starts, size, channels, levels,
    BC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LEVEL_ALIGN: tl.constexpr,
):  # fmt: skip
    """The transpose of the bilinear maps: gradients of the levels 1 and 2 from those at full resolution."""
    batch, _, height, width = size
    last, image, channel, row, col, low_height, low_width = _low_tile(
        tl.program_id(0), batch, channels, levels, BC, ROWS, COLS
    )
    source = image + tl.where(last, batch, 0)
    reach = tl.where(last, 8, 4)
    top = _reaching(row, low_height, height)
    left = _reaching(col, low_width, width)
    total = tl.zeros((BC, ROWS * COLS), tl.float32)
    for i in range(0, reach):
        down = _share(top + i, row, low_height, height)
        for j in range(0, reach):
            share = down * _share(left + j, col, low_width, width)
            pointers, mask = _level_pointers(
                other_grads, source, channel, channels, top + i, left + j, height, width, 1
            )
            total += share[None, :] * tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    target = out + tl.where(last, starts[2], starts[1])
    pointers, mask = _level_pointers(target, image, channel, channels, row, col, low_height, low_width, LEVEL_ALIGN)
    tl.store(pointers, total.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def ffn_depthwise_backward_kernel(
    grads, hidden, out, starts, weights, partials, batch, channels, levels,
    BC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LEVEL_ALIGN: tl.constexpr,
):  # fmt: skip
    """The depthwise convolutions' gradients, of all levels: by their input and, unless `partials` is None, by their
    taps and biases, summed over some tiles: a row of `partials`, level after level. A program takes level
    program_id(1) and block program_id(2) of the channels.
    """
    scale = tl.program_id(1)
    height = tl.where(scale == 0, levels[0][0], tl.where(scale == 1, levels[1][0], levels[2][0]))
    width = tl.where(scale == 0, levels[0][1], tl.where(scale == 1, levels[1][1], levels[2][1]))
    offset = tl.where(scale == 0, starts[0], tl.where(scale == 1, starts[1], starts[2]))
    channel = tl.program_id(2) * BC + tl.arange(0, BC)
    exists = channel < channels
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros((BC, ROWS * COLS), tl.float32),)
    factors = ()
    for tap in tl.static_range(9):
        # Of one level, by masks: a pointer chosen by a branch stops Triton 3.6 for AMD.
        factor = tl.zeros((BC,), tl.float32)
        for level in tl.static_range(3):
            mine = channel < tl.where(scale == level, channels, 0)
            factor += tl.load(weights[level] + channel * 9 + tap, mask=mine, other=0.0).to(tl.float32)
        factors = factors + (factor,)
    tiles = batch * tl.cdiv(height, ROWS) * tl.cdiv(width, COLS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left = _place(tile, (height, width), ROWS, COLS)
        row, col = _pixels(top, left, ROWS, COLS)
        pointers, mask = _level_pointers(
            hidden + offset, image, channel, channels, row, col, height, width, LEVEL_ALIGN
        )
        values = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((BC, ROWS * COLS), tl.float32)
        added = ()
        for tap in tl.static_range(9):
            pointers, inside = _level_pointers(
                grads + offset, image, channel, channels, row - (tap // 3 - 1), col - (tap % 3 - 1), height, width,
                LEVEL_ALIGN,
            )  # fmt: skip
            grad = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            total += factors[tap][:, None] * grad
            added = added + (sums[tap] + values * grad,)
            if tap == 4:
                bias = sums[9] + grad
        sums = added + (bias,)
        pointers, mask = _level_pointers(out + offset, image, channel, channels, row, col, height, width, LEVEL_ALIGN)
        tl.store(pointers, total.to(pointers.dtype.element_ty), mask=mask)
    if partials is not None:
        partials += (tl.program_id(0).to(tl.int64) * 3 + scale) * channels * 10
        for tap in tl.static_range(9):
            tl.store(partials + channel * 9 + tap, tl.sum(sums[tap], 1), mask=exists)
        tl.store(partials + channels * 9 + channel, tl.sum(sums[9], 1), mask=exists)


@triton.jit
def _spread(values, ROWS: tl.constexpr, COLS: tl.constexpr, FACTOR: tl.constexpr):
    """Samples (channels, ROWS // FACTOR * COLS // FACTOR) repeated for all their pixels, (channels, ROWS * COLS)."""
    BD: tl.constexpr = values.shape[0]
    tiles = tl.reshape(values, (BD, ROWS // FACTOR, 1, COLS // FACTOR, 1))
    wide = tl.broadcast_to(tiles, (BD, ROWS // FACTOR, FACTOR, COLS // FACTOR, FACTOR))
    return tl.reshape(wide, (BD, ROWS * COLS))


@triton.jit
def _image_gradient(
    grads, weight, image, mid, d, dim, top, left, size, level,
    BK: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the gradient of a level adds to a tile of the image's gradient."""
    row, col = _pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLS // FACTOR)
    sums = tl.zeros((d.shape[0], row.shape[0]), tl.float32)
    for start in range(0, mid, BK):
        m = start + tl.arange(0, BK)
        pointers, mask = _level_pointers(grads, image, m, mid, row, col, level[0], level[1], ALIGN)
        right = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        transposed = tl.trans(_weights(weight, m, mid, d, dim, dim))
        sums = tl.dot(transposed, right, sums, input_precision=PRECISION)
    return _spread(sums / _pixels_of(row, col, size, FACTOR)[None, :], ROWS, COLS, FACTOR)


@triton.jit
def ffn_in_backward_kernel(
    grads, starts, weight, out, strides, size, levels, mid,
    BK: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the image from those of the pyramid of the first convolution."""
    dim = size[1]
    image, top, left = _place(tl.program_id(0), size, ROWS, COLS)
    row, col = _pixels(top, left, ROWS, COLS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD, ROWS * COLS), tl.float32)
    for s in tl.static_range(3):
        total += _image_gradient(
            grads + starts[s], weight + s * mid * dim, image, mid, d, dim, top, left, size, levels[s],
            BK, 1 << s, ROWS, COLS, LEVEL_ALIGN, PRECISION,
        )  # fmt: skip
    pointers, mask = _image_pointers(out, strides, image, d, dim, row, col, size, ALIGN, CHANNELS_LAST)
    tl.store(pointers, total.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def ffn_in_parameters_kernel(
    grads, starts, x, strides, partials, size, levels, mid, tiles, tiles_a_program,
    BM: tl.constexpr, BD: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, over some tiles, of the gradients of the first convolution's weight and then bias: a row of `partials`.

    Instead of the pooled image with a level's gradient, the image is taken with the gradient shared among its pixels.
    """
    dim = size[1]
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    of_weight = (tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32))
    of_bias = (tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32))
    first = tl.program_id(0) * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        image, top, left = _place(tile, size, 1, COLS)
        row, col = _pixels(top, left, 1, COLS)
        pointers, mask = _image_pointers(x, strides, image, d, dim, row, col, size, ALIGN, CHANNELS_LAST)
        right = tl.trans(tl.load(pointers, mask=mask, other=0.0).to(tl.float32))
        weights = ()
        biases = ()
        for s in tl.static_range(3):
            pointers, mask = _level_pointers(
                grads + starts[s], image, m, mid, row // (1 << s), col // (1 << s), levels[s][0], levels[s][1], 1
            )
            inside = mask & (col < size[3])[None, :]
            count = _pixels_of(row // (1 << s), col // (1 << s), size, 1 << s)
            shares = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) / count[None, :]
            weights = weights + (tl.dot(shares, right, of_weight[s], input_precision=PRECISION),)
            biases = biases + (of_bias[s] + tl.sum(shares, 1),)
        of_weight = weights
        of_bias = biases
    partials += tl.program_id(0).to(tl.int64) * 3 * mid * (dim + 1)
    mask = (m < mid)[:, None] & (d < dim)[None, :]
    once = m < tl.where(tl.program_id(2) == 0, mid, 0)
    for s in tl.static_range(3):
        tl.store(partials + (s * mid + m)[:, None] * dim + d[None, :], of_weight[s], mask=mask)
        tl.store(partials + 3 * mid * dim + s * mid + m, of_bias[s], mask=once)


class _Net(NamedTuple):
    """Sizes and parameters."""

    size: tuple[int, int, int, int]
    mid: int
    levels: tuple[tuple[int, int], ...]
    in_weight: Tensor
    in_bias: Tensor
    dw_weights: tuple[Tensor, ...]
    dw_biases: tuple[Tensor, ...]
    out_weight: Tensor
    out_bias: Tensor

    @property
    def outputs(self) -> int:
        return len(self.out_bias)

    @property
    def align(self) -> int:
        return math.gcd(16, *(width for _, width in self.levels))

    def tiles(self, rows: int, columns: int = _COLUMNS) -> int:
        """Tiles of the images."""
        batch, _, height, width = self.size
        return batch * triton.cdiv(height, rows) * triton.cdiv(width, columns)

    def low_tiles(self) -> int:
        """Programs over the levels 1 and 2."""
        tiles = sum(triton.cdiv(h, _LEVEL_ROWS) * triton.cdiv(w, _COLUMNS) for h, w in self.levels[1:])
        return self.size[0] * triton.cdiv(self.mid, _LEVEL_CHANNELS) * tiles

    def pyramid(self, like: Tensor, first: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        """An uninitialised pyramid without the levels before `first`, and where each level starts."""
        starts, end = [0] * first, 0
        for height, width in self.levels[first:]:
            starts.append(end)
            end += self.size[0] * self.mid * height * width
        return like.new_empty(end), tuple(starts)


def _net(x: Tensor, in_weight: Tensor, in_bias: Tensor, *rest: Tensor) -> _Net:
    check_dtype("x", x)
    *depthwise, out_weight, out_bias = rest
    if any(weight.shape[-2:] != (3, 3) for weight in depthwise[::2]):
        raise ValueError("the depthwise kernels must be 3 x 3 for the Triton kernels")
    _, _, height, width = size = tuple(x.shape)
    levels = tuple((triton.cdiv(height, s), triton.cdiv(width, s)) for s in (1, 2, 4))
    in_weight, in_bias, out_weight, out_bias = (p.contiguous() for p in (in_weight, in_bias, out_weight, out_bias))
    dw_weights, dw_biases = (
        # A program takes one of the three.
        tuple(p.contiguous() if len({q.dtype for q in three}) == 1 else p.float().contiguous() for p in three)
        for three in (depthwise[::2], depthwise[1::2])
    )
    return _Net(size, len(in_bias) // 3, levels, in_weight, in_bias, dw_weights, dw_biases, out_weight, out_bias)


def _layout(x: Tensor, tensors: list[Tensor]) -> dict[str, Any]:
    """Constants of the access to images (B, C, H, W) that are laid out like `x`."""
    last = is_channels_last(x)
    lane = 1 if last else 3
    return {"ALIGN": alignment(tensors[0].shape[lane], lane, tensors), "CHANNELS_LAST": last}


def _forward_pyramids(net: _Net, x: Tensor) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
    """The pyramids before and (without its first level) after the depthwise convolutions, and their levels' starts."""
    hidden, starts = net.pyramid(x)
    mixed, mixed_starts = net.pyramid(x, first=1)
    block = channel_block(net.mid, _HIDDEN_CHANNELS)
    ffn_in_kernel[(net.tiles(_BAND), triton.cdiv(net.mid, block))](
        x, x.stride(), net.in_weight, net.in_bias, hidden, starts, net.size, net.levels, net.mid,
        BK=16, BM=block, ROWS=_BAND, COLS=_COLUMNS, LEVEL_ALIGN=net.align,
        PRECISION=input_precision(x, exact="tf32x3"), **_layout(x, [x]), **matrix_options(x),
    )  # fmt: skip
    ffn_low_kernel[(net.low_tiles(),)](
        hidden, mixed, starts, mixed_starts, net.dw_weights, net.dw_biases, net.size[0], net.mid, net.levels,
        BC=_LEVEL_CHANNELS, ROWS=_LEVEL_ROWS, COLS=_COLUMNS, LEVEL_ALIGN=net.align, enable_fp_fusion=True,
    )  # fmt: skip
    return hidden, starts, mixed, mixed_starts


def multiscale_ffn(x: Tensor, in_weight: Tensor, in_bias: Tensor, *rest: Any) -> Tensor:
    """`reference.multiscale_ffn`; `rest` are weight and bias of the three depthwise and of the last convolution, and,
    if it is given, what is added to the result.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes; sums are fp32, products
    as `torch.set_float32_matmul_precision` says, for a half-precision `x` tf32. Maps between kernels have the dtype of
    `x`. A channels_last `x` gives a channels_last result, any other a contiguous one.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: a depthwise kernel is not 3 x 3.
    """
    net = _net(x, in_weight, in_bias, *rest[:8])
    size = (x.shape[0], net.outputs, *x.shape[2:])
    y = empty(x, *size)
    layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    residual = rest[8].contiguous(memory_format=layout) if rest[8:] and rest[8] is not None else None
    if x.numel():
        with torch.cuda.device_of(x):
            hidden, _, mixed, mixed_starts = _forward_pyramids(net, x)
            block = channel_block(net.outputs, _OUT_CHANNELS)
            ffn_out_kernel[(net.tiles(_OUT_ROWS, _OUT_COLUMNS), triton.cdiv(net.outputs, block))](
                hidden, mixed, mixed_starts, net.dw_weights[0], net.dw_biases[0], net.out_weight, net.out_bias,
                residual, None if residual is None else residual.stride(), y, y.stride(), size, net.levels, net.mid,
                BC=16, BE=block, ROWS=_OUT_ROWS, COLS=_OUT_COLUMNS, LEVEL_ALIGN=net.align,
                PRECISION=input_precision(x, exact="tf32x3"),
                **_layout(y, [y] if residual is None else [y, residual]), **matrix_options(x),
            )  # fmt: skip
    return y


def multiscale_ffn_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `multiscale_ffn` by x and the ten parameters; those not needed are empty. Deterministic.

    `arguments` are the parameters, need_x and need_params. Everything is recomputed from `x`. `grad` may have any
    strides; the gradient of x has the layout that `multiscale_ffn` gives its result.
    """
    *parameters, need_x, need_params = arguments
    net = _net(x, *parameters)
    batch, dim, height, width = net.size
    mid, outputs = net.mid, net.outputs
    out = empty(x, *x.shape) if need_x else x.new_empty(0)
    grads = parameter_gradients(x, tuple(parameters), need_params)
    if not x.numel() or not (need_x or need_params):
        return out, *grads

    def partials(parts: int, count: int) -> Tensor | None:
        return torch.empty((parts, 1, count), dtype=torch.float32, device=x.device) if need_params else None

    options = {"LEVEL_ALIGN": net.align}
    matrix = {"PRECISION": input_precision(x, exact="tf32x3"), **matrix_options(x)}
    with torch.cuda.device_of(x):
        hidden, starts, mixed, mixed_starts = _forward_pyramids(net, x)
        mixed_grads, _ = net.pyramid(x)
        first_grads, low_grads = mixed_grads[: starts[1]], mixed_grads[starts[1] :]
        other_grads = x.new_empty(2, batch, mid, height, width)
        tiles, each = net.tiles(_OUT_BACKWARD_ROWS), max(1, _PIXELS_A_PARTIAL // (_OUT_BACKWARD_ROWS * _COLUMNS))
        block, parts = channel_block(outputs, _OUT_CHANNELS), triton.cdiv(tiles, each)
        of_out = partials(parts, outputs * (3 * mid + 1))
        blocks = triton.cdiv(outputs, block) if need_params else 1
        channels = channel_block(mid, _OUT_BACKWARD_CHANNELS)
        ffn_out_backward_kernel[(parts, triton.cdiv(mid, channels), blocks)](
            grad, grad.stride(), hidden, mixed, mixed_starts, net.dw_weights[0], net.dw_biases[0], net.out_weight,
            first_grads, other_grads, of_out, (batch, outputs, height, width), net.levels, mid, tiles, each,
            BK=16, BC=channels, BE=block, ROWS=_OUT_BACKWARD_ROWS, COLS=_COLUMNS, **options, **_layout(grad, [grad]),
            **matrix,
        )  # fmt: skip
        ffn_downsample_kernel[(net.low_tiles(),)](
            other_grads, low_grads, mixed_starts, net.size, mid, net.levels,
            BC=_LEVEL_CHANNELS, ROWS=_LEVEL_ROWS, COLS=_COLUMNS, **options, enable_fp_fusion=True,
        )  # fmt: skip
        hidden_grads, _ = net.pyramid(x)
        parts = triton.cdiv(net.tiles(_LEVEL_ROWS), max(1, _PIXELS_A_PARTIAL // (_LEVEL_ROWS * _COLUMNS)))
        of_depthwise = partials(parts, 3 * mid * 10)
        ffn_depthwise_backward_kernel[(parts, 3, triton.cdiv(mid, _LEVEL_CHANNELS))](
            mixed_grads, hidden, hidden_grads, starts, net.dw_weights, of_depthwise, batch, mid, net.levels,
            BC=_LEVEL_CHANNELS, ROWS=_LEVEL_ROWS, COLS=_COLUMNS, **options, enable_fp_fusion=True,
        )  # fmt: skip
        if need_x:
            block = channel_block(dim, _INPUT_CHANNELS)
            ffn_in_backward_kernel[(net.tiles(_BAND), triton.cdiv(dim, block))](
                hidden_grads, starts, net.in_weight, out, out.stride(), net.size, net.levels, mid,
                BK=16, BD=block, ROWS=_BAND, COLS=_COLUMNS, **options, **_layout(x, [out]), **matrix,
            )  # fmt: skip
        if need_params:
            tiles, each = net.tiles(1), max(1, _PIXELS_A_PARTIAL // _COLUMNS)
            block, parts = channel_block(dim, _INPUT_CHANNELS), triton.cdiv(tiles, each)
            of_in = partials(parts, 3 * mid * (dim + 1))
            ffn_in_parameters_kernel[(parts, triton.cdiv(mid, _PARAMETER_CHANNELS), triton.cdiv(dim, block))](
                hidden_grads, starts, x, x.stride(), of_in, net.size, net.levels, mid, tiles, each,
                BM=_PARAMETER_CHANNELS, BD=block, COLS=_COLUMNS, **_layout(x, [x]), **matrix,
            )  # fmt: skip
            for sums, places in ((of_in, (0, 1)), (of_depthwise, range(2, 8)), (of_out, (8, 9))):
                sum_partials(sums, *(grads[i] for i in places))
    return out, *grads
