"""What the families share: layouts, alignment, architectures, the last stage of reductions."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton 3.6 multiplies in plain tf32, for the matrix units of sm_100 and its kin, what it should multiply in "ieee".
_EXACT_ON_BLACKWELL = "ieee" if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else "tf32x3"


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is float32, float16 or bfloat16."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16 for the Triton kernels, got {x.dtype}")


def is_channels_last(x: Tensor) -> bool:
    """Whether outputs for input `x` are channels_last."""
    return x.shape[1] > 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, *size: int) -> Tensor:
    """An uninitialised 4-D tensor: channels_last if `like` is, else contiguous."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def alignment(lanes: int, lane_dim: int, tensors: list[Tensor]) -> int:
    """The largest power of two up to 16 that divides the extent of dimension `lane_dim` and all strides but its own."""
    strides = (s for t in tensors for d, s in enumerate(t.stride()) if d != lane_dim and t.shape[d] > 1)
    return math.gcd(16, lanes, *strides)


def architecture(device: torch.device) -> str:
    """The key of the launchers' tables: "sm_80", "gfx942", ...; "interpreter" for a CPU tensor."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """`n`, which ALIGN divides, in a form that lets the compiler see that."""
    return n // ALIGN * ALIGN


@triton.jit
def split_index(first, ROWS: tl.constexpr, middle, inner):
    """Coordinates (outer, middle, inner) of the flattened indices first .. first + ROWS - 1, as (ROWS, 1) int64.

    Only the first index needs 64-bit divisions.
    """
    line = first // inner
    i = (first - line * inner).to(tl.int32) + tl.arange(0, ROWS)
    m = (line % middle).to(tl.int32) + i // inner
    o = line // middle + m // middle
    return o[:, None], (m % middle)[:, None].to(tl.int64), (i % inner)[:, None].to(tl.int64)


@triton.jit
def sum_taps_kernel(partials, taps, count, BLOCK: tl.constexpr):
    """Row `program_id` of the partials (2 * len(taps), count), summed into element program_id % 2 of its taps."""
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + row * count + start + lanes, mask=start + lanes < count, other=0.0)
    tap = tl.sum(total, 0)
    for i in tl.static_range(len(taps)):
        if row // 2 == i:
            tl.store(taps[i] + row % 2, tap)


def sum_taps(partials: Tensor, *taps: Tensor) -> None:
    """Each of `taps`, two numbers, = the sums of two rows of `partials` (2 * len(taps), n), in a fixed order."""
    rows, count = partials.shape
    sum_taps_kernel[(rows,)](partials, taps, count, BLOCK=min(1024, triton.next_power_of_2(count)))


@triton.jit
def sum_weights_kernel(
    partials, weight, bias, parts, count, TAPS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr
):
    """Sums over the first dimension of the partials (parts, channels, TAPS + 1): TAPS weights and a bias a channel."""
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros((PARTS, COLS), tl.float32)
    for start in range(0, parts, PARTS):
        mask = (start + part < parts) & (column < count)[None, :]
        total += tl.load(partials + (start + part).to(tl.int64) * count + column[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    channel = column // (TAPS + 1)
    tap = column % (TAPS + 1)
    tl.store(weight + channel * TAPS + tap, total, mask=(column < count) & (tap < TAPS))
    tl.store(bias + channel, total, mask=(column < count) & (tap == TAPS))


def sum_weights(partials: Tensor, weight: Tensor, bias: Tensor) -> None:
    """`weight` (channels, 1, k, k) and `bias` = sums of `partials` (parts, channels, k * k + 1), in a fixed order."""
    parts, channels, numbers = partials.shape
    count = channels * numbers
    cols = 64
    sum_weights_kernel[(triton.cdiv(count, cols),)](
        partials, weight, bias, parts, count,
        TAPS=numbers - 1, PARTS=min(32, triton.next_power_of_2(parts)), COLS=cols,
    )  # fmt: skip


@triton.jit
def load_matrix(matrix, row, exists, column, columns, ld):
    """Elements of a row-major matrix with rows of `ld`, (len(row), len(column)), in fp32; zero outside."""
    mask = exists[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row[:, None] * ld + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_block(partials, value, row, exists, column, columns, ld):
    """The inverse of `load_matrix`."""
    mask = exists[:, None] & (column < columns)[None, :]
    tl.store(partials + row[:, None] * ld + column[None, :], value, mask=mask)


@triton.jit
def store_rounded(pointers, value, mask):
    """Store fp64 values in the pointers' dtype. To half precision by way of fp32: the interpreter knows no other."""
    if pointers.dtype.element_ty == tl.float64:
        tl.store(pointers, value, mask=mask)
    else:
        tl.store(pointers, value.to(tl.float32).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials_kernel(partials, outs, sizes, parts, total, count, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Sums over the rows of the partials (parts, total), in fp64 and in a fixed order. Of every `count` of them the
    first sizes[0] go to outs[0], the next sizes[1] to outs[1] and so on.
    """
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.arange(0, PARTS)[:, None]
    sums = tl.zeros((PARTS, COLS), tl.float64)
    for start in range(0, parts, PARTS):
        mask = (start + part < parts) & (column < total)[None, :]
        pointers = partials + (start + part).to(tl.int64) * total + column[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
    value = tl.sum(sums, 0)
    group, place = column // count, column % count
    first = 0
    for i in tl.static_range(len(outs)):
        own = (column < total) & (place >= first) & (place < first + sizes[i])
        store_rounded(outs[i] + group * sizes[i] + place - first, value, own)
        first += sizes[i]


def sum_partials(partials: Tensor, *outputs: Tensor) -> None:
    """The sum over the first dimension of `partials` (parts, groups, count), written to the outputs one after the
    other: a group of each has so many numbers that together they are `count`. In fp64, rounded to the outputs' dtypes.
    """
    parts, groups, count = partials.shape
    total, cols = groups * count, 32
    sum_partials_kernel[(triton.cdiv(total, cols),)](
        partials, outputs, tuple(out.numel() // groups for out in outputs), parts, total, count,
        PARTS=min(32, triton.next_power_of_2(parts)), COLS=cols,
    )  # fmt: skip


def parameter_gradients(x: Tensor, parameters: tuple[Tensor, ...], needed: bool) -> tuple[Tensor, ...]:
    """What kernels write the parameters' gradients to: zero for an image `x` of no elements, empty if not needed."""
    make = torch.empty if x.numel() else torch.zeros
    return tuple(make(p.shape, dtype=p.dtype, device=p.device) if needed else x.new_empty(0) for p in parameters)


def channel_block(channels: int, most: int) -> int:
    """Channels that a program takes: a power of two that a matrix product can have, `most` at most."""
    return max(16, min(most, triton.next_power_of_2(channels)))


def input_precision(x: Tensor, asked: str | None = None, exact: str = "ieee") -> str:
    """How a matrix product takes the numbers of `x` and fp32 numbers: "ieee", "tf32x3" or "tf32".

    As asked, else `exact` or tf32 as `torch.set_float32_matmul_precision` says. Half-precision numbers are exact in
    tf32. "tf32x3" rounds no worse than fp32 sums do, and stands for "ieee" where the compiler gets that wrong.
    """
    target = architecture(x.device)
    if target.startswith("gfx"):
        return "ieee"
    highest = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    precision = asked or (exact if highest else "tf32")
    return _EXACT_ON_BLACKWELL if precision == "ieee" and target.startswith(("sm_10", "sm_11")) else precision


def matrix_options(x: Tensor) -> dict[str, int | bool]:
    """Launch options of kernels of matrix products on 256 threads."""
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    target = architecture(x.device)
    if target.startswith("gfx"):
        options["num_warps"] = 4
    elif target.startswith("sm_"):
        # Left alone, ptxas spills a few registers to fit one more program on a multiprocessor.
        options["maxnreg"] = 255
    return options
