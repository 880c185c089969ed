"""The ten tasks of SWFormer's paper as seeded synthetic degradations of clean photographs.

    degraded = degrade(photograph, "rain_streaks", seed=3)

    python examples/degradations.py clean.png --task haze --seed 3 --out hazy.png

Each follows a published formation model, named in its docstring; strengths and shapes are drawn from the generator. An
image is a floating tensor (3, H, W) in [0, 1] of any H, W >= 1. Where light is blurred or dimmed the model holds for
linear intensities, so those steps work on `J**GAMMA` and undo the power afterwards.

They are stand-ins: real weather and real cameras are more various than these.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GAMMA = 2.2
LARGEST_QUANTILE = 16_000_000
"""Numbers of which torch.quantile gives one: it takes no more than 2**24."""
JERLOV = {
    "II": (0.26, 0.076, 0.062),
    "III": (0.295, 0.116, 0.116),
    "1C": (0.30, 0.13, 0.17),
    "3C": (0.33, 0.20, 0.29),
}
"""Attenuation per metre at 600, 525 and 475 nm (red, green, blue) of water types: Jerlov, Marine Optics (1976)."""


def degrade(image: Tensor, task: str, seed: int = 0) -> Tensor:
    """`DEGRADATIONS[task]` of an image (3, H, W) in [0, 1], with the same shape, dtype, device and range.

    The random numbers depend on the seed and the size alone: equal arguments give equal bits.

    Raises:
        ValueError: for an unknown task, another shape, or values outside [0, 1].
        TypeError: image is no floating tensor.
    """
    if task not in DEGRADATIONS:
        raise ValueError(f"task must be one of {', '.join(DEGRADATIONS)}, got {task!r}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError(f"image must be a floating tensor, got {getattr(image, 'dtype', type(image).__name__)}")
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image must have shape (3, H, W) with H, W >= 1, got {tuple(image.shape)}")
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"image must be in [0, 1], got values from {image.min():.3g} to {image.max():.3g}")
    degraded = DEGRADATIONS[task](image.cpu().float(), torch.Generator().manual_seed(seed))
    return degraded.clamp(0, 1).to(image)


# Random numbers and filters


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _fractal(height: int, width: int, generator: Generator, octaves: int = 4) -> Tensor:
    """Value noise in [0, 1]: random grids of 2, 4, 8 ... cells a side, enlarged and added with halving weights."""
    grids = [torch.rand(1, 1, 2**k + 1, 2**k + 1, generator=generator) / 2**k for k in range(1, octaves + 1)]
    size = (height, width)
    field = torch.stack([F.interpolate(g, size, mode="bicubic", align_corners=True)[0, 0] for g in grids]).sum(0)
    low, high = field.aminmax()
    return (field - low) / (high - low).clamp(min=1e-6)


def _depth(height: int, width: int, generator: Generator) -> Tensor:
    """A scene's depth in [0, 1]: ground that recedes towards the top of the picture, and uneven things on it."""
    ground = torch.linspace(1, 0, height)[:, None].expand(height, width)
    share = _uniform(0.4, 0.8, generator)
    return share * ground + (1 - share) * _fractal(height, width, generator)


def _convolve(padded: Tensor, kernel: Tensor) -> Tensor:
    """Convolution (..., H + K - 1, W + K - 1) -> (..., H, W) with a (K, K) kernel, K odd, by the FFT."""
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=size)
    border = kernel.shape[-1] - 1
    return torch.fft.irfft2(spectrum, s=size)[..., border:, border:]


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolution with an odd kernel, the image's edge pixels repeated outside it."""
    radius = kernel.shape[-1] // 2
    return _convolve(F.pad(image[None], (radius,) * 4, mode="replicate")[0], kernel)


