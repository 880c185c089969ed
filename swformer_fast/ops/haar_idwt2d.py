"""The inverse of the two-dimensional Haar wavelet transform."""

from torch import Tensor

from .. import reference
from .._layout import empty
from ._limits import no_triton_fp64
from ._operator import Image, Number, Operator, Parameter, register


def _definition(y: Tensor, rec_lo: Tensor, rec_hi: Tensor, height: int, width: int) -> Tensor:
    return reference.haar_idwt2d(y, rec_lo, rec_hi, (height, width))


OPERATOR = register(
    Operator(
        "haar_idwt2d",
        (Image("y"), Parameter("rec_lo"), Parameter("rec_hi"), Number("height", "SymInt"), Number("width", "SymInt")),
        _definition,
        lambda y, rec_lo, rec_hi, height, width: empty(y, y.shape[0], y.shape[1] // 4, height, width),
        no_triton_fp64,
        lambda b, c, h, w, optional: ((b, 4 * c, (h + 1) // 2, (w + 1) // 2), (2,), (2,), h, w),
        outputs=("x",),
    )
)
