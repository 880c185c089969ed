"""Random views of images, differentiable, for losses that shall not be pleased by single pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import is_integer, number
from .preparation import check_images


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")


class Cutouts(nn.Module):
    """Random squares of images, each brought to one size.

    With u, v, w uniform in [0, 1) for each of `count` squares, and S the shorter side of the images:

        side = int(u**power * (S - min(S, size)) + min(S, size))
        top, left = int(v * (H - side + 1)), int(w * (W - side + 1))
        view = adaptive_avg_pool2d(images[..., top : top + side, left : left + side], size)

    power below 1 prefers large squares. Images (B, C, H, W) give (count * B, C, size, size), square after square: the
    views of image i are [i::B]. Gradients reach the images; any floating dtype.

    Args:
        generator: for the squares; they differ from call to call, and the same state gives the same squares on any
            device. None takes torch's global generator of the CPU.

    Raises:
        TypeError, ValueError: counts and sizes are no positive integers, power is negative, or images are not
            (B, C, H, W).

    Source: the cutouts of VQGAN-CLIP, arXiv 2204.08583; the authors of SDO take 16 with power 0.3 for aesthetic scores.
    """

    def __init__(
        self, count: int = 16, size: int = 224, power: float = 0.3, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, value in (("count", count), ("size", size)):
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        _check_generator(generator)
        self.count, self.size, self.power, self.generator = count, size, number("power", power, 0), generator

    def forward(self, images: Tensor) -> Tensor:
        check_images("images", images, None)
        height, width = images.shape[-2:]
        most = min(height, width)
        least = min(most, self.size)
        place = "cpu" if self.generator is None else self.generator.device
        draws = torch.rand(self.count, 3, generator=self.generator, device=place, dtype=torch.float64)
        views = []
        for u, v, w in draws.tolist():
            side = int(u**self.power * (most - least) + least)
            top, left = int(v * (height - side + 1)), int(w * (width - side + 1))
            square = images[..., top : top + side, left : left + side]
            views.append(functional.adaptive_avg_pool2d(square, self.size))
        return torch.cat(views)


class DiffAugment(nn.Module):
    """Differentiable augmentation: each image of the batch changed at random, in the order of `policy`.

    The numbers are the published ones, for x = 2 images - 1 in [-1, 1]; the result is (x + 1) / 2, of the images' shape
    and dtype. With u uniform in [0, 1), drawn anew for each image and use:

        "color"        x = x + u - 0.5
                       x = mean_C(x) + 2 u (x - mean_C(x))                  saturation
                       x = mean_CHW(x) + (u + 0.5) (x - mean_CHW(x))        contrast
        "translation"  by up to an eighth of either side, filled with x = 0 (grey)
        "resize"       all images by one ratio in [0.8, 1.2), bilinear; the middle, or filled with x = 0 around it
        "cutout"       x = 0 in a rectangle of half of either side, its middle anywhere in the image

    Gradients reach the images; any floating dtype; values may leave [0, 1].

    Args:
        policy: names joined by commas.
        generator: the same state gives the same changes on the generator's kind of device. None takes torch's global
            one of the images' device.

    Raises:
        ValueError, TypeError: an unknown policy; images are not (B, C, H, W).

    Source: "Differentiable Augmentation for Data-Efficient GAN Training" (Zhao et al. 2020), arXiv 2006.10738; "resize"
    is FuseDream's, arXiv 2112.01573. The authors of SDO use all four on 20 copies, `images.repeat(20, 1, 1, 1)`.
    """

    def __init__(self, policy: str = "color,translation,cutout", generator: torch.Generator | None = None) -> None:
        super().__init__()
        known = {
            "color": self._color,
            "translation": self._translation,
            "resize": self._resize,
            "cutout": self._cutout,
        }
        names = policy.split(",") if isinstance(policy, str) else []
        if not names or not set(names) <= set(known):
            raise ValueError(f"policy must be names out of {', '.join(known)} joined by commas, got {policy!r}")
        _check_generator(generator)
        self.policy, self.generator = policy, generator
        self._changes = [known[name] for name in names]

    def forward(self, images: Tensor) -> Tensor:
        check_images("images", images, None)
        x = 2 * images - 1
        for change in self._changes:
            x = change(x)
        return (x + 1) / 2

    def _uniform(self, x: Tensor, count: int | None = None) -> Tensor:
        """Draws (B, 1, 1, 1), or of another number, in float64: the same for images of any dtype."""
        place = x.device if self.generator is None else self.generator.device
        draws = torch.rand(count or len(x), generator=self.generator, device=place, dtype=torch.float64)
        return draws.to(x.device).view(-1, 1, 1, 1)

    def _color(self, x: Tensor) -> Tensor:
        x = x + (self._uniform(x) - 0.5).to(x.dtype)
        mean = x.mean(1, keepdim=True)
        x = mean + (2 * self._uniform(x)).to(x.dtype) * (x - mean)
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (self._uniform(x) + 0.5).to(x.dtype) * (x - mean)

    def _translation(self, x: Tensor) -> Tensor:
        for dim in (2, 3):
            side = x.shape[dim]
            most = int(side / 8 + 0.5)
            shift = (self._uniform(x) * (2 * most + 1)).long() - most
            source = _along(dim, side, x) - shift
            inside = (source >= 0) & (source < side)
            x = x.gather(dim, source.clamp(0, side - 1).expand_as(x)) * inside
        return x

    def _resize(self, x: Tensor) -> Tensor:
        ratio = 0.8 + 0.4 * self._uniform(x, 1).item()
        size = [max(1, int(ratio * side)) for side in x.shape[2:]]
        resized = functional.interpolate(x, size, mode="bilinear")
        # A negative margin cuts.
        margins = [
            (side, before, full - side - before)
            for full, side in zip(x.shape[2:], size, strict=True)
            for before in [int((full - side) / 2)]
        ]
        (_, top, bottom), (_, left, right) = margins
        return functional.pad(resized, (left, right, top, bottom))

    def _cutout(self, x: Tensor) -> Tensor:
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for dim in (2, 3):
            side = x.shape[dim]
            length = int(side / 2 + 0.5)
            middle = (self._uniform(x) * (side + 1 - length % 2)).long()
            first = middle - length // 2
            at = _along(dim, side, x)
            inside = inside & (at >= first) & (at < first + length)
        return x * ~inside


def _along(dim: int, side: int, x: Tensor) -> Tensor:
    """0 to side - 1 along one of four dimensions."""
    return torch.arange(side, device=x.device).view([-1 if k == dim else 1 for k in range(4)])
