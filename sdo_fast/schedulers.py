"""What a scheduler does to its latents and model outputs: x_0 as an affine function of both, with its coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .paths import Path, Schedule
from .solver import NotAffineError, Solver, config, on_cpu

# Relative to the largest coefficient; the smallest honest ones (late steps of a schedule of 1000) are above 1e-6.
NEGLIGIBLE = 1e-12
CLIPPING = ("clip_sample", "clip_denoised")
"""Flags of diffusers' schedulers that clip the predicted sample."""


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
    return affine_sensitivities(Solver(scheduler, num_inference_steps, start, step_kwargs, schedule_kwargs))


def refuse_by_config(solver: Solver, clipped: bool = False) -> None:
    """NotAffineError with the reason, as far as the configuration tells; `clipped` allows a clipped prediction."""
    effects = dict.fromkeys(() if clipped else CLIPPING, "clips the predicted sample")
    effects["thresholding"] = "thresholds the predicted sample"
    for flag, effect in effects.items():
        if config(solver.scheduler, flag, False):
            raise NotAffineError(f"scheduler must be affine (with {flag}=False), got {solver.name}, which {effect}")
    if solver.learned_variance:
        raise NotAffineError(
            f"scheduler must be affine, got {solver.name}, which reads its variance from the model (learned variance)"
        )
    if _has_tensors(solver):
        raise NotAffineError(
            "step_kwargs must hold no tensors, whose shape a latent of one element cannot have, got some"
        )


@on_cpu
def affine_sensitivities(solver: Solver) -> tuple[Tensor, Tensor]:
    """A and B; NotAffineError with the reason, from the configuration or from what happens to large numbers."""
    refuse_by_config(solver)
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(2, 1 + len(solver), generator=draw, dtype=torch.float64) * 10
    a, b = (t.clone() for t in solver.sensitivities)
    # In one pass, unless each element would have its own noise.
    batches = points.T.unsqueeze(0) if not solver.noise_sources else points.unsqueeze(2)
    ends = [solver.trial(batch[0].reshape(1, 1, 1, -1), batch[1:]).flatten() for batch in batches]
    origin, moved = torch.cat(ends).tolist()
    terms = (points[1] - points[0])[[0, *(1 + i for i in solver.steps)]] * torch.cat(
        [a[solver.start, None], b[solver.start :]]
    )
    scale = terms.abs().sum().item() + abs(origin) + abs(moved)
    if not abs(moved - origin - terms.sum().item()) <= 1e-4 * scale:
        raise NotAffineError(
            f"scheduler must be affine, got {solver.name}, whose result is not an affine function of the latents and "
            "model outputs"
        )
    return a, b


@on_cpu
def refuse_stochastic(solver: Solver, purpose: str) -> None:
    """ValueError where the scheduler draws noise of its own."""
    zeros, outputs = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.zeros(len(solver), dtype=torch.float64)
    if not torch.equal(*(solver.trial(zeros, outputs, seed=seed) for seed in (0, 1))):
        raise ValueError(f"scheduler must be deterministic for {purpose}, got {solver.name}, which adds fresh noise")


@on_cpu
def step_coefficients(solver: Solver) -> tuple[Tensor, Tensor]:
    """a and b of x_{i+1} = a_i x_i + b_i eps_i, for deterministic affine schedulers that keep no history.

    float64 tensors of `len(timesteps)` entries, NaN before `start`; NotAffineError for others.
    """
    affine_sensitivities(solver)
    refuse_stochastic(solver, "inversion")
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
            for values, row in zip(coefficients, rows, strict=True):
                values[i] = row[i]
                if row.count_nonzero() > (row[i] != 0):
                    raise NotAffineError(
                        f"scheduler must keep no history, got {solver.name}, which uses that of earlier steps"
                    )
    return coefficients[0], coefficients[1]


def noise_levels(solver: Solver) -> tuple[list[float], list[float]]:
    """alpha and sigma of every step's state."""
    alphas, sigmas = zip(*(noise_level(solver, i) for i in range(len(solver))), strict=True)
    return list(alphas), list(sigmas)


