"""Gradients through a sampler: time over sampling alone, peak memory, agreement with the full one, and what they buy.

Peak bytes are of all tensors alive during forward and backward but the models' own, with the decoder and the metric's
network in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdo_fast
from examples import digits_model

from .harness import Case, Options, Variant, Work, peak_bytes

TARGETS = {10: 1.25, 50: 1.10}
"""Most time that one step may take over the floor, by the number of sampling steps."""
PEAK = 1.2
"""Most peak bytes of one step, over those of full backpropagation divided by the number of steps."""
PIPELINE_TIME, PIPELINE_PEAK = 1.10, 1.15
"""Most that a pipeline's gradient may take: time over the pipeline's, peak bytes over the pipeline's and one step's."""
ROUNDS = 9
"""Least rounds of timing: a target is missed or met by a few percent, and a median of five is off by more than that."""
UPDATES = 20
PIPELINE_STEPS = 28


@dataclass(frozen=True)
class Task:
    """A model, its scheduler, latents and arguments, and a loss of x_0."""

    model: nn.Module
    scheduler: Any
    latents: Tensor
    arguments: Mapping[str, Any]
    loss: Callable[[Tensor], Tensor]


def digits(batch: int, device: str) -> Task:
    """A class of the digits model's images, asked of the classifier."""
    unet = digits_model.load_digits_unet().to(device)
    classifier = digits_model.load_digits_classifier().to(device)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *digits_model.IMAGE_SHAPE, generator=generator).to(device)
    labels = torch.arange(3, 3 + batch, device=device)
    arguments = {"class_labels": torch.full_like(labels, digits_model.NULL_LABEL)}
    return Task(
        unet,
        digits_model.scheduler(),
        latents,
        arguments,
        lambda x0: F.cross_entropy(classifier(x0.clamp(-1, 1)), labels),
    )


def latent_space(device: str) -> Task:
    """The style of a decoded image: UNet of 24 M parameters, decoder and critic, of random weights.

    Decoder and critic together keep about half as much for backward as one call of the UNet.
    """
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(96, 192, 288),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    critic = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 32, 3, 1, 1)
    )
    for model in (unet, vae, critic):
        model.to(device).eval().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    latents = torch.randn(1, 4, 8, 8).to(device)

    def gram(image: Tensor) -> Tensor:
        features = critic(image.clamp(-1, 1)).flatten(2)
        return features @ features.mT / features.shape[-1]

    style = gram(torch.rand(1, 3, 32, 32).to(device) * 2 - 1)
    return Task(unet, scheduler, latents, {}, lambda x0: F.mse_loss(gram(vae.decode(x0).sample), style))


