"""The memory format of results, and results as tuples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the backends write channels_last outputs for input `x` (the same test as csrc/common/tensor.h)."""
    return (
        x.dim() == 4 and x.shape[1] > 1 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )


def empty(like: Tensor, *size: int) -> Tensor:
    """An output of this size, in the memory format that goes with input `like`."""
    layout = torch.channels_last if len(size) == 4 and channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def as_output(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory format in which the kernels write an output for input `like`."""
    layout = torch.channels_last if x.dim() == 4 and channels_last(like) else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)
