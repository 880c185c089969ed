"""A 1x1 convolution with what is linear around it folded in: a normalisation, another convolution of its last outputs,
a scale; forward and backward.

A block needs two of them at a time, of its mixer and its FFN, so the kernel takes two jobs. A job is the convolution
(weight, bias), the normalisation (mean, variance, weight, bias; all None where there is none, the last two where they
are 1 and 0), the other convolution, the scale, and the result: weight and then bias in one vector. Sizes are rows of
the weight, its columns D, columns N of the other convolution's weight and rows E of it, and how many the scale has; the
last three are 0 where there are none, so that jobs with and without share a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Launch, cdiv, check_dtype, jit_for_all_sizes, matrix_options, parameter_gradients
from ._tiles import load, load_matrix, store, store_matrix

_ROWS, _COLUMNS, _DEPTH = 32, 32, 16


@triton.jit
def _normalisation(norm, d, exists, eps):
    """Slope and offset of the columns d, and 1 / their standard deviation."""
    deviation = tl.rsqrt(load(norm[1] + d, exists) + eps)
    slope = deviation
    if norm[2] is not None:
        slope *= load(norm[2] + d, exists)
    offset = -load(norm[0] + d, exists) * slope
    if norm[3] is not None:
        offset += load(norm[3] + d, exists)
    return slope, offset, deviation


@triton.jit
def _folded_bias(weight, bias, norm, row, exists, D, eps, BLOCK_D: tl.constexpr):
    """Of some rows of the convolution, behind the normalisation."""
    total = load(bias + row, exists)
    if norm[0] is not None:
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            _, offset, _ = _normalisation(norm, d, d < D, eps)
            total += tl.sum(load_matrix(weight, row, exists, d, D, D) * offset[None, :], 1)
    return total


@triton.jit
def _factor(scale, row, scaled):
    """The scale of some rows of the result."""
    return tl.where(row < scaled, load(scale + row, row < scaled), 1.0)


@jit_for_all_sizes("rows")
def fold_norm_kernel(
    first, second, eps, second_eps, rows, D, N, E, scaled, second_rows, second_D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blocks program_id(1) of the outputs and program_id(2) of the inputs of job program_id(0); the second has no other
    convolution and no scale.
    """
    if tl.program_id(0) == 0:
        job = first
    else:
        job = second
        rows, D, N, E, scaled, eps = second_rows, second_D, N * 0, E * 0, scaled * 0, second_eps
    weight, bias, norm, then_weight, then_bias, scale, out = job
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    kept = rows - N
    outputs = kept + E
    total = load_matrix(weight, row, row < kept, d, D, D)
    constant = _folded_bias(weight, bias, norm, row, row < kept, D, eps, BLOCK_D)
    composed = (row >= kept) & (row < outputs)
    constant += load(then_bias + row - kept, composed)
    for start in range(0, N, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        left = load_matrix(then_weight, row - kept, composed, n, N, N)
        right = load_matrix(weight, kept + n, n < N, d, D, D)
        total = tl.dot(left, right, total, input_precision="ieee")
        inner = _folded_bias(weight, bias, norm, kept + n, n < N, D, eps, BLOCK_D)
        constant += tl.sum(left * inner[None, :], 1)
    if norm[0] is not None:
        slope, _, _ = _normalisation(norm, d, d < D, eps)
        total *= slope[None, :]
    factor = _factor(scale, row, scaled)
    store_matrix(out, total * factor[:, None], row, row < outputs, d, D, D)
    store(out + outputs * D + row, constant * factor, row < tl.where(tl.program_id(2) == 0, outputs, 0))


@triton.jit
def _scaled_gradients(grad, scale, row, exists, d, D, scaled):
    """The gradient of some rows of the folded weight before the scale."""
    return load_matrix(grad, row, exists, d, D, D) * _factor(scale, row, scaled)[:, None]


@triton.jit
def _scaled_bias_gradients(grad, scale, row, exists, D, outputs, scaled):
    """The same of the bias."""
    return load(grad + outputs * D + row, exists) * _factor(scale, row, scaled)


@jit_for_all_sizes("rows")
def fold_norm_backward_kernel(
    grad, job, grads, eps, rows, D, N, E, scaled, columns,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution and the normalisation for a block of the inputs, from the programs before `columns`;
    of the other convolution and the scale for a block of the outputs, from the others.
    """
    weight, bias, norm, then_weight, then_bias, scale = job
    kept = rows - N
    outputs = kept + E
    program = tl.program_id(0)
    if program < columns:
        d = program * BLOCK_D + tl.arange(0, BLOCK_D)
        of_slope = tl.zeros((BLOCK_D,), tl.float32)
        of_offset = of_slope
        for start in range(0, rows, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            total = _scaled_gradients(grad, scale, row, row < kept, d, D, scaled)
            constant = _scaled_bias_gradients(grad, scale, row, row < kept, D, outputs, scaled)
            inner = tl.where(row < kept, N, row - kept)
            for first in range(0, E, BLOCK_K):
                e = first + tl.arange(0, BLOCK_K)
                factor = load_matrix(then_weight, e, e < E, inner, N, N)
                right = _scaled_gradients(grad, scale, kept + e, e < E, d, D, scaled)
                total = tl.dot(tl.trans(factor), right, total, input_precision="ieee")
                right = _scaled_bias_gradients(grad, scale, kept + e, e < E, D, outputs, scaled)
                constant += tl.sum(factor * right[:, None], 0)
            if norm[0] is not None:
                slope, offset, _ = _normalisation(norm, d, d < D, eps)
                values = load_matrix(weight, row, row < rows, d, D, D)
                of_slope += tl.sum(values * total, 0)
                of_offset += tl.sum(values * constant[:, None], 0)
                total = total * slope[None, :] + constant[:, None] * offset[None, :]
            store_matrix(grads[0], total, row, row < rows, d, D, D)
            store(grads[1] + row, constant, row < tl.where(program == 0, rows, 0))
        if norm[0] is not None:
            exists = d < D
            slope, _, deviation = _normalisation(norm, d, exists, eps)
            of_slope -= load(norm[0] + d, exists) * of_offset
            store(grads[2] + d, -slope * of_offset, exists)
            store(grads[3] + d, -0.5 * of_slope * slope * deviation * deviation, exists)
            if norm[2] is not None:
                store(grads[4] + d, of_slope * deviation, exists)
            if norm[3] is not None:
                store(grads[5] + d, of_offset, exists)
    else:
        row = (program - columns) * BLOCK_R + tl.arange(0, BLOCK_R)
        of_scale = tl.zeros((BLOCK_R,), tl.float32)
        factor = _factor(scale, row, scaled)
        if scaled > 0:
            constant = _folded_bias(weight, bias, norm, row, row < kept, D, eps, BLOCK_D)
            of_scale += constant * load(grad + outputs * D + row, row < kept)
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                values = load_matrix(weight, row, row < kept, d, D, D)
                if norm[0] is not None:
                    slope, _, _ = _normalisation(norm, d, d < D, eps)
                    values *= slope[None, :]
                of_scale += tl.sum(values * load_matrix(grad, row, row < kept, d, D, D), 1)
        composed = (row >= kept) & (row < outputs)
        of_bias = load(grad + outputs * D + row, composed)
        for start in range(0, N, BLOCK_K):
            n = start + tl.arange(0, BLOCK_K)
            inner = _folded_bias(weight, bias, norm, kept + n, n < N, D, eps, BLOCK_D)
            of_then = of_bias[:, None] * inner[None, :]
            for first in range(0, D, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                left = load_matrix(grad, row, composed, d, D, D)
                if norm[0] is not None:
                    slope, _, _ = _normalisation(norm, d, d < D, eps)
                    left *= slope[None, :]
                right = tl.trans(load_matrix(weight, kept + n, n < N, d, D, D))
                of_then = tl.dot(left, right, of_then, input_precision="ieee")
            values = load_matrix(then_weight, row - kept, composed, n, N, N)
            of_scale += tl.sum(values * of_then, 1)
            store_matrix(grads[6], of_then * factor[:, None], row - kept, composed, n, N, N)
        of_scale += of_bias * load(then_bias + row - kept, composed)
        store(grads[7] + row - kept, of_bias * factor, composed)
        store(grads[8] + row, of_scale, row < scaled)


def prepare(
    like: Tensor, eps: float, sizes: tuple[int, ...], second_eps: float = 1.0, second: tuple[int, ...] = ()
) -> Launch:
    """Of `fold_norm_kernel` on one job, which it takes twice, or two, given by their sizes; the second by two of them,
    and its Nones are the first's.
    """
    (rows, inputs, n, e, _), (other_rows, other_inputs) = sizes, second or sizes[:2]
    grid = 1 + bool(second), cdiv(max(rows - n + e, other_rows), _ROWS), cdiv(max(inputs, other_inputs), _COLUMNS)
    constants = {"BLOCK_R": _ROWS, "BLOCK_D": _COLUMNS, "BLOCK_K": _DEPTH, **matrix_options(like), "num_warps": 4}
    return Launch(fold_norm_kernel, grid, (eps, second_eps, *sizes, other_rows, other_inputs), constants)


def _job(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What the kernels take but the result, any tensors where there is no other convolution or no scale, and sizes."""
    contiguous: list[Any] = [None if p is None else p.contiguous() for p in arguments]
    weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale = contiguous
    rows, inputs = weight.shape
    n, e = (0, 0) if then_weight is None else (then_weight.shape[1], then_weight.shape[0])
    then = (weight, bias) if then_weight is None else (then_weight, then_bias)
    job = weight, bias, (mean, variance, norm_weight, norm_bias), *then, bias if scale is None else scale
    return job, (rows, inputs, n, e, 0 if scale is None else rows - n + e)


def fold_norm(*arguments: Any) -> Tensor:
    """`reference.fold_norm`. Parameters are float32, float16 or bfloat16; arithmetic and result are fp32.

    Raises:
        TypeError: the weight has another dtype.
    """
    *tensors, eps = arguments
    check_dtype("weight", tensors[0])
    job, sizes = _job(tuple(tensors))
    rows, inputs, n, e, _ = sizes
    out = job[0].new_empty((rows - n + e) * (inputs + 1), dtype=torch.float32)
    launch = prepare(out, eps, sizes)
    with torch.cuda.device_of(out):
        launch((*job, out), (*job, out))
    return out


def fold_norm_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `fold_norm` by its nine tensors; those not there are empty, and all unless needed. Deterministic."""
    *tensors, eps, needed = arguments
    every = parameter_gradients(tensors[0], tuple(tensors), needed)
    if needed:
        job, sizes = _job(tuple(tensors))
        rows, inputs, n, e, scaled = sizes
        columns = cdiv(inputs, _COLUMNS)
        others = cdiv(rows - n + e, _ROWS) if e or scaled else 0
        with torch.cuda.device_of(grad):
            fold_norm_backward_kernel[(columns + others,)](
                grad.contiguous(), job, every, eps, *sizes, columns,
                BLOCK_R=_ROWS, BLOCK_D=_COLUMNS, BLOCK_K=_DEPTH, **matrix_options(grad) | {"num_warps": 4},
            )  # fmt: skip
    return every
