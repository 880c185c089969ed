"""Forward kernels of the multi-scale feed-forward network, and what its backward kernels compute again.

What a program takes and how maps are kept is described in `multiscale_ffn`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import gelu
from ._tiles import image_pointers, load, load_matrix, multiple, store, tile_pixels, tile_place


@triton.jit
def level_pointers(level, image, channel, channels, row, column, height, width, ALIGN: tl.constexpr):
    """`image_pointers` to a level (B, channels, height, width) of a pyramid; rows and columns may be outside."""
    width = multiple(width, ALIGN)
    start = (image * channels + channel.to(tl.int64)) * height * width
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pointers = level + start[:, None] + (row.to(tl.int64) * width + column)[None, :]
    return pointers, (channel < channels)[:, None] & inside[None, :]


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
def _convolved(level, weight, bias, image, channel, channels, row, column, height, width, ALIGN: tl.constexpr):
    """Depthwise 3 x 3 convolution of a level at the pixels."""
    mask = channel < channels
    total = load(bias + channel, mask)[:, None]
    total += tl.zeros((1, row.shape[0]), tl.float32)
    # Rows in a loop, columns unrolled: the middle column is aligned, and the code stays small.
    for u in range(3):
        for v in tl.static_range(3):
            pointers, inside = level_pointers(
                level, image, channel, channels, row + (u - 1), column + (v - 1), height, width, ALIGN
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
        pointers, inside = level_pointers(level, image, channel, channels, r, q, height, width, 1)
        total += share[None, :] * load(pointers, inside)
    return total


@triton.jit
def before_gelu(
    hidden, mixed, starts, weight, bias, image, channel, channels, row, column, size, levels,
    SCALE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What the GELU takes at the pixels, of one scale."""
    if SCALE == 0:
        return _convolved(hidden, weight, bias, image, channel, channels, row, column, size[2], size[3], ALIGN)
    else:
        height, width = levels[SCALE]
        return _upsampled(mixed + starts[SCALE], image, channel, channels, row, column, height, width, size)


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
    x, strides, weight, bias, out, image, top, left, m, size, mid, level,
    BLOCK_K: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of a level that an image's tile is pooled to, after the first 1x1 convolution."""
    dim = size[1]
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    u, v = tile_pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLUMNS // FACTOR)
    sums = tl.zeros((m.shape[0], u.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        pointers, mask = image_pointers(x, strides, image, d, dim, row, column, size, ALIGN, CHANNELS_LAST)
        pixels = load(pointers, mask)
        factor = load_matrix(weight, m, m < mid, d, dim, dim)
        sums = tl.dot(factor, _pooled(pixels, ROWS, COLUMNS, FACTOR), sums, input_precision=PRECISION)
    offset = load(bias + m, mask=m < mid)
    values = sums / pixels_of(u, v, size, FACTOR)[None, :] + offset[:, None]
    target, inside = level_pointers(out, image, m, mid, u, v, level[0], level[1], LEVEL_ALIGN)
    store(target, values, inside)


@triton.jit
def ffn_in_kernel(
    x, strides, weight, bias, hidden, starts, size, levels, mid,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pyramid of the first 1x1 convolution: each level pools the image and has a third of the weight."""
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLUMNS)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Level by level: side by side they would need more registers than there are, and the tile stays in cache.
    for s in tl.static_range(3):
        _store_hidden(
            x, strides, weight + s * mid * size[1], bias + s * mid, hidden + starts[s], image, top, left, m, size, mid,
            levels[s], BLOCK_K, 1 << s, ROWS, COLUMNS, ALIGN, CHANNELS_LAST, LEVEL_ALIGN, PRECISION,
        )  # fmt: skip


@triton.jit
def low_tile(program, batch, channels, levels, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program over the tiles of the levels 1 and 2: whether it is level 2, image, channels, rows, columns."""
    blocks = tl.cdiv(channels, BLOCK_C)
    first = batch * blocks * tl.cdiv(levels[1][0], ROWS) * tl.cdiv(levels[1][1], COLUMNS)
    last = program >= first
    program = tl.where(last, program - first, program)
    height = tl.where(last, levels[2][0], levels[1][0])
    width = tl.where(last, levels[2][1], levels[1][1])
    place, top, left = tile_place(program, (height, width), ROWS, COLUMNS)
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    channel = (place % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    return last, place // blocks, channel, row, column, height, width


@triton.jit
def ffn_low_kernel(
    hidden, mixed, starts, mixed_starts, weights, biases, batch, channels, levels,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVEL_ALIGN: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of the levels 1 and 2."""
    last, image, channel, row, column, height, width = low_tile(
        tl.program_id(0), batch, channels, levels, BLOCK_C, ROWS, COLUMNS
    )
    if last:
        weight, bias = weights[2], biases[2]
    else:
        weight, bias = weights[1], biases[1]
    values = _convolved(
        hidden + tl.where(last, starts[2], starts[1]), weight, bias,
        image, channel, channels, row, column, height, width, LEVEL_ALIGN,
    )  # fmt: skip
    out = mixed + tl.where(last, mixed_starts[2], mixed_starts[1])
    pointers, mask = level_pointers(out, image, channel, channels, row, column, height, width, LEVEL_ALIGN)
    store(pointers, values, mask)


@triton.jit
def ffn_out_kernel(
    hidden, mixed, mixed_starts, dw_weight, dw_bias, weight, bias, scale, residual, residual_strides, y, strides,
    size, levels, mid,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution at full resolution, the bilinear maps, GELU, the last 1x1 convolution, a scale and
    the residual, unless these are None."""
    outputs = size[1]
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLUMNS)
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = load(bias + e, mask=e < outputs)[:, None]
    total += tl.zeros((BLOCK_E, ROWS * COLUMNS), tl.float32)
    for s in tl.static_range(3):
        for start in range(0, mid, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            before = before_gelu(
                hidden, mixed, mixed_starts, dw_weight, dw_bias, image, c, mid, row, column, size, levels, s,
                LEVEL_ALIGN,
            )  # fmt: skip
            factor = load_matrix(weight + s * mid, e, e < outputs, c, mid, 3 * mid)
            total = tl.dot(factor, gelu(before), total, input_precision=PRECISION)
    if scale is not None:
        total *= load(scale + e, mask=e < outputs)[:, None]
    if residual is not None:
        pointers, mask = image_pointers(
            residual, residual_strides, image, e, outputs, row, column, size, ALIGN, CHANNELS_LAST
        )
        total += load(pointers, mask)
    pointers, mask = image_pointers(y, strides, image, e, outputs, row, column, size, ALIGN, CHANNELS_LAST)
    store(pointers, total, mask)
