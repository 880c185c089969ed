"""Depthwise convolution and exact GELU in one pass, forward and backward."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._device import Launch, check_dtype, empty, is_channels_last, jit_for_all_sizes, lane_first, parameter_gradients
from ._math import gelu, gelu_derivative
from ._stream import (
    add_pixels,
    convolve,
    correlate,
    extend,
    keep,
    load_plane,
    load_row,
    load_weights,
    partial_sums,
    plan,
    plane_place,
    position,
    store_row,
    store_sums,
    zeros,
)
from ._sums import sum_partials
from ._tiles import load, multiple


@jit_for_all_sizes("batch")
def depthwise_gelu_kernel(
    x, y, weight, bias, partials, x_lane, y_lane, batch, channels, height, width, strips, rows, segments, halo,
    x_image, x_outer, x_row, y_image, y_outer, y_row,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y = gelu(convolution of x); its sums over the pixels of each strip into `partials` (unless None)."""
    R: tl.constexpr = K // 2
    image, strip, channel, segment, start, halo = position(channels, strips, segments, halo, P, L, V)
    width = multiple(width, ALIGN)
    alive = image < batch
    first = strip * rows
    last = tl.minimum(first + rows, height)
    x_strides = (x_lane, x_image, x_outer, x_row)
    y_strides = (y_lane, y_image, y_outer, y_row)
    x_plane, x_down, x_step = plane_place(x_strides, image, channel, ALIGN, CHANNELS_LAST)
    y_plane, y_down, y_step = plane_place(y_strides, image, channel, ALIGN, CHANNELS_LAST)
    x += x_plane
    y += y_plane
    weights = load_weights(weight, channel, alive, K * K)
    offset = load(bias + channel, alive) + tl.zeros((P, L), tl.float32)
    sums = zeros((K - 1) * V, P, L)
    total = tl.zeros((P, L), tl.float32)
    for step in range(0, rows + 2 * R):
        i = first - R + step
        exists = alive & (i >= 0) & (i < height)
        row = load_row(x + i * x_down, x_step, exists, start, width, P, L, V, CHANNELS_LAST)
        z, sums = convolve(sums, extend(row, R, V, P, L), weights, offset, K, V, False)
        activated = ()
        for q in tl.static_range(V):
            activated = activated + (gelu(z[q]),)
        o = i - R
        exists = alive & (o >= first) & (o < last)
        store_row(y + o * y_down, y_step, activated, exists, start, width, halo, P, L, V, CHANNELS_LAST)
        if partials is not None:
            total = add_pixels(total, activated, exists, start, width, halo, L, V)
    if partials is not None:
        store_sums(partials, total, image, strip, channel, segment, alive, channels, strips, segments)


