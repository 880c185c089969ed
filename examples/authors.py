"""What the recipes of SDO's authors share: options, Stable Diffusion 1.4, the optimisation and what it writes.

Images are (B, 3, H, W) in [0, 1] here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import save_picture, show_curves
from diffusers import DDIMScheduler, StableDiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from runs import OUTPUT, write_atomically
from torch import Tensor, nn
from tqdm import tqdm

BETAS = (0.9, 0.9)


def authors_parser(script: str, description: str) -> argparse.ArgumentParser:
    """The options of all three, by the authors' names and with their defaults; --out, --every and --quick are ours."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--custom_steps", type=int, default=50, help="sampling steps (%(default)s)")
    add("--lr", type=float, default=0.01, help="learning rate of Adam, betas 0.9 and 0.9 (%(default)s)")
    add("--eta", type=float, default=0.0, help="of DDIM (%(default)s)")
    add("--seed", type=int, default=42, help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--out", type=Path, default=OUTPUT / script, help="folder to write to (%(default)s)")
    add("--every", type=int, default=1, help="a picture each so many iterations, 0 for none (%(default)s)")
    add("--quick", action="store_true", help="a few iterations, to see that it works")
    return parser


def add_stable_diffusion_options(parser: argparse.ArgumentParser, *, pre_steps: int, optim_steps: int) -> None:
    add = parser.add_argument
    add("--model_path", default="CompVis/stable-diffusion-v1-4", help="id or folder of the pipeline (%(default)s)")
    add("--pre_steps", type=int, default=pre_steps, help="first step that is optimised through (%(default)s)")
    add("--optim_steps", type=int, default=optim_steps, help="iterations (%(default)s)")


def ddim_arguments(args: argparse.Namespace) -> dict[str, object]:
    return {"eta": args.eta, "use_clipped_model_output": True}


def stable_diffusion(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline with the authors' scheduler, frozen; in float16 on a GPU."""
    pipe = StableDiffusionPipeline.from_pretrained(args.model_path, safety_checker=None, requires_safety_checker=False)
    # Not by from_pretrained, which would change the authors' steps_offset of 0.
    pipe.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe.to(args.device, torch.float16) if on_gpu(args) else pipe.to(args.device)


def on_gpu(args: argparse.Namespace) -> bool:
    return torch.device(args.device).type == "cuda"


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(args.device).type, torch.float16, enabled=on_gpu(args))


def load_square(path: Path, side: int) -> Tensor:
    """The middle square of a picture, (1, 3, side, side)."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    pixels = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 255


@dataclass
class Diary:
    """The loss of every iteration, and pictures in a folder: gt.png, rec_img_0.png, ..., loss.png."""

    folder: Path
    every: int
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float, image: Tensor) -> None:
        """The next iteration."""
        if self.every and len(self.losses) % self.every == 0:
            self.write(f"rec_img_{len(self.losses)}.png", image)
        self.losses.append(loss)

    def write(self, name: str, image: Tensor) -> None:
        pixels = (image[0].detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        write_atomically(self.folder / name, lambda partial: Image.fromarray(pixels).save(partial))

    def close(self, name: str) -> None:
        """Draw the curve."""
        if not self.losses:
            raise SystemExit("interrupted before the first result")
        print(f"\n{name}: {len(self.losses) - 1} iterations, loss: {self.losses[0]:.4f} -> {self.losses[-1]:.4f}")
        figure = Figure(figsize=(6, 4), layout="constrained")
        show_curves(figure.subplots(), {name: self.losses}, f"loss, {name}")
        save_picture(figure, self.folder / "loss.png")


def optimise_scaled(
    image_of: Callable[[Tensor], Tensor],
    latents: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    diary: Diary,
) -> Tensor:
    """Minimise loss_fn(image_of(z)) from z = latents; on a GPU under autocast, the loss scaled by torch's GradScaler.

    z is kept in float32, for Adam's eps and the scaler know no float16. Ctrl-C ends it early. Returns z.
    """
    z = latents.detach().to(torch.float32, copy=True).requires_grad_()
    adam = torch.optim.Adam([z], lr=args.lr, betas=BETAS)
    scaler = torch.amp.GradScaler(z.device.type, enabled=on_gpu(args))
    try:
        for k in (bar := tqdm(range(args.optim_steps + 1), desc="optimising")):
            with torch.set_grad_enabled(k < args.optim_steps), autocast(args):
                image = image_of(z.to(latents.dtype))
                loss = loss_fn(image)
            diary.add(loss.item(), image)
            bar.set_postfix(loss=f"{loss.item():.4g}")
            if k < args.optim_steps:
                adam.zero_grad()
                scaler.scale(loss).backward(inputs=[z])
                scaler.step(adam)
                scaler.update()
    except KeyboardInterrupt:
        pass
    return z.detach()
