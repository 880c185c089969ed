"""The mixer's last convolution with what is linear around it folded in, for each image."""

from typing import Any

from torch import Tensor

from .. import reference
from ._limits import no_triton_fp64
from ._operator import Number, Operator, Parameter, register

_SUMS = ("spatial_sums", "wavelet_sums", "fourier_sums")
_PARAMETERS = ("w1", "b1", "w2", "b2", "last_weight", "last_bias", "weight", "bias")


def _fake(spatial: Tensor, wavelet: Tensor, fourier: Tensor, *others: Any) -> Tensor:
    outputs = others[_PARAMETERS.index("bias")].shape[0]
    inputs = spatial.shape[1] + wavelet.shape[1] + fourier.shape[1]
    return spatial.new_empty(spatial.shape[0] * outputs * (inputs + 1))


def _example(b: int, c: int, h: int, w: int, optional: bool) -> tuple[Any, ...]:
    total = 3 * c + 3
    attention = (c + 1, total), (c + 1,), (total, c + 1), (total,)
    sums = (b, c), (b, c + 1), (b, c + 3)
    return *sums, *attention, (c + 2, c + 3), (c + 2,), (c, total), (c,), (c,) if optional else None, h * w


OPERATOR = register(
    Operator(
        "fold_attention",
        (
            *map(Parameter, (*_SUMS, *_PARAMETERS)),
            Parameter("scale", optional=True),
            Number("area", "SymInt"),
        ),
        reference.fold_attention,
        _fake,
        no_triton_fp64,
        _example,
        products=True,
    )
)
