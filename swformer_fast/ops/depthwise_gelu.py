"""The spatial branch: a depthwise convolution and GELU."""

from typing import Any

from torch import Tensor

from .. import reference
from .._layout import empty
from ._limits import kernel_size, no_triton_fp64
from ._operator import Image, Operator, Parameter, register

SIDES = {"cpp": (3, 5, 7), "triton": (3,)}


def limits(backend: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return kernel_size(weight, SIDES.get(backend)) or no_triton_fp64(backend, x)


OPERATOR = register(
    Operator(
        "depthwise_gelu",
        (Image("x"), Parameter("weight"), Parameter("bias")),
        reference.depthwise_gelu,
        lambda x, *parameters: empty(x, *x.shape),
        limits,
        lambda b, c, h, w, optional: ((b, c, h, w), (c, 1, 3, 3), (c,)),
        sums=True,
    )
)
