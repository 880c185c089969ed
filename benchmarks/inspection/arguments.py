"""The public functions with arguments for an image's shape: what `correct`, `prefill` and `roofline` go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import swformer_fast as sf

from .. import (
    bench_channel_attention,
    bench_depthwise_gelu,
    bench_fourier_mix,
    bench_haar,
    bench_multiscale_ffn,
    bench_wavelet_mix,
)
from ..op_cases import Function

ARGUMENTS: dict[str, Callable[..., Sequence[Any]]] = {
    "multiscale_ffn": bench_multiscale_ffn.arguments,
    "fourier_mix": bench_fourier_mix.arguments,
    "channel_attention": bench_channel_attention.arguments,
    "wavelet_mix": bench_wavelet_mix.arguments,
    "depthwise_gelu": bench_depthwise_gelu.arguments,
    "haar_dwt2d": bench_haar.dwt_arguments,
    "haar_idwt2d": bench_haar.idwt_arguments,
}
"""Those with matrix products first."""


def functions(name: str) -> tuple[Function, Function]:
    """The fast function and its reference; the Fourier branch trains where a gradient is recorded."""
    fast, reference = getattr(sf.functional, name), getattr(sf.reference, name)
    in_mode = bench_fourier_mix.in_mode
    return (in_mode(fast), in_mode(reference)) if name == "fourier_mix" else (fast, reference)
