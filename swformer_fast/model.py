"""The SWFormer network on the fast modules."""

from __future__ import annotations

from . import reference
from .modules import HaarDWT2d, SWFormerBlock
from .reference import PRESETS

__all__ = ["PRESETS", "SWFormer"]


class SWFormer(reference.SWFormer):
    __doc__ = reference.SWFormer.__doc__

    block_type = SWFormerBlock
    dwt_type = HaarDWT2d
