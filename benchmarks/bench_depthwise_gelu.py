"""The spatial branch (depthwise convolution and GELU), and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import COMPILED_MAPS, MAPS, branch_arguments, copy_floor, op_cases

SHAPES = MAPS


def targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    return {"reference": 2.7 if kind == "forward" else 2.2}


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    return branch_arguments(sf.reference.SpatialBranch, shape)


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[-1:] if options.quick else SHAPES
    return op_cases(
        "depthwise_gelu", arguments, shapes, options, targets=targets, peers=copy_floor, compile_shapes=COMPILED_MAPS
    )
