"""The spatial and the wavelet branch in one pass behind their convolution; without gradients, on the CPU only."""

from __future__ import annotations

from typing import Any

import torch

from .harness import Case, Options
from .op_cases import MAPS, of_catalogue, op_cases

SHAPES = [(1, 40, 256, 256), *MAPS]


def arguments(shape: tuple[int, ...]) -> tuple[Any, ...]:
    c = shape[1]
    into = torch.randn(2 * c, c) * c**-0.5, torch.randn(2 * c)
    branches = torch.randn(c, 1, 3, 3), torch.randn(c), torch.randn(4 * c, 1, 3, 3), torch.randn(4 * c)
    taps = (torch.tensor([0.7, sign * 0.7]) + 0.01 * torch.randn(2) for sign in (1, -1, 1, -1))
    return torch.randn(shape), *into, *branches, *taps


def cases(options: Options) -> list[Case]:
    if options.device != "cpu":
        return []
    shapes = SHAPES[-1:] if options.quick else SHAPES[:-2]
    functions = of_catalogue("local_branches")
    return op_cases("local_branches", arguments, shapes, options, functions=functions, kinds=["forward"])
