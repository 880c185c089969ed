"""Samplers made of the parts of a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_generator, check_mapping, is_integer
from .model import GuidedModel
from .noise import Generators, randn
from .paths import AnyPath
from .sampler import ShortcutSampler, check_latents


class _Calling(nn.Module):
    """A method of a module as a module, for functional_call."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def with_weights(
    module: nn.Module, method: Callable[..., Any], convert: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """A method of the module with its weights as `convert` makes them of the present ones, which stay as they are."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)  # brings weights that are offloaded as a whole
    calling = _Calling(module, method)
    weights = calling.state_dict(keep_vars=True)
    if any(t.is_meta for t in weights.values()):
        raise ValueError(
            "vae must be float32 or have its weights at hand, got one that is offloaded layer by layer and runs in "
            "another dtype than its own: vae.to(torch.float32) before offloading"
        )
    weights = {name: convert(t) for name, t in weights.items()}
    return lambda *args, **kwargs: torch.func.functional_call(calling, weights, args, kwargs)


class PipelineSampler(ShortcutSampler):
    """A ShortcutSampler with a pipeline's network and scheduler, its prompt bound, and its image decoder.

    `latents = sampler.prepare_latents(generator)`, `x0 = sampler(latents)`, `image = sampler.decode(x0)`, with
    gradients throughout; `sampler.encode(image)` is the way back, for `sdo_fast.invert`. Keyword arguments given to a
    call replace the bound ones.
    """

    def __init__(
        self,
        pipe: Any,
        model: Any,
        conditions: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
        batch: int,
        size: tuple[int, int],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, pipe.scheduler, *args, **kwargs)
        self.network = model
        self.vae = getattr(pipe, "vae", None)
        self.conditions = conditions
        self.shape = (batch, model.config.in_channels, *size)

    def with_options(self, **changes: Any) -> PipelineSampler:
        parts = SimpleNamespace(scheduler=self.solver.scheduler, vae=self.vae)
        options = vars(replace(self.config, **changes))
        return PipelineSampler(parts, self.network, self.conditions, self.shape[0], self.shape[2:], **options)

    def prepare_latents(self, generator: Generators = None) -> Tensor:
        """Noise for step 0, in the network's dtype and on its device."""
        check_generator(generator)
        parameter = next(self.network.parameters())
        target = execution_device(self.network, parameter.device)
        return randn(self.shape, generator, target, torch.float32).to(parameter.dtype) * getattr(
            self.solver.scheduler, "init_noise_sigma", 1.0
        )

    def decode(self, x0: Tensor) -> Tensor:
        """The image in [0, 1] (clamped, as the authors' losses see it)."""
        check_latents(x0, name="x0")
        if self.vae is not None:
            x0 = x0 / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
            x0 = self._autoencoder("decode", x0).sample
        return (x0 / 2 + 0.5).clamp(0, 1)

    def encode(self, image: Tensor) -> Tensor:
        """The x_0 of an image in [0, 1]: the mean of the encoder's distribution."""
        check_latents(image, name="image")
        x0 = 2 * image - 1
        if self.vae is not None:
            x0 = self._autoencoder("encode", x0).latent_dist.mean
            x0 = (x0 - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor
        return x0

    def _autoencoder(self, method: str, x: Tensor) -> Any:
        """In fp32 where it overflows in fp16 (`force_upcast`), as in the pipeline; its weights stay as they are."""
        assert self.vae is not None
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            return getattr(self.vae, method)(x.to(self.vae.dtype))
        in_fp32 = with_weights(self.vae, getattr(self.vae, method), lambda t: t.float() if t.is_floating_point() else t)
        return in_fp32(x.float())

    def guided(
        self, latents: Tensor, model_kwargs: Mapping[str, Any] | None, uncond_kwargs: Mapping[str, Any] | None
    ) -> GuidedModel:
        if model_kwargs is None and uncond_kwargs is None:
            model_kwargs, uncond_kwargs = self.conditions
        return super().guided(latents, model_kwargs, uncond_kwargs)


def from_pipeline(
    pipe: Any,
    prompt: str | list[str] | None = None,
    num_inference_steps: int | None = 50,
    start: int = 0,
    path: AnyPath = "first",
    guidance_scale: float | None = None,
    *,
    negative_prompt: str | list[str] | None = None,
    images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    encode_kwargs: Mapping[str, Any] | None = None,
    **sampler_kwargs: Any,
) -> PipelineSampler:
    """A sampler from a diffusers pipeline: Stable Diffusion 1 and 2, XL, 3, or an unconditional pixel pipeline.

    The network, scheduler and autoencoder are the pipeline's own objects, not copies (the scheduler is never changed).

    Args:
        prompt, negative_prompt, images_per_prompt: encoded once, without gradients; `encode_kwargs` are further
            arguments of `pipe.encode_prompt`, for instance ready `prompt_embeds`.
        height, width: of the image, in pixels; the network's own size by default.
        num_inference_steps, start, path, guidance_scale, **sampler_kwargs: of `ShortcutSampler`.

    Raises:
        TypeError: another kind of pipeline, or one with parts that this sampler would leave out (ControlNet,
            inpainting, instructions, refiner, a `__call__` of its own, ...). `ShortcutPipeline` runs those.
        ValueError: height or width are no multiple of what the autoencoder takes.
    """
    network = getattr(pipe, "unet", None)
    if network is None and type(getattr(pipe, "transformer", None)).__name__ == "SD3Transformer2DModel":
        network = pipe.transformer
    scheduler = getattr(pipe, "scheduler", None)
    if network is None or scheduler is None:
        raise TypeError(
            f"pipe must have a unet or an SD3 transformer, and a scheduler, got {type(pipe).__name__}; {_ELSE}"
        )
    _refuse(pipe, network)
    factor = getattr(pipe, "vae_scale_factor", 8) if getattr(pipe, "vae", None) is not None else 1
    default = network.config.sample_size
    default = (default, default) if isinstance(default, int) else default
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not is_integer(side) or side < 1 or side % factor):
            raise ValueError(f"{name} must be a positive multiple of {factor} pixels for this pipeline, got {side!r}")
    if not is_integer(images_per_prompt) or images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be a positive integer, got {images_per_prompt!r}")
    check_mapping("encode_kwargs", encode_kwargs)
    size = (height // factor if height else default[0], width // factor if width else default[1])

    if not hasattr(pipe, "encode_prompt"):
        if prompt is not None or guidance_scale is not None:
            name, value = ("prompt", prompt) if prompt is not None else ("guidance_scale", guidance_scale)
            raise ValueError(f"{name} must be None for {type(pipe).__name__}, which is unconditional, got {value!r}")
        conditions: tuple[Any, Any] = ({}, None)
        batch = images_per_prompt
    else:
        conditions = _encode(
            pipe, prompt, negative_prompt, images_per_prompt, guidance_scale, size, factor, encode_kwargs
        )
        batch = len(conditions[0]["encoder_hidden_states"])
    return PipelineSampler(
        pipe, network, conditions, batch, size, num_inference_steps, start, path, guidance_scale, **sampler_kwargs
    )


def execution_device(module: nn.Module, default: torch.device) -> torch.device:
    """Where accelerate's hooks bring an offloaded module to run, or `default`."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), default))


_ELSE = (
    "ShortcutPipeline runs any pipeline by its own code; or give its network to ShortcutSampler in a function "
    "model(x, t, **kwargs)"
)
_REPRODUCED = [
    f"{name}Pipeline.__call__"
    for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "DDPM", "DDIM", "PNDM")
]


def _refuse(pipe: Any, network: Any) -> None:
    """TypeError for a pipeline that does more than to call its network on the latents and the prompt."""
    config, vae = network.config, getattr(pipe, "vae", None)
    of_vae = getattr(vae, "config", None)
    arguments = inspect.signature(pipe.__call__).parameters
    channels = getattr(of_vae, "latent_channels", None)
    reasons = {
        "a controlnet": getattr(pipe, "controlnet", None) is not None or "control_image" in arguments,
        "a T2I adapter": getattr(pipe, "adapter", None) is not None,
        "a mask to paint in": "mask_image" in arguments,
        "an autoencoder that is not called vae": vae is None and hasattr(pipe, "vqvae"),
        "an autoencoder with latents_mean or latents_std": any(
            getattr(of_vae, name, None) is not None for name in ("latents_mean", "latents_std")
        ),
        "a network with time_cond_proj_dim": getattr(config, "time_cond_proj_dim", None) is not None,
        "an image prompt": getattr(config, "encoder_hid_dim_type", None) is not None,
        "aesthetic scores": bool(getattr(getattr(pipe, "config", None), "requires_aesthetics_score", False)),
        f"a network of {config.in_channels} channels on an autoencoder of {channels}": channels is not None
        and config.in_channels != channels,
        "a call of its own": type(pipe).__call__.__qualname__ not in _REPRODUCED,
    }
    for reason, holds in reasons.items():
        if holds:
            raise TypeError(f"pipe must be a plain pipeline, got {type(pipe).__name__} with {reason}; {_ELSE}")


@torch.no_grad()
def _encode(
    pipe: Any,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    images_per_prompt: int,
    guidance_scale: float | None,
    size: tuple[int, int],
    factor: int,
    encode_kwargs: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The keyword arguments of the network's conditional and unconditional calls."""
    network = getattr(pipe, "unet", None)
    third = {"prompt_2": None, "prompt_3": None} if network is None else {}
    arguments = {
        "prompt": prompt,
        "device": execution_device(network or pipe.transformer, (network or pipe.transformer).device),
        "num_images_per_prompt": images_per_prompt,
        "do_classifier_free_guidance": guidance_scale is not None,
        "negative_prompt": negative_prompt,
        **third,
        **(encode_kwargs or {}),
    }
    embeddings = pipe.encode_prompt(**arguments)
    cond: dict[str, Any] = {"encoder_hidden_states": embeddings[0]}
    uncond: dict[str, Any] = {"encoder_hidden_states": embeddings[1]}
    if len(embeddings) == 4 and network is None:
        cond["pooled_projections"], uncond["pooled_projections"] = embeddings[2:]
    elif len(embeddings) == 4:
        height, width = size[0] * factor, size[1] * factor
        ids = torch.tensor([[height, width, 0, 0, height, width]]).to(embeddings[0]).repeat(len(embeddings[0]), 1)
        for side, pooled in ((cond, embeddings[2]), (uncond, embeddings[3])):
            side["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return cond, uncond if guidance_scale is not None else None
