"""The SWFormer network on the fast modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import reference
from .modules import HaarDWT2d, SWFormerBlock, as_defined, foldable
from .reference import PRESETS
from .reference import network as reference_network
from .reference.common import conv_parameters

__all__ = ["PRESETS", "SWFormer"]


class Merge(reference_network.Merge):
    __doc__ = reference_network.Merge.__doc__

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.conv is None or not (as_defined(nn.Conv2d, self.conv) and foldable(a) and foldable(b)):
            return super().forward(a, b)
        weight, bias = conv_parameters(self.conv)
        return torch.ops.swformer_fast.pointwise(a, b, None, weight.flatten(1)[None], bias, None)


class SWFormer(reference.SWFormer):
    __doc__ = reference.SWFormer.__doc__

    block_type = SWFormerBlock
    dwt_type = HaarDWT2d
    merge_type = Merge
