"""Channel attention."""

from typing import Any

from torch import Tensor

from .. import reference
from .._layout import empty
from ..parameters import AttentionParameters
from ._limits import contiguous_maps, no_triton_fp64
from ._operator import Image, Operator, Parameter, register


def _limits(backend: str, x: Tensor, *args: Any) -> str | None:
    return no_triton_fp64(backend, x) if backend == "triton" else contiguous_maps(backend, x)


OPERATOR = register(
    Operator(
        "channel_attention",
        (Image("x"), *map(Parameter, AttentionParameters._fields)),
        lambda x, *parameters: reference.channel_attention(x, AttentionParameters(*parameters)),
        lambda x, *parameters: empty(x, *x.shape),
        _limits,
        lambda b, c, h, w, optional: ((b, c, h, w), (c + 1, c, 1, 1), (c + 1,), (c, c + 1, 1, 1), (c,)),
    )
)
