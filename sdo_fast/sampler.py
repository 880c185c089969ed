"""Sampling with the gradient of one step: Shortcut Diffusion Optimization."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._progress import bar
from .arguments import check_batch, check_flag, check_floating, check_generator, check_guidance, number
from .gradients import ScaleGradient, Slopes, scaled
from .graphs import CapturedModel
from .model import GuidedModel
from .noise import Generators, each, randn
from .ops import transformed
from .paths import AnyPath, Path, Recipe, as_path, draw
from .repetition import repeated
from .reuse import TrajectoryCache
from .schedulers import (
    affine_sensitivities,
    noise_level,
    posterior_mean,
    refuse_stochastic,
    refuse_vanishing,
    schedule_of,
)
from .solver import Solver
from .steppers import Stepper, stepper_for

Sampler = TypeVar("Sampler", bound="ShortcutSampler")
MOST_SHARES = 4


@dataclass(frozen=True, eq=False)
class SamplerConfig:
    """The options of a `ShortcutSampler`.

    Raises:
        ValueError, TypeError: `guidance_scale` is neither a finite number nor a dense floating tensor nor None; a flag
            is no bool, or `reuse` no TrajectoryCache. The sampler checks the others against its scheduler.
    """

    num_inference_steps: int | None = 50
    """n for `scheduler.set_timesteps`; None where `schedule_kwargs` holds the schedule."""
    start: int = 0
    """Index into `scheduler.timesteps` of the first step that runs. The steps before it are not run: the latents are
    the input of this step, for instance the result of `warm_up` or of an inversion. (The authors' style transfer,
    "start 45" of 50, optimises the input of step 45, so 5 model calls remain.) Multistep schedulers begin there without
    history."""
    path: AnyPath = "first"
    """Which model outputs keep their graph, of `sdo_fast.paths`: a recipe, a `Path`, a name ("first" (= start), "last",
    "random", "identity", "full" ...), an index into `scheduler.timesteps` or a collection of them. Recipes draw anew at
    each call, from the generator."""
    guidance_scale: float | Tensor | None = None
    """w of classifier-free guidance, uncond + w (cond - uncond); None for none. A tensor that broadcasts against the
    latents gives each sample its own, or gets gradients: like the scheduler's arithmetic guidance stays differentiable
    at every step (d x_0 / d w = sum_i B_i (cond_i - uncond_i)), at two latents a step for autograd. It is combined in
    float32 (float64 for float64)."""
    checkpoint: bool = True
    """Recompute the path's steps in backward instead of keeping their activations, so that they never overlap with
    those of the loss nor with one another; costs one more model call a step and changes no bit of the result. A model
    that keeps activations between calls (DeepCache and its like) does not repeat itself: it raises RuntimeError in
    backward and takes False."""
    normalize: bool = False
    """Divide the gradient, not the value, by |A_start|. It can be large (157 with epsilon prediction and a linear beta
    schedule begun at t = 999): harmless to Adam, fatal to a plain SGD learning rate or to float16. Affine schedulers
    only."""
    step_kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True)
    """Keyword arguments of `scheduler.step`, e.g. `{"eta": 1.0}`."""
    schedule_kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True)
    """Keyword arguments of `scheduler.set_timesteps`, e.g. `{"mu": 1.15}`."""
    reuse: TrajectoryCache | None = field(default=None, kw_only=True)
    """A TrajectoryCache, with which most model outputs of most calls are reused from earlier calls, and the result is
    an estimate except where `reuse.exact` says so (experimental)."""
    fused: bool = field(default=True, kw_only=True)
    """Run each step as one `sampler_step` instead of the scheduler's many small operations, where the scheduler is
    affine up to clipping; elsewhere the scheduler runs, and `why_not()` gives the reason. Noise is drawn as the
    scheduler draws it. Values and gradients agree with the scheduler's to rounding, with False bit for bit."""
    inference_mode: bool = field(default=False, kw_only=True)
    """Call the model under `torch.inference_mode` where no graph is kept, which costs small models less than
    `torch.no_grad` does. Not for models that keep tensors from one call to the next (caches of position embeddings,
    FSDP), which autograd could not use afterwards."""
    cuda_graph: bool = field(default=False, kw_only=True)
    """Capture the model call of the steps that keep no graph once as a CUDA graph, and replay it at each of them, so
    that the host no longer launches the model's kernels one by one: o_i = graph(x_i, t_i, k) for i != s, with x_i, t_i
    and the keyword arguments' tensors k copied into the graph's own buffers. The step of the gradient, the scheduler's
    arithmetic and the batched refresh of `reuse` run as without it. For CUDA tensors and deterministic schedulers.

    Captured anew where shapes, dtypes, the structure or plain values of the keyword arguments, autocast, train or eval
    mode, or the addresses of a module's parameters and buffers change (values may change in place; for a model that is
    a plain function, keep all addresses). Timesteps are an input, so a schedule is not part of it. What no capture can
    hold: reading values back to the host (`.item()`), branches on them, copies from the CPU,
    `torch.compile(mode="reduce-overhead")`. Hooks and other Python of the model do not run in a replay: after changing
    what they do, make a new sampler. A capture calls the model four times, which `model_calls` leaves out, but
    statistics of batch normalisation and dropout's generator in train mode do not. The graph keeps the memory of one
    model call without a gradient while the sampler lives. Tested on the CPU with a stand-in for the capture; not yet
    run on a GPU."""

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if isinstance(scale, Tensor):
            check_floating("guidance_scale", scale)
        elif scale is not None:
            number("guidance_scale", scale)
        for name in ("checkpoint", "normalize", "fused", "inference_mode", "cuda_graph"):
            check_flag(name, getattr(self, name))
        if self.reuse is not None and not isinstance(self.reuse, TrajectoryCache):
            raise TypeError(f"reuse must be a TrajectoryCache or None, got {type(self.reuse).__name__}")


