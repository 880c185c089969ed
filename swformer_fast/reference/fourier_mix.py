"""Fourier branch: a gated 1x1 mixing of the spectrum, in plain PyTorch."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import Factor, FourierParameters, Norm
from .common import (
    batch_norms,
    check_choice,
    check_flag,
    check_number,
    check_positive,
    conv2d,
    conv_parameters,
    norm_parameters,
    plain,
    submodules,
)

LAYOUTS = ("interleaved", "concatenated")
_CONVOLUTIONS = ("conv_in", "gate_conv", "value_conv", "conv_out")


def spectrum(x: Tensor, layout: str = "interleaved") -> Tensor:
    """rfft2 with "ortho" scaling, (B, C, H, W) -> (B, 2 * C, H, W // 2 + 1), in the dtype of `x`.

    Real parts are at channels 2c and imaginary parts at 2c + 1 ("interleaved"), or at c and C + c ("concatenated").
    Half-precision input is transformed in fp32.
    """
    if x.shape[0] == 0:  # MKL's FFT refuses an empty batch
        return x.repeat(1, 2, 1, 1)[..., : x.shape[3] // 2 + 1]
    z = torch.fft.rfft2(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, norm="ortho")
    if layout == "interleaved":
        return torch.stack((z.real, z.imag), dim=2).flatten(1, 2).to(x.dtype)
    return torch.cat((z.real, z.imag), dim=1).to(x.dtype)


def inverse_spectrum(y: Tensor, size: tuple[int, int], layout: str = "interleaved") -> Tensor:
    """irfft2 with "ortho" scaling of channels laid out as by `spectrum`, (B, 2 * C, H, W // 2 + 1) -> (B, C, H, W)."""
    if y.shape[0] == 0:
        return y.chunk(2, dim=1)[0][..., :1].expand(-1, -1, -1, size[1])
    real, imag = (y[:, 0::2], y[:, 1::2]) if layout == "interleaved" else y.chunk(2, dim=1)
    if y.dtype in (torch.float16, torch.bfloat16):
        real, imag = real.float(), imag.float()
    return torch.fft.irfft2(torch.complex(real, imag), s=size, norm="ortho").to(y.dtype)


def batch_norm(x: Tensor, norm: Norm, training: bool, momentum: float, eps: float) -> Tensor:
    """F.batch_norm, which takes fp32 parameters beside half precision, beside fp64 too."""
    if x.dtype != torch.float64 or norm.weight.dtype == torch.float64:
        return F.batch_norm(x, *norm, training, momentum, eps)
    running = [t for t in (norm.running_mean, norm.running_var) if t is not None]
    in_fp64 = [t.double() for t in running]
    mean, variance = in_fp64 or (None, None)
    y = F.batch_norm(x, mean, variance, norm.weight.double(), norm.bias.double(), training, momentum, eps)
    if training:
        for old, new in zip(running, in_fp64, strict=True):
            old.copy_(new)
    return y


def fourier_mix(
    x: Tensor,
    parameters: FourierParameters,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str = "interleaved",
) -> Tensor:
    """Gated mixing of the spectrum's real and imaginary parts by 1x1 convolutions, with
    in_weight, in_bias, gate, value, out_weight, out_bias = parameters::

        def spectrum(u):                                           # real and imaginary parts of channel c at 2c, 2c + 1
            return view_as_real(rfft2(u, norm="ortho")).movedim(-1, 2).flatten(1, 2)

        u, v = conv2d(x, in_weight, in_bias).chunk(2, dim=1)
        u = sigmoid(conv2d(batch_norm(spectrum(u), *gate.norm), gate.weight, gate.bias))
        v = gelu(conv2d(batch_norm(spectrum(v), *value.norm), value.weight, value.bias))
        y = u * v
        y = irfft2(complex(y[:, 0::2], y[:, 1::2]), s=(H, W), norm="ortho")
        conv2d(y, out_weight, out_bias)

    As irfft2 does, the inverse ignores the part of the spectrum that no real image has.

    Args:
        x: (B, D, H, W). Half-precision input is transformed in fp32 and cast back.
        parameters: in_weight (2 * C, D, 1, 1), in_bias (2 * C,), out_weight (E, C, 1, 1), out_bias (E,); both of the
            last None: no last convolution, E = C. Of gate and value the weight is (2 * C, 2 * C, 1, 1), all else
            (2 * C,). Convolutions' parameters are cast to the dtype of `x`. Running statistics may be None: then the
            batch's are used in evaluation too. In training they are updated in place.
        training: normalise by the batch's statistics and update the running ones, as nn.BatchNorm2d does.
        momentum, eps: of both batch normalisations.
        layout: "interleaved" or "concatenated" real and imaginary channels.

    Returns:
        (B, E, H, W) in the dtype of `x`.

    Raises:
        ValueError: in training, if there is only one value per channel (B = H = W = 1).

    Source: the Fourier branch in the architecture figure of arXiv 2505.05504; the interleaved layout follows the same
    authors' published code.
    """

    def layers(factor: Factor) -> Callable[[Tensor], Tensor]:
        batch_statistics = training or factor.norm.running_mean is None

        def mix(u: Tensor) -> Tensor:
            return conv2d(batch_norm(u, factor.norm, batch_statistics, momentum, eps), factor.weight, factor.bias)

        return mix

    in_weight, in_bias, gate, value, out_weight, out_bias = parameters
    y = _product(conv2d(x, in_weight, in_bias), layers(gate), layers(value), layout)
    return y if out_weight is None or out_bias is None else conv2d(y, out_weight, out_bias)


def _product(uv: Tensor, gate: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], layout: str) -> Tensor:
    """All between the first and the last convolution."""
    u, v = uv.chunk(2, dim=1)
    product = gate(spectrum(u, layout)).sigmoid() * F.gelu(value(spectrum(v, layout)))
    return inverse_spectrum(product, (uv.shape[2], uv.shape[3]), layout)


class FourierBranch(nn.Module):
    """`fourier_mix` with its parameters; its batch normalisations behave as nn.BatchNorm2d in every mode.

    `momentum`, `eps` and `track_running_stats` mean what they mean in nn.BatchNorm2d and, like the normalisations'
    `training` flag, must be the same for both.
    """

    def __init__(
        self,
        dim: int,
        layout: str = "interleaved",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        dim = check_positive("dim", dim)
        momentum = None if momentum is None else check_number("momentum", momentum)
        eps = check_number("eps", eps, 0)
        track_running_stats = check_flag("track_running_stats", track_running_stats)
        check_choice("layout", layout, LAYOUTS)
        self.layout = layout
        self.conv_in = nn.Conv2d(dim, 2 * dim, 1)
        self.gate_bn = nn.BatchNorm2d(2 * dim, eps, momentum, track_running_stats=track_running_stats)
        self.gate_conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.value_bn = nn.BatchNorm2d(2 * dim, eps, momentum, track_running_stats=track_running_stats)
        self.value_conv = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.conv_out = nn.Conv2d(dim, dim, 1)

    @property
    def canonical(self) -> bool:
        """Whether this module is `fourier_mix` with its default keyword."""
        return self.layout == "interleaved"

    @property
    def readable(self) -> bool:
        """Whether `arguments` says all; else the layers are called."""
        convolutions, (gate, value) = submodules(self, *_CONVOLUTIONS), submodules(self, "gate_bn", "value_bn")
        normalisations = batch_norms(gate, value) and gate.affine and value.affine
        return normalisations and plain(*convolutions)

    def arguments(self) -> tuple[FourierParameters, bool, float, float]:
        """The positional arguments of `fourier_mix` after `x`: parameters, training, momentum, eps."""
        norm = self._norm
        first, gate, value, last = [conv_parameters(conv) for conv in submodules(self, *_CONVOLUTIONS)]
        gate_norm, value_norm = [_state(bn) for bn in submodules(self, "gate_bn", "value_bn")]
        parameters = FourierParameters(*first, Factor(gate_norm, *gate), Factor(value_norm, *value), *last)
        momentum = norm.momentum
        if momentum is None:  # the running statistics are the plain mean over all batches
            counted = float(cast(Tensor, norm.num_batches_tracked)) if _tracks(norm) else 0.0
            momentum = 1.0 / counted if counted else 0.0
        return parameters, norm.training, momentum, norm.eps

    @property
    def _norm(self) -> nn.BatchNorm2d:
        """One of the two normalisations, whose options are the same."""
        gate: nn.BatchNorm2d
        gate, value = submodules(self, "gate_bn", "value_bn")
        for name in ("training", "momentum", "eps", "track_running_stats"):
            if getattr(gate, name) != getattr(value, name):
                raise ValueError(f"gate_bn and value_bn must have the same {name}")
        return gate

    def count_batch(self) -> None:
        """In training, count a batch in both normalisations, as nn.BatchNorm2d does before it normalises."""
        if _tracks(self._norm):
            for norm in (self.gate_bn, self.value_bn):
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.readable:
            self.count_batch()
            return fourier_mix(x, *self.arguments(), layout=self.layout)
        layers = nn.Sequential(self.gate_bn, self.gate_conv), nn.Sequential(self.value_bn, self.value_conv)
        return self.conv_out(_product(self.conv_in(x), *layers, self.layout))

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}"


def _tracks(norm: nn.BatchNorm2d) -> bool:
    return norm.training and norm.track_running_stats


def _state(norm: nn.BatchNorm2d) -> Norm:
    if norm.training and not norm.track_running_stats:
        return Norm(None, None, norm.weight, norm.bias)
    return norm_parameters(norm)
