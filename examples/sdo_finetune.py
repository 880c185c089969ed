"""Fine-tune a diffusion model to a reward by `sdo_fast.RewardTrainer`: all parameters, and LoRA.

    python examples/sdo_finetune.py
    python examples/sdo_finetune.py --steps 100 --lora-lr 1e-3 --methods lora [--kl-weight 30]
    python examples/sdo_finetune.py --model PIPELINE --critic CLASSIFIER --prompt "a garden" --data PICTURES

The reward is a score of the images: on the digits the thickness of the strokes, as a linear head on the classifier's
features estimates it. Any reward is over-optimised in the end (the second line shows it), so beside it stand the
diversity of the images (mean RMS distance between those of one prompt) and their mean RMS distance to the nearest
picture of the data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HubClassifier, add_model_options, distance_to_data, parse, save_picture, show, show_curves
from diffusers import DiffusionPipeline
from digits_model import (
    IMAGE_SHAPE,
    NULL_LABEL,
    ThicknessScore,
    digits,
    load_digits_classifier,
    load_digits_unet,
    scheduler,
    stroke_thickness,
)
from matplotlib.figure import Figure
from PIL import Image
from runs import OUTPUT
from torch import Tensor

from sdo_fast import PipelineSource, RewardConfig, RewardTrainer, SamplerSource, ShortcutSampler

METHODS = ("all", "lora")
IMAGES_PER_PROMPT = 4
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")


@dataclass
class Report:
    """What is measured on the same noise before, during and after; images are in [0, 1]."""

    data: Tensor | None = None
    """Pictures to measure the distance to, in [0, 1]."""
    iterations: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    diversity: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    def add(self, record: dict[str, Any], images: Tensor) -> None:
        """An evaluation of the trainer."""
        self.iterations.append(record["step"])
        self.images.append(images.cpu())
        self.reward.append(record["evaluation/reward"])
        self.diversity.append(record["evaluation/diversity"])
        if self.data is not None:
            self.distance.append(distance_to_data(images, self.data).mean().item())

    def line(self, index: int) -> str:
        distance = f", distance to the data {self.distance[index]:.3f}" if self.distance else ""
        return f"reward {self.reward[index]:.3f}, diversity {self.diversity[index]:.3f}{distance}"


def digits_source(args: argparse.Namespace) -> SamplerSource:
    """The digits model; its prompts are class labels."""
    unet = load_digits_unet().to(args.device)

    def conditions(prompts: Sequence[str]) -> Any:
        labels = torch.tensor([int(prompt) for prompt in prompts], device=args.device)
        cond, uncond = {"class_labels": labels}, {"class_labels": torch.full_like(labels, NULL_LABEL)}
        return cond if args.guidance is None else (cond, uncond)

    sampler = ShortcutSampler(unet, scheduler(), args.sampler_steps, path=args.path, guidance_scale=args.guidance)
    return SamplerSource(sampler, conditions, IMAGE_SHAPE, decode=lambda x0: (x0 / 2 + 0.5).clamp(0, 1))


def pipeline_source(args: argparse.Namespace) -> PipelineSource:
    pipe = DiffusionPipeline.from_pretrained(args.model, local_files_only=True).to(args.device)
    guidance = {} if args.guidance is None else {"guidance_scale": args.guidance}
    return PipelineSource(pipe, num_inference_steps=args.sampler_steps, **guidance)


def load_critic(args: argparse.Namespace) -> tuple[Callable[[Tensor], Tensor], str]:
    """Images in [-1, 1] to the score to raise (B,), and its name."""
    if args.model is None:
        thickness = ThicknessScore(load_digits_classifier()).to(args.device)
        return thickness, f"estimated thickness (R² {thickness.r2:.2f})"
    critic = HubClassifier(args.critic).eval().requires_grad_(False).to(args.device)
    return lambda images: critic(images)[:, args.score_index], f"critic's output {args.score_index}"


def load_data(args: argparse.Namespace, size: tuple[int, int]) -> Tensor | None:
    """Pictures to compare with, in [0, 1]: the training digits, or those of a folder in the images' size."""
    if args.data is None:
        return (digits("train")[0] + 1) / 2 if args.model is None else None
    files = sorted(file for file in args.data.iterdir() if file.suffix.lower() in Image.registered_extensions())
    pictures = [np.array(Image.open(file).convert("RGB").resize(size[::-1])) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def finetune(method: str, args: argparse.Namespace) -> tuple[RewardTrainer, Report, str]:
    """Raise the mean reward of samples of fresh noise; Ctrl-C ends it early with what was done."""
    critic, name = load_critic(args)
    trainer = RewardTrainer(
        digits_source(args) if args.model is None else pipeline_source(args),
        lambda images, prompts: critic(2 * images - 1),
        args.prompt,
        RewardConfig(
            steps=args.steps,
            batch_size=IMAGES_PER_PROMPT * len(args.prompt),
            images_per_prompt=IMAGES_PER_PROMPT,
            learning_rate=args.lora_lr if method == "lora" else args.lr,
            path=args.path,
            train=method,
            kl_weight=args.kl_weight,
            lora_rank=args.lora_rank,
            lora_targets=LORA_LAYERS,
            evaluate_every=max(1, args.steps // 10),
            evaluation_prompts=len(args.prompt),
            evaluation_images=IMAGES_PER_PROMPT,
            output=args.save and args.save / method,
            seed=args.seed,
        ),
    )
    report = Report(load_data(args, trainer.evaluate()[1].shape[-2:]))
    trainer.train(on_evaluation=report.add)
    if report.iterations[-1] < trainer.progress.step:
        report.add(*trainer.evaluate())
    return trainer, report, name


def path(text: str) -> str | int:
    """The sampler's path from the command line: a name or an index."""
    return int(text) if text.isdigit() else text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="updates (%(default)s)")
    parser.add_argument("--sampler-steps", type=int, default=10, help="sampling steps (%(default)s)")
    parser.add_argument(
        "--path", type=path, default="first", help="which step keeps its gradient, of sdo_fast.paths (%(default)s)"
    )
    parser.add_argument("--lr", type=float, default=5e-6, help="learning rate of all parameters (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and of LoRA's first weights (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT / "sdo_finetune.png", help="picture to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds' run, to see that it works")
    add_model_options(parser, prompts=("0", "3", "4", "7"), guidance=None, critic="one of whose outputs is the reward")
    parser.add_argument("--score-index", type=int, default=0, help="output of the critic to raise (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(both)")
    parser.add_argument("--lora-rank", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--lora-lr", type=float, default=2e-4, help="learning rate of LoRA (%(default)s)")
    parser.add_argument(
        "--kl-weight", type=float, default=0.0, help="of the distance to the model as it was (%(default)s)"
    )
    parser.add_argument("--data", type=Path, help="folder of pictures to measure the distance to (the training digits)")
    parser.add_argument("--save", type=Path, help="folder for weights and checkpoints, one in it for each method")
    run(parse(parser, argv, steps=3, sampler_steps=5, prompt=["0", "3"]))
    return 0


def run(args: argparse.Namespace) -> None:
    reports: dict[str, Report] = {}
    for method in args.methods:
        trainer, report, reward_name = finetune(method, args)
        reports[method] = report
        count = sum(p.numel() for p in trainer.parameters)
        print(f"\n{method}: {count} parameters, {report.iterations[-1]} steps")
        print(f"  before: {report.line(0)}\n  after:  {report.line(-1)}")
        if args.model is None:
            before, after = (stroke_thickness(2 * report.images[i] - 1).mean() for i in (0, -1))
            print(f"  measured stroke thickness: {before:.2f} -> {after:.2f} pixels")
    draw(reports, reward_name, args.out)


def draw(reports: dict[str, Report], reward_name: str, out: Path) -> None:
    """Samples before and after, in columns by prompt, and the three measures."""
    first = next(iter(reports.values()))
    batches = {"before": first.images[0], **{f"after, {name}": r.images[-1] for name, r in reports.items()}}
    columns = min(len(first.images[0]) // IMAGES_PER_PROMPT, 10)
    figure = Figure(figsize=(13, 2.3 * len(batches) + 3.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.3 * len(batches), 3.2))
    for part, (title, images) in zip(top.subfigures(len(batches), 1), batches.items(), strict=True):
        part.suptitle(title, x=0.02, ha="left", weight="bold")
        grid = part.subplots(2, 2 * columns, squeeze=False)
        for column in range(columns):
            for k, axes in enumerate(grid[:, 2 * column : 2 * column + 2].flat):
                show(axes, 2 * images[column * IMAGES_PER_PROMPT + k] - 1)
    for axes, measure, label in zip(
        bottom.subplots(1, 3),
        ("reward", "diversity", "distance"),
        (f"reward: {reward_name}", "diversity within a prompt", "distance to the data"),
        strict=True,
    ):
        curves = {name: getattr(r, measure) for name, r in reports.items()}
        if any(curves.values()):
            show_curves(axes, curves, label, x={name: r.iterations for name, r in reports.items()})
        else:
            axes.set_axis_off()
        if measure != "reward":
            axes.set_ylim(bottom=0)

    save_picture(figure, out)


if __name__ == "__main__":
    sys.exit(main())
