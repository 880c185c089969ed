"""The statistics of batch normalisation, alone and with their gradient; a copy as the floor. On the CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

import swformer_fast as sf

from .families import copy_floor, family_cases
from .harness import Case, Options

SHAPES = [(1, 40, 256, 256), (4, 40, 128, 128), (4, 80, 32, 32), (2, 24, 63, 65)]


def statistics(x: Tensor) -> Tensor:
    return torch.ops.swformer_fast.channel_statistics(x)[0]


def cases(options: Options) -> list[Case]:
    if options.device != "cpu":
        return []
    return family_cases(
        "norm",
        "channel_statistics",
        statistics,
        lambda x: sf.reference.channel_statistics(x)[0],
        lambda shape: (torch.randn(shape, requires_grad=True),),
        [(2, 24, 63, 65)] if options.quick else SHAPES,
        options,
        lambda kind, shape: {},
        copy_floor,
    )
