"""DDIM inversion: the latents from which a sampler gives a known image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._progress import bar
from .arguments import check_flag, is_integer
from .sampler import ShortcutSampler, check_latents, check_sampler
from .schedulers import noise_levels, step_coefficients


@dataclass(frozen=True)
class Inversion:
    latents: Tensor
    """The approximate input of step `upto`."""
    reconstruction: Tensor
    """What sampling from `latents` gives back."""
    error: float
    """||reconstruction - image_latents|| / ||image_latents||"""


@torch.no_grad()
def invert(
    sampler: ShortcutSampler,
    image_latents: Tensor,
    upto: int,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    iterations: int = 1,
    progress: bool = False,
) -> Inversion:
    """The input of step `upto` whose sampling gives `image_latents`: start a sampler with start=upto from it.

    A step x_{i+1} = a_i x_i + b_i eps(x_i, t_i) is undone, from the last one back, by

        x_i = (x_{i+1} - b_i eps(x_i, t_i)) / a_i,

    beginning with x_{i+1}, brought to the norm of step i's noise level, in the place of x_i on the right: one iteration
    is DDIM inversion (arXiv 2010.02502, section 4.3), with epsilon prediction as by diffusers' DDIMInverseScheduler.
    More `iterations` of this fixed point, each one model call more a step, bring the error down where it contracts.

    Needs a deterministic affine scheduler without history (DDIM, Euler, FlowMatchEuler): its timesteps, guidance and
    model are the sampler's, its `start` is not used. Raises ValueError or NotAffineError for others.
    """
    check_sampler(sampler)
    check_latents(image_latents, name="image_latents")
    check_flag("progress", progress)
    solver = sampler.solver.starting_at(0)
    if not is_integer(upto) or not 0 <= upto < len(solver):
        raise ValueError(f"upto must be an index into the {len(solver)} timesteps, got {upto!r}")
    if not is_integer(iterations) or iterations < 1:
        raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
    a, b = (coefficients.tolist() for coefficients in step_coefficients(solver))
    if 0 in a[upto:]:
        raise ValueError(
            f"scheduler must keep something of the input of every step, got {solver.name}, whose step "
            f"{a.index(0, upto)} keeps nothing (as the last one of sample prediction), so it cannot be undone"
        )
    norms = [math.hypot(alpha, sigma) for alpha, sigma in zip(*noise_levels(solver), strict=True)]
    norms.append(1.0)
    eps = sampler.guided(image_latents, model_kwargs, uncond_kwargs)
    times = solver.timesteps.to(image_latents.device)

    x = image_latents
    for k in bar(range(len(solver) - upto), "inversion", progress):
        i = len(solver) - 1 - k
        here, following = solver.starting_at(i), x
        x = following * (norms[i] / norms[i + 1])
        for _ in range(iterations):
            output = eps.combine(*sampler.evaluate(eps, here.scale_input(x, i), times[i]))
            x = (following - b[i] * output) / a[i]

    reconstruction = sampler.run(sampler.stepper_from(upto).begin(), eps, x, range(upto, len(solver)))
    error = ((reconstruction - image_latents).norm() / image_latents.norm()).item()
    return Inversion(x, reconstruction, error)
