"""Style transfer as in the paper: a prompt's image in the style of a picture, by Gram matrices of CLIP's patch tokens.

    python examples/authors_style.py --input_image STYLE.jpg --prompt "A portrait of an astronaut"

Stable Diffusion 1.4 with guidance 5, 50 steps of DDIM. The first 45 run once, without gradients; the input of step 45
is optimised for 200 iterations of Adam, with the gradient of that step. On a GPU in float16, with autocast and
GradScaler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from authors import (
    Diary,
    add_stable_diffusion_options,
    authors_parser,
    autocast,
    ddim_arguments,
    load_square,
    optimise_scaled,
    stable_diffusion,
)
from common import parse
from torch import Tensor

from sdo_fast import from_pipeline
from sdo_fast.losses import ClipGramStyle


def main(argv: Sequence[str] | None = None) -> int:
    parser = authors_parser("authors_style", __doc__)
    add_stable_diffusion_options(parser, pre_steps=45, optim_steps=200)
    add = parser.add_argument
    add("--input_image", type=Path, required=True, help="picture with the style")
    add("--prompt", default="A portrait of Caleb, a character from the Critical Role series.", help="(%(default)s)")
    add("--guidance_scale", type=float, default=5.0, help="(%(default)s)")
    add("--clip_model", default="openai/clip-vit-base-patch16", help="id or folder (%(default)s)")
    add("--layer", type=int, default=3, help="block whose patch tokens are compared (%(default)s)")
    run(parse(parser, argv, custom_steps=5, pre_steps=3, optim_steps=3))
    return 0


def run(args: argparse.Namespace) -> None:
    pipe = stable_diffusion(args)
    sampler = from_pipeline(
        pipe,
        args.prompt,
        args.custom_steps,
        start=args.pre_steps,
        guidance_scale=args.guidance_scale,
        step_kwargs=ddim_arguments(args),
    )
    noise = sampler.prepare_latents(torch.Generator(args.device).manual_seed(args.seed))
    reference = load_square(args.input_image, noise.shape[-1] * pipe.vae_scale_factor)
    diary = Diary(args.out, args.every)
    diary.write("gt.png", reference)
    style = ClipGramStyle(args.clip_model, reference, args.layer).to(args.device)
    with autocast(args):
        latents = sampler.warm_up(noise)

    def image_of(z: Tensor) -> Tensor:
        return sampler.decode(sampler(z))

    optimise_scaled(image_of, latents, style, args, diary)
    diary.close("style")


if __name__ == "__main__":
    sys.exit(main())
