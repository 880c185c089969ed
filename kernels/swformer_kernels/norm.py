"""Mean and variance of each channel: a program takes tiles of a plane, a second kernel merges the programs' moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check_dtype

_TILE = 4096
# Tiles that a program takes, so that the second kernel has few moments to put together.
_TILES_A_PROGRAM = 8


@triton.jit
def statistics_kernel(x, partials, size, tiles, tiles_a_program, parts, N: tl.constexpr):
    """Mean and sum of squared differences from it, of some tiles of a plane, into `partials` (2, B * parts, C)."""
    batch, channels, pixels = size
    part = tl.program_id(0) % parts
    plane = (tl.program_id(0) // parts).to(tl.int64)
    image = plane // channels
    channel = plane % channels
    first = part * tiles_a_program
    seen = tl.zeros((), tl.float32)
    mean = tl.zeros((), tl.float32)
    squares = tl.zeros((), tl.float32)
    for tile in range(first, tl.minimum(first + tiles_a_program, tiles)):
        pixel = tile * N + tl.arange(0, N)
        mask = pixel < pixels
        values = tl.load(x + plane * pixels + pixel, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(N, pixels - tile * N) + tl.zeros((), tl.float32)
        own = tl.sum(values, 0) / count
        off = tl.where(mask, values - own, 0.0)
        # Differences from the rounded mean have a mean of their own.
        rest = tl.sum(off, 0) / count
        own += rest
        squares += tl.sum(off * off, 0) - rest * rest * count
        delta = own - mean
        share = count / (seen + count)
        mean += delta * share
        squares += delta * delta * share * seen
        seen += count
    row = (image * parts + part) * channels + channel
    tl.store(partials + row, mean)
    tl.store(partials + batch.to(tl.int64) * parts * channels + row, squares)


@triton.jit
def merge_statistics_kernel(
    partials, statistics, means, size, tiles_a_program, parts, N: tl.constexpr, BC: tl.constexpr
):
    """The moments of all programs, in order and in fp64."""
    batch, channels, pixels = size
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = channel < channels
    mean = tl.zeros((BC,), tl.float64)
    squares = tl.zeros((BC,), tl.float64)
    seen = tl.zeros((), tl.float64)
    for row in range(batch * parts):
        first = row % parts * tiles_a_program * N
        count = tl.zeros((), tl.float64) + tl.minimum(tiles_a_program * N, pixels - first)
        pointers = partials + row * channels.to(tl.int64) + channel
        delta = tl.load(pointers, mask=mask, other=0.0).to(tl.float64) - mean
        own = tl.load(pointers + batch.to(tl.int64) * parts * channels, mask=mask, other=0.0).to(tl.float64)
        share = count / (seen + count)
        mean += delta * share
        squares += own + delta * delta * share * seen
        seen += count
    tl.store(means + channel, mean, mask=mask)
    tl.store(statistics + channel, mean.to(tl.float32), mask=mask)
    tl.store(statistics + channels + channel, (squares / seen).to(tl.float32), mask=mask)


@triton.jit
def statistics_backward_kernel(grad, means, x, out, size, tiles, N: tl.constexpr):
    """out = grad[0] / n + (x - mean) * 2 grad[1] / n, n values in a channel."""
    batch, channels, pixels = size
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    channel = plane % channels
    pixel = tl.program_id(0) % tiles * N + tl.arange(0, N)
    mask = pixel < pixels
    count = batch.to(tl.float32) * pixels
    mean = tl.load(means + channel)
    center = mean.to(tl.float32)
    slope = 2 * tl.load(grad + channels + channel).to(tl.float32) / count
    offset = tl.load(grad + channel).to(tl.float32) / count - slope * (mean - center.to(tl.float64)).to(tl.float32)
    values = tl.load(x + plane * pixels + pixel, mask=mask, other=0.0).to(tl.float32)
    result = (values - center) * slope + offset
    tl.store(out + plane * pixels + pixel, result.to(out.dtype.element_ty), mask=mask)


def _size(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _tile(pixels: int) -> int:
    return min(_TILE, triton.next_power_of_2(pixels))


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launcher of `swformer_fast.reference.channel_statistics`."""
    check_dtype("x", x)
    x = x.contiguous()
    size = batch, channels, pixels = _size(x)
    statistics = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    means = torch.empty(channels, dtype=torch.float64, device=x.device)
    if batch == 0:
        return statistics.fill_(float("nan")), means.fill_(float("nan"))
    n = _tile(pixels)
    tiles = triton.cdiv(pixels, n)
    parts = triton.cdiv(tiles, _TILES_A_PROGRAM)
    partials = torch.empty(2, batch * parts, channels, dtype=torch.float32, device=x.device)
    statistics_kernel[(batch * channels * parts,)](x, partials, size, tiles, _TILES_A_PROGRAM, parts, N=n, num_warps=8)
    block = 32
    merge_statistics_kernel[(triton.cdiv(channels, block),)](
        partials, statistics, means, size, _TILES_A_PROGRAM, parts, N=n, BC=block
    )
    return statistics, means


def channel_statistics_backward(grad: Tensor, mean: Tensor, x: Tensor, need_x: bool) -> Tensor:
    """The gradient of x from that of the statistics."""
    check_dtype("x", x)
    if not need_x:
        return x.new_empty(0)
    x = x.contiguous()
    size = batch, channels, pixels = _size(x)
    out = torch.empty_like(x)
    n = _tile(pixels)
    tiles = triton.cdiv(pixels, n)
    if out.numel():
        statistics_backward_kernel[(batch * channels * tiles,)](
            grad.contiguous(), mean, x, out, size, tiles, N=n, num_warps=8
        )
    return out
