"""The last stages of reductions: sums over the programs' partial sums, in a fixed order."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._device import cdiv, jit_for_all_sizes
from ._tiles import store

# Partial sums that a program reads at once: of a row, and rows of a column.
_BLOCK = 1024
_PARTS = 32


@jit_for_all_sizes("count")
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
    sum_taps_kernel[(rows,)](partials, taps, count, BLOCK=_BLOCK)


@jit_for_all_sizes("parts")
def sum_partials_kernel(
    partials, outputs, parts, total, count, size0, size1, size2, size3, size4, size5,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of the partials (parts, total), in fp64 and in a fixed order. Of every `count` of them the
    first size0 go to outputs[0], the next size1 to outputs[1] and so on.
    """
    sizes = (size0, size1, size2, size3, size4, size5)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)[:, None]
    sums = tl.zeros((PARTS, COLUMNS), tl.float64)
    for start in range(0, parts, PARTS):
        mask = (start + part < parts) & (column < total)[None, :]
        pointers = partials + (start + part).to(tl.int64) * total + column[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
    value = tl.sum(sums, 0)
    group, place = column // count, column % count
    first = 0
    for i in tl.static_range(len(outputs)):
        inside = (column < total) & (place >= first) & (place < first + sizes[i])
        store(outputs[i] + group * sizes[i] + place - first, value, inside)
        first += sizes[i]


def sum_partials(partials: Tensor, *outputs: Tensor) -> None:
    """The sum over the first dimension of `partials` (parts, groups, count), written to up to six outputs one after the
    other: a group of each has so many numbers that together they are `count`. In fp64, rounded to the outputs' dtypes.
    """
    parts, groups, count = partials.shape
    total, columns = groups * count, 32
    # Always six, of which the last may get nothing, so that there is one kernel.
    missing = 6 - len(outputs)
    sum_partials_kernel[(cdiv(total, columns),)](
        partials, outputs + outputs[-1:] * missing, parts, total, count,
        *(output.numel() // groups for output in outputs), *[0] * missing, PARTS=_PARTS, COLUMNS=columns,
    )  # fmt: skip
