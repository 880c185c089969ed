"""Optimise the latents of a sampler for a loss on its result."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ._progress import bar
from .arguments import check_choice, check_flag, check_floating, check_generator, is_integer, number, number_list
from .calls import Call, SamplerCall, check_call
from .constraints import CONSTRAINTS, Free
from .repetition import CACHES
from .sampler import ShortcutSampler, check_latents
from .score_function import ScoreFunction, per_image
from .shortcut_pipeline import ShortcutPipeline

Latents = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Iteration:
    """One evaluation: the loss of the latents after `iteration` updates, and what it cost."""

    iteration: int
    loss: float
    seconds: float
    model_calls: int
    """Model evaluations per latent: guidance counts two a step, recomputation in backward counts too. Of a function,
    what its attribute `model_calls` grew by, or 1 where it has none: the call itself."""
    exact: bool = True
    """False where the image is an estimate, by a TrajectoryCache or a coarse schedule."""


@dataclass(frozen=True)
class Best:
    iteration: int
    loss: float
    latents: Latents
    image: Tensor


@dataclass
class Result:
    """What an optimisation found, or had found when it was interrupted."""

    latents: Latents
    """The latents of the last exact evaluation; a dictionary where they were given as a mapping."""
    image: Tensor | None = None
    """x_0 of `latents`."""
    history: list[Iteration] = field(default_factory=list)
    best: Best | None = None
    interrupted: bool = False

    def add(self, record: Iteration, latents: Latents, image: Tensor) -> None:
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


def optimize_latents(
    sampler: ShortcutSampler | ShortcutPipeline | Callable[..., Any],
    latents: Tensor | Mapping[str, Tensor],
    loss_fn: Callable[..., Tensor],
    steps: int = 200,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    callback: Callable[[Iteration, Any, Tensor], bool | None] | None = None,
    progress: bool = True,
    *,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    clip_grad: float | None = None,
    constraint: str | None = None,
    estimate: ScoreFunction | None = None,
    coarse_steps: int | None = None,
    **sampler_kwargs: Any,
) -> Result:
    r"""Minimise loss_fn(sampler(z, **sampler_kwargs)) over z, from z = latents, by `steps` updates of Adam.

    There are steps + 1 evaluations: the last is of the final latents and needs no gradient. Tensors of lower precision
    than float32 are optimised as float32 copies. With float16 latents or images the loss is scaled on its way back, by
    2^15, or from the first overflow on by less (which evaluates once more), so that small gradients do not vanish; the
    optimiser gets them unscaled. A `generator` in `sampler_kwargs`, one or one an image, gives every
    iteration the same noise, so that the losses can be compared (its state moves on by one pass in all); without one a
    stochastic scheduler draws fresh noise each time. Model parameters get no gradient.

    Where evaluations are estimates (a sampler with `reuse`, or `coarse_steps`), `latents`, `image` and `best` come from
    exact ones alone, a callback that asks to stop is asked again at an exact one, and the last one is exact. With a
    path that stops early all evaluations but the last are of the posterior mean, so `best` may be too.

    Args:
        sampler: a ShortcutSampler; a ShortcutPipeline, which takes the latents by the keyword `latents`; or any
            function f(z, **sampler_kwargs) that returns a tensor, a tuple or list that begins with one, or a diffusers
            output, whose first field (`images`, `frames`, `audios`) is then the image.
        latents: a tensor (B, C, ...), or a mapping of names to tensors that are optimised together, for instance
            `{"latents": z, "prompt_embeds": e}`. All are then given by keyword; a ShortcutSampler takes "latents", and
            gives the others to its model beside `model_kwargs` (what a PipelineSampler encoded is kept; a
            TrajectoryCache reuses nothing while they change). For a prompt alone, on latents that stay as they are:
            `optimize_latents(functools.partial(pipeline, latents=z), {"prompt_embeds": e}, ...)`.
        loss_fn: x_0 -> a scalar tensor; a batch is optimised together, so sum over it for independent samples. With
            two required positional parameters it is called as loss_fn(x_0, iteration), with one or none (`*args`, or
            defaults) as loss_fn(x_0): parameters with a default, those that functools.partial has filled and a bound
            method's self do not count, of an nn.Module those of `forward` do, and what has no signature (a builtin)
            takes x_0. `iteration` counts the updates so far.
        lr, betas: of Adam, 0.01 and (0.9, 0.9) where None, which are the authors' (arXiv 2505.07477).
        callback: called after each evaluation with (iteration, latents, image), all detached, the latents as they were
            given, tensor or dictionary; returning True stops.
        progress: show a bar with the loss, where tqdm is installed.
        optimizer: makes another optimiser of the list of tensors, e.g. `torch.optim.AdamW` or
            `lambda z: torch.optim.SGD(z, lr=0.1)`; not one whose step needs a closure (LBFGS).
        clip_grad: greatest norm of the gradient that the optimiser gets, of all tensors and samples together, as
            `torch.nn.utils.clip_grad_norm_` scales it.
        constraint: where the tensor `latents` may be, in a mapping that of this name. Noise unlike the sampler's is
            unknown to a model, and where it leads the loss alone decides (a classifier's loss is then met by saturated
            pixels).

            - "norm": on the sphere of each initial latent's norm: the sampler sees z |latents| / |z|.
            - "white": among what has the statistics of white noise in every band of frequencies, at the norm of each
              initial latent. The gradient goes through `whitened` before the optimiser gets it (and `clip_grad`), so
              its size does not matter, and the latents after each update, and before the first. For latents that are
              noise: not with `start` > 0. Source: arXiv 2602.08646.
        estimate: a `ScoreFunction`, for losses without a gradient (experimental). `loss_fn` is then called under
            torch.no_grad and returns one loss an image, (B,), whose sum is minimised: on x_0, and in each update on
            `estimate.samples * B` perturbed images.
        coarse_steps: run the first 80 % of the updates on a schedule of so many steps instead of the sampler's own, a
            cheap start (for example a quarter of them). Needs a ShortcutSampler with start = 0 and a path by name or
            recipe.

    Returns:
        `latents`, `image`, `history`, `best`; after Ctrl-C what was done so far, with `interrupted` set.

    Raises:
        NonFiniteLossError: the loss or its gradient is not finite; with the result so far.
        TypeError, ValueError: an argument is of the wrong type, not finite or out of range; the loss is not a scalar,
            or does not depend on the image, or this not on one of the tensors.
        RuntimeError: the model did something else when its call was repeated for the backward pass.
    """
    _check_settings(callback, progress, steps, coarse_steps, clip_grad, constraint, estimate)
    tensors = _by_name(latents, sampler_kwargs.get("generator"), constraint)
    check_call(sampler, tensors, sampler_kwargs, coarse_steps)
    steps, single = int(steps), isinstance(latents, Tensor)
    if isinstance(sampler, ShortcutSampler):
        call: Call = SamplerCall(sampler, sampler_kwargs, coarse_steps, steps)
    else:
        call = Call(sampler, sampler_kwargs, by_keyword=isinstance(sampler, ShortcutPipeline) or not single)
    loss = _of_image_and_iteration(loss_fn)
    with torch.inference_mode(False):  # as under torch.no_grad, whose caller too asks for gradients here
        variables = _Variables(tensors, constraint, single)
        update = _optimizer(optimizer, lr, betas, list(variables.leaves.values()))
        return _Run(call, variables, loss, estimate, update, clip_grad, steps).loop(callback, progress)


def _check_settings(
    callback: Any, progress: Any, steps: Any, coarse_steps: Any, clip_grad: Any, constraint: Any, estimate: Any
) -> None:
    """Raises where one of them is not as `optimize_latents` says."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function, got {type(callback).__name__}")
    check_flag("progress", progress)
    if not is_integer(steps) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
    if coarse_steps is not None and (not is_integer(coarse_steps) or coarse_steps < 1):
        raise ValueError(f"coarse_steps must be a positive integer or None, got {coarse_steps!r}")
    if clip_grad is not None and not number("clip_grad", clip_grad, 0):
        raise ValueError(f"clip_grad must be greater than 0, got {clip_grad!r}")
    if constraint is not None:
        check_choice("constraint", constraint, CONSTRAINTS)
    if estimate is not None and not isinstance(estimate, ScoreFunction):
        raise TypeError(f"estimate must be a ScoreFunction or None, got {type(estimate).__name__}")