def samplers(task: Task, num_steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way to differentiate through the sampler; sampling alone does without any."""

    def loop(function: Callable[..., Tensor], **settings: Any) -> Callable[[Tensor], Tensor]:
        return lambda z: function(
            task.model, task.scheduler, z, num_steps, model_kwargs=dict(task.arguments), **settings
        )

    def shortcut(**settings: Any) -> Callable[[Tensor], Tensor]:
        sampler = sdo_fast.ShortcutSampler(task.model, task.scheduler, num_steps, **settings)
        return lambda z: sampler(z, task.arguments)

    return {
        "sampling alone (floor)": shortcut(path="identity"),
        "full backprop": loop(sdo_fast.reference.full_backprop),
        "full, checkpointed": loop(sdo_fast.reference.full_backprop, checkpoint=True),
        "authors' loop": loop(sdo_fast.reference.path_loop),
        "one step (checkpoint)": shortcut(),
        "one step (no checkpoint)": shortcut(checkpoint=False),
        "last step only": shortcut(path="last"),
        "identity": shortcut(path="identity"),
    }


def is_ours(name: str) -> bool:
    return name.startswith(("one step", "last step", "identity"))


def gradients(make: Callable[[], Task], num_steps: int) -> Work:
    task = make()
    latents = task.latents.requires_grad_()

    def gradient(sample: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(task.loss(sample(latents)), latents)[0]

    variants, exact, full_peak = {}, None, 0
    for name, sample in samplers(task, num_steps).items():
        if name == "sampling alone (floor)":
            variants[name] = Variant(torch.no_grad()(partial(sample, latents)), compared=False)
            continue
        run = partial(gradient, sample)
        peak, grad = peak_bytes(run)
        if exact is None:
            exact, full_peak = grad, peak
        cosine = F.cosine_similarity(grad.flatten(), exact.flatten(), 0).item()
        metrics = {"peak_bytes": peak, "cosine_with_full": cosine}
        if name == "one step (checkpoint)":
            metrics |= {
                "over_full backprop (peak bytes)": full_peak / peak,
                "target_over_full backprop (peak bytes)": num_steps / PEAK,
            }
        variants[name] = Variant(run, is_ours(name), compared=False, metrics=metrics)
    targets = {"sampling alone (floor)": 1 / TARGETS[num_steps]} if num_steps in TARGETS else {}
    return Work(variants, targets=targets, least_rounds=ROUNDS if num_steps > 3 else 1)


def flux(device: str, heads: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline of FLUX's kind, of random weights (25 M in the transformer for 12 heads), and a call's arguments."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
    for model in (transformer, vae):
        model.to(device).eval().requires_grad_(False)
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": torch.randn(1, 8, 64).to(device),
        "pooled_prompt_embeds": torch.randn(1, 32).to(device),
        "latents": torch.randn(1, 16, 16).to(device),
        "height": 16,
        "width": 16,
    }
    return pipe, arguments


def one_step(pipe: Any, arguments: Mapping[str, Any]) -> Tensor:
    """The gradient of one repeated call of the transformer, as the pipeline makes it."""
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    with torch.no_grad(), pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True):
        pipe(**arguments, num_inference_steps=1, output_type="latent")
    latents = seen["hidden_states"].requires_grad_()
    output = checkpoint(pipe.transformer, **seen, use_reentrant=False)[0]
    return torch.autograd.grad(output.square().mean(), latents)[0]


def pipeline(num_steps: int, device: str, heads: int) -> Work:
    """A pipeline's own call, and the gradient of its image to the latents by paths through it."""
    pipe, arguments = flux(device, heads)
    latents = arguments.pop("latents").requires_grad_()
    wanted = torch.rand(1, 3, 16, 16).to(device)

    def sample(call: Any) -> Tensor:
        return call(**arguments, latents=latents, num_inference_steps=num_steps, output_type="pt").images

    def gradient(call: Any) -> Tensor:
        return torch.autograd.grad(F.mse_loss(sample(call), wanted), latents)[0]

    floor = partial(sample, pipe)
    sampling, step = peak_bytes(floor)[0], peak_bytes(partial(one_step, pipe, {**arguments, "latents": latents}))[0]
    variants = {"sampling alone (floor)": Variant(floor, compared=False)}
    exact = None
    options: dict[str, dict[str, Any]] = {
        "full backprop": {"path": "full", "checkpoint": False},
        "full, checkpointed": {"path": "full"},
        "one step (checkpoint)": {},
        "one step (no checkpoint)": {"checkpoint": False},
        "identity": {"path": "identity"},
    }
    for name, settings in options.items():
        run = partial(gradient, sdo_fast.ShortcutPipeline(pipe, **settings))
        peak, grad = peak_bytes(run)
        exact = grad if exact is None else exact
        cosine = F.cosine_similarity(grad.flatten(), exact.flatten(), 0).item()
        metrics = {"peak_bytes": peak, "cosine_with_full": cosine}
        if name == "one step (checkpoint)":
            metrics |= {
                "over_sampling and one step (peak bytes)": (sampling + step) / peak,
                "target_over_sampling and one step (peak bytes)": 1 / PIPELINE_PEAK,
            }
        variants[name] = Variant(run, is_ours(name), compared=False, metrics=metrics)
    targets = {"sampling alone (floor)": 1 / PIPELINE_TIME} if num_steps == PIPELINE_STEPS else {}
    return Work(variants, targets=targets, least_rounds=ROUNDS if targets else 1)


def progress(num_steps: int, updates: int, device: str) -> Work:
    """The loss that each gradient reaches in so many model calls, and in so many seconds.

    Recomputed calls count, backward passes do not: their price is in the seconds.
    """
    task = digits(2, device)
    histories, calls = {}, {}
    for name, sample in samplers(task, num_steps).items():
        if name == "sampling alone (floor)":
            continue
        calls[name] = {"full, checkpointed": 2 * num_steps, "one step (checkpoint)": num_steps + 1}.get(name, num_steps)
        histories[name] = sdo_fast.optimize_latents(
            sample, task.latents, task.loss, updates, 0.05, progress=False, constraint="norm"
        ).history
    shortest = min(sum(r.seconds for r in history) for history in histories.values())
    variants = {}
    for name, history in histories.items():
        losses = list(accumulate((r.loss for r in history), min))
        metrics: dict[str, Any] = {"updates": updates, "final_loss": losses[-1]}
        prices: dict[str, list[float]] = {
            "model_calls": [calls[name]] * len(history),
            "seconds": [r.seconds for r in history],
        }
        for what, total in (("model_calls", num_steps * updates), ("seconds", shortest)):
            spent = list(accumulate(prices[what]))
            for share in (0.25, 0.5, 1.0):
                reached = [loss for loss, s in zip(losses, spent, strict=True) if s <= share * total]
                if reached:
                    budget = f"{share * total:.0f}" if what == "model_calls" else f"{share:.0%} of {total:.1f}"
                    metrics[f"loss in {budget} {what.replace('_', ' ')}"] = reached[-1]
        metrics["seconds"] = sum(prices["seconds"])
        variants[name] = Variant(None, is_ours(name), metrics=metrics)
    return Work(variants, timed=False)


def cases(options: Options) -> list[Case]:
    device, counts = options.device, (3,) if options.quick else (10, 25, 50) if options.full else (10, 50)
    large = () if options.quick else counts if options.full else counts[:1]
    result = [Case(f"digits (0.65 M), {n} steps", partial(gradients, partial(digits, 1, device), n)) for n in counts]
    steps, heads, size = (2, 1, "0.2 M") if options.quick else (PIPELINE_STEPS, 12, "25 M")
    result.append(Case(f"pipeline ({size}), {steps} steps", partial(pipeline, steps, device, heads)))
    result += [
        Case(f"latent space (24 M), {n} steps", partial(gradients, partial(latent_space, device), n)) for n in large
    ]
    updates = 3 if options.quick else UPDATES
    result.append(Case(f"digits, loss reached, {counts[0]} steps", partial(progress, counts[0], updates, device)))
    return result
