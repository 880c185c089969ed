"""A photograph made more beautiful as in the paper: inverted, and optimised for an aesthetic score.

    python examples/authors_aesthetic.py --input_image PHOTOGRAPH.jpg --heads L14.pth B32.pth

Stable Diffusion 1.4 without a prompt or guidance, 50 steps of DDIM. The photograph is encoded (a sample of the
encoder's distribution) and inverted; the input of step 10 is optimised for 100 iterations of Adam, with the gradient of
that step, for |score - 10|: linear heads on CLIP ViT-L/14 and ViT-B/32 (weights 0.5 and 1.5), over 16 cutouts. On a GPU
in float16, with autocast and GradScaler.

The authors undo the last 10 steps of the sampler (up to t = 180) and begin with that at step 10 (t = 780), so that the
optimisation does not begin with the photograph. --invert_to_start undoes all steps down to step 10.

The heads are LAION's sa_0_4_vit_l_14_linear.pth and sa_0_4_vit_b_32_linear.pth (LAION-AI/aesthetic-predictor).
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

from sdo_fast import from_pipeline, invert
from sdo_fast.losses import AestheticScore, Cutouts

CLIP_MODELS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")
HEADS = tuple(Path(".cache/emb_reader") / f"sa_0_4_{name}_linear.pth" for name in ("vit_l_14", "vit_b_32"))
WEIGHTS = (0.5, 1.5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = authors_parser("authors_aesthetic", __doc__)
    add_stable_diffusion_options(parser, pre_steps=10, optim_steps=100)
    add = parser.add_argument
    add("--input_image", type=Path, required=True, help="photograph to begin with")
    add("--aesthetic_target", type=float, default=10.0, help="score to reach, 1 to 10 (%(default)s)")
    add("--invert_to_start", action="store_true", help="invert up to the step where the sampling begins")
    add("--clip_model", nargs=2, default=CLIP_MODELS, help="ids or folders (%(default)s)")
    add("--heads", nargs=2, type=Path, default=HEADS, help="files of linear heads, one for each (%(default)s)")
    add("--cutouts", type=int, default=16, help="(%(default)s)")
    run(parse(parser, argv, custom_steps=5, pre_steps=1, optim_steps=3, cutouts=4))
    return 0


def run(args: argparse.Namespace) -> None:
    generator = torch.Generator(args.device).manual_seed(args.seed)
    score = AestheticScore(args.clip_model, args.heads, args.aesthetic_target, WEIGHTS).to(args.device)
    cutouts = Cutouts(args.cutouts, score.clips[0].clip.config.vision_config.image_size, 0.3, generator)
    pipe = stable_diffusion(args)
    sampler = from_pipeline(pipe, "", args.custom_steps, start=args.pre_steps, step_kwargs=ddim_arguments(args))
    photograph = load_square(args.input_image, sampler.shape[-1] * pipe.vae_scale_factor)
    diary = Diary(args.out, args.every)
    diary.write("gt.png", photograph)
    upto = args.pre_steps if args.invert_to_start else args.custom_steps - args.pre_steps
    with torch.no_grad(), autocast(args):
        encoded = pipe.vae.encode((2 * photograph - 1).to(args.device, pipe.vae.dtype)).latent_dist
        x0 = encoded.sample(generator) * pipe.vae.config.scaling_factor
        inversion = invert(sampler, x0, upto)
    print(f"inversion up to step {upto}: {inversion.error:.1%} away from the photograph after the round trip")

    def image_of(z: Tensor) -> Tensor:
        return sampler.decode(sampler(z))

    def loss(image: Tensor) -> Tensor:
        return score(cutouts(image))

    optimise_scaled(image_of, inversion.latents, loss, args, diary)
    diary.close("aesthetic score")


if __name__ == "__main__":
    sys.exit(main())
