"""Raise a score of the images, as an aesthetic predictor gives one, by optimising the latents.

    python examples/sdo_score.py
    python examples/sdo_score.py --image DIGIT.png --prompt 3 --guidance none
    python examples/sdo_score.py --model PIPELINE --critic AESTHETIC_CLASSIFIER --score-index 0 --prompt "a garden"

With --image a picture is the beginning, not noise: inverted up to a late step of the sampler, whose input is optimised.
On the digits model the score is the thickness of the strokes, as a linear head on the classifier's features estimates
it. The thickness itself is measured too: what the estimate gains without it is over-optimisation.
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
from digits_model import stroke_thickness
from matplotlib.figure import Figure
from torch import Tensor, nn

from sdo_fast import invert


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_score", __doc__, steps=40, sampler_steps=20, lr=0.03)
    add_model_options(parser, prompts=("0", "3", "4", "7"), guidance=3.0, critic="one of whose outputs is the score")
    parser.add_argument("--score-index", type=int, default=0, help="output of the critic to raise (%(default)s)")
    parser.add_argument("--image", type=Path, help="picture to begin with, one for all prompts (noise)")
    parser.add_argument("--upto", type=int, help="step up to which it is inverted (after a fifth of the sampler's)")
    run(parse(parser, argv, steps=4, sampler_steps=5))
    return 0


def inverted(path: Path, studio: Studio) -> Tensor:
    """The latents from which the sampler gives the picture back."""
    sampler = studio.sampler
    with torch.no_grad():
        size = studio.decode(studio.latents).shape[-2:]
        picture = nn.functional.interpolate(load_picture(path, studio), size, mode="bicubic", antialias=True)
        x0 = sampler.encode(picture.clamp(-1, 1) / 2 + 0.5).expand_as(studio.latents)
        inversion = invert(sampler, x0, sampler.start, iterations=5)
    print(f"inversion up to step {sampler.start}: {inversion.error:.1%} away from the picture after the round trip")
    return inversion.latents


def run(args: argparse.Namespace) -> None:
    upto = args.sampler_steps // 5 if args.upto is None else args.upto
    studio = load_studio(args, start=upto if args.image else 0)
    if args.image:
        studio.latents = inverted(args.image, studio)
    score, name = studio.score(args.score_index)

    def loss(images: Tensor) -> Tensor:
        return -score(images).sum()

    @torch.no_grad()
    def caption(images: Tensor, row: int) -> str:
        text = f"score {score(images.to(studio.latents.device))[row].item():.2f}"
        return f"{text}\nmeasured {stroke_thickness(images)[row].item():.2f}" if studio.digits else text

    film = optimise(studio.sampler, studio.latents, loss, args, "score", decode=studio.decode)
    for row, prompt in enumerate(args.prompt):
        before, after = (caption(film.images[i], row).replace("\n", ", ") for i in (0, -1))
        print(f"  {prompt!r}: {before} -> {after}")

    figure = Figure(figsize=(13, 1.5 * len(studio.latents) + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    show_film(left, film, caption=caption)
    curves = {name: [-value / len(studio.latents) for value in film.losses]}
    if studio.digits:
        curves["measured thickness"] = [stroke_thickness(images).mean().item() for images in film.images]
    show_curves(right.subplots(), curves, "pixels, mean" if studio.digits else f"{name}, mean")
    save_picture(figure, args.out)


if __name__ == "__main__":
    sys.exit(main())
