"""Adversarial examples through a diffusion sampler: the image stays, the classifier's answer changes.

    python examples/sdo_adversarial.py
    python examples/sdo_adversarial.py --model PIPELINE --critic CLASSIFIER --prompt "a dog" --target 281

The latents are optimised until the critic sees the target class with a margin, while the pixels are held to the image
of the first latents. On the digits model a second classifier of another kind, a support vector machine on pixels, is
asked too; the attack knows nothing of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from common import add_model_options, load_studio, optimise, parse, save_picture, sdo_parser, show, show_curves
from digits_model import digits
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch import Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = sdo_parser("sdo_adversarial", __doc__, steps=40, sampler_steps=20, lr=0.05)
    add_model_options(parser, prompts=("0", "3", "4", "5", "8"), guidance=None, critic="to be fooled")
    parser.add_argument("--target", type=int, help="class to reach (the second best of each image)")
    parser.add_argument(
        "--hold", type=float, default=30.0, help="weight of the distance to the first image (%(default)s)"
    )
    parser.add_argument(
        "--margin", type=float, default=1.0, help="of the target's logit over the best other (%(default)s)"
    )
    run(parse(parser, argv, steps=4, sampler_steps=5))
    return 0


def run(args: argparse.Namespace) -> None:
    studio = load_studio(args)
    with torch.no_grad():
        first = studio.decode(studio.sampler(studio.latents))
        logits = studio.critic(first)
    predicted, second = logits.topk(2).indices.T
    target = second if args.target is None else torch.full_like(predicted, args.target)
    at_target = torch.nn.functional.one_hot(target, logits.shape[1]).bool()

    def shortfall(images: Tensor) -> Tensor:
        """How far the target's logit is from leading by the margin: (B,)."""
        logits = studio.critic(images)
        others = logits.masked_fill(at_target, -torch.inf).amax(1)
        return (others + args.margin - logits[at_target]).relu()

    def distance(images: Tensor) -> Tensor:
        return (images - first).square().mean((1, 2, 3))

    def loss(images: Tensor) -> Tensor:
        return (shortfall(images) + args.hold * distance(images)).sum()

    film = optimise(studio.sampler, studio.latents, loss, args, "adversarial", decode=studio.decode)
    before, after = film.images[0], film.images[-1]
    with torch.no_grad():
        change = distance(after.to(first.device)).sqrt()
        probabilities = [studio.critic(images.to(first.device)).softmax(1) for images in (before, after)]
    opinions = second_opinions(before, after) if studio.digits else [""] * len(after)
    captions = []
    for row in range(len(after)):
        answers = [f"{p[row].argmax().item()} ({p[row].max().item():.2f})" for p in probabilities]
        print(f"  {answers[0]} -> {answers[1]}, RMS change of {change[row]:.3f}{opinions[row]}")
        captions.append(answers)
    print(f"  fooled: {(probabilities[1].argmax(1) == target).float().mean().item():.0%}")

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1))
    grid = left.subplots(3, len(after), squeeze=False)
    for row, columns in enumerate(zip(before, after, (after - before) / 2, strict=True)):
        for axes, image, title, caption in zip(
            grid[:, row],
            columns,
            ("before", "after", "change"),
            (*captions[row], f"RMS {change[row]:.2f}"),
            strict=True,
        ):
            show(axes, image, caption, "" if row else title)
    show_curves(right.subplots(), {"loss": [value / len(after) for value in film.losses]}, "loss, mean")
    save_picture(figure, args.out)


def second_opinions(before: Tensor, after: Tensor) -> list[str]:
    images, labels = digits("train")
    judge = SVC(gamma=0.01).fit(images.flatten(1).numpy(), labels.numpy())
    answers = [judge.predict(batch.flatten(1).numpy()) for batch in (before, after)]
    return [f"; support vector machine: {a} -> {b}" for a, b in zip(*answers, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
