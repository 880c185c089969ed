"""Whether a GPU's matrix products are right: compilers have had faults there, and they give wrong numbers silently.

Known are Triton 3.4 to 3.7.0 on Hopper (operands that reach the matrix units through shared memory: issues 640, 826 and
983 of flash-linear-attention), 3.7.1 on Hopper (issue 11366 of triton) and several versions on Blackwell (issue 10821).
So on these GPUs an op with matrix products first runs on a small random image, with parameters of the shapes that it is
about to take, and is compared with its reference in fp64 on the CPU. The verdict is kept for the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._layout import as_output, as_tuple

if TYPE_CHECKING:
    from .backend import Implementations

SIDE = 32
"""Least side of the test image; its remainders by 16, on which code and alignment depend, are the given image's."""
_verdicts: dict[tuple[Any, ...], str | None] = {}
_Kernels = Callable[["Implementations"], Callable[..., Any]]


@cache
def doubtful(device: torch.device) -> bool:
    """Whether Triton's matrix products have been wrong on GPUs of this kind."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def problem(op: Implementations, args: tuple[Any, ...], kernels: _Kernels) -> str | None:
    """Why `op`'s Triton kernels cannot be trusted with arguments like these, or None. At the first call it runs them.

    kernels(op) are those. Not while a CUDA graph is captured, which would take the test in: capture after a warm-up, as
    PyTorch asks.
    """
    x = next(a for a in args if isinstance(a, Tensor))
    if op.sample is None or not doubtful(x.device):
        return None
    key = (op.name, x.device, x.dtype, x.shape[1], torch.get_float32_matmul_precision())
    if key not in _verdicts:
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _verdicts[key] = _verdict(op, args, x, kernels)
    return _verdicts[key]


def _verdict(op: Implementations, args: tuple[Any, ...], x: Tensor, kernels: _Kernels) -> str | None:
    try:
        error, limit = _error(op, args, kernels), _limit(x.dtype)
    except Exception as failure:
        reason = f"its self-test failed: {type(failure).__name__}: {failure}"
    else:
        if error <= limit:
            return None
        reason = f"its self-test found a relative error of {error:.1e}, more than {limit:.0e}: a fault of the compiler"
    from triton import __version__

    where = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type
    reason += f" (triton {__version__} on {where}, {x.dtype}, {x.shape[1]} channels)"
    warnings.warn(f"swformer_fast: {op.name} runs on the reference, not on the Triton kernels: {reason}", stacklevel=2)
    return reason


def _limit(dtype: torch.dtype) -> float:
    """Far above rounding, below what a wrong operand gives, or tf32 where fp32 was asked for."""
    return 1e-4 if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else 3e-2


def _error(op: Implementations, args: tuple[Any, ...], kernels: _Kernels) -> float:
    """The largest relative RMS error of the kernels' results on a sample."""
    assert op.sample is not None
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        in_fp64 = op.sample(torch.Generator().manual_seed(0), args)
        rounded = [_like(a, like) for a, like in zip(in_fp64, args, strict=True)]
        # The reference gets what the kernels get, rounded to their dtypes.
        expected = op.reference(*(a.double().cpu() if isinstance(a, Tensor) else a for a in rounded))
        results = kernels(op)(*rounded)
        pairs = [(r.double().cpu(), e) for r, e in zip(as_tuple(results), as_tuple(expected), strict=True) if r.numel()]
    scale = max(e.norm().item() for _, e in pairs)
    # Gradients that cancel are judged by the others' size.
    errors = [((r - e).norm() / (e.norm() + 1e-2 * scale)).item() for r, e in pairs]
    return max(error if error == error else float("inf") for error in errors)


def _like(sample: Any, like: Any) -> Any:
    """`sample` with the dtype, device and memory format of `like`."""
    if not isinstance(like, Tensor):
        return sample
    return as_output(like, sample.to(like.device, like.dtype))


def image(generator: torch.Generator, like: Tensor) -> Tensor:
    """A small random image in place of `like`: at most two of its batch, all of its channels."""
    batch, channels, *sides = like.shape
    sides = [min(side, SIDE + side % 16) for side in sides]
    return torch.randn(min(batch, 2), channels, *sides, generator=generator, dtype=torch.float64, device="cpu")


def parameter(generator: torch.Generator, like: Tensor) -> Tensor:
    """Random numbers in place of a parameter or a statistic: positive ones for each channel, small ones in a weight."""
    if like.dim() == 1:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    inputs = like.shape[1:]
    if like.dim() == 3:  # a weight for each image
        like, inputs = like[:2], like.shape[2:]
    weight = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    return weight / max(inputs.numel(), 1) ** 0.5
