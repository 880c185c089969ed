"""`python -m benchmarks.inspection.host`: what a call costs the host before a GPU could begin.

Launches are handed to nobody, and tensors are small and on the CPU, where PyTorch's own operators take about as long
as it takes to launch them: so these are estimates, to compare two versions on one machine. Beside them stand the calls
of Python functions, which are the same on every machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import swformer_fast as sf

from ..op_cases import module_run
from .launching import launches

CASES = {
    "block eval": ("block", (1, 40, 8, 8), False),
    "block training step": ("block", (1, 40, 8, 8), True),
    "derain, small eval": ("network", (1, 3, 16, 16), False),
}
"""Model, image, whether it trains."""


def run_of(case: str) -> Callable[[], Any]:
    kind, shape, train = CASES[case]
    block, network = sf.SWFormerBlock, partial(sf.SWFormer.from_preset, "derain", exit="small")
    model: nn.Module = block(shape[1]) if kind == "block" else network()
    model.train(train)
    return module_run(model, torch.randn(shape), train)


def calls(run: Callable[[], Any]) -> int:
    """Of Python functions, in this thread; those of a backward pass run in others."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    run()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def measure(case: str, repeats: int) -> tuple[float, int, int]:
    """Median seconds, launches of our kernels, calls of Python functions."""
    launched = 0

    def count(*launch: Any) -> None:
        nonlocal launched
        launched += 1

    run, seconds = run_of(case), []
    with launches(count):
        run()
        launched = 0
        run()
        per_call = launched
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds), per_call, calls(run)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.host", description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for case in CASES:
        seconds, launched, called = measure(case, args.repeats)
        print(f"{case:22s} {seconds * 1e3:7.3f} ms {launched:4d} launches of our kernels {called:6d} Python calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
