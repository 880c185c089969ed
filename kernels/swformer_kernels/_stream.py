"""Depthwise convolution of image rows that stream through registers.

A program walks down P strips (some rows of one plane each) side by side. A row segment of L * V columns is a tuple of V
tensors (P, L): lane l holds columns l * V .. l * V + V - 1. So a row is read in accesses of V elements, most neighbours
of a column are other tensors of the tuple, and only those of a lane's ends come from another lane. A convolution adds
each arriving row to the K rows of output that it reaches, so that a row is read once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import alignment, cdiv, is_channels_last, next_power_of_2, warp_size
from ._tiles import load, multiple, split_index


class Plan(NamedTuple):
    """How an image is cut into programs, and the arguments of a streaming kernel that say so."""

    programs: int
    parts: int
    """Segments and strips of all planes of one channel: the partial sums of its gradients."""
    numbers: tuple[int, int, int, int]
    """Strips of a plane, rows of a strip, segments of a row, columns of a segment's halo."""
    constants: dict[str, Any]

    @property
    def parts_a_plane(self) -> int:
        """Strips and segments."""
        return self.numbers[0] * self.numbers[2]


# The longest strips that still make so many programs are taken: four for each multiprocessor of a large GPU.
_STRIP_ROWS = (64, 32, 16)
_ENOUGH_PROGRAMS = 512
_LANES = 128
# A segment stays within a warp, so that a shift by a lane is a shuffle.
_MIN_LANES, _MAX_LANES = 16, 32
# Each power of two is another variant, so narrow maps take segments as wide as others do where a large GPU has lanes to
# spare: columns, and threads, two for each of its lanes.
_WIDE, _IDLE_THREADS = 128, 2**15
# Fewer, so that several channels side by side fill what one access fetches.
_LANES_OF_CHANNELS_LAST = 16


