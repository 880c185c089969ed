"""`python -m benchmarks.inspection.prefill TARGET`: fills Triton's cache for a GPU that need not be there.

Compiles what the block, the network, their training steps, the suites of the ops and the main launches of every family
start, in fp32, tf32 and autocast to bf16, so that a GPU's first minutes are not spent on it. The cache, in
TRITON_CACHE_DIR, serves the same version of Triton, the same sources of the kernels and the same path of the cache.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..harness import autocast_to_bf16, products_in

Compilation = tuple[str, Callable[[], Any]]


def step(
    model: nn.Module, shape: tuple[int, ...], train: bool, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """A forward of a model on the meta device, or a training step."""

    def run() -> None:
        x = torch.empty(shape, dtype=dtype, device="meta")
        if not train:
            with torch.no_grad():
                model(x)
            return
        outputs = model(x, all_scales=True) if shape[1] == 3 else (model(x.requires_grad_()),)
        parameters = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad([o.sum() for o in outputs], parameters, allow_unused=True)

    return run


def models() -> Iterator[Compilation]:
    """The block and the network as the suites `block` and `network` run them."""
    import swformer_fast as sf

    from .. import bench_block, bench_network

    networks = (
        (False, bench_network.PRESET, [(1, 3, 256, 256)]),
        (True, bench_network.TRAINED, [(4, 3, 128, 128)]),
    )
    blocks = ((False, bench_block.EVAL), (True, bench_block.TRAIN))
    with torch.device("meta"):
        for (train, shapes), (_, preset, images) in zip(blocks, networks, strict=True):
            kind = "training" if train else "eval"
            for shape in shapes:
                yield f"block {kind} {shape}", step(sf.SWFormerBlock(shape[1]).train(train), shape, train)
            network = sf.SWFormer.from_preset(preset).train(train)
            yield from ((f"{preset} {kind} {image}", step(network, image, train)) for image in images)


def ops() -> Iterator[Compilation]:
    """Each op at the shapes of its suite, forward and with its gradients."""
    from ..op_cases import moved
    from .arguments import ARGUMENTS, functions

    def run(function: Callable[..., Tensor], args: Any) -> None:
        with torch.no_grad():
            function(*args)
        leaves = [a for a in tree_leaves(args) if isinstance(a, Tensor) and a.requires_grad]
        torch.autograd.grad(function(*args).sum(), leaves)

    for name, make in ARGUMENTS.items():
        function, _ = functions(name)
        for shape in importlib.import_module(make.__module__).SHAPES:
            yield f"{name} {shape}", partial(run, function, moved(tuple(make(shape)), "meta"))


def launches(family: str) -> Iterator[Compilation]:
    """The main launches of a file of kernels at the two sizes that `benchmarks.inspection.launches` runs."""
    from .launches import LAUNCHES, meta

    for shape in (LAUNCHES[family].compiled[0], LAUNCHES[family].interpreted[1]):
        for launch in LAUNCHES[family].launches(meta, shape):
            if launch.main:
                yield f"{launch.name} {shape}", partial(launch.launcher, *launch.args)


def main(argv: Sequence[str] | None = None) -> int:
    from .compilation import pretend
    from .machine_code import TARGETS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.prefill", description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="a block in fp32 alone")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    pretend(args.target)
    from .launches import LAUNCHES
    from .launching import NoHostWork
    from .launching import launches as handed

    counted = 0

    def compile_only(kernel: Any, grid: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        nonlocal counted
        before = len(kernel.device_caches[0][0])
        kernel.run(*arguments, grid=grid, warmup=True, **keywords)
        counted += len(kernel.device_caches[0][0]) - before

    begin = time.perf_counter()

    def told(what: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s {counted:5d} kernels  {what}", flush=True)

    for dtype in ("fp32", "tf32", "autocast")[: 1 if args.quick else None]:
        with products_in(dtype):
            for name, run in models() if dtype == "autocast" or args.quick else (*models(), *ops()):
                with NoHostWork(compile_only):
                    (autocast_to_bf16(run, "cuda") if dtype == "autocast" else run)()
                told(f"{name} {dtype}")
                if args.quick:
                    return 0
    for family in LAUNCHES:
        for name, run in launches(family):
            with handed(compile_only):
                run()
            told(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
