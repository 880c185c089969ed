"""The spatial branch (depthwise convolution and GELU), and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import copy_floor, op_cases

SHAPES = [
    (1, 32, 256, 256),
    (4, 32, 128, 128),
    (1, 64, 128, 128),
    (1, 128, 64, 64),
    (1, 16, 1024, 1024),
    (2, 24, 63, 65),
]


def targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    return {"reference": 2.7 if kind == "forward" else 2.2}


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    branch = sf.reference.SpatialBranch(shape[1])
    parameters = [(p.detach() + 0.01 * torch.randn_like(p)).requires_grad_() for p in branch.arguments()]
    return torch.randn(shape, requires_grad=True), *parameters


def cases(options: Options) -> list[Case]:
    shapes = [(2, 24, 63, 65)] if options.quick else SHAPES
    compiled = [(1, 32, 256, 256), (1, 128, 64, 64)]
    return op_cases(
        "depthwise_gelu", arguments, shapes, options, targets=targets, peers=copy_floor, compile_shapes=compiled
    )
