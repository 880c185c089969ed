"""Forward kernels of the multi-scale feed-forward network, and what its backward kernels compute again.

What a program takes and how maps are kept is described in `multiscale_ffn`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import jit_for_all_sizes
from ._math import gelu
from ._tiles import dot, image_pointers, load, load_matrix, store, tile_pixels, tile_place


@triton.jit
def level_size(size, SCALE: tl.constexpr):
    """Height and width of a level, of images of size (..., height, width)."""
    return tl.cdiv(size[-2], 1 << SCALE), tl.cdiv(size[-1], 1 << SCALE)


@triton.jit
def row_pitch(pyramid, width):
    """Elements from a row of a level to the next one: rows begin at boundaries of 16 bytes."""
    VECTOR: tl.constexpr = 128 // pyramid.dtype.element_ty.primitive_bitwidth
    return tl.cdiv(width, VECTOR) * VECTOR


@triton.jit
def level_start(pyramid, size, channels, SCALE: tl.constexpr, FIRST: tl.constexpr):
    """Where a level starts in a pyramid whose first level is FIRST."""
    start = tl.zeros((), tl.int64)
    for s in tl.static_range(FIRST, SCALE):
        height, width = level_size(size, s)
        start += size[0] * channels * height.to(tl.int64) * row_pitch(pyramid, width)
    return start


@triton.jit
def level_pointers(level, image, channel, channels, row, column, height, width):
    """`image_pointers` to a level (B, channels, height, width) of a pyramid; rows and columns may be outside.

    The mask takes in what is stored of a row, which ends in zeros.
    """
    pitch = row_pitch(level, width)
    start = (image * channels + channel.to(tl.int64)) * height * pitch
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < pitch)
    pointers = level + start[:, None] + (row.to(tl.int64) * pitch + column)[None, :]
    return pointers, (channel < channels)[:, None] & inside[None, :]


@triton.jit
def store_level(level, values, image, channel, channels, row, column, height, width, exists=True):
    """Write a tile of a level, and the zeros that its rows end in."""
    pointers, mask = level_pointers(level, image, channel, channels, row, column, height, width)
    store(pointers, tl.where((column < width)[None, :], values, 0.0), mask & exists)


@triton.jit
def pixels_of(row, column, size, FACTOR: tl.constexpr):
    """How many pixels each sample of a level holds; 1 outside."""
    rows = tl.maximum(tl.minimum(size[2] - FACTOR * row, FACTOR), 1)
    return (rows * tl.maximum(tl.minimum(size[3] - FACTOR * column, FACTOR), 1)).to(tl.float32)


@triton.jit
def interpolate(i, low_size, size):
    """Bilinear map of one axis, align_corners=False: output i is (1 - share) * input[low] + share * input[high]."""
    at = tl.maximum((2 * i.to(tl.int64) + 1) * low_size - size, 0)
    low = at // (2 * size)
    share = (at - low * 2 * size).to(tl.float32) / (2 * size)
    return low.to(tl.int32), tl.minimum(low + 1, low_size - 1).to(tl.int32), share


@triton.jit
def _convolved(level, weight, bias, image, channel, channels, row, column, height, width):
    """Depthwise 3 x 3 convolution of a level at the pixels."""
    mask = channel < channels
    total = load(bias + channel, mask)[:, None]
    total += tl.zeros((1, row.shape[0]), tl.float32)
    # Rows in a loop, columns unrolled: the middle column is aligned, and the code stays small.
    for u in range(3):
        for v in tl.static_range(3):
            pointers, inside = level_pointers(
                level, image, channel, channels, row + (u - 1), column + (v - 1), height, width
            )
            factor = load(weight + channel * 9 + 3 * u + v, mask)
            total += factor[:, None] * load(pointers, inside)
    return total


@triton.jit
def _upsampled(level, image, channel, channels, row, column, height, width, size):
    """The bilinear map of a level to the image's size, at the pixels."""
    top, bottom, down = interpolate(row, height, size[2])
    left, right, across = interpolate(column, width, size[3])
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for corner in range(4):
        r = tl.where(corner < 2, top, bottom)
        q = tl.where(corner % 2 == 0, left, right)
        share = tl.where(corner < 2, 1.0 - down, down) * tl.where(corner % 2 == 0, 1.0 - across, across)
        pointers, inside = level_pointers(level, image, channel, channels, r, q, height, width)
        total += share[None, :] * load(pointers, inside)
    return total


@triton.jit
def before_gelu(hidden, mixed, weight, bias, image, channel, channels, row, column, size, SCALE: tl.constexpr):
    """What the GELU takes at the pixels, of one scale."""
    if SCALE == 0:
        return _convolved(hidden, weight, bias, image, channel, channels, row, column, size[2], size[3])
    else:
        height, width = level_size(size, SCALE)
        level = mixed + level_start(mixed, size, channels, SCALE, 1)
        return _upsampled(level, image, channel, channels, row, column, height, width, size)


