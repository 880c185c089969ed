"""A whole SWFormer block without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import empty
from ..parameters import BlockParameters, unflatten
from ._limits import contiguous_maps
from ._operator import Image, Input, Number, Operator, Parameter, Statistic, register

_EPS = ("eps1", "eps2", "fourier_eps")


def _norm(name: str) -> tuple[Image, ...]:
    return *(Statistic(f"{name}_{part}") for part in ("mean", "variance")), *_parameters(name, "scale", "shift")


def _parameters(name: str, *parts: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(f"{name}_{part}") for part in parts)


def _convolution(name: str) -> tuple[Parameter, ...]:
    return _parameters(name, "weight", "bias")


def _factor(name: str) -> tuple[Image, ...]:
    return *_norm(name), *_convolution(name)


_INPUTS: tuple[Input, ...] = (
    Image("x"),
    *_norm("norm1"),
    *_convolution("conv_in"),
    *_convolution("spatial"),
    *_convolution("wavelet"),
    *_parameters("wavelet", "dec_lo", "dec_hi", "rec_lo", "rec_hi"),
    *_convolution("fourier_in"),
    *_factor("gate"),
    *_factor("value"),
    *_convolution("fourier_out"),
    *_parameters("attention", "w1", "b1", "w2", "b2"),
    *_convolution("conv_out"),
    Parameter("beta"),
    *_norm("norm2"),
    *_convolution("ffn_in"),
    *(parameter for scale in (1, 2, 4) for parameter in _parameters("ffn", f"dw_weight{scale}", f"dw_bias{scale}")),
    *_convolution("ffn_out"),
    Parameter("gamma"),
    *(Number(name, "float") for name in _EPS),
)
_DEPTHWISE = tuple(
    i for i, spec in enumerate(_INPUTS) if spec.name in ("spatial_weight", "wavelet_weight") or "dw_weight" in spec.name
)


def _definition(x: Tensor, *arguments: Any) -> Tensor:
    flat, eps = arguments[: -len(_EPS)], arguments[-len(_EPS) :]
    return reference.swformer_block(x, unflatten(BlockParameters, flat), *eps)


def _limits(backend: str, *args: Any) -> str | None:
    if args[0].dtype == torch.float64:
        return f"the kernels take no {args[0].dtype}"
    if any(args[i].shape[2:] != (3, 3) for i in _DEPTHWISE):
        return "the depthwise kernels must be 3 x 3"
    return contiguous_maps(backend, args[0])


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    def depthwise(n: int) -> tuple[Any, ...]:
        return (n, 1, 3, 3), (n,)

    def convolution(outputs: int, inputs: int) -> tuple[Any, ...]:
        return (outputs, inputs, 1, 1), (outputs,)

    factor = (*4 * ((2 * c,),), *convolution(2 * c, 2 * c))
    fourier = (*convolution(2 * c, c), *factor, *factor, *convolution(c, c))
    attention, scale = (*convolution(c + 1, 3 * c), *convolution(3 * c, c + 1)), (1, c, 1, 1)
    mixer = (*convolution(3 * c, c), *depthwise(c), *depthwise(4 * c), *4 * ((2,),), *fourier, *attention)
    ffn = (*convolution(3 * c + 3, c), *3 * depthwise(c + 1), *convolution(c, 3 * c + 3))
    norm = 4 * ((c,),)
    return (b, c, h, w), *norm, *mixer, *convolution(c, 3 * c), scale, *norm, *ffn, scale, 1e-5, 1e-4, 1e-3


OPERATOR = register(
    Operator(
        "swformer_block",
        _INPUTS,
        _definition,
        lambda x, *arguments: empty(x, *x.shape),
        _limits,
        _example,
        differentiable=False,
        products=True,
    )
)
