"""A 1x1 convolution of up to three maps that are not concatenated, and a residual."""

from typing import Any

from .. import reference
from .._layout import empty
from ._limits import contiguous_maps
from ._operator import Image, Operator, Parameter, register


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    channels = (c, c + 1, 2) if optional else (c, None, None)
    maps = (None if n is None else (b, n, h, w) for n in channels)
    return *maps, (1, c + 2, sum(n or 0 for n in channels)), (c + 2,)


OPERATOR = register(
    Operator(
        "pointwise",
        (
            Image("x0"),
            Image("x1", optional=True),
            Image("x2", optional=True),
            Parameter("weight"),
            Parameter("bias"),
        ),
        reference.pointwise,
        lambda x0, x1, x2, weight, bias: empty(x0, x0.shape[0], weight.shape[1], *x0.shape[2:]),
        contiguous_maps,
        _example,
        residual=True,
        products=True,
    )
)
