"""Channel attention, forward and backward: a pass that sums, a program for each image's network, a pass that scales.

Images are taken as (B, C, H * W), a program takes a tile of channels and pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    alignment,
    cdiv,
    check_dtype,
    empty,
    is_channels_last,
    jit_for_all_sizes,
    matrix_options,
    next_power_of_2,
    parameter_gradients,
    planes,
    warp_size,
)
from ._tiles import load, load_matrix, map_pointers, multiple, store, store_matrix

_TILE = 2048
_FEW_PIXELS = 256  # of smaller images a program takes several channels
_TILE_OF_HALVES = 1024  # with twice as many LLVM's vectoriser fails on the sums of products
_CHANNELS_OF_CHANNELS_LAST = 64
# Tiles that a program adds up before the second stage.
_TILES_A_PARTIAL = 8
# Partial sums, and elements of a weight, that a program of the small network takes at once.
_PARTS = 32
_WEIGHTS = 2048


@triton.jit
def _exists(channel, channels, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Which channels exist: where they are neighbours, so that the compiler sees how many exist together."""
    if CHANNELS_LAST:
        channels = multiple(channels, ALIGN)
    return channel < channels


@jit_for_all_sizes("batch")
def attention_sums_kernel(
    x, grad, partials, batch, channels, pixels, x_image, x_outer, grad_image, grad_outer,
    tiles, tiles_a_program, parts,
    BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Sums, over some tiles, of `x` and, unless `grad` is None, of x * grad, into `partials` (1 or 2, B, parts, C)."""
    strides, grad_strides = (x_image, x_outer), (grad_image, grad_outer)
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % blocks
    image = (tl.program_id(0) // parts // blocks).to(tl.int64)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = _exists(channel, channels, ALIGN, CHANNELS_LAST)
    sums = tl.zeros((BLOCK_C, N), tl.float32)
    products = sums
    first = part * tiles_a_program
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        pixel = tile * N + tl.arange(0, N)
        pointers, mask = map_pointers(x, strides, image, channel, exists, pixel, pixels, ALIGN, CHANNELS_LAST)
        values = load(pointers, mask)
        sums += values
        if grad is not None:
            pointers, mask = map_pointers(
                grad, grad_strides, image, channel, exists, pixel, pixels, ALIGN, CHANNELS_LAST
            )
            products += values * load(pointers, mask)
    row = (image * parts + part) * channels
    tl.store(partials + row + channel, tl.sum(sums, 1), mask=channel < channels)
    if grad is not None:
        row += (batch * parts).to(tl.int64) * channels
        tl.store(partials + row + channel, tl.sum(products, 1), mask=channel < channels)


@triton.jit
def _sum_parts(partials, row, parts, channel, channels, PARTS: tl.constexpr):
    """Sums over the rows row * parts ... of partials (..., channels)."""
    part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros((PARTS, channel.shape[0]), tl.float32)
    for start in range(0, parts, PARTS):
        pointers = partials + (row * parts + start + part) * channels + channel[None, :]
        mask = (start + part < parts) & (channel < channels)[None, :]
        total += tl.load(pointers, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _first_layer(
    partials, w1, b1, image, channels, pixels, hidden, parts,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """w1 @ mean + b1, before the ReLU."""
    r = tl.arange(0, BLOCK_R)
    total = load(b1 + r, mask=r < hidden)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mean = _sum_parts(partials, image, parts, c, channels, PARTS) / pixels
        total += tl.sum(load_matrix(w1, r, r < hidden, c, channels, channels) * mean[None, :], 1)
    return total


@triton.jit
def second_layer(active, w2, b2, c, channels, hidden, BLOCK_R: tl.constexpr):
    """sigmoid(w2 @ active + b2) of some channels, and their rows of w2."""
    weight = load_matrix(w2, c, c < channels, tl.arange(0, BLOCK_R), hidden, hidden)
    bias = load(b2 + c, mask=c < channels)
    return tl.sigmoid(tl.sum(weight * active[None, :], 1) + bias), weight


@jit_for_all_sizes("channels")
def attention_network_kernel(
    partials, w1, b1, w2, b2, scale, channels, pixels, hidden, parts,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The attention of image `program_id`."""
    image = tl.program_id(0).to(tl.int64)
    before = _first_layer(partials, w1, b1, image, channels, pixels, hidden, parts, BLOCK_C, BLOCK_R, PARTS)
    active = tl.where(before < 0, 0.0, before)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        values, _ = second_layer(active, w2, b2, c, channels, hidden, BLOCK_R)
        tl.store(scale + image * channels + c, values, mask=c < channels)


@jit_for_all_sizes("batch")
def attention_network_backward_kernel(
    partials, w1, b1, w2, b2, scale, shift, mean, grad_logits, hiddens, grad_hiddens,
    batch, channels, pixels, hidden, parts,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of image `program_id` the attention, what the gradient of x receives through the mean, and the factors of the
    weights' gradients: the mean, the hidden layer, and the gradients of both layers before their non-linearities.
    """
    image = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    before = _first_layer(partials, w1, b1, image, channels, pixels, hidden, parts, BLOCK_C, BLOCK_R, PARTS)
    active = tl.where(before < 0, 0.0, before)
    grad_hidden = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        row = image * channels + c
        values, weight = second_layer(active, w2, b2, c, channels, hidden, BLOCK_R)
        grad_logit = _sum_parts(partials, batch + image, parts, c, channels, PARTS) * values * (1.0 - values)
        grad_hidden += tl.sum(weight * grad_logit[:, None], 0)
        tl.store(scale + row, values, mask=c < channels)
        tl.store(grad_logits + row, grad_logit, mask=c < channels)
        tl.store(mean + row, _sum_parts(partials, image, parts, c, channels, PARTS) / pixels, mask=c < channels)
    grad_hidden = tl.where(before <= 0, 0.0, grad_hidden)
    tl.store(hiddens + image * hidden + r, active, mask=r < hidden)
    tl.store(grad_hiddens + image * hidden + r, grad_hidden, mask=r < hidden)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        through = tl.sum(load_matrix(w1, r, r < hidden, c, channels, channels) * grad_hidden[:, None], 0)
        tl.store(shift + image * channels + c, through / pixels, mask=c < channels)


@jit_for_all_sizes("batch")
def attention_parameters_kernel(
    mean, grad_logits, hiddens, grad_hiddens, grad_w1, grad_b1, grad_w2, grad_b2, batch, channels, hidden,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients: sums over the images, in order, of the products of a block."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_w1 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    of_w2 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    of_b1 = tl.zeros((BLOCK_R,), tl.float32)
    of_b2 = tl.zeros((BLOCK_C,), tl.float32)
    for image in range(0, batch):
        averages = tl.load(mean + image * channels + c, mask=c < channels, other=0.0)
        logits = tl.load(grad_logits + image * channels + c, mask=c < channels, other=0.0)
        active = tl.load(hiddens + image * hidden + r, mask=r < hidden, other=0.0)
        inner = tl.load(grad_hiddens + image * hidden + r, mask=r < hidden, other=0.0)
        of_w1 += inner[:, None] * averages[None, :]
        of_w2 += logits[:, None] * active[None, :]
        of_b1 += inner
        of_b2 += logits
    store_matrix(grad_w1, of_w1, r, r < hidden, c, channels, channels)
    store_matrix(grad_w2, of_w2, c, c < channels, r, hidden, hidden)
    store(grad_b1 + r, of_b1, r < tl.where(tl.program_id(0) == 0, hidden, 0))
    store(grad_b2 + c, of_b2, c < tl.where(tl.program_id(1) == 0, channels, 0))


@jit_for_all_sizes("channels")
def attention_apply_kernel(
    x, scale, shift, out, channels, pixels, x_image, x_outer, out_image, out_outer, tiles,
    BLOCK_C: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """out = scale * x, plus `shift` unless it is None; both are (B, C)."""
    strides, out_strides = (x_image, x_outer), (out_image, out_outer)
    blocks = tl.cdiv(channels, BLOCK_C)
    pixel = tl.program_id(0) % tiles * N + tl.arange(0, N)
    channel = tl.program_id(0) // tiles % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = _exists(channel, channels, ALIGN, CHANNELS_LAST)
    image = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    pointers, mask = map_pointers(x, strides, image, channel, exists, pixel, pixels, ALIGN, CHANNELS_LAST)
    row = image * channels + channel
    factor = tl.load(scale + row, mask=channel < channels, other=0.0)
    values = factor[:, None] * load(pointers, mask)
    if shift is not None:
        values += tl.load(shift + row, mask=channel < channels, other=0.0)[:, None]
    pointers, mask = map_pointers(out, out_strides, image, channel, exists, pixel, pixels, ALIGN, CHANNELS_LAST)
    store(pointers, values, mask)


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """`t` as (B, C, H * W), neighbours in the dimension in which they are in the outputs for `x`; copied if need be."""
    if is_channels_last(x):
        return t.contiguous(memory_format=torch.channels_last).flatten(2)
    return planes(t)


def _tile(x: Tensor, tensors: list[Tensor]) -> dict[str, Any]:
    """Constants of the kernels that go over the pixels; the tensors are (B, C, H * W)."""
    _, channels, pixels = tensors[0].shape
    channels_last, tile = is_channels_last(x), _TILE if x.element_size() == 4 else _TILE_OF_HALVES
    if channels_last:
        block = min(_CHANNELS_OF_CHANNELS_LAST, next_power_of_2(channels))
        columns, align = tile // block, alignment(channels, 1, tensors)
    else:
        columns = tile if pixels > _FEW_PIXELS else min(tile, _FEW_PIXELS)
        block, align = min(tile // columns, next_power_of_2(channels)), alignment(pixels, 2, tensors)
    return {
        "BLOCK_C": block,
        "N": columns,
        "ALIGN": align,
        "CHANNELS_LAST": channels_last,
        "num_warps": 128 // warp_size(x.device),
        "enable_fp_fusion": True,
    }


def _strides(x: Tensor, channels_last: bool) -> tuple[int, int]:
    """As `map_pointers` takes them."""
    image, channel, pixel = x.stride()
    return image, pixel if channels_last else channel


def _sum(x: Tensor, flat: list[Tensor]) -> Tensor:
    """Partial sums over the pixels of x, and of its products with the gradient if there is one."""
    (batch, channels, pixels), tile = flat[0].shape, _tile(x, flat)
    tiles = cdiv(pixels, tile["N"])
    parts = cdiv(tiles, _TILES_A_PARTIAL)
    partials = torch.empty((len(flat), batch, parts, channels), dtype=torch.float32, device=x.device)
    strides = [_strides(t, tile["CHANNELS_LAST"]) for t in flat]
    attention_sums_kernel[(batch * cdiv(channels, tile["BLOCK_C"]) * parts,)](
        flat[0], flat[1] if len(flat) > 1 else None, partials, batch, channels, pixels, *strides[0], *strides[-1],
        tiles, _TILES_A_PARTIAL, parts, **tile,
    )  # fmt: skip
    return partials


def _apply(x: Tensor, flat: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
    (batch, channels, pixels), target = flat.shape, out.flatten(2)
    tile = _tile(x, [flat, target])
    tiles, last = cdiv(pixels, tile["N"]), tile["CHANNELS_LAST"]
    attention_apply_kernel[(batch * cdiv(channels, tile["BLOCK_C"]) * tiles,)](
        flat, scale, shift, target, channels, pixels, *_strides(flat, last), *_strides(target, last), tiles, **tile
    )


def _blocks(x: Tensor, hidden: int) -> dict[str, int]:
    """Constants of the small network's kernels."""
    rows = next_power_of_2(hidden)
    return {
        "BLOCK_C": max(1, min(64, _WEIGHTS // rows, next_power_of_2(x.shape[1]))),
        "BLOCK_R": rows,
        "PARTS": _PARTS,
        **matrix_options(x),
        "num_warps": 4,
    }


def channel_attention(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`reference.channel_attention`: `x` times sigmoid(w2 @ relu(w1 @ mean + b1) + b2).

    `x` is float32, float16 or bfloat16, the parameters of any of these dtypes; arithmetic is fp32. A channels_last `x`
    gives a channels_last result, any other a contiguous one. Images of other strides are copied unless their pixels
    are evenly spaced next to each other.

    Raises:
        TypeError: `x` has another dtype.
    """
    check_dtype("x", x)
    y = empty(x, *x.shape)
    if x.numel():
        flat, hidden = _flat(x, x), len(b1)
        scale = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            partials = _sum(x, [flat])
            attention_network_kernel[(len(x),)](
                partials, *(t.contiguous() for t in (w1, b1, w2, b2)), scale, *flat.shape[1:], hidden,
                partials.shape[2], **_blocks(x, hidden),
            )  # fmt: skip
            _apply(x, flat, scale, None, y)
    return y


def channel_attention_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, need_x: bool, need_parameters: bool
) -> tuple[Tensor, ...]:
    """Gradients of `channel_attention` by x, w1, b1, w2, b2; those not needed are empty. Deterministic.

    The attention is recomputed. `grad` may have any strides; it is copied where its layout is not that of `x`.
    """
    check_dtype("x", x)
    out = empty(x, *x.shape) if need_x else x.new_empty(0)
    parameters = (w1, b1, w2, b2)
    grads = parameter_gradients(x, parameters, need_parameters)
    if x.numel() and (need_x or need_parameters):
        batch, channels, hidden = x.shape[0], x.shape[1], len(b1)
        flat = [_flat(x, x), _flat(grad, x)]
        small = torch.empty((4, batch, channels), dtype=torch.float32, device=x.device)
        hiddens = torch.empty((2, batch, hidden), dtype=torch.float32, device=x.device)
        scale, shift, mean, grad_logits = small
        with torch.cuda.device_of(x):
            partials = _sum(x, flat)
            attention_network_backward_kernel[(batch,)](
                partials, *(t.contiguous() for t in parameters), scale, shift, mean, grad_logits, *hiddens,
                *flat[0].shape, hidden, partials.shape[2], **_blocks(x, hidden),
            )  # fmt: skip
            if need_parameters:
                attention_parameters_kernel[(cdiv(channels, 32), cdiv(hidden, 32))](
                    mean, grad_logits, *hiddens, *grads, batch, channels, hidden,
                    BLOCK_C=32, BLOCK_R=32, enable_fp_fusion=True,
                )  # fmt: skip
            if need_x:
                _apply(x, flat[1], scale, shift, out)
    return (out, *grads)
