"""A normalisation, a second convolution and a scale folded into the Fourier branch's first convolution."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case, Options
from .op_cases import of_catalogue, op_cases

SHAPES = [(1, 40, 256, 256), (1, 128, 64, 64)]
"""Of the images whose channels the parameters have; pixels do not count."""


def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
    c = shape[1]
    norm = torch.randn(c), torch.rand(c) + 0.5, torch.randn(c), torch.randn(c)
    tensors = torch.randn(3 * c, c), torch.randn(3 * c), *norm, torch.randn(c, c), torch.randn(c), torch.randn(3 * c)
    return *(t.requires_grad_() for t in tensors), 1e-5


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return op_cases("fold_norm", arguments, shapes, options, functions=of_catalogue("fold_norm"))
