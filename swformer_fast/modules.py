"""The fast modules: constructors, parameters and state_dict keys of the reference, fast functions in `forward`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from . import functional, reference
from .backend import has_cpp
from .ops import channels_last
from .reference.common import conv_parameters


def as_defined(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling these modules does what `kind` does and nothing more: no other forward, no hooks."""
    return all(
        type(m).forward is kind.forward
        and "forward" not in m.__dict__
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )


def foldable(x: Tensor) -> bool:
    """Whether folding constants into weights keeps this input's accuracy and layout."""
    wide = x.dtype in (torch.float32, torch.float64)
    return x.dim() == 4 and wide and not channels_last(x) and not functional.autocasts(x)


def _batch_statistics(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch; in training the running statistics take them in, as in `norm(x)`."""
    mean, variance = torch.ops.swformer_fast.channel_statistics(x)[0].unbind()
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            momentum = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
            count = x.numel() // x.shape[1]
            for running, batch in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
                running.lerp_(batch.to(running.dtype), 0.0 if momentum is None else momentum)
    return mean, variance


def _normalised(x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias) of the 1x1 convolution of norm(x): the statistics are folded into its parameters.

    On a GPU not the batch's: the algebra of the parameters takes more launches than the passes it saves are worth.
    """
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        if not has_cpp(x.device.type) or x.numel() <= x.shape[1]:
            return norm(x), weight, bias  # which refuses a single value
        mean, variance = _batch_statistics(x, norm)
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    return x, weight * scale[:, None, None], bias + weight.flatten(1) @ shift


class HaarDWT2d(reference.HaarDWT2d):
    __doc__ = reference.HaarDWT2d.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.haar_dwt2d(x, self.dec_lo, self.dec_hi)


class HaarIDWT2d(reference.HaarIDWT2d):
    __doc__ = reference.HaarIDWT2d.__doc__

    def forward(self, y: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        return functional.haar_idwt2d(y, self.rec_lo, self.rec_hi, output_size)


class SpatialBranch(reference.SpatialBranch):
    __doc__ = reference.SpatialBranch.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.depthwise_gelu(x, *self.arguments())


class WaveletBranch(reference.WaveletBranch):
    __doc__ = reference.WaveletBranch.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.wavelet_mix(x, *self.arguments())


class FourierBranch(reference.FourierBranch):
    __doc__ = reference.FourierBranch.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.fourier_mix(x, *self.arguments()) if self.canonical else super().forward(x)


class ChannelAttention(reference.ChannelAttention):
    __doc__ = reference.ChannelAttention.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.channel_attention(x, *self.arguments())


class MultiDomainMixer(reference.MultiDomainMixer):
    __doc__ = reference.MultiDomainMixer.__doc__

    spatial_type = SpatialBranch
    wavelet_type = WaveletBranch
    fourier_type = FourierBranch
    attention_type = ChannelAttention

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fusible and foldable(x)):
            return super().forward(x)
        return self.mix(x, *conv_parameters(self.conv_in), None, None)

    @property
    def fusible(self) -> bool:
        known = as_defined(nn.Conv2d, self.conv_in, self.conv_out) and as_defined(ChannelAttention, self.attention)
        known = known and as_defined(SpatialBranch, self.spatial) and as_defined(WaveletBranch, self.wavelet)
        return known and as_defined(FourierBranch, self.fourier) and self.canonical

    def mix(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
        """`residual + scale * forward(x)` with the parameters of `conv_in` given.

        The branches are never concatenated. The Fourier branch's part of `conv_in` goes into that branch's first
        convolution; its last one, attention and `scale` go into the weights of `conv_out`.
        """
        op, dim = torch.ops.swformer_fast.pointwise, self.conv_in.in_channels
        (local_weight, weight), (local_bias, bias) = (t.split((2 * dim, dim)) for t in (weight.flatten(1), bias))
        arguments = self.fourier.arguments()
        first_weight, last_weight, last_bias = arguments[0].flatten(1), arguments[8].flatten(1), arguments[9]
        first_bias = torch.addmv(arguments[1], first_weight, bias)
        first_weight = (first_weight @ weight)[..., None, None]
        # The branch that needs most memory first.
        arguments = (first_weight, first_bias, *arguments[2:8], None, None, *arguments[10:], True)
        frequencies = functional._fourier_mix(x, *arguments)
        local = self.spatial.arguments(), self.wavelet.arguments()
        spatial, wavelet, *of_local = functional._local_branches(x, local_weight, local_bias, *local)
        branches, sums = (spatial, wavelet, frequencies[0]), (*of_local, frequencies[1])
        w1, b1, w2, b2 = self.attention.arguments()
        means = [s / (x.shape[2] * x.shape[3]) for s in sums]
        means[2] = torch.addmm(last_bias, means[2], last_weight.t())
        hidden = torch.addmm(b1, torch.cat(means, dim=1), w1.flatten(1).t()).relu()
        attention = torch.addmm(b2, hidden, w2.flatten(1).t()).sigmoid()
        weight, bias = conv_parameters(self.conv_out)
        weight = weight.flatten(1)
        if scale is not None:
            weight, bias = weight * scale.view(-1, 1), bias * scale.view(-1)
        weight = weight * attention[:, None]
        last = weight[..., 2 * dim :]
        weight = torch.cat((weight[..., : 2 * dim], last @ last_weight), dim=2)
        return op(*branches, weight, bias + last @ last_bias, residual)


class MultiScaleFFN(reference.MultiScaleFFN):
    __doc__ = reference.MultiScaleFFN.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.multiscale_ffn(x, *self.arguments()) if self.canonical else super().forward(x)


class SWFormerBlock(reference.SWFormerBlock):
    __doc__ = reference.SWFormerBlock.__doc__

    mixer_type = MultiDomainMixer
    ffn_type = MultiScaleFFN

    def forward(self, x: Tensor) -> Tensor:
        mixer, ffn = cast(MultiDomainMixer, self.mixer), self.ffn
        known = as_defined(MultiDomainMixer, mixer) and mixer.fusible
        known = known and as_defined(MultiScaleFFN, ffn) and as_defined(nn.Conv2d, ffn.conv_in)
        known = known and as_defined(nn.BatchNorm2d, self.norm1, self.norm2) and self.canonical
        if not (known and foldable(x)):
            return super().forward(x)
        x = mixer.mix(*_normalised(x, self.norm1, *conv_parameters(mixer.conv_in)), self.beta, x)
        _, _, dw_weights, dw_biases, out_weight, out_bias = ffn.arguments()
        normalised, in_weight, in_bias = _normalised(x, self.norm2, *conv_parameters(ffn.conv_in))
        gamma = self.gamma.view(-1)
        depthwise = (t for pair in zip(dw_weights, dw_biases, strict=True) for t in pair)
        scaled = (out_weight * gamma[:, None, None, None], out_bias * gamma)
        return torch.ops.swformer_fast.multiscale_ffn(normalised, in_weight, in_bias, *depthwise, *scaled, x)
