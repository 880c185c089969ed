"""Haar DWT and IDWT with learnable filters, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import swformer_fast as sf

from .families import copy_floor, family_cases
from .harness import Case, Options, Variant

SHAPES = [
    (1, 32, 256, 256),
    (4, 32, 128, 128),
    (1, 64, 128, 128),
    (1, 128, 64, 64),
    (1, 16, 1024, 1024),
    (2, 24, 63, 65),
]
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


def dwt_args(shape: tuple[int, ...]) -> Sequence[Any]:
    low, high = (torch.tensor(taps).add_(0.01 * torch.randn(2)).requires_grad_() for taps in HAAR)
    return torch.randn(shape, requires_grad=True), low, high


def idwt_args(shape: tuple[int, ...]) -> Sequence[Any]:
    batch, channels, height, width = shape
    x, low, high = dwt_args((batch, 4 * channels, (height + 1) // 2, (width + 1) // 2))
    return x, low, high, (height, width)


def peers(args: Sequence[Any]) -> Mapping[str, Variant]:
    """Other libraries' transforms, whose filters are fixed and values not compared; and a plain copy as the floor."""
    x = args[0].detach()
    note = "fixed filters, values not compared"
    variants = copy_floor(args)
    try:
        import ptwt

        variants["ptwt"] = Variant(
            lambda: ptwt.wavedec2(x, "haar", level=1, mode="symmetric")[0], note=note, compared=False
        )
    except ImportError:
        variants["ptwt"] = Variant(None, note="ptwt is not installed")
    try:
        from pytorch_wavelets import DWTForward

        transform = DWTForward(J=1, wave="haar", mode="symmetric").to(x.device)
        variants["pytorch_wavelets"] = Variant(lambda: transform(x)[0], note=note, compared=False)
    except ImportError:
        variants["pytorch_wavelets"] = Variant(None, note="pytorch_wavelets is not installed")
    try:
        import pywt

        array = x.cpu().numpy()
        variants["pywt"] = Variant(lambda: pywt.dwt2(array, "haar"), note=f"{note}, on the CPU", compared=False)
    except ImportError:
        variants["pywt"] = Variant(None, note="pywt is not installed")
    return variants


def cases(options: Options) -> list[Case]:
    shapes = [(2, 24, 63, 65)] if options.quick else SHAPES
    dwt = family_cases(
        "dwt",
        "haar_dwt2d",
        sf.functional.haar_dwt2d,
        sf.reference.haar_dwt2d,
        dwt_args,
        shapes,
        options,
        dwt_targets,
        peers,
        compile_shapes=[(1, 32, 256, 256), (1, 128, 64, 64)],
    )
    idwt = family_cases(
        "idwt",
        "haar_idwt2d",
        sf.functional.haar_idwt2d,
        sf.reference.haar_idwt2d,
        idwt_args,
        shapes,
        options,
        idwt_targets,
        compile_shapes=[(1, 32, 256, 256)],
    )
    return dwt + idwt
