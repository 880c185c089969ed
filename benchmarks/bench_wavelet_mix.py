"""The wavelet branch (DWT, depthwise convolution, inverse DWT) with learnable filters, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import swformer_fast as sf

from .harness import Case, Options
from .op_cases import COMPILED_MAPS, MAPS, branch_arguments, copy_floor, op_cases

SHAPES = MAPS


def targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    return {"reference": 7.0, "compile": 7.0} if kind == "forward" else {"reference": 5.0, "compile": 5.0}


def arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    return branch_arguments(sf.reference.WaveletBranch, shape)


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[-1:] if options.quick else SHAPES
    return op_cases(
        "wavelet_mix", arguments, shapes, options, targets=targets, peers=copy_floor, compile_shapes=COMPILED_MAPS
    )
