"""The spatial and the wavelet branch in one pass behind their 1x1 convolution; without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import empty
from ..parameters import SpatialParameters, WaveletParameters
from . import depthwise_gelu, wavelet_mix
from ._limits import contiguous_maps
from ._operator import Image, Operator, Parameter, register


def _bundles(parameters: tuple[Any, ...]) -> tuple[SpatialParameters, WaveletParameters]:
    return SpatialParameters(*parameters[:2]), WaveletParameters(*parameters[2:])


def _definition(x: Tensor, in_weight: Tensor, in_bias: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    maps = reference.local_branches(x, in_weight, in_bias, *_bundles(parameters))
    return *maps, *(y.sum((2, 3), dtype=_dtype_of_sums(x)) for y in maps)


def _fake(x: Tensor, in_weight: Tensor, in_bias: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    channels = _bundles(parameters)[0].weight.shape[0]
    maps = (empty(x, x.shape[0], channels, *x.shape[2:]) for _ in range(2))
    return *maps, *(x.new_empty(x.shape[0], channels, dtype=_dtype_of_sums(x)) for _ in range(2))


def _dtype_of_sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _limits(backend: str, x: Tensor, in_weight: Tensor, in_bias: Tensor, *parameters: Tensor) -> str | None:
    spatial, wavelet = _bundles(parameters)
    if backend == "cpp" and x.dtype.itemsize == 2 and {spatial.weight.shape[-1], wavelet.weight.shape[-1]} != {3}:
        return f"the kernel takes depthwise kernels of 3 x 3 alone in {x.dtype}"
    kernels = depthwise_gelu.limits(backend, x, spatial.weight), wavelet_mix.limits(backend, x, wavelet.weight)
    return contiguous_maps(backend, x) or next((reason for reason in kernels if reason), None)


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    n = c + 1
    branches = (n, 1, 3, 3), (n,), (4 * n, 1, 3, 3), (4 * n,)
    return (b, c, h, w), (2 * n, c), (2 * n,), *branches, *4 * ((2,),)


_NAMES = (f"{branch}_{part}" for branch in ("spatial", "wavelet") for part in ("weight", "bias"))

OPERATOR = register(
    Operator(
        "local_branches",
        (Image("x"), *map(Parameter, ("in_weight", "in_bias", *_NAMES, "dec_lo", "dec_hi", "rec_lo", "rec_hi"))),
        _definition,
        _fake,
        _limits,
        _example,
        outputs=("spatial", "wavelet", "spatial_sums", "wavelet_sums"),
        differentiable=False,
    )
)
