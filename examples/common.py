"""What the examples share: options, models, the optimisation and its pictures.

Images are (B, C, H, W) in [-1, 1] everywhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from digits_model import NULL_LABEL, ThicknessScore, load_digits_classifier, load_digits_unet, scheduler
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from runs import OUTPUT, write_atomically
from torch import Tensor, nn

from sdo_fast import from_pipeline, optimize_latents
from sdo_fast.optimize import Iteration
from sdo_fast.pipelines import PipelineSampler

# Options


def path(text: str) -> str | int:
    """The sampler's gradient path from the command line: a name or an index."""
    return int(text) if text.lstrip("-").isdigit() else text


def sdo_parser(script: str, description: str, *, steps: int, sampler_steps: int, lr: float) -> argparse.ArgumentParser:
    """The options of the examples that optimise latents: optimisation, sampler, seed and output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="optimisation steps (%(default)s)")
    parser.add_argument("--sampler-steps", type=int, default=sampler_steps, help="sampling steps (%(default)s)")
    parser.add_argument(
        "--path",
        type=path,
        default="first",
        help='step that keeps its gradient: "first", "last", "random", "identity" or an index (%(default)s)',
    )
    parser.add_argument("--lr", type=float, default=lr, help="learning rate of Adam (%(default)s)")
    parser.add_argument(
        "--constraint",
        choices=("norm", "white", "none"),
        default="norm",
        help="what optimised noise keeps: its norm, the statistics of white noise, or nothing (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT / f"{script}.png", help="picture to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds' run, to see that it works")
    return parser


def add_model_options(
    parser: argparse.ArgumentParser, *, prompts: Sequence[str], guidance: float | None, critic: str
) -> None:
    """The options of the examples that run on the digits model or on a diffusers pipeline."""
    group = parser.add_argument_group("models")
    group.add_argument("--model", type=Path, help="folder of a diffusers pipeline (the digits model)")
    group.add_argument("--critic", type=Path, help=f"folder of a transformers image classifier, {critic}")
    group.add_argument(
        "--prompt",
        nargs="*",
        default=prompts,
        help="prompts of the pipeline, one image each; 0 to 9 or none for the digits model (%(default)s)",
    )
    group.add_argument(
        "--guidance",
        type=lambda text: None if text == "none" else float(text),
        default=guidance,
        help='scale of classifier-free guidance, or "none" (%(default)s)',
    )
    group.add_argument("--device", default="cpu", help="(%(default)s)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """Parse; with --quick the given defaults replace the others, and options that are set still win."""
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    if getattr(args, "model", None) and not args.critic:
        parser.error("--model needs --critic: the digits classifier knows digits only")
    return args


# Models


class HubClassifier(nn.Module):
    """A transformers image classifier as a differentiable critic with the interface of ``DigitsClassifier``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        size = getattr(processor, "crop_size", None) or processor.size
        self.size = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(-1, 1, 1))

    def _run(self, images: Tensor, **kwargs: Any) -> Any:
        images = nn.functional.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images).logits

    def features(self, images: Tensor) -> list[Tensor]:
        """Every hidden state with its channels in dimension 1."""
        states = self._run(images, output_hidden_states=True).hidden_states
        return [state if state.ndim == 4 else state.mT for state in states]


@dataclass
class Studio:
    """A sampler with its conditions bound, its starting noise, and a critic of its images."""

    sampler: PipelineSampler
    latents: Tensor
    critic: nn.Module
    digits: bool
    """Whether it is the digits model."""

    def decode(self, x0: Tensor) -> Tensor:
        return 2 * self.sampler.decode(x0) - 1

    def score(self, index: int) -> tuple[Callable[[Tensor], Tensor], str]:
        """Images to the score to maximise (B,), and its name: the strokes' thickness, or a logit of the critic."""
        if self.digits:
            thickness = ThicknessScore(self.critic).to(self.latents.device)
            return thickness, f"estimated thickness (R² {thickness.r2:.2f})"
        return lambda images: self.critic(images)[:, index], f"critic's output {index}"


def load_studio(args: argparse.Namespace, *, start: int = 0) -> Studio:
    """The digits model, or the pipeline and the critic of the options; the sampler begins at step ``start``."""
    prompts = list(args.prompt)
    options: dict[str, Any] = {
        "num_inference_steps": args.sampler_steps,
        "start": start,
        "path": args.path,
        "guidance_scale": args.guidance,
    }
    if args.model is None:
        unet = load_digits_unet().to(args.device)
        labels = torch.tensor([int(prompt) for prompt in prompts], device=args.device)
        conditions = ({"class_labels": labels}, None)
        if args.guidance is not None:
            conditions = ({"class_labels": labels}, {"class_labels": torch.full_like(labels, NULL_LABEL)})
        pipe = DDIMPipeline(unet=unet, scheduler=scheduler())
        sampler = PipelineSampler(pipe, unet, conditions, len(labels), (16, 16), **options)
    else:
        pipe = DiffusionPipeline.from_pretrained(args.model, local_files_only=True).to(args.device)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        if hasattr(pipe, "encode_prompt"):
            options |= {"prompt": prompts}
        else:
            options |= {"guidance_scale": None, "images_per_prompt": len(prompts)}
        sampler = from_pipeline(pipe, **options)
    critic = (
        load_digits_classifier() if args.critic is None else HubClassifier(args.critic).eval().requires_grad_(False)
    )
    latents = sampler.prepare_latents(torch.Generator().manual_seed(args.seed))
    return Studio(sampler, latents, critic.to(args.device), digits=args.model is None)


