"""The fast modules: constructors, parameters and state_dict keys of the reference, fast functions in `forward`."""

from __future__ import annotations

from torch import Tensor

from . import functional, reference


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


class MultiScaleFFN(reference.MultiScaleFFN):
    __doc__ = reference.MultiScaleFFN.__doc__

    def forward(self, x: Tensor) -> Tensor:
        return functional.multiscale_ffn(x, *self.arguments()) if self.canonical else super().forward(x)


class SWFormerBlock(reference.SWFormerBlock):
    __doc__ = reference.SWFormerBlock.__doc__

    mixer_type = MultiDomainMixer
    ffn_type = MultiScaleFFN