def _show_options(sampler: type[Sampler]) -> type[Sampler]:
    """Gives the class every option as a property to read, and its constructor their names for `help` and editors."""
    for option in fields(SamplerConfig):
        if not hasattr(sampler, option.name):
            setattr(sampler, option.name, property(attrgetter(f"config.{option.name}")))
    constructor: Any = sampler.__init__
    parameters, options = (list(inspect.signature(call).parameters.values()) for call in (constructor, SamplerConfig))
    constructor.__signature__ = inspect.Signature([*parameters[:3], *options])
    return sampler


@_show_options
class ShortcutSampler:
    r"""A diffusion sampler whose result carries the graph of one model call.

    Sampling runs x_{i+1} = S_i(x_i, eps(x_i, t_i)) for i = start, ..., n - 1, where n = len(scheduler.timesteps) and
    x_start is the `latents` argument of the call. At the steps of the `path`, by default the first alone, the model's
    output keeps its graph; at every other step it is a constant, while the scheduler's own arithmetic S_i stays
    differentiable in x_i:

        x_{i+1} = S_i(x_i, eps(x_i, t_i))             i in path
        x_{i+1} = S_i(x_i, eps(x_i, t_i).detach())    i not in path

    For an affine scheduler with the path s = start that is d x_0 / d latents = A_s I + B_s d eps / d x_s, and
    d x_0 / d p = B_s d eps / d p for a parameter or condition p (`sdo_fast.coefficients` gives A and B). Memory is that
    of one model call and, for a path of K steps, K of its inputs, whatever n is; time about that of sampling plus K
    calls forward and backward. The values are those of plain sampling, unless the path stops early; the gradients are
    those of `sdo_fast.reference.path_loop`. Gradients reach exactly the tensors that
    require them: latents, tensors in the keyword arguments, model parameters. Under `torch.no_grad()` the same call is
    plain sampling.

    Args:
        model: `model(x, t, **kwargs)` with x (B, C, ...), t (B,); returns a tensor, a tuple that begins with one, or an
            object with `.sample`. Of 2C output channels the variance half is dropped unless the scheduler's
            `variance_type` is learned.
        scheduler: any diffusers scheduler, or an object with `set_timesteps`, `timesteps` and `step(...)`; never
            changed, so it may be shared.
        *options, **named_options: of `SamplerConfig`, where each is described; `sampler.config` holds them.

    Raises:
        ValueError, TypeError: an argument is out of range, or the gradient asked for is exactly zero (sample prediction
            before the last step; the last step of PNDM; first-stage calls of KDPM2): the message names the way out. A
            path that stops early or has noises, with `reuse`, or with a scheduler that does not tell what the model
            predicts.
            With `cuda_graph` also a scheduler that adds fresh noise, and, at the call, tensors that are not on a GPU.
        NotAffineError: `normalize`, `reuse` or a path with weights (`leapalign`, `flowbp_lagrange`, `rescale`) with a
            scheduler that clips, thresholds or reads a learned variance.

    Source: "You Only Look One Step: Accelerating Backpropagation in Diffusion Sampling with Gradient Shortcuts", arXiv
    2505.07477. Deterministic where the model is. Works with autocast, torch.compile'd models, any floating dtype.
    """

    def __init__(self, model: Callable[..., Any], scheduler: Any, *options: Any, **named_options: Any) -> None:
        self.config = config = SamplerConfig(*options, **named_options)
        if not callable(model):
            raise TypeError(f"model must be a callable model(x, t, **kwargs), got {type(model).__name__}")
        self.model = model
        self.model_calls = 0  # evaluations per latent so far: guidance counts two, recomputation in backward counts too
        self.drawn = Path()  # that of the last call
        self.solver = solver = Solver(
            scheduler, config.num_inference_steps, config.start, config.step_kwargs, config.schedule_kwargs
        )
        self._path, self._schedule = as_path(config.path), schedule_of(solver)
        self._check(draw(self._path, self._schedule, torch.Generator().manual_seed(0)))
        self._gradient_scale = _gradient_scale(solver) if config.normalize else 1.0
        if config.cuda_graph:
            refuse_stochastic(solver, "cuda_graph")
        if config.reuse is not None:
            config.reuse.attach(solver)
        self._captured = CapturedModel() if config.cuda_graph else None
        self._stepper, self._reason = stepper_for(solver, config.fused)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of all n steps, those before `start` included."""
        return self.solver.timesteps

    @property
    def reuse(self) -> TrajectoryCache | None:
        return self.config.reuse

    @property
    def guidance_scale(self) -> float | Tensor | None:
        """The one option that may change from call to call; it is part of no schedule and no graph."""
        return self.config.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float | Tensor | None) -> None:
        self.config = replace(self.config, guidance_scale=scale)

    def __call__(
        self,
        latents: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        generator: Generators = None,
        progress: bool = False,
    ) -> Tensor:
        """x_0 for the input `latents` (B, C, ...) of step `start`, in their shape, dtype and layout.

        Args:
            model_kwargs: keyword arguments of the (conditional) model call.
            uncond_kwargs: all keyword arguments of the unconditional call; needed with, and only with, guidance.
            generator: for the scheduler's noise and the path, one or (as diffusers takes them) one an image, of which
                the first draws the path; None takes torch's global one.
            progress: show a bar.
        """
        check_generator(generator)
        return self.sample(latents, self.draw_path(generator), model_kwargs, uncond_kwargs, generator, progress)

    def with_options(self, **changes: Any) -> ShortcutSampler:
        """A new sampler of the same model and scheduler with some options changed, e.g. `with_options(fused=False)`."""
        return type(self)(self.model, self.solver.scheduler, **vars(replace(self.config, **changes)))

    def with_steps(self, num_inference_steps: int) -> ShortcutSampler:
        """The same sampler on a schedule of another number of steps, without reuse."""
        start, path = self.config.start, self.config.path
        if start != 0 or not isinstance(path, (str, Recipe)):
            raise ValueError(
                "coarse_steps must be None unless the sampler has start = 0 and a path by name or recipe, got "
                f"{num_inference_steps} with start = {start} and path = {path!r}"
            )
        return self.with_options(num_inference_steps=num_inference_steps, reuse=None)

    def why_not(self) -> str:
        """What does the steps' arithmetic: `sampler_step`, or the scheduler and why not the other."""
        return "sampler_step runs" if self._reason is None else f"the scheduler runs ({self._reason})"

    def stepper_from(self, start: int) -> Stepper:
        """What runs the steps of this schedule from another one on."""
        return stepper_for(self.solver.starting_at(start), self.config.fused)[0]

    def draw_path(self, generator: Generators = None) -> Path:
        """The path of the next call."""
        return draw(self._path, self._schedule, next(iter(each(generator)), None))

    def sample(
        self,
        latents: Tensor,
        path: AnyPath,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        generator: Generators = None,
        progress: bool = False,
    ) -> Tensor:
        """`__call__` with the path of this call given."""
        check_latents(latents, generator)
        path = draw(as_path(path), self._schedule, next(iter(each(generator)), None))
        self._check_reuse(path)
        latents, model_kwargs, uncond_kwargs = out_of_inference_mode((latents, model_kwargs, uncond_kwargs))
        eps = self.guided(latents, model_kwargs, uncond_kwargs)
        self.drawn = path
        if not torch.is_grad_enabled():
            path = Path()
        steps = bar(
            self.solver.steps if path.stop is None else range(self.solver.start, path.stop + 1), "sampling", progress
        )
        if self.config.reuse is None:
            x = self.run(self._stepper.begin(generator), eps, latents, steps, path)
            if path.noises:
                x = self._with_noises(eps, x, path, generator)
        else:
            x = self._reusing(self.config.reuse, eps, latents, steps, path)
        return x if self._gradient_scale == 1 else ScaleGradient.apply(x, self._gradient_scale)

    def _check(self, path: Path) -> None:
        """Raise where a path does nothing, or not with these options."""
        refuse_vanishing(self.solver, self._schedule, path)
        self._check_reuse(path)
        if path.stop is None and not path.noises:
            return
        stop = self.solver.steps.stop - 1 if path.stop is None else path.stop
        if not all(map(math.isfinite, posterior_mean(self.solver, stop))):
            raise ValueError(f"path must stop where the state is more than noise, got {self.config.path!r}")

    def _check_reuse(self, path: Path) -> None:
        if self.config.reuse is not None and (path.stop is not None or path.noises):
            raise ValueError(f"reuse must be None with a path that stops early or has noises, got {path}")

    def _reusing(
        self, reuse: TrajectoryCache, eps: GuidedModel, latents: Tensor, steps: Iterable[int], path: Path
    ) -> Tensor:
        """x_0, or its estimate, from the cache and calls of the model at the planned steps."""
        reuse.begin(latents, {"cond": eps.cond, "uncond": eps.uncond, "guidance": eps.guidance_scale})
        planned, active = reuse.plan(self.solver.steps), set(path.shares)
        exact, estimate = len(planned) == len(self.solver.steps), None
        if reuse.complete and exact:
            with torch.no_grad():
                estimate = self.run(self._stepper.begin(), eps, latents, self.solver.steps, Path(), reuse)
        in_turn = planned | active
        if reuse.batched and not exact:
            self.refresh(reuse, eps, latents, planned - active)
            in_turn = active
        x = self.run(self._stepper.begin(), eps, latents, steps, path, reuse, in_turn)
        reuse.done(self.solver.steps, planned)
        if estimate is not None:
            reuse.judge(estimate, x.detach())
        return x

    def run(
        self,
        stepper: Stepper,
        eps: GuidedModel,
        x: Tensor,
        steps: Iterable[int],
        path: Path = Path(),  # noqa: B008  (frozen)
        reuse: TrajectoryCache | None = None,
        planned: Container[int] = (),
    ) -> Tensor:
        """The state after `steps`; with a cache, only the planned ones call the model."""
        times, shares = self.timesteps.to(x.device), path.shares
        attached, mean = _Attached(stepper, eps, x, path), None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not attached.known):
            for i in steps:
                if reuse is not None and i not in planned:
                    x = stepper.step((reuse.estimate(i, x),), None, i, x)
                    continue
                if i in shares and attached.known:
                    with torch.enable_grad():
                        kept = self.evaluate(eps, stepper.scale_input(attached.input(x, i), i), times[i], True)
                    outputs = attached.keep(kept, i)
                elif i in shares:
                    outputs = self.evaluate(eps, stepper.scale_input(scaled(x, shares[i]), i), times[i], True)
                    outputs = tuple(scaled(output, path.weight(i)) for output in outputs)
                else:
                    outputs = self.evaluate(eps, stepper.scale_input(x, i), times[i])
                if i == path.stop:
                    p, q = mean = posterior_mean(self.solver, i)
                    x = p * x + q * eps.combine(*outputs)[:, : x.shape[1]]
                    break
                if reuse is not None:
                    reuse.store(i, x, eps.combine(*outputs))
                x = stepper.step(eps.operands(outputs), eps.weight, i, x)
        return attached.result(x, mean)

    def _with_noises(self, eps: GuidedModel, x: Tensor, path: Path, generator: Generators) -> Tensor:
        """x with the gradient, and nothing of the value, of posterior means at x noised to the last step."""
        last = self.solver.steps.stop - 1
        alpha, sigma = noise_level(self.solver, last)
        here, time = self.solver.starting_at(last), self.timesteps[last].to(x.device)
        factor = posterior_mean(self.solver, last)[1] / (path.noises + 1)
        for _ in range(path.noises):
            noise = randn(x.shape, generator, x.device, x.dtype)
            noised = alpha * x.detach() + sigma * noise
            output = eps.combine(*self.evaluate(eps, here.scale_input(noised, last), time, True))
            mean = factor * output[:, : x.shape[1]]
            x = x + (mean - mean.detach())
        return x

    @torch.no_grad()
    def refresh(self, reuse: TrajectoryCache, eps: GuidedModel, latents: Tensor, planned: set[int]) -> None:
        """One model call for all planned steps, at the states that the cache gives."""
        times, states, stepper, x = self.timesteps.to(latents.device), {}, self._stepper.begin(), latents
        for i in self.solver.steps:
            if i in planned:
                states[i] = x.detach()  # an alias: the next step shall not overwrite it
            if len(states) == len(planned):
                break
            x = stepper.step((reuse.estimate(i, x),), None, i, x)
        inputs = torch.cat([stepper.scale_input(x, i) for i, x in states.items()])
        repeated = eps.repeated(len(states))
        outputs = repeated.combine(
            *self.evaluate(repeated, inputs, times[list(states)].repeat_interleave(len(latents)))
        )
        self.model_calls += (len(states) - 1) * eps.evaluations
        for (i, x), output in zip(states.items(), outputs.chunk(len(states)), strict=True):
            reuse.store(i, x, output)

    @torch.no_grad()
    def warm_up(
        self,
        latents: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        generator: Generators = None,
        progress: bool = False,
    ) -> Tensor:
        """The input of step `start`: runs the steps before it from the input `latents` of step 0, without gradients."""
        check_latents(latents, generator)
        eps = self.guided(latents, model_kwargs, uncond_kwargs)
        steps = bar(range(self.config.start), "warm-up", progress)
        return self.run(self.stepper_from(0).begin(generator), eps, latents, steps)

    def guided(
        self, latents: Tensor, model_kwargs: Mapping[str, Any] | None, uncond_kwargs: Mapping[str, Any] | None
    ) -> GuidedModel:
        """The model with its guidance and arguments, as the steps call it."""
        variance, scale = self.solver.learned_variance, self.config.guidance_scale
        if isinstance(scale, Tensor):
            check_guidance("guidance_scale", scale, "latents", latents)
        eps = GuidedModel(self.model, len(latents), scale, model_kwargs, uncond_kwargs, variance)
        if self._captured is not None:
            self._captured.check(latents, eps)
        return eps

    def evaluate(self, eps: GuidedModel, x: Tensor, t: Tensor, gradient: bool = False) -> tuple[Tensor, ...]:
        """The model's outputs before guidance, as constants unless `gradient`."""
        if not (gradient and torch.is_grad_enabled()):
            # A refresh of several steps, each sample at its own, has another batch.
            if self._captured is not None and t.ndim == 0:
                self.model_calls += eps.evaluations
                return self._captured(eps, x, t)
            if not self.config.inference_mode:
                with torch.no_grad():
                    return self._counted(eps, x, t)
            with torch.inference_mode():
                outputs = self._counted(eps, x, t)
            return tuple(output.clone() for output in outputs)
        # torch 2.10 would take the weights as autocast cast them for the calls without gradients.
        torch.clear_autocast_cache()
        return repeated(self._counted, eps, x, t) if self.config.checkpoint else self._counted(eps, x, t)

    def _counted(self, eps: GuidedModel, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        self.model_calls += eps.evaluations
        return eps.evaluate(x, t)


class _Attached:
    """Joins the path's outputs to a state that was computed without a graph, by slopes that are known beforehand."""

    def __init__(self, stepper: Stepper, eps: GuidedModel, latents: Tensor, path: Path) -> None:
        self._latents, self._path, self._guidance = latents, path, eps.weight
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        # A tensor's guidance needs the graph of every step, even of an affine scheduler. Every share is a sum over all
        # outputs before it: of many of them autograd's chain through the steps is cheaper.
        chained = sum(share > 0 for share in path.shares.values()) > MOST_SHARES
        by_slopes = torch.is_grad_enabled() and not eps.learns_guidance and not chained
        self._slopes = stepper.slopes(list(path.shares)) if by_slopes else None
        self.known = self._slopes is not None

    def input(self, x: Tensor, i: int) -> Tensor:
        share, slopes = self._path.shares[i], self._slopes
        if share == 0 or slopes is None:
            return x.detach()
        if x is self._latents and share == 1:
            return x
        return self._joined(x, lambda source: share * slopes[source][i])

    def keep(self, outputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
        self._kept[i] = outputs
        return tuple(output.detach() for output in outputs)

    def result(self, x: Tensor, posterior: tuple[float, float] | None) -> Tensor:
        slopes, stop = self._slopes, self._path.stop
        if slopes is None:
            return x
        if stop is None or posterior is None:
            end = max(slopes[None])
            return self._joined(x, lambda source: slopes[source][end])
        p, q = posterior
        return self._joined(x, lambda source: p * slopes[source][stop] + q * (source == stop))

    def _joined(self, x: Tensor, slope: Callable[[int | None], float]) -> Tensor:
        weights = tuple(self._path.weight(s) * slope(s) for s in self._kept)
        outputs = [output for outputs in self._kept.values() for output in outputs]
        return Slopes.apply(x, self._latents, slope(None), weights, self._guidance, *outputs)


def out_of_inference_mode(values: Any) -> Any:
    """The same values; tensors made under torch.inference_mode, which autograd cannot save, as normal ones."""
    if torch.is_inference_mode_enabled():
        return values
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, values)


def _gradient_scale(solver: Solver) -> float:
    """1 / |A_start|: by its absolute value, for a negative A must still turn the gradient's sign."""
    a_start = affine_sensitivities(solver)[0][solver.start].item()
    if a_start == 0:
        raise ValueError(f"normalize must be False with {solver.name}, for which A_start is zero, got True")
    return 1 / abs(a_start)


def check_sampler(sampler: ShortcutSampler) -> None:
    """Raise unless it is one."""
    if not isinstance(sampler, ShortcutSampler):
        raise TypeError(f"sampler must be a ShortcutSampler, got {type(sampler).__name__}")


def check_latents(latents: Tensor, generator: Generators = None, name: str = "latents") -> None:
    check_batch(name, latents)
    check_generator(generator)
    if isinstance(generator, (list, tuple)) and len(each(generator)) != len(latents):
        raise ValueError(f"generator must hold one for each of {len(latents)} images, got {len(each(generator))}")
    if transformed():
        raise RuntimeError("a sampler's gradient is one step's: there is no forward mode, and no torch.func transform")
