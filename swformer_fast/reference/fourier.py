"""Fourier branch: a gated 1x1 mixing of the spectrum, in plain PyTorch."""

from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import check_choice, check_positive, conv2d, conv_parameters

BatchNormState: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
"""running_mean, running_var, weight, bias; both running statistics may be None (batch statistics are used)."""

LAYOUTS = ("interleaved", "concatenated")


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
    *,
    layout: str = "interleaved",
) -> Tensor:
    """Gated mixing of the spectrum's real and imaginary parts by 1x1 convolutions::

        def spectrum(u):                                           # real and imaginary parts of channel c at 2c, 2c + 1
            return view_as_real(rfft2(u, norm="ortho")).movedim(-1, 2).flatten(1, 2)

        gate, value = conv2d(x, in_weight, in_bias).chunk(2, dim=1)
        gate = sigmoid(conv2d(batch_norm(spectrum(gate), *gate_bn), gate_weight, gate_bias))
        value = gelu(conv2d(batch_norm(spectrum(value), *value_bn), value_weight, value_bias))
        y = gate * value
        y = irfft2(complex(y[:, 0::2], y[:, 1::2]), s=(H, W), norm="ortho")
        conv2d(y, out_weight, out_bias)

    As irfft2 does, the inverse ignores the part of the spectrum that no real image has.

    Args:
        x: (B, D, H, W). Half-precision input is transformed in fp32 and cast back.
        in_weight: (2 * C, D, 1, 1); the convolutions' parameters are cast to the dtype of `x`.
        in_bias: (2 * C,).
        gate_bn, value_bn: (running_mean, running_var, weight, bias), each (2 * C,). Running statistics may be None:
            then the batch's are used in evaluation too. In training they are updated in place.
        gate_weight, value_weight: (2 * C, 2 * C, 1, 1).
        gate_bias, value_bias: (2 * C,).
        out_weight: (E, C, 1, 1).
        out_bias: (E,). Both None: no last convolution, E = C.
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

    def mix(u: Tensor, bn: BatchNormState, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance, scale, shift = bn
        batch_statistics = training or mean is None
        u = F.batch_norm(spectrum(u, layout), mean, variance, scale, shift, batch_statistics, momentum, eps)
        return conv2d(u, weight, bias)

    gate, value = conv2d(x, in_weight, in_bias).chunk(2, dim=1)
    product = mix(gate, gate_bn, gate_weight, gate_bias).sigmoid() * F.gelu(
        mix(value, value_bn, value_weight, value_bias)
    )
    y = inverse_spectrum(product, (x.shape[2], x.shape[3]), layout)
    return y if out_weight is None or out_bias is None else conv2d(y, out_weight, out_bias)


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
        check_positive("dim", dim)
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

    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of `fourier_mix` after `x`. In training each call counts one batch."""
        gate, value = self.gate_bn, self.value_bn
        for name in ("training", "momentum", "eps", "track_running_stats"):
            if getattr(gate, name) != getattr(value, name):
                raise ValueError(f"gate_bn and value_bn must have the same {name}")
        return (
            *conv_parameters(self.conv_in),
            _batch_norm_state(gate),
            *conv_parameters(self.gate_conv),
            _batch_norm_state(value),
            *conv_parameters(self.value_conv),
            *conv_parameters(self.conv_out),
            gate.training,
            _count_batch(gate, value),
            gate.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return fourier_mix(x, *self.arguments(), layout=self.layout)

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}"


def _batch_norm_state(bn: nn.BatchNorm2d) -> BatchNormState:
    if not isinstance(bn, nn.BatchNorm2d):
        raise TypeError(f"FourierBranch needs nn.BatchNorm2d normalisations, got {type(bn).__name__}")
    use_running = not bn.training or bn.track_running_stats
    return (bn.running_mean if use_running else None, bn.running_var if use_running else None, bn.weight, bn.bias)


def _count_batch(gate: nn.BatchNorm2d, value: nn.BatchNorm2d) -> float:
    """Count a batch if both normalisations train; the weight of this batch in their running statistics."""
    counting = gate.training and gate.track_running_stats
    for bn in (gate, value):
        if counting and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
    if gate.momentum is not None:
        return gate.momentum
    # Without momentum the running statistics are the plain mean over all batches.
    return 1.0 / float(cast(Tensor, gate.num_batches_tracked)) if counting else 0.0
