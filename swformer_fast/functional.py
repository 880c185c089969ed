"""The public functions: each checks its arguments and calls its op.

All take (B, C, H, W) images of dtype float32, float64, float16 or bfloat16 in any memory layout; a channels_last input
gives a channels_last output, any other a contiguous one. Parameters may be float32 beside a half-precision image; the
arithmetic is then fp32 and the output has the image's dtype. Under autocast the image is cast to the autocast dtype, as
conv2d does. Gradients exist to the image and every parameter, are the same bits in every run and for every number of
threads, and can be differentiated again (through the reference). torch.compile takes each op whole (no graph break);
FlopCounterMode counts what the definition takes. torch.func transforms (grad, vjp, jvp, jacrev, hessian) and forward
mode take the definition in place of the kernels; vmap calls an op for one element after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import ops  # noqa: F401
from .parameters import (
    AttentionParameters,
    BlockParameters,
    Convolution,
    Factor,
    FfnParameters,
    FourierParameters,
    Norm,
    SpatialParameters,
    WaveletParameters,
    flatten,
)
from .reference.common import check_flag, check_integer, check_number, check_sequence
from .reference.haar_dwt2d import haar_filters

__all__ = [
    "channel_attention",
    "depthwise_gelu",
    "fourier_mix",
    "haar_dwt2d",
    "haar_idwt2d",
    "multiscale_ffn",
    "wavelet_mix",
]

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    # torch.amp.is_autocast_available knows which devices have it, but torch 2.11 cannot compile it.
    device = x.device.type
    return device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device)


def check_dense(name: str, x: Any) -> None:
    """Raise unless it is a tensor with strides: of any other PyTorch says no more than what it cannot run."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_floating(name: str, x: Any) -> None:
    check_dense(name, x)
    if x.dtype not in _FLOATING:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16, got {x.dtype}")


