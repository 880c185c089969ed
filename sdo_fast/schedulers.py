"""What a scheduler does to its latents and model outputs: x_0 as an affine function of both, with its coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference.solver import Solver, config

# Relative to the largest coefficient; the smallest honest ones (late steps of a schedule of 1000) are above 1e-6.
NEGLIGIBLE = 1e-12
CLIPPING = ("clip_sample", "clip_denoised")
"""Flags of diffusers' schedulers that clip the predicted sample."""


class NotAffineError(ValueError):
    """x_0 is not an affine function of the latents and model outputs; only autograd through the scheduler is right."""


def coefficients(
    scheduler: Any,
    num_inference_steps: int | None,
    start: int = 0,
    *,
    step_kwargs: Mapping[str, Any] | None = None,
    schedule_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B of x_0 = A_i x_i + B_i eps_i + (terms without x_i and eps_i), for every step i of an affine scheduler.

    eps_i is the output of the model call at `timesteps[i]`, whatever the scheduler takes it for (noise, v, velocity,
    sample), and the other calls' outputs are held constant. So, with the model's graph kept at step s alone,

        d x_0 / d x_s = A_s I + B_s d eps / d x_s        d x_0 / d p = B_s d eps / d p   (p: parameter or condition)

    (the gradient shortcut of arXiv 2505.07477). Both are found by one autograd pass of the scheduler over a latent of
    one element in float64, so they are as exact as the scheduler's own arithmetic.

    Returns:
        A, B: float64 tensors of `len(timesteps)` entries; those before `start` are NaN. Schedulers that call the model
        twice per step (Heun, KDPM2) have an entry per call.

    Raises:
        NotAffineError: clipping, thresholding, learned variance, or a result that is measurably not affine.
    """
    solver = Solver(scheduler, num_inference_steps, start, step_kwargs, schedule_kwargs)
    refuse_not_affine(solver)
    return sensitivities(solver)


def refuse_not_affine(solver: Solver, clipped: bool = False) -> None:
    """Raise NotAffineError with the reason, from the configuration or from what the scheduler does to large numbers.

    `clipped` allows for clipping of the predicted sample, and measures nothing.
    """
    name = type(solver.scheduler).__name__
    effects = dict.fromkeys(() if clipped else CLIPPING, "clips the predicted sample")
    effects["thresholding"] = "thresholds the predicted sample"
    for flag, effect in effects.items():
        if config(solver.scheduler, flag, False):
            raise NotAffineError(f"scheduler: {name} {effect} ({flag}=True); set {flag}=False or use the general path")
    if solver.learned_variance:
        raise NotAffineError(f"scheduler: {name} reads its variance from the model (learned variance)")
    _refuse_tensors(solver)
    if clipped:
        return
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(2, 1 + len(solver), generator=draw, dtype=torch.float64) * 10
    a, b = sensitivities(solver)
    origin, moved = (_pass(solver, point[0].reshape(1, 1, 1, 1), point[1:]).item() for point in points)
    terms = (points[1] - points[0])[[0, *(1 + i for i in solver.steps)]] * torch.cat(
        [a[solver.start, None], b[solver.start :]]
    )
    scale = terms.abs().sum().item() + abs(origin) + abs(moved)
    if not abs(moved - origin - terms.sum().item()) <= 1e-4 * scale:
        raise NotAffineError(
            f"scheduler: the result of {name} is not an affine function of the latents and model outputs"
        )


def sensitivities(solver: Solver) -> tuple[Tensor, Tensor]:
    """d x_0 / d x_i and d x_0 / d eps_i at zero, NaN before `start`: A and B where the scheduler is affine."""
    shifts = torch.zeros(len(solver), dtype=torch.float64, requires_grad=True)
    outputs = torch.zeros(len(solver), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        x0 = _pass(solver, torch.zeros(1, 1, 1, 1, dtype=torch.float64), outputs, shifts)
        a, b = torch.autograd.grad(x0.sum(), (shifts, outputs), allow_unused=True, materialize_grads=True)
    a[: solver.start] = b[: solver.start] = torch.nan
    return a, b


def _pass(solver: Solver, x: Tensor, outputs: Tensor, shifts: Tensor | None = None, seed: int = 0) -> Tensor:
    """x_0 from x and given model outputs, with the same noise for the same seed."""
    run = solver.begin(torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for schedulers whose step takes no generator
        for i in run.steps:
            if shifts is not None:
                x = x + shifts[i]
            output = outputs[i].reshape(1, 1, 1, 1)
            if run.learned_variance:
                output = torch.cat([output, torch.zeros_like(output)], dim=1)
            run.scale_input(x, i)
            x = run.step(output, i, x)
    return x


def refuse_stochastic(solver: Solver) -> None:
    """ValueError where the scheduler draws noise of its own."""
    zeros, outputs = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(len(solver), dtype=torch.float64)
    if not torch.equal(*(_pass(solver, zeros, outputs, seed=seed) for seed in (0, 1))):
        raise ValueError(
            f"scheduler: {type(solver.scheduler).__name__} adds fresh noise, a deterministic one is needed"
        )


def step_coefficients(solver: Solver) -> tuple[Tensor, Tensor]:
    """a and b of x_{i+1} = a_i x_i + b_i eps_i, for deterministic affine schedulers that keep no history.

    float64 tensors of `len(timesteps)` entries, NaN before `start`; NotAffineError for others.
    """
    refuse_not_affine(solver)
    refuse_stochastic(solver)
    inputs = torch.zeros(len(solver), dtype=torch.float64, requires_grad=True)
    outputs = torch.zeros(len(solver), dtype=torch.float64, requires_grad=True)
    coefficients = torch.full((2, len(solver)), torch.nan, dtype=torch.float64)
    run = solver.begin()
    with torch.enable_grad():
        for i in run.steps:
            x = inputs[i].reshape(1, 1, 1, 1)
            run.scale_input(x, i)
            following = run.step(outputs[i].reshape(1, 1, 1, 1), i, x)
            rows = torch.autograd.grad(
                following.sum(), (inputs, outputs), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for own, row in zip(coefficients, rows, strict=True):
                own[i] = row[i]
                if row.count_nonzero() > (row[i] != 0):
                    name = type(solver.scheduler).__name__
                    raise NotAffineError(
                        f"scheduler: {name} uses the history of earlier steps, one that keeps none is needed"
                    )
    return coefficients[0], coefficients[1]


def noise_levels(solver: Solver) -> tuple[list[float], list[float]]:
    """alpha and sigma of every step's state x = alpha x_0 + sigma noise, as the scheduler adds noise."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    alphas, sigmas = [], []
    for i in range(len(solver)):
        scheduler = copy.deepcopy(solver.scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        t = solver.timesteps[i].reshape(1)
        if hasattr(scheduler, "add_noise"):
            pair = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
        elif hasattr(scheduler, "scale_noise"):
            pair = scheduler.scale_noise(one, t, zero), scheduler.scale_noise(zero, t, one)
        else:
            raise ValueError(f"scheduler: {type(scheduler).__name__} has neither add_noise nor scale_noise")
        alphas.append(pair[0].item())
        sigmas.append(pair[1].item())
    return alphas, sigmas


def output_jacobians(solver: Solver, variance: float) -> list[float]:
    """d output_i / d x_i of the best model for Gaussian data of the given variance s^2 (0 and infinity included).

    With x = alpha x_0 + sigma noise: d E[noise | x] / d x = sigma / (alpha^2 s^2 + sigma^2) and
    d E[x_0 | x] / d x = alpha s^2 / (alpha^2 s^2 + sigma^2), of which v and flow predictions are combinations.
    """
    name = type(solver.scheduler).__name__
    kind = config(solver.scheduler, "prediction_type") or ("flow" if hasattr(solver.scheduler, "scale_noise") else None)
    if kind not in ("epsilon", "sample", "v_prediction", "flow", "flow_prediction") or hasattr(
        solver.scheduler, "precondition_outputs"
    ):
        raise ValueError(
            f"scheduler: what the model predicts for {name} is unknown ({kind}), so its output cannot be reused"
        )
    jacobians = []
    for alpha, sigma in zip(*noise_levels(solver), strict=True):
        if math.isinf(variance):
            noise, sample = 0.0, 1 / alpha if alpha else math.inf
        else:
            total = alpha**2 * variance + sigma**2
            noise, sample = sigma / total, alpha * variance / total
        norm = math.hypot(alpha, sigma)
        jacobians.append(
            {
                "epsilon": noise,
                "sample": sample,
                "v_prediction": (alpha * noise - sigma * sample) / norm,
                "flow": noise - sample,
                "flow_prediction": noise - sample,
            }[kind]
        )
    if not all(map(math.isfinite, jacobians[solver.start :])):
        raise ValueError(f"cache: 'eps' cannot be used with {name}, whose first state is pure noise; use 'v'")
    return jacobians


def usable_steps(solver: Solver) -> tuple[list[int], bool]:
    """The steps whose model output reaches x_0 (B_i != 0), and whether the latents do without the model (A_start != 0).

    Clipping is left out of the question: it hides some elements, not the step.
    """
    if _has_tensors(solver):
        return list(solver.steps), True
    solver = copy.copy(solver)
    solver.scheduler = copy.deepcopy(solver.scheduler)
    if hasattr(solver.scheduler, "register_to_config"):
        flags = [flag for flag in (*CLIPPING, "thresholding") if config(solver.scheduler, flag)]
        solver.scheduler.register_to_config(**dict.fromkeys(flags, False))
    a, b = sensitivities(solver)
    floor = NEGLIGIBLE * max(a[solver.start :].abs().max().item(), b[solver.start :].abs().max().item())
    return [i for i in solver.steps if abs(b[i].item()) > floor], abs(a[solver.start].item()) > floor


def refuse_vanishing(solver: Solver, choices: Sequence[int]) -> list[int]:
    """The choices through which a gradient can flow; ValueError, naming the way out, where there is none.

    No choices stand for the identity gradient.
    """
    usable, direct = usable_steps(solver)
    name, start = type(solver.scheduler).__name__, solver.start
    ways = (
        "grad_step='last'" if usable and usable[-1] == len(solver) - 1 else f"grad_step={usable[-1]}" if usable else ""
    )
    if not choices:
        if direct:
            return []
        raise ValueError(
            f"grad_step: 'identity' gives a gradient of exactly zero, for {name} drops the latents of step {start} on "
            f"the way (A = 0, as with sample prediction): use {ways or 'a scheduler with epsilon or v prediction'}"
        )
    kept = [i for i in choices if i in usable]
    if kept:
        return kept
    listed = _ranges(usable)
    identity = "grad_step='identity', or " if direct else ""
    raise ValueError(
        f"grad_step: the model's output at step {choices[0]} does not reach x_0 with {name} (B = 0), so its gradient "
        f"is exactly zero; use {identity}one of the steps {listed or 'of another scheduler'}"
    )


def _ranges(steps: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for i in steps:
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _has_tensors(solver: Solver) -> bool:
    return any(isinstance(value, Tensor) for value in solver.step_kwargs.values())


def _refuse_tensors(solver: Solver) -> None:
    if _has_tensors(solver):
        raise NotAffineError("step_kwargs: they hold tensors, whose shape a latent of one element cannot have")
