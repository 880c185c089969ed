"""`python -m benchmarks.inspection.variants`: kernels that Triton would compile at a first call and at the next ones.

Triton compiles a kernel again where a dtype, a constant, or the alignment of a pointer differs. Nothing is compiled
here: the launches of models on the meta device are asked what they would need.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

TARGET = "sm_90"
PHOTOS = ((256, 256), (250, 301), (480, 640), (333, 517), (1024, 1024))
BLOCKS = ((2, 40, 128, 128), (1, 40, 64, 96), (3, 40, 192, 160))
CROPS = ((4, 3, 128, 128), (2, 3, 160, 192), (1, 3, 112, 144))


def _sequences() -> Iterator[tuple[str, list[tuple[str, Callable[[], None]]]]]:
    """What is called one after the other: names, and calls at different sizes."""
    import swformer_fast as sf

    from .prefill import step

    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            block = sf.SWFormerBlock(40).to(dtype).train()
            network = sf.SWFormer.from_preset("derain", exit="small").to(dtype)
        kind = str(dtype).removeprefix("torch.")
        for name, model, shapes in (
            ("derain, small eval", copy.deepcopy(network).eval(), [(1, 3, *photo) for photo in PHOTOS]),
            ("block training", block, BLOCKS),
            ("derain, small training", network, CROPS),
        ):
            calls = [("x".join(map(str, shape)), step(model, shape, model.training, dtype)) for shape in shapes]
            yield f"{name} {kind}", calls


def added() -> dict[str, dict[str, int]]:
    """Of each sequence, the variants that each call adds to those of the calls before. For a fresh process."""
    from .compilation import pretend
    from .launching import NoHostWork

    pretend(TARGET)
    seen: set[str] = set()

    def ask(kernel: Any, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        *_, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **kwargs)
        seen.add(repr((kernel.__name__, specialization, options)))

    counts: dict[str, dict[str, int]] = {}
    for sequence, calls in _sequences():
        seen.clear()
        counts[sequence] = {}
        for name, call in calls:
            before = len(seen)
            with NoHostWork(ask):
                call()
            counts[sequence][name] = len(seen) - before
    return counts


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    print(json.dumps(added(), indent=2))
