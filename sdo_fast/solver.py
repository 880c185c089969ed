"""A scheduler with its schedule, and its passes: copies that nobody else sees. Knows no kernel."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .arguments import check_mapping, is_integer
from .noise import Generators, SeededNoise


class NotAffineError(ValueError):
    """x_0 is not an affine function of the latents and model outputs; only autograd through the scheduler is right."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_cpu(function: _Function) -> _Function:
    """`function` with the CPU as torch's default device, whatever `torch.set_default_device` says: schedules are
    measured there."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return cast(_Function, call)


class Solver:
    """The update rule x_{i+1} = S_i(x_i, eps_i) of a scheduler, for the steps start, ..., len(timesteps) - 1.

    The scheduler is duck-typed after diffusers: `set_timesteps(n)`, `timesteps`, `step(output, t, x)` whose result has
    `.prev_sample` (or is a tuple), optionally `scale_model_input(x, t)`, `set_begin_index(i)`, `order` and `config`.
    It is copied here, and `begin` copies again for every pass, so neither the caller's scheduler nor an earlier pass
    is ever changed.

    Args:
        num_inference_steps: passed to `set_timesteps`; None leaves it out, for schedules given by `schedule_kwargs`.
        start: index into `timesteps` of the first step to run. Multistep schedulers begin there without history.
        step_kwargs: keyword arguments for every `step`, e.g. `{"eta": 1.0, "use_clipped_model_output": True}`.
        schedule_kwargs: keyword arguments for `set_timesteps`, e.g. `{"mu": 1.15}` or `{"sigmas": [...]}`.
    """

    @on_cpu
    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int | None = 50,
        start: int = 0,
        step_kwargs: Mapping[str, Any] | None = None,
        schedule_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = type(scheduler).__name__
        for method in ("set_timesteps", "step"):
            if isinstance(scheduler, type) or not callable(getattr(scheduler, method, None)):
                raise TypeError(f"scheduler must be a diffusers scheduler or have its {method}(), got {self.name}")
        if num_inference_steps is not None and (not is_integer(num_inference_steps) or num_inference_steps < 1):
            raise ValueError(f"num_inference_steps must be a positive integer or None, got {num_inference_steps!r}")
        check_mapping("step_kwargs", step_kwargs)
        check_mapping("schedule_kwargs", schedule_kwargs)
        if num_inference_steps is None and not schedule_kwargs:
            raise ValueError(
                "schedule_kwargs must hold the timesteps or sigmas where num_inference_steps is None, "
                f"got {schedule_kwargs!r}"
            )
        scheduler = _detached_copy(scheduler)
        positional = () if num_inference_steps is None else (int(num_inference_steps),)
        scheduler.set_timesteps(*positional, **dict(schedule_kwargs or {}))
        self.schedule_kwargs = dict(schedule_kwargs or {})
        self._take(scheduler, start, step_kwargs)

    @classmethod
    @on_cpu
    def as_set(cls, scheduler: Any, start: int = 0, step_kwargs: Mapping[str, Any] | None = None) -> Solver:
        """Of a scheduler whose timesteps are set."""
        solver = cls.__new__(cls)
        solver.name, solver.schedule_kwargs = type(scheduler).__name__, {}
        scheduler = _detached_copy(scheduler)
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None  # of the pass under way, as soon as it has scaled an input
        solver._take(scheduler, start, step_kwargs)
        return solver

    def _take(self, scheduler: Any, start: int, step_kwargs: Mapping[str, Any] | None) -> None:
        steps = len(scheduler.timesteps)
        if not is_integer(start) or not 0 <= start < steps:
            raise ValueError(f"start must be an integer from 0 to {steps - 1} ({steps} timesteps), got {start!r}")
        order = getattr(scheduler, "order", 1)
        if start % order:
            raise ValueError(
                f"start must be a multiple of {order}, the model calls in a step of {self.name}, got {start}"
            )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        self.scheduler = scheduler
        self.start = int(start)
        self.step_kwargs = dict(step_kwargs or {})
        parameters = inspect.signature(scheduler.step).parameters
        unknown = self.step_kwargs.keys() - parameters.keys()
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"step_kwargs must be arguments of {self.name}.step, got {', '.join(sorted(unknown))}")
        self.takes_generator = "generator" in parameters

    def __len__(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def timesteps(self) -> Tensor:
        return torch.as_tensor(self.scheduler.timesteps)

    @property
    def steps(self) -> range:
        return range(self.start, len(self))

    @property
    def learned_variance(self) -> bool:
        """Whether the scheduler reads the model's variance channels."""
        return config(self.scheduler, "variance_type") in ("learned", "learned_range")

    def starting_at(self, start: int) -> Solver:
        """The same schedule from another step."""
        solver = copy.copy(self)
        for measured in ("noise_sources", "sensitivities"):
            vars(solver).pop(measured, None)
        solver.scheduler, solver.start = copy.deepcopy(self.scheduler), start
        if hasattr(solver.scheduler, "set_begin_index"):
            solver.scheduler.set_begin_index(start)
        return solver

    def begin(self, generator: Generators = None) -> Solver:
        """A copy for one pass; its noise comes from `generator`, or from torch's global one."""
        solver = copy.copy(self)
        solver.scheduler = copy.deepcopy(self.scheduler)
        if self.takes_generator and generator is not None:
            solver.step_kwargs = {**self.step_kwargs, "generator": generator}
        return solver

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """The model's input for the state x of step i."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[i])

    def step(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        """S_i(x, output), in x's dtype."""
        result = self.scheduler.step(output, self.scheduler.timesteps[i], x, **self.step_kwargs)
        return (result.prev_sample if hasattr(result, "prev_sample") else result[0]).to(x.dtype)

    @cached_property
    @on_cpu
    def noise_sources(self) -> set[str]:
        """Where a pass draws its noise from: a "given" generator, torch's "global" one. Found without touching that."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1 + len(self), 1, 1, 1, 1, generator=generator, dtype=torch.float64)
        with SeededNoise(generator) as noise:
            self._pass(values[0], values[1:], generator)
        return noise.sources

    @cached_property
    @on_cpu
    def sensitivities(self) -> tuple[Tensor, Tensor]:
        """d x_0 / d x_i and d x_0 / d eps_i at zero, NaN before `start`: A and B where the scheduler is affine."""
        shifts = torch.zeros(len(self), dtype=torch.float64, requires_grad=True)
        outputs = torch.zeros(len(self), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            x0 = self.trial(torch.zeros(1, 1, 1, 1, dtype=torch.float64), outputs, shifts)
            a, b = torch.autograd.grad(x0.sum(), (shifts, outputs), allow_unused=True, materialize_grads=True)
        a[: self.start] = b[: self.start] = torch.nan
        return a, b

    @on_cpu
    def trial(self, x: Tensor, outputs: Tensor, shifts: Tensor | None = None, seed: int = 0) -> Tensor:
        """x_0 from x and model outputs, as many elements for each timestep, with the same noise for a seed.

        `shifts` are added to the states. No global generator is touched.
        """
        generator = torch.Generator().manual_seed(seed)
        # A mode slows every operation down.
        with SeededNoise(generator) if "global" in self.noise_sources else nullcontext():
            return self._pass(x, outputs, generator, shifts)

    def _pass(self, x: Tensor, outputs: Tensor, generator: torch.Generator, shifts: Tensor | None = None) -> Tensor:
        run = self.begin(generator)
        for i in run.steps:
            if shifts is not None:
                x = x + shifts[i]
            output = outputs[i].reshape(1, 1, 1, -1)
            if run.learned_variance:
                output = torch.cat([output, torch.zeros_like(output)], dim=1)
            run.scale_input(x, i)
            x = run.step(output, i, x)
        return x


def config(scheduler: Any, name: str, default: Any = None) -> Any:
    """`scheduler.config[name]`, or the default for schedulers without a config or without that entry."""
    values = getattr(scheduler, "config", None)
    return values.get(name, default) if isinstance(values, Mapping) else getattr(values, name, default)


def _detached_copy(scheduler: Any) -> Any:
    # A scheduler that was used before may hold tensors of a graph, which deepcopy refuses.
    graph = [leaf for leaf in tree_leaves(vars(scheduler)) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    scheduler = copy.deepcopy(scheduler, {id(tensor): tensor.detach() for tensor in graph})
    for attribute, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, attribute, value.cpu())
    return scheduler
