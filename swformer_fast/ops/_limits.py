"""What several backends cannot take, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._layout import channels_last


def no_triton_fp64(backend: str, x: Tensor, *args: Any) -> str | None:
    return "the Triton kernels take no float64" if backend == "triton" and x.dtype == torch.float64 else None


def contiguous_maps(backend: str, *maps: Any) -> str | None:
    if any(isinstance(x, Tensor) and channels_last(x) for x in maps):
        return "the kernel writes contiguous maps, and one of these is channels_last"
    return no_triton_fp64(backend, maps[0])


def kernel_size(weight: Tensor, sides: tuple[int, ...] | None) -> str | None:
    """`sides`: those that the backend takes; None for all."""
    height, width = weight.shape[2:]
    if sides is None or (height == width and width in sides):
        return None
    return f"kernels of {', '.join(f'{k} x {k}' for k in sides)} only, got {height} x {width}"
