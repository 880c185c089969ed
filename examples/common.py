"""What the examples share: options, files written whole, pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from sdo_fast import ShortcutSampler, optimize_latents
from sdo_fast.optimize import Iteration

OUTPUT = Path(__file__).resolve().parent / "output"


class SphereSampler(ShortcutSampler):
    """A sampler that scales its input noise to RMS 1, where all Gaussian noise of many pixels lies.

    The model knows no other input: without this the latents leave that sphere as they are optimised, and the images
    turn into saturated pixels that please the loss alone.
    """

    def sample(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rms = latents.square().mean(tuple(range(1, latents.ndim)), keepdim=True).sqrt()
        return super().sample(latents / rms, *args, **kwargs)


def write_whole(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: an interrupted write leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    save(partial)
    os.replace(partial, path)


def grad_step(text: str) -> str | int:
    """The sampler's grad_step from the command line: a name or an index."""
    return int(text) if text.lstrip("-").isdigit() else text


def sdo_parser(script: str, description: str, *, steps: int, sampler_steps: int, lr: float) -> argparse.ArgumentParser:
    """The options of every example: optimisation, sampler, seed and output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="optimisation steps (%(default)s)")
    parser.add_argument("--sampler-steps", type=int, default=sampler_steps, help="sampling steps (%(default)s)")
    parser.add_argument(
        "--grad-step",
        type=grad_step,
        default="first",
        help='step that keeps its gradient: "first", "last", "random", "identity" or an index (%(default)s)',
    )
    parser.add_argument("--lr", type=float, default=lr, help="learning rate of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT / f"{script}.png", help="picture to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds' run, to see that it works")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: object) -> argparse.Namespace:
    """Parse; with --quick the given defaults replace the others, and options that are set still win."""
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


class Film:
    """A callback for ``optimize_latents`` that keeps the image of every iteration."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.losses: list[float] = []

    def __call__(self, record: Iteration, latents: Tensor, image: Tensor) -> None:
        self.images.append(image.clamp(-1, 1))
        self.losses.append(record.loss)

    def stills(self, count: int) -> list[int]:
        """At most ``count`` iterations, the first and the last among them, closer together at the beginning."""
        last = len(self.images) - 1
        return sorted({round(last * (i / (count - 1)) ** 2) for i in range(count)}) if last else [0]


def optimise(
    sampler: ShortcutSampler,
    latents: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    title: str,
    **sampler_kwargs: Any,
) -> Film:
    """``optimize_latents`` with the options of the command line; prints the loss and its price.

    Ctrl-C ends it early, and what was done until then is drawn all the same.
    """
    film = Film()
    result = optimize_latents(sampler, latents, loss_fn, args.steps, args.lr, callback=film, **sampler_kwargs)
    if not film.images:
        raise SystemExit("interrupted before the first result")
    calls, seconds = (sum(getattr(record, name) for record in result.history) for name in ("model_calls", "seconds"))
    print(f"\n{title}: {len(film.losses) - 1} steps, {calls} model calls, {seconds:.1f} s")
    print(f"  loss, sum of {len(latents)}: {film.losses[0]:.4f} -> {film.losses[-1]:.4f}")
    return film


def show(axes: Axes, image: Tensor, caption: str = "", title: str = "", frame: str | None = None) -> None:
    """One image (1 or 3, H, W) in [-1, 1], an optional caption below and title above, an optional coloured frame."""
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
) -> None:
    """One row per image of the batch, one column per still, and the targets in a last column."""
    moments = film.stills(stills)
    columns = len(moments) + (targets is not None)
    grid = figure.subplots(len(film.images[0]), columns, squeeze=False)
    for row, axes in enumerate(grid):
        for column, moment in enumerate(moments):
            image = film.images[moment][row]
            title = "" if row else "before" if moment == 0 else f"step {moment}"
            show(axes[column], image, caption(image, row), title)
        if targets is not None:
            show(axes[-1], targets[row], "", "" if row else "target", frame="tab:orange")


def show_curve(axes: Axes, curves: dict[str, Sequence[float]], ylabel: str, xlabel: str = "optimisation step") -> None:
    """One line per named series, over 0, 1, 2, ..."""
    for name, values in curves.items():
        axes.plot(np.arange(len(values)), values, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)


def save_picture(figure: Figure, path: Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120))
    print(f"picture: {path}")
