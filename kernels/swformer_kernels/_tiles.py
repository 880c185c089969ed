"""How a program reaches its tile of a tensor: indices, pointers and masks, loads and stores.

What a mask leaves out is read as zero, and not written.
"""

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
def load(pointers, mask):
    """In fp32."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointers, value, mask):
    """In the pointers' dtype. From fp64 to half precision by way of fp32: the interpreter knows no other."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if value.dtype == tl.float64 and dtype != tl.float64:
        value = value.to(tl.float32)
    tl.store(pointers, value.to(dtype), mask=mask)


@triton.jit
def _to_tf32(x):
    """The nearest numbers that tf32 has, ties away from zero; infinities and NaN stay."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _below_tf32(x, high):
    """What `high`, the nearest number in tf32, leaves of x, in tf32; nothing of an infinity."""
    return _to_tf32(tl.where(x == high, 0.0, x - high))


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr, MANY_WARPS: tl.constexpr = False):
    """total + left @ right of fp32 numbers.

    "tf32" rounds what matrix units would cut off. "tf32x3" takes numbers apart where they are: Triton does so after it
    has given every thread its rows and columns of the operands, which takes a hundred registers. Where one product is
    the next one's sum, Triton shares rows alone out among warps, and more than 4 take the same ones: MANY_WARPS keeps
    the products apart, for a sum more in registers.
    """
    if PRECISION == "ieee":
        return tl.dot(left, right, total, input_precision="ieee")
    left_high, right_high = _to_tf32(left), _to_tf32(right)
    if MANY_WARPS and PRECISION == "tf32x3":
        total = tl.dot(left_high, right_high, total, input_precision="tf32")
        small = tl.dot(_below_tf32(left, left_high), right_high, input_precision="tf32")
        other = tl.dot(left_high, _below_tf32(right, right_high), input_precision="tf32")
        # Unless they are compared, Triton makes one the other's sum.
        small = tl.where((small == small) & (other == other), small + other, 0.0)
        return total + tl.where(small == small, small, 0.0)
    if PRECISION == "tf32x3":
        small = tl.dot(_below_tf32(left, left_high), right_high, input_precision="tf32")
        small = tl.dot(left_high, _below_tf32(right, right_high), small, input_precision="tf32")
        total += tl.where(small == small, small, 0.0)  # an infinity times nothing
    return tl.dot(left_high, right_high, total, input_precision="tf32")


@triton.jit
def load_matrix(matrix, row, exists, column, columns, row_stride, column_stride=1):
    """Elements of a matrix, (len(row), len(column)), in fp32."""
    mask = exists[:, None] & (column < columns)[None, :]
    return load(matrix + row[:, None] * row_stride + column[None, :] * column_stride, mask)


@triton.jit
def store_matrix(matrix, value, row, exists, column, columns, row_stride):
    """The inverse of `load_matrix`, of a matrix whose columns are neighbours."""
    mask = exists[:, None] & (column < columns)[None, :]
    store(matrix + row[:, None] * row_stride + column[None, :], value, mask)


@triton.jit
def map_pointers(x, strides, image, channel, exists, pixel, pixels, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Pointers to channels of an image of (B, C, H * W) at the pixels, and their mask: (channels, pixels).

    Strides are those of images and of channels, or of pixels if the channels are neighbours (CHANNELS_LAST).
    """
    start = x + image * multiple(strides[0], ALIGN)
    if CHANNELS_LAST:
        pointers = start + channel[:, None] + pixel.to(tl.int64)[None, :] * multiple(strides[1], ALIGN)
    else:
        pixels = multiple(pixels, ALIGN)
        pointers = start + channel.to(tl.int64)[:, None] * multiple(strides[1], ALIGN) + pixel[None, :]
    return pointers, exists[:, None] & (pixel < pixels)[None, :]


@triton.jit
def tile_place(program, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, first row and first column of a tile of images of size (..., height, width)."""
    across = tl.cdiv(size[-1], COLUMNS)
    down = tl.cdiv(size[-2], ROWS)
    return (program // across // down).to(tl.int64), program // across % down * ROWS, program % across * COLUMNS


@triton.jit
def tile_pixels(top, left, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of the pixels of the tile that starts there, (ROWS * COLUMNS,)."""
    n = tl.arange(0, ROWS * COLUMNS)
    return top + n // COLUMNS, left + n % COLUMNS


@triton.jit
def image_pointers(
    x, strides, image, channel, channels, row, column, size, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Pointers to channels of an image of (B, C, H, W) at the pixels, and their mask: (channels, pixels).

    Strides as from `lane_first`.
    """
    lane, of_image, outer, of_row = strides
    start = x + image * multiple(of_image, ALIGN)
    c = channel.to(tl.int64)[:, None]
    lines = row.to(tl.int64)[None, :] * multiple(of_row, ALIGN)
    if CHANNELS_LAST:
        channels = multiple(channels, ALIGN)
        pointers = start + lines + column.to(tl.int64)[None, :] * multiple(outer, ALIGN) + c * lane
        inside = (row < size[2]) & (column < size[3])
    else:
        pointers = start + c * multiple(outer, ALIGN) + lines + column.to(tl.int64)[None, :] * lane
        inside = (row < size[2]) & (column < multiple(size[3], ALIGN))
    return pointers, (channel < channels)[:, None] & inside[None, :]
