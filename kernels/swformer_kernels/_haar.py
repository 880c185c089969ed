"""Learnable 2-D Haar analysis and synthesis, forward and backward.

Two kernels serve four launchers: the input gradient of analysis is synthesis with the same taps, and the reverse. Both
hold a tile's pixels as four tensors a, b, c, d, the corners of each 2 x 2 block, and its coefficients as four more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    alignment,
    architecture,
    cdiv,
    empty,
    is_channels_last,
    jit_for_all_sizes,
    lane_first,
    next_power_of_2,
    warp_size,
)
from ._sums import sum_taps
from ._tiles import multiple, split_index

# By architecture: (coefficients of one sub-band up to which the row holds, their bytes in a program, warps).
_TILES = {
    "default": ((1 << 18, 2048, 4), (1 << 62, 4096, 4)),
    "sm_90": ((1 << 18, 2048, 4), (1 << 62, 8192, 8)),
    "sm_100": ((1 << 18, 2048, 4), (1 << 62, 8192, 8)),
    "gfx942": ((1 << 18, 4096, 4), (1 << 62, 8192, 4)),
}
_FEW = 1 << 16
# Programs that leave a partial sum of the filter gradients: bounds the second stage of the reduction.
_MAX_PARTIALS = 2048


@triton.jit
def load_taps(low, high):
    """The four taps in fp32."""
    l0 = tl.load(low).to(tl.float32)
    l1 = tl.load(low + 1).to(tl.float32)
    h0 = tl.load(high).to(tl.float32)
    h1 = tl.load(high + 1).to(tl.float32)
    return l0, l1, h0, h1


@triton.jit
def analyse(a, b, c, d, taps):
    """LL, LH, HL, HH of the pixels (a b; c d)."""
    l0, l1, h0, h1 = taps
    low0 = l0 * a + l1 * b
    low1 = l0 * c + l1 * d
    high0 = h0 * a + h1 * b
    high1 = h0 * c + h1 * d
    return l0 * low0 + l1 * low1, h0 * low0 + h1 * low1, l0 * high0 + l1 * high1, h0 * high0 + h1 * high1


@triton.jit
def synthesise(ll, lh, hl, hh, taps):
    """The pixels (a b; c d) of four coefficients: the transpose of `analyse`."""
    l0, l1, h0, h1 = taps
    low0 = l0 * ll + h0 * lh
    low1 = l1 * ll + h1 * lh
    high0 = l0 * hl + h0 * hh
    high1 = l1 * hl + h1 * hh
    return l0 * low0 + h0 * high0, l1 * low0 + h1 * high0, l0 * low1 + h0 * high1, l1 * low1 + h1 * high1


@triton.jit
def tap_gradients(ll, lh, hl, hh, a, b, c, d, taps):
    """Derivatives of sum(coefficients * analyse(pixels)) = sum(pixels * synthesise(coefficients)) by l0, l1, h0, h1."""
    l0, l1, h0, h1 = taps
    row_low0 = l0 * a + l1 * b
    row_low1 = l0 * c + l1 * d
    row_high0 = h0 * a + h1 * b
    row_high1 = h0 * c + h1 * d
    low0 = l0 * ll + h0 * lh
    low1 = l1 * ll + h1 * lh
    high0 = l0 * hl + h0 * hh
    high1 = l1 * hl + h1 * hh
    return (
        ll * row_low0 + hl * row_high0 + low0 * a + low1 * c,
        ll * row_low1 + hl * row_high1 + low0 * b + low1 * d,
        lh * row_low0 + hh * row_high0 + high0 * a + high1 * c,
        lh * row_low1 + hh * row_high1 + high0 * b + high1 * d,
    )


@triton.jit
def replicate(a, b, c, d, below, right):
    """Pixels beyond the bottom (not below) or the right edge take their neighbour's value."""
    b = tl.where(right, b, a)
    d = tl.where(right, d, c)
    return a, b, tl.where(below, c, a), tl.where(below, d, b)


