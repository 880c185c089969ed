"""Gradients that are known beforehand, given to values that were computed without a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Slopes(torch.autograd.Function):
    """`value`, with the derivative of a x + b eps, where eps is the guided combination of a model's outputs."""

    @staticmethod
    def forward(value: Tensor, x: Tensor, a: float, b: float, guidance: float | None, *outputs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors = inputs[2:5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, guidance = ctx.factors
        needs = ctx.needs_input_grad[1], *reversed(ctx.needs_input_grad[5:]), False, False
        # (x, cond, uncond), where the outputs are (uncond, cond) or the one of a model without guidance.
        none = (None, None, None, 0.0, 0.0, 0.0, None)
        weight = 1.0 if guidance is None else guidance
        grads = torch.ops.sdo_fast.shortcut_backward(grad, a, b, weight, *none, *needs[:3])
        by_x, *by_outputs = (g if need else None for g, need in zip(grads, needs, strict=False))
        count = len(ctx.needs_input_grad) - 5
        return None, by_x, None, None, None, *reversed(by_outputs[:count])


class ScaleGradient(torch.autograd.Function):
    """x in forward, factor * grad in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None
