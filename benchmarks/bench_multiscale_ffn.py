"""Multi-scale FFN, forward and with its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import op_cases

SHAPES = [(1, 40, 256, 256), (1, 16, 256, 256), (1, 64, 128, 128), (1, 128, 64, 64), (4, 40, 128, 128), (2, 24, 63, 65)]


def targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    if kind == "forward+backward":
        return {"reference": 2.2, "compile": 2.2}
    dim = shape[1]
    if dim <= 40:
        return {"reference": 4.0, "compile": 3.0}
    return {"reference": 3.2, "compile": 2.3} if dim <= 64 else {"reference": 2.5, "compile": 2.0}


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    return torch.randn(shape, requires_grad=True), *sf.reference.MultiScaleFFN(shape[1]).arguments()


def cases(options: Options) -> list[Case]:
    shapes = [(2, 24, 63, 65)] if options.quick else SHAPES
    compiled = [(1, 40, 256, 256), (1, 64, 128, 128), (1, 128, 64, 64)]
    return op_cases("multiscale_ffn", arguments, shapes, options, targets=targets, compile_shapes=compiled)
