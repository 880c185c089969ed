"""Images as a vision model takes them: what an image processor does, differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import check_floating, is_integer

MODES = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the resampling filters, as processors store them, in torch's words."""


def check_images(name: str, images: Any, channels: int | None = 3) -> None:
    """Raise unless they are (B, channels, H, W); None for any number of channels."""
    check_floating(name, images)
    if images.ndim != 4 or images.shape[1] != (channels or images.shape[1]) or 0 in images.shape:
        raise ValueError(f"{name} must have shape (B, {channels or 'C'}, H, W), got {tuple(images.shape)}")


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Preparation:
    """Resize, centre crop, normalise, in float32 at least."""

    size: Mapping[str, int] | None
    """`shortest_edge`, or `height` and `width`; None resizes nothing."""
    mode: str
    crop: tuple[int, int] | None
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor) -> Tensor:
        x = at_least_float32(images)
        size = self._resized(*x.shape[-2:])
        if size != x.shape[-2:]:
            x = functional.interpolate(x, size, mode=self.mode, antialias=True)
        (height, width), (h, w) = size, self.crop or size
        if height < h or width < w:
            raise ValueError(f"images must be at least {h} x {w} before they are cropped, got {height} x {width}")
        top, left = (height - h) // 2, (width - w) // 2
        x = x[..., top : top + h, left : left + w]
        # Numbers and no tensors: nothing is copied to the device.
        channels = zip(x.unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        edge, shorter = self.size["shortest_edge"], min(height, width)
        return edge * height // shorter, edge * width // shorter


def preparation_of(processor: Mapping[str, Any]) -> Preparation:
    """What an image processor's configuration says."""
    size, crop, resample = processor.get("size"), processor.get("crop_size"), processor.get("resample", 3)
    if resample not in MODES:
        raise ValueError(f"processor must resample by 2 (bilinear) or 3 (bicubic), got {resample!r}")
    # Older files have one number: the shorter edge, and the side of a square.
    size = {"shortest_edge": size} if is_integer(size) else size
    crop = {"height": crop, "width": crop} if is_integer(crop) else crop
    if not processor.get("do_resize", True):
        size = None
    elif not isinstance(size, Mapping) or not ("shortest_edge" in size or {"height", "width"} <= set(size)):
        raise ValueError(f"processor must have a size of shortest_edge, or of height and width, got {size!r}")
    crop_size = None
    if isinstance(crop, Mapping) and processor.get("do_center_crop", True):
        crop_size = (crop["height"], crop["width"])
    mean, std = [0.0] * 3, [1.0] * 3
    if processor.get("do_normalize", True):
        mean, std = _three("image_mean", processor), _three("image_std", processor)
    return Preparation(size, MODES[resample], crop_size, mean, std)


def _three(name: str, processor: Mapping[str, Any]) -> list[float]:
    numbers = processor.get(name)
    if not isinstance(numbers, (list, tuple)) or len(numbers) != 3:
        raise ValueError(f"processor must have an {name} of 3 numbers, got {numbers!r}")
    return [float(one) for one in numbers]
