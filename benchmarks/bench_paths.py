"""Gradient paths: the reward that each recipe of `sdo_fast.paths` buys, and what it pays in diversity.

Samples of the digits model are tuned to thicker strokes by all its parameters, by LoRA or by their latents. Every
recipe may spend as many forward units: evaluations of the model a latent, recomputed ones among them. Its learning rate
is the best of four on another seed, by the hypervolume of its run; figures are medians over seeds. Seconds on a CPU
are those of the process, of updates alone. Peak bytes are of one update, without the model and Adam's moments.

Any reward is over-optimised in the end. Beside it stand the diversity (mean RMS distance between images of one prompt),
the distance to the data (mean RMS distance to the nearest training digit), the classifier's accuracy on the prompts,
and the hypervolume: the area that a run dominates in the plane of the reward gained, as a share of the start's, and of
what is kept, the lesser of the shares of the start's diversity and accuracy, at most 1.

The finished runs are kept in OUT/paths/runs.csv, from which the same command goes on where it stopped.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import sdo_fast
from examples import digits_model
from sdo_fast import paths

from . import records
from .harness import Case, Options, Variant, Work, peak_bytes

PROMPTS = (0, 3, 4, 7)
RECIPES = {
    "full": paths.full(),
    "sdo first": paths.sdo("first"),
    "sdo random": paths.sdo("random"),
    "identity": paths.identity(),
    "refl": paths.refl(),
    "draft 1 (sdo last)": paths.draft(1),
    "draft 4": paths.draft(4),
    "draft_lv": paths.draft_lv(),
    "drtune": paths.drtune(),
    "leapalign": paths.leapalign(),
    "flowbp_sparse": paths.flowbp_sparse(),
    "flowbp_bridge": paths.flowbp_bridge(),
    "flowbp_lagrange": paths.flowbp_lagrange(),
}
SHARES = (0.5, 1.0)
"""Of the budget, after which a run is measured."""
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


@dataclass(frozen=True)
class Setting:
    """What is tuned, by which learning rates of Adam, and the images a prompt of an update and of a measurement."""

    name: str
    rates: tuple[float, ...]
    trained: int = 1
    measured: int = 4


SETTINGS = (
    Setting("all parameters", (1e-5, 2e-5, 4e-5, 8e-5)),
    Setting("LoRA", (3e-4, 6e-4, 1.2e-3, 2.4e-3)),
    Setting("latents", (0.03, 0.06, 0.12, 0.24), 2, 2),
)


@dataclass(frozen=True)
class Scale:
    """How much is spent."""

    budget: int = 240
    """Forward units of a run."""
    num_steps: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    recipes: tuple[str, ...] = tuple(RECIPES)


QUICK = Scale(10, 5, (0,), recipes=("full", "sdo first", "refl"))


@dataclass(frozen=True)
class Point:
    """A run so far: what it spent, and the measures of its images."""

    units: int
    updates: int
    seconds: float
    reward: float
    diversity: float
    distance: float
    accuracy: float


@functools.cache
def thickness(device: str) -> digits_model.ThicknessScore:
    return digits_model.ThicknessScore(digits_model.load_digits_classifier()).to(device)


class Tuning:
    """Samples and what tunes them: fresh noise each update for parameters, the same latents otherwise."""

    def __init__(self, setting: Setting, recipe: str, seed: int, num_steps: int, device: str, **options: Any) -> None:
        self.setting, self.device = setting, device
        unet = digits_model.load_digits_unet().to(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.latents = self.noise(setting.measured)
        if setting.name == "latents":
            self.latents.requires_grad_()
        elif setting.name == "LoRA":
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=LORA_LAYERS), unet)
        else:
            unet.requires_grad_()
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.tuned: Sequence[Tensor] = parameters or [self.latents]
        scheduler = digits_model.scheduler()
        self.sampler = sdo_fast.ShortcutSampler(unet, scheduler, num_steps, path=RECIPES[recipe], **options)
        self.norms = self.latents.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def noise(self, images: int) -> Tensor:
        return torch.randn(images * len(PROMPTS), *digits_model.IMAGE_SHAPE, generator=self.generator).to(self.device)

    def labels(self, images: int) -> Tensor:
        return torch.tensor(PROMPTS, device=self.device).repeat_interleave(images)

    def images(self, latents: Tensor) -> Tensor:
        if latents is self.latents:
            latents = latents * (self.norms / latents.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        labels = self.labels(len(latents) // len(PROMPTS))
        return self.sampler(latents, {"class_labels": labels}, generator=self.generator).clamp(-1, 1)

    def gradient(self) -> None:
        latents = self.latents if self.latents.requires_grad else self.noise(self.setting.trained)
        (-thickness(self.device)(self.images(latents)).mean()).backward()

    @torch.no_grad()
    def point(self, units: int, updates: int, seconds: float) -> Point:
        images, score = self.images(self.latents), thickness(self.device)
        flat, each, rms = images.flatten(1), self.setting.measured, images[0].numel() ** -0.5
        groups = flat.unflatten(0, (-1, each))
        right = score.classifier(images).argmax(1) == self.labels(each)
        data = digits_model.digits("train")[0].to(flat).flatten(1)
        return Point(
            units,
            updates,
            seconds,
            score(images).mean().item(),
            torch.cdist(groups, groups).sum().item() / (len(groups) * each * (each - 1)) * rms,
            torch.cdist(flat, data).amin(1).mean().item() * rms,
            right.float().mean().item(),
        )


@functools.cache
def start(setting: Setting, seed: int, num_steps: int, device: str) -> Point:
    """That of every recipe."""
    return Tuning(setting, "full", seed, num_steps, device).point(0, 0, 0.0)


def run(setting: Setting, recipe: str, rate: float, seed: int, scale: Scale, device: str) -> list[Point]:
    """The start and the points of one run."""
    tuning = Tuning(setting, recipe, seed, scale.num_steps, device)
    # The authors' betas for latents (arXiv 2505.07477).
    adam = torch.optim.Adam(tuning.tuned, rate, betas=(0.9, 0.9 if setting.name == "latents" else 0.999))
    clock = time.process_time if device == "cpu" else time.perf_counter
    units, updates, last, seconds = 0, 0, 0, 0.0
    points = [start(setting, seed, scale.num_steps, device)]
    for share in SHARES:
        while units + last <= share * scale.budget:
            began, calls = clock(), tuning.sampler.model_calls
            adam.zero_grad()
            tuning.gradient()
            if setting.name != "latents":
                nn.utils.clip_grad_norm_(tuning.tuned, 1.0)
            adam.step()
            last = tuning.sampler.model_calls - calls
            units, updates, seconds = units + last, updates + 1, seconds + clock() - began
        points.append(tuning.point(units, updates, seconds))
    return points


def hypervolume(points: Sequence[Point]) -> float:
    """The area that a run dominates in the plane of gain and what is kept; the first point is its start."""
    first, area, reached = points[0], 0.0, points[0].reward

    def kept(point: Point) -> float:
        return min(1.0, point.diversity / first.diversity, point.accuracy / first.accuracy)

    for point in sorted(points, key=kept, reverse=True):
        area += max(0.0, point.reward - reached) / first.reward * kept(point)
        reached = max(reached, point.reward)
    return area


class Kept:
    """The finished runs, on disk as they come."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "paths" / "runs.csv"
        self.rows: list[Mapping[str, Any]] = [] if self.path is None else records.read(self.path)

    def points(self, key: Mapping[str, Any], make: Callable[[], list[Point]]) -> list[Point]:
        """Those of a run, made unless they are kept."""
        rows = [row for row in self.rows if row.items() >= key.items()]
        if not rows:
            rows = [{**key, **asdict(point)} for point in make()]
            self.rows += rows
            if self.path is not None:
                records.save(self.path.parent, self.path.stem, self.rows)
        return [Point(**{f.name: r[f.name] for f in fields(Point)}) for r in rows]

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def median(points: Iterable[Point]) -> Point:
    points = list(points)
    return Point(*(statistics.median(getattr(point, f.name) for point in points) for f in fields(Point)))


