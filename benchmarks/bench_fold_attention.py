"""Channel attention, the Fourier branch's last convolution and a scale folded into the mixer's last convolution."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case, Options
from .op_cases import of_catalogue, op_cases

SHAPES = [(1, 40, 256, 256), (4, 40, 128, 128), (1, 128, 64, 64)]
"""Of the images whose channels the parameters have; their pixels have been summed."""


def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
    b, c, h, w = shape
    area, hidden = h * w, 3 * c // 4
    sums = (area * torch.randn(b, channels) for channels in (c, c, c))
    attention = torch.randn(hidden, 3 * c) / c, torch.randn(hidden), torch.randn(3 * c, hidden) / c, torch.randn(3 * c)
    convolutions = torch.randn(c, c), torch.randn(c), torch.randn(c, 3 * c), torch.randn(c)
    return *(t.requires_grad_() for t in (*sums, *attention, *convolutions, torch.randn(c))), area


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[:1] if options.quick else SHAPES
    return op_cases("fold_attention", arguments, shapes, options, functions=of_catalogue("fold_attention"))
