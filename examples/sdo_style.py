"""Give images the style of a reference: Gram matrices of a classifier's features, through a diffusion sampler.

    python examples/sdo_style.py
    python examples/sdo_style.py --model PIPELINE --critic VISION_MODEL --style PICTURE --prompt "a cat" "a lighthouse"

The prompt decides what the images show, the optimised latents how. On the digits model the style is that of one
held-out digit, by default one with bolder strokes than nine tenths of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import (
    Studio,
    add_model_options,
    load_picture,
    load_studio,
    optimise,
    parse,
    save_picture,
    sdo_parser,
    show_curves,
    show_film,
)
from digits_model import digits, stroke_thickness
from matplotlib.figure import Figure
from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """(B, C, ...) to (B, C, C): inner products of the channels, averaged over positions."""
    flat = features.flatten(2)
    return flat @ flat.mT / flat.shape[-1]


def style_image(path: Path | None, studio: Studio) -> Tensor:
    """The reference, (1, C, H, W)."""
    if path is None:
        images, _ = digits("test")
        bold = stroke_thickness(images).argsort()[int(0.9 * len(images))]
        return images[bold][None].to(studio.latents.device)
    return load_picture(path, studio)


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_style", __doc__, steps=40, sampler_steps=20, lr=0.05)
    add_model_options(parser, prompts=("0", "3", "4", "9"), guidance=3.0, critic="whose hidden states give the style")
    parser.add_argument("--style", type=Path, help="picture with the style (a bold digit)")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="indices of the hidden states compared (all; the digits model: 0)"
    )
    args = parse(parser, argv, steps=4, sampler_steps=5)
    if args.model and not args.style:
        parser.error("--model needs --style")
    run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    studio = load_studio(args)
    reference = style_image(args.style, studio)
    layers = args.layers or ([0] if studio.digits else None)

    def grams(images: Tensor) -> list[Tensor]:
        features = studio.critic.features(images)
        return [gram(features[layer]) for layer in layers or range(len(features))]

    with torch.no_grad():
        wanted = grams(reference)

    def distances(images: Tensor) -> Tensor:
        """Squared distance of the Gram matrices, relative to the reference's, averaged over layers: (B,)."""
        pairs = zip(grams(images), wanted, strict=True)
        return torch.stack([(have - want).square().sum((1, 2)) / want.square().sum() for have, want in pairs]).mean(0)

    @torch.no_grad()
    def caption(images: Tensor, row: int) -> str:
        return f"distance {distances(images.to(reference.device))[row]:.4f}"

    def loss(images: Tensor) -> Tensor:
        return distances(images).sum()

    film = optimise(studio.sampler, studio.latents, loss, args, "style", decode=studio.decode)
    for row, prompt in enumerate(args.prompt):
        print(f"  {prompt!r}: {caption(film.images[0], row)} -> {caption(film.images[-1], row)}")
    if studio.digits:
        before, after = (stroke_thickness(film.images[i]).mean() for i in (0, -1))
        goal = stroke_thickness(reference)[0]
        print(f"  mean stroke thickness: {before:.2f} -> {after:.2f} pixels, reference {goal:.2f}")

    figure = Figure(figsize=(12, 1.3 * len(studio.latents) + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    targets = reference.expand(len(studio.latents), *reference.shape[1:])
    show_film(left, film, caption=caption, targets=targets, target_title="style")
    mean = [value / len(studio.latents) for value in film.losses]
    show_curves(right.subplots(), {"style": mean}, "relative Gram distance, mean")
    save_picture(figure, args.out)


if __name__ == "__main__":
    sys.exit(main())
