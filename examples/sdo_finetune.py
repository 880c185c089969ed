"""Fine-tune a diffusion model to a reward, with the gradient of one step of its sampler: all parameters, and LoRA.

    python examples/sdo_finetune.py
    python examples/sdo_finetune.py --model PIPELINE --critic CLASSIFIER --prompt "a garden" --data PICTURES

The reward is a score of the images: on the digits the thickness of the strokes, as a linear head on the classifier's
features estimates it. Any reward is over-optimised in the end, so beside it stand the diversity of the images (mean RMS
distance between those of one prompt) and their mean RMS distance to the nearest picture of the data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import (
    Studio,
    add_model_options,
    distance_to_data,
    load_studio,
    parse,
    save_picture,
    sdo_parser,
    show,
    show_curves,
    write_atomically,
)
from digits_model import digits, stroke_thickness
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

METHODS = ("all", "lora")
IMAGES_PER_PROMPT = 4
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


@dataclass
class Report:
    """What is measured on the same noise before, during and after."""

    iterations: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    diversity: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    def add(self, iteration: int, images: Tensor, rewards: Tensor, data: Tensor | None) -> None:
        self.iterations.append(iteration)
        self.images.append(images.cpu())
        self.reward.append(rewards.mean().item())
        rms = images[0].numel() ** -0.5
        groups = images.flatten(1).unflatten(0, (-1, IMAGES_PER_PROMPT))
        pairs = IMAGES_PER_PROMPT * (IMAGES_PER_PROMPT - 1)
        self.diversity.append((torch.cdist(groups, groups).sum((1, 2)) / pairs).mean().item() * rms)
        if data is not None:
            self.distance.append(distance_to_data(images, data).mean().item())

    def line(self, index: int) -> str:
        distance = f", distance to the data {self.distance[index]:.3f}" if self.distance else ""
        return f"reward {self.reward[index]:.3f}, diversity {self.diversity[index]:.3f}{distance}"


def trainable(model: nn.Module, method: str, rank: int) -> dict[str, nn.Parameter]:
    """The parameters that are tuned, by name; every other is frozen."""
    model.requires_grad_(False)
    if method == "all":
        model.requires_grad_()
    else:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS), model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_data(folder: Path | None, studio: Studio) -> Tensor | None:
    """Pictures to compare with: the training digits, or those of a folder in the images' size."""
    if folder is None:
        return digits("train")[0] if studio.digits else None
    with torch.no_grad():
        height, width = studio.decode(studio.latents[:1]).shape[-2:]
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in Image.registered_extensions())
    pictures = [np.array(Image.open(file).convert("RGB").resize((width, height))) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


def finetune(
    studio: Studio,
    parameters: Sequence[nn.Parameter],
    reward: Callable[[Tensor], Tensor],
    data: Tensor | None,
    args: argparse.Namespace,
    title: str,
) -> Report:
    """Raise the mean reward of samples of fresh noise; Ctrl-C ends it early with what was done."""
    report = Report()

    @torch.no_grad()
    def evaluate(iteration: int) -> None:
        images = studio.decode(studio.sampler(studio.latents))
        report.add(iteration, images, reward(images), data)

    adam = torch.optim.Adam(parameters, lr=args.lr)
    generator = torch.Generator().manual_seed(args.seed + 1)
    steps_generator = torch.Generator(studio.latents.device).manual_seed(args.seed)
    done = 0
    evaluate(done)
    try:
        for done in (bar := tqdm(range(1, args.steps + 1), desc=title)):
            latents = studio.sampler.prepare_latents(generator)
            loss = -reward(studio.decode(studio.sampler(latents, generator=steps_generator))).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            bar.set_postfix(reward=f"{-loss.item():.3f}")
            if done % max(1, args.steps // 10) == 0 or done == args.steps:
                evaluate(done)
    except KeyboardInterrupt:
        evaluate(done)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_finetune", __doc__, steps=20, sampler_steps=10, lr=5e-6, latents=False)
    add_model_options(parser, prompts=("0", "3", "4", "7"), guidance=None, critic="one of whose outputs is the reward")
    parser.add_argument("--score-index", type=int, default=0, help="output of the critic to raise (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(both)")
    parser.add_argument("--lora-rank", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--lora-lr", type=float, default=2e-4, help="learning rate of LoRA (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of pictures to measure the distance to (the training digits)")
    parser.add_argument("--save", type=Path, help="folder for the tuned parameters, one safetensors file per method")
    run(parse(parser, argv, steps=3, sampler_steps=5, prompt=["0", "3"]))
    return 0


def run(args: argparse.Namespace) -> None:
    reports: dict[str, Report] = {}
    for method in args.methods:
        studio = load_studio(args, images_per_prompt=IMAGES_PER_PROMPT)
        reward, reward_name = studio.score(args.score_index)
        torch.manual_seed(args.seed)  # LoRA's initial weights
        tuned = trainable(studio.sampler.network, method, args.lora_rank)
        options = argparse.Namespace(**{**vars(args), "lr": args.lora_lr if method == "lora" else args.lr})
        data = load_data(args.data, studio)
        report = reports[method] = finetune(studio, list(tuned.values()), reward, data, options, method)

        print(f"\n{method}: {sum(p.numel() for p in tuned.values())} parameters, {report.iterations[-1]} steps")
        print(f"  before: {report.line(0)}\n  after:  {report.line(-1)}")
        if studio.digits:
            before, after = (stroke_thickness(report.images[i]).mean() for i in (0, -1))
            print(f"  measured stroke thickness: {before:.2f} -> {after:.2f} pixels")
        if args.save:
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in tuned.items()}
            write_atomically(
                args.save / f"{method}.safetensors", lambda path, weights=weights: save_file(weights, path)
            )
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
                show(axes, images[column * IMAGES_PER_PROMPT + k])
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