# Long: the rows that a step hands to the next stay in registers, so that a step is one loop.
@jit_for_all_sizes("batch")
def depthwise_gelu_backward_kernel(
    grad, grad_sums, x, out, weight, bias, partials, grad_lane, x_lane, out_lane,
    batch, channels, height, width, strips, rows, segments, halo,
    grad_image, grad_outer, grad_row, x_image, x_outer, x_row, out_image, out_outer, out_row,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The gradient of x into `out` and, of each strip, those of its channel's weight and bias into `partials`.

    At a step x row i arrives; then row r = i - R of the convolution can be recomputed, with it the gradient there, and
    row r - R of the gradient of x. Of `out` and `partials` one may be None, and so may be `grad_sums`, a part of the
    gradient of every pixel of a plane.
    """
    R: tl.constexpr = K // 2
    image, strip, channel, segment, start, halo = position(channels, strips, segments, halo, P, L, V)
    width = multiple(width, ALIGN)
    alive = image < batch
    first = strip * rows
    last = tl.minimum(first + rows, height)
    place = V * tl.arange(0, L)[None, :]
    interior = (place >= halo) & (place < L * V - halo)
    grad_strides = (grad_lane, grad_image, grad_outer, grad_row)
    x_strides = (x_lane, x_image, x_outer, x_row)
    grad_plane, grad_down, grad_step = plane_place(grad_strides, image, channel, ALIGN, CHANNELS_LAST)
    x_plane, x_down, x_step = plane_place(x_strides, image, channel, ALIGN, CHANNELS_LAST)
    grad += grad_plane
    x += x_plane
    if out is not None:
        out_strides = (out_lane, out_image, out_outer, out_row)
        out_plane, out_down, out_step = plane_place(out_strides, image, channel, ALIGN, CHANNELS_LAST)
        out += out_plane
    weights = load_weights(weight, channel, alive, K * K)
    offset = load(bias + channel, alive) + tl.zeros((P, L), tl.float32)
    nothing = tl.zeros((P, L), tl.float32)
    of_sums = load_plane(grad_sums, image, channel, alive, channels, P)
    sums = zeros((K - 1) * V, P, L)
    transposed = zeros((K - 1) * V, P, L)
    if partials is not None:
        held = zeros((K - 1) * V, P, L)
        weight_grads = zeros(K * K, P, L)
        bias_grad = nothing
    for step in range(0, rows + 4 * R):
        i = first - 2 * R + step
        exists = alive & (i >= 0) & (i < height)
        row = load_row(x + i * x_down, x_step, exists, start, width, P, L, V, CHANNELS_LAST)
        z, sums = convolve(sums, extend(row, R, V, P, L), weights, offset, K, V, False)
        r = i - R
        exists = alive & (r >= tl.maximum(first - R, 0)) & (r < height)
        g = load_row(grad + r * grad_down, grad_step, exists, start, width, P, L, V, CHANNELS_LAST)
        inner = ()
        for q in tl.static_range(V):
            inside = exists & (start + place + q >= 0) & (start + place + q < width)
            inner = inner + (tl.where(inside, (g[q] + of_sums) * gelu_derivative(z[q]), 0.0),)
        around = extend(inner, R, V, P, L)
        if partials is not None:
            held = held + keep(row, interior & (i >= first) & (i < last), V)
            added = ()
            for u in tl.static_range(K):
                added = added + correlate(weight_grads[u * K : (u + 1) * K], held[u * V : (u + 1) * V], around, K, V)
            weight_grads = added
            held = held[V:]
            for q in tl.static_range(V):
                bias_grad += tl.where(interior & (r >= first) & (r < last), inner[q], 0.0)
        if out is not None:
            done, transposed = convolve(transposed, around, weights, nothing, K, V, True)
            o = r - R
            exists = alive & (o >= first) & (o < last)
            store_row(out + o * out_down, out_step, done, exists, start, width, halo, P, L, V, CHANNELS_LAST)
    if partials is not None:
        part = (segment * batch + image) * strips + strip
        partials += (part * channels + channel) * (K * K + 1)
        for t in tl.static_range(K * K):
            tl.store(partials + t, tl.sum(weight_grads[t], 1, keep_dims=True), mask=alive)
        tl.store(partials + K * K, tl.sum(bias_grad, 1, keep_dims=True), mask=alive)


def _check(x: Tensor, weight: Tensor) -> int:
    """Columns a lane: 16 bytes where they are contiguous."""
    check_dtype("x", x)
    if weight.shape[-2:] != (3, 3):
        raise ValueError(f"weight must be 3 x 3 for the Triton kernels, got shape {tuple(weight.shape)}")
    return 4 if is_channels_last(x) else 16 // x.element_size()


def prepare(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Launch, int]:
    """Of `depthwise_gelu_kernel`, and the parts of a plane's sum."""
    cut = plan(x, [x, y], _check(x, weight), halo=1)
    last = is_channels_last(x)
    (x_lane, *x_strides), (y_lane, *y_strides) = lane_first(x, last), lane_first(y, last)
    numbers = (x_lane, y_lane, *x.shape, *cut.numbers, *x_strides, *y_strides)
    return Launch(depthwise_gelu_kernel, (cut.programs,), numbers, {"K": 3, **cut.constants}), cut.parts_a_plane


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor, need_sums: bool) -> tuple[Tensor, Tensor]:
    """`gelu(conv2d(x, weight, bias, padding=1, groups=C))`: `reference.depthwise_gelu`; and its sums over the pixels.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes; arithmetic is fp32. A
    channels_last `x` gives a channels_last result, any other a contiguous one. The sums are (B, C) in fp32, empty
    unless needed.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `weight` is not 3 x 3.
    """
    y = empty(x, *x.shape)
    launch, parts = prepare(x, y, weight)
    partials = partial_sums(x, parts, need_sums)
    if x.numel():
        with torch.cuda.device_of(x):
            launch(x, y, weight.contiguous(), bias.contiguous(), partials)
    return y, x.new_empty(0, dtype=torch.float32) if partials is None else partials.sum(2)


def depthwise_gelu_backward(
    grad: Tensor,
    grad_sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `depthwise_gelu` by x, weight, bias; those not needed are empty. Deterministic.

    The convolution is recomputed. `grad` may have any strides; the gradient of x has the layout that `depthwise_gelu`
    gives its result.
    """
    vector = _check(x, weight)
    out = empty(x, *x.shape) if need_x else None
    grads = parameter_gradients(x, (weight, bias), need_parameters)
    if x.numel() and (need_x or need_parameters):
        tensors = [grad, x] if out is None else [grad, x, out]
        cut = plan(x, tensors, vector, halo=2)
        partials = None
        if need_parameters:
            partials = torch.empty((cut.parts, len(bias), 10), dtype=torch.float32, device=x.device)
        last = is_channels_last(x)
        grad_lane, *grad_strides = lane_first(grad, last)
        x_lane, *x_strides = lane_first(x, last)
        out_lane, *out_strides = lane_first(out, last)
        with torch.cuda.device_of(x):
            depthwise_gelu_backward_kernel[(cut.programs,)](
                grad, None if grad_sums is None else grad_sums.contiguous(), x, out, weight.contiguous(),
                bias.contiguous(), partials, grad_lane, x_lane, out_lane, *x.shape, *cut.numbers,
                *grad_strides, *x_strides, *out_strides, K=3, **cut.constants,
            )  # fmt: skip
            if partials is not None:
                sum_partials(partials, *grads)
    return x.new_empty(0) if out is None else out, *grads
