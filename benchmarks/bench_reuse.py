"""Trajectory reuse: model evaluations and seconds until the true loss of optimised latents is below a threshold.

Every variant makes the same updates of Adam along the identity gradient. True losses are those of exact passes, and
the price of reaching one is all that was spent until then. A threshold that the baseline misses counts as reached with
its last update; one that a variant misses counts as infinitely dear. The figures of a setting are medians over seeds.
Seconds on a CPU are those of the process, which other processes disturb less.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sdo_fast
from examples import digits_model

from .harness import Case, Options, Variant, Work

BATCH = 2
THRESHOLDS = {"class": (0.1, 0.05), "pixel": (0.05, 0.03), "decoded pixel": (0.5, 0.3)}
"""A loose and a strict mean loss over the latents: cross-entropy, squared error, squared error over its first value."""
FEWER_CALLS, FINAL_LOSS = 2.5, 1.5
"""Targets of the default setting, medians: times fewer evaluations to the strict threshold; final loss ratio."""
BASELINE = "no reuse"
OURS: dict[str, dict[str, Any]] = {
    "reuse (refresh 10 %, exact every 10)": {"refresh": 0.1, "exact_every": 10},
    "reuse (refresh 20 %, exact every 5)": {"refresh": 0.2, "exact_every": 5},
}
DEFAULT = next(iter(OURS))


@dataclass(frozen=True)
class Objective:
    """Latents and the mean loss of what a sampler makes of them."""

    sampler: Callable[..., sdo_fast.ShortcutSampler]
    latents: Tensor
    loss: Callable[[Tensor], Tensor]
    lr: float
    arguments: Mapping[str, Any]


@dataclass
class Optimisation:
    """One optimisation, by what it cost to come below each threshold."""

    calls: list[float]
    seconds: list[float]
    final_loss: float
    total_calls: int
    gap: float | None


@dataclass
class Summary:
    """The ratios of a variant in every setting so far."""

    calls: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def digits(task: str, num_steps: int, guided: bool, device: str, seed: int) -> Objective:
    """A class to be seen by the classifier (with guidance: against a prompt of another class), or a digit to match."""
    unet = digits_model.load_digits_unet().to(device)
    classifier = digits_model.load_digits_classifier().to(device)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, *digits_model.IMAGE_SHAPE, generator=generator).to(device)
    images, labels = digits_model.digits("test")
    chosen = torch.randperm(len(images), generator=generator)[:BATCH]
    image, wanted = images[chosen].to(device), labels[chosen].to(device)
    prompt = wanted if task == "pixel" else (wanted + 1) % digits_model.NUM_CLASSES
    null = {"class_labels": torch.full_like(wanted, digits_model.NULL_LABEL)}

    def loss(x0: Tensor) -> Tensor:
        if task == "class":
            return F.cross_entropy(classifier(x0.clamp(-1, 1)), wanted)
        return F.mse_loss(x0.clamp(-1, 1), image)

    sampler = partial(
        sdo_fast.ShortcutSampler, unet, digits_model.scheduler(), num_steps, guidance_scale=3.0 if guided else None
    )
    conditions = {"model_kwargs": {"class_labels": prompt}, "uncond_kwargs": null} if guided else {"model_kwargs": null}
    return Objective(sampler, latents, loss, 0.1 if guided else 0.05, conditions)


def latent_space(num_steps: int, guided: bool, device: str, seed: int) -> Objective:
    """An image to match behind a decoder: cross-attention UNet and autoencoder of random weights, v-prediction."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    for model in (unet, vae):
        model.to(device).eval().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    generator = torch.Generator().manual_seed(seed)
    latents, other = torch.randn(2, BATCH, 4, 8, 8, generator=generator).to(device)
    prompt, null = torch.randn(2, BATCH, 4, 16, generator=generator).to(device)
    sampler = partial(sdo_fast.ShortcutSampler, unet, scheduler, num_steps, guidance_scale=3.0 if guided else None)
    conditions: dict[str, Any] = {"model_kwargs": {"encoder_hidden_states": prompt}}
    if guided:
        conditions["uncond_kwargs"] = {"encoder_hidden_states": null}

    def decode(x0: Tensor) -> Tensor:
        return vae.decode(x0).sample

    with torch.no_grad():
        image, first = (decode(sampler()(z, **conditions)) for z in (other, latents))
    scale = F.mse_loss(first, image).item()
    return Objective(sampler, latents, lambda x0: F.mse_loss(decode(x0), image) / scale, 0.1, conditions)


