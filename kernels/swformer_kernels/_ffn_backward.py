"""Backward kernels of the multi-scale feed-forward network."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import jit_for_all_sizes
from ._ffn_forward import (
    before_gelu,
    level_pointers,
    level_size,
    level_start,
    low_start,
    low_tile,
    pixels_of,
    store_level,
)
from ._math import gelu, gelu_derivative
from ._tiles import dot, image_pointers, load, load_matrix, store, store_matrix, tile_pixels, tile_place


@triton.jit
def _active_gradient(
    grad, strides, weight, image, channel, channels, row, column, size,
    BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of what the GELU gives, of the scale whose columns of the last weight begin at `weight`."""
    outputs = size[1]
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for start in tl.range(0, outputs, BLOCK_K, disable_licm=True):
        k = start + tl.arange(0, BLOCK_K)
        pointers, mask = image_pointers(grad, strides, image, k, outputs, row, column, size, ALIGN, CHANNELS_LAST)
        right = load(pointers, mask)
        factor = tl.trans(load_matrix(weight, k, k < outputs, channel, channels, 3 * channels))
        total = dot(factor, right, total, PRECISION, MANY_WARPS=True)
    return total


@triton.jit
def _active_gradient_by_halves(
    grad, strides, weight, image, channel, channels, row, column, size,
    BLOCK_K: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_active_gradient`, every other channel at a time: products of more columns than rows, which warps share out by
    columns. Of as many rows every warp would take all columns, and their sums."""
    if channel.shape[0] < 32:
        return _active_gradient(
            grad, strides, weight, image, channel, channels, row, column, size, BLOCK_K, ALIGN, CHANNELS_LAST, PRECISION
        )
    else:
        HALF: tl.constexpr = channel.shape[0] // 2
        even, odd = tl.split(tl.reshape(channel, (HALF, 2)))
        of_even = _active_gradient(
            grad, strides, weight, image, even, channels, row, column, size, BLOCK_K, ALIGN, CHANNELS_LAST, PRECISION
        )
        of_odd = _active_gradient(
            grad, strides, weight, image, odd, channels, row, column, size, BLOCK_K, ALIGN, CHANNELS_LAST, PRECISION
        )
        return tl.reshape(tl.permute(tl.join(of_even, of_odd), (0, 2, 1)), (2 * HALF, row.shape[0]))


@jit_for_all_sizes("outputs")
def ffn_out_backward_kernel(
    grad, hidden, mixed, dw_weight, dw_bias, weight, first_grad, other_grads, partials, grad_lane, outputs, mid,
    batch, height, width, tiles, tiles_a_program, grad_image, grad_outer, grad_row,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what the GELU takes: of the first scale, and of the other two at full resolution (2, B, M, H, W).

    Unless `partials` is None, a row of it gets the sums, over some tiles, of the gradients of the last convolution's
    weight and then bias. A program takes block program_id(1) of the hidden channels and program_id(2) of the outputs.
    """
    size, strides = (batch, outputs, height, width), (grad_lane, grad_image, grad_outer, grad_row)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    zeros = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    of_weight = (zeros, zeros, zeros)
    of_bias = tl.zeros((BLOCK_E,), tl.float32)
    once = (c < tl.where(tl.program_id(2) == 0, mid, 0))[:, None]
    first = tl.program_id(0) * tiles_a_program
    for tile in tl.range(first, tl.minimum(first + tiles_a_program, tiles), disable_licm=True):
        image, top, left = tile_place(tile, size, ROWS, COLUMNS)
        row, column = tile_pixels(top, left, ROWS, COLUMNS)
        added = ()
        for s in tl.static_range(3):
            before = before_gelu(hidden, mixed, dw_weight, dw_bias, image, c, mid, row, column, size, s)
            inner = _active_gradient_by_halves(
                grad, strides, weight + s * mid, image, c, mid, row, column, size, BLOCK_K, ALIGN, CHANNELS_LAST,
                PRECISION,
            )  # fmt: skip
            if s == 0:
                out = first_grad
            else:
                out = other_grads
            place = image + max(s - 1, 0) * batch
            values = inner * gelu_derivative(before)
            store_level(out, values, place, c, mid, row, column, height, width, once)
            if partials is not None:
                pointers, mask = image_pointers(
                    grad, strides, image, e, outputs, row, column, size, ALIGN, CHANNELS_LAST
                )
                right = load(pointers, mask)
                active = tl.trans(gelu(before))
                added = added + (dot(right, active, of_weight[s], PRECISION, MANY_WARPS=True),)
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
    """The first pixel to which sample u of an axis gives a share under `interpolate`."""
    before = (2 * u.to(tl.int64) - 1) * size - low_size
    return tl.where(before < 0, 0, before // (2 * low_size) + 1).to(tl.int32)


@triton.jit
def _share(i, u, low_size, size):
    """The share that pixel i takes of sample u."""
    place = tl.minimum(tl.maximum((2 * i.to(tl.int64) + 1) * low_size - size, 0), 2 * size * (low_size - 1))
    distance = tl.abs(place - 2 * size * u.to(tl.int64))
    return tl.maximum(2 * size - distance, 0).to(tl.float32) / (2 * size)


@jit_for_all_sizes("batch")
def ffn_downsample_kernel(
    other_grads, out, batch, channels, height, width,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The transpose of the bilinear maps: gradients of the levels 1 and 2 from those at full resolution."""
    size = (batch, height, width)
    last, image, channel, row, column, low_height, low_width = low_tile(
        tl.program_id(0), size, channels, BLOCK_C, ROWS, COLUMNS
    )
    source = image + tl.where(last, batch, 0)
    reach = tl.where(last, 8, 4)
    top = _reaching(row, low_height, height)
    left = _reaching(column, low_width, width)
    total = tl.zeros((BLOCK_C, ROWS * COLUMNS), tl.float32)
    for i in range(0, reach):
        down = _share(top + i, row, low_height, height)
        for j in range(0, reach):
            share = down * _share(left + j, column, low_width, width)
            pointers, mask = level_pointers(other_grads, source, channel, channels, top + i, left + j, height, width)
            total += share[None, :] * load(pointers, mask)
    level = out + low_start(out, size, channels, last, 1)
    store_level(level, total, image, channel, channels, row, column, low_height, low_width)


@jit_for_all_sizes("batch")
def ffn_depthwise_backward_kernel(
    grads, hidden, out, weights, partials, batch, channels, height, width,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The depthwise convolutions' gradients, of all levels: by their input and, unless `partials` is None, by their
    taps and biases, summed over some tiles: a row of `partials`, level after level. A program takes level
    program_id(1) and block program_id(2) of the channels.
    """
    scale = tl.program_id(1)
    size = (batch, height, width)
    offset = tl.where(scale == 0, 0, low_start(hidden, size, channels, scale == 2, 0))
    height, width = tl.cdiv(height, 1 << scale), tl.cdiv(width, 1 << scale)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros((BLOCK_C, ROWS * COLUMNS), tl.float32),)
    factors = ()
    for tap in tl.static_range(9):
        # Of one level, by masks: a pointer chosen by a branch stops Triton 3.6 for AMD.
        factor = tl.zeros((BLOCK_C,), tl.float32)
        for level in tl.static_range(3):
            of_level = channel < tl.where(scale == level, channels, 0)
            factor += load(weights[level] + channel * 9 + tap, of_level)
        factors = factors + (factor,)
    tiles = batch * tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left = tile_place(tile, (height, width), ROWS, COLUMNS)
        row, column = tile_pixels(top, left, ROWS, COLUMNS)
        pointers, mask = level_pointers(hidden + offset, image, channel, channels, row, column, height, width)
        values = load(pointers, mask)
        total = tl.zeros((BLOCK_C, ROWS * COLUMNS), tl.float32)
        added = ()
        for tap in tl.static_range(9):
            pointers, inside = level_pointers(
                grads + offset, image, channel, channels, row - (tap // 3 - 1), column - (tap % 3 - 1), height, width
            )
            grad = load(pointers, inside)
            total += factors[tap][:, None] * grad
            added = added + (sums[tap] + values * grad,)
            if tap == 4:
                bias = sums[9] + grad
        sums = added + (bias,)
        store_level(out + offset, total, image, channel, channels, row, column, height, width)
    if partials is not None:
        partials += (tl.program_id(0).to(tl.int64) * 3 + scale) * channels * 10
        for tap in tl.static_range(9):
            tl.store(partials + channel * 9 + tap, tl.sum(sums[tap], 1), mask=exists)
        tl.store(partials + channels * 9 + channel, tl.sum(sums[9], 1), mask=exists)


@triton.jit
def _spread(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr):
    """Samples (channels, ROWS // FACTOR * COLUMNS // FACTOR), each for all its pixels: (channels, ROWS * COLUMNS)."""
    BLOCK_D: tl.constexpr = values.shape[0]
    tiles = tl.reshape(values, (BLOCK_D, ROWS // FACTOR, 1, COLUMNS // FACTOR, 1))
    repeated = tl.broadcast_to(tiles, (BLOCK_D, ROWS // FACTOR, FACTOR, COLUMNS // FACTOR, FACTOR))
    return tl.reshape(repeated, (BLOCK_D, ROWS * COLUMNS))


@triton.jit
def _image_gradient(
    grads, weight, image, mid, d, dim, top, left, size,
    BLOCK_K: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the gradient of a level adds to a tile of the image's gradient."""
    FACTOR: tl.constexpr = 1 << SCALE
    level = grads + level_start(grads, size, mid, SCALE, 0)
    height, width = level_size(size, SCALE)
    weight += SCALE * mid * dim
    row, column = tile_pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLUMNS // FACTOR)
    sums = tl.zeros((d.shape[0], row.shape[0]), tl.float32)
    for start in range(0, mid, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        pointers, mask = level_pointers(level, image, m, mid, row, column, height, width)
        right = load(pointers, mask)
        transposed = tl.trans(load_matrix(weight, m, m < mid, d, dim, dim))
        sums = dot(transposed, right, sums, PRECISION)
    return _spread(sums / pixels_of(row, column, size, FACTOR)[None, :], ROWS, COLUMNS, FACTOR)


@jit_for_all_sizes("dim")
def ffn_in_backward_kernel(
    grads, weight, out, out_lane, dim, mid, batch, height, width, out_image, out_outer, out_row,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the image from those of the pyramid of the first convolution."""
    size, strides = (batch, dim, height, width), (out_lane, out_image, out_outer, out_row)
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLUMNS)
    row, column = tile_pixels(top, left, ROWS, COLUMNS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D, ROWS * COLUMNS), tl.float32)
    for s in tl.static_range(3):
        total += _image_gradient(
            grads, weight, image, mid, d, dim, top, left, size, BLOCK_K, s, ROWS, COLUMNS, PRECISION
        )
    pointers, mask = image_pointers(out, strides, image, d, dim, row, column, size, ALIGN, CHANNELS_LAST)
    store(pointers, total, mask)


@jit_for_all_sizes("dim")
def ffn_in_parameters_kernel(
    grads, x, partials, x_lane, dim, mid, batch, height, width, tiles, tiles_a_program, x_image, x_outer, x_row,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums, over some tiles, of the gradients of the first convolution's weight and then bias: a row of `partials`.

    Instead of the pooled image with a level's gradient, the image is taken with the gradient shared among its pixels.
    """
    size, strides = (batch, dim, height, width), (x_lane, x_image, x_outer, x_row)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    of_weight = (zeros, zeros, zeros)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    of_bias = (zeros, zeros, zeros)
    first = tl.program_id(0) * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        image, top, left = tile_place(tile, size, 1, COLUMNS)
        row, column = tile_pixels(top, left, 1, COLUMNS)
        pointers, mask = image_pointers(x, strides, image, d, dim, row, column, size, ALIGN, CHANNELS_LAST)
        right = tl.trans(load(pointers, mask))
        weights = ()
        biases = ()
        for s in tl.static_range(3):
            level = grads + level_start(grads, size, mid, s, 0)
            level_height, level_width = level_size(size, s)
            u, v = row // (1 << s), column // (1 << s)
            pointers, mask = level_pointers(level, image, m, mid, u, v, level_height, level_width)
            count = pixels_of(u, v, size, 1 << s)
            shares = tl.where((column < width)[None, :], load(pointers, mask) / count[None, :], 0.0)
            weights = weights + (dot(shares, right, of_weight[s], PRECISION),)
            biases = biases + (of_bias[s] + tl.sum(shares, 1),)
        of_weight = weights
        of_bias = biases
    partials += tl.program_id(0).to(tl.int64) * 3 * mid * (dim + 1)
    once = m < tl.where(tl.program_id(2) == 0, mid, 0)
    for s in tl.static_range(3):
        store_matrix(partials, of_weight[s], s * mid + m, m < mid, d, dim, dim)
        tl.store(partials + 3 * mid * dim + s * mid + m, of_bias[s], mask=once)