def peaks(setting: Setting, recipe: str, scale: Scale, device: str) -> dict[str, int]:
    """Of one update, as the runs make it and without recomputation."""
    result = {}
    for name, checkpoint in (("peak_bytes", True), ("peak_bytes_without_checkpoint", False)):
        tuning = Tuning(setting, recipe, scale.tuning_seed, scale.num_steps, device, checkpoint=checkpoint)
        result[name] = peak_bytes(tuning.gradient)[0]
    return result


def compare(setting: Setting, scale: Scale, device: str, kept: Kept, last: bool) -> Work:
    # Without a model's gradient parameters have none.
    recipes = [r for r in scale.recipes if r != "identity" or setting.name == "latents"]
    variants: dict[str, Variant] = {}
    total, begun = len(recipes) * (len(setting.rates) + len(scale.seeds)), count(1)

    def points(recipe: str, rate: float, seed: int) -> list[Point]:
        print(f"  run {next(begun)}/{total}: {recipe}, learning rate {rate:g}, seed {seed}", flush=True)
        key = {"setting": setting.name, "recipe": recipe, "rate": rate, "seed": seed, "budget": scale.budget}
        key |= {"num_steps": scale.num_steps, "device": device}
        return kept.points(key, partial(run, setting, recipe, rate, seed, scale, device))

    best, runs = {}, dict[str, list[list[Point]]]()
    for recipe in recipes:
        volumes = {rate: hypervolume(points(recipe, rate, scale.tuning_seed)) for rate in setting.rates}
        best[recipe] = max(volumes, key=volumes.__getitem__)
    for seed in scale.seeds:
        for recipe in recipes:
            runs.setdefault(recipe, []).append(points(recipe, best[recipe], seed))
    variants["start"] = Variant(None, metrics=asdict(median(of_seed[0] for of_seed in runs[recipes[0]])))
    for recipe, of_recipe in runs.items():
        half, end = (median(of_seed[i] for of_seed in of_recipe) for i in (1, 2))
        rewards, diversities = ([getattr(p[-1], name) for p in of_recipe] for name in ("reward", "diversity"))
        metrics = {"learning_rate": best[recipe], **asdict(end), **peaks(setting, recipe, scale, device)}
        metrics |= {f"{name}_at_half": getattr(half, name) for name in ("reward", "diversity", "accuracy")}
        metrics |= {"reward_least": min(rewards), "reward_most": max(rewards)}
        metrics |= {"diversity_least": min(diversities), "diversity_most": max(diversities)}
        metrics |= {"hypervolume": statistics.median(map(hypervolume, of_recipe)), "seeds": len(scale.seeds)}
        variants[recipe] = Variant(None, recipe != "full", metrics=metrics)
    if last:
        kept.remove()
    return Work(variants, timed=False)


def cases(options: Options) -> list[Case]:
    scale = QUICK if options.quick else Scale()
    kept = Kept(None if options.quick else options.out)
    return [
        Case(setting.name, partial(compare, setting, scale, options.device, kept, setting is SETTINGS[-1]))
        for setting in SETTINGS
    ]
