"""Export an SWFormer by torch.export and compile it to a package of AOTInductor, for images of any size from 16 x 16.

    python examples/export_package.py --weights tiny-haze --exit medium --out haze.pt2

The package runs without the network's Python code, on this library's kernels::

    import swformer_fast, torch

    restore = torch._inductor.aoti_load_package("haze.pt2")
    restored = restore(image)

Compiling takes minutes and a C++ compiler. What was written is compared with the network.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from exports import compare, example, export_parser, network
from runs import write_atomically
from torch import Tensor

import swformer_fast as sf
from swformer_fast.tools.networks import DTYPES

TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 6e-3}
"""Both sides of the comparison round: twice what each may err."""


@contextmanager
def told(what: str) -> Iterator[None]:
    print(f"{what} ...", flush=True)
    begin = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.0f} s", flush=True)


def export(model: sf.SWFormer) -> torch.export.ExportedProgram:
    """The network as a program for any batch, height and width, in its own dtype."""
    image, free = example(model)
    with torch.no_grad():
        return torch.export.export(model, (image.to(next(model.parameters()).dtype),), dynamic_shapes=free)


def compile_package(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """Write the package and load it again."""
    torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
    return torch._inductor.aoti_load_package(os.fspath(path))


def main(argv: Sequence[str] | None = None) -> int:
    parser = export_parser(__doc__, ".pt2")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (%(default)s)")
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype]
    model = network(parser, args).to(dtype)
    with told("exporting"):
        program = export(model)

    def compared(path: Path) -> None:
        with told("compiling"):
            run = compile_package(program, path)
        print("comparing the package with the network")
        compare(lambda image: run(image.to(dtype)), model, model.in_channels, TOLERANCES[args.dtype])

    try:
        write_atomically(args.out, compared)
    except ValueError as error:
        print(f"not kept: {error}")
        return 1
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
