"""The Fourier branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._layout import empty
from ..parameters import FourierParameters, unflatten
from ._operator import Image, Input, Number, Operator, Parameter, Statistic, register

_FACTORS = tuple(
    kind(f"{factor}_{name}", optional)
    for factor in ("gate", "value")
    for kind, name, optional in (
        (Statistic, "mean", True),
        (Statistic, "variance", True),
        (Parameter, "scale", False),
        (Parameter, "shift", False),
        (Parameter, "weight", False),
        (Parameter, "bias", False),
    )
)
_INPUTS: tuple[Input, ...] = (
    Image("x"),
    Parameter("in_weight"),
    Parameter("in_bias"),
    *_FACTORS,
    Parameter("out_weight", optional=True),
    Parameter("out_bias", optional=True),
    Number("eps", "float"),
)


def _no_statistics(x: Tensor, parameters: FourierParameters) -> tuple[Tensor, Tensor]:
    """The moments and statistics of the op where there are none: empty, or 0 for an empty batch."""
    norm, dim = parameters.gate.norm, x.shape[1]
    batch_statistics, dtype = norm.running_mean is None, torch.promote_types(norm.weight.dtype, torch.float32)
    moments = torch.zeros((2, dim, dim + 1) if batch_statistics else (0,), dtype=torch.float64, device=x.device)
    return moments, torch.zeros((4, norm.weight.shape[0]) if batch_statistics else (0,), dtype=dtype, device=x.device)


def _definition(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *flat, eps = arguments
    parameters = unflatten(FourierParameters, flat)
    batch_statistics = parameters.gate.norm.running_mean is None
    moments, statistics = _no_statistics(x, parameters)
    if batch_statistics:  # with momentum 1 the running statistics become the batch's
        gate, value = (
            factor._replace(norm=factor.norm._replace(running_mean=mean, running_var=variance))
            for factor, (mean, variance) in zip(parameters.factors, statistics.view(2, 2, -1), strict=True)
        )
        parameters = parameters._replace(gate=gate, value=value)
    y = reference.fourier_mix(x, parameters, batch_statistics, 1.0, eps)
    if batch_statistics and x.shape[0]:
        parts = torch.view_as_real(torch.fft.rfft2(x.detach().double(), norm="ortho")).permute(4, 1, 0, 2, 3)
        parts = torch.cat((parts, torch.ones_like(parts[:, :1])), 1)
        parts[..., 0, 0] = 0
        parts = parts.flatten(2)
        moments = parts[:, :-1] @ parts.mT
    return y, moments, statistics


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters = unflatten(FourierParameters, arguments[:-1])
    last = parameters.out_weight
    channels = parameters.in_weight.shape[0] // 2 if last is None else last.shape[0]
    return empty(x, x.shape[0], channels, *x.shape[2:]), *_no_statistics(x, parameters)


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    inner, parts = (c + 1, 2 * c + 2) if optional else (c, 2 * c)
    factor = (*2 * ((parts,) if optional else None,), (parts,), (parts,), (parts, parts, 1, 1), (parts,))
    last = ((c + 2, inner, 1, 1), (c + 2,)) if optional else (None, None)
    return (b, c, h, w), (parts, c, 1, 1), (parts,), *2 * factor, *last, 1e-5


OPERATOR = register(
    Operator(
        "fourier_mix",
        _INPUTS,
        _definition,
        _fake,
        lambda backend, x, *args: "the kernels take no float64" if x.dtype == torch.float64 else None,
        _example,
        outputs=("y", "moments", "statistics"),
        kept=("moments",),
        sums=True,
        products=True,
    )
)
