"""Optimise the latents of a diffusion sampler, for a class and for a target image, with gradient shortcuts.

    python examples/sdo_digits.py

The model is the small digits UNet of this folder, sampled without any label: what the images show is decided by the
optimised latents alone. Losses go to the terminal, images before, during and after to one picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from common import distance_to_data, optimise, parse, save_picture, sdo_parser, show_curves, show_film
from digits_model import IMAGE_SHAPE, NULL_LABEL, digits, load_digits_classifier, load_digits_unet, scheduler
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torch.nn import functional

from sdo_fast import ShortcutSampler

BATCH = 4


class ClassTask:
    """Make the classifier see a given class: -log p(class | image)."""

    title = "optimised for a class"
    loss_name = "-log p(class), mean"

    def __init__(self, generator: torch.Generator) -> None:
        self.classifier = load_digits_classifier()
        self.labels = torch.randperm(10, generator=generator)[:BATCH]
        self.targets = None

    def loss(self, images: Tensor) -> Tensor:
        return functional.cross_entropy(self.classifier(images), self.labels, reduction="sum")

    def caption(self, images: Tensor, row: int) -> str:
        with torch.no_grad():
            probability = self.classifier(images).softmax(1)[row, self.labels[row]].item()
        return f"p({self.labels[row]}) = {probability:.3f}"


class ImageTask:
    """Reproduce a held-out digit: the mean squared error of its pixels."""

    title = "optimised for a target image"
    loss_name = "pixel MSE, mean"

    def __init__(self, generator: torch.Generator) -> None:
        images, _ = digits("test")
        self.targets = images[torch.randperm(len(images), generator=generator)[:BATCH]]

    def loss(self, images: Tensor) -> Tensor:
        return functional.mse_loss(images, self.targets, reduction="none").mean((1, 2, 3)).sum()

    def caption(self, images: Tensor, row: int) -> str:
        return f"MSE = {functional.mse_loss(images[row], self.targets[row]):.4f}"


TASKS: dict[str, Callable[[torch.Generator], ClassTask | ImageTask]] = {"class": ClassTask, "image": ImageTask}


def run(name: str, args: argparse.Namespace, figure: SubFigure) -> None:
    """Optimise one task and draw it."""
    generator = torch.Generator().manual_seed(args.seed)
    task = TASKS[name](generator)
    latents = torch.randn(BATCH, *IMAGE_SHAPE, generator=generator)
    sampler = ShortcutSampler(load_digits_unet(), scheduler(), args.sampler_steps, path=args.path)
    film = optimise(
        sampler,
        latents,
        task.loss,
        args,
        task.title,
        decode=lambda x0: x0.clamp(-1, 1),
        model_kwargs={"class_labels": torch.full((BATCH,), NULL_LABEL)},
    )
    for row in range(BATCH):
        print(f"  latent {row}: {task.caption(film.images[0], row)} -> {task.caption(film.images[-1], row)}")
    before, after = (distance_to_data(film.images[i], digits("train")[0]).mean() for i in (0, -1))
    print(f"  mean distance to the nearest training digit: {before:.3f} -> {after:.3f}")

    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    show_film(left, film, caption=task.caption, targets=task.targets)
    figure.suptitle(task.title, x=0.02, ha="left", weight="bold")
    axes = right.subplots()
    show_curves(axes, {name: [loss / BATCH for loss in film.losses]}, task.loss_name)
    axes.set_yscale("log")


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_digits", __doc__, steps=60, sampler_steps=20, lr=0.05)
    parser.add_argument("--task", choices=[*TASKS, "both"], default="both", help="(%(default)s)")
    args = parse(parser, argv, steps=8, sampler_steps=5)

    names = list(TASKS) if args.task == "both" else [args.task]
    figure = Figure(figsize=(12, 5 * len(names)), layout="constrained")
    for name, part in zip(names, figure.subfigures(len(names), 1, squeeze=False)[:, 0], strict=True):
        run(name, args, part)
    save_picture(figure, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
