"""Haar DWT and IDWT with learnable filters, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Options, Run, Variant
from .op_cases import COMPILED_MAPS, MAPS, copy_floor, op_cases

SHAPES = MAPS
PAGE_FAULTS_RULE = (1, 16, 1024, 1024)
HAAR = ((0.5**0.5, 0.5**0.5), (0.5**0.5, -(0.5**0.5)))


def dwt_targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    if kind == "forward+backward":
        return {"reference": 4.5, "compile": 3.0}
    return {"reference": 3.4, "compile": 1.2} if shape == PAGE_FAULTS_RULE else {"reference": 5.0, "compile": 2.0}


def idwt_targets(kind: str, shape: tuple[int, ...]) -> Mapping[str, float]:
    if kind == "forward+backward":
        return {}
    return {"reference": 4.0 if shape == PAGE_FAULTS_RULE else 5.0, "compile": 2.0}


def dwt_arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    low, high = (torch.tensor(taps).add_(0.01 * torch.randn(2)).requires_grad_() for taps in HAAR)
    return torch.randn(shape, requires_grad=True), low, high


def idwt_arguments(shape: tuple[int, ...]) -> Sequence[Any]:
    batch, channels, height, width = shape
    x, low, high = dwt_arguments((batch, 4 * channels, (height + 1) // 2, (width + 1) // 2))
    return x, low, high, (height, width)


def _ptwt(x: Tensor) -> Run:
    import ptwt

    return lambda: ptwt.wavedec2(x, "haar", level=1, mode="symmetric")[0]


def _pytorch_wavelets(x: Tensor) -> Run:
    from pytorch_wavelets import DWTForward

    transform = DWTForward(J=1, wave="haar", mode="symmetric").to(x.device)
    return lambda: transform(x)[0]


def _pywt(x: Tensor) -> Run:
    import pywt

    array = x.cpu().numpy()
    return lambda: pywt.dwt2(array, "haar")


LIBRARIES: dict[str, Callable[[Tensor], Run]] = {
    "ptwt": _ptwt,
    "pytorch_wavelets": _pytorch_wavelets,
    "pywt": _pywt,
}


def peers(args: Sequence[Any]) -> Mapping[str, Variant]:
    """A plain copy as the floor, and other libraries' transforms, whose filters are fixed and values not compared."""
    variants = copy_floor(args)
    for name, prepare in LIBRARIES.items():
        try:
            run = prepare(args[0].detach())
        except ImportError as error:
            variants[name] = Variant(None, note=f"{name}: {error}")
        else:
            note = f"fixed filters, values not compared{', on the CPU' * (name == 'pywt')}"
            variants[name] = Variant(run, note=note, compared=False)
    return variants


def cases(options: Options) -> list[Case]:
    shapes = SHAPES[-1:] if options.quick else SHAPES
    return [
        *op_cases(
            "haar_dwt2d",
            dwt_arguments,
            shapes,
            options,
            targets=dwt_targets,
            peers=peers,
            compile_shapes=COMPILED_MAPS,
        ),
        *op_cases(
            "haar_idwt2d", idwt_arguments, shapes, options, targets=idwt_targets, compile_shapes=COMPILED_MAPS[:1]
        ),
    ]
