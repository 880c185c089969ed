"""The multi-scale feed-forward network."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import empty
from ..parameters import FfnParameters, unflatten
from ._operator import Image, Operator, Parameter, register

_DEPTHWISE = tuple(f"dw_{part}{scale}" for scale in (1, 2, 4) for part in ("weight", "bias"))
_NAMES = ("in_weight", "in_bias", *_DEPTHWISE, "out_weight", "out_bias")
_KERNELS = tuple(i for i, name in enumerate(_NAMES) if name.startswith("dw_weight"))


def _definition(x: Tensor, *parameters: Tensor) -> Tensor:
    return reference.multiscale_ffn(x, unflatten(FfnParameters, parameters))


def _fake(x: Tensor, *parameters: Tensor) -> Tensor:
    return empty(x, x.shape[0], unflatten(FfnParameters, parameters).out_weight.shape[0], *x.shape[2:])


def _limits(backend: str, x: Tensor, *args: Any) -> str | None:
    if x.dtype == torch.float64:
        return "multiscale_ffn has no float64 kernel"
    kernels = [args[i].shape[2:] for i in _KERNELS]
    return None if kernels == [(3, 3)] * 3 else f"the depthwise kernels must be 3 x 3, got {[*map(tuple, kernels)]}"


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    mid = c + 1
    return (b, c, h, w), (3 * mid, c, 1, 1), (3 * mid,), *3 * ((mid, 1, 3, 3), (mid,)), (c + 2, 3 * mid, 1, 1), (c + 2,)


OPERATOR = register(
    Operator(
        "multiscale_ffn",
        (Image("x"), *map(Parameter, _NAMES)),
        _definition,
        _fake,
        _limits,
        _example,
        residual=True,
        products=True,
    )
)
