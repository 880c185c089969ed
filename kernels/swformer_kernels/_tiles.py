"""How a program reaches its tile of a tensor: indices, pointers and masks, loads and stores."""

from __future__ import annotations

import triton
import triton.language as tl


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
