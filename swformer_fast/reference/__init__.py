"""SWFormer in plain PyTorch: the definition that tests, benchmarks and the fallback use."""

from .block import MultiDomainMixer, SWFormerBlock
from .channel_attention import ChannelAttention, channel_attention
from .channel_statistics import channel_statistics
from .depthwise_gelu import SpatialBranch, depthwise_gelu
from .fold_attention import fold_attention
from .fold_norm import fold_norm
from .fourier_mix import FourierBranch, fourier_mix
from .haar_dwt2d import HaarDWT2d, haar_dwt2d
from .haar_idwt2d import HaarIDWT2d, haar_idwt2d
from .local_branches import local_branches
from .multiscale_ffn import MultiScaleFFN, multiscale_ffn
from .network import EXITS, PRESETS, SWFormer
from .pointwise import pointwise
from .swformer_block import swformer_block
from .wavelet_mix import WaveletBranch, wavelet_mix

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
    "channel_attention",
    "channel_statistics",
    "depthwise_gelu",
    "fold_attention",
    "fold_norm",
    "fourier_mix",
    "haar_dwt2d",
    "haar_idwt2d",
    "local_branches",
    "multiscale_ffn",
    "pointwise",
    "swformer_block",
    "wavelet_mix",
]
