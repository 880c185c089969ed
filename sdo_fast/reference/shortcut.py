"""The cotangents of one update of a sampler's state, or of the sampler as a whole, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def unclipped(
    x: Tensor, cond: Tensor, uncond: Tensor | None, guidance: float, pred_x: float, pred_eps: float, clip: float
) -> Tensor:
    """Where |pred_x x + pred_eps eps| <= clip: a boolean tensor; False for NaN, as in the gradient of torch.clamp."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    eps = cond.to(dtype)
    if uncond is not None:
        base = uncond.to(dtype)
        eps = base + guidance * (eps - base)
    return (pred_x * x.to(dtype) + pred_eps * eps).abs() <= clip


def shortcut_backward(
    grad: Tensor,
    a: float,
    b: float,
    guidance: float = 1.0,
    x: Tensor | None = None,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    c: float = 0.0,
    pred_x: float = 0.0,
    pred_eps: float = 0.0,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sdo_fast.functional.shortcut_backward`, in float32 for 16-bit inputs, else in their own dtype."""
    cotangent = grad.to(torch.promote_types(grad.dtype, torch.float32))
    direct, through = a * cotangent, b * cotangent
    if clip is not None:
        assert x is not None
        assert cond is not None
        kept = torch.where(unclipped(x, cond, uncond, guidance, pred_x, pred_eps, clip), cotangent, 0)
        direct, through = direct + c * pred_x * kept, through + c * pred_eps * kept
    return direct.to(grad.dtype), (guidance * through).to(grad.dtype), ((1 - guidance) * through).to(grad.dtype)
