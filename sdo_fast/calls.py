"""Samplers, pipelines and functions, as optimisation calls them: tensors by name in, an image out, the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .arguments import check_mapping
from .noise import each
from .pipelines import PipelineSampler
from .sampler import ShortcutSampler

# Coarse to fine as it was measured: the last fifth of the updates on the full schedule.
COARSE_SHARE = 0.8
_CONDITIONS = ("model_kwargs", "uncond_kwargs")


class Call:
    """`function(latents, **kwargs)`, or all tensors by keyword."""

    def __init__(self, function: Callable[..., Any], kwargs: Mapping[str, Any], by_keyword: bool) -> None:
        self.function, self.kwargs, self.by_keyword = function, dict(kwargs), by_keyword
        self.calls = 0
        self._generators = each(kwargs.get("generator"))
        self._states = [g.get_state() for g in self._generators]

    @property
    def model_calls(self) -> int:
        return getattr(self.function, "model_calls", self.calls)

    @property
    def exact(self) -> bool:
        """Whether the last image was no estimate."""
        return True

    def begin(self, iteration: int, exactly: bool) -> None:
        """Before each evaluation; with `exactly` its image must not be an estimate."""

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        for g, state in zip(self._generators, self._states, strict=True):
            g.set_state(state)
        self.calls += 1
        return self.run(tensors)

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.by_keyword:
            return _first_tensor(self.function(**tensors, **self.kwargs))
        return _first_tensor(self.function(*tensors.values(), **self.kwargs))


class SamplerCall(Call):
    """A sampler, on a coarse schedule at first; tensors beside the latents are keyword arguments of its model."""

    def __init__(
        self, sampler: ShortcutSampler, kwargs: Mapping[str, Any], coarse_steps: int | None, steps: int
    ) -> None:
        super().__init__(sampler, kwargs, True)
        self.fine = self.active = sampler
        self.coarse = sampler if coarse_steps is None else sampler.with_steps(coarse_steps)
        self.coarse_until = 0 if coarse_steps is None else math.floor(COARSE_SHARE * steps)
        self.path_generator = next((g.clone_state() for g in self._generators), None)

    @property
    def model_calls(self) -> int:
        return self.active.model_calls

    @property
    def exact(self) -> bool:
        reuse = self.active.reuse
        return self.active is self.fine and (reuse is None or reuse.exact)

    def begin(self, iteration: int, exactly: bool) -> None:
        self.active = self.coarse if iteration < self.coarse_until and not exactly else self.fine
        if self.active.reuse is not None and exactly:
            self.active.reuse.require_exact()

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        kwargs = dict(self.kwargs)
        conditions = {name: tensor for name, tensor in tensors.items() if name != "latents"}
        if conditions and isinstance(self.active, PipelineSampler) and not {*kwargs} & {*_CONDITIONS}:
            kwargs |= zip(_CONDITIONS, self.active.conditions, strict=True)
        if conditions:
            kwargs["model_kwargs"] = {**(kwargs.get("model_kwargs") or {}), **conditions}
        return _sampled(self.active, tensors["latents"], self.path_generator, kwargs)


def _sampled(
    sampler: ShortcutSampler, latents: Tensor, path_generator: torch.Generator | None, kwargs: Mapping[str, Any]
) -> Tensor:
    """x_0, with its path drawn from a generator of its own: it differs from call to call."""
    return sampler.sample(latents, sampler.draw_path(path_generator), **kwargs)


def check_call(sampler: Any, names: Collection[str], kwargs: Mapping[str, Any], coarse_steps: Any) -> None:
    """Raise unless it can be called with tensors of these names, and these arguments besides."""
    if not callable(sampler):
        raise TypeError(
            "sampler must be a ShortcutSampler, a ShortcutPipeline or a function of the latents, got "
            f"{type(sampler).__name__}"
        )
    if hasattr(sampler, "components") and hasattr(sampler, "scheduler"):
        raise TypeError(
            f"sampler must have a gradient, got {type(sampler).__name__}, which runs under torch.no_grad: "
            "ShortcutPipeline(pipe) takes its place"
        )
    of_model = isinstance(sampler, ShortcutSampler)
    if coarse_steps is not None and not of_model:
        raise ValueError(f"coarse_steps must be None but for a ShortcutSampler, got {coarse_steps!r}")
    if of_model and "latents" not in names:
        raise ValueError(f"latents must hold a tensor of this name for a ShortcutSampler, got {', '.join(names)}")
    check_mapping("model_kwargs", kwargs.get("model_kwargs") if of_model else None)
    twice = {*names} & {*(kwargs.get("model_kwargs") or () if of_model else kwargs)}
    if twice:
        raise ValueError(f"latents must hold no tensor that is given as an argument too, got {', '.join(twice)} twice")


def _first_tensor(result: Any) -> Tensor:
    """The image of what a sampler, a pipeline or a model returned."""
    fields = tuple(result.values()) if isinstance(result, Mapping) else result
    first = fields[0] if isinstance(fields, (list, tuple)) and fields else fields
    if not isinstance(first, Tensor):
        raise TypeError(
            "sampler must return a tensor, a tuple or list that begins with one, or a diffusers output, got "
            f"{type(result).__name__}"
        )
    return first
