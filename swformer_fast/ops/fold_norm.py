"""A 1x1 convolution with what is linear around it folded in."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._limits import no_triton_fp64
from ._operator import Number, Operator, Parameter, register

_OPTIONAL = ("mean", "variance", "norm_weight", "norm_bias", "then_weight", "then_bias", "scale")


def _fake(weight: Tensor, bias: Tensor, *others: Any) -> Tensor:
    then_weight = others[_OPTIONAL.index("then_weight")]
    outputs = len(bias) if then_weight is None else len(bias) - then_weight.shape[1] + len(then_weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(outputs * (weight.shape[1] + 1), dtype=dtype)


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    others = (*4 * ((c,),), (c + 1, c + 2), (c + 1,), (2 * c + 1,)) if optional else len(_OPTIONAL) * (None,)
    return (2 * c + 2, c), (2 * c + 2,), *others, 1e-5


OPERATOR = register(
    Operator(
        "fold_norm",
        (
            Parameter("weight"),
            Parameter("bias"),
            *(Parameter(name, optional=True) for name in _OPTIONAL),
            Number("eps", "float"),
        ),
        reference.fold_norm,
        _fake,
        no_triton_fp64,
        _example,
        products=True,
    )
)
