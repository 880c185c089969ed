"""One update of a sampler's state, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sampler_step(
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    a: float = 1.0,
    b: float = 0.0,
    terms: Sequence[Tensor] = (),
    scales: Sequence[float] = (),
    c: float = 0.0,
    pred_x: float = 0.0,
    pred_eps: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """`sdo_fast.functional.sampler_step`, in float32 for 16-bit inputs, else in their own dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    state, eps = x.to(dtype), cond.to(dtype)
    if uncond is not None:
        base = uncond.to(dtype)
        eps = base + guidance * (eps - base)
    result = a * state + b * eps
    if clip is not None:
        result = result + c * (pred_x * state + pred_eps * eps).clamp(-clip, clip)
    for scale, term in zip(scales, terms, strict=True):
        result = result + scale * term.to(dtype)
    return result.to(x.dtype)
