"""Gradients of losses that have none (experimental)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import check_batch, is_integer, number
from .noise import randn


@dataclass(frozen=True)
class ScoreFunction:
    r"""The gradient of a loss L from its values at perturbed images: `optimize_latents(..., estimate=ScoreFunction())`.

    Experimental. With s = `scale`, Q = `samples` and eps_q ~ N(0, I) the gradient of the smoothed loss
    E L(x + s eps) is E[L(x + s eps) eps] / s (the score function's identity), estimated for each image by pairs

        g(x) = 1 / (Q s) sum_{q <= Q/2} (L(x + s eps_q) - L(x - s eps_q)) eps_q,

    and goes on from x = x_0 to the latents by autograd, the shortcut's gradient. The antithetic pairs take L(x) and
    all other even terms out of the variance, as the best of baselines would. Unbiased for the smoothed loss, whose
    gradient is that of L itself where L is linear or quadratic. For a linear L the variance of each of n elements is
    about |grad L|^2 2 / Q: of the direction 1 / sqrt(1 + 2 n / Q) is right, so images of many pixels take many samples,
    or a small lr.

    The noise is new at each iteration. `scale` is in the units of x_0 (of an image in [-1, 1], 0.02 is 2.5 of 255
    grey levels): large enough that the loss changes, small enough that x_0 stays an image. Source: the hybrid gradient
    (values of the loss, autograd for the sampler) of "Inference-Time Alignment of Diffusion Models with Direct Noise
    Optimization", arXiv 2405.18881.

    Raises:
        TypeError, ValueError: samples is no positive even integer, scale no positive number, generator none.
    """

    samples: int = 16
    scale: float = 0.02
    generator: torch.Generator | None = None
    """For eps; torch's global one where None."""

    def __post_init__(self) -> None:
        if not is_integer(self.samples) or self.samples < 2 or self.samples % 2:
            raise ValueError(f"samples must be a positive even integer, got {self.samples!r}")
        if not number("scale", self.scale, 0):
            raise ValueError(f"scale must be greater than 0, got {self.scale!r}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")

    @torch.no_grad()
    def gradient(self, loss_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """g(x), like x (B, ...). `loss_fn` takes `samples * B` images, the B images of one eps after those of another,
        and returns a loss for each, of shape (samples * B,).
        """
        check_batch("x", x)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
        pairs = self.samples // 2
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = randn((pairs, *x.shape), self.generator, x.device, wide)
        images = torch.cat([x + self.scale * eps, x - self.scale * eps]).flatten(0, 1).to(x.dtype)
        plus, minus = per_image(loss_fn(images), len(images)).to(wide).view(2, pairs, len(x))
        slope = (plus - minus) / (self.samples * self.scale)
        return torch.einsum("qb,qb...->b...", slope, eps).to(x.dtype)


def per_image(losses: Tensor, count: int) -> Tensor:
    """The losses, which must be one an image."""
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must return one loss an image, shape ({count},), with estimate, got {got}")
    return losses
