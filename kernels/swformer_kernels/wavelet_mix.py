"""Haar analysis, depthwise convolution of the sub-bands and synthesis in one pass, forward and backward.

Rows of coefficients stream through registers (`_stream`): each is computed from two rows of pixels when they arrive and
lives on only in the sums of the rows that it reaches, so no coefficient is ever stored. Of a segment's V columns of
pixels a lane holds C = V / 2 columns of coefficients. The sub-bands LL, LH, HL, HH lie one below the other: a tensor of
coefficients is (4 P, L), row band * P + strip. One of pixels is (P, L); tensor corner * C + q of a tuple is column q of
the corners a, b, c, d of the 2 x 2 blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Launch, check_dtype, empty, is_channels_last, jit_for_all_sizes, lane_first, parameter_gradients
from ._haar import fold, load_taps, replicate
from ._stream import (
    Plan,
    add_inside,
    convolve,
    correlate,
    extend,
    keep,
    load_plane,
    load_row,
    load_weights,
    pack,
    partial_sums,
    plan,
    plane_place,
    position,
    store_row,
    store_sums,
    unpack,
    zeros,
)
from ._sums import sum_partials, sum_taps
from ._tiles import load, multiple


@triton.jit
def _spread(value, P: tl.constexpr, N: tl.constexpr):
    """(P, N) once for each sub-band: (4 P, N)."""
    return tl.reshape(tl.broadcast_to(value[None, :, :], (4, P, N)), (4 * P, N))


@triton.jit
def _filters(low, high, P: tl.constexpr):
    """For each row of coefficients, (4 P, 1), its filter's two taps along H and two along W."""
    l0, l1, h0, h1 = load_taps(low, high)
    band = (tl.arange(0, 4 * P) // P)[:, None]
    low_rows = band % 2 == 0
    low_columns = band < 2
    return (
        tl.where(low_rows, l0, h0),
        tl.where(low_rows, l1, h1),
        tl.where(low_columns, l0, h0),
        tl.where(low_columns, l1, h1),
    )


@triton.jit
def _double(value, P: tl.constexpr):
    """(P, 1) twice, for the upper and the lower rows of pixels: (2 P, 1)."""
    return tl.reshape(tl.broadcast_to(value[None, :, :], (2, P, 1)), (2 * P, 1))


@triton.jit
def _pointers(
    x, plane, exists, i, start, height, width, halo,
    P: tl.constexpr, L: tl.constexpr, V: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointers to the segments of both rows of pixels of coefficient row i, (2 P, L * V), and a mask less the halo."""
    offset, down, step = plane
    y = 2 * _double(i, P) + (tl.arange(0, 2 * P) // P)[:, None]
    place = tl.arange(0, L * V)[None, :]
    column = start + place
    mask = _double(exists, P) & (y < height) & (column >= 0) & (column < width)
    mask = mask & (place >= halo) & (place < L * V - halo)
    # Offsets, not pointers, are doubled: a compiler that forgets what divides a reshaped tensor is told again.
    rows = x + multiple(_double(offset, P), ALIGN) + y * multiple(down, ALIGN)
    return rows + column.to(tl.int64) * step, mask


@triton.jit
def _load_pixels(
    x, plane, added, exists, i, start, height, width,
    P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, EXTEND: tl.constexpr,
):  # fmt: skip
    """The corners of the blocks of coefficient row i, zero outside the image, and within it more by `added`, (P, 1).
    EXTEND: nothing is added, and what is beyond an odd edge replicated.
    """
    below = 2 * i + 1 < height
    if CHANNELS_LAST:
        offset, down, step = plane
        rows = x + offset
        upper = load_row(rows + 2 * i * down, step, exists, start, width, P, L, V, True)
        lower = load_row(rows + (2 * i + 1) * down, step, exists & below, start, width, P, L, V, True)
    else:
        pointers, mask = _pointers(x, plane, exists, i, start, height, width, 0, P, L, V, ALIGN)
        both = tl.reshape(tl.load(pointers, mask=mask, other=0.0), (2, P, L * V))
        both0, both1 = tl.split(tl.permute(both, (1, 2, 0)))
        upper, lower = unpack(both0, P, L, V), unpack(both1, P, L, V)
    if not EXTEND:
        upper = add_inside(upper, added, exists, start, width, L, V)
        lower = add_inside(lower, added, exists & below, start, width, L, V)
    a_row, b_row, c_row, d_row = (), (), (), ()
    for q in tl.static_range(V // 2):
        a, b = upper[2 * q].to(tl.float32), upper[2 * q + 1].to(tl.float32)
        c, d = lower[2 * q].to(tl.float32), lower[2 * q + 1].to(tl.float32)
        if EXTEND:
            right = start + V * tl.arange(0, L)[None, :] + 2 * q + 1 < width
            a, b, c, d = replicate(a, b, c, d, below, right)
        a_row, b_row, c_row, d_row = a_row + (a,), b_row + (b,), c_row + (c,), d_row + (d,)
    return a_row + b_row + c_row + d_row


@triton.jit
def _analyse(pixels, filters, P: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """The coefficients of a row of pixels."""
    r0, r1, c0, c1 = filters
    bands = ()
    for q in tl.static_range(C):
        upper = c0 * _spread(pixels[q], P, L) + c1 * _spread(pixels[C + q], P, L)
        lower = c0 * _spread(pixels[2 * C + q], P, L) + c1 * _spread(pixels[3 * C + q], P, L)
        bands = bands + (r0 * upper + r1 * lower,)
    return bands


@triton.jit
def _sum_bands(row, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr):
    """Each tensor (4 P, L) of a row, summed over the sub-bands."""
    result = ()
    for v in tl.static_range(V):
        result = result + (tl.sum(tl.reshape(row[v], (4, P, L)), 0),)
    return result


@triton.jit
def _store_pixels(
    y, plane, bands, filters, exists, i, start, height, width, halo,
    P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Synthesise and write the pixels of coefficient row i; FOLD transposes the replication beyond an odd edge."""
    r0, r1, c0, c1 = filters
    below = 2 * i + 1 < height
    upper, lower = (), ()
    for q in tl.static_range(V // 2):
        a, b, c, d = r0 * c0 * bands[q], r0 * c1 * bands[q], r1 * c0 * bands[q], r1 * c1 * bands[q]
        if FOLD:
            right = start + V * tl.arange(0, L)[None, :] + 2 * q + 1 < width
            a, b, c, d = fold(a, b, c, d, _spread(below, P, 1), right)
        upper, lower = upper + (a, b), lower + (c, d)
    if CHANNELS_LAST:
        offset, down, step = plane
        rows = y + offset
        upper, lower = _sum_bands(upper, P, L, V), _sum_bands(lower, P, L, V)
        store_row(rows + 2 * i * down, step, upper, exists, start, width, halo, P, L, V, True)
        store_row(rows + (2 * i + 1) * down, step, lower, exists & below, start, width, halo, P, L, V, True)
    else:
        both = tl.join(pack(upper, 4 * P, L, V), pack(lower, 4 * P, L, V))
        both = tl.permute(tl.sum(tl.reshape(both, (4, P, L * V, 2)), 0), (2, 0, 1))
        pointers, mask = _pointers(y, plane, exists, i, start, height, width, halo, P, L, V, ALIGN)
        tl.store(pointers, tl.reshape(both, (2 * P, L * V)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _add_blocks(
    total, bands, filters, exists, i, start, height, width, halo, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr
):
    """Add to `total`, (4 P, L), what the coefficients give to the sum of the pixels that `_store_pixels` writes."""
    r0, r1, c0, c1 = filters
    rows = r0 + tl.where(_spread(2 * i + 1 < height, P, 1), r1, 0.0)
    place = V * tl.arange(0, L)[None, :]
    interior = _spread(exists, P, 1) & (place >= halo) & (place < L * V - halo)
    for q in tl.static_range(V // 2):
        column = start + place + 2 * q
        weight = rows * (c0 + tl.where(column + 1 < width, c1, 0.0))
        total += tl.where(interior & (column < width), weight * bands[q], 0.0)
    return total


@triton.jit
def _add_products(sums, bands, pixels, P: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """Add the products of coefficients with the corners of their blocks to four sums: the gradients of the filters."""
    result = ()
    for corner in tl.static_range(4):
        total = sums[corner]
        for q in tl.static_range(C):
            total += bands[q] * _spread(pixels[corner * C + q], P, L)
        result = result + (total,)
    return result


@triton.jit
def _store_tap_gradients(target, sums, filters, P: tl.constexpr):
    """From the gradients of the filters those of the taps, into rows 0 .. 3 of `target`, one column a program."""
    a, b, c, d = sums
    r0, r1, c0, c1 = filters
    band = (tl.arange(0, 4 * P) // P)[:, None]
    low_rows = band % 2 == 0
    low_columns = band < 2
    rows0, rows1 = c0 * a + c1 * b, c0 * c + c1 * d
    columns0, columns1 = r0 * a + r1 * c, r0 * b + r1 * d
    low0 = tl.where(low_rows, rows0, 0.0) + tl.where(low_columns, columns0, 0.0)
    low1 = tl.where(low_rows, rows1, 0.0) + tl.where(low_columns, columns1, 0.0)
    high0 = tl.where(low_rows, 0.0, rows0) + tl.where(low_columns, 0.0, columns0)
    high1 = tl.where(low_rows, 0.0, rows1) + tl.where(low_columns, 0.0, columns1)
    grads = (low0, low1, high0, high1)
    for t in tl.static_range(4):
        tl.store(target + t * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(grads[t], 1), 0))


@jit_for_all_sizes("batch")
def wavelet_kernel(
    x, added, y, weight, bias, in_low, in_high, out_low, out_high, partials, x_lane, y_lane,
    batch, channels, height, width, strips, rows, segments, halo, x_image, x_outer, x_row, y_image, y_outer, y_row,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """y = synthesis of the convolution of the analysis of x; its sums over the pixels of each strip into `partials`
    (unless None). ADJOINT: the gradient of x into y from that of y in x, with the taps of synthesis first; `added`
    (unless None) is a part of the gradient of every pixel of a plane.
    """
    R: tl.constexpr = K // 2
    C: tl.constexpr = V // 2
    image, strip, channel, segment, start, halo = position(channels, strips, segments, halo, P, L, V)
    width = multiple(width, ALIGN)
    h = (height + 1) // 2
    alive = image < batch
    first = strip * rows
    last = tl.minimum(first + rows, h)
    of_sums = load_plane(added, image, channel, alive, channels, P)
    x_plane = plane_place((x_lane, x_image, x_outer, x_row), image, channel, ALIGN, CHANNELS_LAST)
    y_plane = plane_place((y_lane, y_image, y_outer, y_row), image, channel, ALIGN, CHANNELS_LAST)
    in_filters = _filters(in_low, in_high, P)
    out_filters = _filters(out_low, out_high, P)
    number = _spread(channel, P, 1) + (tl.arange(0, 4 * P) // P)[:, None] * channels
    weights = load_weights(weight, number, _spread(alive, P, 1), K * K)
    offset = tl.zeros((4 * P, L), tl.float32)
    if not ADJOINT:
        offset += load(bias + number, mask=_spread(alive, P, 1))
    sums = zeros((K - 1) * C, 4 * P, L)
    total = tl.zeros((4 * P, L), tl.float32)
    for step in range(0, rows + 2 * R):
        i = first - R + step
        pixels = _load_pixels(
            x, x_plane, of_sums, alive & (i >= 0) & (i < h), i, start, height, width,
            P, L, V, ALIGN, CHANNELS_LAST, not ADJOINT,
        )  # fmt: skip
        bands = extend(_analyse(pixels, in_filters, P, L, C), R, C, 4 * P, L)
        done, sums = convolve(sums, bands, weights, offset, K, C, ADJOINT)
        o = i - R
        exists = alive & (o >= first) & (o < last)
        _store_pixels(
            y, y_plane, done, out_filters, exists, o, start, height, width, halo,
            P, L, V, ALIGN, CHANNELS_LAST, ADJOINT,
        )  # fmt: skip
        if partials is not None:
            total = _add_blocks(total, done, out_filters, exists, o, start, height, width, halo, P, L, V)
    if partials is not None:
        total = tl.sum(tl.reshape(total, (4, P, L)), 0)
        store_sums(partials, total, image, strip, channel, segment, alive, channels, strips, segments)


# Long: the rows that a step hands to the next stay in registers, so that a step is one loop.
@jit_for_all_sizes("batch")
def wavelet_backward_kernel(
    grad, grad_sums, x, out, weight, bias, dec_lo, dec_hi, rec_lo, rec_hi, partials, tap_partials,
    grad_lane, x_lane, out_lane, batch, channels, height, width, strips, rows, segments, halo,
    grad_image, grad_outer, grad_row, x_image, x_outer, x_row, out_image, out_outer, out_row,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The gradient of x into `out` (unless None); of each strip those of weight and bias into `partials`; of each
    program those of dec_lo, dec_hi, rec_lo, rec_hi into a column of `tap_partials` (8, programs). `grad_sums` (unless
    None) is a part of the gradient of every pixel of a plane.

    At a step row i of x and row r = i - R of the gradient arrive; row r of the convolution and row m = r - R of its
    transpose are complete. The last 2 R rows of pixels of this program's interior are held for the latter.
    """
    R: tl.constexpr = K // 2
    C: tl.constexpr = V // 2
    image, strip, channel, segment, start, halo = position(channels, strips, segments, halo, P, L, V)
    width = multiple(width, ALIGN)
    h = (height + 1) // 2
    alive = image < batch
    first = strip * rows
    last = tl.minimum(first + rows, h)
    place = V * tl.arange(0, L)[None, :]
    interior = (place >= halo) & (place < L * V - halo)
    grad_plane = plane_place((grad_lane, grad_image, grad_outer, grad_row), image, channel, ALIGN, CHANNELS_LAST)
    x_plane = plane_place((x_lane, x_image, x_outer, x_row), image, channel, ALIGN, CHANNELS_LAST)
    if out is not None:
        out_plane = plane_place((out_lane, out_image, out_outer, out_row), image, channel, ALIGN, CHANNELS_LAST)
    dec = _filters(dec_lo, dec_hi, P)
    rec = _filters(rec_lo, rec_hi, P)
    alive_bands = _spread(alive, P, 1)
    number = _spread(channel, P, 1) + (tl.arange(0, 4 * P) // P)[:, None] * channels
    weights = load_weights(weight, number, alive_bands, K * K)
    nothing = tl.zeros((4 * P, L), tl.float32)
    offset = load(bias + number, alive_bands) + nothing
    of_sums = load_plane(grad_sums, image, channel, alive, channels, P)
    sums = zeros((K - 1) * C, 4 * P, L)
    transposed_sums = zeros((K - 1) * C, 4 * P, L)
    held = zeros((K - 1) * 4 * C, P, L)
    weight_grads = zeros(K * K, 4 * P, L)
    bias_grad = nothing
    dec_grads = zeros(4, 4 * P, L)
    rec_grads = zeros(4, 4 * P, L)
    for step in range(0, rows + 3 * R):
        i = first - R + step
        r = i - R
        m = r - R
        pixels = _load_pixels(
            x, x_plane, of_sums, alive & (i >= 0) & (i < h) & (i < last + R), i, start, height, width,
            P, L, V, ALIGN, CHANNELS_LAST, True,
        )  # fmt: skip
        bands = extend(_analyse(pixels, dec, P, L, C), R, C, 4 * P, L)
        convolved, sums = convolve(sums, bands, weights, offset, K, C, False)
        grad_pixels = _load_pixels(
            grad, grad_plane, of_sums,
            alive & (r >= tl.maximum(first - R, 0)) & (r < h) & (r < last + R), r, start, height, width,
            P, L, V, ALIGN, CHANNELS_LAST, False,
        )  # fmt: skip
        around = extend(_analyse(grad_pixels, rec, P, L, C), R, C, 4 * P, L)
        transposed, transposed_sums = convolve(transposed_sums, around, weights, nothing, K, C, True)

        interior_pixels = keep(grad_pixels, interior & (r >= first) & (r < last), 4 * C)
        rec_grads = _add_products(rec_grads, convolved, interior_pixels, P, L, C)
        interior_bands = _spread(interior & (r >= first) & (r < last), P, L)
        for q in tl.static_range(C):
            bias_grad += tl.where(interior_bands, around[R + q], 0.0)
        held = held + keep(pixels, interior & (i >= first) & (i < last), 4 * C)
        added = ()
        for u in tl.static_range(K):
            row = _analyse(held[4 * C * u : 4 * C * (u + 1)], dec, P, L, C)
            added = added + correlate(weight_grads[u * K : (u + 1) * K], row, around, K, C)
        weight_grads = added
        interior_bands = _spread(interior & (m >= first) & (m < last), P, L)
        dec_grads = _add_products(dec_grads, keep(transposed, interior_bands, C), held[: 4 * C], P, L, C)
        held = held[4 * C :]
        if out is not None:
            _store_pixels(
                out, out_plane, transposed, dec, alive & (m >= first) & (m < last),
                m, start, height, width, halo, P, L, V, ALIGN, CHANNELS_LAST, True,
            )  # fmt: skip
    part = (segment * batch + image) * strips + strip
    target = partials + (_spread(part, P, 1) * 4 * channels + number) * (K * K + 1)
    for t in tl.static_range(K * K):
        tl.store(target + t, tl.sum(weight_grads[t], 1, keep_dims=True), mask=alive_bands)
    tl.store(target + K * K, tl.sum(bias_grad, 1, keep_dims=True), mask=alive_bands)
    _store_tap_gradients(tap_partials, dec_grads, dec, P)
    _store_tap_gradients(tap_partials + 4 * tl.num_programs(0), rec_grads, rec, P)


def _check(x: Tensor, weight: Tensor) -> int:
    """The radius of the convolution."""
    check_dtype("x", x)
    if weight.shape[-2:] not in ((3, 3), (5, 5)):
        raise ValueError(f"weight must be 3 x 3 or 5 x 5 for the Triton kernels, got shape {tuple(weight.shape)}")
    return weight.shape[-1] // 2


def _plan(x: Tensor, tensors: list[Tensor], radius: int) -> Plan:
    if is_channels_last(x):
        return plan(x, tensors, 4, halo=2 * radius, unit=2, reach=radius, bands=4)
    # Two rows of pixels over 64 threads make 16 bytes a thread; a larger convolution needs the registers of 128, and
    # with more than four columns a lane still spills.
    vector, threads = (16 // x.element_size(), 64) if radius == 1 else (4, 128)
    return plan(x, tensors, vector, halo=2 * radius, unit=2, reach=radius, bands=4, threads=threads)


def _prepare(cut: Plan, x: Tensor, y: Tensor, radius: int, adjoint: bool) -> Launch:
    last = is_channels_last(y)
    (x_lane, *x_strides), (y_lane, *y_strides) = lane_first(x, last), lane_first(y, last)
    numbers = (x_lane, y_lane, *y.shape, *cut.numbers, *x_strides, *y_strides)
    constants = {"K": 2 * radius + 1, "ADJOINT": adjoint, **cut.constants}
    return Launch(wavelet_kernel, (cut.programs,), numbers, constants)


def prepare(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Launch, int]:
    """Of `wavelet_kernel`, and the parts of a plane's sum."""
    radius = _check(x, weight)
    cut = _plan(x, [x, y], radius)
    return _prepare(cut, x, y, radius, False), cut.parts_a_plane


def wavelet_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dec_lo: Tensor,
    dec_hi: Tensor,
    rec_lo: Tensor,
    rec_hi: Tensor,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Analysis, depthwise k x k convolution of the four sub-bands, synthesis; k = 3 or 5: `reference.wavelet_mix`.

    `x` is (B, C, H, W), float32, float16 or bfloat16, of any strides; `weight` is (4C, 1, k, k), and the parameters
    have any of these dtypes; arithmetic is fp32. A channels_last `x` gives a channels_last result, any other a
    contiguous one. The second result are the sums of the first over the pixels, (B, C) in fp32, empty unless needed.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `weight` has another size.
    """
    y = empty(x, *x.shape)
    launch, parts = prepare(x, y, weight)
    partials = partial_sums(x, parts, need_sums)
    if x.numel():
        parameters = (p.contiguous() for p in (weight, bias, dec_lo, dec_hi, rec_lo, rec_hi))
        with torch.cuda.device_of(x):
            launch(x, None, y, *parameters, partials)
    return y, x.new_empty(0, dtype=torch.float32) if partials is None else partials.sum(2)


def wavelet_mix_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dec_lo: Tensor,
    dec_hi: Tensor,
    rec_lo: Tensor,
    rec_hi: Tensor,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `wavelet_mix` by x and its six parameters; those not needed are empty. Deterministic.

    The coefficients are recomputed. `grad` may have any strides; the gradient of x has the layout that `wavelet_mix`
    gives its result.
    """
    radius = _check(x, weight)
    taps = (dec_lo, dec_hi, rec_lo, rec_hi)
    out = empty(x, *x.shape) if need_x else None
    parameters = (weight, bias, *taps)
    grads = parameter_gradients(x, parameters, need_parameters)
    added = None if grad_sums is None else grad_sums.contiguous()
    if x.numel() and need_parameters:
        cut = _plan(x, [grad, x] if out is None else [grad, x, out], radius)
        partials = torch.empty((cut.parts, len(bias), (2 * radius + 1) ** 2 + 1), dtype=torch.float32, device=x.device)
        tap_partials = torch.empty((8, cut.programs), dtype=torch.float32, device=x.device)
        last = is_channels_last(x)
        grad_lane, *grad_strides = lane_first(grad, last)
        x_lane, *x_strides = lane_first(x, last)
        out_lane, *out_strides = lane_first(out, last)
        with torch.cuda.device_of(x):
            wavelet_backward_kernel[(cut.programs,)](
                grad, added, x, out, *(p.contiguous() for p in parameters), partials, tap_partials,
                grad_lane, x_lane, out_lane, *x.shape, *cut.numbers, *grad_strides, *x_strides, *out_strides,
                K=2 * radius + 1, **cut.constants,
            )  # fmt: skip
            sum_partials(partials, grads[0], grads[1])
            sum_taps(tap_partials, *grads[2:])
    elif x.numel() and out is not None:
        cut = _plan(out, [grad, out], radius)
        launch = _prepare(cut, grad, out, radius, True)
        with torch.cuda.device_of(x):
            launch(grad, added, out, *(p.contiguous() for p in (weight, bias, rec_lo, rec_hi, dec_lo, dec_hi)), None)
    return (x.new_empty(0) if out is None else out, *grads)
