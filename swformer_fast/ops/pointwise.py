"""A 1x1 convolution of up to three maps that are not concatenated, and a residual."""

from .. import reference
from .._layout import empty
from ._limits import contiguous_maps
from ._operator import Image, Operator, Parameter, register

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
        residual=True,
        products=True,
    )
)
