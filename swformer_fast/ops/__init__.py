"""The catalogue: one file an op, named as it is. Importing a file registers its op; `CATALOGUE` holds all by name."""

from . import (  # noqa: F401
    channel_attention,
    channel_statistics,
    depthwise_gelu,
    fold_attention,
    fold_norm,
    fourier_mix,
    haar_dwt2d,
    haar_idwt2d,
    local_branches,
    multiscale_ffn,
    pointwise,
    swformer_block,
    wavelet_mix,
)
from ._flops import register_when_counted
from ._operator import CATALOGUE, Operator

__all__ = ["CATALOGUE", "Operator"]

register_when_counted()
