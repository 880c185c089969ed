"""Guide a sampler to a class, and compare three gradients: of one step, of no step, and of every step.

    python examples/sdo_guidance.py
    python examples/sdo_guidance.py --model PIPELINE --critic CLASSIFIER --prompt "a photo of an animal" --target 207

"shortcut" is the gradient of the path --path, "identity" takes no model backward at all, "full" backpropagates
through every step (its memory grows with their number). The curves show the loss over the steps and over the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from common import (
    Film,
    add_model_options,
    load_studio,
    optimise,
    parse,
    save_picture,
    sdo_parser,
    show_curves,
    show_film,
)
from digits_model import NULL_LABEL
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from sdo_fast.pipelines import PipelineSampler
from sdo_fast.reference import full_backprop


class FullBackprop:
    """The same sampling with the graph of every step."""

    def __init__(self, sampler: PipelineSampler) -> None:
        self.sampler = sampler
        self.model_calls = 0

    def __call__(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        cond, uncond = self.sampler.conditions
        steps, scale = len(self.sampler.timesteps), self.sampler.guidance_scale
        self.model_calls += steps * (1 if scale is None else 2)
        return full_backprop(
            self.sampler.model,
            self.sampler.solver.scheduler,
            latents,
            steps,
            guidance_scale=scale,
            model_kwargs=cond,
            uncond_kwargs=uncond,
            generator=generator,
        )


METHODS: dict[str, Callable[[PipelineSampler], Any]] = {
    "shortcut": lambda sampler: sampler,
    "identity": lambda sampler: sampler.with_options(path="identity"),
    "full": FullBackprop,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_guidance", __doc__, steps=40, sampler_steps=20, lr=0.05)
    add_model_options(parser, prompts=(str(NULL_LABEL),) * 3, guidance=None, critic="that knows the class")
    parser.add_argument("--target", type=int, default=3, help="class to reach (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    run(parse(parser, argv, steps=4, sampler_steps=5))
    return 0


def run(args: argparse.Namespace) -> None:
    studio = load_studio(args)
    labels = torch.full((len(studio.latents),), args.target, device=studio.latents.device)

    def loss(images: Tensor) -> Tensor:
        return functional.cross_entropy(studio.critic(images), labels, reduction="sum")

    films: dict[str, Film] = {}
    for method in args.methods:
        sampler = METHODS[method](studio.sampler)
        films[method] = optimise(sampler, studio.latents, loss, args, method, decode=studio.decode)

    @torch.no_grad()
    def caption(images: Tensor, row: int) -> str:
        return f"p({args.target}) = {studio.critic(images.to(labels.device)).softmax(1)[row, args.target].item():.3f}"

    rows = len(studio.latents)
    figure = Figure(figsize=(13, (1.3 * rows + 0.4) * len(films)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    for part, (method, film) in zip(left.subfigures(len(films), 1, squeeze=False)[:, 0], films.items(), strict=True):
        show_film(part, film, caption=caption)
        part.suptitle(method, x=0.02, ha="left", weight="bold")
    over_steps, over_time = right.subplots(2, 1)
    curves = {method: [loss / rows for loss in film.losses] for method, film in films.items()}
    show_curves(over_steps, curves, "-log p(class), mean")
    show_curves(over_time, curves, "-log p(class), mean", x={m: list(accumulate(f.seconds)) for m, f in films.items()})
    over_time.set_xlabel("seconds")
    for axes in (over_steps, over_time):
        axes.set_yscale("log")
    save_picture(figure, args.out)


if __name__ == "__main__":
    sys.exit(main())
