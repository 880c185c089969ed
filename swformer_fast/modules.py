"""The fast modules: constructors, parameters and state_dict keys of the reference, fast functions in `forward`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional, fusion, reference
from .parameters import BlockParameters, Convolution, MixerParameters
from .reference.common import (
    as_defined,
    batch_norms,
    conv_parameters,
    norm_parameters,
    parameters_of,
    plain,
    submodules,
)

_BRANCHES = ("spatial", "wavelet", "fourier", "attention")
_PARTS = ("mixer", "ffn", "norm1", "norm2")


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
        return functional.depthwise_gelu(x, *self.arguments()) if self.readable else super().forward(x)


class WaveletBranch(reference.WaveletBranch):
    __doc__ = reference.WaveletBranch.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.wavelet_mix(x, *self.arguments()) if self.readable else super().forward(x)


class FourierBranch(reference.FourierBranch):
    __doc__ = reference.FourierBranch.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if not (self.canonical and self.readable):
            return super().forward(x)
        self.count_batch()
        return functional.fourier_mix(x, *self.arguments())


class ChannelAttention(reference.ChannelAttention):
    __doc__ = reference.ChannelAttention.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.channel_attention(x, *self.arguments()) if self.readable else super().forward(x)


class MultiDomainMixer(reference.MultiDomainMixer):
    __doc__ = reference.MultiDomainMixer.__doc__

    spatial_type = SpatialBranch
    wavelet_type = WaveletBranch
    fourier_type = FourierBranch
    attention_type = ChannelAttention

    def forward(self, x: Tensor) -> Tensor:
        functional.check_image("x", x)
        if not (self.fusible and fusion.foldable(x)):
            return super().forward(x)
        return fusion.fused(lambda x: self.mix(x, fusion.NOTHING, 0.0, None, None), x)

    @property
    def fusible(self) -> bool:
        """Whether its parts do what they are defined to do, so that `mix` may take their parameters instead."""
        spatial, wavelet, fourier, attention = submodules(self, *_BRANCHES)
        defined = as_defined(SpatialBranch, spatial) and as_defined(WaveletBranch, wavelet)
        defined = defined and as_defined(FourierBranch, fourier) and as_defined(ChannelAttention, attention)
        defined = defined and spatial.readable and wavelet.readable and fourier.readable and attention.readable
        return defined and plain(*submodules(self, "conv_in", "conv_out")) and self.canonical

    def arguments(self) -> tuple[MixerParameters, bool, float, float]:
        """Parameters, and training, momentum and eps of the Fourier branch."""
        spatial, wavelet, fourier, attention = submodules(self, *_BRANCHES)
        first, last = [Convolution(*conv_parameters(conv)) for conv in submodules(self, "conv_in", "conv_out")]
        of_fourier, training, momentum, eps = fourier.arguments()
        (of_attention,) = attention.arguments()
        branches = spatial.arguments(), wavelet.arguments(), of_fourier, of_attention
        return MixerParameters(first, *branches, last), training, momentum, eps

    def mix(
        self, x: Tensor, norm: fusion.Foldable, eps: float, scale: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """`residual + scale * forward(batch_norm(x, *norm, eps))`."""
        self.fourier.count_batch()
        return fusion.mix(x, norm, eps, *self.arguments(), scale, residual)


class MultiScaleFFN(reference.MultiScaleFFN):
    __doc__ = reference.MultiScaleFFN.__doc__

    def forward(self, x: Tensor) -> Tensor:
        if not (self.canonical and self.readable):
            return super().forward(x)
        return functional.multiscale_ffn(x, *self.arguments())


class SWFormerBlock(reference.SWFormerBlock):
    __doc__ = reference.SWFormerBlock.__doc__

    mixer_type = MultiDomainMixer
    ffn_type = MultiScaleFFN

    def forward(self, x: Tensor) -> Tensor:
        functional.check_input("x", x, self.beta)
        mixer, ffn, *norms = submodules(self, *_PARTS)
        # What is fusible is canonical.
        defined = as_defined(MultiDomainMixer, mixer) and mixer.fusible and self.norm_position == "pre"
        defined = defined and as_defined(MultiScaleFFN, ffn) and ffn.readable and ffn.canonical
        defined = defined and batch_norms(*norms)
        return fusion.fused(self._fused, x) if defined and fusion.foldable(x) else super().forward(x)

    def _fused(self, x: Tensor) -> Tensor:
        mixer, ffn, norm1, norm2 = submodules(self, *_PARTS)
        (parameters,), (beta, gamma) = ffn.arguments(), parameters_of(self, "beta", "gamma")
        if not (torch.is_grad_enabled() or norm1.training or norm2.training):
            mix, training, _, eps = mixer.arguments()
            every = BlockParameters(norm_parameters(norm1), mix, beta, norm_parameters(norm2), parameters, gamma)
            if not training and fusion.in_one(x, every):
                return fusion.block(x, every, norm1.eps, norm2.eps, eps)
        normalised, norm = fusion.normalised(x, norm1)
        x = mixer.mix(normalised, norm, norm1.eps, beta, x)
        normalised, norm = fusion.normalised(x, norm2)
        return fusion.feed_forward(normalised, norm, norm2.eps, parameters, gamma, x)
