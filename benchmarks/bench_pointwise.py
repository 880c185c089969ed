"""The mixer's last convolution: of three maps that are not concatenated, with a residual."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case, Options
from .op_cases import MAPS, of_catalogue, op_cases

SHAPES = [(1, 40, 256, 256), *MAPS]


def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
    c = shape[1]
    x0, x1, x2, residual = (torch.randn(shape) for _ in range(4))
    tensors = x0, x1, x2, torch.randn(1, c, 3 * c) * (3 * c) ** -0.5, torch.randn(c), residual
    return tuple(t.requires_grad_() for t in tensors)


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[-1:] if options.quick else SHAPES[:-2]
    return op_cases("pointwise", arguments, shapes, options, functions=of_catalogue("pointwise"))
