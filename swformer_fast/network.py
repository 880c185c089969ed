"""The SWFormer network on the fast modules."""

from __future__ import annotations

from torch import Tensor

from . import functional, fusion, reference
from .modules import HaarDWT2d, SWFormerBlock
from .parameters import Convolution
from .reference import PRESETS
from .reference import network as reference_network
from .reference.common import conv_parameters, plain

__all__ = ["PRESETS", "SWFormer"]


class Merge(reference_network.Merge):
    __doc__ = reference_network.Merge.__doc__

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.conv is None or not (plain(self.conv) and fusion.foldable(a) and fusion.foldable(b)):
            return super().forward(a, b)
        return fusion.merge(a, b, Convolution(*conv_parameters(self.conv)))


class Resample(reference_network.Resample):
    __doc__ = reference_network.Resample.__doc__

    def forward(self, x: Tensor) -> Tensor:
        conv, rearrange = self
        if not (plain(conv) and fusion.foldable(x)):
            return super().forward(x)
        return rearrange(fusion.convolve(x, Convolution(*conv_parameters(conv))))


class SWFormer(reference.SWFormer):
    __doc__ = reference.SWFormer.__doc__

    block_type = SWFormerBlock
    dwt_type = HaarDWT2d
    merge_type = Merge
    resample_type = Resample

    def _pad(self, image: Tensor) -> Tensor:
        functional.check_input("image", image, next(self.parameters()))
        return super()._pad(image)