def load_picture(path: Path, studio: Studio) -> Tensor:
    """A picture as the critic sees it, (1, C, H, W)."""
    pixels = np.array(Image.open(path).convert("L" if studio.digits else "RGB"))
    image = torch.from_numpy(pixels).to(studio.latents.device).float() / 127.5 - 1
    return image.view(*image.shape[:2], -1).permute(2, 0, 1)[None]


# Optimisation


def distance_to_data(images: Tensor, data: Tensor) -> Tensor:
    """The RMS distance of each image to the nearest picture of the data, (B,)."""
    rms = images[0].numel() ** -0.5
    return torch.cdist(images.flatten(1), data.to(images).flatten(1)).amin(1) * rms


@dataclass
class Film:
    """The images and the loss of every iteration, and the seconds it took."""

    images: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def stills(self, count: int) -> list[int]:
        """At most ``count`` iterations, the first and the last among them, closer together at the beginning."""
        last = len(self.images) - 1
        return sorted({round(last * (i / (count - 1)) ** 2) for i in range(count)})


def optimise(
    sampler: Any,
    latents: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    title: str,
    *,
    decode: Callable[[Tensor], Tensor],
    **sampler_kwargs: Any,
) -> Film:
    """Minimise ``loss_fn(decode(x_0))`` by ``optimize_latents`` with the options given; print the loss and its price.

    ``sampler`` is what it takes, with an attribute ``model_calls``.

    The noise keeps its norm, or what ``--constraint`` asks for: noise of another norm is unknown to the model, and the
    images turn into saturated pixels that please the loss alone.

    Ctrl-C ends it early, and what was done until then is drawn all the same.
    """
    film = Film()
    image: Tensor

    def loss(x0: Tensor) -> Tensor:
        nonlocal image
        image = decode(x0)
        return loss_fn(image)

    def keep(record: Iteration, latents: Tensor, x0: Tensor) -> None:
        film.images.append(image.detach().cpu())
        film.losses.append(record.loss)
        film.seconds.append(record.seconds)

    calls = sampler.model_calls
    generator = torch.Generator(latents.device).manual_seed(args.seed)
    optimize_latents(
        sampler,
        latents,
        loss,
        args.steps,
        args.lr,
        callback=keep,
        constraint=None if args.constraint == "none" else args.constraint,
        generator=generator,
        **sampler_kwargs,
    )
    if not film.images:
        raise SystemExit("interrupted before the first result")
    calls = sampler.model_calls - calls
    print(f"\n{title}: {len(film.losses) - 1} steps, {calls} model calls, {sum(film.seconds):.1f} s")
    print(f"  loss, sum of {len(latents)}: {film.losses[0]:.4f} -> {film.losses[-1]:.4f}")
    return film


# Pictures


def show(axes: Axes, image: Tensor, caption: str = "", title: str = "", frame: str | None = None) -> None:
    """One image, an optional caption below and title above, an optional coloured frame."""
    pixels = (image.detach().float().cpu().clamp(-1, 1) + 1) / 2
    axes.imshow(pixels.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(caption, fontsize=8, labelpad=2)
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame, linewidth=2)


def show_film(
    figure: SubFigure | Figure,
    film: Film,
    *,
    caption: Callable[[Tensor, int], str],
    stills: int = 6,
    targets: Tensor | None = None,
    target_title: str = "target",
) -> None:
    """One row per image of the batch, one column per still, and the targets in a last column.

    ``caption(images, row)`` describes image ``row`` of a batch.
    """
    moments = film.stills(stills)
    grid = figure.subplots(len(film.images[0]), len(moments) + (targets is not None), squeeze=False)
    for row, axes in enumerate(grid):
        for column, moment in enumerate(moments):
            images = film.images[moment]
            title = "" if row else "before" if moment == 0 else f"step {moment}"
            show(axes[column], images[row], caption(images, row), title)
        if targets is not None:
            show(axes[-1], targets[row], "", "" if row else target_title, frame="tab:orange")


def show_curves(
    axes: Axes, curves: Mapping[str, Sequence[float]], ylabel: str, *, x: Mapping[str, Sequence[float]] | None = None
) -> None:
    """One line per named series, over the optimisation steps or over ``x``."""
    for name, values in curves.items():
        axes.plot(x[name] if x else range(len(values)), values, label=name)
    axes.set_xlabel("optimisation step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)


def save_picture(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))
    print(f"picture: {path}")
