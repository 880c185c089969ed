"""The photographs that scikit-image and scikit-learn bring along, degraded: what the restoration examples run on."""

from __future__ import annotations

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
def scenes(task: str, seed: int, recolour: bool = False) -> list[Tensor]:
    """A random view of every training photograph and its degradation, (6, H, W) each: degraded, then clean."""
    generator = Generator().manual_seed(seed)
    views = [
        window(recoloured(photograph, generator) if recolour else photograph, generator)
        for photograph in photographs("train").values()
    ]
    return [torch.cat((degrade(view, task, seed * 1009 + i), view)) for i, view in enumerate(views)]
