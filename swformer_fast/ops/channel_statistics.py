"""Mean and variance of each channel of a batch."""

import torch
from torch import Tensor

from .. import reference
from ._limits import contiguous_maps
from ._operator import Image, Operator, register


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.shape[1]), dtype=dtype), x.new_empty(x.shape[1], dtype=torch.float64)


OPERATOR = register(
    Operator(
        "channel_statistics",
        (Image("x"),),
        reference.channel_statistics,
        _fake,
        contiguous_maps,
        lambda b, c, h, w, optional: ((b, c, h, w),),
        outputs=("statistics", "mean"),
        kept=("mean",),
    )
)