@triton.jit
def _pooled(pixels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr):
    """Sums over the pixels of each sample of a tile (channels, ROWS * COLUMNS)."""
    BLOCK_K: tl.constexpr = pixels.shape[0]
    if FACTOR == 1:
        return pixels
    else:
        across = tl.sum(tl.reshape(pixels, (BLOCK_K, ROWS, COLUMNS // FACTOR, FACTOR)), 3)
        down = tl.sum(tl.reshape(across, (BLOCK_K, ROWS // FACTOR, FACTOR, COLUMNS // FACTOR)), 2)
        return tl.reshape(down, (BLOCK_K, ROWS // FACTOR * (COLUMNS // FACTOR)))


@triton.jit
def _store_hidden(
    x, strides, weight, bias, hidden, image, top, left, m, size, mid,
    BLOCK_K: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of a level that an image's tile is pooled to, after the first 1x1 convolution."""
    FACTOR: tl.constexpr = 1 << SCALE
    dim = size[1]
    weight += SCALE * mid * dim
    bias += SCALE * mid
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    u, v = tile_pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLUMNS // FACTOR)
    sums = tl.zeros((m.shape[0], u.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        pointers, mask = image_pointers(x, strides, image, d, dim, row, column, size, ALIGN, CHANNELS_LAST)
        pixels = load(pointers, mask)
        factor = load_matrix(weight, m, m < mid, d, dim, dim)
        sums = dot(factor, _pooled(pixels, ROWS, COLUMNS, FACTOR), sums, PRECISION)
    offset = load(bias + m, mask=m < mid)
    values = sums / pixels_of(u, v, size, FACTOR)[None, :] + offset[:, None]
    level = hidden + level_start(hidden, size, mid, SCALE, 0)
    height, width = level_size(size, SCALE)
    store_level(level, values, image, m, mid, u, v, height, width)


@jit_for_all_sizes("dim")
def ffn_in_kernel(
    x, weight, bias, hidden, x_lane, dim, mid, batch, height, width, x_image, x_outer, x_row,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pyramid of the first 1x1 convolution: each level pools the image and has a third of the weight."""
    size, strides = (batch, dim, height, width), (x_lane, x_image, x_outer, x_row)
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLUMNS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Level by level: side by side they would need more registers than there are, and the tile stays in cache.
    for s in tl.static_range(3):
        _store_hidden(
            x, strides, weight, bias, hidden, image, top, left, m, size, mid,
            BLOCK_K, s, ROWS, COLUMNS, ALIGN, CHANNELS_LAST, PRECISION,
        )  # fmt: skip


@triton.jit
def low_tile(program, size, channels, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program over the tiles of the levels 1 and 2: whether it is level 2, image, channels, rows, columns."""
    blocks = tl.cdiv(channels, BLOCK_C)
    height1, width1 = level_size(size, 1)
    height2, width2 = level_size(size, 2)
    first = size[0] * blocks * tl.cdiv(height1, ROWS) * tl.cdiv(width1, COLUMNS)
    last = program >= first
    program = tl.where(last, program - first, program)
    height = tl.where(last, height2, height1)
    width = tl.where(last, width2, width1)
    place, top, left = tile_place(program, (height, width), ROWS, COLUMNS)
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    channel = (place % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    return last, place // blocks, channel, row, column, height, width


@triton.jit
def low_start(pyramid, size, channels, last, FIRST: tl.constexpr):
    """Where level 1, or 2 if it is the last, starts in a pyramid."""
    return tl.where(
        last, level_start(pyramid, size, channels, 2, FIRST), level_start(pyramid, size, channels, 1, FIRST)
    )


@jit_for_all_sizes("batch")
def ffn_low_kernel(
    hidden, mixed, weights, biases, batch, channels, height, width,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of the levels 1 and 2."""
    size = (batch, height, width)
    last, image, channel, row, column, height, width = low_tile(
        tl.program_id(0), size, channels, BLOCK_C, ROWS, COLUMNS
    )
    if last:
        weight, bias = weights[2], biases[2]
    else:
        weight, bias = weights[1], biases[1]
    level = hidden + low_start(hidden, size, channels, last, 0)
    values = _convolved(level, weight, bias, image, channel, channels, row, column, height, width)
    out = mixed + low_start(mixed, size, channels, last, 1)
    store_level(out, values, image, channel, channels, row, column, height, width)


@jit_for_all_sizes("outputs")
def ffn_out_kernel(
    hidden, mixed, dw_weight, dw_bias, weight, bias, scale, residual, y, residual_lane, y_lane, outputs, mid,
    batch, height, width, residual_image, residual_outer, residual_row, y_image, y_outer, y_row,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution at full resolution, the bilinear maps, GELU, the last 1x1 convolution, a scale and
    the residual, unless these are None."""
    size = (batch, outputs, height, width)
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLUMNS)
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = load(bias + e, mask=e < outputs)[:, None]
    total += tl.zeros((BLOCK_E, ROWS * COLUMNS), tl.float32)
    for s in tl.static_range(3):
        for start in tl.range(0, mid, BLOCK_C, disable_licm=True):
            c = start + tl.arange(0, BLOCK_C)
            before = before_gelu(hidden, mixed, dw_weight, dw_bias, image, c, mid, row, column, size, s)
            factor = load_matrix(weight + s * mid, e, e < outputs, c, mid, 3 * mid)
            total = dot(factor, gelu(before), total, PRECISION, MANY_WARPS=True)
    if scale is not None:
        total *= load(scale + e, mask=e < outputs)[:, None]
    if residual is not None:
        strides = (residual_lane, residual_image, residual_outer, residual_row)
        pointers, mask = image_pointers(residual, strides, image, e, outputs, row, column, size, ALIGN, CHANNELS_LAST)
        total += load(pointers, mask)
    strides = (y_lane, y_image, y_outer, y_row)
    pointers, mask = image_pointers(y, strides, image, e, outputs, row, column, size, ALIGN, CHANNELS_LAST)
    store(pointers, total, mask)
