"""Photographs that scikit-image and scikit-learn bring along, and synthetic scenes in their colours, degraded.

The restoration examples run on them.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from degradations import degrade
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor

WINDOW = 512
HELD_OUT_SEEDS = range(1_000_000, 1_000_004)
_TRAIN = ("astronaut", "brick", "camera", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry")
_TRAIN += ("moon", "retina", "rocket")


@cache
def photographs(split: str) -> dict[str, Tensor]:
    """The clean photographs of "train" or "test" by name, (3, H, W) in [0, 1]."""
    if split == "test":
        arrays = {
            "chelsea": skimage.data.chelsea(),
            "coffee": skimage.data.coffee(),
            "china": load_sample_image("china.jpg"),
        }
    elif split == "train":
        left, right, _ = skimage.data.stereo_motorcycle()
        arrays = {name: getattr(skimage.data, name)() for name in _TRAIN}
        arrays |= {"motorcycle_left": left, "motorcycle_right": right, "flower": load_sample_image("flower.jpg")}
    else:
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    return {
        name: torch.from_numpy(np.atleast_3d(array).astype(np.float32) / 255).permute(2, 0, 1).expand(3, -1, -1)
        for name, array in arrays.items()
    }


def recoloured(image: Tensor, generator: Generator) -> Tensor:
    """Another exposure, balance and order of colours, turned by quarters: few photographs are learnt by heart."""
    exponent, gains = (
        2 ** (0.8 * torch.rand((), generator=generator) - 0.4),
        1 - 0.2 * torch.rand(3, generator=generator),
    )
    image = (image**exponent * gains[:, None, None])[torch.randperm(3, generator=generator)]
    return image.rot90(int(torch.randint(4, (), generator=generator)), (1, 2))


def dead_leaves(palette: Tensor, side: int, generator: Generator) -> Tensor:
    """A synthetic scene (3, side, side) in [0, 1]: superellipses that cover each other, shaded and rough.

    Radii r have the density r**-3 of scale invariant scenes; colours are those of random pixels of `palette`, a
    photograph.
    Model: Lee, Mumford and Huang, Occlusion models for natural images, IJCV 2001; for training: Achddou, Gousseau and
    Ladjal, Synthetic images as a regularity prior for image restoration neural networks, SSVM 2021.
    """
    count, colours = max(1, side * side // 100), palette.flatten(1).T
    colours = colours[torch.randint(len(colours), (count + 1,), generator=generator)][:, :, None, None]
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)).clamp(min=1 / side)
    texture = torch.fft.rfft2(torch.randn(side, side, generator=generator)) / frequency
    texture = torch.fft.irfft2(texture, s=(side, side))
    texture = texture / texture.std()
    line = torch.arange(float(side))
    scene = (colours[-1] * (1 + 0.1 * texture)).clamp(0, 1)
    for colour, drawn in zip(colours, torch.rand(count, 9, generator=generator).tolist(), strict=False):
        y, x, size, angle, flat, shape, soft, slope, rough = drawn
        y, x, radius = y * side, x * side, min(4 * (1 - size) ** -0.5, 0.4 * side)
        box = tuple(slice(max(0, int(centre - 1.5 * radius) - 1), int(centre + 1.5 * radius) + 2) for centre in (y, x))
        dy, dx = (line[box[0], None] - y) / radius, (line[box[1]] - x) / radius
        cos, sin = math.cos(math.pi * angle), math.sin(math.pi * angle)
        u, v = dy * cos + dx * sin, dx * cos - dy * sin
        power = 2.0 ** (3 * shape)  # from diamonds over ellipses to rectangles
        norm = (u.abs() ** power + ((1 + 2 * flat) * v.abs()) ** power) ** (1 / power)
        cover = (radius * (1 - norm) / (1 + soft) + 0.5).clamp(0, 1)
        shade = 1 + (slope - 0.5) * u + 0.2 * rough**2 * texture[box]
        scene[:, box[0], box[1]].lerp_((colour * shade).clamp(0, 1), cover.expand(3, -1, -1))
    return scene


def window(image: Tensor, generator: Generator) -> Tensor:
    """A random view: scaled by 0.5 to 1, at most WINDOW pixels a side."""
    scale = 0.5 + 0.5 * torch.rand((), generator=generator).item()
    sides = [max(1, round(side * scale)) for side in image.shape[1:]]
    image = F.interpolate(image[None], sides, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return random_crop(image, generator, *(min(side, WINDOW) for side in sides))


def random_crop(image: Tensor, generator: Generator, height: int, width: int) -> Tensor:
    """A window at a random place, mirrored half of the time."""
    top, left = (
        int(torch.randint(side - size + 1, (), generator=generator))
        for side, size in zip(image.shape[1:], (height, width), strict=True)
    )
    image = image[:, top : top + height, left : left + width]
    return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image


@lru_cache(maxsize=1)
def scenes(task: str, seed: int, recolour: bool = False, leaves: float = 0.0) -> list[Tensor]:
    """A random view of every training photograph and its degradation, (6, H, W) each: degraded, then clean.

    A share `leaves` of them are dead leaves in the photograph's colours instead.
    """
    generator = Generator().manual_seed(seed)
    views = []
    for image in photographs("train").values():
        if leaves and torch.rand((), generator=generator) < leaves:
            image = dead_leaves(image, 3 * WINDOW // 4, generator)
        views.append(window(recoloured(image, generator) if recolour else image, generator))
    return [torch.cat((degrade(view, task, seed * 1009 + i), view)) for i, view in enumerate(views)]
