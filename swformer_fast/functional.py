"""The public functions: each checks its arguments and calls its op.

All take (B, C, H, W) images of dtype float32, float64, float16 or bfloat16 in any memory layout; a channels_last input
gives a channels_last output, any other a contiguous one. Parameters may be float32 beside a half-precision image; the
arithmetic is then fp32 and the output has the image's dtype. Under autocast the image is cast to the autocast dtype, as
conv2d does. Gradients exist to the image and every parameter, are the same bits in every run and for every number of
threads, and can be differentiated again (through the reference). torch.compile takes each op whole (no graph break).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers the operators)

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_image(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one channel, row and column, got shape {tuple(x.shape)}")


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(parameter).__name__}")
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if parameter.dtype not in (x.dtype, torch.float32) and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have the dtype of the image ({x.dtype}) or float32, got {parameter.dtype}")
    if parameter.dtype not in _FLOATING:
        raise TypeError(f"{name} must be a floating tensor, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on the image's device, {x.device}, got {parameter.device}")


def _taps(low_name: str, low: Tensor | None, high_name: str, high: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = math.sqrt(0.5)
    low = torch.full((2,), s, dtype=dtype, device=x.device) if low is None else low
    high = torch.tensor((s, -s), dtype=dtype, device=x.device) if high is None else high
    _check_parameter(low_name, low, (2,), x)
    _check_parameter(high_name, high, (2,), x)
    return low, high


def haar_dwt2d(x: Tensor, dec_lo: Tensor | None = None, dec_hi: Tensor | None = None) -> Tensor:
    """One level of the 2-D Haar wavelet transform, with learnable two-tap filters shared by the channels.

    Equal to, with f_LL = outer(dec_lo, dec_lo), f_LH = outer(dec_hi, dec_lo), f_HL = outer(dec_lo, dec_hi),
    f_HH = outer(dec_hi, dec_hi) (rows along H)::

        y[:, k * C + c] = F.conv2d(x[:, c : c + 1], f_k[None, None], stride=2)[:, 0]     k = LL, LH, HL, HH

    Args:
        x: (B, C, H, W), H, W >= 1. An odd side is extended by one replicated sample at the bottom or right
            (pywt's "symmetric").
        dec_lo, dec_hi: (2,), taps as in cross-correlation. None means Haar, (s, s) and (s, -s), s = 1 / sqrt(2); then
            the four groups are cA, cH, cV, cD of `pywt.dwt2(x, "haar")`.

    Returns:
        (B, 4 * C, ceil(H / 2), ceil(W / 2)), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, filter shape or device; an empty image.

    Falls back to the reference where neither the compiled extension (CPU) nor Triton (GPU; no float64) can run:
    `swformer_fast.why_not("haar_dwt2d", x, dec_lo, dec_hi)`.
    Source: SWFormer (arXiv 2505.05504), wavelet branch; filters as in the authors' PW-FNet.
    """
    _check_image("x", x)
    dec_lo, dec_hi = _taps("dec_lo", dec_lo, "dec_hi", dec_hi, x)
    return torch.ops.swformer_fast.haar_dwt2d(x, dec_lo, dec_hi)


def haar_idwt2d(
    y: Tensor,
    rec_lo: Tensor | None = None,
    rec_hi: Tensor | None = None,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """The inverse of `haar_dwt2d` for orthonormal filters (Haar's are), its transpose for any filters.

    Equal to, with the filters f_k of `haar_dwt2d` built from rec_lo and rec_hi::

        x[:, c] = sum(F.conv_transpose2d(y[:, k * C + c][:, None], f_k[None, None], stride=2)[:, 0] for k in range(4))

    Args:
        y: (B, 4 * C, h, w), groups LL, LH, HL, HH.
        rec_lo, rec_hi: (2,). None means Haar.
        output_size: (H, W) with ceil(H / 2) = h and ceil(W / 2) = w: the result is cropped to it, which restores odd
            sizes. None means (2 * h, 2 * w).

    Returns:
        (B, C, H, W), in y's dtype.

    Raises:
        TypeError, ValueError: as `haar_dwt2d`; channels that 4 does not divide; an output_size that does not fit.

    Falls back as `haar_dwt2d` does. Source: SWFormer (arXiv 2505.05504), wavelet branch.
    """
    _check_image("y", y)
    if y.shape[1] % 4:
        raise ValueError(f"y must have 4 * C channels (LL, LH, HL, HH), got {y.shape[1]}")
    rec_lo, rec_hi = _taps("rec_lo", rec_lo, "rec_hi", rec_hi, y)
    rows, cols = y.shape[2], y.shape[3]
    height, width = (2 * rows, 2 * cols) if output_size is None else output_size
    if (height + 1) // 2 != rows or (width + 1) // 2 != cols:
        raise ValueError(
            f"output_size must be ({2 * rows - 1} or {2 * rows}, {2 * cols - 1} or {2 * cols}) for y of "
            f"{rows} x {cols}, got ({height}, {width})"
        )
    return torch.ops.swformer_fast.haar_idwt2d(y, rec_lo, rec_hi, height, width)
