"""The wavelet branch."""

from typing import Any

from torch import Tensor

from .. import reference
from .._layout import empty
from ._limits import kernel_size, no_triton_fp64
from ._operator import Image, Operator, Parameter, register

SIDES = {"cpp": (3, 5, 7), "triton": (3, 5)}


def limits(backend: str, x: Tensor, weight: Tensor, *args: Any) -> str | None:
    return kernel_size(weight, SIDES.get(backend)) or no_triton_fp64(backend, x)


OPERATOR = register(
    Operator(
        "wavelet_mix",
        (Image("x"), *map(Parameter, ("weight", "bias", "dec_lo", "dec_hi", "rec_lo", "rec_hi"))),
        reference.wavelet_mix,
        lambda x, *parameters: empty(x, *x.shape),
        limits,
        lambda b, c, h, w, optional: ((b, c, h, w), (4 * c, 1, 3, 3), (4 * c,), *4 * ((2,),)),
        sums=True,
    )
)
