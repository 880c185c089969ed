"""The plain sampling loops: full backpropagation, and the gradient shortcut as its authors wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_checkpointed

from ..model import GuidedModel
from ..paths import draw_step, grad_step_choices
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


def sdo_loop(
    model: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    num_inference_steps: int | None = 50,
    start: int = 0,
    grad_step: str | int = "first",
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    schedule_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """x_0 with the graph of one step of the model: Shortcut Diffusion Optimization (arXiv 2505.07477).

        x_{i+1} = S_i(x_i, eps(x_i, t_i) if i == grad_step else eps(x_i, t_i).detach())

    The scheduler's own arithmetic S_i stays differentiable in x_i, and guidance in a tensor w: only what the model
    returns is a constant. Arguments as in `sdo_fast.ShortcutSampler`, of which this is the definition.
    """
    solver = Solver(scheduler, num_inference_steps, start, step_kwargs, schedule_kwargs).begin(generator)
    eps = GuidedModel(model, len(latents), guidance_scale, model_kwargs, uncond_kwargs, solver.learned_variance)
    times = solver.timesteps.to(latents.device)
    chosen = draw_step(grad_step_choices(grad_step, solver), generator)
    x = latents
    for i in solver.steps:
        outputs = eps.evaluate(solver.scale_input(x, i), times[i])
        x = solver.step(eps.combine(*(outputs if i == chosen else (o.detach() for o in outputs))), i, x)
    return x
