"""Where the images come from: a diffusers pipeline, or a sampler with what turns prompts into its conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import is_integer
from ..noise import randn
from ..paths import AnyPath, Path
from ..sampler import ShortcutSampler
from ..shortcut_pipeline import BESIDE, ShortcutPipeline

Generators = Sequence[torch.Generator]
Conditions = tuple[Mapping[str, Any], Mapping[str, Any] | None]


@runtime_checkable
class Source(Protocol):
    """What a `RewardTrainer` samples from."""

    networks: Mapping[str, nn.Module]
    """The denoisers by name: what can be trained."""

    def __call__(self, prompts: Sequence[Any], noise: Generators, path: torch.Generator) -> Tensor:
        """Images (B, C, H, W), with the graph of a path that `path` draws, of B prompts and B generators of noise."""

    def take(self, path: AnyPath | None, checkpoint: bool | None) -> None:
        """Sample with this gradient path from now on, its calls repeated in backward or not; None for its own."""

    def to(self, device: torch.device) -> None:
        """Move all modules."""

    def modules(self) -> list[nn.Module]:
        """All modules, to be frozen."""

    @property
    def path(self) -> AnyPath:
        """The gradient path as it was given."""

    @property
    def drawn(self) -> Path:
        """The path of the last call."""

    @property
    def checkpoint(self) -> bool:
        """Whether calls with a graph are repeated in backward."""

    @property
    def steps(self) -> int | None:
        """Steps of the sampler, where they are known beforehand."""


class PipelineSource:
    """Images of a diffusers pipeline, called as itself (`sdo_fast.ShortcutPipeline`).

    Args:
        pipe: a pipeline, or a ShortcutPipeline, whose options stay.
        conditions: prompts to keyword arguments of the pipeline's call; None for `{"prompt": list(prompts)}`. For an
            unconditional one: `lambda prompts: {"batch_size": len(prompts)}`.
        **arguments: of every call, e.g. `num_inference_steps=20, guidance_scale=5.0`.

    Images are what the pipeline makes of `output_type="pt"`: (B, C, H, W) in [0, 1].
    """

    def __init__(
        self,
        pipe: Any,
        conditions: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> None:
        self.pipe = pipe.pipe if isinstance(pipe, ShortcutPipeline) else pipe
        self.shortcut = pipe if isinstance(pipe, ShortcutPipeline) else ShortcutPipeline(pipe, "random")
        if conditions is not None and not callable(conditions):
            raise TypeError(f"conditions must be a function of prompts or None, got {type(conditions).__name__}")
        self.conditions = conditions or (lambda prompts: {"prompt": list(prompts)})
        self.arguments = arguments
        self.networks: Mapping[str, nn.Module] = {
            name: getattr(self.pipe, name) for name in self.shortcut.denoisers if name not in BESIDE
        }
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[Any], noise: Generators, path: torch.Generator) -> Tensor:
        self.shortcut.generator = path
        return torch.as_tensor(self.shortcut(**self.conditions(prompts), **self.arguments, generator=list(noise))[0])

    def take(self, path: AnyPath | None, checkpoint: bool | None) -> None:
        if path is None and checkpoint is None:
            return
        old = self.shortcut
        self.shortcut = ShortcutPipeline(
            self.pipe,
            old.path if path is None else path,
            old.checkpoint if checkpoint is None else checkpoint,
            checkpoint_decoder=old.checkpoint_decoder,
            denoisers=old.denoisers,
        )

    def to(self, device: torch.device) -> None:
        # A pipeline whose modules accelerate moves stays where it is.
        if all(not hasattr(module, "_hf_hook") for module in self.modules()):
            self.pipe.to(device)

    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    @property
    def path(self) -> AnyPath:
        return self.shortcut.path

    @property
    def drawn(self) -> Path:
        return self.shortcut.drawn

    @property
    def checkpoint(self) -> bool:
        return self.shortcut.checkpoint

    @property
    def steps(self) -> int | None:
        """As the pipeline is told, or by its default; other arguments (strength, sigmas) may change it."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get("num_inference_steps")
        default = None if parameter is None else parameter.default
        steps = self.arguments.get("num_inference_steps", default)
        return steps if is_integer(steps) else None