@triton.jit
def fold(a, b, c, d, below, right):
    """The transpose of `replicate`: what lies beyond an edge is added to the neighbour."""
    a = tl.where(below, a, a + c)
    b = tl.where(below, b, b + d)
    return tl.where(right, a, a + b), b, tl.where(right, c, c + d), d


@triton.jit
def _position(tile, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """(image, channel, i, j) of each coefficient of a tile, broadcastable to (ROWS, COLUMNS), and its first lane.

    A tile is ROWS of the flattened (image, channel, i) by COLUMNS of j, or of (image, i, j) by COLUMNS channels.
    """
    _, channels, height, width = size
    h = (height + 1) // 2
    w = (width + 1) // 2
    across = tl.cdiv(channels if CHANNELS_LAST else w, COLUMNS)
    first_row = (tile // across).to(tl.int64) * ROWS
    first_lane = (tile % across) * COLUMNS
    lane = (first_lane + tl.arange(0, COLUMNS))[None, :]
    if CHANNELS_LAST:
        image, i, j = split_index(first_row, ROWS, h, w)
        return image, lane, i, j, first_lane
    else:
        image, channel, i = split_index(first_row, ROWS, channels, h)
        return image, channel, i, lane, first_lane


@triton.jit
def _inside(position, size, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Which coefficients exist, and whether the lower and the right pixels of their block do."""
    image, channel, i, j, _ = position
    batch, channels, height, width = size
    if CHANNELS_LAST:
        exists = (image < batch) & (channel < multiple(channels, BAND_ALIGN))
    else:
        exists = (image < batch) & (j < multiple((width + 1) // 2, BAND_ALIGN))
    return exists, 2 * i + 1 < height, 2 * j + 1 < width


@triton.jit
def _pixel_pointers(
    pointer, strides, position, size,
    COLUMNS: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Pointers to the upper pixels of the blocks and their mask: a alone (channels last), else a and b interleaved."""
    image, channel, i, j, first_lane = position
    batch, channels, _, width = size
    lane, of_image, outer, of_row = strides
    rows = pointer + image * multiple(of_image, PIXEL_ALIGN) + 2 * i * multiple(of_row, PIXEL_ALIGN)
    if CHANNELS_LAST:
        pointers = rows + 2 * j * multiple(outer, PIXEL_ALIGN) + channel.to(tl.int64) * lane
        return pointers, (image < batch) & (channel < multiple(channels, PIXEL_ALIGN))
    else:
        column = (2 * first_lane + tl.arange(0, 2 * COLUMNS))[None, :]
        pointers = rows + channel * multiple(outer, PIXEL_ALIGN) + column.to(tl.int64) * lane
        return pointers, (image < batch) & (column < multiple(width, PIXEL_ALIGN))


@triton.jit
def _load_pixels(
    pointer, strides, position, size, below, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The pixels a, b, c, d of a tile in fp32, zero beyond the image."""
    upper, mask = _pixel_pointers(pointer, strides, position, size, COLUMNS, PIXEL_ALIGN, CHANNELS_LAST)
    lower = upper + multiple(strides[3], PIXEL_ALIGN)
    if CHANNELS_LAST:
        step = multiple(strides[2], PIXEL_ALIGN)
        a = tl.load(upper, mask=mask, other=0.0)
        b = tl.load(upper + step, mask=mask & right, other=0.0)
        c = tl.load(lower, mask=mask & below, other=0.0)
        d = tl.load(lower + step, mask=mask & below & right, other=0.0)
    else:
        ab = tl.load(upper, mask=mask, other=0.0)
        cd = tl.load(lower, mask=mask & below, other=0.0)
        a, b = tl.split(tl.reshape(ab, (ROWS, COLUMNS, 2)))
        c, d = tl.split(tl.reshape(cd, (ROWS, COLUMNS, 2)))
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def _store_pixels(
    pointer, strides, a, b, c, d, position, size, below, right,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXEL_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    upper, mask = _pixel_pointers(pointer, strides, position, size, COLUMNS, PIXEL_ALIGN, CHANNELS_LAST)
    lower = upper + multiple(strides[3], PIXEL_ALIGN)
    dtype: tl.constexpr = pointer.dtype.element_ty
    if CHANNELS_LAST:
        step = multiple(strides[2], PIXEL_ALIGN)
        tl.store(upper, a.to(dtype), mask=mask)
        tl.store(upper + step, b.to(dtype), mask=mask & right)
        tl.store(lower, c.to(dtype), mask=mask & below)
        tl.store(lower + step, d.to(dtype), mask=mask & below & right)
    else:
        tl.store(upper, tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (ROWS, 2 * COLUMNS)), mask=mask)
        tl.store(lower, tl.reshape(tl.join(c.to(dtype), d.to(dtype)), (ROWS, 2 * COLUMNS)), mask=mask & below)


@triton.jit
def _band_pointers(pointer, strides, position, size, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pointers to the LL coefficients of a tile, and the step from one sub-band to the next."""
    image, channel, i, j, _ = position
    lane, of_image, outer, of_row = strides
    pointers = pointer + image * multiple(of_image, BAND_ALIGN) + i * multiple(of_row, BAND_ALIGN)
    if CHANNELS_LAST:
        step = multiple(size[1], BAND_ALIGN) * tl.cast(lane, tl.int64)
        return pointers + j * multiple(outer, BAND_ALIGN) + channel.to(tl.int64) * lane, step
    else:
        step = size[1] * tl.cast(multiple(outer, BAND_ALIGN), tl.int64)
        return pointers + channel * multiple(outer, BAND_ALIGN) + j.to(tl.int64) * lane, step


@triton.jit
def _load_bands(pointer, strides, position, size, exists, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """LL, LH, HL, HH of a tile in fp32, zero beyond the image."""
    pointers, step = _band_pointers(pointer, strides, position, size, BAND_ALIGN, CHANNELS_LAST)
    ll = tl.load(pointers, mask=exists, other=0.0)
    lh = tl.load(pointers + step, mask=exists, other=0.0)
    hl = tl.load(pointers + 2 * step, mask=exists, other=0.0)
    hh = tl.load(pointers + 3 * step, mask=exists, other=0.0)
    return ll.to(tl.float32), lh.to(tl.float32), hl.to(tl.float32), hh.to(tl.float32)


@triton.jit
def _store_bands(
    pointer, strides, ll, lh, hl, hh, position, size, exists, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    pointers, step = _band_pointers(pointer, strides, position, size, BAND_ALIGN, CHANNELS_LAST)
    dtype: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointers, ll.to(dtype), mask=exists)
    tl.store(pointers + step, lh.to(dtype), mask=exists)
    tl.store(pointers + 2 * step, hl.to(dtype), mask=exists)
    tl.store(pointers + 3 * step, hh.to(dtype), mask=exists)


@triton.jit
def _store_partials(partials, g0, g1, g2, g3):
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partials + program, tl.sum(tl.sum(g0, 1), 0))
    tl.store(partials + programs + program, tl.sum(tl.sum(g1, 1), 0))
    tl.store(partials + 2 * programs + program, tl.sum(tl.sum(g2, 1), 0))
    tl.store(partials + 3 * programs + program, tl.sum(tl.sum(g3, 1), 0))


@jit_for_all_sizes("batch")
def analysis_kernel(
    pixels, other, out, low, high, partials, pixels_lane, other_lane, out_lane, batch, channels, height, width, tiles,
    pixels_image, pixels_outer, pixels_row, other_image, other_outer, other_row, out_image, out_outer, out_row,
    EXTEND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """`out` = analysis of `pixels`, extended by replication (EXTEND) or zeros; `partials` = the derivatives, in the
    taps, of sum(other * analysis), one column a program. `out` or `other` with `partials` may be None.
    """
    size = (batch, channels, height, width)
    pixel_strides = (pixels_lane, pixels_image, pixels_outer, pixels_row)
    other_strides = (other_lane, other_image, other_outer, other_row)
    out_strides = (out_lane, out_image, out_outer, out_row)
    taps = load_taps(low, high)
    if partials is not None:
        g0 = tl.zeros((ROWS, COLUMNS), tl.float32)
        g1, g2, g3 = g0, g0, g0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        position = _position(tile, size, ROWS, COLUMNS, CHANNELS_LAST)
        exists, below, right = _inside(position, size, BAND_ALIGN, CHANNELS_LAST)
        a, b, c, d = _load_pixels(
            pixels, pixel_strides, position, size, below, right, ROWS, COLUMNS, PIXEL_ALIGN, CHANNELS_LAST
        )
        if EXTEND:
            a, b, c, d = replicate(a, b, c, d, below, right)
        if out is not None:
            ll, lh, hl, hh = analyse(a, b, c, d, taps)
            _store_bands(out, out_strides, ll, lh, hl, hh, position, size, exists, BAND_ALIGN, CHANNELS_LAST)
        if partials is not None:
            ll, lh, hl, hh = _load_bands(other, other_strides, position, size, exists, BAND_ALIGN, CHANNELS_LAST)
            d0, d1, d2, d3 = tap_gradients(ll, lh, hl, hh, a, b, c, d, taps)
            g0, g1, g2, g3 = g0 + d0, g1 + d1, g2 + d2, g3 + d3
    if partials is not None:
        _store_partials(partials, g0, g1, g2, g3)


@jit_for_all_sizes("batch")
def synthesis_kernel(
    bands, other, out, low, high, partials, bands_lane, other_lane, out_lane, batch, channels, height, width, tiles,
    bands_image, bands_outer, bands_row, other_image, other_outer, other_row, out_image, out_outer, out_row,
    EXTEND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIXEL_ALIGN: tl.constexpr, BAND_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """`out` = synthesis of `bands`, folded at the edges (EXTEND) or cropped; `partials` = the derivatives, in the taps,
    of sum(bands * analysis of other), one column a program. `out` or `other` with `partials` may be None.
    """
    size = (batch, channels, height, width)
    band_strides = (bands_lane, bands_image, bands_outer, bands_row)
    other_strides = (other_lane, other_image, other_outer, other_row)
    out_strides = (out_lane, out_image, out_outer, out_row)
    taps = load_taps(low, high)
    if partials is not None:
        g0 = tl.zeros((ROWS, COLUMNS), tl.float32)
        g1, g2, g3 = g0, g0, g0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        position = _position(tile, size, ROWS, COLUMNS, CHANNELS_LAST)
        exists, below, right = _inside(position, size, BAND_ALIGN, CHANNELS_LAST)
        ll, lh, hl, hh = _load_bands(bands, band_strides, position, size, exists, BAND_ALIGN, CHANNELS_LAST)
        if partials is not None:
            a, b, c, d = _load_pixels(
                other, other_strides, position, size, below, right, ROWS, COLUMNS, PIXEL_ALIGN, CHANNELS_LAST
            )
            if EXTEND:
                a, b, c, d = replicate(a, b, c, d, below, right)
            d0, d1, d2, d3 = tap_gradients(ll, lh, hl, hh, a, b, c, d, taps)
            g0, g1, g2, g3 = g0 + d0, g1 + d1, g2 + d2, g3 + d3
        if out is not None:
            a, b, c, d = synthesise(ll, lh, hl, hh, taps)
            if EXTEND:
                a, b, c, d = fold(a, b, c, d, below, right)
            _store_pixels(
                out, out_strides, a, b, c, d, position, size, below, right,
                ROWS, COLUMNS, PIXEL_ALIGN, CHANNELS_LAST,
            )  # fmt: skip
    if partials is not None:
        _store_partials(partials, g0, g1, g2, g3)


def launch(
    kernel: triton.runtime.JITFunction,
    size: tuple[int, ...],
    source: Tensor,
    other: Tensor | None,
    out: Tensor | None,
    layout: Tensor,
    low: Tensor,
    high: Tensor,
    extend: bool,
) -> tuple[Tensor, Tensor]:
    """Run a kernel over images of this size; the gradients of `low` and `high` (empty without `other`).

    The tiles follow the memory format of `layout`, the launcher's main input.
    """
    batch, channels, height, width = size
    h, w = (height + 1) // 2, (width + 1) // 2
    channels_last = is_channels_last(layout)
    lanes, lane_dim = (channels, 1) if channels_last else (w, 3)
    coefficients = batch * channels * h * w
    table = _TILES.get(architecture(source.device), _TILES["default"])
    _, tile_bytes, warps = next(row for row in table if coefficients <= row[0])
    # So few that a large GPU has lanes to spare share a kernel with wider ones.
    wider = 1 if channels_last or coefficients > _FEW else 4
    columns = max(8, min(128, wider * next_power_of_2(lanes)))
    if other is not None:
        # Half the elements for the sums' registers, but no less than 16 bytes a thread.
        tile_bytes //= 2
        warps = max(1, min(warps, tile_bytes // (16 * warp_size(source.device))))
    rows = max(1, tile_bytes // source.element_size() // columns)
    tiles = cdiv(coefficients // lanes, rows) * cdiv(lanes, columns)
    programs = tiles if other is None else min(tiles, _MAX_PARTIALS)
    pixel_tensors = [t for t in (source, other, out) if t is not None and t.shape[1] == channels]
    band_tensors = [t for t in (source, other, out) if t is not None and t.shape[1] == 4 * channels]
    partials = None if other is None else torch.empty((4, programs), dtype=torch.float32, device=source.device)
    low_grad, high_grad = (
        (low.new_empty(0), high.new_empty(0)) if other is None else (torch.empty_like(low), torch.empty_like(high))
    )
    source_lane, *source_strides = lane_first(source, channels_last)
    other_lane, *other_strides = lane_first(other, channels_last)
    out_lane, *out_strides = lane_first(out, channels_last)
    with torch.cuda.device_of(source):
        kernel[(programs,)](
            source, other, out, low.contiguous(), high.contiguous(), partials, source_lane, other_lane, out_lane,
            *size, tiles, *source_strides, *other_strides, *out_strides,
            EXTEND=extend, ROWS=rows, COLUMNS=columns,
            PIXEL_ALIGN=alignment(channels if channels_last else width, lane_dim, pixel_tensors),
            BAND_ALIGN=alignment(lanes, lane_dim, band_tensors),
            CHANNELS_LAST=channels_last, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        if partials is not None:
            sum_taps(partials, low_grad, high_grad)
    return low_grad, high_grad


def gradients(
    kernel: triton.runtime.JITFunction,
    size: tuple[int, ...],
    grad: Tensor,
    primal: Tensor,
    low: Tensor,
    high: Tensor,
    need_primal: bool,
    need_filters: bool,
    extend: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a transform by its input `primal` and its two filters; `kernel` is its transpose."""
    out = empty(primal, *primal.shape) if need_primal else None
    if primal.numel() == 0:
        taps = (torch.zeros_like(low), torch.zeros_like(high))
    elif need_primal or need_filters:
        taps = launch(kernel, size, grad, primal if need_filters else None, out, primal, low, high, extend)
    # A tensor each: results of an op share no memory.
    low_grad, high_grad = taps if need_filters else (low.new_empty(0), high.new_empty(0))
    return primal.new_empty(0) if out is None else out, low_grad, high_grad
