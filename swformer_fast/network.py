"""The SWFormer network on the fast modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional, fusion, reference
from ._layout import as_output, channels_last
from .modules import HaarDWT2d, HaarIDWT2d, SWFormerBlock
from .parameters import Convolution
from .reference import EXITS, PRESETS
from .reference import network as reference_network
from .reference.common import conv_parameters, plain

__all__ = ["EXITS", "PRESETS", "SWFormer"]


class ImageConv2d(reference_network.ImageConv2d):
    """A 3x3 convolution between an image and its features; that of fp16 on a CPU computes in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if functional.autocasts(x) else x.dtype
        if x.device.type != "cpu" or dtype != torch.float16:
            return super().forward(x)
        # PyTorch's own takes twenty times as long on most CPUs.
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).half()


class Merge(reference_network.Merge):
    __doc__ = reference_network.Merge.__doc__

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.conv is None or not (plain(self.conv) and fusion.foldable(a) and fusion.foldable(b)):
            return super().forward(a, b)
        conv = Convolution(*conv_parameters(self.conv))
        return fusion.fused(lambda a, b: fusion.merge(a, b, conv), a, b)


class Resample(reference_network.Resample):
    __doc__ = reference_network.Resample.__doc__

    def forward(self, x: Tensor) -> Tensor:
        conv, rearrange = self
        if not (plain(conv) and fusion.foldable(x)):
            return super().forward(x)
        parameters = Convolution(*conv_parameters(conv))
        return rearrange(fusion.fused(lambda x: fusion.convolve(x, parameters), x))


class Stage(reference_network.Stage):
    __doc__ = reference_network.Stage.__doc__

    def forward(self, x: Tensor) -> Tensor:
        # Once for all of its blocks, which take contiguous maps.
        return super().forward(x.contiguous() if channels_last(x) and fusion.foldable(x) else x)


class SWFormer(reference.SWFormer):
    __doc__ = reference.SWFormer.__doc__

    block_type = SWFormerBlock
    conv_type = ImageConv2d
    dwt_type = HaarDWT2d
    idwt_type = HaarIDWT2d
    merge_type = Merge
    resample_type = Resample
    stage_type = Stage

    def forward(
        self,
        image: Tensor,
        exit: str | None = None,
        exits: Sequence[str] | None = None,
        all_scales: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        outputs = super().forward(image, exit, exits, all_scales)
        if not channels_last(image):
            return outputs
        return as_output(image, outputs) if isinstance(outputs, Tensor) else tuple(as_output(image, y) for y in outputs)

    forward.__doc__ = reference.SWFormer.forward.__doc__

    def _pad(self, image: Tensor) -> Tensor:
        functional.check_input("image", image, next(self.parameters()))
        return super()._pad(image)