def plan(
    x: Tensor,
    tensors: list[Tensor],
    vector: int,
    halo: int,
    unit: int = 1,
    reach: int = 1,
    bands: int = 1,
    threads: int = 128,
) -> Plan:
    """Cut `x` for a kernel that reads `vector` columns a lane and needs `halo` columns beyond a lane's own.

    It streams `unit` image rows a step, which meet rows up to `reach` steps away, and gives each strip `bands` rows of
    lanes. The tensors that it reads or writes decide how wide the accesses can be. With fewer `threads` than rows of
    lanes a thread holds several rows.
    """
    batch, channels, height, width = x.shape
    channels_last = is_channels_last(x)
    fitting = max(_MIN_LANES, min(_MAX_LANES, next_power_of_2(cdiv(width, vector))))
    wide = max(fitting, min(_MAX_LANES, _WIDE // vector))
    whole_halo, steps = cdiv(halo, vector) * vector, cdiv(height, unit)
    for lanes in (_LANES_OF_CHANNELS_LAST,) if channels_last else (wide, fitting):
        halo = whole_halo if width > lanes * vector else 0
        segments = cdiv(width, lanes * vector - 2 * halo)
        side_by_side = _LANES // (bands * lanes)
        for rows in _STRIP_ROWS:
            strips = cdiv(steps, rows * reach)
            programs = cdiv(batch * strips * channels, side_by_side) * segments
            if programs >= _ENOUGH_PROGRAMS:
                break
        if programs * threads < _IDLE_THREADS:
            break
    return Plan(
        programs,
        segments * batch * strips,
        (strips, min(steps, rows * reach), segments, halo),
        {
            "P": side_by_side,
            "L": lanes,
            "V": vector,
            "ALIGN": 1 if channels_last else alignment(width, 3, tensors),
            "CHANNELS_LAST": channels_last,
            "num_warps": threads // warp_size(x.device),
            "enable_fp_fusion": True,
        },
    )


def partial_sums(x: Tensor, parts: int, needed: bool) -> Tensor | None:
    """What `store_sums` writes to, (B, C, parts of a plane)."""
    return torch.empty((*x.shape[:2], parts), dtype=torch.float32, device=x.device) if needed else None


@triton.jit
def position(channels, strips, segments, halo, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr):
    """Image, strip and channel of each strip of this program, (P, 1); its segment's number, first column and halo."""
    halo = multiple(halo, V)
    program = tl.program_id(0)
    segment = program % segments
    image, strip, channel = split_index((program // segments).to(tl.int64) * P, P, strips, channels)
    return image, strip, channel, segment, segment * (L * V - 2 * halo) - halo, halo


@triton.jit
def plane_place(strides, image, channel, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offset of each strip's plane, (P, 1), and the steps from its rows and columns to the next."""
    lane, of_image, outer, of_row = strides
    start = image * multiple(of_image, ALIGN)
    if CHANNELS_LAST:
        return start + channel * lane, of_row, outer
    else:
        return start + channel * multiple(outer, ALIGN), multiple(of_row, ALIGN), lane


@triton.jit
def unpack(row, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr):
    """The tuple of a segment (P, L * V)."""
    if V == 2:
        return tl.split(tl.reshape(row, (P, L, 2)))
    elif V == 4:
        even, odd = tl.split(tl.reshape(row, (P, 2 * L, 2)))
        e0, e1 = tl.split(tl.reshape(even, (P, L, 2)))
        o0, o1 = tl.split(tl.reshape(odd, (P, L, 2)))
        return e0, o0, e1, o1
    else:
        tl.static_assert(V == 8)
        even, odd = tl.split(tl.reshape(row, (P, 4 * L, 2)))
        e0, o0, e1, o1 = unpack(even, P, L, 4)
        e2, o2, e3, o3 = unpack(odd, P, L, 4)
        return e0, e2, o0, o2, e1, e3, o1, o3


@triton.jit
def pack(row, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr):
    """The inverse of `unpack`."""
    if V == 2:
        return tl.reshape(tl.join(row[0], row[1]), (P, 2 * L))
    elif V == 4:
        even = tl.reshape(tl.join(row[0], row[2]), (P, 2 * L))
        odd = tl.reshape(tl.join(row[1], row[3]), (P, 2 * L))
        return tl.reshape(tl.join(even, odd), (P, 4 * L))
    else:
        tl.static_assert(V == 8)
        even = pack((row[0], row[2], row[4], row[6]), P, L, 4)
        odd = pack((row[1], row[3], row[5], row[7]), P, L, 4)
        return tl.reshape(tl.join(even, odd), (P, 8 * L))


@triton.jit
def load_row(
    rows, step, exists, start, width, P: tl.constexpr, L: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """The segment from column `start` of the rows at pointers (P, 1), in fp32; zero beyond the image."""
    if CHANNELS_LAST:
        row = ()
        for v in tl.static_range(V):
            column = start + v + V * tl.arange(0, L)[None, :]
            mask = exists & (column >= 0) & (column < width)
            row = row + (load(rows + column.to(tl.int64) * step, mask),)
        return row
    else:
        column = start + tl.arange(0, L * V)[None, :]
        mask = exists & (column >= 0) & (column < width)
        segment = tl.load(rows + column.to(tl.int64) * step, mask=mask, other=0.0)
        parts = unpack(segment, P, L, V)
        row = ()
        for v in tl.static_range(V):
            row = row + (parts[v].to(tl.float32),)
        return row


@triton.jit
def store_row(
    rows, step, row, exists, start, width, halo,
    P: tl.constexpr, L: tl.constexpr, V: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Write the segment from column `start`, less its halo, to the rows at pointers (P, 1)."""
    dtype: tl.constexpr = rows.dtype.element_ty
    if CHANNELS_LAST:
        for v in tl.static_range(V):
            place = v + V * tl.arange(0, L)[None, :]
            mask = exists & (place >= halo) & (place < L * V - halo) & (start + place < width)
            tl.store(rows + (start + place).to(tl.int64) * step, row[v].to(dtype), mask=mask)
    else:
        narrow = ()
        for v in tl.static_range(V):
            narrow = narrow + (row[v].to(dtype),)
        place = tl.arange(0, L * V)[None, :]
        mask = exists & (place >= halo) & (place < L * V - halo) & (start + place < width)
        tl.store(rows + (start + place).to(tl.int64) * step, pack(narrow, P, L, V), mask=mask)


@triton.jit
def add_pixels(total, row, exists, start, width, halo, L: tl.constexpr, V: tl.constexpr):
    """Add what `store_row` writes of a row, before rounding, to `total`, (P, L)."""
    for v in tl.static_range(V):
        place = v + V * tl.arange(0, L)[None, :]
        mask = exists & (place >= halo) & (place < L * V - halo) & (start + place < width)
        total += tl.where(mask, row[v], 0.0)
    return total


@triton.jit
def add_inside(row, value, exists, start, width, L: tl.constexpr, V: tl.constexpr):
    """A row in fp32 plus `value`, (P, 1), within the image, and zero beyond."""
    result = ()
    for v in tl.static_range(V):
        column = start + v + V * tl.arange(0, L)[None, :]
        mask = exists & (column >= 0) & (column < width)
        result = result + (tl.where(mask, row[v].to(tl.float32) + value, 0.0),)
    return result


@triton.jit
def store_sums(partials, total, image, strip, channel, segment, alive, channels, strips, segments):
    """Write each strip's sum of `total` to its place among those of its plane."""
    part = (image * channels + channel) * (strips * segments) + segment * strips + strip
    tl.store(partials + part, tl.sum(total, 1, keep_dims=True), mask=alive)


@triton.jit
def load_plane(values, image, channel, alive, channels, P: tl.constexpr):
    """Each strip's number among those of the planes, (P, 1); zero if `values` is None."""
    if values is None:
        return tl.zeros((P, 1), tl.float32)
    else:
        return load(values + image * channels + channel, alive)


@triton.jit
def shift(value, BY: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """Lane l gets the value of lane l + BY, or 0 if there is none."""
    source = (tl.arange(0, L) + BY)[None, :]
    inside = (source >= 0) & (source < L)
    return tl.where(inside, tl.gather(value, tl.broadcast_to(tl.where(inside, source, 0), (P, L)), 1), 0.0)


@triton.jit
def extend(row, R: tl.constexpr, N: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """A row of N tensors with the R columns on either side of each lane: N + 2 R tensors."""
    left = ()
    right = ()
    for r in tl.static_range(R):
        left = left + (shift(row[(r - R) % N], (r - R) // N, P, L),)
        right = right + (shift(row[r % N], r // N + 1, P, L),)
    return left + row + right


@triton.jit
def load_weights(weight, channel, alive, COUNT: tl.constexpr):
    """The COUNT weights of each strip's channel: a tuple of (P, 1)."""
    weights = ()
    for t in tl.static_range(COUNT):
        weights = weights + (load(weight + channel * COUNT + t, alive),)
    return weights


@triton.jit
def convolve(sums, row, weights, start, K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Add an extended row of N columns to the K output rows that it reaches.

    `sums` holds the K - 1 rows, N tensors each, begun before; the last row begins at `start`. Returns the row that is
    now complete, K // 2 above the row added, and the K - 1 others. TRANSPOSED gives the input gradient of the same.
    """
    reached = ()
    for a in tl.static_range(K):
        for q in tl.static_range(N):
            if a < K - 1:
                total = sums[a * N + q]
            else:
                total = start
            for v in tl.static_range(K):
                if TRANSPOSED:
                    total += weights[a * K + K - 1 - v] * row[q + v]
                else:
                    total += weights[(K - 1 - a) * K + v] * row[q + v]
            reached = reached + (total,)
    return reached[:N], reached[N:]


@triton.jit
def correlate(sums, row, grad, K: tl.constexpr, N: tl.constexpr):
    """Add the products of an input row with an extended gradient row to the K weight gradients that join the two."""
    result = ()
    for v in tl.static_range(K):
        total = sums[v]
        for q in tl.static_range(N):
            total += row[q] * grad[q + K - 1 - v]
        result = result + (total,)
    return result


@triton.jit
def zeros(COUNT: tl.constexpr, P: tl.constexpr, L: tl.constexpr):
    """A tuple of COUNT zero tensors (P, L)."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros((P, L), tl.float32),)
    return result


@triton.jit
def keep(row, condition, N: tl.constexpr):
    """Each tensor of a row where the condition holds, 0 elsewhere."""
    result = ()
    for q in tl.static_range(N):
        result = result + (tl.where(condition, row[q], 0.0),)
    return result
