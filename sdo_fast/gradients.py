"""Gradients that are known beforehand, given to values that were computed without a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Slopes(torch.autograd.Function):
    """`value`, with the derivative of a x + sum_k b_k eps_k, each eps_k the guided combination of a model's outputs.

    `outputs` are those of one call after the other: (uncond, cond) each with guidance, (output,) without.
    """

    @staticmethod
    def forward(
        value: Tensor, x: Tensor, a: float, b: tuple[float, ...], guidance: float | None, *outputs: Tensor
    ) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factors = inputs[2:5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, weights, guidance = ctx.factors
        none = (None, None, None, 0.0, 0.0, 0.0, None)
        weight, size = (1.0, 1) if guidance is None else (guidance, 2)
        by_x, by_outputs = None, []
        for k, b in enumerate(weights or (0.0,)):
            # (x, cond, uncond), where the outputs are (uncond, cond) or the one of a model without guidance.
            call = ctx.needs_input_grad[5 + size * k :][:size]
            needs = (k == 0 and ctx.needs_input_grad[1], *reversed(call), False, False)[:3]
            grads = torch.ops.sdo_fast.shortcut_backward(grad, a, b, weight, *none, *needs)
            first, *others = (g if need else None for g, need in zip(grads, needs, strict=True))
            by_x = first if k == 0 else by_x
            by_outputs += reversed(others[: len(call)])
        return None, by_x, None, None, None, *by_outputs


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


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with so much of its gradient."""
    return x if factor == 1 else x.detach() if factor == 0 else ScaleGradient.apply(x, factor)