class SamplerSource:
    """Images of a ShortcutSampler.

    Args:
        sampler: its model must be a module, or a `PipelineSampler`'s.
        conditions: prompts (whatever they are: texts, class labels) to `model_kwargs`, or with guidance to
            `(model_kwargs, uncond_kwargs)`, on the model's device.
        shape: of one latent, (C, H, W); None takes a PipelineSampler's.
        decode: x_0 (B, C, H, W) to images; None takes a PipelineSampler's, else x_0 itself.
        parts: further modules that `decode` uses, to be moved and frozen.
    """

    def __init__(
        self,
        sampler: ShortcutSampler,
        conditions: Callable[[Sequence[Any]], Mapping[str, Any] | Conditions],
        shape: Sequence[int] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        parts: Sequence[nn.Module] = (),
    ) -> None:
        if not isinstance(sampler, ShortcutSampler):
            raise TypeError(f"sampler must be a ShortcutSampler, got {type(sampler).__name__}")
        if sampler.config.reuse is not None:
            raise ValueError("reuse must be None while parameters change, got a TrajectoryCache")
        network = getattr(sampler, "network", sampler.model)
        if not isinstance(network, nn.Module):
            raise TypeError(f"sampler must have a model that is an nn.Module, got {type(network).__name__}")
        if not callable(conditions):
            raise TypeError(f"conditions must be a function of prompts, got {type(conditions).__name__}")
        shape = getattr(sampler, "shape", (0,))[1:] if shape is None else shape
        if not shape or not all(is_integer(side) and side > 0 for side in shape):
            raise ValueError(f"shape must be that of one latent, (C, H, W), got {tuple(shape) or None}")
        self.sampler, self.conditions, self.shape = sampler, conditions, tuple(shape)
        self.decode: Any = decode or getattr(sampler, "decode", lambda x0: x0)
        self.parts = [*parts, *(part for part in [getattr(sampler, "vae", None)] if part is not None)]
        self.networks: Mapping[str, nn.Module] = {"model": network}

    def __call__(self, prompts: Sequence[Any], noise: Generators, path: torch.Generator) -> Tensor:
        weight = next(self.networks["model"].parameters())
        scale = getattr(self.sampler.solver.scheduler, "init_noise_sigma", 1.0)
        latents = scale * randn((len(prompts), *self.shape), noise, weight.device, torch.float32).to(weight.dtype)
        bound = self.conditions(prompts)
        model_kwargs, uncond_kwargs = bound if isinstance(bound, tuple) else (bound, None)
        drawn = self.sampler.draw_path(path)
        return self.decode(self.sampler.sample(latents, drawn, model_kwargs, uncond_kwargs, list(noise)))

    def take(self, path: AnyPath | None, checkpoint: bool | None) -> None:
        options = {"path": path, "checkpoint": checkpoint}
        changes = {name: value for name, value in options.items() if value is not None}
        if changes:
            self.sampler = self.sampler.with_options(**changes)

    def to(self, device: torch.device) -> None:
        for module in self.modules():
            module.to(device)

    def modules(self) -> list[nn.Module]:
        return [*self.networks.values(), *self.parts]

    @property
    def path(self) -> AnyPath:
        return self.sampler.config.path

    @property
    def drawn(self) -> Path:
        return self.sampler.drawn

    @property
    def checkpoint(self) -> bool:
        return self.sampler.config.checkpoint

    @property
    def steps(self) -> int | None:
        return len(self.sampler.solver.steps)


def as_source(source: Any) -> Source:
    """A source, or that of a pipeline."""
    if isinstance(source, ShortcutSampler):
        raise TypeError(
            "source must be SamplerSource(sampler, conditions, shape), which turns prompts into the sampler's "
            f"arguments, got the {type(source).__name__} itself"
        )
    if isinstance(source, ShortcutPipeline) or callable(getattr(getattr(source, "scheduler", None), "step", None)):
        return PipelineSource(source)
    if not isinstance(source, Source):
        raise TypeError(
            f"source must be a diffusers pipeline, PipelineSource or SamplerSource, got {type(source).__name__}"
        )
    return source
