"""Optimise the latents of a sampler for a loss on its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ._progress import bar
from .arguments import check_flag, is_integer, number, number_list
from .noise import each
from .repetition import CACHES
from .sampler import ShortcutSampler, check_latents, check_sampler

# Coarse to fine as it was measured: the last fifth of the updates on the full schedule.
COARSE_SHARE = 0.8


@dataclass(frozen=True)
class Iteration:
    """One evaluation: the loss of the latents after `iteration` updates, and what it cost."""

    iteration: int
    loss: float
    seconds: float
    model_calls: int
    """Model evaluations per latent: guidance counts two a step, recomputation in backward counts too."""
    exact: bool = True
    """False where the image is an estimate, by a TrajectoryCache or a coarse schedule."""


@dataclass(frozen=True)
class Best:
    iteration: int
    loss: float
    latents: Tensor
    image: Tensor


@dataclass
class Result:
    """What an optimisation found, or had found when it was interrupted."""

    latents: Tensor
    """The latents of the last exact evaluation."""
    image: Tensor | None = None
    """x_0 of `latents`."""
    history: list[Iteration] = field(default_factory=list)
    best: Best | None = None
    interrupted: bool = False

    def add(self, record: Iteration, latents: Tensor, image: Tensor) -> None:
        self.history.append(record)
        if record.exact:
            self.latents, self.image = latents, image
            if self.best is None or record.loss < self.best.loss:
                self.best = Best(record.iteration, record.loss, latents, image)


class NonFiniteLossError(FloatingPointError):
    """The loss became inf or NaN; `result` holds what was done before."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


def _check_settings(loss_fn: Any, callback: Any, betas: Any, steps: Any, coarse_steps: Any) -> tuple[float, float]:
    """Raises where one of them is not as `optimize_latents` says; returns the betas as floats."""
    for name, function in (("loss_fn", loss_fn), ("callback", callback)):
        if not callable(function) and (name == "loss_fn" or function is not None):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    shares = number_list("betas", betas)
    if len(shares) != 2 or not all(0 <= share < 1 for share in shares):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if not is_integer(steps) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if coarse_steps is not None and (not is_integer(coarse_steps) or coarse_steps < 1):
        raise ValueError(f"coarse_steps must be a positive integer or None, got {coarse_steps!r}")
    beta1, beta2 = shares
    return beta1, beta2


