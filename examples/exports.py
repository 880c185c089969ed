"""What the exporting scripts share: options, the network, and the comparison of what was written with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from runs import OUTPUT
from torch import Tensor, nn
from torch.export import Dim

import swformer_fast as sf

LARGEST = 8192
SIZES = ((16, 16), (17, 100), (64, 48), (37, 50), (128, 96))
"""Heights and widths of the images that compare; none is the example that was exported."""


def export_parser(description: str, suffix: str) -> argparse.ArgumentParser:
    """Options that say which network, and where to; --out ends in `suffix`."""

    def path(text: str) -> Path:
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text}")
        return Path(text)

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--weights", help="name, file, folder or Hub repository, as from_pretrained takes it")
    which.add_argument("--preset", choices=sf.PRESETS, help="untrained network, to measure its time")
    parser.add_argument("--exit", choices=sf.EXITS, help="last exit to build (all that there is)")
    parser.add_argument("--out", type=path, default=OUTPUT / f"swformer{suffix}", help="file to write (%(default)s)")
    return parser


def network(parser: argparse.ArgumentParser, args: argparse.Namespace) -> sf.SWFormer:
    """What the options ask for, in eval mode; ends the program in words where there is none."""
    if not args.weights:
        model = sf.SWFormer.from_preset(args.preset, exit=args.exit or sf.EXITS[-1], scale_init=0.1)
        return model.eval().requires_grad_(False)
    try:
        return sf.SWFormer.from_pretrained(args.weights, exit=args.exit).requires_grad_(False)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def example(model: sf.SWFormer, least: int = 16) -> tuple[Tensor, dict[str, dict[int, Dim]]]:
    """An image to export with, of which no side is special, and the sides that are free, from `least` pixels."""
    sides = {2: Dim("height", min=least, max=LARGEST), 3: Dim("width", min=least, max=LARGEST)}
    return torch.rand(2, model.in_channels, 72, 88), {"image": {0: Dim("batch", min=1, max=1024), **sides}}


def compare(run: Callable[[Tensor], Tensor], expected: nn.Module, channels: int, tolerance: float) -> None:
    """Print the relative RMS error of what is added to images of `SIZES`; ValueError where one is above tolerance."""
    for height, width in SIZES:
        image = torch.rand(1, channels, height, width)
        with torch.no_grad():
            of = next(expected.parameters()).dtype
            exact = (expected(image.to(of)) - image.to(of)).double()
            error = ((run(image).double() - image.to(of).double() - exact).norm() / exact.norm()).item()
        print(f"  {height} x {width}: relative RMS error {error:.1e}")
        if not error <= tolerance:
            raise ValueError(f"the error is above {tolerance:g}")
