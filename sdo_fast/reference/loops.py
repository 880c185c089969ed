"""The plain sampling loops: full backpropagation, and any gradient path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_checkpointed

from ..model import GuidedModel
from ..noise import randn
from ..paths import AnyPath, as_path, draw
from ..schedulers import noise_level, posterior_mean, schedule_of
from ..solver import Solver


def full_backprop(
    model: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    num_inference_steps: int | None = 50,
    start: int = 0,
    guidance_scale: float | Tensor | None = None,
    checkpoint: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    schedule_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """x_0 with the graph of every step: x_{i+1} = S_i(x_i, eps(x_i, t_i)), from the input `latents` of step `start`.

    `checkpoint` recomputes each step's model in backward instead of keeping its activations. Arguments as in
    `sdo_fast.ShortcutSampler`.
    """
    solver = Solver(scheduler, num_inference_steps, start, step_kwargs, schedule_kwargs).begin(generator)
    eps = GuidedModel(model, len(latents), guidance_scale, model_kwargs, uncond_kwargs, solver.learned_variance)
    times = solver.timesteps.to(latents.device)
    x = latents
    for i in solver.steps:
        scaled = solver.scale_input(x, i)
        output = run_checkpointed(eps, scaled, times[i], use_reentrant=False) if checkpoint else eps(scaled, times[i])
        x = solver.step(output, i, x)
    return x


def path_loop(
    model: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    num_inference_steps: int | None = 50,
    start: int = 0,
    path: AnyPath = "first",
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    schedule_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """x_0 with the graph of the path's steps of the model (`sdo_fast.paths` has the equations).

    The scheduler's own arithmetic S_i stays differentiable in x_i, and guidance in a tensor w: only what the model
    returns is a constant. Arguments as in `sdo_fast.ShortcutSampler`, of which this is the definition.
    """
    solver = Solver(scheduler, num_inference_steps, start, step_kwargs, schedule_kwargs)
    drawn = draw(as_path(path), schedule_of(solver), generator)
    eps = GuidedModel(model, len(latents), guidance_scale, model_kwargs, uncond_kwargs, solver.learned_variance)
    times, run = solver.timesteps.to(latents.device), solver.begin(generator)
    x = latents
    for i in solver.steps:
        if i in drawn.shares:
            outputs = eps.evaluate(run.scale_input(with_gradient(x, drawn.shares[i]), i), times[i])
            output = eps.combine(*(with_gradient(o, drawn.weight(i)) for o in outputs))
        else:
            outputs = eps.evaluate(run.scale_input(x, i), times[i])
            output = eps.combine(*(o.detach() for o in outputs))
        if i == drawn.stop:
            p, q = posterior_mean(solver, i)
            return p * x + q * output[:, : x.shape[1]]
        x = run.step(output, i, x)
    last = solver.steps.stop - 1
    for _ in range(drawn.noises):
        alpha, sigma = noise_level(solver, last)
        noise = randn(x.shape, generator, x.device, x.dtype)
        noised = solver.starting_at(last).scale_input(alpha * x.detach() + sigma * noise, last)
        output = eps(noised, times[last])[:, : x.shape[1]]
        mean = posterior_mean(solver, last)[1] / (drawn.noises + 1) * output
        x = x + (mean - mean.detach())
    return x


def with_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with so much of its gradient."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())
