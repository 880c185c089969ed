"""The public functions with arguments for an image's shape: what `correct`, `prefill` and `roofline` go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import swformer_fast as sf

from . import bench_attention, bench_ffn, bench_fourier, bench_haar, bench_spatial, bench_wavelet
from .families import Function

ARGUMENTS: dict[str, Callable[..., Sequence[Any]]] = {
    "multiscale_ffn": bench_ffn.make_args,
    "fourier_mix": bench_fourier.branch_args,
    "channel_attention": bench_attention.make_args,
    "wavelet_mix": bench_wavelet.arguments,
    "depthwise_gelu": bench_spatial.arguments,
    "haar_dwt2d": bench_haar.dwt_args,
    "haar_idwt2d": bench_haar.idwt_args,
}
"""Those with matrix products first."""


def functions(name: str) -> tuple[Function, Function]:
    """The fast function and its reference; the Fourier branch trains where a gradient is recorded."""
    fast, reference = getattr(sf.functional, name), getattr(sf.reference, name)
    in_mode = bench_fourier.in_mode
    return (in_mode(fast), in_mode(reference)) if name == "fourier_mix" else (fast, reference)
