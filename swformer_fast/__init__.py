"""Fast SWFormer modules: spatial, wavelet and Fourier mixing for image restoration, in PyTorch.

`functional` and the modules run on the fastest backend that can take their input; `reference` defines both in plain
PyTorch, with the same state_dicts. Importing loads no compiler, no Triton and no compiled extension: those load at the
first call.
"""

from . import functional, parameters, pretrained, reference
from .backend import backends, empty_cache, use_backend, why_not
from .graphed import graphed
from .modules import (
    ChannelAttention,
    FourierBranch,
    HaarDWT2d,
    HaarIDWT2d,
    MultiDomainMixer,
    MultiScaleFFN,
    SpatialBranch,
    SWFormerBlock,
    WaveletBranch,
)
from .network import EXITS, PRESETS, SWFormer
from .replace import accelerate
from .tiling import restore_tiled

__all__ = [
    "EXITS",
    "PRESETS",
    "ChannelAttention",
    "FourierBranch",
    "HaarDWT2d",
    "HaarIDWT2d",
    "MultiDomainMixer",
    "MultiScaleFFN",
    "SWFormer",
    "SWFormerBlock",
    "SpatialBranch",
    "WaveletBranch",
    "accelerate",
    "backends",
    "empty_cache",
    "functional",
    "graphed",
    "parameters",
    "pretrained",
    "reference",
    "restore_tiled",
    "use_backend",
    "why_not",
]