def optimize_latents(
    sampler: ShortcutSampler,
    latents: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    steps: int = 200,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.9),
    callback: Callable[[Iteration, Tensor, Tensor], bool | None] | None = None,
    progress: bool = True,
    *,
    coarse_steps: int | None = None,
    keep_norm: bool = False,
    **sampler_kwargs: Any,
) -> Result:
    """Minimise loss_fn(sampler(z, **sampler_kwargs)) over z, from z = latents, by `steps` updates of Adam.

    There are steps + 1 evaluations: the last is of the final latents and needs no gradient. Latents of lower precision
    than float32 are optimised as a float32 copy. A `generator` in `sampler_kwargs` gives every iteration the same
    noise, so that the losses can be compared (its state moves on by one pass in all); without one a stochastic
    scheduler draws fresh noise each time.

    Where evaluations are estimates (a sampler with `reuse`, or `coarse_steps`), `latents`, `image` and `best` come from
    exact ones alone, a callback that asks to stop is asked again at an exact one, and the last one is exact.

    Args:
        loss_fn: x_0 -> a scalar tensor; a batch is optimised together, so sum over it for independent samples.
        lr, betas: of Adam; the defaults are the authors' (arXiv 2505.07477).
        callback: called after each evaluation with (iteration, latents, image), both detached; returning True stops.
        progress: show a bar with the loss, where tqdm is installed.
        coarse_steps: run the first 80 % of the updates on a schedule of so many steps instead of the sampler's own, a
            cheap start (for example a quarter of them). Needs start = 0 and a path by name or recipe.
        keep_norm: optimise on the sphere of each initial latent's norm: the sampler sees z |latents| / |z|. Noise of
            another norm is unknown to a model, and where it leads the loss alone decides (a classifier's loss is then
            met by saturated pixels).

    Returns:
        `latents`, `image`, `history`, `best`; after Ctrl-C what was done so far, with `interrupted` set.

    Raises:
        NonFiniteLossError: the loss or its gradient is not finite; with the result so far.
        TypeError, ValueError: an argument is of the wrong type, not finite or out of range; the loss is not a scalar,
            or does not depend on the image.
        RuntimeError: the model did something else when its call was repeated for the backward pass.
    """
    check_sampler(sampler)
    betas = _check_settings(loss_fn, callback, betas, steps, coarse_steps)
    lr = number("lr", lr, 0)
    check_flag("keep_norm", keep_norm)
    check_flag("progress", progress)
    generator = sampler_kwargs.get("generator")
    check_latents(latents, generator)
    steps = int(steps)
    coarse_until = 0 if coarse_steps is None else math.floor(COARSE_SHARE * steps)
    coarse = None if coarse_steps is None else sampler.with_steps(coarse_steps)
    noise = [g.get_state() for g in each(generator)]
    step_generator = next((g.clone_state() for g in each(generator)), None)

    # Adam's eps of 1e-8 is zero in float16.
    z = latents.detach().to(torch.promote_types(latents.dtype, torch.float32), copy=True).requires_grad_()
    adam = torch.optim.Adam([z], lr=lr, betas=betas)
    norms = _norms(z.detach())
    result = Result(latents.detach().clone())
    stopping = False
    track = bar(range(steps + 1), "optimising", progress)
    try:
        for k in track:
            active = coarse if coarse is not None and k < coarse_until and not stopping else sampler
            if active.reuse is not None and (k == steps or stopping):
                active.reuse.require_exact()
            began, calls = time.perf_counter(), active.model_calls
            for g, state in zip(each(generator), noise, strict=True):
                g.set_state(state)
            with torch.set_grad_enabled(k < steps):
                seen = z * (norms / _norms(z).clamp_min(torch.finfo(z.dtype).tiny)) if keep_norm else z
                current = seen.detach().to(latents.dtype, copy=True)
                image = active.sample(seen.to(latents.dtype), active.draw_path(step_generator), **sampler_kwargs)
                loss = loss_fn(image)
            _check_loss(loss, k, result)
            if k < steps:
                # Not backward(): the model's parameters shall neither get gradients nor cost time.
                z.grad = _gradient(loss, z, k, result)
                adam.step()
            exact = active is not coarse and (active.reuse is None or active.reuse.exact)
            record = Iteration(k, loss.item(), time.perf_counter() - began, active.model_calls - calls, exact)
            image = image.detach()
            result.add(record, current, image)
            if hasattr(track, "set_postfix"):
                track.set_postfix(loss=f"{record.loss:.4g}")
            stopping = bool(callback is not None and callback(record, current, image))
            if stopping and exact:
                break
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        if hasattr(track, "close"):
            track.close()
    return result


def _norms(z: Tensor) -> Tensor:
    """The norm of each sample, (B, 1, ...)."""
    return torch.linalg.vector_norm(z, dim=tuple(range(1, z.ndim)), keepdim=True)


def _gradient(loss: Tensor, z: Tensor, iteration: int, result: Result) -> Tensor:
    try:
        gradient = torch.autograd.grad(loss, z, allow_unused=True)[0] if loss.requires_grad else None
    except CheckpointError as error:
        raise RuntimeError(CACHES) from error
    if gradient is None:
        raise ValueError(
            "loss_fn must return a loss of the image, got one that does not depend on it (was it detached?)"
        )
    if not gradient.isfinite().all():
        worst = "nan" if gradient.isnan().any() else "infinity"
        raise NonFiniteLossError(
            f"loss_fn must have a finite gradient, got one of {worst} at iteration {iteration} for a loss of "
            f"{loss.item():.4g}: a root or a quotient at 0, or half precision that overflows (this error's .result "
            "holds what was done before)",
            result,
        )
    return gradient


def _check_loss(loss: Tensor, iteration: int, result: Result) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor (sum over the batch), got {got}")
    if not torch.isfinite(loss):
        raise NonFiniteLossError(
            f"loss_fn must return a finite loss, got {loss.item()} at iteration {iteration}; lower lr, clamp the "
            "image, or check the model's output (this error's .result holds what was done before)",
            result,
        )
