"""Channel attention, forward and with its gradients; a copy as the floor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import copy_floor, op_cases

SHAPES = [(1, 120, 256, 256), (1, 192, 128, 128), (1, 384, 64, 64), (4, 120, 128, 128), (2, 72, 63, 65)]


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    return torch.randn(shape, requires_grad=True), *sf.reference.ChannelAttention(shape[1]).arguments()


def cases(options: Options) -> list[Case]:
    shapes = [(2, 72, 63, 65)] if options.quick else SHAPES
    return op_cases("channel_attention", arguments, shapes, options, peers=copy_floor)