def optimise(objective: Objective, thresholds: tuple[float, ...], updates: int, variant: str) -> Optimisation:
    """Run one variant. An estimate below a threshold asks for an exact pass, which alone decides."""
    cache = sdo_fast.TrajectoryCache(**OURS[variant]) if variant in OURS else None
    sampler = objective.sampler(path="identity", fused=True, reuse=cache)
    clock = time.process_time if objective.latents.device.type == "cpu" else time.perf_counter
    unmet, gaps, seconds, began = list(thresholds), [], [], clock()

    def confirm(record: Any, latents: Tensor, image: Tensor) -> None:
        seconds.append(clock() - began)
        if not record.exact and unmet and record.loss <= unmet[0] and cache is not None:
            cache.require_exact()
        if record.exact:
            unmet[:] = [threshold for threshold in unmet if record.loss > threshold]
            gaps.append(0.0 if cache is None else cache.gap or 0.0)

    coarse = max(1, len(sampler.timesteps) // 4) if variant == "coarse to fine" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the reused trajectory was off")  # the record tells the largest gap
        history = sdo_fast.optimize_latents(
            sampler,
            objective.latents,
            objective.loss,
            updates,
            objective.lr,
            callback=confirm,
            progress=False,
            coarse_steps=coarse,
            constraint="norm",
            **objective.arguments,
        ).history
    calls = list(accumulate(record.model_calls for record in history))

    def price(spent: list[Any], threshold: float) -> float:
        return next((s for s, r in zip(spent, history, strict=True) if r.exact and r.loss <= threshold), math.inf)

    return Optimisation(
        [price(calls, threshold) for threshold in thresholds],
        [price(seconds, threshold) for threshold in thresholds],
        history[-1].loss,
        calls[-1],
        max(gaps) if cache is not None else None,
    )


def ratio(base: list[float], ours: list[float], total: float) -> float:
    """How many times cheaper the strict threshold is; 0 where it was missed by us alone, 1 where by both."""
    if math.isinf(ours[-1]):
        return 1.0 if math.isinf(base[-1]) else 0.0
    return min(base[-1], total) / ours[-1]


def compare(
    make: Callable[[int], Objective], task: str, seeds: int, updates: int, summaries: dict[str, Summary]
) -> Work:
    runs: dict[str, list[Optimisation]] = {name: [] for name in (BASELINE, "coarse to fine", *OURS)}
    for seed in range(seeds):
        objective = make(seed)
        for name, of_variant in runs.items():
            of_variant.append(optimise(objective, THRESHOLDS[task], updates, name))
    variants = {}
    for name, of_variant in runs.items():
        pairs = list(zip(runs[BASELINE], of_variant, strict=True))
        fewer = statistics.median(ratio(b.calls, o.calls, b.total_calls) for b, o in pairs)
        worse = statistics.median(o.final_loss / b.final_loss for b, o in pairs)
        metrics: dict[str, Any] = {
            "ratio": statistics.median(ratio(b.seconds, o.seconds, math.inf) for b, o in pairs),
            "times_fewer_calls": fewer,
        }
        for k, level in enumerate(("loose", "strict")):
            for what in ("calls", "seconds"):
                prices = [getattr(run, what)[k] for run in of_variant]
                if math.isfinite(statistics.median(prices)):
                    metrics[f"{what}_to_{level}"] = statistics.median(prices)
            missed = sum(map(math.isinf, prices))
            if missed:
                metrics[f"missed_{level}"] = missed
        metrics |= {
            "final_loss": statistics.median(run.final_loss for run in of_variant),
            "final_loss_over_baseline": worse,
            "total_calls": statistics.median(run.total_calls for run in of_variant),
        }
        gaps = [run.gap for run in of_variant if run.gap is not None]
        if gaps:
            metrics["largest_gap"] = max(gaps)
        summary = summaries.setdefault(name, Summary())
        summary.calls.append(fewer)
        summary.loss.append(worse)
        variants[name] = Variant(None, name in OURS, metrics=metrics)
    return Work(variants, timed=False)


def summarise(summaries: Mapping[str, Summary], targets: bool) -> Work:
    variants = {}
    for name, summary in summaries.items():
        metrics = {
            "settings": len(summary.calls),
            "times_fewer_calls": statistics.median(summary.calls),
            "least": min(summary.calls),
            "most": max(summary.calls),
            "final_loss_over_baseline": statistics.median(summary.loss),
        }
        if targets and name == DEFAULT:
            metrics |= {
                "over_no reuse (calls)": metrics["times_fewer_calls"],
                "target_over_no reuse (calls)": FEWER_CALLS,
                "over_no reuse (final loss)": 1 / metrics["final_loss_over_baseline"],
                "target_over_no reuse (final loss)": 1 / FINAL_LOSS,
            }
        variants[name] = Variant(None, name in OURS, metrics=metrics)
    return Work(variants, timed=False)


def cases(options: Options) -> list[Case]:
    counts, seeds, updates = ((4,), 1, 3) if options.quick else ((20, 50), 3, 30)
    summaries: dict[str, dict[str, Summary]] = {"digits": {}, "latent space": {}}

    def case(model: str, task: str, n: int, guided: bool) -> Case:
        device = options.device
        make = (
            partial(digits, task, n, guided, device) if model == "digits" else partial(latent_space, n, guided, device)
        )
        name = f"{model}, {task}, {n} steps{', guided' if guided else ''}"
        return Case(name, partial(compare, make, task, seeds, updates, summaries[model]))

    result = []
    for model, tasks in (("digits", ("class", "pixel")), ("latent space", ("decoded pixel",))):
        settings = [(task, n, guided) for n in counts for task in tasks for guided in (False, True)]
        result += [case(model, *setting) for setting in settings]
        result.append(Case(f"{model}, median over settings", partial(summarise, summaries[model], not options.quick)))
    return result
