"""SWFormer in plain PyTorch: the definition that tests, benchmarks and the fallback use."""

from .haar import HaarDWT2d, HaarIDWT2d, haar_dwt2d, haar_idwt2d

__all__ = [
    "HaarDWT2d",
    "HaarIDWT2d",
    "haar_dwt2d",
    "haar_idwt2d",
]
