"""Gradients through a sampler on the digits model: time over sampling alone, bytes, agreement with the full one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sdo_fast
from examples import digits_model

from .harness import Case, Options, Variant, Work, saved_bytes

BATCH = 4
TARGETS = {10: 1.25, 25: 1.25, 50: 1.10}
"""Most time that one step may take over the floor, by the number of sampling steps."""


def gradients(num_steps: int, options: Options) -> Work:
    unet = digits_model.load_digits_unet().to(options.device).eval().requires_grad_(False)
    classifier = digits_model.load_digits_classifier().to(options.device).eval().requires_grad_(False)
    scheduler = digits_model.scheduler()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, *digits_model.IMAGE_SHAPE, generator=generator).to(options.device).requires_grad_()
    labels = torch.arange(BATCH, device=options.device)
    kwargs = {"class_labels": torch.full_like(labels, digits_model.NULL_LABEL)}

    def loss(x0: Tensor) -> Tensor:
        return F.cross_entropy(classifier(x0.clamp(-1, 1)), labels)

    def gradient(sample: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(sample()), latents)[0]

    def shortcut(**arguments: Any) -> Callable[[], Tensor]:
        sampler = sdo_fast.ShortcutSampler(unet, scheduler, num_steps, **arguments)
        return lambda: sampler(latents, kwargs)

    def full(checkpoint: bool) -> Callable[[], Tensor]:
        return lambda: sdo_fast.reference.full_backprop(
            unet, scheduler, latents, num_steps, checkpoint=checkpoint, model_kwargs=kwargs
        )

    plain = shortcut(grad_step="identity")

    def floor() -> Tensor:
        with torch.no_grad():
            return plain()

    exact = gradient(full(False)).flatten()
    samplers = {
        "full backprop": full(False),
        "full, checkpointed": full(True),
        "one step (checkpoint)": shortcut(),
        "one step (no checkpoint)": shortcut(checkpoint=False),
        "last step only": shortcut(grad_step="last"),
        "identity": plain,
    }
    variants = {"sampling alone (floor)": Variant(floor, compared=False)}
    for name, sample in samplers.items():
        metrics = {
            "saved_bytes": saved_bytes(sample, [*unet.parameters(), latents]),
            "cosine_with_full": F.cosine_similarity(gradient(sample).flatten(), exact, 0).item(),
        }
        ours = name.startswith(("one", "last", "identity"))
        variants[name] = Variant(lambda sample=sample: gradient(sample), ours, compared=False, metrics=metrics)
    targets = {"sampling alone (floor)": 1 / TARGETS[num_steps]} if num_steps in TARGETS else {}
    return Work(variants, targets=targets)


def cases(options: Options) -> list[Case]:
    counts = (3,) if options.quick else (10, 25, 50)
    return [Case(f"digits, {n} steps", lambda n=n: gradients(n, options)) for n in counts]
