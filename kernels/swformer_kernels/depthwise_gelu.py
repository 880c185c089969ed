"""Depthwise convolution and exact GELU in one pass, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import check_dtype, empty, is_channels_last, parameter_gradients
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
    plane_offset,
    position,
    store_row,
    store_sums,
    zeros,
)
from ._sums import sum_weights
from ._tiles import load, multiple


@triton.jit
def depthwise_gelu_kernel(
    x, x_strides, y, y_strides, weight, bias, partials, size, numbers,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr, HALO: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y = gelu(convolution of x); its sums over the pixels of each strip into `partials` (unless None)."""
    R: tl.constexpr = K // 2
    image, strip, channel, segment, start = position(size, numbers, P, L, V, HALO)
    batch, channels, height, width = size
    width = multiple(width, ALIGN)
    alive = image < batch
    first = strip * numbers[1]
    last = tl.minimum(first + numbers[1], height)
    x += plane_offset(x_strides, image, channel, ALIGN)
    y += plane_offset(y_strides, image, channel, ALIGN)
    weights = load_weights(weight, channel, alive, K * K)
    offset = load(bias + channel, alive) + tl.zeros((P, L), tl.float32)
    sums = zeros((K - 1) * V, P, L)
    total = tl.zeros((P, L), tl.float32)
    for step in range(0, numbers[1] + 2 * R):
        i = first - R + step
        exists = alive & (i >= 0) & (i < height)
        row = load_row(
            x + i * multiple(x_strides[2], ALIGN), x_strides[3], exists, start, width, P, L, V, CHANNELS_LAST
        )
        z, sums = convolve(sums, extend(row, R, V, P, L), weights, offset, K, V, False)
        activated = ()
        for q in tl.static_range(V):
            activated = activated + (gelu(z[q]),)
        o = i - R
        exists = alive & (o >= first) & (o < last)
        store_row(
            y + o * multiple(y_strides[2], ALIGN), y_strides[3], activated, exists, start, width,
            P, L, V, HALO, CHANNELS_LAST,
        )  # fmt: skip
        if partials is not None:
            total = add_pixels(total, activated, exists, start, width, L, V, HALO)
    if partials is not None:
        store_sums(partials, total, image, strip, channel, segment, alive, channels, numbers)


@triton.jit
def depthwise_gelu_backward_kernel(
    grad, grad_strides, grad_sums, x, x_strides, out, out_strides, weight, bias, partials, size, numbers,
    K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr, HALO: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The gradient of x into `out` and, of each strip, those of its channel's weight and bias into `partials`.

    At a step x row i arrives; then row r = i - R of the convolution can be recomputed, with it the gradient there, and
    row r - R of the gradient of x. Of `out` and `partials` one may be None, and so may be `grad_sums`, a part of the
    gradient of every pixel of a plane.
    """
    R: tl.constexpr = K // 2
    image, strip, channel, segment, start = position(size, numbers, P, L, V, HALO)
    batch, channels, height, width = size
    width = multiple(width, ALIGN)
    alive = image < batch
    first = strip * numbers[1]
    last = tl.minimum(first + numbers[1], height)
    place = V * tl.arange(0, L)[None, :]
    interior = (place >= HALO) & (place < L * V - HALO)
    grad += plane_offset(grad_strides, image, channel, ALIGN)
    x += plane_offset(x_strides, image, channel, ALIGN)
    if out is not None:
        out += plane_offset(out_strides, image, channel, ALIGN)
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
    for step in range(0, numbers[1] + 4 * R):
        i = first - 2 * R + step
        exists = alive & (i >= 0) & (i < height)
        row = load_row(
            x + i * multiple(x_strides[2], ALIGN), x_strides[3], exists, start, width, P, L, V, CHANNELS_LAST
        )
        z, sums = convolve(sums, extend(row, R, V, P, L), weights, offset, K, V, False)
        r = i - R
        exists = alive & (r >= tl.maximum(first - R, 0)) & (r < height)
        g = load_row(
            grad + r * multiple(grad_strides[2], ALIGN), grad_strides[3], exists, start, width, P, L, V, CHANNELS_LAST
        )
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
            store_row(
                out + o * multiple(out_strides[2], ALIGN), out_strides[3], done, alive & (o >= first) & (o < last),
                start, width, P, L, V, HALO, CHANNELS_LAST,
            )  # fmt: skip
    if partials is not None:
        part = (segment * batch + image) * numbers[0] + strip
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


def with_parts(x: Tensor, parameters: tuple[Tensor, ...], need_sums: bool) -> tuple[Tensor, Tensor | None]:
    """`depthwise_gelu` with its sums in parts, (B, C, parts), if they are needed."""
    weight, bias = parameters
    vector = _check(x, weight)
    y = empty(x, *x.shape)
    cut = plan(x, [x, y], vector, halo=1)
    partials = partial_sums(x, cut, need_sums)
    if x.numel():
        with torch.cuda.device_of(x):
            depthwise_gelu_kernel[(cut.programs,)](
                x, x.stride(), y, y.stride(), weight.contiguous(), bias.contiguous(), partials, tuple(x.shape),
                cut.numbers, K=3, **cut.constants,
            )  # fmt: skip
    return y, partials


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor, need_sums: bool) -> tuple[Tensor, Tensor]:
    """`gelu(conv2d(x, weight, bias, padding=1, groups=C))`: `reference.depthwise_gelu`; and its sums over the pixels.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes; arithmetic is fp32. A
    channels_last `x` gives a channels_last result, any other a contiguous one. The sums are (B, C) in fp32, empty
    unless needed.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: `weight` is not 3 x 3.
    """
    y, partials = with_parts(x, (weight, bias), need_sums)
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
        with torch.cuda.device_of(x):
            depthwise_gelu_backward_kernel[(cut.programs,)](
                grad, grad.stride(), None if grad_sums is None else grad_sums.contiguous(), x, x.stride(),
                out, () if out is None else out.stride(), weight.contiguous(), bias.contiguous(), partials,
                tuple(x.shape), cut.numbers, K=3, **cut.constants,
            )  # fmt: skip
            if partials is not None:
                sum_weights(partials, *grads)
    return x.new_empty(0) if out is None else out, *grads
