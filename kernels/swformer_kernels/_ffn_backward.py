"""Backward kernels of the multi-scale feed-forward network."""

from __future__ import annotations

import triton
import triton.language as tl

from ._ffn_forward import before_gelu, level_pointers, low_tile, pixels_of
from ._math import gelu, gelu_derivative
from ._tiles import image_pointers, load, load_matrix, store, store_matrix, tile_pixels, tile_place


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
        pointers, mask = image_pointers(grad, strides, image, k, outputs, row, col, size, ALIGN, CHANNELS_LAST)
        right = load(pointers, mask)
        factor = tl.trans(load_matrix(weight, k, k < outputs, channel, channels, 3 * channels))
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
        image, top, left = tile_place(tile, size, ROWS, COLS)
        row, col = tile_pixels(top, left, ROWS, COLS)
        added = ()
        for s in tl.static_range(3):
            inner = _active_gradient(
                grad, strides, weight + s * mid, image, c, mid, row, col, size, BK, ALIGN, CHANNELS_LAST, PRECISION
            )
            before = before_gelu(
                hidden, mixed, mixed_starts, dw_weight, dw_bias, image, c, mid, row, col, size, levels, s, LEVEL_ALIGN
            )
            if s == 0:
                out = first_grad
            else:
                out = other_grads
            place = image + max(s - 1, 0) * batch
            pointers, mask = level_pointers(out, place, c, mid, row, col, height, width, LEVEL_ALIGN)
            values = inner * gelu_derivative(before)
            store(pointers, values, mask & once)
            if partials is not None:
                pointers, mask = image_pointers(grad, strides, image, e, outputs, row, col, size, ALIGN, CHANNELS_LAST)
                right = load(pointers, mask)
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
    """The first pixel to which sample u of an axis gives a share under `interpolate`."""
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
    last, image, channel, row, col, low_height, low_width = low_tile(
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
            pointers, mask = level_pointers(other_grads, source, channel, channels, top + i, left + j, height, width, 1)
            total += share[None, :] * load(pointers, mask)
    target = out + tl.where(last, starts[2], starts[1])
    pointers, mask = level_pointers(target, image, channel, channels, row, col, low_height, low_width, LEVEL_ALIGN)
    store(pointers, total, mask)


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
            factor += load(weights[level] + channel * 9 + tap, mine)
        factors = factors + (factor,)
    tiles = batch * tl.cdiv(height, ROWS) * tl.cdiv(width, COLS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        image, top, left = tile_place(tile, (height, width), ROWS, COLS)
        row, col = tile_pixels(top, left, ROWS, COLS)
        pointers, mask = level_pointers(hidden + offset, image, channel, channels, row, col, height, width, LEVEL_ALIGN)
        values = load(pointers, mask)
        total = tl.zeros((BC, ROWS * COLS), tl.float32)
        added = ()
        for tap in tl.static_range(9):
            pointers, inside = level_pointers(
                grads + offset, image, channel, channels, row - (tap // 3 - 1), col - (tap % 3 - 1), height, width,
                LEVEL_ALIGN,
            )  # fmt: skip
            grad = load(pointers, inside)
            total += factors[tap][:, None] * grad
            added = added + (sums[tap] + values * grad,)
            if tap == 4:
                bias = sums[9] + grad
        sums = added + (bias,)
        pointers, mask = level_pointers(out + offset, image, channel, channels, row, col, height, width, LEVEL_ALIGN)
        store(pointers, total, mask)
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
    row, col = tile_pixels(top // FACTOR, left // FACTOR, ROWS // FACTOR, COLS // FACTOR)
    sums = tl.zeros((d.shape[0], row.shape[0]), tl.float32)
    for start in range(0, mid, BK):
        m = start + tl.arange(0, BK)
        pointers, mask = level_pointers(grads, image, m, mid, row, col, level[0], level[1], ALIGN)
        right = load(pointers, mask)
        transposed = tl.trans(load_matrix(weight, m, m < mid, d, dim, dim))
        sums = tl.dot(transposed, right, sums, input_precision=PRECISION)
    return _spread(sums / pixels_of(row, col, size, FACTOR)[None, :], ROWS, COLS, FACTOR)


@triton.jit
def ffn_in_backward_kernel(
    grads, starts, weight, out, strides, size, levels, mid,
    BK: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, LEVEL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the image from those of the pyramid of the first convolution."""
    dim = size[1]
    image, top, left = tile_place(tl.program_id(0), size, ROWS, COLS)
    row, col = tile_pixels(top, left, ROWS, COLS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD, ROWS * COLS), tl.float32)
    for s in tl.static_range(3):
        total += _image_gradient(
            grads + starts[s], weight + s * mid * dim, image, mid, d, dim, top, left, size, levels[s],
            BK, 1 << s, ROWS, COLS, LEVEL_ALIGN, PRECISION,
        )  # fmt: skip
    pointers, mask = image_pointers(out, strides, image, d, dim, row, col, size, ALIGN, CHANNELS_LAST)
    store(pointers, total, mask)


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
        image, top, left = tile_place(tile, size, 1, COLS)
        row, col = tile_pixels(top, left, 1, COLS)
        pointers, mask = image_pointers(x, strides, image, d, dim, row, col, size, ALIGN, CHANNELS_LAST)
        right = tl.trans(load(pointers, mask))
        weights = ()
        biases = ()
        for s in tl.static_range(3):
            pointers, mask = level_pointers(
                grads + starts[s], image, m, mid, row // (1 << s), col // (1 << s), levels[s][0], levels[s][1], 1
            )
            inside = mask & (col < size[3])[None, :]
            count = pixels_of(row // (1 << s), col // (1 << s), size, 1 << s)
            shares = load(pointers, inside) / count[None, :]
            weights = weights + (tl.dot(shares, right, of_weight[s], input_precision=PRECISION),)
            biases = biases + (of_bias[s] + tl.sum(shares, 1),)
        of_weight = weights
        of_bias = biases
    partials += tl.program_id(0).to(tl.int64) * 3 * mid * (dim + 1)
    once = m < tl.where(tl.program_id(2) == 0, mid, 0)
    for s in tl.static_range(3):
        store_matrix(partials, of_weight[s], s * mid + m, m < mid, d, dim, dim)
        tl.store(partials + 3 * mid * dim + s * mid + m, of_bias[s], mask=once)