def _grid(radius: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a (2 radius + 1)-sided kernel, counted from its centre."""
    line = torch.arange(-radius, radius + 1.0)
    return torch.meshgrid(line, line, indexing="ij")


def _disc(radius: float) -> Tensor:
    """A disc of sum 1 whose rim is antialiased."""
    y, x = _grid(math.ceil(radius))
    disc = (radius + 0.5 - torch.hypot(y, x)).clamp(0, 1)
    return disc / disc.sum()


def _line(length: float, angle: float, width: float) -> Tensor:
    """A streak of peak 1, `length` pixels long, `angle` radians from the vertical, Gaussian across."""
    y, x = _grid(math.ceil(length / 2 + 2 * width))
    along = y * math.cos(angle) + x * math.sin(angle)
    across = x * math.cos(angle) - y * math.sin(angle)
    return (length / 2 + 0.5 - along.abs()).clamp(0, 1) * torch.exp(-0.5 * (across / width) ** 2)


def _sprinkle(height: int, width: int, density: float, kernel: Tensor, generator: Generator) -> Tensor:
    """Copies of a kernel at random places, `density` of them a pixel, each of random strength; overlaps add."""
    border = kernel.shape[-1] - 1
    places = torch.rand(height + border, width + border, generator=generator) < density
    strength = 0.5 + 0.5 * torch.rand(places.shape, generator=generator)
    return _convolve(places * strength, kernel).clamp(0, 1)


# The ten tasks


def rain_streaks(image: Tensor, generator: Generator) -> Tensor:
    """Streaks of falling rain, brighter than what is behind them: the screen blend `I = 1 - (1 - J) * (1 - R)`.

    R holds two layers of streaks about one wind direction, long and sparse near the camera, short and dense far away.
    Model: Luo, Xu and Ji, Removing rain from a single image via discriminative sparse coding, ICCV 2015.
    """
    height, width = image.shape[1:]
    wind, rain = _uniform(-0.5, 0.5, generator), torch.zeros(height, width)
    layers = (((18, 36), (0.8, 1.2), (0.0012, 0.0024), (0.4, 0.7)), ((8, 16), (0.5, 0.7), (0.004, 0.008), (0.2, 0.4)))
    for length, thickness, density, brightness in layers:
        angle = wind + _uniform(-0.08, 0.08, generator)
        streak = _line(_uniform(*length, generator), angle, _uniform(*thickness, generator))
        mask = _sprinkle(height, width, _uniform(*density, generator), streak, generator)
        rain = 1 - (1 - rain) * (1 - _uniform(*brightness, generator) * mask)
    return 1 - (1 - image) * (1 - rain)


def raindrops(image: Tensor, generator: Generator) -> Tensor:
    """Drops on the glass before the lens: `I = (1 - M) * J + M * R`.

    A drop is a small wide-angle lens: inside, R is the scene around it, upside down, minified, out of focus and
    slightly brighter. M is 1 inside the drops with soft rims.
    Model: Qian et al., Attentive generative adversarial network for raindrop removal, CVPR 2018; the refraction after
    von Bernuth, Volk and Bringmann, Simulating photo-realistic snow and fog and rain on camera lenses, 2018.
    """
    height, width = image.shape[1:]
    rows, columns = torch.arange(float(height))[:, None], torch.arange(float(width))
    source_y, source_x = rows.expand(height, width).clone(), columns.expand(height, width).clone()
    mask = torch.zeros(height, width)
    for _ in range(1 + int(height * width * _uniform(2e-4, 5e-4, generator))):
        y, x = _uniform(0, height, generator), _uniform(0, width, generator)
        radius, stretch = _uniform(3, 12, generator), _uniform(1, 1.4, generator)
        top, left = max(0, int(y - 1.5 * radius) - 2), max(0, int(x - radius) - 2)
        box = (slice(top, int(y + 1.5 * radius) + 3), slice(left, int(x + radius) + 3))
        dy, dx = rows[box[0]] - y, columns[box[1]] - x
        drop = (radius + 0.5 - torch.hypot(dy / stretch, dx)).clamp(0, 2) / 2
        source_y[box] = torch.where(drop > 0, y - 4 * dy, source_y[box])
        source_x[box] = torch.where(drop > 0, x - 4 * dx, source_x[box])
        mask[box] = torch.maximum(mask[box], drop)
    grid = torch.stack((2 * source_x / max(width - 1, 1) - 1, 2 * source_y / max(height - 1, 1) - 1), dim=-1)
    scene = _blur(image, _disc(3.0))
    refracted = F.grid_sample(scene[None], grid[None], padding_mode="reflection", align_corners=True)[0]
    return (1 - mask) * image + mask * (refracted * _uniform(1.05, 1.25, generator)).clamp(max=1)


def haze(image: Tensor, generator: Generator) -> Tensor:
    """Light scattered out of and into the line of sight: `I = J * t + A * (1 - t)`, `t = exp(-beta * d)`.

    A is the airlight, grey in [0.7, 1]; beta in [0.6, 1.8] as in the RESIDE data set; d a synthetic depth.
    Model: Koschmieder (1924); Narasimhan and Nayar, Vision and the atmosphere, IJCV 2002.
    """
    depth = 0.3 + 0.9 * _depth(*image.shape[1:], generator)
    t = torch.exp(-_uniform(0.6, 1.8, generator) * depth)
    return image * t + _uniform(0.7, 1, generator) * (1 - t)


def snow(image: Tensor, generator: Generator) -> Tensor:
    """Falling flakes that hide what is behind them: `I = A * Z + J * (1 - Z)`.

    Z, the opacity, holds flakes of three sizes, each drawn out along one direction; A is their colour, near white.
    Model: Liu et al., DesnowNet, IEEE TIP 2018.
    """
    height, width = image.shape[1:]
    wind, clear = _uniform(-0.6, 0.6, generator), torch.ones(height, width)
    for radius, density in ((0.8, 6e-3), (1.8, 1.5e-3), (3.5, 3e-4)):
        radius *= _uniform(0.8, 1.3, generator)
        flake = _line(_uniform(1, 3, generator) * radius, wind, radius / 2)
        mask = _sprinkle(height, width, density * _uniform(0.6, 1.4, generator), flake, generator)
        clear = clear * (1 - _uniform(0.6, 0.95, generator) * mask)
    colour = 1 - 0.1 * torch.rand(3, 1, 1, generator=generator)
    return colour * (1 - clear) + image * clear


def motion_blur(image: Tensor, generator: Generator) -> Tensor:
    """The camera moves while the shutter is open: `I = (k * J**2.2)**(1 / 2.2)`, `*` a convolution.

    k is the trajectory of a point with inertia that is shaken at random, spread over the time of exposure.
    Model: Boracchi and Foi, Modeling the performance of image restoration from motion blur, IEEE TIP 2012; linear
    light as in Nah, Kim and Lee, Deep multi-scale CNN for dynamic scene deblurring, CVPR 2017.
    """
    steps, length = 200, _uniform(9, 19, generator)
    heading = _uniform(0, 2 * math.pi, generator)
    velocity = torch.tensor([math.sin(heading), math.cos(heading)])
    shake = 0.12 * torch.randn(steps, 2, generator=generator)
    places = []
    place = torch.zeros(2)
    for kick in shake:
        velocity = F.normalize(velocity + kick, dim=0)
        place = place + velocity
        places.append(place)
    path = torch.stack(places)
    path = (path - (path.amin(0) + path.amax(0)) / 2) * (length / (path.amax(0) - path.amin(0)).max())
    y, x = _grid(math.ceil(length / 2) + 1)
    near = (1 - (y[..., None] - path[:, 0]).abs()).clamp(min=0) * (1 - (x[..., None] - path[:, 1]).abs()).clamp(min=0)
    kernel = near.sum(-1)
    return _blur(image**GAMMA, kernel / kernel.sum()).clamp(0, 1) ** (1 / GAMMA)


def defocus_blur(image: Tensor, generator: Generator) -> Tensor:
    """A thin lens focused at another depth: each layer of depth d is convolved with a disc of radius ~ |1/d - 1/f|.

    Layers are blurred with their opacity m_d and divided by its sum, `I = sum_d k_d * (m_d J) / sum_d k_d * m_d`,
    in linear light, so that neither layer darkens at the rim of another.
    Model: Potmesil and Chakravarty, A lens and aperture camera model, SIGGRAPH 1981.
    """
    inverse = 1 / (0.5 + 2 * _depth(*image.shape[1:], generator))
    sample = inverse.flatten()[:: 1 + inverse.numel() // LARGEST_QUANTILE]
    focus = torch.quantile(sample, torch.tensor([0.0, 0.15, 0.85, 1.0]))[_integer(0, 3, generator)]
    circle = (inverse - focus).abs()
    circle = 1 + _uniform(3, 6, generator) * circle / circle.max().clamp(min=1e-6)
    light, opacity = torch.zeros_like(image), torch.zeros(image.shape[1:])
    for radius in range(1, 8):
        member = (1 - (circle - radius).abs()).clamp(min=0)
        light += _blur(member * image**GAMMA, _disc(radius))
        opacity += _blur(member[None], _disc(radius))[0]
    return (light / opacity.clamp(min=1e-3)).clamp(0, 1) ** (1 / GAMMA)


def cloud(image: Tensor, generator: Generator) -> Tensor:
    """Clouds between a satellite and the ground: `I = L * J * t + L * (1 - t)`, sunlight L = 1 reflected by clouds.

    t, the clouds' transmission, is fractal, 1 in the gaps and down to 0.3 in the thick of a cloud.
    Model: Mitchell, Delp and Chen, Filtering to remove cloud cover in satellite imagery, 1977.
    """
    field = _fractal(*image.shape[1:], generator, octaves=6)
    begin = _uniform(0.1, 0.35, generator)
    cover = ((field - begin) / (1 - begin)).clamp(min=0) ** 0.7
    t = 1 - _uniform(0.5, 0.7, generator) * cover
    return image * t + (1 - t)


def shadow(image: Tensor, generator: Generator) -> Tensor:
    """Things out of the picture hide the sun but not the sky: `I**2.2 = J**2.2 * (s + (1 - s) * a)`.

    s is the visible share of the sun, between 0 and 1 in the penumbra, and a the ambient share of the light by colour,
    with more blue than red in it.
    Model: Barrow and Tenenbaum, Recovering intrinsic scene characteristics from images, 1978; Shor and Lischinski, The
    shadow meets the mask, 2008.
    """
    height, width = image.shape[1:]
    side = 2 * (max(1, min(height, width) // _integer(30, 80, generator))) + 1
    field = _fractal(height, width, generator, octaves=3)
    level = torch.quantile(field.flatten()[:: 1 + field.numel() // 100_000], _uniform(0.35, 0.6, generator))
    sun = _blur((field > level).float()[None], _disc(side / 2))[0].clamp(0, 1)
    ambient = _uniform(0.15, 0.35, generator) * torch.tensor([0.85, 1.0, 1.2]).view(3, 1, 1)
    return image * (sun + (1 - sun) * ambient) ** (1 / GAMMA)


def underwater(image: Tensor, generator: Generator) -> Tensor:
    """Water takes red first and adds its own colour: `I = J * t + B * (1 - t)`, `t = exp(-beta * d)` for each colour.

    beta is that of one of four of Jerlov's water types, d from 1 to 8 metres. B, the veiling light, is what the water
    above leaves of the daylight.
    Model: Jaffe, Computer modeling and the design of optimal underwater imaging systems, 1990, as simplified by Chiang
    and Chen, IEEE TIP 2012.
    """
    kinds = torch.tensor(list(JERLOV.values()))
    beta = kinds[_integer(0, len(JERLOV) - 1, generator)].view(3, 1, 1)
    distance = _uniform(1, 3, generator) + _uniform(2, 5, generator) * _depth(*image.shape[1:], generator)
    t = torch.exp(-beta * distance)
    veil = torch.exp(-beta * _uniform(2, 6, generator)) * _uniform(0.8, 1, generator)
    return image * t + veil * (1 - t)


def low_light(image: Tensor, generator: Generator) -> Tensor:
    """Too little light, and the sensor's noise: `I = L + n`, `L = b * (a * J)**g`, `var(n) = p * L + r**2`.

    The curve and its ranges (a in [0.9, 1], b in [0.5, 1], here g in [1.5, 3.5]) are those of Lv et al., MBLLEN,
    BMVC 2018; shot and read noise after Foi et al., Practical Poissonian-Gaussian noise modeling, IEEE TIP 2008.
    """
    dark = _uniform(0.5, 1, generator) * (_uniform(0.9, 1, generator) * image) ** _uniform(1.5, 3.5, generator)
    shot, read = _uniform(0, 1e-3, generator), _uniform(0.002, 0.01, generator)
    return dark + torch.randn(image.shape, generator=generator) * (shot * dark + read**2).sqrt()


DEGRADATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    f.__name__: f
    for f in (
        rain_streaks,
        raindrops,
        haze,
        snow,
        motion_blur,
        defocus_blur,
        cloud,
        shadow,
        underwater,
        low_light,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    from runs import write_atomically

    from swformer_fast.tools.files import PICTURES, check_writable
    from swformer_fast.tools.pictures import read, write

    parser = argparse.ArgumentParser(description="Degrade a picture.")
    parser.add_argument("image", type=Path, help="clean picture")
    parser.add_argument("--task", choices=DEGRADATIONS, required=True, help="degradation")
    parser.add_argument("--seed", type=int, default=0, help="of its random numbers (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="degraded picture to write")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in PICTURES:
        parser.error(f"--out {args.out} must end in one of {', '.join(PICTURES)}")
    try:
        check_writable(args.out)
        picture = read(args.image)
        degraded = picture.restored(degrade(picture.rgb(), args.task, args.seed))
        write_atomically(args.out, lambda partial: write(degraded, partial))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
