"""The public functions: each checks its arguments and calls its op.

All take (B, C, H, W) images of dtype float32, float64, float16 or bfloat16 in any memory layout; a channels_last input
gives a channels_last output, any other a contiguous one. Parameters may be float32 beside a half-precision image; the
arithmetic is then fp32 and the output has the image's dtype. Under autocast the image is cast to the autocast dtype, as
conv2d does. Gradients exist to the image and every parameter, are the same bits in every run and for every number of
threads, and can be differentiated again (through the reference). torch.compile takes each op whole (no graph break).
torch.func transforms (grad, vmap, ...) raise RuntimeError: PyTorch has none for operators registered this way; the
functions of `swformer_fast.reference` take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backend import has_cpp
from .reference.fourier import BatchNormState
from .reference.haar import haar_filters

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    # torch.amp.is_autocast_available knows which devices have it, but torch 2.11 cannot compile it.
    device = x.device.type
    return device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device)


def _check_image(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one channel, row and column, got shape {tuple(x.shape)}")


def _check_parameter(name: str, parameter: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if (
        isinstance(parameter, Tensor)
        and parameter.shape == shape
        and parameter.dtype in (x.dtype, torch.float32)
        and parameter.device == x.device
    ):
        return
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(parameter).__name__}")
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if parameter.dtype not in (x.dtype, torch.float32) and not autocasts(x):
        raise TypeError(f"{name} must have the dtype of the image ({x.dtype}) or float32, got {parameter.dtype}")
    if parameter.dtype not in _FLOATING:
        raise TypeError(f"{name} must be a floating tensor, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on the image's device, {x.device}, got {parameter.device}")


def _shape(parameter: Any) -> Any:
    return tuple(parameter.shape) if isinstance(parameter, Tensor) else type(parameter).__name__


def _kernel(name: str, weight: Tensor) -> tuple[int, int]:
    """The (k, k) of a depthwise weight, k odd."""
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        raise ValueError(f"{name} must have shape (channels, 1, k, k), got {_shape(weight)}")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"{name} must have a square kernel of odd side, got {tuple(weight.shape[2:])}")
    return weight.shape[2], weight.shape[3]


def _taps(low_name: str, low: Tensor | None, high_name: str, high: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    if low is None or high is None:
        haar_low, haar_high = haar_filters(torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
        low, high = haar_low if low is None else low, haar_high if high is None else high
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


def wavelet_mix(
    x: Tensor, weight: Tensor, bias: Tensor, dec_lo: Tensor, dec_hi: Tensor, rec_lo: Tensor, rec_hi: Tensor
) -> Tensor:
    """The wavelet branch: DWT, depthwise convolution of the 4 C sub-bands, inverse DWT::

        y = haar_dwt2d(x, dec_lo, dec_hi)
        y = F.conv2d(y, weight, bias, padding=k // 2, groups=4 * C)
        haar_idwt2d(y, rec_lo, rec_hi, output_size=(H, W))

    Args:
        x: (B, C, H, W), any H, W >= 1.
        weight: (4 * C, 1, k, k), k odd. bias: (4 * C,).
        dec_lo, dec_hi, rec_lo, rec_hi: (2,).

    Returns:
        (B, C, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, shape or device; an empty image.

    Source: SWFormer (arXiv 2505.05504), wavelet branch.
    """
    _check_image("x", x)
    channels = 4 * x.shape[1]
    _check_parameter("weight", weight, (channels, 1, *_kernel("weight", weight)), x)
    _check_parameter("bias", bias, (channels,), x)
    for name, taps in (("dec_lo", dec_lo), ("dec_hi", dec_hi), ("rec_lo", rec_lo), ("rec_hi", rec_hi)):
        _check_parameter(name, taps, (2,), x)
    return torch.ops.swformer_fast.wavelet_mix(x, weight, bias, dec_lo, dec_hi, rec_lo, rec_hi, False)[0]


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The spatial branch, a depthwise convolution and exact (erf) GELU::

        F.gelu(F.conv2d(x, weight, bias, padding=k // 2, groups=C))

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd. bias: (C,).

    Returns:
        (B, C, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, shape or device; an empty image.

    Source: SWFormer (arXiv 2505.05504), spatial branch.
    """
    _check_image("x", x)
    _check_parameter("weight", weight, (x.shape[1], 1, *_kernel("weight", weight)), x)
    _check_parameter("bias", bias, (x.shape[1],), x)
    return torch.ops.swformer_fast.depthwise_gelu(x, weight, bias, False)[0]


def _local_branches(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, spatial: Sequence[Tensor], wavelet: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.local_branches`; without gradients in one pass, on the CPU, and the convolution's map never exists."""
    _check_image("x", x)
    channels = spatial[0].shape[0]
    _check_parameter("in_weight", in_weight, (2 * channels, x.shape[1]), x)
    _check_parameter("in_bias", in_bias, (2 * channels,), x)
    for name, (weight, bias, *taps), wide in (("spatial", spatial, channels), ("wavelet", wavelet, 4 * channels)):
        _check_parameter(f"{name} weight", weight, (wide, 1, *_kernel(f"{name} weight", weight)), x)
        _check_parameter(f"{name} bias", bias, (wide,), x)
        for tap in taps:
            _check_parameter(f"{name} taps", tap, (2,), x)
    alone = not torch.is_grad_enabled() and has_cpp(x.device.type)
    op = torch.ops.swformer_fast.local_branches if alone else ops.local_branches
    return op(x, in_weight, in_bias, *spatial, *wavelet)


def fourier_mix(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    gate_bn: BatchNormState,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_bn: BatchNormState,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The Fourier branch: a gated mix of the spectrum::

        def spectrum(u):                                           # real and imaginary parts of channel c at 2c, 2c + 1
            return view_as_real(rfft2(u, norm="ortho")).movedim(-1, 2).flatten(1, 2)

        gate, value = conv2d(x, in_weight, in_bias).chunk(2, dim=1)
        gate = sigmoid(conv2d(batch_norm(spectrum(gate), *gate_bn), gate_weight, gate_bias))
        value = gelu(conv2d(batch_norm(spectrum(value), *value_bn), value_weight, value_bias))
        y = gate * value
        y = irfft2(complex(y[:, 0::2], y[:, 1::2]), s=(H, W), norm="ortho")
        conv2d(y, out_weight, out_bias)

    Args:
        x: (B, D, H, W). Half-precision input is transformed in fp32.
        in_weight: (2 * C, D, 1, 1). in_bias: (2 * C,).
        gate_bn, value_bn: (running_mean, running_var, weight, bias), each (2 * C,). In training the running
            statistics are updated in place; they may be None, then the batch's are used in evaluation too.
        gate_weight, value_weight: (2 * C, 2 * C, 1, 1). gate_bias, value_bias: (2 * C,).
        out_weight: (E, C, 1, 1). out_bias: (E,). Both None: no last convolution, E = C.
        training, momentum, eps: as in F.batch_norm.

    Returns:
        (B, E, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, shape or device; an empty image; in training, one value per
            channel (B = H = W = 1).

    Backward recomputes everything from x. Falls back to the reference for float64.

    Source: SWFormer (arXiv 2505.05504), Fourier branch; the interleaved layout is that of the authors' SFHformer.
    """
    return _fourier_mix(
        x,
        in_weight,
        in_bias,
        gate_bn,
        gate_weight,
        gate_bias,
        value_bn,
        value_weight,
        value_bias,
        out_weight,
        out_bias,
        training,
        momentum,
        eps,
        False,
    )[0]


def _fourier_mix(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    gate_bn: BatchNormState,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_bn: BatchNormState,
    value_weight: Tensor,
    value_bias: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    need_sums: bool,
) -> tuple[Tensor, Tensor]:
    """`fourier_mix` and the sums of its result over the pixels, (B, E)."""
    _check_image("x", x)
    if not isinstance(in_weight, Tensor) or in_weight.dim() != 4 or in_weight.shape[0] % 2:
        raise ValueError(f"in_weight must have shape (2 * C, {x.shape[1]}, 1, 1), got {_shape(in_weight)}")
    last = out_weight is not None or out_bias is not None
    if last and (not isinstance(out_weight, Tensor) or out_weight.dim() != 4):
        raise ValueError(f"out_weight must have shape (E, {in_weight.shape[0] // 2}, 1, 1), got {_shape(out_weight)}")
    wide = in_weight.shape[0]
    for name, parameter, shape in (
        ("in_weight", in_weight, (wide, x.shape[1], 1, 1)),
        ("in_bias", in_bias, (wide,)),
        ("gate_weight", gate_weight, (wide, wide, 1, 1)),
        ("gate_bias", gate_bias, (wide,)),
        ("value_weight", value_weight, (wide, wide, 1, 1)),
        ("value_bias", value_bias, (wide,)),
    ):
        _check_parameter(name, parameter, shape, x)
    if out_weight is not None:
        _check_parameter("out_weight", out_weight, (out_weight.shape[0], wide // 2, 1, 1), x)
        _check_parameter("out_bias", out_bias, (out_weight.shape[0],), x)
    for name, state in (("gate_bn", gate_bn), ("value_bn", value_bn)):
        if len(state) != 4:
            raise ValueError(f"{name} must be (running_mean, running_var, weight, bias), got {len(state)} values")
        for part, tensor in zip(("running_mean", "running_var", "weight", "bias"), state, strict=True):
            if tensor is not None:
                _check_parameter(f"{name} {part}", tensor, (wide,), x)
            elif not part.startswith("running"):
                raise TypeError(f"{name} {part} must be a torch.Tensor, got None")
    if len({t is None for t in (*gate_bn[:2], *value_bn[:2])}) == 2:
        raise ValueError("gate_bn and value_bn must both have running statistics, or neither")
    batch_statistics = training or gate_bn[0] is None
    if batch_statistics and x.shape[0] * x.shape[2] * (x.shape[3] // 2 + 1) == 1:
        raise ValueError(f"x must have more than 1 value per channel to be normalised, got shape {tuple(x.shape)}")
    none = (None, None)
    y, sums, _, statistics = torch.ops.swformer_fast.fourier_mix(
        x,
        in_weight,
        in_bias,
        *(none if batch_statistics else gate_bn[:2]),
        *gate_bn[2:],
        gate_weight,
        gate_bias,
        *(none if batch_statistics else value_bn[:2]),
        *value_bn[2:],
        value_weight,
        value_bias,
        out_weight,
        out_bias,
        eps,
        need_sums,
    )
    if training and x.shape[0]:
        with torch.no_grad():
            for running, batch in zip((*gate_bn[:2], *value_bn[:2]), statistics.unbind(), strict=True):
                if running is not None:
                    running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)
    return y, sums


def multiscale_ffn(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    dw_weights: Sequence[Tensor],
    dw_biases: Sequence[Tensor],
    out_weight: Tensor,
    out_bias: Tensor,
) -> Tensor:
    """The multi-scale feed-forward network::

        parts = conv2d(x, in_weight, in_bias).chunk(3, dim=1)
        for part, s in zip(parts, (1, 2, 4)):
            z = avg_pool2d(part, s, ceil_mode=True)
            z = conv2d(z, dw_weight, dw_bias, padding=k // 2, groups=M)
            z = interpolate(z, size=(H, W), mode="bilinear", align_corners=False)
        conv2d(gelu(cat(all three z, dim=1)), out_weight, out_bias)

    Where s does not divide a side, the last window averages the samples that it holds, and the bilinear map goes from
    ceil(H / s) to exactly H samples.

    Args:
        x: (B, D, H, W).
        in_weight: (3 * M, D, 1, 1). in_bias: (3 * M,).
        dw_weights: three of (M, 1, k, k), k odd, for the scales 1, 2, 4. dw_biases: three of (M,).
        out_weight: (E, 3 * M, 1, 1). out_bias: (E,).

    Returns:
        (B, E, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, shape or device; an empty image.

    Backward recomputes everything from x and the parameters; sums over pixels are taken in fp32 within a strip of rows
    and in fp64 over the strips. Falls back to the reference for float64 and where k is not 3.
    Source: SWFormer (arXiv 2505.05504), multi-scale FFN.
    """
    _check_image("x", x)
    if not isinstance(in_weight, Tensor) or in_weight.dim() != 4 or in_weight.shape[0] % 3:
        raise ValueError(f"in_weight must have shape (3 * M, {x.shape[1]}, 1, 1), got {_shape(in_weight)}")
    last = out_weight is not None or out_bias is not None
    if last and (not isinstance(out_weight, Tensor) or out_weight.dim() != 4):
        raise ValueError(f"out_weight must have shape (E, {in_weight.shape[0]}, 1, 1), got {_shape(out_weight)}")
    if len(dw_weights) != 3 or len(dw_biases) != 3:
        raise ValueError(
            f"dw_weights and dw_biases must hold three tensors each, got {len(dw_weights)} and {len(dw_biases)}"
        )
    wide = in_weight.shape[0]
    _check_parameter("in_weight", in_weight, (wide, x.shape[1], 1, 1), x)
    _check_parameter("in_bias", in_bias, (wide,), x)
    for i, (weight, bias) in enumerate(zip(dw_weights, dw_biases, strict=True)):
        _check_parameter(f"dw_weights[{i}]", weight, (wide // 3, 1, *_kernel(f"dw_weights[{i}]", weight)), x)
        _check_parameter(f"dw_biases[{i}]", bias, (wide // 3,), x)
    _check_parameter("out_weight", out_weight, (out_weight.shape[0], wide, 1, 1), x)
    _check_parameter("out_bias", out_bias, (out_weight.shape[0],), x)
    depthwise = (t for pair in zip(dw_weights, dw_biases, strict=True) for t in pair)
    return torch.ops.swformer_fast.multiscale_ffn(x, in_weight, in_bias, *depthwise, out_weight, out_bias, None)


def channel_attention(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Scale each channel by its attention::

        x * sigmoid(conv2d(relu(conv2d(x.mean((2, 3), keepdim=True), w1, b1)), w2, b2))

    Args:
        x: (B, C, H, W).
        w1: (R, C, 1, 1). b1: (R,). w2: (C, R, 1, 1). b2: (C,).

    Returns:
        (B, C, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, shape or device; an empty image.

    On the CPU falls back to the reference for channels_last images. Source: SWFormer (arXiv 2505.05504), channel
    attention.
    """
    _check_image("x", x)
    if not isinstance(w1, Tensor) or w1.dim() != 4:
        raise ValueError(f"w1 must have shape (R, {x.shape[1]}, 1, 1), got {_shape(w1)}")
    hidden, channels = w1.shape[0], x.shape[1]
    _check_parameter("w1", w1, (hidden, channels, 1, 1), x)
    _check_parameter("b1", b1, (hidden,), x)
    _check_parameter("w2", w2, (channels, hidden, 1, 1), x)
    _check_parameter("b2", b2, (channels,), x)
    return torch.ops.swformer_fast.channel_attention(x, w1, b1, w2, b2)