def _check_real(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise where one of them is a FakeTensor that the other cannot meet."""
    for fake, real in ((x, other), (other, x)):
        if isinstance(fake, FakeTensor) and type(real) in _PLAIN and not fake.fake_mode.allow_non_fake_inputs:
            got = "one" if fake is x else "none"
            raise TypeError(f"{name} must be a FakeTensor where {other_name} is one, and else none, got {got}")


def check_input(name: str, x: Tensor, parameter: Tensor) -> None:
    """Raise unless a module with this parameter can take the image x. Devices may differ: hooks bring parameters."""
    check_image(name, x)
    if x.is_meta and not parameter.is_meta:
        raise ValueError(f"{name} must be on the device of the parameters, {parameter.device}, got {x.device}")
    _check_real(name, x, "the parameters", parameter)


def check_image(name: str, x: Any) -> None:
    check_floating(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one channel, row and column, got shape {tuple(x.shape)}")


def _check_parameter(name: str, parameter: Any, shape: tuple[int, ...], x: Tensor) -> None:
    if (
        type(parameter) in _PLAIN
        and type(x) in _PLAIN
        and parameter.layout is torch.strided
        and not parameter.is_nested
        and parameter.shape == shape
        and parameter.dtype in (x.dtype, torch.float32)
        and parameter.device == x.device
    ):
        return
    check_dense(name, parameter)
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if parameter.dtype not in (x.dtype, torch.float32) and not autocasts(x):
        raise TypeError(f"{name} must have the dtype of the image ({x.dtype}) or float32, got {parameter.dtype}")
    if parameter.dtype not in _FLOATING:
        raise TypeError(f"{name} must be a floating tensor, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on the image's device, {x.device}, got {parameter.device}")
    _check_real(name, parameter, "the image", x)


def _check_bundle(name: str, bundle: Any, kind: type[tuple[Any, ...]]) -> None:
    """Raise unless `bundle` is one of `kind`."""
    if not isinstance(bundle, kind):
        fields = ", ".join(kind._fields)  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a swformer_fast.parameters.{kind.__name__} ({fields}), got {_shape(bundle)}")


def _shape(parameter: Any) -> Any:
    return tuple(parameter.shape) if isinstance(parameter, Tensor) else type(parameter).__name__


def _outputs(name: str, weight: Any, shape: str, parts: int = 1) -> int:
    """The first extent of a weight of rank 4, a multiple of `parts`; `shape`: what it must have, in words."""
    check_dense(name, weight)
    if weight.dim() != 4 or weight.shape[0] % parts or weight.shape[0] == 0:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(weight.shape)}")
    return weight.shape[0]


def _kernel(name: str, weight: Tensor) -> tuple[int, int]:
    """The (k, k) of a depthwise weight, k odd."""
    _outputs(name, weight, "(channels, 1, k, k)")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"{name} must have a square kernel of odd side, got {tuple(weight.shape[2:])}")
    return weight.shape[2], weight.shape[3]


def _check_depthwise(prefix: str, weight: Tensor, bias: Tensor, channels: int, x: Tensor) -> None:
    name = f"{prefix}weight"
    _check_parameter(name, weight, (channels, 1, *_kernel(name, weight)), x)
    _check_parameter(f"{prefix}bias", bias, (channels,), x)


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
        TypeError, ValueError: wrong type, layout, dtype, rank, filter shape or device; an empty image.

    Falls back to the reference where neither the compiled extension (CPU) nor Triton (GPU; no float64) can run:
    `swformer_fast.why_not("haar_dwt2d", x, dec_lo, dec_hi)`.
    Source: SWFormer (arXiv 2505.05504), wavelet branch; filters as in the authors' PW-FNet.
    """
    check_image("x", x)
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
        TypeError, ValueError: as `haar_dwt2d`; channels that 4 does not divide; an output_size that is no
            pair of ints or does not fit.

    Falls back as `haar_dwt2d` does. Source: SWFormer (arXiv 2505.05504), wavelet branch.
    """
    check_image("y", y)
    if y.shape[1] % 4:
        raise ValueError(f"y must have 4 * C channels (LL, LH, HL, HH), got {y.shape[1]}")
    rec_lo, rec_hi = _taps("rec_lo", rec_lo, "rec_hi", rec_hi, y)
    rows, cols = y.shape[2], y.shape[3]
    height, width = 2 * rows, 2 * cols
    if output_size is not None:
        check_sequence("output_size", output_size, 2)
        height, width = (check_integer(f"output_size[{i}]", side) for i, side in enumerate(output_size))
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
        TypeError, ValueError: wrong type, layout, dtype, rank, shape or device; an empty image or weight.

    Source: SWFormer (arXiv 2505.05504), wavelet branch.
    """
    check_image("x", x)
    _check_wavelet("", WaveletParameters(weight, bias, dec_lo, dec_hi, rec_lo, rec_hi), x.shape[1], x)
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
        TypeError, ValueError: wrong type, layout, dtype, rank, shape or device; an empty image or weight.

    Source: SWFormer (arXiv 2505.05504), spatial branch.
    """
    check_image("x", x)
    _check_depthwise("", weight, bias, x.shape[1], x)
    return torch.ops.swformer_fast.depthwise_gelu(x, weight, bias, False)[0]


def check_local_branches(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, spatial: SpatialParameters, wavelet: WaveletParameters
) -> None:
    """Raise unless they fit: the kernels of the fused block read parameters of other modules."""
    check_image("x", x)
    channels = spatial.weight.shape[0]
    _check_parameter("in_weight", in_weight, (2 * channels, x.shape[1]), x)
    _check_parameter("in_bias", in_bias, (2 * channels,), x)
    _check_depthwise("spatial.", *spatial, channels, x)
    _check_wavelet("wavelet.", wavelet, channels, x)


def _check_wavelet(prefix: str, parameters: WaveletParameters, channels: int, x: Tensor) -> None:
    weight, bias, *taps = parameters
    _check_depthwise(prefix, weight, bias, 4 * channels, x)
    for name, tap in zip(("dec_lo", "dec_hi", "rec_lo", "rec_hi"), taps, strict=True):
        _check_parameter(f"{prefix}{name}", tap, (2,), x)


_checked_blocks: set[tuple[Any, ...]] = set()
"""What `check_block` let pass."""


def check_block(x: Tensor, parameters: BlockParameters, tensors: Sequence[Tensor]) -> None:
    """Raise unless they fit; `tensors` are the parameters flattened. Sizes that fitted once are not looked at again."""
    if torch.compiler.is_compiling():
        _check_block(x, parameters)
        return
    device, dtype = x.device, x.dtype
    key = (dtype, x.shape[1], *[t.shape if t.dtype is dtype and t.device == device else None for t in tensors])
    if key in _checked_blocks and type(x) in _PLAIN and all([type(t) in _PLAIN for t in tensors]):
        check_image("x", x)
        return
    _check_block(x, parameters)
    if None not in key:
        _checked_blocks.add(key)


def _check_block(x: Tensor, parameters: BlockParameters) -> None:
    check_image("x", x)
    dim, (norm1, mixer, beta, norm2, ffn, gamma) = x.shape[1], parameters
    for name, norm in (("norm1", norm1), ("norm2", norm2)):
        for part, tensor in zip(Norm._fields, norm, strict=True):
            _check_parameter(f"{name}.{part}", tensor, (dim,), x)
    _check_convolution("mixer.conv_in", mixer.conv_in, 3 * dim, dim, x)
    _check_depthwise("mixer.spatial.", *mixer.spatial, dim, x)
    _check_wavelet("mixer.wavelet.", mixer.wavelet, dim, x)
    _check_fourier(x, mixer.fourier, False)
    if len(mixer.fourier.in_bias) != 2 * dim:
        raise ValueError(f"mixer.fourier must have {2 * dim} channels, got {len(mixer.fourier.in_bias)}")
    _check_attention("mixer.attention.", mixer.attention, 3 * dim, x)
    _check_convolution("mixer.conv_out", mixer.conv_out, dim, 3 * dim, x)
    _check_ffn("ffn.", ffn, x)
    for name, scale in (("beta", beta), ("gamma", gamma)):
        _check_parameter(name, scale, (1, dim, 1, 1), x)


def _check_convolution(name: str, conv: Convolution, outputs: int, inputs: int, x: Tensor) -> None:
    _check_parameter(f"{name}.weight", conv.weight, (outputs, inputs, 1, 1), x)
    _check_parameter(f"{name}.bias", conv.bias, (outputs,), x)


def fourier_mix(
    x: Tensor, parameters: FourierParameters, training: bool = False, momentum: float = 0.1, eps: float = 1e-5
) -> Tensor:
    """The Fourier branch, a gated mix of the spectrum, with in_weight, in_bias, gate, value, out_weight, out_bias =
    parameters::

        def spectrum(u):                                           # real and imaginary parts of channel c at 2c, 2c + 1
            return view_as_real(rfft2(u, norm="ortho")).movedim(-1, 2).flatten(1, 2)

        u, v = conv2d(x, in_weight, in_bias).chunk(2, dim=1)
        u = sigmoid(conv2d(batch_norm(spectrum(u), *gate.norm), gate.weight, gate.bias))
        v = gelu(conv2d(batch_norm(spectrum(v), *value.norm), value.weight, value.bias))
        y = u * v
        y = irfft2(complex(y[:, 0::2], y[:, 1::2]), s=(H, W), norm="ortho")
        conv2d(y, out_weight, out_bias)

    Args:
        x: (B, D, H, W). Half-precision input is transformed in fp32.
        parameters: in_weight (2 * C, D, 1, 1), in_bias (2 * C,), out_weight (E, C, 1, 1), out_bias (E,); both of the
            last None: no last convolution, E = C. Of gate and value the weight is (2 * C, 2 * C, 1, 1), all else
            (2 * C,). In training the running statistics are updated in place; they may be None, then the batch's are
            used in evaluation too.
        training, momentum, eps: as in F.batch_norm.

    Returns:
        (B, E, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, layout, dtype, rank, shape or device; an empty image or weight; in
            training, one value per channel (B = H = W = 1).

    Backward recomputes everything from x. Falls back to the reference for float64.

    Source: SWFormer (arXiv 2505.05504), Fourier branch; the interleaved layout is that of the authors' SFHformer.
    """
    return fourier_mix_and_sums(x, parameters, training, momentum, eps, False)[0]


def fourier_mix_and_sums(
    x: Tensor, parameters: FourierParameters, training: bool, momentum: float, eps: float, need_sums: bool
) -> tuple[Tensor, Tensor]:
    """`fourier_mix` and the sums of its result over the pixels, (B, E); empty unless needed."""
    momentum, eps = check_number("momentum", momentum), check_number("eps", eps, 0)
    batch_statistics = _check_fourier(x, parameters, training)
    gate, value = parameters.gate, parameters.value
    norms = gate.norm, value.norm
    if batch_statistics:
        gate, value = (f._replace(norm=f.norm._replace(running_mean=None, running_var=None)) for f in (gate, value))
    tensors = flatten(parameters._replace(gate=gate, value=value))
    y, sums, _, statistics = torch.ops.swformer_fast.fourier_mix(x, *tensors, eps, need_sums)
    if training and x.shape[0]:
        running = (t for norm in norms for t in (norm.running_mean, norm.running_var))
        update_running(running, statistics.unbind(), momentum)
    return y, sums


def update_running(running: Iterable[Tensor | None], batch: Iterable[Tensor], momentum: float) -> None:
    """Each running statistic takes in the batch's, as nn.BatchNorm2d's does."""
    pairs = [(old, new) for old, new in zip(running, batch, strict=True) if old is not None]
    with torch.no_grad():
        if torch.compiler.is_compiling() or not pairs or not all([_listed(*pair) for pair in pairs]):
            for old, new in pairs:
                dtype = torch.promote_types(old.dtype, new.dtype)
                old.copy_(old.to(dtype).lerp_(new.to(dtype), momentum))
            return
        # On a GPU one launch a list.
        olds, news = ([pair[i] for pair in pairs] for i in range(2))
        if all([old.dtype == new.dtype for old, new in pairs]):
            torch._foreach_lerp_(olds, news, momentum)
            return
        wide = [torch.empty_like(new) for new in news]  # a batch's may be out of a half type's range
        torch._foreach_copy_(wide, olds)
        torch._foreach_lerp_(wide, news, momentum)
        torch._foreach_copy_(olds, wide)


def _listed(old: Tensor, new: Tensor) -> bool:
    """Whether PyTorch takes the pair in a list, and the new one has room for the old."""
    return torch.promote_types(old.dtype, new.dtype) == new.dtype and not old.is_neg() and not new.is_neg()


def _check_fourier(x: Tensor, parameters: FourierParameters, training: bool) -> bool:
    """Raise unless they fit; whether the batch's statistics are used."""
    check_image("x", x)
    _check_bundle("parameters", parameters, FourierParameters)
    in_weight, out_weight, out_bias = parameters.in_weight, parameters.out_weight, parameters.out_bias
    inner = _outputs("in_weight", in_weight, f"(2 * C, {x.shape[1]}, 1, 1)", 2)
    if out_weight is not None or out_bias is not None:
        outputs = _outputs("out_weight", out_weight, f"(E, {inner // 2}, 1, 1)")
        _check_parameter("out_weight", out_weight, (outputs, inner // 2, 1, 1), x)
        _check_parameter("out_bias", out_bias, (outputs,), x)
    _check_parameter("in_weight", in_weight, (inner, x.shape[1], 1, 1), x)
    _check_parameter("in_bias", parameters.in_bias, (inner,), x)
    for name, factor in (("gate", parameters.gate), ("value", parameters.value)):
        _check_bundle(name, factor, Factor)
        _check_parameter(f"{name}.weight", factor.weight, (inner, inner, 1, 1), x)
        _check_parameter(f"{name}.bias", factor.bias, (inner,), x)
        _check_bundle(f"{name}.norm", factor.norm, Norm)
        for part, tensor in zip(Norm._fields, factor.norm, strict=True):
            if tensor is not None or not part.startswith("running"):
                _check_parameter(f"{name}.norm.{part}", tensor, (inner,), x)
    check_flag("training", training)
    norms = parameters.gate.norm, parameters.value.norm
    if len({t is None for norm in norms for t in (norm.running_mean, norm.running_var)}) == 2:
        raise ValueError("gate.norm and value.norm must both have running statistics, or neither")
    batch_statistics = training or norms[0].running_mean is None
    if batch_statistics and x.shape[0] * x.shape[2] * (x.shape[3] // 2 + 1) == 1:
        raise ValueError(f"x must have more than 1 value per channel to be normalised, got shape {tuple(x.shape)}")
    return batch_statistics


def multiscale_ffn(x: Tensor, parameters: FfnParameters) -> Tensor:
    """The multi-scale feed-forward network, with in_weight, in_bias, depthwise, out_weight, out_bias = parameters::

        parts = conv2d(x, in_weight, in_bias).chunk(3, dim=1)
        for part, s, (weight, bias) in zip(parts, (1, 2, 4), depthwise):
            z = avg_pool2d(part, s, ceil_mode=True)
            z = conv2d(z, weight, bias, padding=k // 2, groups=M)
            z = interpolate(z, size=(H, W), mode="bilinear", align_corners=False)
        conv2d(gelu(cat(all three z, dim=1)), out_weight, out_bias)

    Where s does not divide a side, the last window averages the samples that it holds, and the bilinear map goes from
    ceil(H / s) to exactly H samples.

    Args:
        x: (B, D, H, W).
        parameters: in_weight (3 * M, D, 1, 1), in_bias (3 * M,), for each scale (M, 1, k, k), k odd, and (M,),
            out_weight (E, 3 * M, 1, 1), out_bias (E,).

    Returns:
        (B, E, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, layout, dtype, rank, shape or device; an empty image or weight.

    Backward recomputes everything from x and the parameters; sums over pixels are taken in fp32 within a strip of rows
    and in fp64 over the strips. Falls back to the reference for float64 and where k is not 3.
    Source: SWFormer (arXiv 2505.05504), multi-scale FFN.
    """
    check_image("x", x)
    _check_bundle("parameters", parameters, FfnParameters)
    _check_ffn("", parameters, x)
    return torch.ops.swformer_fast.multiscale_ffn(x, *flatten(parameters), None)


def _check_ffn(prefix: str, parameters: FfnParameters, x: Tensor) -> None:
    in_weight, in_bias, depthwise, out_weight, out_bias = parameters
    hidden = _outputs(f"{prefix}in_weight", in_weight, f"(3 * M, {x.shape[1]}, 1, 1)", 3)
    outputs = _outputs(f"{prefix}out_weight", out_weight, f"(E, {hidden}, 1, 1)")
    if not isinstance(depthwise, tuple) or len(depthwise) != 3:
        raise ValueError(f"{prefix}depthwise must hold three convolutions in a tuple, got {_shape(depthwise)}")
    _check_parameter(f"{prefix}in_weight", in_weight, (hidden, x.shape[1], 1, 1), x)
    _check_parameter(f"{prefix}in_bias", in_bias, (hidden,), x)
    for i, conv in enumerate(depthwise):
        _check_bundle(f"{prefix}depthwise[{i}]", conv, Convolution)
        _check_depthwise(f"{prefix}depthwise[{i}].", *conv, hidden // 3, x)
    _check_parameter(f"{prefix}out_weight", out_weight, (outputs, hidden, 1, 1), x)
    _check_parameter(f"{prefix}out_bias", out_bias, (outputs,), x)


def channel_attention(x: Tensor, parameters: AttentionParameters) -> Tensor:
    """Scale each channel by its attention, with w1, b1, w2, b2 = parameters::

        x * sigmoid(conv2d(relu(conv2d(x.mean((2, 3), keepdim=True), w1, b1)), w2, b2))

    Args:
        x: (B, C, H, W).
        parameters: w1 (R, C, 1, 1), b1 (R,), w2 (C, R, 1, 1), b2 (C,).

    Returns:
        (B, C, H, W), in x's dtype.

    Raises:
        TypeError, ValueError: wrong type, layout, dtype, rank, shape or device; an empty image or weight.

    On the CPU falls back to the reference for channels_last images. Source: SWFormer (arXiv 2505.05504), channel
    attention.
    """
    check_image("x", x)
    _check_bundle("parameters", parameters, AttentionParameters)
    _check_attention("", parameters, x.shape[1], x)
    return torch.ops.swformer_fast.channel_attention(x, *parameters)


def _check_attention(prefix: str, parameters: AttentionParameters, channels: int, x: Tensor) -> None:
    w1, b1, w2, b2 = parameters
    hidden = _outputs(f"{prefix}w1", w1, f"(R, {channels}, 1, 1)")
    _check_parameter(f"{prefix}w1", w1, (hidden, channels, 1, 1), x)
    _check_parameter(f"{prefix}b1", b1, (hidden,), x)
    _check_parameter(f"{prefix}w2", w2, (channels, hidden, 1, 1), x)
    _check_parameter(f"{prefix}b2", b2, (channels,), x)
