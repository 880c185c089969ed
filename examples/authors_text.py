"""Editing by a text as in the paper: first towards a picture, then towards what the text says as well.

    python examples/authors_text.py --model_path UNET --input_image FACE.png --prompt "A photo of a smile face."

A diffusion model of pixels (a folder or id of a diffusers UNet2DModel, or of a pipeline with one: the authors take
guided-diffusion's of FFHQ), 50 steps of DDIM that clip. The noise is optimised with the gradient of the first step, for

    alpha * loss of the text + (1 - alpha) * mean |x_0 - picture|        (x_0 in [-1, 1])

where alpha is 0 for 150 iterations and 0.5 for 50 more. The text's loss is minus the mean similarity, by CLIP, of 20
copies changed by DiffAugment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from authors import BETAS, Diary, authors_parser, ddim_arguments, load_square
from common import parse
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor

from sdo_fast import ShortcutSampler, optimize_latents
from sdo_fast.losses import ClipTextSimilarity, DiffAugment
from sdo_fast.optimize import Iteration


def main(argv: Sequence[str] | None = None) -> int:
    parser = authors_parser("authors_text", __doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="id or folder of a UNet2DModel, or of a pipeline with one")
    add("--input_image", type=Path, required=True, help="picture to begin with")
    add("--prompt", default="A photo of a smile face.", help="(%(default)s)")
    add("--guidance_steps", type=int, default=200, help="iterations (%(default)s)")
    add("--alpha_warmup_steps", type=int, default=150, help="iterations without the text (%(default)s)")
    add("--alpha_after", type=float, default=0.5, help="weight of the text after them (%(default)s)")
    add("--copies", type=int, default=20, help="augmented copies (%(default)s)")
    add("--clip_model", default="openai/clip-vit-base-patch32", help="id or folder (%(default)s)")
    run(parse(parser, argv, custom_steps=4, guidance_steps=6, alpha_warmup_steps=3))
    return 0


def load_unet(source: str) -> UNet2DModel:
    pipeline = (Path(source) / "model_index.json").is_file()
    unet = DiffusionPipeline.from_pretrained(source).unet if pipeline else UNet2DModel.from_pretrained(source)
    return unet.eval().requires_grad_(False)


def alpha(iteration: int, args: argparse.Namespace) -> float:
    """The weight of the text in one iteration."""
    return 0.0 if iteration < args.alpha_warmup_steps else args.alpha_after


def run(args: argparse.Namespace) -> None:
    unet = load_unet(args.model_path).to(args.device)
    sampler = ShortcutSampler(unet, DDIMScheduler(), args.custom_steps, step_kwargs=ddim_arguments(args))
    side, generator = unet.config.sample_size, torch.Generator(args.device).manual_seed(args.seed)
    noise = torch.randn(1, 3, side, side, generator=generator, device=args.device)
    reference = load_square(args.input_image, side).to(args.device)
    diary = Diary(args.out, args.every)
    diary.write("gt.png", reference)
    text = ClipTextSimilarity(args.clip_model, args.prompt).to(args.device)
    augment = DiffAugment("color,translation,resize,cutout", generator)

    def decode(x0: Tensor) -> Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)

    def loss(x0: Tensor, iteration: int) -> Tensor:
        image, weight = decode(x0), alpha(iteration, args)
        distance = 2 * (image - reference).abs().mean()
        copies = augment(image.repeat(args.copies, 1, 1, 1))
        return weight * text(copies) + (1 - weight) * distance

    def keep(record: Iteration, latents: Tensor, x0: Tensor) -> None:
        diary.add(record.loss, decode(x0))

    optimize_latents(sampler, noise, loss, args.guidance_steps, args.lr, BETAS, callback=keep)
    diary.close("text")


if __name__ == "__main__":
    sys.exit(main())
