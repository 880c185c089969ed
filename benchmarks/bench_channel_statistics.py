"""The statistics of batch normalisation, alone and with their gradient; a copy as the floor. On the CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import copy_floor, op_cases

SHAPES = [(1, 40, 256, 256), (4, 40, 128, 128), (4, 80, 32, 32), (2, 24, 63, 65)]


FUNCTIONS = (
    lambda x: torch.ops.swformer_fast.channel_statistics(x)[0],
    lambda x: sf.reference.channel_statistics(x)[0],
)
"""Their first results."""


def arguments(shape: tuple[int, ...]) -> tuple[Tensor]:
    return (torch.randn(shape, requires_grad=True),)


def cases(options: Options) -> list[Case]:
    if options.device != "cpu":
        return []
    shapes = [(2, 24, 63, 65)] if options.quick else SHAPES
    return op_cases("channel_statistics", arguments, shapes, options, functions=FUNCTIONS, peers=copy_floor)
