"""One level of the two-dimensional Haar wavelet transform."""

from .. import reference
from .._layout import empty
from ._limits import no_triton_fp64
from ._operator import Image, Operator, Parameter, register

OPERATOR = register(
    Operator(
        "haar_dwt2d",
        (Image("x"), Parameter("dec_lo"), Parameter("dec_hi")),
        reference.haar_dwt2d,
        lambda x, *taps: empty(x, x.shape[0], 4 * x.shape[1], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2),
        no_triton_fp64,
        lambda b, c, h, w, optional: ((b, c, h, w), (2,), (2,)),
    )
)
