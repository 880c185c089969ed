"""Restorations without learning that people know, to stand beside the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _box(x: Tensor, radius: int) -> Tensor:
    """Means over windows of 2 radius + 1 pixels a side, (..., H, W), smaller at the border."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    return F.avg_pool2d(flat, 2 * radius + 1, 1, radius, count_include_pad=False).view(x.shape)


def _guided_filter(guide: Tensor, x: Tensor, radius: int, eps: float) -> Tensor:
    """x (H, W) smoothed along the edges of a guide: He et al., Guided Image Filtering (2010), equations 5, 6, 8."""
    mean, of_x = _box(guide, radius), _box(x, radius)
    slope = (_box(guide * x, radius) - mean * of_x) / (_box(guide * guide, radius) - mean * mean + eps)
    return _box(slope, radius) * guide + _box(of_x - slope * mean, radius)


def _dark_channel(image: Tensor, radius: int) -> Tensor:
    """The least value of all colours in windows of 2 radius + 1 pixels a side, (H, W)."""
    return -F.max_pool2d(-image.amin(0)[None], 2 * radius + 1, 1, radius)[0]


def dark_channel_prior(image: Tensor, radius: int = 7, omega: float = 0.95, least: float = 0.1) -> Tensor:
    """An image (3, H, W) in [0, 1] without haze: He et al., Single Image Haze Removal (2009), with a guided filter.

    Args:
        radius: of the windows of the dark channel.
        omega: share of the haze that is removed.
        least: transmission.
    """
    dark = _dark_channel(image, radius)
    haziest = dark.flatten().topk(max(1, dark.numel() // 1000)).indices
    light = image.flatten(1)[:, haziest].mean(1).clamp(min=1e-3)[:, None, None]
    transmission = 1 - omega * _dark_channel(image / light, radius)
    transmission = _guided_filter(image.mean(0), transmission, 4 * radius, 1e-3).clamp(least, 1)
    return ((image - light) / transmission + light).clamp(0, 1)


def light_curve(image: Tensor, exposure: float = 0.6, steps: int = 8) -> Tensor:
    """A dark image (3, H, W) in [0, 1] made brighter by the curve of Zero-DCE (Guo et al., 2020, equation 2).

    `steps` times `y + a * y * (1 - y)`, with the one a in [0, 1] that brings the image's mean nearest to `exposure`,
    the value that its exposure loss asks for; the original's network gives an a for each pixel and step.
    """

    def brighter(a: float) -> Tensor:
        y = image
        for _ in range(steps):
            y = y + a * y * (1 - y)
        return y

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if brighter(middle).mean() < exposure else (low, middle)
    return brighter(low)


def grey_world(image: Tensor) -> Tensor:
    """An image (3, H, W) in [0, 1] whose colours have one mean: Buchsbaum, A Spatial Processor Model (1980)."""
    means = image.mean((1, 2), keepdim=True).clamp(min=1e-3)
    return (image * means.mean() / means).clamp(0, 1)


def median(image: Tensor, radius: int = 1) -> Tensor:
    """The median of windows of 2 radius + 1 pixels a side, of each colour."""
    padded = F.pad(image[None], (radius,) * 4, mode="replicate")
    return F.unfold(padded, 2 * radius + 1).view(3, -1, image[0].numel()).median(1).values.view(image.shape)


def unsharp_mask(image: Tensor, radius: int = 2, amount: float = 1.0) -> Tensor:
    """Differences from the mean of windows of 2 radius + 1 pixels a side, added."""
    return (image + amount * (image - _box(image, radius))).clamp(0, 1)


CLASSICAL: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rain_streaks": ("median 3 x 3", median),
    "raindrops": ("median 3 x 3", median),
    "haze": ("dark channel prior", dark_channel_prior),
    "snow": ("median 3 x 3", median),
    "motion_blur": ("unsharp mask", unsharp_mask),
    "defocus_blur": ("unsharp mask", unsharp_mask),
    "cloud": ("dark channel prior", dark_channel_prior),
    "shadow": ("light curve", light_curve),
    "underwater": ("grey world", grey_world),
    "low_light": ("light curve", light_curve),
}
"""For each task of `degradations` a name and a function."""
