"""SWFormer in plain PyTorch: the definition that tests, benchmarks and the fallback use."""

from .attention import ChannelAttention, channel_attention
from .block import MultiDomainMixer, SWFormerBlock
from .ffn import MultiScaleFFN, multiscale_ffn
from .fourier import FourierBranch, fourier_mix
from .haar import HaarDWT2d, HaarIDWT2d, haar_dwt2d, haar_idwt2d
from .network import PRESETS, SWFormer
from .norm import channel_statistics
from .pointwise import pointwise
from .spatial import SpatialBranch, depthwise_gelu
from .wavelet import WaveletBranch, wavelet_mix

__all__ = [
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
    "channel_attention",
    "channel_statistics",
    "depthwise_gelu",
    "fourier_mix",
    "haar_dwt2d",
    "haar_idwt2d",
    "multiscale_ffn",
    "pointwise",
    "wavelet_mix",
]