def _by_name(latents: Any, generator: Any, constraint: str | None) -> dict[str, Tensor]:
    """The tensors to optimise, checked."""
    if not isinstance(latents, (Tensor, Mapping)) or (isinstance(latents, Mapping) and not latents):
        got = "an empty mapping" if isinstance(latents, Mapping) else type(latents).__name__
        raise TypeError(f"latents must be a tensor or a mapping of names to tensors, got {got}")
    tensors = {"latents": latents} if isinstance(latents, Tensor) else dict(latents)
    check_generator(generator)
    if "latents" in tensors:
        check_latents(tensors["latents"], generator)
    elif constraint is not None:
        raise ValueError(f"constraint must be None without a tensor named 'latents', got {constraint!r}")
    for name, tensor in tensors.items():
        check_floating(f"latents[{name!r}]", tensor)
    return tensors


def _of_image_and_iteration(loss_fn: Any) -> Callable[[Tensor, int], Any]:
    """loss_fn as a function of the image and the iteration."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # builtins have none
        return lambda image, iteration: loss_fn(image)
    required = [p for p in signature.parameters.values() if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    try:
        signature.bind(*[None] * max(1, len(positional)))
    except TypeError as error:
        raise TypeError(f"loss_fn must take an image, or an image and the iteration: {error}") from None
    if len(positional) > 2:
        names = ", ".join(p.name for p in positional)
        raise TypeError(f"loss_fn must take an image, or an image and the iteration, got one that needs {names}")
    return loss_fn if len(positional) == 2 else lambda image, iteration: loss_fn(image)


def _optimizer(factory: Any, lr: Any, betas: Any, tensors: list[Tensor]) -> torch.optim.Optimizer:
    """Adam, or what the factory makes."""
    if factory is None:
        shares = number_list("betas", (0.9, 0.9) if betas is None else betas)
        if len(shares) != 2 or not all(0 <= share < 1 for share in shares):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        # Adam's eps of 1e-8 is zero in float16.
        return torch.optim.Adam(tensors, 0.01 if lr is None else number("lr", lr, 0), (shares[0], shares[1]))
    for name, value in (("lr", lr), ("betas", betas)):
        if value is not None:
            raise ValueError(f"{name} must be None with optimizer, which has its own, got {value!r}")
    if not callable(factory):
        raise TypeError(f"optimizer must be a function of a list of tensors, got {type(factory).__name__}")
    made = factory(tensors)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(made).__name__}")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"optimizer must take steps without a closure, got {type(made).__name__}, which evaluates the loss several "
            "times a step"
        )
    return made


class _Variables:
    """What is optimised: leaves by name, of float32 or float64, and as the sampler sees them."""

    def __init__(self, tensors: Mapping[str, Tensor], constraint: str | None, single: bool) -> None:
        self.single = single
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.leaves = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).requires_grad_()
            for name, tensor in tensors.items()
        }
        self.constraints = dict.fromkeys(tensors, Free())
        if constraint is not None:
            self.constraints["latents"] = CONSTRAINTS[constraint](self.leaves["latents"].detach())
        self.project()

    def seen(self) -> dict[str, Tensor]:
        """As the sampler sees them, with the graph to the leaves."""
        return {name: self.constraints[name].seen(leaf).to(self.dtypes[name]) for name, leaf in self.leaves.items()}

    def copied(self, tensors: Mapping[str, Tensor]) -> Latents:
        """Constant copies in the form in which the latents were given."""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return copies["latents"] if self.single else copies

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        # Not by backward(): the model's parameters shall neither get gradients nor cost time.
        for name, gradient in gradients.items():
            self.leaves[name].grad = self.constraints[name].direction(gradient)

    @torch.no_grad()
    def project(self) -> None:
        for name, leaf in self.leaves.items():
            projected = self.constraints[name].project(leaf)
            if projected is not leaf:
                leaf.copy_(projected)


@dataclass
class _Run:
    """An optimisation under way."""

    call: Call
    variables: _Variables
    loss_fn: Callable[[Tensor, int], Any]
    estimate: ScoreFunction | None
    optimizer: torch.optim.Optimizer
    clip_grad: float | None
    steps: int
    scale: float = 2.0**15
    """Of float16's loss."""

    def __post_init__(self) -> None:
        self.result = Result(self.variables.copied(self.variables.seen()))

    def loop(self, callback: Callable[[Iteration, Any, Tensor], bool | None] | None, progress: bool) -> Result:
        stopping = False
        track = bar(range(self.steps + 1), "optimising", progress)
        try:
            for k in track:
                record, latents, image = self.iterate(k, exactly=k == self.steps or stopping)
                self.result.add(record, latents, image)
                if hasattr(track, "set_postfix"):
                    track.set_postfix(loss=f"{record.loss:.4g}")
                stopping = bool(callback is not None and callback(record, latents, image))
                if stopping and record.exact:
                    break
        except KeyboardInterrupt:
            self.result.interrupted = True
        finally:
            if hasattr(track, "close"):
                track.close()
        return self.result

    def iterate(self, k: int, exactly: bool) -> tuple[Iteration, Latents, Tensor]:
        """Evaluation k and, but for the last, the update after it; what was evaluated, as constants."""
        self.call.begin(k, exactly)
        began, calls = time.perf_counter(), self.call.model_calls
        with torch.set_grad_enabled(k < self.steps):
            seen = self.variables.seen()
            latents = self.variables.copied(seen)
            image = self.call(seen)
            loss = self.evaluate(image, k)
        constant = image.detach().clone()  # a function may have returned the latents themselves
        if k < self.steps:
            gradients = self.gradients(loss, image, k)
            if gradients is None:
                self.scale /= 32
                return self.iterate(k, exactly)
            self.variables.set_gradients(gradients)
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.variables.leaves.values(), self.clip_grad)
            self.optimizer.step()
            self.variables.project()
        seconds, calls = time.perf_counter() - began, self.call.model_calls - calls
        return Iteration(k, loss.item(), seconds, calls, self.call.exact), latents, constant

    def evaluate(self, image: Tensor, k: int) -> Tensor:
        """The loss, a finite number."""
        if self.estimate is None:
            loss = self.loss_fn(image, k)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar tensor (sum over the batch), got {got}")
        else:
            with torch.no_grad():
                loss = per_image(self.loss_fn(image.detach(), k), len(image)).sum()
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"loss_fn must return a finite loss, got {loss.item()} at iteration {k}; lower lr, clamp the image, or "
                "check the model's output (this error's .result holds what was done before)",
                self.result,
            )
        return loss

    def gradients(self, loss: Tensor, image: Tensor, k: int) -> dict[str, Tensor] | None:
        """Those of the leaves, by name, finite; None where it is their scale that overflows."""
        names, leaves = list(self.variables.leaves), list(self.variables.leaves.values())
        scale = self.scale if torch.float16 in (image.dtype, *self.variables.dtypes.values()) else 1.0
        output, cotangent = loss if scale == 1 else loss * scale, None
        if self.estimate is not None:
            output, cotangent = image, scale * self.estimate.gradient(lambda x: self.loss_fn(x, k), image.detach())
        found: Sequence[Tensor | None] = [None] * len(leaves)
        try:
            if output.requires_grad:
                found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
        except CheckpointError as error:
            raise RuntimeError(CACHES) from error
        gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
        if len(gradients) < len(names):
            _raise_unreached(image, [name for name in names if name not in gradients], not gradients)
        for name, gradient in gradients.items():
            if not gradient.isfinite().all():
                if scale > 1:
                    return None
                worst = "nan" if gradient.isnan().any() else "infinity"
                raise NonFiniteLossError(
                    f"loss_fn must have a finite gradient, got one of {worst} at iteration {k} for {name} and a loss "
                    f"of {loss.item():.4g}: a root or a quotient at 0, or half precision that overflows (this error's "
                    ".result holds what was done before)",
                    self.result,
                )
        return gradients if scale == 1 else {name: gradient / scale for name, gradient in gradients.items()}


def _raise_unreached(image: Tensor, names: Sequence[str], none: bool) -> None:
    if not image.requires_grad:
        raise ValueError(
            "sampler must return an image that depends on the latents, got one without a gradient (computed under "
            "torch.no_grad, or detached?)"
        )
    if none:
        raise ValueError(
            "loss_fn must return a loss of the image, got one that does not depend on it (was it detached? "
            "estimate=ScoreFunction() is for losses without a gradient)"
        )
    raise ValueError(
        f"latents must be tensors that the image depends on, got {', '.join(names)}, which no gradient reaches (a "
        'sampler with path="identity" has none for conditions)'
    )