@on_cpu
def noise_level(solver: Solver, i: int) -> tuple[float, float]:
    """alpha and sigma of step i's state x = alpha x_0 + sigma noise, as the scheduler adds noise."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    scheduler = copy.deepcopy(solver.scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(i)
    t = solver.timesteps[i].reshape(1)
    if hasattr(scheduler, "add_noise"):
        pair = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    elif hasattr(scheduler, "scale_noise"):
        pair = scheduler.scale_noise(one, t, zero), scheduler.scale_noise(zero, t, one)
    else:
        raise ValueError(f"scheduler must have add_noise or scale_noise, got {solver.name} without either")
    return pair[0].item(), pair[1].item()


def prediction(solver: Solver) -> str:
    """What the model predicts: "epsilon", "sample", "v_prediction" or "flow" (noise - x_0)."""
    kind = config(solver.scheduler, "prediction_type") or ("flow" if hasattr(solver.scheduler, "scale_noise") else None)
    if kind not in ("epsilon", "sample", "v_prediction", "flow", "flow_prediction") or hasattr(
        solver.scheduler, "precondition_outputs"
    ):
        raise ValueError(
            "scheduler must tell whether the model predicts epsilon, sample, v or flow, for a trajectory cache and for "
            f"the posterior mean, got {solver.name} ({kind})"
        )
    return "flow" if kind == "flow_prediction" else kind


def posterior_mean(solver: Solver, i: int) -> tuple[float, float]:
    """p and q of E[x_0 | x_i] = p x_i + q output_i (Tweedie's formula); nothing is clipped.

    With x = alpha x_0 + sigma noise: (x - sigma noise) / alpha. A v-prediction is that of x / sqrt(alpha^2 + sigma^2).
    """
    kind, (alpha, sigma) = prediction(solver), noise_level(solver, i)
    if kind == "epsilon":
        return (1 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
    if kind == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    return (0.0, 1.0) if kind == "sample" else (1 / (alpha + sigma), -sigma / (alpha + sigma))


def output_jacobians(solver: Solver, variance: float) -> list[float]:
    """d output_i / d x_i of the best model for Gaussian data of the given variance s^2 (0 and infinity included).

    With x = alpha x_0 + sigma noise: d E[noise | x] / d x = sigma / (alpha^2 s^2 + sigma^2) and
    d E[x_0 | x] / d x = alpha s^2 / (alpha^2 s^2 + sigma^2), of which v and flow predictions are combinations.
    """
    kind = prediction(solver)
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
            }[kind]
        )
    if not all(map(math.isfinite, jacobians[solver.start :])):
        raise ValueError(f"cache must be 'v' or 'x0' with {solver.name}, whose first state is pure noise, got 'eps'")
    return jacobians


def usable_steps(solver: Solver) -> tuple[list[int], bool]:
    """The steps whose model output reaches x_0 (B_i != 0), and whether the latents do without the model (A_start != 0).

    Clipping is left out of the question: it hides some elements, not the step.
    """
    if _has_tensors(solver):
        return list(solver.steps), True
    flags = [flag for flag in (*CLIPPING, "thresholding") if config(solver.scheduler, flag)]
    if flags and hasattr(solver.scheduler, "register_to_config"):
        unclipped = copy.copy(solver)
        unclipped.noise_sources = solver.noise_sources  # clipping draws none
        vars(unclipped).pop("sensitivities", None)
        unclipped.scheduler = copy.deepcopy(solver.scheduler)
        unclipped.scheduler.register_to_config(**dict.fromkeys(flags, False))
        solver = unclipped
    a, b = solver.sensitivities
    sizes = torch.cat((a[solver.start :], b[solver.start :])).abs()
    finite = sizes.isfinite()
    if not finite.all() and not flags:
        raise ValueError(
            f"scheduler must give finite results, got {solver.name}, whose step {solver.start} divides by zero: with "
            "a terminal signal-to-noise ratio of zero the model must predict v or x_0, or clip_sample must be set"
        )
    floor = NEGLIGIBLE * sizes[finite].max().item() if finite.any() else 0.0
    # Not finite: clipping bounds it.
    return [i for i in solver.steps if not abs(b[i].item()) <= floor], not abs(a[solver.start].item()) <= floor


def schedule_of(solver: Solver) -> Schedule:
    """What a path is drawn from."""
    return Schedule(solver.steps, lambda: affine_sensitivities(solver)[1].tolist(), *usable_steps(solver))


def refuse_vanishing(solver: Solver, schedule: Schedule, path: Path) -> None:
    """ValueError, naming the way out, where no gradient can flow through the path."""
    usable, direct = schedule.reaching, schedule.direct
    if path.stop is not None or any(i in usable for i in path.shares):
        return
    if path.shares:
        identity = "'identity' or " if direct else ""
        raise ValueError(
            f"path must be {identity}one of the steps {_ranges(usable) or 'of another scheduler'}, got "
            f"{min(path.shares)}, whose gradient is exactly zero: with {solver.name} the model's output there does not "
            "reach x_0 (B = 0)"
        )
    if not direct:
        last = "'last'" if usable and usable[-1] == len(solver) - 1 else str(usable[-1]) if usable else ""
        raise ValueError(
            f"path must be {last or 'that of a scheduler with epsilon or v prediction'}, got 'identity', whose "
            f"gradient is exactly zero: {solver.name} drops the latents of step {solver.start} on the way (A = 0, as "
            "with sample prediction)"
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
